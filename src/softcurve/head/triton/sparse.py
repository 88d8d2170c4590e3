"""The tiles of :mod:`softcurve.head.sparse` in Triton: each kernel is the line of its docstring, and reads a tile once.

The listed classes of a tile are masked with −inf beforehand (:func:`put`) and set afterwards, so no kernel compares
its classes with a list. ``classes`` are those of the block.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, no_type_check

import torch
import triton.language as tl
from torch import Tensor

from softcurve.head.triton.math import (
    cap_slope,
    capped,
    column,
    difference_exp,
    here,
    jit,
    launch,
    own_row,
    stride,
    tanh,
)

# How far a row's largest logit may be from the shift that was guessed for it. Beyond it the row is done again. So far
# the rounding of z − shift leaves two units of 1e-6, and e^40 sums without overflow.
GUESS: tl.constexpr = tl.constexpr(40.0)


@jit
@no_type_check
def _put(
    tile, tile_stride, places, values, width, rows, classes, FILL: tl.constexpr, ADD: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    # Here "classes" are the places of a list, and "width" the classes of the tile.
    row, slot, exists = here(ROWS, BLOCK, rows, classes, tl.program_id(1) * BLOCK)
    at = tl.load(places + row * classes + slot, mask=exists, other=-1)
    inside = exists & (at >= 0) & (at < width)
    where = tile + row * tile_stride + at
    if FILL:
        tl.store(where, tl.full([ROWS, BLOCK], -float("inf"), tl.float32), mask=inside)
    else:
        value = tl.load(values + row * classes + slot, mask=inside, other=0.0)
        if ADD:
            value += tl.load(where, mask=inside, other=0.0).to(tl.float32)
        tl.store(where, value, mask=inside)


def put(tile: Tensor, places: Tensor, values: Tensor | None, *, add: bool = False) -> None:
    """``tile[row, places] = values``, or ``+=``, where the places are inside; ``−inf`` for no values."""
    places = places.contiguous()
    arguments = {
        "tile": tile,
        "tile_stride": stride(tile),
        "places": places,
        "values": None if values is None else values.float().contiguous(),
        "width": tile.shape[1],
        "FILL": values is None,
        "ADD": add,
    }
    launch(_put, places, arguments, by_rows=False)


@jit
@no_type_check
def _exponentials(
    z, z_stride, out, out_stride, shift, total, top, softcap, temperature, rows, classes,
    CAPPED: tl.constexpr, REDO: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    row, exists = own_row(ROWS, rows)
    if REDO:
        first = tl.load(shift + row, mask=exists, other=0.0)
        best = tl.load(top + row, mask=exists, other=0.0)
        wrong = (best != -float("inf")) & ((best - first > GUESS) | (first - best > GUESS))
        exists = exists & wrong
        guess = best
        pieces = tl.where(tl.max(wrong.to(tl.int32)) > 0, classes, 0)
    else:
        at = tl.arange(0, BLOCK)[None, :]
        first = tl.load(z + row * z_stride + at, mask=exists & (at < classes), other=-float("inf"))
        if CAPPED:
            first = capped(first, softcap, temperature)
        guess = tl.max(first, axis=1)[:, None]
        guess = tl.where(guess == -float("inf"), 0.0, guess)
        best = tl.full([ROWS, 1], -float("inf"), tl.float32)
        pieces = classes
    sums = tl.zeros([ROWS, BLOCK], tl.float32)
    tops = tl.full([ROWS, BLOCK], -float("inf"), tl.float32)
    for start in range(0, pieces, BLOCK):
        at = start + tl.arange(0, BLOCK)[None, :]
        inside = exists & (at < classes)
        x = tl.load(z + row * z_stride + at, mask=inside, other=-float("inf"))
        seen = x
        if CAPPED:
            seen = capped(x, softcap, temperature)
        e = difference_exp(seen, guess)
        sums += e
        tops = tl.maximum(tops, seen)
        if CAPPED:
            e = tl.where(e == 0, 0.0, e * cap_slope(x, softcap, temperature))
        tl.store(out + row * out_stride + at, e, mask=inside)
    tl.store(total + row, tl.sum(sums, axis=1)[:, None], mask=exists)
    tl.store(shift + row, guess, mask=exists)
    if not REDO:
        tl.store(top + row, tl.max(tops, axis=1)[:, None], mask=exists)


def exponentials(z: Tensor, out: Tensor, softcap: float | None, temperature: float) -> tuple[Tensor, Tensor]:
    """``out = m′(z) e^{m(z) − shift}``; ``shift`` and ``Σ e^{m(z) − shift}`` of each row.

    The shift is guessed from the first classes. A second launch redoes the rows whose guess was far from their largest
    logit and leaves at once for the others: nobody waits to see whether there are any.
    """
    shift, total, top = (z.new_empty(len(z)) for _ in range(3))
    arguments = {
        "z": z,
        "z_stride": stride(z),
        "out": out,
        "out_stride": stride(out),
        "shift": shift,
        "total": total,
        "top": top,
        "softcap": 1.0 if softcap is None else softcap,
        "temperature": temperature,
        "CAPPED": softcap is not None,
    }
    launch(_exponentials, z, arguments | {"REDO": False}, by_rows=True)
    launch(_exponentials, z, arguments | {"REDO": True}, by_rows=True)
    return shift, total


@jit
@no_type_check
def _statistics(
    z, z_stride, v, v_stride, u, found, best, softcap, temperature, uniform_each, rows, classes,
    CAPPED: tl.constexpr, DIRECTED: tl.constexpr, STATS: tl.constexpr, SMOOTHED: tl.constexpr, WEIGHED: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    row, exists = own_row(ROWS, rows)
    shift = tl.full([ROWS, 1], -float("inf"), tl.float32)
    base = tl.zeros([ROWS, 1], tl.float32)
    sums = tl.zeros([ROWS, BLOCK], tl.float32)
    moments = tl.zeros([ROWS, BLOCK], tl.float32)
    changes = tl.zeros([ROWS, BLOCK], tl.float32)
    uniforms = tl.zeros([ROWS, BLOCK], tl.float32)
    uniform_masses = tl.zeros([ROWS, BLOCK], tl.float32)
    uniform_changes = tl.zeros([ROWS, BLOCK], tl.float32)
    masked = tl.zeros([ROWS, BLOCK], tl.int32)
    chosen = tl.zeros([ROWS, 1], tl.int64)
    for start in range(0, classes, BLOCK):
        at = start + tl.arange(0, BLOCK)[None, :]
        inside = exists & (at < classes)
        x = tl.load(z + row * z_stride + at, mask=inside, other=-float("inf"))
        change = tl.zeros([ROWS, BLOCK], tl.float32)
        if DIRECTED:
            change = tl.load(v + row * v_stride + at, mask=inside, other=0.0)
        if CAPPED:
            if DIRECTED:
                change = change * cap_slope(x, softcap, temperature)
            x = capped(x, softcap, temperature)
        top = tl.max(x, axis=1)[:, None]
        if STATS:
            chosen = tl.where(top > shift, start + tl.argmax(x, axis=1)[:, None], chosen)
        new = tl.maximum(shift, top)
        safe = tl.where(new == -float("inf"), 0.0, new)
        lowered = tl.where(shift == -float("inf"), 0.0, shift - safe)
        kept = tl.where(shift == -float("inf"), 0.0, difference_exp(shift, safe))
        e = difference_exp(x, safe)
        if STATS:
            moments = kept * (moments + lowered * sums) + tl.where(e == 0, 0.0, e * (x - safe))
        sums = kept * sums + e
        if DIRECTED:
            changes = kept * changes + tl.where(e == 0, 0.0, e * change)
        if SMOOTHED:
            weight = tl.full([ROWS, BLOCK], 1.0, tl.float32) * uniform_each
            if WEIGHED:
                weight = weight * tl.load(u + at, mask=inside, other=0.0)
            if start == 0:
                base = safe
            part = inside & (weight != 0)
            finite = part & (x != -float("inf"))
            uniforms += tl.where(finite, weight * (x - base), 0.0)
            uniform_masses += tl.where(finite, weight, 0.0)
            masked += (part & (x == -float("inf"))).to(tl.int32)
            if DIRECTED:
                uniform_changes += tl.where(part, weight * change, 0.0)
        shift = new
    # A row of the table for each number: see ListSums.
    tl.store(found + row, shift, mask=exists)
    tl.store(found + rows + row, tl.sum(sums, axis=1)[:, None], mask=exists)
    if DIRECTED:
        tl.store(found + 2 * rows + row, tl.sum(changes, axis=1)[:, None], mask=exists)
    if STATS:
        tl.store(found + 3 * rows + row, tl.sum(moments, axis=1)[:, None], mask=exists)
        tl.store(best + row, chosen, mask=exists)
    if SMOOTHED:
        tl.store(found + 4 * rows + row, base, mask=exists)
        tl.store(found + 5 * rows + row, tl.sum(uniforms, axis=1)[:, None], mask=exists)
        tl.store(found + 6 * rows + row, tl.sum(uniform_masses, axis=1)[:, None], mask=exists)
        tl.store(found + 7 * rows + row, tl.sum(masked, axis=1)[:, None].to(tl.float32), mask=exists)
        if DIRECTED:
            tl.store(found + 8 * rows + row, tl.sum(uniform_changes, axis=1)[:, None], mask=exists)


class ListSums(NamedTuple):
    """What :func:`statistics` finds of each row, ``(rows,)``; ``masked`` counts classes of weight but without mass."""

    shift: Tensor  # max z, or −inf
    total: Tensor  # Σ e^{z − shift}
    change: Tensor  # Σ e^{z − shift} ż
    moment: Tensor  # Σ e^{z − shift} (z − shift)
    base: Tensor
    uniform: Tensor  # Σ u (z − base) where z is finite, and Σ u there
    uniform_mass: Tensor
    masked: Tensor
    uniform_change: Tensor  # Σ u ż


def statistics(
    z: Tensor,
    v: Tensor | None,
    softcap: float | None,
    temperature: float,
    *,
    wants_stats: bool,
    uniform_each: float,
    class_weight: Tensor | None,
) -> tuple[ListSums, Tensor | None]:
    """Sums over the classes of a block, and which has the largest logit."""
    best = z.new_zeros(len(z), dtype=torch.int64) if wants_stats else None
    found = z.new_zeros(len(ListSums._fields), len(z))
    arguments = {
        "z": z,
        "z_stride": stride(z),
        "v": v,
        "v_stride": stride(v),
        "u": None if class_weight is None else class_weight.contiguous(),
        "found": found,
        "best": best,
        "softcap": 1.0 if softcap is None else softcap,
        "temperature": temperature,
        "uniform_each": uniform_each,
        "CAPPED": softcap is not None,
        "DIRECTED": v is not None,
        "STATS": wants_stats,
        "SMOOTHED": uniform_each != 0,
        "WEIGHED": class_weight is not None,
    }
    launch(_statistics, z, arguments, by_rows=True)
    return ListSums(*found), best


@jit
@no_type_check
def _residual(
    z, z_stride, v, v_stride, out, out_stride, v_out, v_out_stride, u, shift, alpha, beta, weight, softcap,
    temperature, uniform_each, rows, classes, CAPPED: tl.constexpr, DIRECTED: tl.constexpr, SMOOTHED: tl.constexpr,
    WEIGHED: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    row, at, inside = here(ROWS, BLOCK, rows, classes, tl.program_id(1) * BLOCK)
    exists = row < rows
    raw = tl.load(z + row * z_stride + at, mask=inside, other=-float("inf"))
    of_row = tl.load(shift + row, mask=exists, other=0.0)
    factor = tl.load(beta + row, mask=exists, other=0.0)
    x = raw
    slope = tl.full([ROWS, BLOCK], 1.0, tl.float32)
    if CAPPED:
        x = capped(raw, softcap, temperature)
        slope = cap_slope(raw, softcap, temperature)
    e = difference_exp(x, of_row)
    gradient = factor * e
    if SMOOTHED:
        each = tl.full([ROWS, BLOCK], 1.0, tl.float32) * uniform_each
        if WEIGHED:
            each = each * tl.load(u + at, mask=inside, other=0.0)
        gradient -= tl.load(weight + row, mask=exists, other=0.0) * each
    if DIRECTED:
        change = tl.load(v + row * v_stride + at, mask=inside, other=0.0) * slope
        product = tl.where(e == 0, 0.0, e * (factor * change + tl.load(alpha + row, mask=exists, other=0.0)))
        if CAPPED:
            bend = -2 / softcap * tanh(raw / softcap)
            product = tl.where(x == -float("inf"), 0.0, product * slope + bend * change * gradient)
        tl.store(v_out + row * v_out_stride + at, product, mask=inside)
    if CAPPED:
        gradient = tl.where(x == -float("inf"), 0.0, gradient * slope)
    tl.store(out + row * out_stride + at, gradient, mask=inside)


def residual(
    z: Tensor,
    v: Tensor | None,
    out: Tensor,
    v_out: Tensor | None,
    rows: Sequence[Tensor],
    softcap: float | None,
    temperature: float,
    *,
    uniform_each: float,
    class_weight: Tensor | None,
) -> None:
    """``out = m′ g`` and ``v_out = m′ ġ + m″ g ż`` with ``g = β e^{m(z) − shift} − w u``, ``ġ = e^{…} (β m′ ż + α)``.

    ``rows`` are shift, α, β and w. Out may be in place.
    """
    names = ("shift", "alpha", "beta", "weight")
    arguments = {
        "z": z,
        "z_stride": stride(z),
        "v": v,
        "v_stride": stride(v),
        "out": out,
        "out_stride": stride(out),
        "v_out": v_out,
        "v_out_stride": stride(v_out),
        "u": None if class_weight is None else class_weight.contiguous(),
        **{name: column(tensor) for name, tensor in zip(names, rows, strict=True)},
        "softcap": 1.0 if softcap is None else softcap,
        "temperature": temperature,
        "uniform_each": uniform_each,
        "CAPPED": softcap is not None,
        "DIRECTED": v is not None,
        "SMOOTHED": uniform_each != 0,
        "WEIGHED": class_weight is not None,
    }
    launch(_residual, z, arguments, by_rows=False)


@jit
@no_type_check
def _rescale(out, out_stride, scale, rows, classes, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    row, exists = own_row(ROWS, rows)
    factor = tl.load(scale + row, mask=exists, other=1.0)
    exists = exists & (factor != 1)
    pieces = tl.where(tl.max(exists.to(tl.int32)) > 0, classes, 0)
    for start in range(0, pieces, BLOCK):
        at = start + tl.arange(0, BLOCK)[None, :]
        inside = exists & (at < classes)
        e = tl.load(out + row * out_stride + at, mask=inside, other=0.0).to(tl.float32)
        tl.store(out + row * out_stride + at, e * factor, mask=inside)


def rescale(out: Tensor, scale: Tensor) -> None:
    """``out *= scale``, row by row; rows whose scale is 1 are not touched."""
    launch(_rescale, out, {"out": out, "out_stride": stride(out), "scale": column(scale)}, by_rows=True)


# --- second order, many columns --------------------------------------------------------------------------------------


@jit
@no_type_check
def _prepare(
    z, z_stride, raw, raw_stride, shift, found, place, softcap, temperature, rows, classes,
    CAPPED: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    row, exists = own_row(ROWS, rows)
    of_row = tl.load(shift + row, mask=exists, other=0.0)
    top = tl.zeros([ROWS, 1], tl.float32)
    chosen = tl.zeros([ROWS, 1], tl.int64)
    rest = tl.zeros([ROWS, BLOCK], tl.float32)
    lower = tl.zeros([ROWS, 1], tl.float32)
    for start in range(0, classes, BLOCK):
        at = start + tl.arange(0, BLOCK)[None, :]
        inside = exists & (at < classes)
        x = tl.load(z + row * z_stride + at, mask=inside, other=-float("inf"))
        if CAPPED:
            tl.store(raw + row * raw_stride + at, x, mask=inside)
            x = capped(x, softcap, temperature)
        e = difference_exp(x, of_row)
        tl.store(z + row * z_stride + at, e, mask=inside)
        best = tl.max(e, axis=1)[:, None]
        which = start + tl.argmax(e, axis=1)[:, None]
        # The lower of the two tops joins the rest.
        rest += tl.where(at == which, 0.0, e)
        lower += tl.minimum(best, top)
        chosen = tl.where(best > top, which, chosen)
        top = tl.maximum(best, top)
    tl.store(found + row, top, mask=exists)
    tl.store(found + rows + row, tl.sum(rest, axis=1)[:, None] + lower, mask=exists)
    tl.store(place + row, chosen, mask=exists)


def prepare(
    z: Tensor, raw: Tensor | None, shift: Tensor, softcap: float | None, temperature: float
) -> tuple[Tensor, Tensor, Tensor]:
    """``z ← e^{m(z) − shift}``, ``raw = z``; of each row the largest, the sum of all others, and where it stands."""
    found, place = z.new_empty(2, len(z)), z.new_empty(len(z), dtype=torch.int64)
    arguments = {
        "z": z,
        "z_stride": stride(z),
        "raw": raw,
        "raw_stride": stride(raw),
        "shift": column(shift),
        "found": found,
        "place": place,
        "softcap": 1.0 if softcap is None else softcap,
        "temperature": temperature,
        "CAPPED": raw is not None,
    }
    launch(_prepare, z, arguments, by_rows=True)
    return found[0], found[1], place


@jit
@no_type_check
def _gather(
    e, e_stride, raw, raw_stride, v, v_stride, found, softcap, temperature, rows, classes,
    CAPPED: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    row, exists = own_row(ROWS, rows)
    sums = tl.zeros([ROWS, BLOCK], tl.float32)
    for start in range(0, classes, BLOCK):
        at = start + tl.arange(0, BLOCK)[None, :]
        inside = exists & (at < classes)
        mass = tl.load(e + row * e_stride + at, mask=inside, other=0.0)
        change = tl.load(v + row * v_stride + at, mask=inside, other=0.0)
        if CAPPED:
            change = change * cap_slope(
                tl.load(raw + row * raw_stride + at, mask=inside, other=0.0), softcap, temperature
            )
        sums += mass * change
    tl.store(found + row, tl.sum(sums, axis=1)[:, None], mask=exists)


def gather(e: Tensor, raw: Tensor | None, v: Tensor, softcap: float | None, temperature: float) -> Tensor:
    """``Σ e m′ v`` of each row."""
    found = e.new_empty(len(e))
    arguments = {
        "e": e,
        "e_stride": stride(e),
        "raw": raw,
        "raw_stride": stride(raw),
        "v": v,
        "v_stride": stride(v),
        "found": found,
        "softcap": 1.0 if softcap is None else softcap,
        "temperature": temperature,
        "CAPPED": raw is not None,
    }
    launch(_gather, e, arguments, by_rows=True)
    return found


@jit
@no_type_check
def _multiply(
    e, e_stride, raw, raw_stride, residual, residual_stride, v, v_stride, alpha, beta, inverse, softcap, temperature,
    rows, classes, CAPPED: tl.constexpr, BENT: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    row, at, inside = here(ROWS, BLOCK, rows, classes, tl.program_id(1) * BLOCK)
    exists = row < rows
    mass = tl.load(e + row * e_stride + at, mask=inside, other=0.0)
    change = tl.load(v + row * v_stride + at, mask=inside, other=0.0)
    a = tl.load(alpha + row, mask=exists, other=0.0)
    b = tl.load(beta + row, mask=exists, other=0.0)
    if CAPPED:
        before = tl.load(raw + row * raw_stride + at, mask=inside, other=0.0)
        slope = cap_slope(before, softcap, temperature)
        product = (b * slope * change + a) * mass * slope
        if BENT:
            bend = -2 / softcap * tanh(before / softcap)
            g = tl.load(residual + row * residual_stride + at, mask=inside, other=0.0)
            product += bend * g * change * tl.load(inverse + row, mask=exists, other=0.0)
    else:
        product = (b * change + a) * mass
    tl.store(v + row * v_stride + at, product, mask=inside)


def multiply(
    e: Tensor,
    raw: Tensor | None,
    residual: Tensor | None,
    v: Tensor,
    rows: Sequence[Tensor],
    softcap: float | None,
    temperature: float,
) -> None:
    """``v ← m′ e (β m′ v + α) + (m″/m′) g v / unit``; ``rows`` are α, β and 1/unit."""
    arguments = {
        "e": e,
        "e_stride": stride(e),
        "raw": raw,
        "raw_stride": stride(raw),
        "residual": residual,
        "residual_stride": stride(residual),
        "v": v,
        "v_stride": stride(v),
        **{name: column(tensor) for name, tensor in zip(("alpha", "beta", "inverse"), rows, strict=True)},
        "softcap": 1.0 if softcap is None else softcap,
        "temperature": temperature,
        "CAPPED": raw is not None,
        "BENT": raw is not None and residual is not None,
    }
    launch(_multiply, e, arguments, by_rows=False)
