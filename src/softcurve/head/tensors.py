"""The tensors of a pass over a head's tiles, beside the :class:`~softcurve.losses.spec.LossSpec` that describes it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from softcurve.head.products import MapParts
from softcurve.losses.spec import LossSpec

# One entry for each of the tensors of HeadTensors.differentiable: its change, gradient, or whether that is wanted.
Directions: TypeAlias = Sequence[Tensor | None]
Wanted: TypeAlias = Sequence[bool]
DIFFERENTIABLE = 8  # the number of tensors that may receive gradients
STATISTICS = 4  # of each row, after the log-probabilities: entropy, log-sum-exp, mean logit, collision
TARGET = 3  # the position of the target among them
NOTHING: Wanted = (False,) * DIFFERENTIABLE
NONE: Directions = (None,) * DIFFERENTIABLE


class HeadTensors(NamedTuple):
    """The tensors of a head's loss, rows flattened; the first eight may receive gradients."""

    input: Tensor  # (n, d)
    weight: Tensor  # (C, d)
    bias: Tensor | None  # (C,)
    target: Tensor | None  # see LossSpec
    target_weight: Tensor | None
    target_bias: Tensor | None
    low_rank: Tensor | None  # (C, r): more columns of the weight, for the last r of the features
    target_low_rank: Tensor | None  # likewise of a teacher's weight
    indices: Tensor | None  # (n, k)
    row_weight: Tensor  # (n,)
    # (C,); or (2, C) where masked classes have no share of label smoothing: in the target's own mass, in the smoothing.
    # With rows that exclude classes of the smoothing (3, C): also the uniform distribution over the unmasked classes.
    class_weight: Tensor | None
    excluded: Tensor | None = None  # (n, m): classes that have no part in a row's softmax, each once; −1 is none
    labels: Tensor | None = None  # (n, k): the classes that the target of the cross-entropy beside a divergence names
    row_scale: Tensor | None = None  # (n,): a factor of each row's logits after the soft cap
    target_classes: Tensor | None = None  # (C,): the rows of a teacher's weight that are the classes, if not its own
    groups: Tensor | None = None  # (C,), (C of the target,): of the classes of both sides; see LossSpec
    target_groups: Tensor | None = None
    label_factor: Tensor | None = None  # (): of the cross-entropy beside a divergence
    label_values: Tensor | None = None  # (n, k + 1) or (n, C): the distribution of soft labels, as that of a target

    @staticmethod
    def split(given: Sequence[Any]) -> tuple[Any, Any]:
        """Return the tensors, or what there is for each of them, and what follows them in a flat sequence."""
        count = len(HeadTensors._fields)
        return HeadTensors(*given[:count]), given[count:]

    @property
    def differentiable(self) -> tuple[Any, ...]:
        """The tensors that may receive gradients, or what there is for each of them."""
        return self[:DIFFERENTIABLE]

    @staticmethod
    def derivatives(of_differentiable: Directions, of_row_weight: Tensor | None = None) -> tuple[Tensor | None, ...]:
        """Return the derivatives in all fields, of which those that are not named are ``None``."""
        return *of_differentiable, None, of_row_weight, *(None,) * (len(HeadTensors._fields) - DIFFERENTIABLE - 2)

    @property
    def features(self) -> Tensor:
        """The features that the weight multiplies, without those of low-rank columns, ``(n, d)``."""
        return self.input[:, : self.weight.shape[1]]

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the computation, at least float32."""
        dtype = torch.promote_types(self.input.dtype, self.weight.dtype)
        if self.target is not None and self.indices is None:
            dtype = torch.promote_types(dtype, self.target.dtype)
        if self.label_values is not None and self.labels is None:
            dtype = torch.promote_types(dtype, self.label_values.dtype)
        return torch.promote_types(dtype, torch.float32)


def sides(each: Sequence[Any]) -> tuple[MapParts, MapParts]:
    """Return what there is for the differentiable tensors of the model's head, and of a teacher's."""
    e, weight, bias, target, target_weight, target_bias, low_rank, target_low_rank = each
    return MapParts(e, weight, bias, low_rank), MapParts(target, target_weight, target_bias, target_low_rank)


def joined(model: MapParts, target: MapParts) -> list[Tensor | None]:
    """Return the sequence that :func:`sides` splits."""
    e, weight, bias, low_rank = model
    y, y_weight, y_bias, y_low_rank = target
    return [e, weight, bias, y, y_weight, y_bias, low_rank, y_low_rank]


class RowLosses(NamedTuple):
    """The losses of a head's rows; ``merges_tail`` says whether the unlisted classes of a list are one outcome."""

    loss: LossSpec
    tensors: HeadTensors
    merges_tail: bool
    memory_budget: int | None
