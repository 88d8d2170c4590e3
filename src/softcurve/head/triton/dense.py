"""The tile functions of :class:`softcurve.head.dense.DenseKernel` in Triton, as in :mod:`softcurve.head.aten.dense`.

Logits stay in the tile until residuals are formed, so a tile serves all sweeps, and the soft cap is applied as a tile
is read. Logits and target are read once for the softmaxes, once for the row's sums, once more for the sum of changes
along a direction, and then for the residuals of both sides.
"""

from __future__ import annotations

import torch
import triton.language as tl
from torch import Tensor

from softcurve.head.aten.dense import diagonal
from softcurve.head.aten.dense_terms import MODEL, DenseSums, DenseTile
from softcurve.head.triton import columns, math
from softcurve.head.triton import dense_terms as terms
from softcurve.head.triton.dense_terms import CHANGE, ENTRIES, LSE, MEAN_V, OF_TARGET, PROBABILITIES, SCORE, WEIGHT
from softcurve.head.triton.math import here, jit, launch, number, own_rows, store_sum
from softcurve.losses.rows import HESSIAN

__all__ = ["accumulate_column", "changes", "diagonal", "multiply_column", "prepare", "residuals", "softmax", "sums"]

# --- statistics of a row ---------------------------------------------------------------------------------------------


@jit
def _softmax(
    z, z_stride, found, place, softcap, temperature, scale, rows, classes, LOGARITHM: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    row = own_rows(ROWS)
    exists = row < rows
    top = tl.full([ROWS, 1], -float("inf"), tl.float32)
    chosen = tl.zeros([ROWS, 1], tl.int64)
    rest = tl.zeros([ROWS, BLOCK], tl.float32)
    joined = tl.zeros([ROWS, 1], tl.float32)
    for start in range(0, classes, BLOCK):
        _, at, inside = here(ROWS, BLOCK, rows, classes, start)
        x = tl.load(z + row * z_stride + at, mask=inside, other=0.0).to(tl.float32)
        if LOGARITHM:
            x = tl.log(x)
        x = tl.where(inside, math.capped(x * scale, softcap, temperature), -float("inf"))
        best = tl.max(x, axis=1)[:, None]
        which = start + tl.argmax(x, axis=1)[:, None]
        new = tl.maximum(top, best)
        safe = tl.where(new == -float("inf"), 0.0, new)
        before = math.difference_exp(top, safe)
        # The lower of the two tops joins the rest.
        lower = tl.where(best > top, before, math.difference_exp(best, safe))
        rest = rest * before + tl.where(at == which, 0.0, math.difference_exp(x, safe))
        joined = joined * before + lower
        chosen = tl.where(best > top, which, chosen)
        top = new
    tl.store(found + row, top, mask=exists)
    tl.store(found + rows + row, tl.sum(rest, axis=1)[:, None] + joined, mask=exists)
    tl.store(place + row, chosen, mask=exists)


def softmax(tile: DenseTile, side: int, *, wants_place: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Do as in ATen; the column is known in every row."""
    of_model, z = side == MODEL, tile.z if side == MODEL else tile.target
    found, place = tile.z.new_empty(2, len(z), 1), z.new_empty((len(z), 1), dtype=torch.int64)
    arguments = {
        "z": z if z.shape[-1] <= 1 or z.stride(-1) == 1 else z.contiguous(),
        "found": found,
        "place": place,
        "softcap": tile.loss.softcap if of_model else None,
        "temperature": tile.loss.temperature,
        "scale": 1.0 if of_model else tile.target_scale,
        "LOGARITHM": tile.takes_logarithm and not of_model,
    }
    launch(_softmax, tile.z, arguments, by_rows=True)
    return found[0], found[1], place


@jit
def _sums(
    z, z_stride, target, target_stride, v, v_stride, target_v, target_v_stride, class_weight, class_share, numbers,
    top, found, label, softcap, temperature, target_scale, beta, beta_rest, own_share, uniform_each, rows, classes,
    FAMILY: tl.constexpr, LOGARITHM: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    row = own_rows(ROWS)
    exists = row < rows
    zero = tl.zeros([ROWS, BLOCK], tl.float32)
    scores, others, t_scores, t_others = zero, zero, zero, zero
    values, differences, curves, entropies, squares = zero, zero, zero, zero, zero
    means, at_top, t_means, t_at_top = zero, zero, zero, zero
    best = tl.full([ROWS, 1], -float("inf"), tl.float32)
    chosen = tl.zeros([ROWS, 1], tl.int64)
    for start in range(0, classes, BLOCK):
        _, at, inside = here(ROWS, BLOCK, rows, classes, start)
        logits, (p, score, curve, _), (t_p, t_score, _), (value, minus_log_p, difference) = terms.load_terms(
            z, z_stride, target, target_stride, class_weight, class_share, numbers, row, at, inside, rows, softcap,
            temperature, target_scale, beta, beta_rest, own_share, uniform_each, FAMILY, LOGARITHM
        )  # fmt: skip
        is_top, t_is_top = at == number(top, 0, row, rows), at == number(top, 1, row, rows)
        scores += tl.where(inside, score, 0.0)
        others += tl.where(inside & ~is_top, score, 0.0)
        t_scores += tl.where(inside, t_score, 0.0)
        t_others += tl.where(inside & ~t_is_top, t_score, 0.0)
        values += tl.where(inside, value, 0.0)
        differences += tl.where(inside, difference, 0.0)
        curves += tl.where(inside, curve, 0.0)
        if v is not None or target_v is not None:
            _, change, t_change, _, _ = terms.directions(
                v, v_stride, target_v, target_v_stride, logits[0], logits[2], numbers, is_top, t_is_top, row, at,
                inside, rows, softcap, temperature, target_scale, FAMILY, LOGARITHM
            )  # fmt: skip
            means += tl.where(is_top, 0.0, terms.times_finite(p, change))
            at_top += tl.where(is_top, change, 0.0)
            t_means += tl.where(t_is_top, 0.0, terms.times_finite(t_p, t_change))
            t_at_top += tl.where(t_is_top, t_change, 0.0)
        if label is not None:
            entropies += terms.times_finite(p, minus_log_p)
            squares += tl.where(inside & ~is_top, p * p, 0.0)
            most = tl.where(inside, logits[2], -float("inf"))
            highest = tl.max(most, axis=1)[:, None]
            chosen = tl.where(highest > best, start + tl.argmax(most, axis=1)[:, None], chosen)
            best = tl.maximum(highest, best)
    found_sums = (scores, others, t_scores, t_others, values, differences, curves, means, at_top, t_means, t_at_top)
    for which in tl.static_range(11):  # in the order of DenseSums
        store_sum(found, which, found_sums[which], row, rows)
    store_sum(found, 11, entropies, row, rows)
    store_sum(found, 12, squares, row, rows)
    if label is not None:
        tl.store(found + 13 * rows + row, best, mask=exists)
        tl.store(label + row, chosen, mask=exists)


def sums(tile: DenseTile, *, wants_loss: bool, wants_stats: bool, wants_curve: bool) -> tuple[DenseSums, Tensor | None]:
    """Do as in ATen; the sums of the loss and of the curve cost nothing more here."""
    found = tile.z.new_zeros(len(DenseSums._fields), len(tile.z), 1)
    label = tile.z.new_zeros((len(tile.z), 1), dtype=torch.int64) if wants_stats else None
    terms.launch_tile(_sums, tile, by_rows=True, found=found, label=label)
    return DenseSums(*found), label


@jit
def _changes(
    z, z_stride, target, target_stride, v, v_stride, target_v, target_v_stride, class_weight, class_share, numbers,
    top, found, softcap, temperature, target_scale, beta, beta_rest, own_share, uniform_each, rows, classes,
    FAMILY: tl.constexpr, LOGARITHM: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    row = own_rows(ROWS)
    changes = tl.zeros([ROWS, BLOCK], tl.float32)
    t_changes = tl.zeros([ROWS, BLOCK], tl.float32)
    for start in range(0, classes, BLOCK):
        _, at, inside = here(ROWS, BLOCK, rows, classes, start)
        logits, (_, _, curve, cross), (_, _, t_curve), _ = terms.load_terms(
            z, z_stride, target, target_stride, class_weight, class_share, numbers, row, at, inside, rows, softcap,
            temperature, target_scale, beta, beta_rest, own_share, uniform_each, FAMILY, LOGARITHM
        )  # fmt: skip
        is_top, t_is_top = at == number(top, 0, row, rows), at == number(top, 1, row, rows)
        _, _, _, u, t_u = terms.directions(
            v, v_stride, target_v, target_v_stride, logits[0], logits[2], numbers, is_top, t_is_top, row, at, inside,
            rows, softcap, temperature, target_scale, FAMILY, LOGARITHM
        )  # fmt: skip
        changes += tl.where(inside, curve * u + cross * t_u, 0.0)
        t_changes += tl.where(inside, t_curve * t_u + cross * u, 0.0)
    store_sum(found, 0, changes, row, rows)
    store_sum(found, 1, t_changes, row, rows)


def changes(tile: DenseTile) -> tuple[Tensor, Tensor]:
    """Do as in ATen."""
    found = tile.z.new_empty(2, len(tile.z), 1)
    terms.launch_tile(_changes, tile, by_rows=True, found=found)
    return found[0], found[1]


# --- residuals -------------------------------------------------------------------------------------------------------


@jit
def _residuals(
    z, z_stride, target, target_stride, v, v_stride, target_v, target_v_stride, out, out_stride, v_out, v_out_stride,
    target_out, target_out_stride, target_v_out, target_v_out_stride, class_weight, class_share, numbers, top,
    tangents, softcap, temperature, target_scale, beta, beta_rest, own_share, uniform_each, z_loss, rows, classes,
    FAMILY: tl.constexpr, LOGARITHM: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    row, at, inside = here(ROWS, BLOCK, rows, classes, tl.program_id(1) * BLOCK)
    (raw, seen, given, t), (p, score, curve, cross), (t_p, t_score, t_curve), _ = terms.load_terms(
        z, z_stride, target, target_stride, class_weight, class_share, numbers, row, at, inside, rows, softcap,
        temperature, target_scale, beta, beta_rest, own_share, uniform_each, FAMILY, LOGARITHM
    )  # fmt: skip
    is_top, t_is_top = at == number(top, 0, row, rows), at == number(top, 1, row, rows)
    lse, weight = number(numbers, LSE, row, rows), number(numbers, WEIGHT, row, rows)
    masked = seen == -float("inf")
    gradient = terms.pulled_back(p, score, numbers, 0, is_top, row, rows) + 2 * z_loss * lse * p
    gradient = tl.where(masked, 0.0, gradient)
    t_gradient = t_score
    if FAMILY != PROBABILITIES:
        t_gradient = terms.pulled_back(t_p, t_score, numbers, OF_TARGET, t_is_top, row, rows)
        t_gradient = tl.where(t == -float("inf"), 0.0, t_gradient)
    # A row of weight 0 has residual 0, whatever its target holds.
    weighted = tl.where(weight == 0, 0.0, weight * gradient)
    slope = math.cap_slope(raw, softcap, temperature)
    if v_out is not None:
        moved, change, t_change, u, t_u = terms.directions(
            v, v_stride, target_v, target_v_stride, raw, given, numbers, is_top, t_is_top, row, at, inside, rows,
            softcap, temperature, target_scale, FAMILY, LOGARITHM
        )  # fmt: skip
        product = curve * u + cross * t_u - p * number(numbers, CHANGE, row, rows)
        product -= p * u * number(numbers, SCORE, row, rows)
        product += 2 * z_loss * p * (lse * u + number(numbers, MEAN_V, row, rows))
        product = weight * product * slope
        if softcap is not None:
            product += math.bend_ratio(raw, softcap) * change * weighted
        product = tl.where(masked | (weight == 0), 0.0, product)
        tl.store(v_out + row * v_out_stride + at, product, mask=inside)
        t_product = t_curve * t_u + cross * u
        if FAMILY != PROBABILITIES:
            t_product -= t_p * number(numbers, OF_TARGET + CHANGE, row, rows)
            t_product -= t_p * t_u * number(numbers, OF_TARGET + SCORE, row, rows)
        if target_v_out is not None:
            through = terms.through_target(t_product, given, target_scale, LOGARITHM)
            if LOGARITHM:
                through -= tl.where(given > 0, t_gradient * moved / (given * given), 0.0) * target_scale
            through = tl.where(weight == 0, 0.0, weight * through)
            tl.store(target_v_out + row * target_v_out_stride + at, through, mask=inside)
        if tangents is not None:
            along = tl.where(change == 0, 0.0, gradient * change) + tl.where(t_change == 0, 0.0, t_gradient * t_change)
            store_sum(tangents, tl.program_id(1), tl.where(inside, along, 0.0), row, rows)
    if target_out is not None:
        through = terms.through_target(t_gradient, given, target_scale, LOGARITHM)
        through = tl.where(weight == 0, 0.0, weight * through)
        tl.store(target_out + row * target_out_stride + at, through, mask=inside)
    tl.store(out + row * out_stride + at, tl.where(masked, 0.0, weighted * slope), mask=inside)


def residuals(tile: DenseTile, *, wants_tangents: bool) -> Tensor | None:
    """Form ∂L/∂z, ∂L/∂target and their changes along a direction: the only function of this backend that does."""
    pieces = -(-tile.z.shape[1] // math.shape(tile.z, ENTRIES)[1])
    tangents = tile.z.new_zeros(pieces, len(tile.z), 1) if wants_tangents else None
    terms.launch_tile(_residuals, tile, by_rows=False, tangents=tangents)
    return None if tangents is None else tangents.double().sum(0)


# --- second order, for many columns that share a softmax --------------------------------------------------------------


@jit
def _prepare(
    z, z_stride, target, target_stride, raw, raw_stride, q, q_stride, residual, residual_stride, class_weight,
    class_share, numbers, top, softcap, temperature, target_scale, beta, beta_rest, own_share, uniform_each, z_loss,
    rows, classes, FAMILY: tl.constexpr, LOGARITHM: tl.constexpr, OF_HESSIAN: tl.constexpr, ROWS: tl.constexpr,
    BLOCK: tl.constexpr
):  # fmt: skip
    row, at, inside = here(ROWS, BLOCK, rows, classes, tl.program_id(1) * BLOCK)
    (x, seen, _, _), (p, score, curve, _), _, _ = terms.load_terms(
        z, z_stride, target, target_stride, class_weight, class_share, numbers, row, at, inside, rows, softcap,
        temperature, target_scale, beta, beta_rest, own_share, uniform_each, FAMILY, LOGARITHM
    )  # fmt: skip
    if residual is not None:
        gradient = terms.pulled_back(p, score, numbers, 0, at == number(top, 0, row, rows), row, rows)
        gradient += 2 * z_loss * number(numbers, LSE, row, rows) * p
        gradient = tl.where(seen == -float("inf"), 0.0, gradient * math.cap_slope(x, softcap, temperature))
        tl.store(residual + row * residual_stride + at, gradient, mask=inside)
    if q is not None:
        entry = curve - score
        if OF_HESSIAN:
            entry = curve - p * number(numbers, SCORE, row, rows)
        tl.store(q + row * q_stride + at, tl.where(p == 0, 0.0, entry), mask=inside)
    if raw is not None:
        tl.store(raw + row * raw_stride + at, x, mask=inside)
    tl.store(z + row * z_stride + at, p, mask=inside)


def prepare(tile: DenseTile, matrix: str) -> None:
    """Do as in ATen."""
    terms.launch_tile(_prepare, tile, by_rows=False, OF_HESSIAN=matrix == HESSIAN)


def accumulate_column(tile: DenseTile) -> Tensor:
    """Do as in ATen."""
    found = tile.z.new_empty(3, len(tile.z), 1)
    terms.launch_tile(columns.accumulate, tile, by_rows=True, entries=math.ENTRIES, found=found)
    return found


def multiply_column(tile: DenseTile, numbers: Tensor) -> None:
    """Multiply a column by a Hessian or Gauss-Newton matrix: the only function of this backend that does."""
    numbers = torch.cat([numbers, torch.ones_like(numbers[:1])]).float()
    terms.launch_tile(columns.multiply, tile, by_rows=False, entries=math.ENTRIES, numbers=numbers)
