"""The matrix products of a linear map, forward and back to its gradients, a tile at a time.

Half-precision factors go into a float32 product as they are where :mod:`softcurve.head.half` has such a product.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from softcurve.head.half import half_product, is_half, rounds_once
from softcurve.processes import max_over, sum_over
from softcurve.records import short_repr

# Entries of a weight that are widened from half precision, or gathered by an index, at a time.
WIDENED_ENTRIES = 2**20
# Classes of which LinearMap.reference looks at the logits.
REFERENCES = 32


def _pieces(weight: Tensor, dtype: torch.dtype) -> list[slice]:
    """Return the rows of ``weight`` that each product takes: all at once unless they are widened."""
    count, width = weight.shape
    if weight.dtype == dtype:
        return [slice(0, count)]
    step = max(1, WIDENED_ENTRIES // max(1, width))
    return [slice(start, start + step) for start in range(0, count, step)]


def linear_into(
    out: Tensor, input: Tensor, weight: Tensor, bias: Tensor | None, *, scale: float, accumulate: bool = False
) -> Tensor:
    """``out = scale (input @ weight.T + bias)``, or added to it; ``out`` sets the dtype."""
    start = 1.0 if accumulate or bias is not None else 0.0
    if bias is not None:
        row = bias.to(out.dtype) if scale == 1 else scale * bias.to(out.dtype)
        out.add_(row) if accumulate else out.copy_(row.expand_as(out))
    if out.dtype == torch.float32 and is_half(input, weight):
        half_product(out, input, weight.T, beta=start, alpha=scale)
        return out
    input = input.to(out.dtype)
    for piece in _pieces(weight, out.dtype):
        here = out[:, piece]
        torch.addmm(here, input, weight[piece].to(out.dtype).T, beta=start, alpha=scale, out=here)
    return out


def to_features(residual: Tensor, weight: Tensor, dtype: torch.dtype, *, is_whole: bool = False) -> Tensor:
    """Return ``residual @ weight``.

    A product that ``is_whole``, because no other is added to it, may be rounded to the half precision of its factors.
    """
    if is_whole and rounds_once(residual, weight):
        return (residual @ weight).to(dtype)
    out = residual.new_empty((residual.shape[0], weight.shape[1]), dtype=dtype)
    if dtype == torch.float32 and is_half(residual, weight):
        half_product(out, residual, weight, beta=0.0)
        return out
    for i, piece in enumerate(_pieces(weight, dtype)):
        torch.addmm(out, residual[:, piece].to(dtype), weight[piece].to(dtype), beta=float(i > 0), out=out)
    return out


def back_to_weight(out: Tensor, residual: Tensor, input: Tensor, *, accumulate: bool) -> None:
    """``out (+)= residualᵀ @ input``; the input is rounded to the residual's dtype."""
    if not is_half(residual):
        torch.addmm(out, residual.T, input, beta=float(accumulate), out=out)
    else:
        half_product(out, residual.T, input.to(residual.dtype), beta=float(accumulate))


def back_to_bias(out: Tensor, residual: Tensor, scaling: Tensor, *, accumulate: bool) -> None:
    """``out (+)= residualᵀ @ scaling``, ``scaling`` one number a row."""
    if not is_half(residual):
        torch.addmv(out, residual.T, scaling, beta=float(accumulate), out=out)
        return
    # A number and what rounding takes from it, side by side: together they have the digits that one has not.
    high = scaling.to(residual.dtype)
    both = torch.stack([high, (scaling - high.to(scaling.dtype)).to(residual.dtype)], -1)
    found = out.new_empty(len(out), 2)
    half_product(found, residual.T, both, beta=0.0)
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


class MapParts(NamedTuple):
    """The tensors of a linear map, or what there is for each of them: a change, a gradient; ``None`` is none."""

    input: Tensor | None
    weight: Tensor | None
    bias: Tensor | None
    low_rank: Tensor | None = None  # ``a`` of a :class:`~softcurve.LowRankWeight`


STILL = MapParts(None, None, None)
# The fields that multiply features: the weight the first of them, its low-rank columns the last.
FACTORS = ("weight", "low_rank")


def columns_of(name: str, factor: Tensor) -> slice:
    """Return the features that one of the ``FACTORS`` multiplies."""
    width = factor.shape[1]
    return slice(0, width) if name == "weight" else slice(-width, None)


@dataclass(frozen=True, eq=False)
class ClassRows:
    """The rows of a weight that are the classes of a linear map: all in their order, or those ``chosen (C,)``."""

    chosen: Tensor | None = None

    def __call__(self, weight: Tensor, classes: slice | Tensor) -> Tensor:
        """Return the rows of some classes."""
        return weight[classes] if self.chosen is None else weight[self.chosen[classes]]

    def pieces(self, classes: slice, width: int) -> Iterator[tuple[slice, slice]]:
        """Yield the classes that each product takes, and where they are in the block: all unless rows are gathered."""
        step = classes.stop - classes.start if self.chosen is None else WIDENED_ENTRIES // width
        for start in range(classes.start, classes.stop, max(1, step)):
            stop = min(start + max(1, step), classes.stop)
            yield slice(start, stop), slice(start - classes.start, stop - classes.start)


EVERY_ROW = ClassRows()


class LinearMap(NamedTuple):
    """``scale (W e + b − reference)`` on a tile of rows, and the direction along which it changes.

    ``narrow`` is the input before it was widened, where products take it so; for ``reference`` see
    :meth:`with_reference`. With ``low_rank`` columns the weight multiplies the first features and these the last.
    """

    input: Tensor
    weight: Tensor
    bias: Tensor | None
    low_rank: Tensor | None
    narrow: Tensor | None
    scale: float
    along: MapParts
    rows: ClassRows
    reference: Tensor | None = None  # (rows, 1)

    @property
    def at(self) -> MapParts:
        """The tensors of the map."""
        return MapParts(self.input, self.weight, self.bias, self.low_rank)

    def with_reference(self, group: ProcessGroup | None, *, scales_rows: bool) -> LinearMap:
        """Return the map with a constant of each row that is taken off its logits before they are scaled.

        Without it a common offset of the logits is rounded once more as it is scaled; where scaling is exact there is
        none. It is the largest logit of some classes of all processes, which is near the largest of all beside the
        offset that it stands for.
        """
        if math.frexp(self.scale)[0] == 0.5 and not scales_rows:
            return self
        count = len(self.weight if self.rows.chosen is None else self.rows.chosen)
        some = torch.arange(0, count, max(1, count // REFERENCES), device=self.weight.device)
        if self.bias is not None and len(self.bias):
            some = torch.cat([some, self.bias.argmax(keepdim=True)])
        few = self._replace(
            weight=self.rows(self.weight, some), bias=None if self.bias is None else self.bias[some],
            low_rank=None if self.low_rank is None else self.rows(self.low_rank, some), narrow=None, scale=1.0,
            rows=EVERY_ROW,
        )  # fmt: skip
        logits = few.logits_into(self.input.new_empty(len(self.input), len(some)), slice(0, len(some)))
        none = logits.new_full((len(logits), 1), -math.inf)
        top = torch.cat([logits, none], -1).amax(-1, keepdim=True)  # there may be no class here
        max_over([top], group)
        return self._replace(reference=torch.where(top.isfinite(), top, 0.0))

    def logits_into(self, out: Tensor, classes: slice) -> Tensor:
        """``out = scale (e Wᵀ + b − reference)`` of some classes."""
        if self.reference is None:
            return self._sum_into(out, [(self.input, self.at)], self.bias, classes, self.scale)
        self._sum_into(out, [(self.input, self.at)], self.bias, classes, 1.0)
        return out.sub_(self.reference).mul_(self.scale)

    def change_into(self, out: Tensor, along: MapParts, classes: slice) -> Tensor:
        """``out = scale (ė Wᵀ + e Ẇᵀ + ḃ)`` of some classes."""
        summands = [] if along.input is None else [(along.input, self.at)]
        return self._sum_into(out, [*summands, (self.input, along)], along.bias, classes, self.scale)

    def _sum_into(
        self, out: Tensor, summands: Sequence[tuple[Tensor, MapParts]], bias: Tensor | None, classes: slice,
        scale: float,
    ) -> Tensor:  # fmt: skip
        """``out = scale (Σ input @ factorᵀ + bias)`` over the factors of every summand."""
        pairs = [(input, name, getattr(of, name)) for input, of in summands for name in FACTORS]
        pairs = [(input, name, factor) for input, name, factor in pairs if factor is not None]
        for piece, at in self.rows.pieces(classes, self.input.shape[1]):
            here, row = out[:, at], None if bias is None else bias[piece]
            for number, (input, name, factor) in enumerate(pairs):
                if input is self.input and self.narrow is not None and is_half(self.narrow, factor):
                    input = self.narrow
                columns, rows = columns_of(name, factor), self.rows(factor, piece)
                linear_into(here, input[:, columns], rows, None if number else row, scale=scale, accumulate=number > 0)
            if not pairs:
                here.zero_() if row is None else here.copy_((row.to(out.dtype) * scale).expand_as(here))
        return out


class Term(NamedTuple):
    """A summand of the gradients of ``z = W e + b``: ``scale R W`` in the features, ``Rᵀ (scale e)`` in the weight."""

    residual: Tensor
    at: MapParts  # whose factors and input multiply the residual; its bias has no part
    scale: Tensor | None  # (rows, 1)
    in_bias: bool = True  # whether Rᵀ scale is added to the gradient of the bias


def scaling_of(map: LinearMap, factor: Tensor | None) -> Tensor | None:
    """Return the factor of each row's residual, ``(rows, 1)``: its own and the map's scale; ``None`` is 1."""
    scaling = None if factor is None else factor.to(map.input.dtype)
    if map.scale != 1:
        scaling = (map.input.new_ones(len(map.input), 1) if scaling is None else scaling) * map.scale
    return scaling


def terms_of(map: LinearMap, residual: Tensor, change: Tensor | None, scaling: Tensor | None) -> list[Term]:
    """Return the terms of a gradient, ``g W`` and ``gᵀ e``; or of its change, ``ġ W + g Ẇ`` and ``ġᵀ e + gᵀ ė``."""
    if change is None:
        return [Term(residual, map.at, scaling)]
    return [Term(change, map.at, scaling), Term(residual, map.along, scaling, in_bias=False)]


@dataclass
class MapSums:
    """The gradients of one linear map, as sums over tiles.

    The first product into the rows or classes of a block overwrites what is there; with ``touched=None`` the tensors
    hold numbers already, and everything is added. Where ``rows`` gathers the classes, one row of the weight may belong
    to several of them, and products are added to zeros.
    """

    into: MapParts
    touched: set[tuple[str, int]] | None = None  # the names of the gradients, and the first classes of the blocks
    rows: ClassRows = EVERY_ROW

    def __post_init__(self) -> None:
        for name in FACTORS if self.rows.chosen is not None else ():
            if (gradient := getattr(self.into, name)) is not None and self.touched is not None:
                gradient.zero_()
                self.touched.add((name, 0))

    def add(self, rows: slice | Tensor, classes: slice, terms: list[Term], *, is_whole: bool = False) -> None:
        """Add the terms of one block, which ``is_whole`` if it holds all classes of the head."""
        begun: set[str] = set()
        for residual, at, scale, in_bias in terms:
            for name in FACTORS:
                factor, gradient = getattr(at, name), getattr(self.into, name)
                if self.into.input is not None and factor is not None:
                    # Every tile has rows of its own, whose first product is that with the first block.
                    first = self.touched is not None and classes.start == 0 and name not in begun
                    begun.add(name)
                    part = self._pulled_back(residual, factor, classes, self.into.input.dtype, is_whole)
                    part = part if scale is None else part.mul_(scale)
                    self._add_to_features(self.into.input[:, columns_of(name, factor)], rows, part, first=first)
                if gradient is not None and at.input is not None:
                    e = at.input[:, columns_of(name, gradient)].to(gradient.dtype)
                    self._add_to_factor(name, gradient, classes, residual, e if scale is None else e * scale)
            if self.into.bias is not None and in_bias:
                into = self.into.bias
                each = residual.new_ones(len(residual), dtype=into.dtype) if scale is None else scale[:, 0]
                back_to_bias(into[classes], residual, each, accumulate=self._adds("bias", classes.start))

    def _pulled_back(
        self, residual: Tensor, factor: Tensor, classes: slice, dtype: torch.dtype, is_whole: bool
    ) -> Tensor:
        """Return ``R W`` of a block."""
        is_whole = is_whole and self.rows.chosen is None
        parts = (
            to_features(residual[:, at], self.rows(factor, piece), dtype, is_whole=is_whole)
            for piece, at in self.rows.pieces(classes, factor.shape[1])
        )
        total = next(parts)
        for part in parts:
            total += part
        return total

    def _add_to_features(self, into: Tensor, rows: slice | Tensor, part: Tensor, *, first: bool) -> None:
        if first and self.touched is not None:
            into[rows] = part
            self.touched.add(("input", 0))
        else:
            into[rows] += part

    def _add_to_factor(self, name: str, into: Tensor, classes: slice, residual: Tensor, e: Tensor) -> None:
        """``into (+)= Rᵀ e`` at the classes of a block."""
        if self.rows.chosen is None:
            back_to_weight(into[classes], residual, e, accumulate=self._adds(name, classes.start))
            return
        for piece, at in self.rows.pieces(classes, e.shape[1]):
            part = into.new_empty(piece.stop - piece.start, e.shape[1])
            back_to_weight(part, residual[:, at], e, accumulate=False)
            into.index_add_(0, self.rows.chosen[piece], part)

    def _adds(self, name: str, start: int) -> bool:
        """Return whether there is a sum already that a product adds to; from now on there is."""
        if self.touched is None:
            return True
        count = len(self.touched)
        self.touched.add((name, start))
        return len(self.touched) == count

    def finish(self, group: ProcessGroup | None) -> MapParts:
        """Return the sums; 0 where no tile has added, and the features' over the classes of all processes."""
        touched = {name for name, _ in self.touched or ()}
        for name, tensor in zip(MapParts._fields, self.into, strict=True):
            if tensor is not None and name not in touched:
                tensor.zero_()
        if self.into.input is not None and self.into.input.numel():
            sum_over([self.into.input], group)  # before it is rounded to half precision
        return self.into
