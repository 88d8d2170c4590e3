"""The matrix products of a linear map, a tile at a time, in the dtype of the computation."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

# Entries of a half-precision weight that are widened at a time.
WIDENED_ENTRIES = 2**20


def _pieces(weight: Tensor, dtype: torch.dtype) -> list[slice]:
    """The rows of ``weight`` that one product takes: all, or so many as may be widened at a time."""
    step = len(weight) if weight.dtype == dtype else max(1, WIDENED_ENTRIES // max(1, weight.shape[1]))
    return [slice(start, start + step) for start in range(0, len(weight), step)]


def linear_into(
    out: Tensor, input: Tensor, weight: Tensor, bias: Tensor | None, *, scale: float, accumulate: bool = False
) -> Tensor:
    """``out = scale (input @ weight.T + bias)``, or added to it; ``out`` sets the dtype."""
    input = input.to(out.dtype)
    for piece in _pieces(weight, out.dtype):
        here = out[:, piece]
        if bias is not None:
            row = bias[piece].to(out.dtype)
            here.add_(row, alpha=scale) if accumulate else here.copy_(
                (row if scale == 1 else scale * row).expand_as(here)
            )
        start = 1.0 if accumulate or bias is not None else 0.0
        torch.addmm(here, input, weight[piece].to(out.dtype).T, beta=start, alpha=scale, out=here)
    return out


def back_to_features(out: Tensor, residual: Tensor, weight: Tensor, *, accumulate: bool) -> None:
    """``out (+)= residual @ weight``."""
    for i, piece in enumerate(_pieces(weight, out.dtype)):
        start = 1.0 if accumulate or i else 0.0
        torch.addmm(out, residual[:, piece], weight[piece].to(out.dtype), beta=start, out=out)


def back_to_weight(out: Tensor, residual: Tensor, input: Tensor, *, accumulate: bool) -> None:
    """``out (+)= residualᵀ @ input``."""
    torch.addmm(out, residual.T, input, beta=1.0 if accumulate else 0.0, out=out)


class Direction(NamedTuple):
    """A change of a linear map's input, weight and bias; ``None`` is zero."""

    input: Tensor | None
    weight: Tensor | None
    bias: Tensor | None


class LinearMap(NamedTuple):
    """``W e + b`` on a tile of rows."""

    input: Tensor
    weight: Tensor
    bias: Tensor | None

    def logits_into(self, out: Tensor, classes: slice, scale: float) -> Tensor:
        """``scale (e Wᵀ + b)`` of some classes."""
        bias = None if self.bias is None else self.bias[classes]
        return linear_into(out, self.input, self.weight[classes], bias, scale=scale)

    def change_into(self, out: Tensor, along: Direction, classes: slice, scale: float) -> Tensor:
        """``scale (ė Wᵀ + e Ẇᵀ + ḃ)`` of some classes."""
        started = False
        if along.input is not None:
            linear_into(out, along.input, self.weight[classes], None, scale=scale)
            started = True
        if along.weight is not None:
            linear_into(out, self.input, along.weight[classes], None, scale=scale, accumulate=started)
            started = True
        if along.bias is not None:
            bias_v = along.bias[classes].to(out.dtype)
            out.add_(bias_v, alpha=scale) if started else out.copy_((bias_v * scale).expand_as(out))
            started = True
        return out if started else out.zero_()
