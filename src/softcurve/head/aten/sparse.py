"""The tile functions of :class:`softcurve.head.sparse.SparseKernel` in ATen.

:mod:`softcurve.head.triton.sparse` has the same functions. Listed classes are masked with −inf before a tile is read
and set afterwards, so no function compares its classes with a list. Sums over a row are float64 columns ``(rows, 1)``.
The functions work in place, on groups of rows that stay in the cache.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from softcurve.head.aten.dense_terms import DenseTile
from softcurve.head.kernel import Residuals, row_groups
from softcurve.losses.spec import LogitMap

# Where each row's largest logit lies between these, e^z itself is summed: one pass less, and no rounding of z − max.
DIRECT = (0.0, 30.0)
# How far a largest logit of a block may be from the shift of the blocks before, to share it: nothing is rescaled then.
NEAR = 20.0


class Places(NamedTuple):
    """Columns of a tile, some in each row."""

    columns: Tensor  # (rows, k); those that lie outside the tile are clamped to it
    inside: Tensor | None  # (rows, k); None if all lie inside

    @staticmethod
    def of(classes: Tensor, block: slice) -> Places:
        """Return where some classes of each row stand in a block; those of other blocks lie outside."""
        columns, width = classes - block.start, block.stop - block.start
        return Places(columns.clamp(0, width - 1), (columns >= 0) & (columns < width))

    def take(self, tile: Tensor) -> Tensor:
        """Return the entries of ``tile`` at the places in float64, and 0 outside."""
        return self.update(0.0, tile)

    def update(self, values: Tensor | float, tile: Tensor) -> Tensor:
        """Return ``values (rows, k)`` with the entries of ``tile`` at the places inside in their stead, in float64."""
        entries = tile.gather(-1, self.columns).double()
        return entries if self.inside is None else torch.where(self.inside, entries, values)


class SparseTile(NamedTuple):
    """The tensors of a block, ``(rows, classes)`` each, and what its elementwise work depends on."""

    z: Tensor
    raw: Tensor | None  # buffer for the logits before their soft cap
    v: Tensor | None  # change of z along a direction
    out: Tensor | None  # buffers for residuals in half precision
    v_out: Tensor | None
    residual: Tensor | None  # second order: m′ g′ of a Hessian
    listed: Places
    share: Tensor | None  # (classes,): u of label smoothing
    logit_map: LogitMap
    cached: int  # entries that stay in the cache
    near: Tensor | None = None  # (rows, 1): the shift of a row's earlier blocks, where they stay
    masks_share: bool = False  # whether a masked class has no share, as one that its row excludes
    whole: bool = False  # whether the block has all classes, so that no block is computed anew for its exponentials

    def row_groups(self) -> Iterator[slice]:
        """Return groups of rows that are small enough to stay in the cache."""
        return row_groups(self.z, self.cached)

    def listed_share(self) -> Tensor:
        """Return ``u`` of the listed classes, ``(rows, k)``, and 0 for those outside the block."""
        assert self.share is not None
        return self.listed.take(self.share.expand_as(self.z))


class SparseSums(NamedTuple):
    """Sums over unlisted classes; what is not wanted is 0."""

    shift: Tensor  # near max z; −inf where every class is masked
    total: Tensor  # Σ e^{z − shift}
    change: Tensor  # Σ e^{z − shift} ż
    moment: Tensor  # Σ e^{z − shift} (z − shift)
    square: Tensor  # Σ e^{2 (z − shift)}
    uniform: Tensor  # Σ u (z − shift), relative to 0 for a shift of −inf
    uniform_change: Tensor  # Σ u ż
    mass: Tensor  # Σ u

    @staticmethod
    def of(shift: Tensor, total: Tensor, **others: Tensor) -> SparseSums:
        """Fill in zeros for what is left out."""
        fields = dict.fromkeys(SparseSums._fields, torch.zeros_like(total))
        return SparseSums(**fields | others | {"shift": shift, "total": total})

    def plus(self, other: SparseSums) -> SparseSums:
        """Add sums relative to the same shift."""
        return SparseSums(*(a + b for a, b in zip(self, other, strict=True)))._replace(shift=self.shift)

    def with_top(self, square: Tensor) -> SparseSums:
        """Add the class whose logit is the shift, if there is one, to sums over all others; ``square`` is theirs."""
        one = (self.shift != -math.inf).double()
        return self._replace(total=self.total + one, square=square + one)

    def shifted(self, shift: Tensor) -> SparseSums:
        """Return the sums relative to a ``shift`` that is no smaller, or to any where there is no mass."""
        some = self.shift != -math.inf
        lowered = torch.where(some, self.shift - shift, 0.0)
        kept = torch.where(some, torch.exp(lowered), 0.0)
        return self._replace(
            shift=shift,
            total=self.total * kept,
            change=self.change * kept,
            moment=kept * (self.moment + lowered * self.total),
            square=kept.square() * self.square,
            uniform=self.uniform + self.mass * (or_zero(self.shift) - or_zero(shift)),
        )


class SparseResiduals(NamedTuple):
    """The numbers of each row from which :func:`residual` forms its entries; ``alpha`` and the last for a direction."""

    shift: Tensor
    alpha: Tensor
    beta: Tensor
    weight: Tensor
    listed: Tensor  # (rows, k): the entries at the listed classes, and their changes
    listed_v: Tensor


def put(tile: Tensor, places: Places, values: Tensor | None, *, add: bool = False) -> None:
    """Set or add to the entries of ``tile`` at the places inside; ``None`` sets −inf."""
    columns, inside = places
    if values is None:
        values = tile.new_full((), -math.inf).expand_as(columns)
    values = values.to(tile.dtype)
    if add:
        tile.scatter_add_(-1, columns, values if inside is None else torch.where(inside, values, 0.0))
    elif inside is None:
        tile.scatter_(-1, columns, values)
    else:
        row, slot = inside.nonzero().unbind(-1)
        tile[row, columns[row, slot]] = values[row, slot]


def rescale(tile: Tensor, factor: Tensor) -> None:
    """Multiply each row of ``tile`` by its factor."""
    tile.mul_(factor.to(tile.dtype))


def statistics(
    tile: SparseTile, *, wants_stats: bool, leaves_residual: bool
) -> tuple[SparseSums, Tensor | None, Tensor | None]:
    """Map the logits and sum over the unlisted classes; ``e^{z − shift}`` is left in ``z`` in any case.

    Returns the sums, the first column of the largest logit if statistics are wanted, and the tensor with exponentials.
    With statistics the shift is that logit, whose ``e^0 = 1`` is added to the sums of all others in float64: beside it
    they keep their digits.
    """
    z, v = tile.z, tile.v
    put(z, tile.listed, None)
    # Of the unlisted: beside a listed class far above them they would be too small for float32.
    top, shift, column, smoothed = z.new_empty(len(z), 1), z.new_empty(len(z), 1), None, {}
    looks_first = wants_stats or tile.share is not None  # otherwise each group is in the cache for both
    if looks_first:
        for rows in tile.row_groups():
            _map_logits(tile, rows)
        top, column = z.max(-1, keepdim=True) if wants_stats else (z.amax(-1, keepdim=True), None)
        shift = _shift_beside(tile.near, top)
        smoothed = _uniform_sums(tile, shift)
    # torch's softmax takes half the time of its exponential alone, and leaves e^z in multiples of a number of each row.
    on_cpu = z.device.type == "cpu"
    normalises = tile.whole and not looks_first and z.dtype == torch.float32 and z.is_contiguous() and on_cpu
    total, change, moment, square = (torch.zeros_like(top) for _ in range(4))
    for rows in tile.row_groups():
        part = z[rows]
        if not looks_first:
            _map_logits(tile, rows)
            torch.amax(part, -1, keepdim=True, out=top[rows])
        if normalises:
            torch.softmax(part, -1, out=part)
            torch.amax(part, -1, keepdim=True, out=shift[rows])
        else:
            if not looks_first:
                shift[rows] = _shift_beside(None if tile.near is None else tile.near[rows], top[rows], direct=on_cpu)
            direct = not looks_first and on_cpu and not bool(shift[rows].any())
            shifted = part if direct else torch.sub(part, shift[rows], out=None if wants_stats else part)
            torch.exp(shifted, out=part)
        if column is not None:
            at_top = part.gather(-1, column[rows])
            part.scatter_(-1, column[rows], 0.0)
            torch.sum(torch.where(part == 0, 0.0, shifted.mul_(part)), -1, keepdim=True, out=moment[rows])
            torch.sum(torch.mul(part, part, out=shifted), -1, keepdim=True, out=square[rows])
        torch.sum(part, -1, keepdim=True, out=total[rows])
        if column is not None:
            part.scatter_(-1, column[rows], at_top)
        if v is not None:
            torch.sum(part * v[rows], -1, keepdim=True, out=change[rows])
    # A block without mass leaves the shift to others, which may lie anywhere.
    if normalises:  # p of the largest logit is e^{top − shift}
        lowest = top.double() - shift.double().log()
        if len(masked := (top == -math.inf).squeeze(-1).nonzero().squeeze(-1)):
            z[masked], total[masked], lowest[masked] = 0.0, 0.0, -math.inf
    else:
        lowest = torch.where(top == -math.inf, top, shift).double()
    sums = SparseSums.of(lowest, total.double(), change=change.double(), moment=moment.double(), **smoothed)
    return sums.with_top(square.double()) if wants_stats else sums, column, z


def residual(tile: SparseTile, rows: SparseResiduals, exponentials: Tensor | None) -> Residuals:
    """Form ∂L/∂z and its change along ``v``, in place: the only function of this backend that does.

    ``g = β e − w u`` and ``ġ = e (β m′ ż + α)`` with ``e = e^{m(z) − shift}`` at unlisted classes become ``m′ g`` and
    ``m′ ġ + m″ g ż``. ``exponentials`` are what :func:`statistics` has left, or ``None`` if ``z`` holds logits.
    """
    z, v, raw, share = tile.z, tile.v, tile.raw, tile.share
    shift, alpha, beta, weight = (part.to(z.dtype) for part in (rows.shift, rows.alpha, rows.beta, rows.weight))
    scaled = not _all_ones(beta)
    untouched = exponentials is not None and not scaled and v is None and share is None and raw is None
    for group in () if untouched else tile.row_groups():
        if exponentials is None:
            _exponentiate(tile, group, shift)
        e, mapped = z[group], z[:0]
        if v is not None:
            mapped = v[group].clone() if raw is not None else mapped
            if scaled:
                v[group].mul_(beta[group])
            v[group].add_(alpha[group]).mul_(e)
        if scaled:
            e.mul_(beta[group])
        if share is not None:
            e.addr_(weight[group].squeeze(-1), share, alpha=-1)
        if raw is not None:
            slope = tile.logit_map.slope(raw[group])
            if v is not None:
                v[group].mul_(slope).add_(tile.logit_map.bend_ratio(raw[group]).mul_(mapped).mul_(e))
            e.mul_(slope)
    put(z, tile.listed, rows.listed)
    if v is not None:
        put(v, tile.listed, rows.listed_v)
    return Residuals(z, None, v, None)


# --- second order ----------------------------------------------------------------------------------------------------


def prepare(
    tile: SparseTile, shift: Tensor, scale: Tensor | None, others: Tensor | None,
    known: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, ...] | None:  # fmt: skip
    """Set ``z ← e^{m(z) − shift}``, and 0 at listed classes.

    ``scale`` multiplies the exponentials that the sweep has left; it is ``None`` if ``z`` holds logits. ``known`` are
    the largest of the results in each row and their sum, if the sweep has found them. Unless ``others`` is ``None``,
    returns the class with more than half of it: its mass (or 0), its column (or −1), and the mass of all other classes
    of the block, which whole rows without such a class leave at 0.
    """
    if scale is None:
        put(tile.z, tile.listed, None)
    top, rest, column = torch.zeros_like(shift), torch.zeros_like(shift), torch.full_like(shift, -1, dtype=torch.int64)
    scaled, narrow = scale is not None and not _all_ones(scale), shift.to(tile.z.dtype)
    for rows in tile.row_groups():
        e = tile.z[rows]
        if scale is None:
            _exponentiate(tile, rows, narrow)
        elif scaled:
            rescale(e, scale[rows])
        if others is None:
            continue
        mass = e.amax(-1, keepdim=True) if known is None else known[0][rows]
        above = mass > 0.5 * others[rows]
        if tile.listed.inside is not None:
            total = e.sum(-1, keepdim=True) if known is None else known[1][rows]
            rest[rows] = torch.where(above, 0.0, total.double())
        row = above.squeeze(-1).nonzero().squeeze(-1)
        if len(row):
            confident = e[row]
            at = confident.argmax(-1, keepdim=True)
            column[rows][row], top[rows][row] = at, mass[row].double()
            rest[rows][row] = confident.scatter_(-1, at, 0.0).sum(-1, keepdim=True).double()
    return None if others is None else (top, column, rest)


def form_residual(tile: SparseTile, out: Tensor, factor: Tensor) -> None:
    """Set ``out = m′ (factor · e − u)`` beside the exponentials ``e``: a Hessian's ∂L/∂z at unlisted classes."""
    for rows in tile.row_groups():
        part = torch.mul(tile.z[rows], factor[rows].to(out.dtype), out=out[rows])
        if tile.share is not None:
            part.sub_(tile.share)
        if tile.raw is not None:
            part.mul_(tile.logit_map.slope(tile.raw[rows]))


def accumulate_column(tile: SparseTile) -> Tensor:
    """Return ``Σ e m′ v`` of each row."""
    assert tile.v is not None
    sums = tile.z.new_empty(len(tile.z), 1)
    for rows in tile.row_groups():
        changes = tile.z[rows] * tile.v[rows]
        if tile.raw is not None:
            changes.mul_(tile.logit_map.slope(tile.raw[rows]))
        torch.sum(changes, -1, keepdim=True, out=sums[rows])
    return sums.double()


def multiply_column(tile: SparseTile, alpha: Tensor, beta: Tensor, inverse: Tensor) -> None:
    """Form the product of a Hessian or Gauss-Newton matrix with a column: the only function of this backend that does.

    It sets ``v ← m′ e (β m′ v + α) + (m″/m′) (m′ g′) v · inverse``, to which the kernel adds at the classes that it
    keeps apart.
    """
    assert tile.v is not None
    scaled = not _all_ones(beta)
    alpha, beta, inverse = (part.to(tile.v.dtype) for part in (alpha, beta, inverse))
    for rows in tile.row_groups():
        v, (slope, bend) = tile.v[rows], slope_and_bend(tile, tile.logit_map, rows)
        if bend is not None:
            bend.mul_(v).mul_(inverse[rows])
        if slope is not None:
            v.mul_(slope)
        if scaled:
            v.mul_(beta[rows])
        through_cap(v.add_(alpha[rows]).mul_(tile.z[rows]), slope, bend)


def diagonal(tile: SparseTile, square: Tensor, linear: Tensor, inverse: Tensor) -> None:
    """Set ``v ← m′² e (square · e + linear) + (m″/m′) (m′ g′) · inverse``, to which the kernel adds likewise."""
    assert tile.v is not None
    square, linear, inverse = (part.to(tile.v.dtype) for part in (square, linear, inverse))
    for rows in tile.row_groups():
        v, e, (slope, bend) = tile.v[rows], tile.z[rows], slope_and_bend(tile, tile.logit_map, rows)
        torch.mul(e, square[rows], out=v).add_(linear[rows]).mul_(e)
        bend = None if bend is None else bend.mul_(inverse[rows])
        through_cap(v, None if slope is None else slope.square_(), bend)


def slope_and_bend(
    tile: SparseTile | DenseTile, logit_map: LogitMap, rows: slice = slice(None)
) -> tuple[Tensor | None, Tensor | None]:
    """Return ``m′`` if there is a soft cap, and ``(m″/m′) (m′ g′)`` if there is a Hessian's residual as well."""
    if tile.raw is None:
        return None, None
    raw = tile.raw[rows]
    bend = None if tile.residual is None else logit_map.bend_ratio(raw).mul_(tile.residual[rows])
    return logit_map.slope(raw), bend


def through_cap(v: Tensor, slope: Tensor | None, bend: Tensor | None) -> None:
    """Set ``v ← slope ⊙ v + bend``."""
    if slope is not None:
        v.mul_(slope)
    if bend is not None:
        v.add_(bend)


def _map_logits(tile: SparseTile, rows: slice) -> None:
    """If there is a soft cap, set ``z ← m(z)`` and ``ż ← m′(z) ż``, and copy the logits before it to ``raw``."""
    if tile.raw is None:
        return
    raw = tile.raw[rows].copy_(tile.z[rows])
    tile.z[rows] = tile.logit_map.value(raw)
    if tile.v is not None:
        tile.v[rows] *= tile.logit_map.slope(raw)


def _exponentiate(tile: SparseTile, rows: slice, shift: Tensor) -> None:
    """Set ``z ← e^{m(z) − shift}``."""
    _map_logits(tile, rows)
    tile.z[rows].sub_(shift[rows]).exp_()


def _uniform_sums(tile: SparseTile, base: Tensor) -> dict[str, Tensor]:
    """Return ``Σ u (z − base)`` and ``Σ u ż`` of label smoothing over the unlisted classes."""
    share, columns = tile.share, tile.listed.columns
    if share is None:
        return {}
    masks = tile.masks_share or bool((share == 0).any())  # a class of weight 0 has no part, also where it is masked
    sums = {}
    for name, tensor, less in (("uniform", tile.z, base), ("uniform_change", tile.v, torch.zeros_like(base))):
        if tensor is not None:
            put(tensor, tile.listed, less.expand_as(columns))
            parts = (tensor[rows] - less[rows] for rows in tile.row_groups())
            if masks:
                parts = (torch.where((share == 0) | (tile.masks_share & (p == -math.inf)), 0.0, p) for p in parts)
            inner = [part @ share for part in parts]
            sums[name] = torch.cat(inner).double().unsqueeze(-1)
    put(tile.z, tile.listed, None)
    return sums


def _shift_beside(near: Tensor | None, top: Tensor, *, direct: bool = False) -> Tensor:
    """Return what exponentials are relative to: the largest logit, or the shift of earlier blocks if that is near.

    If it may be ``direct``, it is 0 where that serves all rows.
    """
    shift = or_zero(top)
    if near is None:
        is_direct = direct and bool(DIRECT[0] <= top.amin()) and bool(top.amax() <= DIRECT[1])
        return torch.zeros_like(top) if is_direct else shift
    near = near.to(top.dtype)
    return torch.where((top - near).abs() <= NEAR, near, shift)


def or_zero(shift: Tensor) -> Tensor:
    """Return what sums are relative to: 0 as long as there is no class with mass."""
    return torch.where(shift == -math.inf, 0.0, shift)


def _all_ones(factor: Tensor) -> bool:
    """Return whether rows need no factor, but False where a look at it would make the device wait."""
    return factor.device.type == "cpu" and bool((factor == 1).all())
