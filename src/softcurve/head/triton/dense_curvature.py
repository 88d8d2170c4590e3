"""Second order of the tiles of :mod:`softcurve.head.triton.dense`, for many columns that share a softmax."""

from __future__ import annotations

from typing import no_type_check

import triton.language as tl
from torch import Tensor

from softcurve.head.aten.dense_tile import DenseTile
from softcurve.head.triton.dense_terms import LSE, SCORE, launch_tile, load_pair, number, pair_terms, pulled_back
from softcurve.head.triton.math import ENTRIES, bend_ratio, cap_slope, column, here, jit, own_row
from softcurve.losses.rows import HESSIAN


@jit
@no_type_check
def _prepare(
    z, z_stride, target, target_stride, raw, raw_stride, q, q_stride, residual, residual_stride, class_weight,
    class_share, numbers, top, softcap, temperature, target_scale, beta, beta_rest, own_share, uniform_each, z_loss,
    rows, classes, FAMILY: tl.constexpr, LOGARITHM: tl.constexpr, OF_HESSIAN: tl.constexpr, ROWS: tl.constexpr,
    BLOCK: tl.constexpr
):  # fmt: skip
    row, at, inside = here(ROWS, BLOCK, rows, classes, tl.program_id(1) * BLOCK)
    exists = row < rows
    x, seen, given, t = load_pair(
        z, z_stride, target, target_stride, row, at, inside, softcap, temperature, target_scale, LOGARITHM
    )
    p, score, curve, _, _, _, _, _, _, _, _ = pair_terms(
        seen, given, t, class_weight, class_share, numbers, row, at, exists, rows, beta, beta_rest, own_share,
        uniform_each, inside, FAMILY
    )  # fmt: skip
    if residual is not None:
        is_top = at == tl.load(top + row, mask=exists, other=-1)
        gradient = pulled_back(p, score, numbers, 0, is_top, row, exists, rows)
        gradient += 2 * z_loss * number(numbers, LSE, row, exists, rows) * p
        gradient = tl.where(seen == -float("inf"), 0.0, gradient * cap_slope(x, softcap, temperature))
        tl.store(residual + row * residual_stride + at, gradient, mask=inside)
    if q is not None:
        entry = curve - score
        if OF_HESSIAN:
            entry = curve - p * number(numbers, SCORE, row, exists, rows)
        tl.store(q + row * q_stride + at, tl.where(p == 0, 0.0, entry), mask=inside)
    if raw is not None:
        tl.store(raw + row * raw_stride + at, x, mask=inside)
    tl.store(z + row * z_stride + at, p, mask=inside)


def prepare(tile: DenseTile, matrix: str) -> None:
    """Do as in ATen."""
    launch_tile(_prepare, tile, by_rows=False, OF_HESSIAN=matrix == HESSIAN)


@jit
@no_type_check
def _accumulate_column(
    z, z_stride, q, q_stride, raw, raw_stride, v, v_stride, top, found, softcap, temperature, rows, classes,
    ROWS: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    row, exists = own_row(ROWS, rows)
    place = tl.load(top + row, mask=exists, other=-1)
    means = tl.zeros([ROWS, BLOCK], tl.float32)
    moments = tl.zeros([ROWS, BLOCK], tl.float32)
    at_top = tl.zeros([ROWS, BLOCK], tl.float32)
    for start in range(0, classes, BLOCK):
        at = start + tl.arange(0, BLOCK)[None, :]
        inside = exists & (at < classes)
        p = tl.load(z + row * z_stride + at, mask=inside, other=0.0)
        change = tl.load(v + row * v_stride + at, mask=inside, other=0.0)
        if raw is not None:
            before = tl.load(raw + row * raw_stride + at, mask=inside, other=0.0)
            change = change * cap_slope(before, softcap, temperature)
        means += tl.where(at == place, 0.0, p * change)
        at_top += tl.where(at == place, change, 0.0)
        if q is not None:
            moments += tl.load(q + row * q_stride + at, mask=inside, other=0.0) * change
    tl.store(found + row, tl.sum(means, axis=1)[:, None], mask=exists)
    tl.store(found + rows + row, tl.sum(moments, axis=1)[:, None], mask=exists)
    tl.store(found + 2 * rows + row, tl.sum(at_top, axis=1)[:, None], mask=exists)


def accumulate_column(tile: DenseTile) -> Tensor:
    """Do as in ATen."""
    found = tile.z.new_empty(3, len(tile.z), 1)
    launch_tile(_accumulate_column, tile, by_rows=True, entries=ENTRIES, found=found)
    return found


@jit
@no_type_check
def _multiply_column(
    z, z_stride, q, q_stride, raw, raw_stride, v, v_stride, residual, residual_stride, mean, top_u, rest, factor, top,
    softcap, temperature, rows, classes, ROWS: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    row, at, inside = here(ROWS, BLOCK, rows, classes, tl.program_id(1) * BLOCK)
    exists = row < rows
    p = tl.load(z + row * z_stride + at, mask=inside, other=0.0)
    change = tl.load(v + row * v_stride + at, mask=inside, other=0.0)
    slope = tl.full([ROWS, BLOCK], 1.0, tl.float32)
    bent = tl.zeros([ROWS, BLOCK], tl.float32)
    if raw is not None:
        before = tl.load(raw + row * raw_stride + at, mask=inside, other=0.0)
        slope = cap_slope(before, softcap, temperature)
        if residual is not None:
            g = tl.load(residual + row * residual_stride + at, mask=inside, other=0.0)
            bent = bend_ratio(before, softcap) * g * change
    is_top = at == tl.load(top + row, mask=exists, other=-1)
    u = change * slope - tl.load(mean + row, mask=exists, other=0.0)
    u = tl.where(is_top, tl.load(top_u + row, mask=exists, other=0.0), u)
    if q is not None:
        product = tl.load(q + row * q_stride + at, mask=inside, other=0.0) * u
    else:
        product = p * tl.load(factor + row, mask=exists, other=0.0) * u
    product = (product - p * tl.load(rest + row, mask=exists, other=0.0)) * slope + bent
    tl.store(v + row * v_stride + at, product, mask=inside)


def multiply_column(tile: DenseTile, numbers: Tensor) -> None:
    """Form the product of a Hessian or Gauss-Newton matrix with a column: the only function of this backend that does.

    As in ATen: ``v ← m′ (q ⊙ u − p rest) + (m″/m′) (m′ g′) v``.
    """
    columns = dict(zip(("mean", "top_u", "rest", "factor"), map(column, numbers), strict=True))
    launch_tile(_multiply_column, tile, by_rows=False, entries=ENTRIES, **columns)
