"""Losses of rows in few passes, for the rows that this computes accurately; the others need the exact forms.

The exact forms of :mod:`softcurve.losses.rows` treat masked, confident and nearly equal rows in every entry. Most rows
are none of these. Here ``torch.softmax`` gives the probabilities ``p``, with a relative error of 1e-7 each beside one
that a row has in common, of a few 1e-6 for many classes: results are divided by ``Σ p``, which torch sums pairwise. The
other sums over a row have an absolute error of about 1e-7. A result is ``sure`` if its magnitude is large compared with
the error: at least ``LEAST``. :func:`completed` computes the other rows again.

The functions are not differentiable, and work in float32 only: who asks for float64 wants all of its digits.
:mod:`softcurve.head.fast_rows` uses :func:`pull` and :func:`jensen_shannon` on its tiles.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from softcurve.array_types import Column, Flags, Rows, Values
from softcurve.checks import values_visible
from softcurve.losses.divergences import Divergence, ForwardKL, JensenShannon, ReverseKL
from softcurve.losses.softmax import unless_masked

# Sums with an absolute error of about 1e-7 keep six digits of a gradient above ``LEAST`` and a loss above
# ``LEAST_LOSS``.
LEAST = 0.1
LEAST_LOSS = 0.1
# The log-sum-exp is taken from the largest probability: of a smaller rest, too little would be left in it.
LEAST_REST = 1e-6
# Of a smaller rest, the rounding of z − max shows; see ``softmax.feels_rounding``.
LEAST_OTHERS = 1e-9
# Maxima that differ by less need not be subtracted before two logits are.
NEAR_OFFSET = 4.0
# Log-ratios beyond which one of two probabilities has no part in a mixture, also where it is 0.
MOST_RATIO = 60.0
LOG2_E = 1 / math.log(2)

Results = Sequence[Tensor | None]


def serves(z: Rows, *others: Tensor) -> bool:
    """Return whether fast rows can be computed: of visible float32, and not to be recorded by autograd."""
    return z.dtype == torch.float32 and not torch.is_grad_enabled() and values_visible(z, *others) and z.numel() > 0


def compares(divergence: Divergence) -> bool:
    """Return whether :func:`divergence_forms` has the formulas of a divergence."""
    known = type(divergence) in (ForwardKL, ReverseKL)  # a subclass may have other formulas
    return known or (type(divergence) is JensenShannon and 0.01 <= divergence.beta <= 0.99)


def _above(least: float, sizes: Column, scale: Values | None = None) -> Flags | None:
    """Return which rows are larger than ``least``, or of scale 0; ``None`` if all are larger."""
    if sizes.amin().item() > least:  # False beside NaN
        return None
    sure = (sizes > least).squeeze(-1)
    return sure if scale is None else sure | (scale == 0)


def completed(results: Results, sure: Flags | None, exact: Callable[..., Results], *tensors: Tensor) -> Results:
    """Overwrite the rows of ``results`` that are not ``sure`` by ``exact`` of these rows; by default all are sure."""
    if sure is not None and not sure.all():
        rows = ~sure
        for result, part in zip(results, exact(*(tensor[rows] for tensor in tensors)), strict=True):
            if result is not None and part is not None:
                result[rows] = part
    return results


def _where_stored(function: Callable[[Tensor, int], Tensor], z: Rows) -> Rows:
    """Return ``function(z, -1)``, computed where the classes are in memory: torch copies a tensor of another order."""
    if z.is_contiguous():
        return function(z, -1)
    place = sum([step > z.stride(-1) for step in z.stride()[:-1]])
    return function(z.movedim(-1, place), place).movedim(place, -1)


# --- a cross-entropy -------------------------------------------------------------------------------------------------


def index_losses(z: Rows, at: Tensor) -> tuple[Values, Flags | None]:
    """Return ``−log p_t`` of class indices ``at``, ``(..., 1)``, as ``log1p(Σ_{k≠t} p_k / p_t)``."""
    p = _where_stored(torch.softmax, z)
    at_target = p.gather(-1, at)
    others = p.scatter_(-1, at, 0.0).sum(-1, keepdim=True)
    sure = _above(LEAST_OTHERS, torch.minimum(others, at_target))
    return others.div_(at_target).log1p_().squeeze(-1), sure


def index_residuals(scale: Values, z: Rows, at: Tensor, smoothing: float = 0.0) -> tuple[Rows, Flags | None]:
    """Return ``scale (p − y)`` of class indices ``at``, ``(..., 1)``; at the target ``−Σ_{k≠t} (p_k − ε/C)``."""
    p = _where_stored(torch.softmax, z)
    at_target = p.gather(-1, at)
    others = p.scatter_(-1, at, 0.0).sum(-1, keepdim=True)
    sure = _above(LEAST_OTHERS, torch.minimum(others, at_target), scale)
    total = others + at_target
    if smoothing:
        p.sub_(total * (smoothing / z.shape[-1]))
        others.sub_(total * (smoothing * (1 - 1 / z.shape[-1])))
    return p.scatter_(-1, at, others.neg_()).mul_(scale.unsqueeze(-1) / total), sure


def index_losses_and_residuals(z: Rows, at: Tensor) -> tuple[Column, Rows] | None:
    """Return :func:`index_losses`, ``(..., 1)``, and :func:`index_residuals` of scale 1, or ``None`` for unsure rows.

    It calls few operations: of few logits, each takes longer than its computation.
    """
    p = _where_stored(torch.softmax, z)
    at_target = p.gather(-1, at)
    others = p.scatter_(-1, at, 0.0).sum(-1, keepdim=True)
    rows = (others / at_target).log1p_()
    least, most = rows.aminmax()
    if not (least.item() > LEAST_OTHERS and most.item() < -math.log(LEAST_OTHERS)):  # also beside NaN
        return None
    total = at_target.add_(others)
    return rows, p.scatter_(-1, at, others.neg_()).div_(total)


def smoothed_index_losses(smoothing: float, z: Rows, at: Tensor) -> tuple[Values, Flags]:
    """Return ``−(1 − ε) log p_t − ε/C Σ_k log p_k``, of which the mean is at least ``log C``."""
    log_p = _where_stored(torch.log_softmax, z)
    rows = log_p.gather(-1, at).squeeze(-1).mul_(smoothing - 1).sub_(log_p.mean(-1), alpha=smoothing)
    return rows, (rows > LEAST_LOSS) & rows.isfinite()


def smoothed_losses_and_residuals(smoothing: float, z: Rows, at: Tensor) -> tuple[Column, Rows] | None:
    """Return :func:`smoothed_index_losses`, ``(..., 1)``, and :func:`index_residuals` of scale 1, if all are sure."""
    classes = z.shape[-1]
    e = z - z.amax(-1, keepdim=True)
    at_target, mean = e.gather(-1, at), e.mean(-1, keepdim=True)
    others = e.exp_().scatter_(-1, at, 0.0).sum(-1, keepdim=True)
    of_target = at_target.exp()
    total = others + of_target
    rows = total.log().sub_(at_target, alpha=1 - smoothing).sub_(mean, alpha=smoothing)
    least, most = rows.aminmax()
    if not (least.item() > LEAST_LOSS and most.item() < math.inf):
        return None
    if _above(LEAST_OTHERS, torch.minimum(others, of_target) / total) is not None:
        return None
    of_target = (total * (smoothing * (1 - 1 / classes))).sub_(others)
    return rows, e.sub_(total * (smoothing / classes)).scatter_(-1, at, of_target).div_(total)


def dense_losses(z: Rows, y: Rows) -> tuple[Values, Flags]:
    """Return ``−Σ_k y_k log p_k`` of rows ``y`` of any sum; where a class without mass is masked, it is not sure."""
    rows = _where_stored(torch.log_softmax, z).mul_(y).sum(-1).neg_()
    return rows, (rows > LEAST_LOSS * y.sum(-1)) & rows.isfinite()


def dense_residuals(scale: Values, z: Rows, y: Rows) -> tuple[Rows, Flags]:
    """Return ``scale [(Σ_k y_k) p − y]``, whose sum of 0 a class above one half restores."""
    p, column = _where_stored(torch.softmax, z), scale.unsqueeze(-1)
    top = p.amax(-1, keepdim=True)
    mass = y.sum(-1, keepdim=True) / p.sum(-1, keepdim=True)
    residual = torch.addcmul(p * (column * mass), y, column, value=-1)
    balance(residual, p, top)
    return unless_masked(z, residual), (1 - top > LEAST_REST).squeeze(-1) | (scale == 0)


def dense_losses_and_residuals(z: Rows, y: Rows) -> tuple[Values, Rows, Flags]:
    """Return :func:`dense_losses` and :func:`dense_residuals` of scale 1 from the same exponentials.

    With ``m = max z`` and ``S = Σ_k e^{z_k − m}`` the loss is ``(Σ_k y_k) log S − Σ_k y_k (z_k − m)``, which is NaN or
    infinite in a row with a masked class, so that it is not sure. A class above one half has the exponential 1 and
    ``S < 2``. Exponentials and two passes take less time than torch's softmax along a dimension that is not the last,
    and fresh memory takes longer than a pass, so that each buffer is used again.
    """
    shifted = z - z.amax(-1, keepdim=True)
    e, mass = shifted.exp(), y.sum(-1, keepdim=True)
    total = e.sum(-1, keepdim=True)
    value = mass * total.log() - shifted.mul_(y).sum(-1, keepdim=True)
    residual = torch.mul(e, mass / total, out=shifted).sub_(y)
    _take_up(residual, (total < 2).squeeze(-1), e.floor_)
    sure = (value > LEAST_LOSS * mass) & (value < math.inf) & (total - 1 > LEAST_REST)
    return value.squeeze(-1), residual, sure.squeeze(-1)


# --- a divergence ----------------------------------------------------------------------------------------------------


class Side(NamedTuple):
    """One softmax of a comparison: logits up to a constant, probabilities, the largest, and the log-sum-exp."""

    z: Rows
    p: Rows
    total: Column  # Σ p, which differs from 1 by rounding
    top: Column
    lse: Column  # of ``z``, in float64


def sides(first: Rows, second: Rows) -> tuple[Side, Side]:
    """Return both sides of a comparison; logits with a large offset between them are shifted to a maximum of 0."""
    logits, offsets = [first, second], [each.amax(-1, keepdim=True) for each in (first, second)]
    if not (offsets[0] - offsets[1]).abs().amax() < NEAR_OFFSET:
        logits = [each - offset for each, offset in zip(logits, offsets, strict=True)]
        offsets = [torch.zeros_like(offset) for offset in offsets]
    made = []
    for z, offset in zip(logits, offsets, strict=True):
        p = _where_stored(torch.softmax, z)
        total, top = p.sum(-1, keepdim=True), p.amax(-1, keepdim=True)
        lse = offset.double() - (top.double() / total).log()  # p_top = e^{max − lse}
        made.append(Side(z, p, total, top, lse))
    return made[0], made[1]


class DivergenceForms(NamedTuple):
    """The value of each row and its gradients, as far as they are wanted, and which rows are sure."""

    value: Values | None
    in_z: Rows | None
    in_target: Rows | None
    sure: Flags


def divergence_forms(
    divergence: Divergence, scale: Values | None, z: Rows, target: Rows, wanted: tuple[bool, bool], *,
    wants_value: bool,
) -> DivergenceForms:  # fmt: skip
    """Return the divergence from ``target`` to ``z``, both logits, and ``scale`` times its gradients in both."""
    if isinstance(divergence, ReverseKL):
        others = (wanted[1], wanted[0])
        value, in_target, in_z, sure = divergence_forms(ForwardKL(), scale, target, z, others, wants_value=wants_value)
        return DivergenceForms(value, in_z, in_target, sure)
    model, teacher = sides(z, target)
    beta = divergence.beta if isinstance(divergence, JensenShannon) else None
    value, in_z, in_target = _compared(beta, model, teacher, wanted, wants_value=wants_value)
    constant, sure = model.lse - teacher.lse, _has_rest(model, teacher)
    if wants_value and value is not None:
        least = LEAST_LOSS if beta is not None else LEAST_LOSS * (1 + constant.abs())
        sure = sure & (value > least) & value.isfinite()
    size = 1 + (value - constant).abs() if beta is None and in_target is not None and value is not None else 1.0
    factors = (1.0, 1.0) if beta is None else (beta - 1, -beta)
    for gradient, side, factor in zip((in_z, in_target), (model, teacher), factors, strict=True):
        if gradient is not None:
            sure = sure & (gradient.abs().sum(-1, keepdim=True) > LEAST * size)
            balance(gradient, side.p, side.top)
            gradient.mul_((factor if scale is None else (factor * scale).unsqueeze(-1)) / side.total)
    in_z, in_target = (None if g is None else unless_masked(a, g) for a, g in ((z, in_z), (target, in_target)))
    sure = sure.squeeze(-1) if scale is None else sure.squeeze(-1) | (scale == 0)
    return DivergenceForms(
        value.to(z.dtype).squeeze(-1) if wants_value and value is not None else None, in_z, in_target, sure
    )


def _compared(
    beta: float | None, model: Side, teacher: Side, wanted: tuple[bool, bool], *, wants_value: bool
) -> tuple[Column | None, Rows | None, Rows | None]:
    """Return the Jensen-Shannon divergence, or the KL divergence without ``beta``, and multiples of its gradients.

    The multiples, one for each row, are those of :func:`jensen_shannon`, and the totals for a KL divergence.
    """
    value, in_z, in_target = None, None, None
    constant = model.lse - teacher.lse
    if beta is not None:
        in_z, in_target = (torch.empty_like(model.z) if each else None for each in wanted)
        log_ratio = torch.sub(teacher.z, model.z, out=in_z)
        totals = (model.total, teacher.total)
        value = jensen_shannon(beta, log_ratio, constant, model.p, teacher.p, in_z, in_target, totals=totals)
        return value, in_z, in_target
    if wants_value or wanted[1]:
        log_ratio = torch.sub(teacher.z, model.z, out=None if wanted[0] else model.p)  # in memory in use
        in_target = log_ratio if wanted[1] else None
        value = pull(log_ratio, teacher.p, teacher.total, in_target) + constant
    if wanted[0]:  # in place where the target's probabilities are not needed any more
        ratio, out = model.total / teacher.total, None if wanted[1] else teacher.p
        in_z = torch.addcmul(model.p, teacher.p, ratio, value=-1, out=out)
    return value, in_z, in_target


def _has_rest(*sides: Side) -> Tensor:
    return (1 - torch.maximum(sides[0].top, sides[1].top)) > LEAST_REST


def balance(gradient: Rows, p: Rows, top: Column) -> None:
    """Let a class above one half take up what its row misses of its sum of 0, as in ``softmax.dense_residual``.

    It overwrites ``p``: fresh memory takes longer than a pass over memory in use.
    """
    _take_up(gradient, (top > 0.5).squeeze(-1), lambda: p.gt_(0.5))


def _take_up(gradient: Rows, confident: Flags, largest: Callable[[], Rows]) -> None:
    """Balance the rows that are ``confident``, in which ``largest()`` is 1 at the class above one half and else 0."""
    if confident.any():
        missing = torch.where(confident, -gradient.sum(-1), 0.0)
        gradient.addcmul_(largest(), missing.unsqueeze(-1))


def pull(s: Rows, e: Rows, total: Column | None = None, out: Rows | None = None) -> Column:
    """Return ``Σ p s`` of ``p = e / total``; ``out = e (s − Σ p s)``. ``s`` is overwritten; ``total`` is 1 by default.

    A constant added to ``s`` leaves ``out`` as it is.
    """
    s.mul_(e)
    mean = s.sum(-1, keepdim=True)
    if total is not None:
        mean.div_(total)
    if out is not None:
        torch.addcmul(s, e, mean, value=-1, out=out)
    return mean


def jensen_shannon(
    beta: float, log_ratio: Rows, constant: Column, e: Rows, y: Rows, out: Rows | None = None,
    target_out: Rows | None = None, *, totals: tuple[Column, Column], mixture: Rows | None = None,
) -> Column:  # fmt: skip
    """Return the divergence of ``p = e / total`` and ``y / target_total``.

    ``log_ratio`` and the buffer ``mixture`` are overwritten; ``log_ratio + constant`` is ``r = log y/p``. With the
    mixture ``m``, ``log m/p = log1p(β e^r − β)`` and ``log m/y = log m/p − r``, where for ``β ≤ ½`` little cancels. The
    gradients are ``∂D/∂z = (β−1)/total · out`` and ``∂D/∂target = −β/target_total · target_out``; ``out`` may be
    ``log_ratio``.
    """
    if beta > 0.5:  # the same with the sides exchanged
        others = (totals[1], totals[0])
        ratio = log_ratio.neg_()
        return jensen_shannon(1 - beta, ratio, -constant, y, e, target_out, out, totals=others, mixture=mixture)
    log_ratio.clamp_(-MOST_RATIO, MOST_RATIO)
    start = constant.to(log_ratio.dtype).mul(LOG2_E).add_(math.log2(beta))
    mixture = torch.add(start, log_ratio, alpha=LOG2_E, out=mixture)
    mixture.exp2_().sub_(beta).log1p_()
    to_target = pull(torch.sub(mixture, log_ratio, out=log_ratio), y, totals[1], target_out)
    to_model = pull(mixture, e, totals[0], out)
    return -(beta * (to_target - constant) + (1 - beta) * to_model)
