"""The elementwise formulas of :mod:`softcurve.losses.divergences` in Triton, in float32, and their launch.

``FAMILY`` names the member. In a kernel ``None`` stands for a tensor that there is not, and ``numbers`` is the table of
:class:`softcurve.head.aten.dense_terms.DenseTile`.
"""

from __future__ import annotations

from typing import Any

import triton.language as tl

from softcurve.head.aten import dense_terms as aten
from softcurve.head.aten.dense_terms import DenseTile
from softcurve.head.backends import MEMBERS
from softcurve.head.triton import math
from softcurve.head.triton.math import jit, launch, number
from softcurve.losses.spec import LossSpec

# A cross-entropy against probabilities, one against a softmax, then the divergences.
PROBABILITIES, SOFTMAX, FORWARD, REVERSE, JENSEN_SHANNON = (tl.constexpr(number) for number in range(5))

OFFSET, LOG_REST, UNIT = map(tl.constexpr, (aten.OFFSET, aten.LOG_REST, aten.UNIT))
SCORE, TOP_RESIDUAL = map(tl.constexpr, (aten.SCORE, aten.TOP_RESIDUAL))
MEAN_V, TOP_U, CHANGE = map(tl.constexpr, (aten.MEAN_V, aten.TOP_U, aten.CHANGE))
OF_TARGET = tl.constexpr(aten.SIDE_NUMBERS)  # from a number of the model to the same number of the target
LOG_RATIO, LSE, WEIGHT = map(tl.constexpr, (aten.LOG_RATIO, aten.LSE, aten.WEIGHT))
SHARE_SURPLUS = tl.constexpr(aten.SHARE_SURPLUS)

# Entries of a tile for a program that holds many numbers for each of them.
ENTRIES = 1024


def family(loss: LossSpec) -> Any:
    """Return the ``FAMILY`` of a loss; raise ``TypeError`` for a divergence without terms in Triton."""
    if loss.is_cross_entropy:
        return PROBABILITIES if loss.target == "probabilities" else SOFTMAX
    if type(loss.divergence) not in MEMBERS:
        raise TypeError(
            f"divergence must be one of {', '.join(member.__name__ for member in MEMBERS)} for the Triton kernels, "
            f"got {type(loss.divergence).__name__}"
        )
    return globals()[MEMBERS[type(loss.divergence)]]


def launch_tile(kernel: Any, tile: DenseTile, *, by_rows: bool, entries: int = ENTRIES, **more: Any) -> None:
    """Launch a kernel, whose parameters receive what of the tile, its loss and ``more`` has their names."""
    loss, target = tile.loss, tile.target
    beta = getattr(loss.divergence, "beta", 0.5)
    values = tile._asdict() | {
        "target": target if target.shape[-1] <= 1 or target.stride(-1) == 1 else target.contiguous(),
        "softcap": loss.softcap,
        "temperature": loss.temperature,
        "target_scale": tile.target_scale,
        "beta": beta,
        "beta_rest": 1 - beta,
        "own_share": 1 - loss.smoothing,
        "uniform_each": loss.smoothing / tile.class_count,
        "z_loss": loss.z_loss,
        "FAMILY": family(loss).value,
        "LOGARITHM": tile.takes_logarithm,
    }
    launch(kernel, tile.z, values | more, by_rows=by_rows, entries=entries)


@jit
def times_finite(p, factor):
    """Return ``p factor``, where a class without mass has no part in a sum."""
    return p * tl.where(p == 0, 0.0, factor)


@jit
def _excess(a, difference, t):
    """Return ``a h(log(b/a))`` from ``difference = b − a`` and ``t = log(b/a)``."""
    direct = tl.where(t == -float("inf"), float("inf"), difference - times_finite(a, t))
    return tl.where(tl.abs(t) < 0.5, a * math.exp_excess(math.clamp_half(t)), direct)


@jit
def _divergence_terms(p, y, ratio, difference, beta, beta_rest, FAMILY: tl.constexpr):
    """Return score, curve and cross term, the score and curve seen from the target, and the value."""
    if FAMILY == FORWARD:
        value = _excess(y, difference, ratio)
        score = difference
        curve = p
        cross = -y
        t_score = times_finite(y, -ratio)
        t_curve = times_finite(y, 1 - ratio)
    elif FAMILY == REVERSE:
        value = _excess(p, -difference, -ratio)
        score = times_finite(p, ratio)
        curve = times_finite(p, ratio + 1)
        cross = -p
        t_score = -difference
        t_curve = y
    else:
        to_mixture = math.log_mixture(-ratio, beta, beta_rest)  # log m/p
        t_to_mixture = math.log_mixture(ratio, beta_rest, beta)  # log m/y
        value = beta_rest * _excess(p, -beta * difference, to_mixture)
        value += beta * _excess(y, beta_rest * difference, t_to_mixture)
        score = -beta_rest * times_finite(p, to_mixture)
        t_score = -beta * times_finite(y, t_to_mixture)
        harmonic = beta * beta_rest * p * tl.exp(-t_to_mixture)
        curve = score + harmonic
        t_curve = t_score + harmonic
        cross = -harmonic
    return score, curve, cross, t_score, t_curve, value


@jit
def load_terms(
    z, z_stride, target, target_stride, class_weight, class_share, numbers, row, at, inside, rows, softcap, temperature,
    target_scale, beta, beta_rest, own_share, uniform_each, FAMILY: tl.constexpr, LOGARITHM: tl.constexpr
):  # fmt: skip
    """Load a piece of both sides, and compare them.

    Returns the logits before and after their map, the target as given and its logits; ``p``, score, curve and cross
    term of the model, and the first three of the target, whose cross term is the same; the value, ``−log p`` and
    ``p − y``. Logits are −inf outside the tile.
    """
    raw = tl.load(z + row * z_stride + at, mask=inside, other=-float("inf"))
    seen = math.capped(raw, softcap, temperature)
    given = tl.load(target + row * target_stride + at, mask=inside, other=0.0).to(tl.float32)
    t = given
    if LOGARITHM:
        t = tl.log(given)
    t = tl.where(inside, t * target_scale, -float("inf"))
    offset = number(numbers, OFFSET, row, rows)
    log_rest = number(numbers, LOG_REST, row, rows)
    p = math.difference_exp(seen, offset) * number(numbers, UNIT, row, rows)
    minus_log_p = log_rest - (seen - offset)
    t_offset = number(numbers, OF_TARGET + OFFSET, row, rows)
    t_unit = number(numbers, OF_TARGET + UNIT, row, rows)
    if FAMILY <= SOFTMAX:
        factor = tl.where(inside, own_share, 0.0)
        uniform = tl.where(inside, uniform_each, 0.0)
        if class_weight is not None:
            factor = factor * tl.load(class_weight + at, mask=inside, other=0.0)
            uniform = uniform * tl.load(class_share + at, mask=inside, other=0.0)
        surplus = number(numbers, SHARE_SURPLUS, row, rows)
        uniform = tl.where((surplus > 0) & (seen == -float("inf")), 0.0, uniform * (1 + surplus))
        t_p = given
        if FAMILY == SOFTMAX:
            t_p = math.difference_exp(t, t_offset) * t_unit
        own = factor * t_p
        y = own + uniform
        score = -y
        curve = tl.zeros_like(p)
        value = tl.where(y == 0, 0.0, y * minus_log_p)
        difference = tl.zeros_like(p)
        if FAMILY == SOFTMAX:
            cross = -own
            t_score = tl.where(own == 0, 0.0, own * minus_log_p)
            t_curve = t_score
        else:
            nothing = (seen == -float("inf")) & (given == 0)
            cross = tl.where(nothing, 0.0, -factor)
            t_score = tl.where(nothing | (factor == 0), 0.0, factor * minus_log_p)
            t_curve = tl.zeros_like(p)
    else:
        t_log_rest = number(numbers, OF_TARGET + LOG_REST, row, rows)
        y = math.difference_exp(t, t_offset) * t_unit
        # The difference of the logits is exact where they nearly agree; where the rows' offsets differ it is rounded.
        near = (seen - t) - number(numbers, LOG_RATIO, row, rows)
        far = ((seen - offset) - (t - t_offset)) - (log_rest - t_log_rest)
        ratio = tl.where(tl.abs(offset - t_offset) < 1, near, far)
        ratio = tl.where((seen == -float("inf")) & (t == -float("inf")), 0.0, ratio)
        small = math.clamp_half(ratio)
        difference = tl.where(tl.abs(ratio) < 0.5, y * (small + math.exp_excess(small)), p - y)
        t_p = y
        score, curve, cross, t_score, t_curve, value = _divergence_terms(
            p, y, ratio, difference, beta, beta_rest, FAMILY
        )
    return (raw, seen, given, t), (p, score, curve, cross), (t_p, t_score, t_curve), (value, minus_log_p, difference)


@jit
def pulled_back(p, score, numbers, side, is_top, row, rows):
    """Return ``s − p S``; at the top as minus the sum of all others, and the limit where ``S`` is infinite."""
    total = number(numbers, side + SCORE, row, rows)
    gradient = tl.where(is_top, number(numbers, side + TOP_RESIDUAL, row, rows), score - p * total)
    limit = tl.where(score == float("inf"), score, tl.where(p > 0, -float("inf"), 0.0))
    return tl.where(total == float("inf"), limit, gradient)


@jit
def through_target(values, given, target_scale, LOGARITHM: tl.constexpr):
    """Return ``values`` times the derivative of the target's logits with respect to what the caller gave."""
    if LOGARITHM:
        values = tl.where(given > 0, values / given, 0.0)
    return values * target_scale


@jit
def directions(
    v, v_stride, target_v, target_v_stride, raw, given, numbers, is_top, t_is_top, row, at, inside, rows, softcap,
    temperature, target_scale, FAMILY: tl.constexpr, LOGARITHM: tl.constexpr
):  # fmt: skip
    """Return the changes of the target as given, of what the softmax sees, and of the target's logits; ``u`` of both.

    ``u = v − p·v``, but the change itself of probabilities that no softmax has made.
    """
    change = tl.zeros_like(raw)
    moved = tl.zeros_like(raw)
    if v is not None:
        change = tl.load(v + row * v_stride + at, mask=inside, other=0.0) * math.cap_slope(raw, softcap, temperature)
    if target_v is not None:
        moved = tl.load(target_v + row * target_v_stride + at, mask=inside, other=0.0).to(tl.float32)
    t_change = through_target(moved, given, target_scale, LOGARITHM)
    u = tl.where(is_top, number(numbers, TOP_U, row, rows), change - number(numbers, MEAN_V, row, rows))
    t_u = t_change
    if FAMILY != PROBABILITIES:
        t_u = t_change - number(numbers, OF_TARGET + MEAN_V, row, rows)
        t_u = tl.where(t_is_top, number(numbers, OF_TARGET + TOP_U, row, rows), t_u)
    return moved, change, t_change, u, t_u
