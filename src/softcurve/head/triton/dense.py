"""The tiles of :mod:`softcurve.head.dense` in Triton: each kernel reads logits and target once.

The formulas are those of :mod:`softcurve.losses.divergences`, elementwise, in float32; ``FAMILY`` names them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple, no_type_check

import torch
import triton.language as tl
from torch import Tensor

from softcurve.head.triton.math import (
    cap_slope,
    capped,
    clamp_half,
    difference_exp,
    exp_excess,
    here,
    jit,
    launch,
    log_mixture,
    own_row,
    pieces,
    stride,
    tanh,
)

# Members of the family: a cross-entropy against probabilities, one against a softmax, then the divergences.
PROBABILITIES, SOFTMAX, FORWARD, REVERSE, JENSEN_SHANNON = range(5)
_PROBABILITIES: tl.constexpr = tl.constexpr(PROBABILITIES)
_SOFTMAX: tl.constexpr = tl.constexpr(SOFTMAX)
_FORWARD: tl.constexpr = tl.constexpr(FORWARD)
_REVERSE: tl.constexpr = tl.constexpr(REVERSE)

# Entries of a tile for a program that holds many numbers for each of them.
ENTRIES = 1024


class Description(NamedTuple):
    """What a tile is compared with, and how, as plain numbers."""

    family: int
    beta: float
    softcap: float | None
    temperature: float
    logarithm: bool  # the target's logits are the logarithm of what is given, times the scale
    target_scale: float
    smoothing: float
    class_count: int
    z_loss: float = 0.0

    def arguments(self) -> dict[str, Any]:
        """As the kernels take them."""
        return {
            "FAMILY": self.family,
            "beta": self.beta,
            "beta_rest": 1 - self.beta,
            "softcap": 1.0 if self.softcap is None else self.softcap,
            "temperature": self.temperature,
            "target_scale": self.target_scale,
            "own_share": 1 - self.smoothing,
            "uniform_each": self.smoothing / self.class_count,
            "CAPPED": self.softcap is not None,
            "LOGARITHM": self.logarithm,
        }


@jit
@no_type_check
def _softmax(
    z, z_stride, found, place, softcap, temperature, scale, rows, classes,
    CAPPED: tl.constexpr, LOGARITHM: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    row, exists = own_row(ROWS, rows)
    top = tl.full([ROWS, 1], -float("inf"), tl.float32)
    chosen = tl.zeros([ROWS, 1], tl.int64)
    rest = tl.zeros([ROWS, BLOCK], tl.float32)
    joined = tl.zeros([ROWS, 1], tl.float32)
    for start in range(0, classes, BLOCK):
        at = start + tl.arange(0, BLOCK)[None, :]
        inside = exists & (at < classes)
        x = tl.load(z + row * z_stride + at, mask=inside, other=0.0).to(tl.float32)
        if LOGARITHM:
            x = tl.log(x)
        x = x * scale
        if CAPPED:
            x = capped(x, softcap, temperature)
        x = tl.where(inside, x, -float("inf"))
        best = tl.max(x, axis=1)[:, None]
        which = start + tl.argmax(x, axis=1)[:, None]
        new = tl.maximum(top, best)
        safe = tl.where(new == -float("inf"), 0.0, new)
        before = difference_exp(top, safe)
        # The lower of the two tops joins the rest.
        lower = tl.where(best > top, before, difference_exp(best, safe))
        rest = rest * before + tl.where(at == which, 0.0, difference_exp(x, safe))
        joined = joined * before + lower
        chosen = tl.where(best > top, which, chosen)
        top = new
    tl.store(found + row, top, mask=exists)
    tl.store(found + rows + row, tl.sum(rest, axis=1)[:, None] + joined, mask=exists)
    tl.store(place + row, chosen, mask=exists)


def softmax(
    z: Tensor, softcap: float | None, temperature: float, scale: float, *, logarithm: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """``max m(z)`` of each row, ``Σ e^{m(z) − max}`` but for one class that has it, and which that is."""
    found, place = z.new_empty((2, len(z)), dtype=torch.float32), z.new_empty(len(z), dtype=torch.int64)
    arguments = {
        "z": z,
        "z_stride": stride(z),
        "found": found,
        "place": place,
        "softcap": 1.0 if softcap is None else softcap,
        "temperature": temperature,
        "scale": scale,
        "CAPPED": softcap is not None,
        "LOGARITHM": logarithm,
    }
    launch(_softmax, z, arguments, by_rows=True)
    return found[0], found[1], place


# --- elementwise -----------------------------------------------------------------------------------------------------


@jit
@no_type_check
def _times_finite(p, factor):
    """A class without mass has no part in a sum."""
    return p * tl.where(p == 0, 0.0, factor)


@jit
@no_type_check
def _excess(a, difference, t):
    """``a h(log(b/a))`` from ``difference = b − a`` and ``t = log(b/a)``."""
    direct = tl.where(t == -float("inf"), float("inf"), difference - _times_finite(a, t))
    return tl.where(tl.abs(t) < 0.5, a * exp_excess(clamp_half(t)), direct)


@jit
@no_type_check
def load_pair(
    z, z_stride, target, target_stride, row, at, inside, softcap, temperature, target_scale,
    CAPPED: tl.constexpr, LOGARITHM: tl.constexpr
):  # fmt: skip
    """The logits as given and mapped, what is given as target and its logits. Classes that are none are masked."""
    raw = tl.load(z + row * z_stride + at, mask=inside, other=-float("inf"))
    seen = raw
    if CAPPED:
        seen = capped(raw, softcap, temperature)
    given = tl.load(target + row * target_stride + at, mask=inside, other=0.0).to(tl.float32)
    t = given
    if LOGARITHM:
        t = tl.log(given)
    t = tl.where(inside, t * target_scale, -float("inf"))
    return raw, seen, given, t


@jit
@no_type_check
def class_factors(class_weight, class_share, at, inside, WEIGHED: tl.constexpr):
    """The factors of the classes in the target's own mass and in label smoothing."""
    weight = tl.zeros(inside.shape, tl.float32)
    uniform_weight = tl.zeros(inside.shape, tl.float32)
    if WEIGHED:
        weight += tl.load(class_weight + at, mask=inside, other=0.0)
        uniform_weight += tl.load(class_share + at, mask=inside, other=0.0)
    return weight, uniform_weight


@jit
@no_type_check
def pair_terms(
    seen, given, t, weight, uniform_weight, of_rows, row, exists, rows, beta, beta_rest, own_share, uniform_each,
    inside, FAMILY: tl.constexpr, WEIGHED: tl.constexpr
):  # fmt: skip
    """Of both sides ``p``, score, curve and cross term; and the value, the log-ratio of which it is one, ``p − y``."""
    offset = tl.load(of_rows + row, mask=exists, other=0.0)
    log_rest = tl.load(of_rows + rows + row, mask=exists, other=0.0)
    unit = tl.load(of_rows + 2 * rows + row, mask=exists, other=0.0)
    p = difference_exp(seen, offset) * unit
    minus_log_p = log_rest - (seen - offset)
    if FAMILY <= _SOFTMAX:
        factor = tl.where(inside, own_share, 0.0)
        if WEIGHED:
            factor = factor * weight
        share = given
        if FAMILY == _SOFTMAX:
            t_offset = tl.load(of_rows + 3 * rows + row, mask=exists, other=0.0)
            t_unit = tl.load(of_rows + 5 * rows + row, mask=exists, other=0.0)
            share = difference_exp(t, t_offset) * t_unit
        own = factor * share
        uniform = tl.where(inside, uniform_each, 0.0)
        if WEIGHED:
            uniform = uniform * uniform_weight
        y = own + uniform
        score = -y
        curve = tl.zeros_like(p)
        value = tl.where(y == 0, 0.0, y * minus_log_p)
        difference = tl.zeros_like(p)
        if FAMILY == _SOFTMAX:
            cross = -own
            t_p = share
            t_score = tl.where(own == 0, 0.0, own * minus_log_p)
            t_curve = t_score
            t_cross = -own
        else:
            cross = -factor
            t_p = tl.zeros_like(p)
            nothing = (seen == -float("inf")) & (given == 0)
            t_score = tl.where(nothing | (factor == 0), 0.0, factor * minus_log_p)
            t_curve = tl.zeros_like(p)
            t_cross = -factor
    else:
        t_offset = tl.load(of_rows + 3 * rows + row, mask=exists, other=0.0)
        t_log_rest = tl.load(of_rows + 4 * rows + row, mask=exists, other=0.0)
        t_unit = tl.load(of_rows + 5 * rows + row, mask=exists, other=0.0)
        constant = tl.load(of_rows + 6 * rows + row, mask=exists, other=0.0)
        y = difference_exp(t, t_offset) * t_unit
        # The difference of the logits is exact where they nearly agree; of rows with offsets of their own it is not.
        near = (seen - t) - constant
        far = ((seen - offset) - (t - t_offset)) - (log_rest - t_log_rest)
        ratio = tl.where(tl.abs(offset - t_offset) < 1, near, far)
        ratio = tl.where((seen == -float("inf")) & (t == -float("inf")), 0.0, ratio)
        small = clamp_half(ratio)
        difference = tl.where(tl.abs(ratio) < 0.5, y * (small + exp_excess(small)), p - y)
        t_p = y
        if FAMILY == _FORWARD:
            value = _excess(y, difference, ratio)
            score = difference
            curve = p
            cross = -y
            t_score = _times_finite(y, -ratio)
            t_curve = _times_finite(y, 1 - ratio)
            t_cross = -y
        elif FAMILY == _REVERSE:
            value = _excess(p, -difference, -ratio)
            score = _times_finite(p, ratio)
            curve = _times_finite(p, ratio + 1)
            cross = -p
            t_score = -difference
            t_curve = y
            t_cross = -p
        else:
            to_mixture = log_mixture(-ratio, beta, beta_rest)  # log m/p
            t_to_mixture = log_mixture(ratio, beta_rest, beta)  # log m/y
            value = beta_rest * _excess(p, -beta * difference, to_mixture)
            value += beta * _excess(y, beta_rest * difference, t_to_mixture)
            score = -beta_rest * _times_finite(p, to_mixture)
            t_score = -beta * _times_finite(y, t_to_mixture)
            harmonic = beta * beta_rest * p * tl.exp(-t_to_mixture)
            curve = score + harmonic
            t_curve = t_score + harmonic
            cross = -harmonic
            t_cross = -harmonic
    return p, score, curve, cross, t_p, t_score, t_curve, t_cross, value, minus_log_p, difference


@jit
@no_type_check
def _target_change(
    target_v, target_v_stride, given, row, at, inside, target_scale, FAMILY: tl.constexpr, LOGARITHM: tl.constexpr
):  # fmt: skip
    """The change as given, and of the target's logits (of the probabilities themselves for a cross-entropy)."""
    moved = tl.load(target_v + row * target_v_stride + at, mask=inside, other=0.0).to(tl.float32)
    change = moved
    if LOGARITHM:
        change = tl.where(given > 0, moved / given, 0.0)
    if FAMILY > _SOFTMAX:
        change = change * target_scale
    return moved, change


@jit
@no_type_check
def _sums(
    z, z_stride, target, target_stride, v, v_stride, target_v, target_v_stride, class_weight, class_share, of_rows,
    places, found, label, softcap, temperature, target_scale, beta, beta_rest, own_share, uniform_each, rows, classes,
    first, FAMILY: tl.constexpr, CAPPED: tl.constexpr, LOGARITHM: tl.constexpr, WEIGHED: tl.constexpr,
    DIRECTED: tl.constexpr, TARGET_DIRECTED: tl.constexpr, STATS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    row, exists = own_row(ROWS, rows)
    scores = tl.zeros([ROWS, BLOCK], tl.float32)
    others = tl.zeros([ROWS, BLOCK], tl.float32)
    t_scores = tl.zeros([ROWS, BLOCK], tl.float32)
    t_others = tl.zeros([ROWS, BLOCK], tl.float32)
    values = tl.zeros([ROWS, BLOCK], tl.float32)
    differences = tl.zeros([ROWS, BLOCK], tl.float32)
    curves = tl.zeros([ROWS, BLOCK], tl.float32)
    means = tl.zeros([ROWS, BLOCK], tl.float32)
    t_means = tl.zeros([ROWS, BLOCK], tl.float32)
    information = tl.zeros([ROWS, BLOCK], tl.float32)
    best = tl.full([ROWS, 1], -float("inf"), tl.float32)
    chosen = tl.zeros([ROWS, 1], tl.int64)
    top = tl.load(places + row, mask=exists, other=-1) - first
    t_top = tl.load(places + rows + row, mask=exists, other=-1) - first
    for start in range(0, classes, BLOCK):
        at = start + tl.arange(0, BLOCK)[None, :]
        inside = exists & (at < classes)
        raw, seen, given, t = load_pair(
            z, z_stride, target, target_stride, row, at, inside, softcap, temperature, target_scale, CAPPED, LOGARITHM
        )
        weight, uniform_weight = class_factors(class_weight, class_share, at, inside, WEIGHED)
        p, score, curve, _, t_p, t_score, _, _, value, minus_log_p, difference = pair_terms(
            seen, given, t, weight, uniform_weight, of_rows, row, exists, rows, beta, beta_rest, own_share,
            uniform_each, inside, FAMILY, WEIGHED
        )  # fmt: skip
        scores += tl.where(inside, score, 0.0)
        others += tl.where(inside & (at != top), score, 0.0)
        t_scores += tl.where(inside, t_score, 0.0)
        t_others += tl.where(inside & (at != t_top), t_score, 0.0)
        values += tl.where(inside, value, 0.0)
        differences += tl.where(inside, difference, 0.0)
        curves += tl.where(inside, curve, 0.0)
        if DIRECTED:
            change = tl.load(v + row * v_stride + at, mask=inside, other=0.0)
            if CAPPED:
                change = change * cap_slope(raw, softcap, temperature)
            means += _times_finite(p, change)
        if TARGET_DIRECTED:
            _, t_change = _target_change(
                target_v, target_v_stride, given, row, at, inside, target_scale, FAMILY, LOGARITHM
            )
            t_means += _times_finite(t_p, t_change)
        if STATS:
            information += _times_finite(p, minus_log_p)
            most = tl.where(inside, given, -float("inf"))
            highest = tl.max(most, axis=1)[:, None]
            chosen = tl.where(highest > best, start + tl.argmax(most, axis=1)[:, None], chosen)
            best = tl.maximum(highest, best)
    # A row of the table for each number: see DenseSums.
    tl.store(found + row, tl.sum(scores, axis=1)[:, None], mask=exists)
    tl.store(found + rows + row, tl.sum(others, axis=1)[:, None], mask=exists)
    tl.store(found + 2 * rows + row, tl.sum(t_scores, axis=1)[:, None], mask=exists)
    tl.store(found + 3 * rows + row, tl.sum(t_others, axis=1)[:, None], mask=exists)
    tl.store(found + 4 * rows + row, tl.sum(values, axis=1)[:, None], mask=exists)
    tl.store(found + 5 * rows + row, tl.sum(differences, axis=1)[:, None], mask=exists)
    tl.store(found + 6 * rows + row, tl.sum(curves, axis=1)[:, None], mask=exists)
    tl.store(found + 7 * rows + row, tl.sum(means, axis=1)[:, None], mask=exists)
    tl.store(found + 8 * rows + row, tl.sum(t_means, axis=1)[:, None], mask=exists)
    if STATS:
        tl.store(found + 9 * rows + row, tl.sum(information, axis=1)[:, None], mask=exists)
        tl.store(found + 10 * rows + row, best, mask=exists)
        tl.store(label + row, chosen, mask=exists)


class DenseSums(NamedTuple):
    """What :func:`sums` finds of each row, ``(rows,)``; the first four as :class:`softcurve.head.dense._Side`."""

    score: Tensor
    score_rest: Tensor
    target_score: Tensor
    target_score_rest: Tensor
    value: Tensor
    surplus: Tensor  # Σ (p − y)
    curve: Tensor
    mean_v: Tensor  # Σ p v
    target_mean_v: Tensor
    information: Tensor  # −Σ p log p
    best: Tensor  # the largest of what is given


def sums(
    description: Description, tile: Mapping[str, Any], of_rows: Tensor, places: Tensor, first: int, *, wants_stats: bool
) -> tuple[DenseSums, Tensor]:
    """Of a block whose first class is ``first``; and where the target is largest."""
    z = tile["z"]
    found, label = z.new_zeros(len(DenseSums._fields), len(z)), z.new_zeros(len(z), dtype=torch.int64)
    arguments = {
        **description.arguments(),
        **tile,
        "of_rows": of_rows,
        "places": places,
        "found": found,
        "label": label,
        "first": first,
        "STATS": wants_stats,
    }
    launch(_sums, z, arguments, by_rows=True, entries=ENTRIES)
    return DenseSums(*found), label


@jit
@no_type_check
def row_entry(of_rows, number, row, exists, rows):
    """A number of each row from the table."""
    return tl.load(of_rows + number * rows + row, mask=exists, other=0.0)


@jit
@no_type_check
def _moved(
    v, v_stride, target_v, target_v_stride, raw, given, of_rows, row, at, inside, exists, rows, softcap, temperature,
    target_scale, FAMILY: tl.constexpr, CAPPED: tl.constexpr, LOGARITHM: tl.constexpr, DIRECTED: tl.constexpr,
    TARGET_DIRECTED: tl.constexpr
):  # fmt: skip
    """Changes of the mapped logits, of what is given, of the target's logits; the first and the last centred."""
    change = tl.zeros_like(raw)
    centred = tl.zeros_like(raw)
    moved = tl.zeros_like(raw)
    t_change = tl.zeros_like(raw)
    t_centred = tl.zeros_like(raw)
    if DIRECTED:
        change = tl.load(v + row * v_stride + at, mask=inside, other=0.0)
        if CAPPED:
            change = change * cap_slope(raw, softcap, temperature)
        centred = change - row_entry(of_rows, 12, row, exists, rows)
    if TARGET_DIRECTED:
        moved, t_change = _target_change(
            target_v, target_v_stride, given, row, at, inside, target_scale, FAMILY, LOGARITHM
        )
        t_centred = t_change
        if FAMILY != _PROBABILITIES:
            t_centred = t_change - row_entry(of_rows, 13, row, exists, rows)
    return change, centred, moved, t_change, t_centred


@jit
@no_type_check
def _changes(
    z, z_stride, target, target_stride, v, v_stride, target_v, target_v_stride, class_weight, class_share, of_rows,
    found, softcap, temperature, target_scale, beta, beta_rest, own_share, uniform_each, rows, classes,
    FAMILY: tl.constexpr, CAPPED: tl.constexpr, LOGARITHM: tl.constexpr, WEIGHED: tl.constexpr,
    DIRECTED: tl.constexpr, TARGET_DIRECTED: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    row, exists = own_row(ROWS, rows)
    changes = tl.zeros([ROWS, BLOCK], tl.float32)
    t_changes = tl.zeros([ROWS, BLOCK], tl.float32)
    for start in range(0, classes, BLOCK):
        at = start + tl.arange(0, BLOCK)[None, :]
        inside = exists & (at < classes)
        raw, seen, given, t = load_pair(
            z, z_stride, target, target_stride, row, at, inside, softcap, temperature, target_scale, CAPPED, LOGARITHM
        )
        weight, uniform_weight = class_factors(class_weight, class_share, at, inside, WEIGHED)
        _, _, curve, cross, _, _, t_curve, t_cross, _, _, _ = pair_terms(
            seen, given, t, weight, uniform_weight, of_rows, row, exists, rows, beta, beta_rest, own_share,
            uniform_each, inside, FAMILY, WEIGHED
        )  # fmt: skip
        _, u, _, _, t_u = _moved(
            v, v_stride, target_v, target_v_stride, raw, given, of_rows, row, at, inside, exists, rows, softcap,
            temperature, target_scale, FAMILY, CAPPED, LOGARITHM, DIRECTED, TARGET_DIRECTED
        )  # fmt: skip
        changes += tl.where(inside, curve * u + cross * t_u, 0.0)
        t_changes += tl.where(inside, t_curve * t_u + t_cross * u, 0.0)
    tl.store(found + row, tl.sum(changes, axis=1)[:, None], mask=exists)
    tl.store(found + rows + row, tl.sum(t_changes, axis=1)[:, None], mask=exists)


def changes(description: Description, tile: Mapping[str, Any], of_rows: Tensor) -> Tensor:
    """``Σ c ⊙ u + x ⊙ u_y`` of both sides, ``(2, rows)``."""
    z: Tensor = tile["z"]
    found = z.new_empty(2, len(z))
    arguments = {**description.arguments(), **tile, "of_rows": of_rows, "found": found}
    launch(_changes, z, arguments, by_rows=True, entries=ENTRIES)
    return found


@jit
@no_type_check
def pulled_back(p, score, total, at_top, is_top):
    """``s − p S``; a class above one half as minus the sum of all others, and the limit where ``S`` is infinite."""
    gradient = tl.where(is_top, at_top, score - p * total)
    limit = tl.where(score == float("inf"), score, tl.where(p > 0, -float("inf"), 0.0))
    return tl.where(total == float("inf"), limit, gradient)


@jit
@no_type_check
def _residuals(
    z, z_stride, target, target_stride, v, v_stride, target_v, target_v_stride, out, out_stride, v_out, v_out_stride,
    target_out, target_out_stride, target_v_out, target_v_out_stride, class_weight, class_share, of_rows, places,
    tangents, softcap, temperature, target_scale, beta, beta_rest, own_share, uniform_each, z_loss, rows, classes,
    first, FAMILY: tl.constexpr, CAPPED: tl.constexpr, LOGARITHM: tl.constexpr, WEIGHED: tl.constexpr,
    DIRECTED: tl.constexpr, TARGET_DIRECTED: tl.constexpr, CHANGED: tl.constexpr, TARGET_OUT: tl.constexpr,
    TANGENTS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    row, at, inside = here(ROWS, BLOCK, rows, classes, tl.program_id(1) * BLOCK)
    exists = row < rows
    raw, seen, given, t = load_pair(
        z, z_stride, target, target_stride, row, at, inside, softcap, temperature, target_scale, CAPPED, LOGARITHM
    )
    weight, uniform_weight = class_factors(class_weight, class_share, at, inside, WEIGHED)
    p, score, curve, cross, t_p, t_score, t_curve, t_cross, _, _, _ = pair_terms(
        seen, given, t, weight, uniform_weight, of_rows, row, exists, rows, beta, beta_rest, own_share, uniform_each,
        inside, FAMILY, WEIGHED
    )  # fmt: skip
    is_top = at == tl.load(places + row, mask=exists, other=-1) - first
    t_is_top = at == tl.load(places + rows + row, mask=exists, other=-1) - first
    total = row_entry(of_rows, 7, row, exists, rows)
    t_total = row_entry(of_rows, 9, row, exists, rows)
    lse = row_entry(of_rows, 11, row, exists, rows)
    of_row = row_entry(of_rows, 16, row, exists, rows)
    masked = seen == -float("inf")
    gradient = pulled_back(p, score, total, row_entry(of_rows, 8, row, exists, rows), is_top)
    gradient = tl.where(masked, 0.0, gradient + 2 * z_loss * lse * p)
    t_gradient = t_score
    if FAMILY != _PROBABILITIES:
        t_gradient = pulled_back(t_p, t_score, t_total, row_entry(of_rows, 10, row, exists, rows), t_is_top)
        t_gradient = tl.where(t == -float("inf"), 0.0, t_gradient)
    slope = tl.full([ROWS, BLOCK], 1.0, tl.float32)
    if CAPPED:
        slope = cap_slope(raw, softcap, temperature)
    if CHANGED:
        change, u, moved, t_change, t_u = _moved(
            v, v_stride, target_v, target_v_stride, raw, given, of_rows, row, at, inside, exists, rows, softcap,
            temperature, target_scale, FAMILY, CAPPED, LOGARITHM, DIRECTED, TARGET_DIRECTED
        )  # fmt: skip
        product = curve * u + cross * t_u - p * row_entry(of_rows, 14, row, exists, rows) - p * u * total
        if DIRECTED:
            product += 2 * z_loss * p * (lse * u + row_entry(of_rows, 12, row, exists, rows))
        product = of_row * product
        if CAPPED:
            product = product * slope - 2 / softcap * tanh(raw / softcap) * change * of_row * gradient
        product = tl.where(masked | (of_row == 0), 0.0, product)
        tl.store(v_out + row * v_out_stride + at, product, mask=inside)
        t_product = t_curve * t_u + t_cross * u
        if FAMILY != _PROBABILITIES:
            t_product = t_product - t_p * row_entry(of_rows, 15, row, exists, rows) - t_p * t_u * t_total
        if TARGET_OUT:
            through = t_product
            if LOGARITHM:
                through = tl.where(given > 0, t_product / given, 0.0)
                through -= tl.where(given > 0, t_gradient * moved / (given * given), 0.0)
            if FAMILY > _SOFTMAX:
                through = through * target_scale
            through = tl.where(of_row == 0, 0.0, of_row * through)
            tl.store(target_v_out + row * target_v_out_stride + at, through, mask=inside)
        if TANGENTS:
            along = tl.where(change == 0, 0.0, gradient * change) + tl.where(t_change == 0, 0.0, t_gradient * t_change)
            part = tl.sum(tl.where(inside, along, 0.0), axis=1)[:, None]
            tl.store(tangents + tl.program_id(1) * rows + row, part, mask=exists)
    if TARGET_OUT:
        through = t_gradient
        if LOGARITHM:
            through = tl.where(given > 0, t_gradient / given, 0.0)
        if FAMILY > _SOFTMAX:
            through = through * target_scale
        through = tl.where(of_row == 0, 0.0, of_row * through)
        tl.store(target_out + row * target_out_stride + at, through, mask=inside)
    # A row of weight 0 has residual 0, whatever its target holds.
    gradient = tl.where(of_row == 0, 0.0, of_row * gradient)
    if CAPPED:
        gradient = tl.where(masked, 0.0, gradient * slope)
    tl.store(out + row * out_stride + at, gradient, mask=inside)


def residuals(
    description: Description,
    tile: Mapping[str, Any],
    out: Mapping[str, Any],
    of_rows: Tensor,
    places: Tensor,
    first: int,
    *,
    wants_tangents: bool,
) -> Tensor | None:
    """The residuals of both sides, and their changes along a direction; may be in place.

    Returns the parts of each row's ``g·ż``, to be summed over the first dimension.
    """
    z = tile["z"]
    tangents = z.new_zeros(pieces(z, ENTRIES), len(z)) if wants_tangents else None
    arguments = {
        **description.arguments(),
        **tile,
        **out,
        "of_rows": of_rows,
        "places": places,
        "tangents": tangents,
        "first": first,
        "z_loss": description.z_loss,
        "CHANGED": out["v_out"] is not None,
        "TARGET_OUT": out["target_out"] is not None,
        "TANGENTS": wants_tangents,
    }
    launch(_residuals, z, arguments, by_rows=False, entries=ENTRIES)
    return tangents
