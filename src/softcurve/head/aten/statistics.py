"""The tile functions of :class:`softcurve.head.statistics.StatisticsKernel`, which serve every device.

Logits are read relative to the largest of their row, ``δ = z − max z``, with ``e = e^δ``. The class of the largest is
the *top* of its row: it has ``e = 1`` and is left out of the sums, so that nothing cancels beside it. The functions
work in place, on groups of rows that stay in the cache.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from softcurve.head.aten.exponentials import exponentials_into
from softcurve.head.aten.sparse import Places, or_zero, put
from softcurve.head.kernel import Residuals, row_groups
from softcurve.head.maxima import largest
from softcurve.losses.spec import LogitMap

# A masked class has δ = −inf, whose product with e = 0 is NaN; e^δ is 0 here in every dtype.
FLOOR = -1000.0
MOST_MEAN = 10.0  # of |δ|, in nats; see _coarse


class StatisticsTile(NamedTuple):
    """The tensors of a block, ``(rows, classes)`` each, and what its elementwise work depends on."""

    z: Tensor
    raw: Tensor | None  # buffer for the logits before their soft cap
    v: Tensor | None  # change of z along a direction
    scale: Tensor | None  # (rows, 1): factor of the logits after the soft cap
    indices: Tensor  # (rows, k): the listed classes, counted from the block's first
    whole: bool  # whether the block has all classes
    logit_map: LogitMap
    cached: int  # entries that stay in the cache
    scratch: Callable[[int], Tensor] | None = None  # buffers of a group of rows, the same for every tile

    def row_groups(self) -> Iterator[slice]:
        """Return groups of rows that are small enough to stay in the cache."""
        return row_groups(self.z, self.cached)

    @property
    def listed(self) -> Places:
        """The places of the listed classes in the block."""
        return self.places(self.indices)

    def places(self, columns: Tensor) -> Places:
        """Return where some classes, counted from the block's first, stand in the block."""
        width = self.z.shape[1]
        if self.whole:
            return Places(columns, None)
        return Places(columns.clamp(0, max(width - 1, 0)), (columns >= 0) & (columns < width))


class RowSums(NamedTuple):
    """Sums over the classes of each row but its top, ``(rows, 1)``, relative to the logit of the top."""

    top: Tensor  # max z; −inf where every class is masked
    place: Tensor  # the class of the top
    top_change: Tensor  # ż of the top
    rest: Tensor  # Σ e
    moment: Tensor  # Σ e δ
    square: Tensor  # Σ e²
    change: Tensor  # Σ e ż
    moment_change: Tensor  # Σ e δ ż
    square_change: Tensor  # Σ e² ż

    @staticmethod
    def none(like: Tensor) -> RowSums:
        """Return the sums over no classes, a float64 column for each row of ``like``."""
        zero = torch.zeros((len(like), 1), dtype=torch.float64, device=like.device)
        return RowSums(zero - math.inf, zero - 1, *[zero] * 7)

    def below(self, top: Tensor) -> RowSums:
        """Return the sums over all classes, the top included, relative to a logit ``top`` that is no smaller."""
        some = self.top != -math.inf
        lowered = torch.where(some, self.top - top, 0.0)
        kept = torch.where(some, torch.exp(lowered), 0.0)
        rest, change = 1 + self.rest, self.change + self.top_change
        return self._replace(
            rest=kept * rest,
            moment=kept * (self.moment + lowered * rest),
            square=kept**2 * (1 + self.square),
            change=kept * change,
            moment_change=kept * (self.moment_change + lowered * change),
            square_change=kept**2 * (self.square_change + self.top_change),
        )

    def plus(self, sums: RowSums) -> RowSums:
        """Add the sums over other classes, relative to the same logit."""
        return RowSums(*self[:3], *(a + b for a, b in zip(self[3:], sums[3:], strict=True)))

    def merged(self, other: RowSums) -> RowSums:
        """Return the sums over the classes of both, relative to the larger of their tops."""
        first, ours, theirs = self.top >= other.top, torch.stack(self), torch.stack(other)
        upper, lower = (RowSums(*torch.where(first, *pair).unbind(0)) for pair in ((ours, theirs), (theirs, ours)))
        return upper.plus(lower.below(upper.top))


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

    shift: Tensor
    place: Tensor  # the class of the top
    first: Coefficients  # of g
    listed: Tensor  # (rows, k): what is added at the listed classes
    top: Tensor  # (rows, 1): the entry of the top
    along: Coefficients | None = None  # along a direction: of the factor of ż in ġ
    still: Coefficients | None = None  # and of the rest of ġ
    listed_v: Tensor | None = None
    top_v: Tensor | None = None


class Needs(NamedTuple):
    """The sums that a pass takes from the sweep, and what the sweep leaves in ``z``."""

    moment: bool
    square: bool
    exponentials: bool  # whether e is left in z in the place of δ, with 0 for the top


def statistics(tile: StatisticsTile, needs: Needs, *, masks: bool) -> tuple[RowSums, bool]:
    """Map the logits, leave ``δ`` relative to the block's largest logit in ``z``, and sum over its classes.

    ``masks`` says whether these rows are known to have masked classes; whether they are is returned with the sums,
    whose ``place`` is a column.
    """
    masks = masks or tile.z.device.type != "cpu"  # where a look at a sum would make the device wait
    # Two to the power of δ log₂ e takes less than half of the time of an exponential.
    fast = needs.moment and needs.square and tile.z.dtype == torch.float32 and tile.z.device.type == "cpu"
    buffers = _Buffers(tile, 2)
    sums = tile.z.new_zeros(len(RowSums._fields), len(tile.z), 1)
    places = torch.zeros((len(tile.z), 1), dtype=torch.int64, device=tile.z.device)
    for rows in tile.row_groups():
        _map_logits(tile, rows)
        z, v, of_group = tile.z[rows], None if tile.v is None else tile.v[rows], RowSums(*sums[:, rows].unbind(0))
        top, column = largest(z)
        of_group.top.copy_(top)
        places[rows] = column
        z.sub_(or_zero(top))
        if masks:
            z.clamp_(min=FLOOR)
        e, product = buffers.take(rows)
        _sum(z, v, column, of_group, needs, e, product, fast=fast)
        if not masks and needs.moment and bool(of_group.moment.isnan().any()):
            masks = True
            _sum(z.clamp_(min=FLOOR), v, column, of_group, needs, e, product, fast=fast)
        if needs.exponentials:
            z.copy_(e)
    if fast:
        for some in _coarse(RowSums(*sums.unbind(0))).split(max(1, tile.cached // max(1, tile.z.shape[1]))):
            delta, of_some = tile.z[some], RowSums(*sums[:, some].unbind(0))
            v = None if tile.v is None else tile.v[some]
            _sum(delta, v, places[some], of_some, needs, *torch.empty_like(delta.expand(2, *delta.shape)), fast=False)
            sums[3:, some] = torch.stack(of_some[3:])
    return RowSums(*sums.double().unbind(0))._replace(place=places.double()), masks


def residual(
    tile: StatisticsTile, rows: StatisticsResiduals, shift: Tensor | None, needs: Needs, *, fresh: bool, masks: bool
) -> Residuals:
    """Form ``∂L/∂z = e (a + b δ + c e)`` and its change along ``v``, in place: the only function that does.

    ``shift`` is taken off ``z``, which holds logits if ``fresh`` and otherwise what :func:`statistics` has left.
    """
    buffers, dtype = _Buffers(tile, 3), tile.z.dtype
    first, along, still = (None if part is None else part.to(dtype) for part in (rows.first, rows.along, rows.still))
    assert first is not None
    for group in tile.row_groups():
        z = tile.z[group]
        e, one, other = buffers.take(group)
        if needs.exponentials and not fresh:
            e.copy_(z)
        else:
            if fresh:
                _map_logits(tile, group)
            if shift is not None:
                z.sub_(shift[group].to(dtype))
            if masks:
                z.clamp_(min=FLOOR)
            torch.exp(z, out=e)
        if tile.v is None or along is None or still is None:
            torch.mul(first.form(one, e, z, group), e, out=z)
            _set_apart(tile, z, group, rows.place, rows.listed, rows.top)
            if tile.raw is not None:
                z.mul_(tile.logit_map.slope(tile.raw[group]))
            continue
        assert rows.listed_v is not None
        assert rows.top_v is not None
        v = tile.v[group]
        mapped = v.clone() if tile.raw is not None else v
        along.form(one, e, z, group).mul_(v).add_(still.form(other, e, z, group))
        torch.mul(one, e, out=v)
        _set_apart(tile, v, group, rows.place, rows.listed_v, rows.top_v)
        torch.mul(first.form(one, e, z, group), e, out=z)
        _set_apart(tile, z, group, rows.place, rows.listed, rows.top)
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
        self.stop = len(tile.z)
        first = next(tile.row_groups(), slice(0))
        shape = min(first.stop, self.stop), tile.z.shape[1]
        if tile.scratch is None:
            self.buffers = [tile.z.new_empty(shape) for _ in range(count)]
        else:
            self.buffers = [tile.scratch(number)[: math.prod(shape)].view(shape) for number in range(count)]

    def take(self, rows: slice) -> Iterator[Tensor]:
        """Return the buffers, as long as a group."""
        return (buffer[: min(rows.stop, self.stop) - rows.start] for buffer in self.buffers)


def _sum(
    delta: Tensor, v: Tensor | None, column: Tensor, out: RowSums, needs: Needs, e: Tensor, product: Tensor, *,
    fast: bool,
) -> None:  # fmt: skip
    """Write the sums over the classes of a group of rows but their tops to ``out``, and the exponentials to ``e``."""
    exponentials_into(e, delta) if fast else torch.exp(delta, out=e)
    torch.sum(e.scatter_(-1, column, 0.0), -1, keepdim=True, out=out.rest)
    if needs.moment:
        torch.sum(torch.mul(e, delta, out=product), -1, keepdim=True, out=out.moment)
    if needs.square:
        torch.sum(torch.mul(e, e, out=product), -1, keepdim=True, out=out.square)
    if v is not None:
        out.top_change.copy_(v.gather(-1, column))
        torch.sum(torch.mul(e, v, out=product), -1, keepdim=True, out=out.change)
        torch.sum(product * e, -1, keepdim=True, out=out.square_change)
        torch.sum(product.mul_(delta), -1, keepdim=True, out=out.moment_change)


def _coarse(sums: RowSums) -> Tensor:
    """Return the rows whose sums of ``2^(δ log₂ e)`` may have an error above the rounding of a few terms.

    Rounding ``δ log₂ e`` is a relative error of at most ``|δ| ε / 2`` in a term, with ``ε / 2 = 6e-8``, and of various
    signs: with the mean ``m`` of ``|δ|``, that of the sum is about ``m ε / 4`` times ``√Σ e² / Σ e``. The rounding of
    the constant adds ``0.2 m ε / 2``.
    """
    mean = -sums.moment / sums.rest
    fine = (mean <= MOST_MEAN) & (mean * sums.square.sqrt() <= 2 * sums.rest)
    return (~fine).squeeze(-1).nonzero().squeeze(-1)


def _set_apart(tile: StatisticsTile, out: Tensor, rows: slice, place: Tensor, listed: Tensor, top: Tensor) -> None:
    """Add the entries at listed classes, and set that of the top, which is a small difference of large terms."""
    for places, values, adds in ((tile.listed, listed, True), (tile.places(place), top, False)):
        if places.columns.shape[1]:
            inside = None if places.inside is None else places.inside[rows]
            put(out, Places(places.columns[rows], inside), values[rows], add=adds)


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
