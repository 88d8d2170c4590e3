"""The tile functions of :class:`softcurve.head.sparse.SparseKernel` in Triton, as in :mod:`softcurve.head.aten.sparse`.

Logits stay in the tile until residuals are formed, so a soft cap needs no buffer. Each kernel reads a tile once: index
and list targets with half-precision products read it once in all and write ``e^{z − shift}``, in half precision, once,
with the row's factor left to the products' small operands. Where the residual takes the logits' place (float32) or
needs the row's sum (label smoothing, a direction), or statistics are wanted, a tile is read twice.

In a kernel ``None`` stands for what there is not, and ``classes`` are those of the block.
"""

from __future__ import annotations

from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from softcurve.head.aten.sparse import Places, SparseResiduals, SparseSums, SparseTile, diagonal, form_residual
from softcurve.head.kernel import Residuals
from softcurve.head.triton import columns, math
from softcurve.head.triton.math import column, here, jit, launch, number, own_rows, store_sum

# The functions of ATen that serve here as well are named too: the kernel takes all of them from this module.
__all__ = ["accumulate_column", "diagonal", "form_residual", "multiply_column", "prepare", "put", "rescale"]
__all__ += ["residual", "statistics"]

# How far a row's largest logit may be from the shift that was guessed for it. Beyond it the row is done again. So far
# the rounding of z − shift leaves two units of 1e-6, and e^40 sums without overflow.
GUESS: tl.constexpr = tl.constexpr(40.0)


def _launch(kernel: Any, tile: SparseTile, *, by_rows: bool, **more: Any) -> None:
    """Launch a kernel, whose parameters receive what of the tile, its logit map and ``more`` has their names."""
    logit_map = {"softcap": tile.logit_map.softcap, "temperature": tile.logit_map.temperature}
    launch(kernel, tile.z, tile._asdict() | logit_map | more, by_rows=by_rows)


@jit
def _put(
    tile, tile_stride, places, values, width, rows, classes, ADD: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    # Here "classes" are the places of a list, and "width" the classes of the tile.
    row, slot, exists = here(ROWS, BLOCK, rows, classes, tl.program_id(1) * BLOCK)
    at = tl.load(places + row * classes + slot, mask=exists, other=-1)
    inside = exists & (at >= 0) & (at < width)
    where = tile + row * tile_stride + at
    value = tl.full([ROWS, BLOCK], -float("inf"), tl.float32)
    if values is not None:
        value = tl.load(values + row * classes + slot, mask=inside, other=0.0)
        if ADD:
            value += tl.load(where, mask=inside, other=0.0).to(tl.float32)
    tl.store(where, value, mask=inside)


def put(tile: Tensor, places: Places, values: Tensor | None, *, add: bool = False) -> None:
    """Set or add to the entries of ``tile`` at the places inside; ``None`` sets −inf."""
    columns = places.columns if places.inside is None else torch.where(places.inside, places.columns, -1)
    values = None if values is None else values.float().contiguous()
    arguments = {"tile": tile, "places": columns.contiguous(), "values": values, "width": tile.shape[1], "ADD": add}
    launch(_put, columns, arguments, by_rows=False)


@jit
def _rescale(tile, tile_stride, factor, rows, classes, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    scale = tl.load(factor + own_rows(ROWS), mask=own_rows(ROWS) < rows, other=1.0)
    pieces = tl.where(tl.max((scale != 1).to(tl.int32)) > 0, classes, 0)
    for start in range(0, pieces, BLOCK):
        row, at, inside = here(ROWS, BLOCK, rows, classes, start)
        e = tl.load(tile + row * tile_stride + at, mask=inside & (scale != 1), other=0.0).to(tl.float32)
        tl.store(tile + row * tile_stride + at, e * scale, mask=inside & (scale != 1))


def rescale(tile: Tensor, factor: Tensor) -> None:
    """Multiply each row of ``tile`` by its factor; rows whose factor is 1 are not touched."""
    launch(_rescale, tile, {"tile": tile, "factor": column(factor)}, by_rows=True)


# --- the sweep -------------------------------------------------------------------------------------------------------


@jit
def _exponentials(
    z, z_stride, out, out_stride, shift, total, top, softcap, temperature, rows, classes, REDO: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    row = own_rows(ROWS)
    exists = row < rows
    if REDO:
        first, guess = number(shift, 0, row, rows), number(top, 0, row, rows)
        exists = exists & (guess != -float("inf")) & ((guess - first > GUESS) | (first - guess > GUESS))
        pieces = tl.where(tl.max(exists.to(tl.int32)) > 0, classes, 0)
    else:
        _, at, inside = here(ROWS, BLOCK, rows, classes, 0)
        first = tl.load(z + row * z_stride + at, mask=inside, other=-float("inf"))
        guess = tl.max(math.capped(first, softcap, temperature), axis=1)[:, None]
        guess = tl.where(guess == -float("inf"), 0.0, guess)
        pieces = classes
    sums = tl.zeros([ROWS, BLOCK], tl.float32)
    tops = tl.full([ROWS, BLOCK], -float("inf"), tl.float32)
    for start in range(0, pieces, BLOCK):
        _, at, inside = here(ROWS, BLOCK, rows, classes, start)
        x = tl.load(z + row * z_stride + at, mask=inside & exists, other=-float("inf"))
        seen = math.capped(x, softcap, temperature)
        e = math.difference_exp(seen, guess)
        sums += e
        tops = tl.maximum(tops, seen)
        if softcap is not None:
            e = tl.where(e == 0, 0.0, e * math.cap_slope(x, softcap, temperature))
        tl.store(out + row * out_stride + at, e, mask=inside & exists)
    tl.store(total + row, tl.sum(sums, axis=1)[:, None], mask=exists)
    tl.store(shift + row, guess, mask=exists)
    if not REDO:
        tl.store(top + row, tl.max(tops, axis=1)[:, None], mask=exists)


def exponentials(tile: SparseTile) -> tuple[Tensor, Tensor]:
    """Set ``out = m′(z) e^{m(z) − shift}``; return ``shift`` and ``Σ e^{m(z) − shift}`` of each row.

    The shift is guessed from the first classes. A second launch redoes the rows whose guess was far from their largest
    logit and leaves at once for the others: nobody waits to see whether there are any.
    """
    shift, total, top = (tile.z.new_empty(len(tile.z), 1) for _ in range(3))
    for redo in (False, True):
        _launch(_exponentials, tile, by_rows=True, shift=shift, total=total, top=top, REDO=redo)
    return shift, total


@jit
def _statistics(
    z, z_stride, v, v_stride, share, table, column, softcap, temperature, rows, classes,
    ROWS: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    row = own_rows(ROWS)
    exists = row < rows
    shift = tl.full([ROWS, 1], -float("inf"), tl.float32)
    base = tl.zeros([ROWS, 1], tl.float32)
    sums = tl.zeros([ROWS, BLOCK], tl.float32)
    moments = tl.zeros([ROWS, BLOCK], tl.float32)
    squares = tl.zeros([ROWS, BLOCK], tl.float32)
    changes = tl.zeros([ROWS, BLOCK], tl.float32)
    uniforms = tl.zeros([ROWS, BLOCK], tl.float32)
    uniform_masses = tl.zeros([ROWS, BLOCK], tl.float32)
    uniform_changes = tl.zeros([ROWS, BLOCK], tl.float32)
    masked = tl.zeros([ROWS, BLOCK], tl.float32)
    chosen = tl.zeros([ROWS, 1], tl.int64)
    for start in range(0, classes, BLOCK):
        _, at, inside = here(ROWS, BLOCK, rows, classes, start)
        raw = tl.load(z + row * z_stride + at, mask=inside, other=-float("inf"))
        x = math.capped(raw, softcap, temperature)
        top = tl.max(x, axis=1)[:, None]
        new = tl.maximum(shift, top)
        safe = tl.where(new == -float("inf"), 0.0, new)
        lowered = tl.where(shift == -float("inf"), 0.0, shift - safe)
        kept = tl.where(shift == -float("inf"), 0.0, math.difference_exp(shift, safe))
        e = math.difference_exp(x, safe)
        apart = e
        if column is not None:
            # The largest so far is apart, as in ATen; the lower of it and of the block's largest joins the others.
            which, raised = start + tl.argmax(x, axis=1)[:, None], top > shift
            chosen = tl.where(raised, which, chosen)
            joined = tl.where(at == start, tl.where(raised, kept, math.difference_exp(top, safe)), 0.0)
            apart = tl.where(at == which, 0.0, e)
            moments = kept * (moments + lowered * sums) + tl.where(apart == 0, 0.0, apart * (x - safe))
            moments += tl.where(joined == 0, 0.0, joined * tl.where(raised, lowered, top - safe))
            squares = kept * kept * squares + apart * apart + joined * joined
            apart += joined
        sums = kept * sums + apart
        if v is not None:
            change = tl.load(v + row * v_stride + at, mask=inside, other=0.0) * math.cap_slope(
                raw, softcap, temperature
            )
            changes = kept * changes + tl.where(e == 0, 0.0, e * change)
        if share is not None:
            weight = tl.load(share + at, mask=at < classes, other=0.0)
            if start == 0:
                base = safe
            part = inside & (weight != 0)
            finite = part & (x != -float("inf"))
            uniforms += tl.where(finite, weight * (x - base), 0.0)
            uniform_masses += tl.where(finite, weight, 0.0)
            masked += (part & (x == -float("inf"))).to(tl.float32)
            if v is not None:
                uniform_changes += tl.where(finite, weight * change, 0.0)
        shift = new
    # One line of the table for each number: see statistics.
    tl.store(table + row, shift, mask=exists)
    store_sum(table, 1, sums, row, rows)
    store_sum(table, 2, changes, row, rows)
    store_sum(table, 3, moments, row, rows)
    raised = base - tl.where(shift == -float("inf"), 0.0, shift)
    store_sum(table, 4, uniforms + uniform_masses * raised, row, rows)
    store_sum(table, 5, uniform_changes, row, rows)
    store_sum(table, 6, masked, row, rows)
    store_sum(table, 7, squares, row, rows)
    if column is not None:
        tl.store(column + row, chosen, mask=exists)


def statistics(
    tile: SparseTile, *, wants_stats: bool, leaves_residual: bool
) -> tuple[SparseSums, Tensor | None, Tensor | None]:
    """Sum over the unlisted classes of a block.

    If ``leaves_residual`` and nothing else is wanted, ``out`` receives the residual at unlisted classes, but for a
    factor of each row.
    """
    z, v, share = tile.z, tile.v, tile.share
    put(z, tile.listed, None)
    if leaves_residual and tile.out is not None and v is None and share is None and not wants_stats:
        shift, total = exponentials(tile)
        return SparseSums.of(shift.double(), total.double()), None, tile.out
    at = z.new_zeros(len(z), 1, dtype=torch.int64) if wants_stats else None
    table = z.new_empty(8, len(z), 1)
    _launch(_statistics, tile, by_rows=True, table=table, column=at)
    shift, total, change, moment, uniform, uniform_change, masked, square = table.double()
    if (
        share is not None and not tile.masks_share
    ):  # infinite where a class of weight is masked, beside the listed classes, which all are
        listed = (tile.listed_share() != 0).sum(-1, keepdim=True)
        uniform = torch.where(masked > listed, -torch.inf, uniform)
    others = {"moment": moment, "uniform": uniform, "uniform_change": uniform_change}
    sums = SparseSums.of(shift, total, change=change, **others)
    return sums.with_top(square) if wants_stats else sums, at, None


# --- residuals -------------------------------------------------------------------------------------------------------


@jit
def _residual(
    z, z_stride, v, v_stride, out, out_stride, v_out, v_out_stride, share, shift, alpha, beta, weight, softcap,
    temperature, rows, classes, ROWS: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    row, at, inside = here(ROWS, BLOCK, rows, classes, tl.program_id(1) * BLOCK)
    raw = tl.load(z + row * z_stride + at, mask=inside, other=-float("inf"))
    factor = number(beta, 0, row, rows)
    x = math.capped(raw, softcap, temperature)
    slope = math.cap_slope(raw, softcap, temperature)
    e = math.difference_exp(x, number(shift, 0, row, rows))
    gradient = factor * e
    if share is not None:
        each = tl.load(share + at, mask=at < classes, other=0.0)
        gradient -= number(weight, 0, row, rows) * each
    if v is not None:
        change = tl.load(v + row * v_stride + at, mask=inside, other=0.0) * slope
        product = tl.where(e == 0, 0.0, e * (factor * change + number(alpha, 0, row, rows)))
        if softcap is not None:
            bent = math.bend_ratio(raw, softcap) * change * gradient
            product = tl.where(x == -float("inf"), 0.0, product * slope + bent)
        tl.store(v_out + row * v_out_stride + at, product, mask=inside)
    if softcap is not None:
        gradient = tl.where(x == -float("inf"), 0.0, gradient * slope)
    tl.store(out + row * out_stride + at, gradient, mask=inside)


def residual(tile: SparseTile, rows: SparseResiduals, exponentials: Tensor | None) -> Residuals:
    """Form ∂L/∂z and its change along ``v``: the only function of this backend that does.

    They are written into ``out`` and ``v_out``, or in place. ``exponentials`` are the ``out`` that :func:`statistics`
    has filled, where β is missing.
    """
    out, v_out = tile.z if tile.out is None else tile.out, tile.v if tile.v_out is None else tile.v_out
    if exponentials is not None:
        rescale(exponentials, rows.beta)
    else:
        columns = {name: column(getattr(rows, name)) for name in ("shift", "alpha", "beta", "weight")}
        _launch(_residual, tile, by_rows=False, **columns, out=out, v_out=v_out)
    put(out, tile.listed, rows.listed)
    if v_out is not None:
        put(v_out, tile.listed, rows.listed_v)
    return Residuals(out, None, v_out, None)


# --- second order ----------------------------------------------------------------------------------------------------


@jit
def _prepare(
    z, z_stride, raw, raw_stride, shift, masses, place, softcap, temperature, rows, classes,
    ROWS: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    row = own_rows(ROWS)
    exists = row < rows
    top = tl.zeros([ROWS, 1], tl.float32)
    chosen = tl.zeros([ROWS, 1], tl.int64)
    rest = tl.zeros([ROWS, BLOCK], tl.float32)
    lower = tl.zeros([ROWS, 1], tl.float32)
    for start in range(0, classes, BLOCK):
        _, at, inside = here(ROWS, BLOCK, rows, classes, start)
        x = tl.load(z + row * z_stride + at, mask=inside, other=-float("inf"))
        if raw is not None:
            tl.store(raw + row * raw_stride + at, x, mask=inside)
        e = math.difference_exp(math.capped(x, softcap, temperature), number(shift, 0, row, rows))
        tl.store(z + row * z_stride + at, e, mask=inside)
        best = tl.max(e, axis=1)[:, None]
        which = start + tl.argmax(e, axis=1)[:, None]
        # The lower of the two tops joins the rest.
        rest += tl.where(at == which, 0.0, e)
        lower += tl.minimum(best, top)
        chosen = tl.where(best > top, which, chosen)
        top = tl.maximum(best, top)
    tl.store(masses + row, top, mask=exists)
    tl.store(masses + rows + row, tl.sum(rest, axis=1)[:, None] + lower, mask=exists)
    tl.store(place + row, chosen, mask=exists)


def prepare(
    tile: SparseTile, shift: Tensor, scale: Tensor | None, others: Tensor | None,
    known: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, ...] | None:  # fmt: skip
    """Do what the function in ATen does, from logits: ``scale`` and ``known`` are ``None``."""
    put(tile.z, tile.listed, None)
    masses = tile.z.new_empty(2, len(tile.z), 1)
    place = torch.empty_like(masses[0], dtype=torch.int64)
    _launch(_prepare, tile, by_rows=True, shift=column(shift), masses=masses, place=place)
    if others is None:
        return None
    mass, rest = masses.double()
    above = mass > 0.5 * others
    return torch.where(above, mass, 0.0), torch.where(above, place, -1), torch.where(above, rest, rest + mass)


def accumulate_column(tile: SparseTile) -> Tensor:
    """Return ``Σ e m′ v`` of each row."""
    found = tile.z.new_empty(3, len(tile.z), 1)
    _launch(columns.accumulate, tile, by_rows=True, q=None, top=None, found=found)
    return found[0].double()


def multiply_column(tile: SparseTile, alpha: Tensor, beta: Tensor, inverse: Tensor) -> None:
    """Multiply a column by a Hessian or Gauss-Newton matrix: the only function of this backend that does."""
    nothing = torch.zeros_like(alpha)
    numbers = torch.stack([nothing, nothing, -alpha, beta, inverse]).float()
    _launch(columns.multiply, tile, by_rows=False, q=None, top=None, numbers=numbers)
