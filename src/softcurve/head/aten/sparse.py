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

from softcurve.head.kernel import Residuals
from softcurve.losses.spec import LogitMap

# Where each row's largest logit lies between these, e^z itself is summed: one pass less, and no rounding of z − max.
DIRECT = (0.0, 30.0)


class Places(NamedTuple):
    """Columns of a tile, some in each row."""

    columns: Tensor  # (rows, k); those that lie outside the tile are clamped to it
    inside: Tensor | None  # (rows, k); None if all lie inside

    def take(self, tile: Tensor) -> Tensor:
        """Return the entries of ``tile`` at the places in float64, and 0 outside."""
        entries = tile.gather(-1, self.columns).double()
        return entries if self.inside is None else torch.where(self.inside, entries, 0.0)


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

    def row_groups(self) -> Iterator[slice]:
        """Yield groups of rows that are small enough to stay in the cache."""
        rows, classes = self.z.shape
        step = max(1, self.cached // max(1, classes))
        return (slice(start, start + step) for start in range(0, rows, step))


class SparseSums(NamedTuple):
    """Sums over the unlisted classes of a block, and its largest logit. What is not wanted is ``None``."""

    shift: Tensor  # near max z; −inf where every class is masked
    total: Tensor  # Σ e^{z − shift}
    change: Tensor | None = None  # Σ e^{z − shift} ż
    moment: Tensor | None = None  # Σ e^{z − shift} (z − shift)
    largest: Tensor | None = None  # max z and its first column
    column: Tensor | None = None
    base: Tensor | None = None
    uniform: Tensor | None = None  # Σ u (z − base)
    uniform_change: Tensor | None = None  # Σ u ż
    held: Tensor | None = None  # the tensor in which exponentials relative to ``shift`` are left for :func:`residual`


class RowFactors(NamedTuple):
    """The numbers of each row from which :func:`residual` forms its entries."""

    shift: Tensor
    beta: Tensor
    alpha: Tensor | None  # None without a direction
    weight: Tensor


class Dominant(NamedTuple):
    """The unlisted class of a block that has more than half of a row's unlisted mass."""

    mass: Tensor  # 0 where there is none
    column: Tensor  # −1 where there is none
    rest: Tensor  # the mass of all other unlisted classes of the block


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
    """``tile ← factor · tile`` row by row; nothing is read where looking shows that every factor is 1."""
    if not _all_ones(factor):
        tile.mul_(factor.to(tile.dtype))


def statistics(tile: SparseTile, *, wants_stats: bool, leaves_residual: bool) -> SparseSums:
    """Map the logits and sum over the unlisted classes, leaving ``e^{z − shift}`` in ``z`` in any case."""
    z, v = tile.z, tile.v
    put(z, tile.listed, None)
    for rows in tile.row_groups() if tile.raw is not None else ():
        _map_logits(tile, rows)
    # Of the unlisted: beside a listed class far above them they would be too small for float32.
    top, column = z.max(-1, keepdim=True) if wants_stats else (z.amax(-1, keepdim=True), None)
    some = top != -math.inf
    base = torch.where(some, top, 0.0)
    uniform, uniform_change = _uniform_sums(tile, base)
    direct = z.device.type == "cpu" and bool(DIRECT[0] <= top.amin()) and bool(top.amax() <= DIRECT[1])
    shift = torch.zeros_like(top) if direct else base
    total = torch.empty_like(top)
    change = None if v is None else torch.empty_like(top)
    moment = torch.empty_like(top) if wants_stats else None
    for rows in tile.row_groups():
        part = z[rows]
        shifted = part - shift[rows] if wants_stats else None
        if not direct:
            part.sub_(shift[rows])
        torch.sum(part.exp_(), -1, keepdim=True, out=total[rows])
        if moment is not None and shifted is not None:
            torch.sum(torch.where(part == 0, 0.0, shifted.mul_(part)), -1, keepdim=True, out=moment[rows])
        if v is not None and change is not None:
            torch.sum(part * v[rows], -1, keepdim=True, out=change[rows])
    return SparseSums(
        shift=torch.where(some, shift, -math.inf).double(),
        total=total.double(),
        change=None if change is None else change.double(),
        moment=None if moment is None else moment.double(),
        largest=top.double() if wants_stats else None,
        column=column,
        base=base.double(),
        uniform=uniform,
        uniform_change=uniform_change,
        held=z,
    )


def residual(
    tile: SparseTile, factors: RowFactors, listed: Tensor, listed_v: Tensor | None, held: Tensor | None
) -> Residuals:
    """Form ∂L/∂z and its change along ``v``, in place: the only function of this backend that does.

    ``g = β e − w u`` and ``ġ = e (β m′ ż + α)`` with ``e = e^{m(z) − shift}`` at unlisted classes become ``m′ g`` and
    ``m′ ġ + m″ g ż``; ``listed`` and ``listed_v`` are set as they are. ``held`` is what :func:`statistics` has left, or
    ``None`` if ``z`` holds logits.
    """
    z, v, share = tile.z, tile.v, tile.share
    shift, beta, weight = (part.to(z.dtype) for part in (factors.shift, factors.beta, factors.weight))
    alpha = None if factors.alpha is None else factors.alpha.to(z.dtype)
    scaled = not _all_ones(beta)
    untouched = held is not None and not scaled and all(part is None for part in (v, share, tile.raw))
    for rows in () if untouched else tile.row_groups():
        part, slope = z[rows], None
        if held is None:
            _exponentiate(tile, rows, shift)
        if tile.raw is not None:
            slope = tile.logit_map.slope(tile.raw[rows])
        if v is not None and alpha is not None:
            change = v[rows]
            mapped = change.clone() if slope is not None else change
            change.mul_(beta[rows]).add_(alpha[rows]).mul_(part)
        if scaled:
            part.mul_(beta[rows])
        if share is not None:
            part.addr_(weight[rows].squeeze(-1), share, alpha=-1)
        if v is not None and slope is not None and tile.raw is not None:
            change.mul_(slope).add_(bend_ratio(tile.logit_map, tile.raw[rows]).mul_(mapped).mul_(part))
        if slope is not None:
            part.mul_(slope)
    put(z, tile.listed, listed)
    if v is not None and listed_v is not None:
        put(v, tile.listed, listed_v)
    return Residuals(z, None, v, None)


# --- second order ----------------------------------------------------------------------------------------------------


def prepare(tile: SparseTile, shift: Tensor, scale: Tensor | None, others: Tensor | None) -> Dominant | None:
    """``z ← e^{m(z) − shift}``, 0 at listed classes; find the class above half of ``others``, unless that is ``None``.

    ``scale`` multiplies the exponentials that the sweep has left; ``None`` if ``z`` holds logits.
    """
    if scale is None:
        put(tile.z, tile.listed, None)
    zeros = torch.zeros_like(shift)
    found = Dominant(zeros, torch.full_like(zeros, -1, dtype=torch.int64), zeros.clone())
    scaled = scale is not None and not _all_ones(scale)
    for rows in tile.row_groups():
        part = tile.z[rows]
        if scale is None:
            _exponentiate(tile, rows, shift.to(part.dtype))
        elif scaled:
            part.mul_(scale[rows].to(part.dtype))
        if others is None:
            continue
        mass = part.amax(-1, keepdim=True)
        above = mass > 0.5 * others[rows]
        if tile.listed.inside is not None:  # in a whole row it matters only beside such a class
            found.rest[rows] = torch.where(above, 0.0, part.sum(-1, keepdim=True).double())
        row = above.squeeze(-1).nonzero().squeeze(-1)
        if len(row):
            confident = part[row]
            column = confident.argmax(-1, keepdim=True)
            found.column[rows][row] = column
            found.mass[rows][row] = mass[row].double()
            found.rest[rows][row] = confident.scatter_(-1, column, 0.0).sum(-1, keepdim=True).double()
    return None if others is None else found


def form_residual(tile: SparseTile, out: Tensor, factor: Tensor) -> None:
    """``out = m′ (factor · e − u)`` beside the exponentials ``e``: a Hessian's ∂L/∂z at unlisted classes."""
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

    ``v ← m′ e (β m′ v + α) + (m″/m′) (m′ g′) v · inverse``; the kernel adds to it at the classes that it keeps apart.
    """
    assert tile.v is not None
    scaled = not _all_ones(beta)
    alpha, beta, inverse = (part.to(tile.v.dtype) for part in (alpha, beta, inverse))
    for rows in tile.row_groups():
        v, bend = tile.v[rows], None
        slope = None if tile.raw is None else tile.logit_map.slope(tile.raw[rows])
        if tile.raw is not None and tile.residual is not None:
            bend = bend_ratio(tile.logit_map, tile.raw[rows]).mul_(tile.residual[rows]).mul_(v)
        if slope is not None:
            v.mul_(slope)
        if scaled:
            v.mul_(beta[rows])
        v.add_(alpha[rows]).mul_(tile.z[rows])
        if slope is not None:
            v.mul_(slope)
        if bend is not None:
            v.add_(bend.mul_(inverse[rows]))


def diagonal(tile: SparseTile, square: Tensor, linear: Tensor, inverse: Tensor) -> None:
    """``v ← m′² e (square · e + linear) + (m″/m′) (m′ g′) · inverse``, as :func:`multiply_column`."""
    assert tile.v is not None
    square, linear, inverse = (part.to(tile.v.dtype) for part in (square, linear, inverse))
    for rows in tile.row_groups():
        v, e = tile.v[rows], tile.z[rows]
        torch.mul(e, square[rows], out=v).add_(linear[rows]).mul_(e)
        if tile.raw is not None:
            v.mul_(tile.logit_map.slope(tile.raw[rows]).square_())
            if tile.residual is not None:
                bend = bend_ratio(tile.logit_map, tile.raw[rows]).mul_(tile.residual[rows])
                v.add_(bend.mul_(inverse[rows]))


# --- parts -----------------------------------------------------------------------------------------------------------


def bend_ratio(logit_map: LogitMap, raw: Tensor) -> Tensor:
    """``m″/m′ = −(2/κ) tanh(z/κ)`` of a soft cap."""
    assert logit_map.softcap is not None
    return torch.tanh(raw / logit_map.softcap).mul_(-2 / logit_map.softcap)


def _map_logits(tile: SparseTile, rows: slice) -> None:
    """``z ← m(z)`` and ``ż ← m′(z) ż``, with the logits before it in ``raw``, where there is a soft cap."""
    if tile.raw is None:
        return
    raw = tile.raw[rows].copy_(tile.z[rows])
    tile.z[rows] = tile.logit_map.value(raw)
    if tile.v is not None:
        tile.v[rows] *= tile.logit_map.slope(raw)


def _exponentiate(tile: SparseTile, rows: slice, shift: Tensor) -> None:
    """``z ← e^{m(z) − shift}``."""
    _map_logits(tile, rows)
    tile.z[rows].sub_(shift[rows]).exp_()


def _uniform_sums(tile: SparseTile, base: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """``Σ u (z − base)`` and ``Σ u ż`` of label smoothing over the unlisted classes."""
    z, v, share = tile.z, tile.v, tile.share
    if share is None:
        return None, None
    masks = bool((share == 0).any())  # a class of weight 0 has no part, also where it is masked
    put(z, tile.listed, base.expand_as(tile.listed.columns))
    if v is not None:
        put(v, tile.listed, torch.zeros_like(tile.listed.columns))

    def inner(part: Tensor) -> Tensor:
        return (torch.where(share == 0, 0.0, part) if masks else part) @ share

    uniform = torch.cat([inner(z[rows] - base[rows]) for rows in tile.row_groups()])
    put(z, tile.listed, None)
    change = None if v is None else torch.cat([inner(v[rows]) for rows in tile.row_groups()]).double().unsqueeze(-1)
    return uniform.double().unsqueeze(-1), change


def _all_ones(factor: Tensor) -> bool:
    """Whether rows need no factor; not looked at where that would make the device wait."""
    return factor.device.type == "cpu" and bool((factor == 1).all())
