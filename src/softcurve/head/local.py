"""The part of a head and its rows that this process holds, with the rows flattened."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from softcurve import checks
from softcurve.head.half import shared_half
from softcurve.head.sharded import PlainHead
from softcurve.head.tensors import DIFFERENTIABLE, HeadTensors
from softcurve.losses import targets
from softcurve.losses.low_rank import LowRankWeight, lowered_by_autocast, matrix_of
from softcurve.losses.spec import LossSpec
from softcurve.losses.targets import Target


@dataclass(frozen=True)
class LocalHead:
    """The part of a head and of its rows that this process holds; rows are flattened."""

    layout: PlainHead
    input: Tensor  # (n, d), or (n, d + r) with r low-rank columns
    weight: Tensor | LowRankWeight  # (C_local, d)
    bias: Tensor | None  # (C_local,)
    leading: torch.Size  # of the rows before they were flattened
    dtype: torch.dtype  # of the losses: float32 or wider
    full_bias: Tensor | None  # (C,), without gradient; None unless masked classes matter to the target
    class_weight: Tensor | None  # (C,)

    @property
    def tensors(self) -> dict[str, Any]:
        """The differentiable fields of :class:`~softcurve.head.tensors.HeadTensors`, ``None`` for a target's."""
        own = {"input": self.input, "weight": matrix_of(self.weight), "bias": self.bias}
        nothing = dict.fromkeys(HeadTensors._fields[:DIFFERENTIABLE])
        return nothing | own | {"low_rank": low_rank_of(self.weight)}

    def uniform(self) -> Tensor | None:
        """Return the uniform distribution over the unmasked classes, ``(C,)``; ``None`` if none is masked."""
        if self.full_bias is None:
            return None
        uniform = targets.uniform_over_unmasked(self.full_bias.to(self.dtype))
        return uniform if uniform.ndim else None

    def share_of_smoothing(self) -> Tensor | None:
        """Return each class's factor in the ``ε / C`` of label smoothing, ``(C,)``: its weight, or 0 if masked."""
        uniform = self.uniform()
        if uniform is None:
            return self.class_weight
        share = uniform * self.layout.classes
        return share if self.class_weight is None else share * self.class_weight.to(share.dtype)

    def smoothing_factors(self, excluded: Tensor | None) -> Tensor | None:
        """Return ``class_weight`` of HeadTensors for a loss with label smoothing."""
        share = self.share_of_smoothing()
        if share is self.class_weight and excluded is None:
            return share
        dtype, count = self.dtype, self.layout.classes
        ones = torch.ones(count, dtype=dtype, device=self.input.device)
        # Masked classes have no share of the smoothing, but their class weight acts on the target's own mass.
        factors = [ones if part is None else part.to(dtype) for part in (self.class_weight, share)]
        if excluded is not None:
            uniform = self.uniform()
            factors.append(ones / count if uniform is None else uniform)
        return torch.stack(factors)


def local_head(
    layout: PlainHead, loss: LossSpec, input: Tensor, weight: Tensor | LowRankWeight, bias: Tensor | None,
    target: Tensor | Target | None, class_weight: Tensor | None, labels: Target | None = None,
) -> LocalHead:  # fmt: skip
    """Localise and flatten features, weight and bias, in the dtype of autocast if that is on, as torch's ``linear``."""
    full_bias, distributions = None, [each for each in (target, labels) if isinstance(each, Target)]
    if bias is not None and (loss.smooths_labels or any(each.merges_tail for each in distributions)):
        full_bias = layout.full("linear_bias", bias.detach())
    dtype = checks.wide_dtype(input.dtype, weight.dtype, *[each.dtype for each in distributions])
    input, weight = layout.local_rows(input), local_weight(layout, weight)
    bias = None if bias is None else layout.local_classes(bias)
    input, weight, bias = lowered_by_autocast(input, weight, bias)
    return LocalHead(
        layout, flat(widened(input, weight)), weight, bias, input.shape[:-1], dtype, full_bias, class_weight
    )


def local_weight(layout: PlainHead, weight: Tensor | LowRankWeight, *, by_class: bool = True) -> Tensor | LowRankWeight:
    """Return the part of a weight with the classes of this process; the whole unless ``by_class``."""
    local = layout.local_classes if by_class else functools.partial(layout.local_whole, by_class=True)
    if not isinstance(weight, LowRankWeight):
        return local(weight)
    scale = layout.local_whole(weight.scale) if isinstance(weight.scale, Tensor) else weight.scale
    return LowRankWeight(local(weight.weight), local(weight.a), layout.local_whole(weight.b), scale)


def low_rank_of(weight: Tensor | LowRankWeight) -> Tensor | None:
    """Return the low-rank columns of a weight, if it has any."""
    return weight.a if isinstance(weight, LowRankWeight) else None


def widened(input: Tensor, weight: Tensor | LowRankWeight) -> Tensor:
    """Return the features that a weight and its low-rank columns multiply.

    They are float32 or wider, unless all factors have the one half precision that the device multiplies.
    """
    if not isinstance(weight, LowRankWeight):
        return input
    half = shared_half(input, weight.weight, weight.a, weight.b)
    return weight.widened(input, half or checks.wide_dtype(input.dtype, weight.dtype))


def local_row_values(layout: PlainHead, name: str, tensor: Tensor, shift: int, missing: int) -> Tensor:
    """Return one entry for each row of this process, ``(n,)``: that of ``shift`` positions ahead, or ``missing``."""
    checks.require_tensor(name, tensor)
    layout.require_leading(name, tensor.shape, checks.describe(tensor))
    checks.require_rows(name, tensor, layout.leading, "input", layout.classes)
    return layout.local_rows(_moved(layout, name, tensor, shift, missing, dim=-1)).reshape(-1)


def _moved(layout: PlainHead, name: str, tensor: Tensor, shift: int, missing: int, dim: int) -> Tensor:
    """Return the entries of ``shift`` positions ahead along ``dim``, or ``missing``; they may be on another process."""
    if not shift:
        return tensor
    if tensor.ndim < -dim:
        raise ValueError("shift must be 0 for a single row, which has no next position")
    tensor = layout.full(name, tensor)
    count = tensor.shape[dim]
    shift = min(shift, count)
    ahead, before = tensor.narrow(dim, shift, count - shift), tensor.narrow(dim, 0, shift)
    return torch.cat([ahead, torch.full_like(before, missing)], dim)


def local_exclusions(layout: PlainHead, exclude: Tensor | None, shift: int) -> Tensor | None:
    """Return the classes that this process's rows exclude, ``(n, k)``: in order, each once, after −1 for none."""
    exclude = checks.require_exclude(exclude, layout.leading, layout.classes)
    if exclude is None:
        return None
    rows = flat(layout.local_rows(_moved(layout, "exclude", exclude, shift, -1, dim=-2)))
    checks.require_exclude(rows, rows.shape[:1], layout.classes)  # now the values of a DTensor are visible
    in_order = rows.sort(-1).values
    repeats = torch.cat([torch.zeros_like(in_order[:, :1], dtype=torch.bool), in_order[:, 1:] == in_order[:, :-1]], -1)
    return torch.where(repeats, -1, in_order).sort(-1).values


def flat(tensor: Tensor) -> Tensor:
    """Return ``(..., d)`` as ``(n, d)``."""
    return tensor.reshape(math.prod(tensor.shape[:-1]), tensor.shape[-1])  # of no classes -1 could be any number
