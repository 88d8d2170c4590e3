"""A tile of a target that speaks of every class, as a row loss wants it, and the way back of derivatives."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from softcurve.head.kernel import RowData, class_factors
from softcurve.head.tensors import HeadTensors
from softcurve.losses import softmax
from softcurve.losses.spec import LossSpec
from softcurve.processes import max_over


def target_tops(loss: LossSpec, tensors: HeadTensors) -> Tensor | None:
    """The largest logit of each row of the target, ``(n, 1)``, where a temperature would round at its size."""
    given = tensors.target
    if loss.target != "logits" or given is None or math.frexp(loss.target_scale)[0] == 0.5:
        return None
    top = given.new_full((len(given), 1), -math.inf)
    if given.numel():  # of a sharded head there may be no class here
        top = given.amax(-1, keepdim=True)
    if loss.processes is not None and len(given):
        max_over([top], loss.processes)
    return torch.where(top.isfinite(), top, 0.0)


def target_block(
    loss: LossSpec, given: Tensor, tops: Tensor | None, rows: slice | Tensor, classes: slice, dtype: torch.dtype
) -> Tensor:
    """The target of some rows and classes as it is given; its logits less ``tops``, where these are not ``None``."""
    block = given[rows, classes]
    return block if tops is None else block.to(dtype) - tops[rows].to(dtype)


@dataclass(frozen=True)
class DenseTarget:
    """From what is given to what is compared: ``w ⊙ ((1 − ε) y + ε / C)`` for a cross-entropy, else logits."""

    loss: LossSpec
    data: RowData

    @property
    def class_weight(self) -> Tensor | None:
        """The factors of all classes in the target's own mass."""
        return class_factors(self.data.class_weight)[0]

    def uniform(self, classes: slice) -> Tensor | None:
        """``ε w / C`` of a block's classes, which label smoothing adds to the target; 0 at a masked class."""
        if not self.loss.smoothing:
            return None
        each, share = self.loss.smoothing / self.data.class_count, self.data.share_of(classes)
        return self.data.weight.new_full((), each) if share is None else each * share

    @property
    def scale_left(self) -> float:
        """The target's temperature, where no product has applied it."""
        return 1.0 if self.loss.target == "teacher" else self.loss.target_scale

    @property
    def _by_logits(self) -> bool:
        return self.loss.target != "probabilities"

    def forward(self, given: Tensor) -> Tensor:
        """What the row loss is given."""
        if self.loss.is_cross_entropy:
            y = torch.softmax(given, -1) if self._by_logits else given
            y, uniform = self._chain(y), self.uniform(slice(0, given.shape[-1]))
            return y if uniform is None else y + uniform
        if self._by_logits:
            return given if self.scale_left == 1 else given * self.scale_left
        return torch.log(given) * self.scale_left

    def _chain(self, rows: Tensor) -> Tensor:
        """Through smoothing and class weights, either way."""
        rows = rows * (1 - self.loss.smoothing) if self.loss.smoothing else rows
        return rows if self.class_weight is None else rows * self.class_weight

    def direction(self, given: Tensor, v: Tensor) -> Tensor:
        """The change of :meth:`forward`."""
        if self.loss.is_cross_entropy:
            return self._chain(softmax.jacobian_product(given, v) if self._by_logits else v)
        if self._by_logits:
            return v * self.scale_left
        return torch.where(given > 0, v / given, 0.0) * self.scale_left

    def gradient(self, given: Tensor, gradient: Tensor) -> Tensor:
        """In what is given, from the gradient in :meth:`forward`'s."""
        if self.loss.is_cross_entropy:
            gradient = self._chain(gradient)
            return softmax.jacobian_product(given, gradient) if self._by_logits else gradient
        if self._by_logits:
            return gradient * self.scale_left
        return torch.where(given > 0, gradient / given, 0.0) * self.scale_left

    def product(self, given: Tensor, gradient: Tensor, change: Tensor | None, v: Tensor | None) -> Tensor:
        """The change of :meth:`gradient` as ``gradient`` changes by ``change`` and what is given by ``v``."""
        total = torch.zeros_like(given) if change is None else self.gradient(given, change)
        if v is None:
            return total
        if self.loss.is_cross_entropy:
            if not self._by_logits:
                return total
            gradient = self._chain(gradient)
            y = torch.softmax(given, -1)
            y_v = y * softmax.centred(v, y)
            return total + y_v * softmax.centred(gradient, y) - y * (y_v * gradient).sum(-1, keepdim=True)
        if self._by_logits:
            return total
        return total - torch.where(given > 0, gradient * v / given.square(), 0.0) * self.scale_left
