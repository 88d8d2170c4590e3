"""The tile functions of :class:`softcurve.head.dense.DenseKernel` in ATen.

:mod:`softcurve.head.triton.dense` has the same functions. They work on groups of rows that stay in the cache, and leave
logits as they are until :func:`residuals` writes over them. Two softmaxes are compared, the model's and the target's;
``side`` says which of them a function is about. ``torch.where`` costs as much as five exponentials on the CPU, so rare
entries (masked classes, mass 0) are handled only if a row shows that there are some.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from softcurve.checks import values_visible
from softcurve.losses.divergences import Divergence, Pair
from softcurve.losses.rows import divergence_second_order
from softcurve.losses.softmax import may_be_masked, unless_masked
from softcurve.losses.spec import LossSpec

MODEL, TARGET = range(2)
VALUE, FIRST, SECOND = range(3)  # the order of the derivatives that terms are for

# Rows of ``DenseTile.numbers``: eight of the model's softmax, the same eight of the target's, and three of the loss.
# With S the sum of the scores and u = v − p·v, the entries of a class with more than half of the mass (the "top") are
# differences that cancel, so the residual and u at the top are sums over the other classes instead.
OFFSET, LOG_REST, UNIT, SCORE, TOP_RESIDUAL, MEAN_V, TOP_U, CHANGE = range(8)
SIDE_NUMBERS = 8
LOG_RATIO, LSE, WEIGHT = range(2 * SIDE_NUMBERS, 2 * SIDE_NUMBERS + 3)


class DenseTile(NamedTuple):
    """The tensors of a block, ``(rows, classes)`` each, and what its elementwise work depends on."""

    loss: LossSpec
    class_count: int  # C, of which the block holds some
    cached: int  # entries that stay in the cache
    wants_target: bool  # whether the derivatives with respect to the target are wanted
    z: Tensor
    target: Tensor  # probabilities or logits, as the caller gave them
    v: Tensor | None = None  # the changes of z and target along a direction
    target_v: Tensor | None = None
    out: Tensor | None = None  # buffers for residuals, of ``z`` and ``v`` in half precision
    v_out: Tensor | None = None
    target_out: Tensor | None = None
    target_v_out: Tensor | None = None
    raw: Tensor | None = None  # second order: buffers for the logits before their soft cap, q, and the residual
    q: Tensor | None = None
    residual: Tensor | None = None
    class_weight: Tensor | None = None  # (classes,): the factors of the target's mass, and of label smoothing
    class_share: Tensor | None = None
    top: Tensor | None = None  # (2, rows): each softmax's class above one half as a column; elsewhere if there is none
    numbers: Tensor | None = None  # (19, rows, 1), in the dtype of ``z``

    @property
    def is_by_logits(self) -> bool:
        """Whether a softmax makes the target, so that its derivatives pass through one."""
        return self.loss.target != "probabilities" or not self.loss.is_cross_entropy

    @property
    def takes_logarithm(self) -> bool:
        """Whether the target's logits are the logarithm of what the caller gave."""
        return self.is_by_logits and self.loss.target == "probabilities"

    @property
    def target_scale(self) -> float:
        """The factor of the target's logits, where no matrix product has applied it."""
        return 1.0 if self.loss.target == "teacher" else self.loss.target_scale

    def number(self, which: int, side: int = MODEL) -> Tensor:
        """One number of each row, ``(rows, 1)``; ``side`` for those that each softmax has."""
        assert self.numbers is not None
        return self.numbers[which + SIDE_NUMBERS * side]

    def row_groups(self) -> Iterator[tuple[slice, DenseTile]]:
        """Yield groups of rows that are small enough to stay in the cache, with the target in the dtype of ``z``."""
        rows, classes = self.z.shape
        step = max(1, self.cached // max(1, classes))
        parts = {name: value for name, value in self._asdict().items() if name in _BY_ROWS and value is not None}
        for start in range(0, rows, step):
            group = slice(start, start + step)
            part = self._replace(**{name: value[group] for name, value in parts.items()})
            yield (
                group,
                part._replace(
                    target=part.target.to(self.z.dtype),
                    top=None if self.top is None else self.top[:, group],
                    numbers=None if self.numbers is None else self.numbers[:, group],
                ),
            )

    def top_entries(self, side: int) -> tuple[Tensor, Tensor]:
        """Row and column of each class above one half in the tile, as indices."""
        assert self.top is not None
        column = self.top[side]
        row = ((column >= 0) & (column < self.z.shape[1])).nonzero().squeeze(-1)
        return row, column[row]


_BY_ROWS = frozenset(
    ("z", "target", "v", "target_v", "out", "v_out", "target_out", "target_v_out", "raw", "q", "residual")
)


class DenseSums(NamedTuple):
    """What :func:`sums` adds up over a block's classes, ``(rows, 1)`` each; 0 where it is not wanted."""

    score: Tensor  # S, and the same sum without the top
    score_rest: Tensor
    target_score: Tensor
    target_score_rest: Tensor
    value: Tensor
    surplus: Tensor  # Σ (p − y)
    curve: Tensor
    mean_v: Tensor  # Σ p v without the top, and v at the top
    top_v: Tensor
    target_mean_v: Tensor
    target_top_v: Tensor
    entropy: Tensor
    best: Tensor  # the target's largest entry


# --- statistics of a row ---------------------------------------------------------------------------------------------


def softmax(tile: DenseTile, side: int, *, wants_place: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Return each row's largest logit, ``Σ e^{z − max}`` without one class that has it, and that class's column.

    Without ``wants_place`` the column is −1 in a row whose largest class has at most half of the mass.
    """
    found = tile.z.new_empty(2, len(tile.z), 1)
    place = torch.full((len(tile.z), 1), -1, dtype=torch.int64, device=tile.z.device)
    for rows, part in tile.row_groups():
        z = _seen(part) if side == MODEL else _target_logits(part)
        top = z.amax(-1, keepdim=True)
        found[0, rows] = top
        found[1, rows] = rest = rest_of((z - torch.where(top == -math.inf, 0.0, top)).exp_())
        some = slice(None) if wants_place else (rest < 1).squeeze(-1).nonzero().squeeze(-1)
        place[rows][some] = z[some].argmax(-1, keepdim=True)
    return found[0], found[1], place


def rest_of(exponentials: Tensor) -> Tensor:
    """Return ``Σ e^{z − max} − 1`` of each row, which leaves out the 1 of the largest class exactly."""
    rest = exponentials.sum(-1, keepdim=True).sub_(1)
    confident = (rest.squeeze(-1) < 1).nonzero().squeeze(-1)
    if len(confident):
        rest[confident] = torch.frac(exponentials[confident]).sum(-1, keepdim=True)
    return rest


def sums(tile: DenseTile, *, wants_stats: bool, wants_curve: bool) -> tuple[DenseSums, Tensor]:
    """Return the sums over the block's classes, and the column of the target's largest entry."""
    found = DenseSums(*tile.z.new_zeros(len(DenseSums._fields), len(tile.z), 1))
    label = torch.zeros((len(tile.z), 1), dtype=torch.int64, device=tile.z.device)
    for rows, part in tile.row_groups():
        order = SECOND if wants_curve else FIRST if wants_stats or part.v is not None else VALUE
        pair, log_p, y, model, target = _terms(part, order)
        found.score[rows], found.score_rest[rows] = _sum_and_rest(part, MODEL, model.score)
        if target is not None and part.is_by_logits:
            found.target_score[rows], found.target_score_rest[rows] = _sum_and_rest(part, TARGET, target.score)
        if part.loss.is_cross_entropy:
            found.value[rows] = -_weighted(pair.y, log_p).sum(-1, keepdim=True)
        else:
            found.value[rows] = part.loss.divergence.value(pair).unsqueeze(-1)
            found.surplus[rows] = pair.difference.sum(-1, keepdim=True)
        if wants_curve and model.curve is not None:
            found.curve[rows] = model.curve.sum(-1, keepdim=True)
        v, target_v = _directions(part)
        if v is not None:
            found.mean_v[rows], found.top_v[rows] = _mean_without_top(part, MODEL, pair.p, v)
        if target_v is not None and part.is_by_logits:
            found.target_mean_v[rows], found.target_top_v[rows] = _mean_without_top(part, TARGET, y, target_v)
        if wants_stats:
            found.entropy[rows] = -_weighted(pair.p, log_p).sum(-1, keepdim=True)
            found.best[rows], label[rows] = part.target.max(-1, keepdim=True)
    return found, label


def changes(tile: DenseTile) -> tuple[Tensor, Tensor]:
    """Return ``Σ c ⊙ u + x ⊙ u_y`` of both sides."""
    found = tile.z.new_zeros(2, len(tile.z), 1)
    for rows, part in tile.row_groups():
        terms, (u, u_y) = _terms(part, SECOND), _centred(part)
        found[MODEL, rows] = _change_of_score(terms.model, u, u_y).sum(-1, keepdim=True)
        if terms.target is not None and part.is_by_logits:
            found[TARGET, rows] = _change_of_score(terms.target, u_y, u).sum(-1, keepdim=True)
    return found[MODEL], found[TARGET]


def _sum_and_rest(tile: DenseTile, side: int, values: Tensor) -> tuple[Tensor, Tensor]:
    """Return the sum over all classes, and over all but the top."""
    total = values.sum(-1, keepdim=True)
    row, column = tile.top_entries(side)
    rest = total
    if len(row):
        rest = total.clone()
        rest[row] = values[row].scatter_(-1, column.unsqueeze(-1), 0.0).sum(-1, keepdim=True)
    return total, rest


def _mean_without_top(tile: DenseTile, side: int, p: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Return ``Σ p v`` over all classes but the top, and ``v`` at the top."""
    mean, top = _weighted(p, v).sum(-1, keepdim=True), torch.zeros_like(p[:, :1])
    row, column = tile.top_entries(side)
    if len(row):
        others = p[row].scatter_(-1, column.unsqueeze(-1), 0.0)
        mean[row] = _weighted(others, v[row]).sum(-1, keepdim=True)
        top[row, 0] = v[row, column]
    return mean, top


# --- derivatives -----------------------------------------------------------------------------------------------------


def residuals(tile: DenseTile, *, wants_tangents: bool) -> Tensor | None:
    """Form ∂L/∂z, ∂L/∂target and their changes along a direction: the only function of this backend that does.

    They are multiplied by the rows' weights and written over ``z`` and ``v``, and into ``target_out`` and
    ``target_v_out`` where the tile has them. Returns the change of each row's loss, ``(rows, 1)``, if it is wanted.
    """
    tangents = tile.z.new_zeros(len(tile.z), 1) if wants_tangents else None
    for rows, part in tile.row_groups():
        weight, slope = part.number(WEIGHT), _slope(part)
        terms = _terms(part, FIRST if part.v is None else SECOND)
        gradient, in_target = _gradient(part, terms), _target_gradient(part, terms)
        if part.v is not None:
            (v, target_v), (u, u_y) = _directions(part), _centred(part)
            if tangents is not None:
                tangents[rows] = _inner(gradient, v) + _inner(in_target, target_v)
            product = _product(part, terms, u, u_y)
            if slope is not None:
                product.mul_(slope).addcmul_(_bend_ratio(part, part.z).mul_(v), gradient)
            if in_target is not None and part.target_v_out is not None:
                _write(part.target_v_out, _target_product(part, terms, in_target, u, u_y), weight)
            _write(part.v, product, weight)
        if in_target is not None and part.target_out is not None:
            _write(part.target_out, _through_target(part, in_target), weight)
        _write(part.z, gradient if slope is None else gradient.mul_(slope), weight)
    return tangents


def _gradient(tile: DenseTile, terms: _Terms) -> Tensor:
    """∂L/∂z of what the softmax sees."""
    gradient = _pulled_back(tile, MODEL, terms.model)
    if tile.loss.z_loss:
        gradient.addcmul_(terms.model.p, tile.number(LSE), value=2 * tile.loss.z_loss)
    return unless_masked(tile.z, gradient)


def _target_gradient(tile: DenseTile, terms: _Terms) -> Tensor | None:
    """The same with respect to the target's logits, or to probabilities that no softmax has made."""
    if terms.target is None or not tile.wants_target:
        return None
    if not tile.is_by_logits:
        return terms.target.score
    return unless_masked(tile.target, _pulled_back(tile, TARGET, terms.target))


def _pulled_back(tile: DenseTile, side: int, of: _Side) -> Tensor:
    """``s − p S``, at the top as minus the sum of all others, and its limit where ``S`` is infinite."""
    total = tile.number(SCORE, side)
    gradient = torch.addcmul(of.score, of.p, total, value=-1)
    row, column = tile.top_entries(side)
    gradient[row, column] = tile.number(TOP_RESIDUAL, side)[row, 0]
    infinite = (total == math.inf).squeeze(-1).nonzero().squeeze(-1)
    if len(infinite):
        score, p = of.score[infinite], of.p[infinite]
        gradient[infinite] = torch.where(score == math.inf, score, torch.where(p > 0, -math.inf, 0.0).to(p.dtype))
    return gradient


def _product(tile: DenseTile, terms: _Terms, u: Tensor, u_y: Tensor | None) -> Tensor:
    """The change of :func:`_gradient`."""
    product, z_loss = _pulled_back_change(tile, MODEL, terms.model, u, u_y), tile.loss.z_loss
    if z_loss:
        mean = tile.number(MEAN_V)
        product.addcmul_(terms.model.p, (tile.number(LSE) * u).add_(mean), value=2 * z_loss)
    return unless_masked(tile.z, product)


def _target_product(tile: DenseTile, terms: _Terms, in_target: Tensor, u: Tensor, u_y: Tensor | None) -> Tensor:
    """The change of the gradient with respect to the target as the caller gave it."""
    assert terms.target is not None
    if tile.is_by_logits:
        change = unless_masked(tile.target, _pulled_back_change(tile, TARGET, terms.target, u_y, u))
    else:
        change = _change_of_score(terms.target, u_y, u)
    product = _through_target(tile, change)
    if tile.takes_logarithm and tile.target_v is not None:
        bend = in_target * tile.target_v / tile.target.square()
        product = product - torch.where(tile.target > 0, bend, 0.0) * tile.target_scale
    return product


def _pulled_back_change(tile: DenseTile, side: int, of: _Side, u: Tensor | None, u_other: Tensor | None) -> Tensor:
    """``ṡ − p Σṡ − p ⊙ u S`` with ``ṡ = c ⊙ u + x ⊙ u_other``."""
    product = _change_of_score(of, u, u_other).addcmul_(of.p, tile.number(CHANGE, side), value=-1)
    return product if u is None else product.addcmul_(of.p * u, tile.number(SCORE, side), value=-1)


def _change_of_score(of: _Side, u: Tensor | None, u_other: Tensor | None) -> Tensor:
    """``ṡ = c ⊙ u + x ⊙ u_other``."""
    change = torch.zeros_like(of.p) if of.curve is None or u is None else of.curve * u
    return change if of.cross is None or u_other is None else change.addcmul_(of.cross, u_other)


def _directions(tile: DenseTile) -> tuple[Tensor | None, Tensor | None]:
    """The changes of what the softmax sees, and of the target's logits (or of probabilities, if there are none)."""
    v, slope = tile.v, _slope(tile)
    if v is not None and slope is not None:
        v = v * slope
    return v, None if tile.target_v is None else _through_target(tile, tile.target_v)


def _centred(tile: DenseTile) -> tuple[Tensor, Tensor | None]:
    """``u = v − p·v`` on both sides; the change itself of probabilities that no softmax has made."""
    v, target_v = _directions(tile)
    assert v is not None
    if target_v is not None and tile.is_by_logits:
        target_v = _without_mean(target_v, tile.number(MEAN_V, TARGET), tile, TARGET, tile.number(TOP_U, TARGET))
    return _without_mean(v, tile.number(MEAN_V), tile, MODEL, tile.number(TOP_U)), target_v


def _without_mean(v: Tensor, mean: Tensor, tile: DenseTile, side: int, at_top: Tensor) -> Tensor:
    """``v − mean``, and the number that each row has for it at the top."""
    u = v - mean
    row, column = tile.top_entries(side)
    u[row, column] = at_top[row, 0]
    return u


def _through_target(tile: DenseTile, values: Tensor) -> Tensor:
    """``values`` times the derivative of the target's logits with respect to what the caller gave."""
    if tile.takes_logarithm:
        values = torch.where(tile.target > 0, values / tile.target, 0.0)
    return values if tile.target_scale == 1 else values * tile.target_scale


def _inner(gradient: Tensor | None, v: Tensor | None) -> Tensor | float:
    return 0.0 if gradient is None or v is None else (gradient * v).sum(-1, keepdim=True)


def _write(out: Tensor, values: Tensor, weight: Tensor) -> None:
    """``out ← weight ⊙ values``, and exactly 0 in a row of weight 0, where ``0 · NaN`` may stand."""
    torch.mul(values, weight, out=out)
    if not values_visible(weight) or not weight.all():
        out.masked_fill_(weight == 0, 0.0)


# --- terms of the classes --------------------------------------------------------------------------------------------


class _Side(NamedTuple):
    """The probabilities of one side, and the terms of the loss that :mod:`softcurve.losses.divergences` defines."""

    p: Tensor  # of no meaning where a cross-entropy is evaluated without derivatives
    score: Tensor
    curve: Tensor | None  # None if it is 0, or below second order
    cross: Tensor | None


class _Terms(NamedTuple):
    pair: Pair
    log_p: Tensor
    y: Tensor  # the target's softmax, or its probabilities
    model: _Side
    target: _Side | None  # None if it is not wanted


def _terms(tile: DenseTile, order: int) -> _Terms:
    """Compare two distributions: a cross-entropy is the member ``φ = −y log p`` with ``s = −y``, ``c = 0``, ``x = −y``.

    Seen from the logits of its target, a cross-entropy has ``s = c = −y log p``.
    """
    z = _seen(tile)
    log_p = (z - tile.number(OFFSET)).sub_(tile.number(LOG_REST))
    y = tile.target
    if tile.is_by_logits:
        logits = _target_logits(tile)
        log_y = (logits - tile.number(OFFSET, TARGET)).sub_(tile.number(LOG_REST, TARGET))
        y = log_y.exp()
    if tile.loss.is_cross_entropy:
        return _cross_entropy_terms(tile, log_p, y, order)
    pair = _pair(tile, log_p, log_y, z, logits, y)
    divergence, target = tile.loss.divergence, None
    if tile.wants_target:
        target = _terms_of(divergence.exchanged(), pair.exchanged(), order)
    return _Terms(pair, log_p, y, _terms_of(divergence, pair, order), target)


def _terms_of(divergence: Divergence, pair: Pair, order: int) -> _Side:
    score = divergence.score(pair)
    if order < SECOND:
        return _Side(pair.p, score, None, None)
    return _Side(pair.p, score, divergence.curve(pair), divergence.cross(pair))


def _pair(tile: DenseTile, log_p: Tensor, log_y: Tensor, z: Tensor, logits: Tensor, y: Tensor) -> Pair:
    """Both distributions and their log-ratio, right relatively even where the two nearly agree.

    There the difference of the logits is exact, as that of two log-probabilities is not. Where the offsets of the rows
    differ, it is rounded at the size of the offsets.
    """
    p = log_p.exp()
    ratio = (z - logits).sub_(tile.number(LOG_RATIO))
    apart = ((tile.number(OFFSET) - tile.number(OFFSET, TARGET)).abs() >= 1).squeeze(-1)
    if apart.any():
        ratio[apart] = log_p[apart] - log_y[apart]
    if may_be_masked(z) and may_be_masked(logits):
        ratio = torch.where((z == -math.inf) & (logits == -math.inf), 0.0, ratio)
    # p − y, where the two are near as y (p/y − 1); lerp selects one of two finite numbers at a tenth of where's time.
    near = torch.clamp(ratio, -0.5, 0.5)
    is_near = torch.eq(ratio, near, out=torch.empty_like(p))
    difference = torch.lerp(p - y, near.expm1_().mul_(y), is_near)
    return Pair(p, y, ratio, difference)


def _cross_entropy_terms(tile: DenseTile, log_p: Tensor, y: Tensor, order: int) -> _Terms:
    loss, weight = tile.loss, tile.class_weight
    own, whole = masses(y, loss, tile.class_count, weight, tile.class_share)
    p, cross, target = log_p if order == VALUE else log_p.exp(), None, None
    if tile.is_by_logits:
        cross = -own if order == SECOND else None
        if tile.wants_target:
            information = -_weighted(own, log_p)
            target = _Side(y, information, information, cross)
    elif tile.wants_target or order == SECOND:
        factor = torch.full_like(y[:1], 1 - loss.smoothing) if weight is None else (1 - loss.smoothing) * weight
        cross = (-factor).expand_as(p)  # with respect to probabilities that no softmax has made
        score = cross * log_p
        if may_be_masked(log_p):
            score = torch.where((log_p == -math.inf) & (y == 0) | (cross == 0), 0.0, score)
        target = _Side(y, score, None, cross)
    return _Terms(Pair(p, whole, log_p, own), log_p, y, _Side(p, -whole, None, cross), target)


def masses(
    y: Tensor, loss: LossSpec, class_count: int, weight: Tensor | None, share: Tensor | None
) -> tuple[Tensor, Tensor]:
    """``w (1 − ε) y`` and, with what label smoothing adds, ``w (1 − ε) y + w′ ε / C``: a cross-entropy's target."""
    own = y * (1 - loss.smoothing) if loss.smoothing else y
    own = own if weight is None else own * weight
    if not loss.smoothing:
        return own, own
    each = loss.smoothing / class_count
    return own, own + (each if share is None else each * share)


def _seen(tile: DenseTile) -> Tensor:
    """The logits that the softmax sees."""
    loss = tile.loss
    if loss.softcap is None or may_be_masked(tile.z):
        return loss.logit_map.value(tile.z)
    return torch.tanh(tile.z / loss.softcap).mul_(loss.softcap / loss.temperature)


def _target_logits(tile: DenseTile) -> Tensor:
    logits = torch.log(tile.target) if tile.takes_logarithm else tile.target
    return logits if tile.target_scale == 1 else logits * tile.target_scale


def _weighted(weights: Tensor, values: Tensor) -> Tensor:
    """``weights ⊙ values``, where a class of weight 0 has no part, also beside an infinite value."""
    products = weights * values
    return torch.where(weights == 0, 0.0, products) if products.sum().isnan() else products


def _slope(tile: DenseTile, raw: Tensor | None = None) -> Tensor | None:
    """``m′`` of the soft cap at the logits before it."""
    return None if tile.loss.softcap is None else tile.loss.logit_map.slope(tile.z if raw is None else raw)


def _bend_ratio(tile: DenseTile, raw: Tensor) -> Tensor:
    """``m″/m′ = −(2/κ) tanh(z/κ)`` of the soft cap."""
    assert tile.loss.softcap is not None
    return torch.tanh(raw / tile.loss.softcap).mul_(-2 / tile.loss.softcap)


# --- second order, many columns --------------------------------------------------------------------------------------


def prepare(tile: DenseTile, matrix: str) -> None:
    """``z ← p``; the logits before their cap, ``q`` and ``m′ g`` go into the buffers that the tile has for them."""
    for _, part in tile.row_groups():
        terms = _terms(part, FIRST)
        if part.residual is not None:
            gradient, slope = _gradient(part, terms), _slope(part)
            part.residual.copy_(gradient if slope is None else gradient.mul_(slope))
        if part.q is not None:
            q = divergence_second_order(part.loss.divergence, matrix, terms.pair, part.number(SCORE))
            part.q.copy_(torch.where(terms.pair.p == 0, 0.0, q))
        if part.raw is not None:
            part.raw.copy_(part.z)
        part.z.copy_(terms.pair.p)


def accumulate_column(tile: DenseTile) -> Tensor:
    """Return ``Σ p v`` without the top, ``Σ q v`` and ``v`` at the top, ``(3, rows, 1)``, of ``v`` times ``m′``."""
    found = tile.z.new_zeros(3, len(tile.z), 1)
    for rows, part in tile.row_groups():
        assert part.v is not None
        slope = _slope(part, part.raw)
        v = part.v if slope is None else part.v * slope
        row, column = part.top_entries(MODEL)
        along = part.z * v
        along[row, column] = 0.0
        found[0, rows] = along.sum(-1, keepdim=True)
        if part.q is not None:
            found[1, rows] = torch.mul(part.q, v, out=along).sum(-1, keepdim=True)
        found[2, rows][row, 0] = v[row, column]
    return found


def multiply_column(tile: DenseTile, numbers: Tensor) -> None:
    """Form the product of a Hessian or Gauss-Newton matrix with a column: the only function of this backend that does.

    ``v ← m′ (q ⊙ u − p rest) + (m″/m′) (m′ g′) v`` with ``u = m′ v − mean``; ``numbers (4, rows, 1)`` are the mean,
    ``u`` at the top, ``rest``, and the factor of ``p`` that ``q`` is if the tile has no ``q``.
    """
    numbers = numbers.to(tile.z.dtype)
    for rows, part in tile.row_groups():
        v, (mean, at_top, rest, factor) = part.v, numbers[:, rows].unbind(0)
        assert v is not None
        slope, bend = _slope(part, part.raw), None
        if part.raw is not None and part.residual is not None:
            bend = _bend_ratio(part, part.raw).mul_(part.residual).mul_(v)
        if slope is not None:
            v.mul_(slope)
        u = _without_mean(v, mean, part, MODEL, at_top)
        if part.q is None:
            torch.mul(u.mul_(factor).sub_(rest), part.z, out=v)
        else:
            torch.mul(u, part.q, out=v).addcmul_(part.z, rest, value=-1)
        _back_through_cap(v, slope, bend)


def diagonal(tile: DenseTile, factor: Tensor, total: Tensor, complement: Tensor) -> None:
    """``v ← m′² (q (1 − p) − p (q − total p)) + (m″/m′) (m′ g′)``; ``complement`` is ``1 − p`` at the top."""
    factor, total, complement = (column.to(tile.z.dtype) for column in (factor, total, complement))
    for rows, part in tile.row_groups():
        assert part.v is not None
        p, slope, bend = part.z, _slope(part, part.raw), None
        q = factor[rows] * p if part.q is None else part.q
        others = 1 - p
        row, column = part.top_entries(MODEL)
        others[row, column] = complement[rows][row, 0]
        v = torch.mul(q, others, out=part.v).sub_((q - total[rows] * p).mul_(p))
        if slope is not None and part.raw is not None:
            v.mul_(slope)
            bend = None if part.residual is None else _bend_ratio(part, part.raw).mul_(part.residual)
        _back_through_cap(v, slope, bend)


def _back_through_cap(v: Tensor, slope: Tensor | None, bend: Tensor | None) -> None:
    if slope is not None:
        v.mul_(slope)
    if bend is not None:
        v.add_(bend)
