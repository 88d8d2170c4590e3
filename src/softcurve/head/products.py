"""The matrix products of a linear map, forward and back to its gradients, a tile at a time.

Half-precision factors go into a float32 product as they are where the device has such a product (CUDA): their product
is exact in float32, so nothing is lost against widening them first, and nothing of the weight's size is copied.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from softcurve.processes import max_over, sum_over
from softcurve.records import short_repr

# Entries of a half-precision weight that are widened at a time.
WIDENED_ENTRIES = 2**20
# Classes of which LinearMap.reference looks at the logits.
REFERENCES = 32


def multiplies_half(device: torch.device) -> bool:
    """Return whether half-precision matrices can be multiplied into float32."""
    return device.type == "cuda"


def shared_half(first: Tensor | None, *others: Tensor | None) -> torch.dtype | None:
    """Return the half precision of all of these, where they can be multiplied into float32."""
    if first is None or first.dtype not in (torch.float16, torch.bfloat16):
        return None
    same = all(tensor is not None and tensor.dtype == first.dtype for tensor in others)
    return first.dtype if same and multiplies_half(first.device) else None


def _half_product(out: Tensor, a: Tensor, b: Tensor, *, beta: float, alpha: float = 1.0) -> None:
    """``out = beta out + alpha a @ b`` of half-precision factors, all sums in float32."""
    if beta == 0 and alpha == 1:
        _half_mm(out, a, b)
    elif _adds_into_float32(out.device, a.dtype):
        torch.addmm(out, a, b, out_dtype=out.dtype, beta=beta, alpha=alpha, out=out)
    elif beta == 0:
        _half_mm(out, a, b)
        out.mul_(alpha)
    else:
        step = max(1, WIDENED_ENTRIES // max(1, out.shape[1]))
        for start in range(0, len(out), step):
            rows = out[start : start + step]
            part = torch.empty_like(rows)
            _half_mm(part, a[start : start + step], b)
            rows.mul_(beta).add_(part, alpha=alpha)


def _half_mm(out: Tensor, a: Tensor, b: Tensor) -> None:
    torch.mm(a, b, out_dtype=out.dtype, out=out)


@functools.cache
def _adds_into_float32(device: torch.device, dtype: torch.dtype) -> bool:
    """Return whether ``addmm`` adds half-precision products to float32: some releases want the sum in half too."""
    a = torch.zeros(16, 16, dtype=dtype, device=device)
    out = torch.zeros(16, 16, device=device)
    try:
        torch.addmm(out, a, a, out_dtype=out.dtype, out=out)
    except RuntimeError:
        return False
    return True


def _pieces(weight: Tensor, dtype: torch.dtype) -> list[slice]:
    """Return the rows of ``weight`` that each product takes: all at once unless they are widened."""
    count, width = weight.shape
    if weight.dtype == dtype:
        return [slice(0, count)]
    step = max(1, WIDENED_ENTRIES // max(1, width))
    return [slice(start, start + step) for start in range(0, count, step)]


def linear_into(
    out: Tensor, input: Tensor, weight: Tensor, bias: Tensor | None, *, scale: float, accumulate: bool = False,
    reference: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """``out = scale (input @ weight.T + bias − reference)``, or added to it; ``out`` sets the dtype."""
    if reference is not None:
        return linear_into(out, input, weight, bias, scale=1.0).sub_(reference).mul_(scale)
    start = 1.0 if accumulate or bias is not None else 0.0
    if bias is not None:
        row = bias.to(out.dtype) if scale == 1 else scale * bias.to(out.dtype)
        out.add_(row) if accumulate else out.copy_(row.expand_as(out))
    if out.dtype == torch.float32 and shared_half(input, weight) is not None:
        _half_product(out, input, weight.T, beta=start, alpha=scale)
        return out
    input = input.to(out.dtype)
    for piece in _pieces(weight, out.dtype):
        here = out[:, piece]
        torch.addmm(here, input, weight[piece].to(out.dtype).T, beta=start, alpha=scale, out=here)
    return out


def to_features(residual: Tensor, weight: Tensor, dtype: torch.dtype) -> Tensor:
    """Return ``residual @ weight``."""
    out = residual.new_empty((residual.shape[0], weight.shape[1]), dtype=dtype)
    if dtype == torch.float32 and shared_half(residual, weight) is not None:
        _half_product(out, residual, weight, beta=0.0)
        return out
    for i, piece in enumerate(_pieces(weight, dtype)):
        torch.addmm(out, residual[:, piece].to(dtype), weight[piece].to(dtype), beta=float(i > 0), out=out)
    return out


def back_to_weight(out: Tensor, residual: Tensor, input: Tensor, *, accumulate: bool) -> None:
    """``out (+)= residualᵀ @ input``; the input is rounded to the residual's dtype."""
    if shared_half(residual) is None:
        torch.addmm(out, residual.T, input, beta=float(accumulate), out=out)
    else:
        _half_product(out, residual.T, input.to(residual.dtype), beta=float(accumulate))


def back_to_bias(out: Tensor, residual: Tensor, scaling: Tensor, *, accumulate: bool) -> None:
    """``out (+)= residualᵀ @ scaling``, ``scaling`` one number a row."""
    if shared_half(residual) is None:
        torch.addmv(out, residual.T, scaling, beta=float(accumulate), out=out)
        return
    # A number and what rounding takes from it, side by side: together they have the digits that one has not.
    high = scaling.to(residual.dtype)
    both = torch.stack([high, (scaling - high.to(scaling.dtype)).to(residual.dtype)], -1)
    found = out.new_empty(len(out), 2)
    _half_product(found, residual.T, both, beta=0.0)
    if accumulate:
        out.add_(found.sum(-1))
    else:
        torch.sum(found, -1, out=out)


class Direction(NamedTuple):
    """A change of a linear map's input, weight and bias; ``None`` is zero."""

    input: Tensor | None
    weight: Tensor | None
    bias: Tensor | None

    def __repr__(self) -> str:
        return short_repr(self, self._asdict())


STILL = Direction(None, None, None)


class LinearMap(NamedTuple):
    """``scale (W e + b − reference)`` on a tile of rows, and the direction along which it changes.

    ``narrow`` is the input before it was widened, where products take it so; for ``reference`` see
    :meth:`with_reference`.
    """

    input: Tensor
    weight: Tensor
    bias: Tensor | None
    narrow: Tensor | None
    scale: float
    along: Direction
    reference: Tensor | None = None  # (rows, 1)

    def operands(self, classes: slice) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return what :func:`linear_into` multiplies for the logits of some classes: input, weight and bias."""
        factor = self.input if self.narrow is None else self.narrow
        return factor, self.weight[classes], None if self.bias is None else self.bias[classes]

    def with_reference(self, group: ProcessGroup | None, *, scales_rows: bool) -> LinearMap:
        """Return the map with a constant of each row that is taken off its logits before they are scaled.

        Without it a common offset of the logits is rounded once more as it is scaled; where scaling is exact there is
        none. It is the largest logit of some classes of all processes, which is near the largest of all beside the
        offset that it stands for.
        """
        if math.frexp(self.scale)[0] == 0.5 and not scales_rows:
            return self
        step = max(1, len(self.weight) // REFERENCES)
        some = torch.arange(0, len(self.weight), step, device=self.weight.device)
        if self.bias is not None and len(self.bias):
            some = torch.cat([some, self.bias.argmax(keepdim=True)])
        logits = self.input @ self.weight[some].to(self.input.dtype).T
        if self.bias is not None:
            logits = logits + self.bias[some].to(logits.dtype)
        none = logits.new_full((len(logits), 1), -math.inf)
        top = torch.cat([logits, none], -1).amax(-1, keepdim=True)  # there may be no class here
        max_over([top], group)
        return self._replace(reference=torch.where(top.isfinite(), top, 0.0))

    def change_into(self, out: Tensor, along: Direction, classes: slice) -> Tensor:
        """``out = scale (ė Wᵀ + e Ẇᵀ + ḃ)`` of some classes."""
        terms = [] if along.input is None else [(along.input, self.weight[classes])]
        if along.weight is not None:
            narrow = None if shared_half(self.narrow, along.weight) is None else self.narrow
            terms.append((self.input if narrow is None else narrow, along.weight[classes]))
        bias = None if along.bias is None else along.bias[classes]
        for i, (input, weight) in enumerate(terms):
            linear_into(out, input, weight, None if i else bias, scale=self.scale, accumulate=i > 0)
        if not terms:
            out.zero_() if bias is None else out.copy_((bias.to(out.dtype) * self.scale).expand_as(out))
        return out


class Term(NamedTuple):
    """A summand of the gradients of ``z = W e + b``: ``scale R W`` in the features, ``Rᵀ (scale e)`` in the weight."""

    residual: Tensor
    weight: Tensor | None
    input: Tensor | None
    scale: Tensor | None  # (rows, 1)
    in_bias: bool = True  # whether Rᵀ scale is added to the gradient of the bias


def terms_of(map: LinearMap, residual: Tensor, change: Tensor | None, factor: Tensor | None) -> list[Term]:
    """Return the terms of a gradient, ``g W`` and ``gᵀ e``; or of its change, ``ġ W + g Ẇ`` and ``ġᵀ e + gᵀ ė``."""
    scaling = None if factor is None else factor.to(map.input.dtype)
    if map.scale != 1:
        ones = map.input.new_ones(residual.shape[0], 1)
        scaling = (ones if scaling is None else scaling) * map.scale
    if change is None:
        return [Term(residual, map.weight, map.input, scaling)]
    return [
        Term(change, map.weight, map.input, scaling),
        Term(residual, map.along.weight, map.along.input, scaling, in_bias=False),
    ]


@dataclass
class MapSums:
    """The gradients of one linear map, as sums over tiles.

    The first product into the rows or classes of a block overwrites what is there; with ``touched=None`` the tensors
    hold numbers already, and everything is added.
    """

    into: Direction
    touched: set[tuple[str, int]] | None = None  # the names of the gradients, and the first classes of the blocks

    def add(self, rows: slice | Tensor, classes: slice, terms: list[Term]) -> None:
        """Add the terms of one block."""
        in_input, in_weight, in_bias = self.into
        for number, (residual, weight, input, scale, bias_too) in enumerate(terms):
            if in_input is not None and weight is not None:
                part = to_features(residual, weight[classes], in_input.dtype)
                if scale is not None:
                    part.mul_(scale)
                # Every tile has rows of its own, whose first product is that with the first block.
                if self.touched is None or number or classes.start:
                    in_input[rows] += part
                else:
                    in_input[rows] = part
                    self.touched.add(("input", 0))
            if in_weight is not None and input is not None:
                e = input.to(in_weight.dtype) if scale is None else input.to(in_weight.dtype) * scale
                back_to_weight(in_weight[classes], residual, e, accumulate=self._adds("weight", classes.start))
            if in_bias is not None and bias_too:
                each = residual.new_ones(len(residual), dtype=in_bias.dtype) if scale is None else scale[:, 0]
                back_to_bias(in_bias[classes], residual, each, accumulate=self._adds("bias", classes.start))

    def _adds(self, name: str, start: int) -> bool:
        """Return whether there is a sum already that a product adds to; from now on there is."""
        if self.touched is None:
            return True
        count = len(self.touched)
        self.touched.add((name, start))
        return len(self.touched) == count

    def finish(self, group: ProcessGroup | None) -> Direction:
        """Return the sums; 0 where no tile has added, and the features' over the classes of all processes."""
        touched = {name for name, _ in self.touched or ()}
        for name, tensor in zip(Direction._fields, self.into, strict=True):
            if tensor is not None and name not in touched:
                tensor.zero_()
        if self.into.input is not None and self.into.input.numel():
            sum_over([self.into.input], group)  # before it is rounded to half precision
        return self.into
