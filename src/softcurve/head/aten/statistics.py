"""The tile functions of :class:`softcurve.head.statistics.StatisticsKernel`, which serve every device.

Logits are read relative to the largest of their row, ``δ = z − max z``, with ``e = e^δ``. A class with more than half
of its row's mass is *dominant*: it alone has ``e = 1``, and it is left out of the sums, so that nothing cancels beside
it. The functions work in place, on groups of rows that stay in the cache.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from softcurve.head.aten.sparse import Places, or_zero, put
from softcurve.head.kernel import Residuals, row_groups
from softcurve.losses.spec import LogitMap

# A masked class has δ = −inf, whose product with e = 0 is NaN; e^δ is 0 here in every dtype.
FLOOR = -1000.0


class StatisticsTile(NamedTuple):
    """The tensors of a block, ``(rows, classes)`` each, and what its elementwise work depends on."""

    z: Tensor
    raw: Tensor | None  # buffer for the logits before their soft cap
    v: Tensor | None  # change of z along a direction
    scale: Tensor | None  # (rows, 1): factor of the logits after the soft cap
    listed: Places
    logit_map: LogitMap
    cached: int  # entries that stay in the cache

    def row_groups(self) -> Iterator[slice]:
        """Return groups of rows that are small enough to stay in the cache."""
        return row_groups(self.z, self.cached)


class RowSums(NamedTuple):
    """Sums over the classes of each row, ``(rows, 1)``, relative to its largest logit ``top``.

    The first three leave out one class with ``δ = 0``. ``change`` and ``square_change`` leave it out only if it is
    dominant, ``rest < 1``; its own change is ``top_change`` then, and otherwise 0.
    """

    top: Tensor
    rest: Tensor  # Σ e
    moment: Tensor  # Σ e δ
    square: Tensor  # Σ e²
    change: Tensor  # Σ e ż
    moment_change: Tensor  # Σ e δ ż
    square_change: Tensor  # Σ e² ż
    top_change: Tensor

    @staticmethod
    def none(like: Tensor) -> RowSums:
        """Return the sums over no classes, a float64 column for each row of ``like``."""
        zero = torch.zeros((len(like), 1), dtype=torch.float64, device=like.device)
        return RowSums(zero - math.inf, *[zero] * 7)

    @property
    def dominated(self) -> Tensor:
        """Which rows have a dominant class."""
        return self.rest < 1

    def below(self, top: Tensor) -> RowSums:
        """Return the sums over all classes relative to a ``top`` that is no smaller, and of which none is left out."""
        some = self.top != -math.inf
        lowered = torch.where(some, self.top - top, 0.0)
        kept = torch.where(some, torch.exp(lowered), 0.0)
        change, square_change = self.change + self.top_change, self.square_change + self.top_change
        return RowSums(
            top,
            kept * (1 + self.rest),
            kept * (self.moment + lowered * (1 + self.rest)),
            kept**2 * (1 + self.square),
            kept * change,
            kept * (self.moment_change + lowered * change),
            kept**2 * square_change,
            torch.zeros_like(change),
        )

    def merged(self, other: RowSums) -> RowSums:
        """Return the sums over the classes of both, of which the one with the larger logit keeps its top apart."""
        first = self.top >= other.top
        upper, lower = (
            RowSums(*(torch.where(first, a, b) for a, b in zip(*pair, strict=True)))
            for pair in ((self, other), (other, self))
        )
        joined = [a + b for a, b in zip(upper, lower.below(upper.top), strict=True)]
        return RowSums(*joined)._replace(top=upper.top, top_change=upper.top_change).settled()

    def settled(self) -> RowSums:
        """Add the change of a class that is no longer dominant to the sums."""
        more = torch.where(self.dominated, 0.0, self.top_change)
        return self._replace(
            change=self.change + more, square_change=self.square_change + more, top_change=self.top_change - more
        )


class Coefficients(NamedTuple):
    """The numbers of each row, ``(rows, 1)``, of ``g = e (a + b δ + c e)`` or of the factor of ``ż`` in its change."""

    a: Tensor
    b: Tensor
    c: Tensor

    def to(self, dtype: torch.dtype) -> Coefficients:
        """Return the numbers in the dtype of the tiles."""
        return Coefficients(*(part.to(dtype) for part in self))

    def form(self, out: Tensor, e: Tensor, delta: Tensor, rows: slice) -> Tensor:
        """Return ``a + b δ + c e`` in ``out``, without the terms that are 0 in all rows."""
        a, b, c = (part[rows] for part in self)
        if _some(self.b):
            torch.mul(delta, b, out=out).add_(a)
        else:
            out.copy_(a.expand_as(out))
        return out.addcmul_(e, c) if _some(self.c) else out


class StatisticsResiduals(NamedTuple):
    """The numbers of each row from which :func:`residual` forms its entries, times the weight and scale of the row."""

    top: Tensor
    first: Coefficients  # of g
    listed: Tensor  # (rows, k): what is added at the listed classes
    dominant: Tensor  # (rows, 1): the entry of a dominant class, and NaN in a row without one
    along: Coefficients | None = None  # along a direction: of the factor of ż in ġ
    still: Coefficients | None = None  # and of the rest of ġ
    listed_v: Tensor | None = None
    dominant_v: Tensor | None = None


def statistics(tile: StatisticsTile, *, masks: bool) -> tuple[RowSums, bool]:
    """Map the logits, leave ``δ`` relative to the block's largest logit in ``z``, and sum over its classes.

    ``masks`` says whether these rows are known to have masked classes; whether they are is returned with the sums.
    """
    masks = masks or tile.z.device.type != "cpu"  # where a look at a sum would make the device wait
    buffers, parts = _Buffers(tile, 2), []
    for rows in tile.row_groups():
        _map_logits(tile, rows)
        z, v = tile.z[rows], None if tile.v is None else tile.v[rows]
        top = z.amax(-1, keepdim=True)
        z.sub_(or_zero(top))
        if masks:
            z.clamp_(min=FLOOR)
        sums = _sums(z, v, top, *buffers.take(rows))
        if not masks and bool(sums.moment.isnan().any()):
            masks = True
            sums = _sums(z.clamp_(min=FLOOR), v, top, *buffers.take(rows))
        parts.append(sums)
    return RowSums(*map(torch.cat, zip(*parts, strict=True))).settled(), masks


def residual(
    tile: StatisticsTile, rows: StatisticsResiduals, shift: Tensor | None, *, fresh: bool, masks: bool
) -> Residuals:
    """Form ``∂L/∂z = e (a + b δ + c e)`` and its change along ``v``, in place: the only function that does.

    ``shift`` is taken off ``z``, which holds logits if ``fresh`` and otherwise what :func:`statistics` has left.
    """
    buffers, dtype = _Buffers(tile, 3), tile.z.dtype
    first, along, still = (None if part is None else part.to(dtype) for part in (rows.first, rows.along, rows.still))
    assert first is not None
    for group in tile.row_groups():
        if fresh:
            _map_logits(tile, group)
        z = tile.z[group]
        if shift is not None:
            z.sub_(shift[group].to(dtype))
        if masks:
            z.clamp_(min=FLOOR)
        e, one, other = buffers.take(group)
        torch.exp(z, out=e)
        if tile.v is None or along is None or still is None:
            torch.mul(first.form(one, e, z, group), e, out=z)
            _add_apart(tile, z, e, group, rows.listed, rows.dominant)
            if tile.raw is not None:
                z.mul_(tile.logit_map.slope(tile.raw[group]))
            continue
        assert rows.listed_v is not None
        assert rows.dominant_v is not None
        v = tile.v[group]
        mapped = v.clone() if tile.raw is not None else v
        along.form(one, e, z, group).mul_(v).add_(still.form(other, e, z, group))
        torch.mul(one, e, out=v)
        _add_apart(tile, v, e, group, rows.listed_v, rows.dominant_v)
        torch.mul(first.form(one, e, z, group), e, out=z)
        _add_apart(tile, z, e, group, rows.listed, rows.dominant)
        if tile.raw is not None:
            slope, bend = tile.logit_map.slope(tile.raw[group]), tile.logit_map.bend_ratio(tile.raw[group])
            if tile.scale is not None:
                mapped = mapped / tile.scale[group]
            v.mul_(slope).add_(bend.mul_(mapped).mul_(z))
            z.mul_(slope)
    return Residuals(tile.z, None, tile.v, None)


class _Buffers:
    """Buffers for the elementwise work on a group of rows."""

    def __init__(self, tile: StatisticsTile, count: int) -> None:
        first = next(tile.row_groups(), slice(0))
        self.buffers = tile.z.new_empty(count, min(first.stop, len(tile.z)), tile.z.shape[1])
        self.stop = len(tile.z)

    def take(self, rows: slice) -> Iterator[Tensor]:
        """Return the buffers, as long as a group."""
        return iter(self.buffers[:, : min(rows.stop, self.stop) - rows.start])


def _sums(delta: Tensor, v: Tensor | None, top: Tensor, e: Tensor, product: Tensor) -> RowSums:
    """Return the sums over the classes of a group of rows."""

    def total(terms: Tensor) -> Tensor:
        return terms.sum(-1, keepdim=True).double()

    whole = total(torch.exp(delta, out=e))
    zero = torch.zeros_like(whole)
    moment = total(torch.mul(e, delta, out=product))
    square = total(torch.mul(e, e, out=product))
    change = moment_change = square_change = zero
    if v is not None:
        change = total(torch.mul(e, v, out=product))
        square_change = total(product * e)
        moment_change = total(product.mul_(delta))
    sums = RowSums(top.double(), whole - 1, moment, square - 1, change, moment_change, square_change, zero)
    row = (whole < 2).squeeze(-1).nonzero().squeeze(-1)
    if not len(row):
        return sums
    e_row = e[row]
    dominant = e_row == 1
    e_row.masked_fill_(dominant, 0.0)
    sums.rest[row] = total(e_row)
    if v is not None:
        v_row = v[row]
        sums = sums._replace(top_change=zero.clone())
        sums.top_change[row] = total(torch.where(dominant, v_row, 0.0))
        sums.change[row] = total(v_row.mul_(e_row))
        sums.square_change[row] = total(v_row.mul_(e_row))
    sums.square[row] = total(e_row.square_())
    return sums


def _add_apart(tile: StatisticsTile, out: Tensor, e: Tensor, rows: slice, listed: Tensor, dominant: Tensor) -> None:
    """Add the entries at listed classes, and set that of a dominant one, which is a small difference of large terms."""
    columns, inside = tile.listed
    if columns.shape[1]:
        put(out, Places(columns[rows], None if inside is None else inside[rows]), listed[rows], add=True)
    entry = dominant[rows]
    row = entry.isfinite().squeeze(-1).nonzero().squeeze(-1)
    if len(row):
        out[row] = torch.where(e[row] == 1, entry[row].to(out.dtype), out[row])


def _map_logits(tile: StatisticsTile, rows: slice) -> None:
    """Set ``z ← scale m(z)``, and its change likewise, and copy logits before a soft cap to ``raw``."""
    factor: Tensor | None = None
    if tile.raw is not None:
        raw = tile.raw[rows].copy_(tile.z[rows])
        tile.z[rows] = tile.logit_map.value(raw)
        factor = tile.logit_map.slope(raw) if tile.v is not None else None
    for factors in (factor, None if tile.scale is None else tile.scale[rows]):
        if factors is not None and tile.v is not None:
            tile.v[rows] *= factors
    if tile.scale is not None:
        tile.z[rows] *= tile.scale[rows]


def _some(part: Tensor) -> bool:
    """Return whether a row has a term, or True where a look at it would make the device wait."""
    return part.device.type != "cpu" or bool((part != 0).any())
