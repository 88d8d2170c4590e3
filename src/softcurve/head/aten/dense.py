"""The tile functions of :class:`softcurve.head.dense.DenseKernel` in ATen.

:mod:`softcurve.head.triton.dense` has the same functions. They work on groups of rows that stay in the cache, and leave
logits as they are until :func:`residuals` writes over them. Two softmaxes are compared, the model's and the target's;
``side`` says which of them a function is about.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from softcurve.checks import values_visible
from softcurve.head.aten import dense_terms as pairs
from softcurve.head.aten.dense_terms import MODEL, TARGET, DenseSums, DenseTile
from softcurve.head.aten.sparse import slope_and_bend, through_cap
from softcurve.losses.rows import divergence_second_order
from softcurve.losses.softmax import term_of, unless_masked

__all__ = ["accumulate_column", "changes", "diagonal", "multiply_column", "prepare", "residuals", "softmax", "sums"]

# --- statistics of a row ---------------------------------------------------------------------------------------------


def softmax(tile: DenseTile, side: int, *, wants_place: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Return each row's largest logit, ``Σ e^{z − max}`` without one class that has it, and that class's column.

    Without ``wants_place`` the column is −1 in a row whose largest class has at most half of the mass.
    """
    found = tile.z.new_empty(2, len(tile.z), 1)
    place = torch.full((len(tile.z), 1), -1, dtype=torch.int64, device=tile.z.device)
    for rows, part in tile.row_groups():
        z = pairs.map_logits(part) if side == MODEL else pairs.target_logits(part)
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


def sums(tile: DenseTile, *, wants_loss: bool, wants_stats: bool, wants_curve: bool) -> tuple[DenseSums, Tensor]:
    """Return the sums over the block's classes, and the column of the target's largest entry."""
    found = DenseSums(*tile.z.new_zeros(len(DenseSums._fields), len(tile.z), 1))
    label = torch.zeros((len(tile.z), 1), dtype=torch.int64, device=tile.z.device)
    for rows, part in tile.row_groups():
        pair, log_p, y, model, target = pairs.terms_of(part)
        (v, target_v), with_target = _directions(part), part.is_by_logits
        if part.knows_scores:
            found.score[rows], found.score_rest[rows] = pairs.sum_and_rest(part, MODEL, model.score())
            if part.wants_target and with_target:
                found.target_score[rows], found.target_score_rest[rows] = pairs.sum_and_rest(
                    part, TARGET, target.score()
                )
        if wants_loss and pair is None:
            found.value[rows] = -pairs.weighted(y, log_p).sum(-1, keepdim=True)
        elif wants_loss and pair is not None:
            found.value[rows] = term_of(part.loss.divergence, "value", pair).unsqueeze(-1)
            found.surplus[rows] = pair.difference.sum(-1, keepdim=True)
        if wants_curve and (curve := model.curve()) is not None:
            found.curve[rows] = curve.sum(-1, keepdim=True)
        if v is not None:
            found.mean_v[rows], found.top_v[rows] = _mean_without_top(part, MODEL, model.p(), v)
        if target_v is not None and with_target:
            mean_and_top = _mean_without_top(part, TARGET, target.p(), target_v)
            found.target_mean_v[rows], found.target_top_v[rows] = mean_and_top
        if wants_stats:
            found.entropy[rows] = -pairs.weighted(model.p(), log_p).sum(-1, keepdim=True)
            found.square[rows] = pairs.sum_and_rest(part, MODEL, model.p().square())[1]
            found.best[rows], label[rows] = part.target.max(-1, keepdim=True)
    return found, label


def changes(tile: DenseTile) -> tuple[Tensor, Tensor]:
    """Return ``Σ c ⊙ u + x ⊙ u_y`` of both sides."""
    found = tile.z.new_zeros(2, len(tile.z), 1)
    for rows, part in tile.row_groups():
        terms, (u, u_y) = pairs.terms_of(part), _centred(part, *_directions(part))
        found[MODEL, rows] = _change_of_score(terms.model, u, u_y).sum(-1, keepdim=True)
        if part.wants_target and part.is_by_logits:
            found[TARGET, rows] = _change_of_score(terms.target, u_y, u).sum(-1, keepdim=True)
    return found[MODEL], found[TARGET]


def _mean_without_top(tile: DenseTile, side: int, p: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Return ``Σ p v`` over all classes but the top, and ``v`` at the top."""
    top, (row, column) = torch.zeros_like(p[:, :1]), tile.top_entries(side)
    top[row, 0] = v[row, column]
    return pairs.sum_and_rest(tile, side, pairs.weighted(p, v))[1], top


# --- derivatives -----------------------------------------------------------------------------------------------------


def residuals(tile: DenseTile, *, wants_tangents: bool) -> Tensor | None:
    """Form ∂L/∂z, ∂L/∂target and their changes along a direction: the only function of this backend that does.

    They are multiplied by the rows' weights and written into the tile's ``out``, ``v_out`` etc., which may be ``z`` and
    ``v`` themselves. Returns the change of each row's loss, ``(rows, 1)``, if it is wanted.
    """
    tangents = tile.z.new_zeros(len(tile.z), 1) if wants_tangents else None
    for rows, part in tile.row_groups():
        weight, slope, terms = part.number(pairs.WEIGHT), pairs.slope_of(part), pairs.terms_of(part)
        gradient, in_target = pairs.gradient_of(part, terms), _target_gradient(part, terms)
        if part.v is not None:
            v, target_v = _directions(part)
            u, u_y = _centred(part, v, target_v)
            if tangents is not None:
                tangents[rows] = _inner(gradient, v) + _inner(in_target, target_v)
            product = _product(part, terms, u, u_y)
            if slope is not None and v is not None:
                product.mul_(slope).addcmul_(part.loss.logit_map.bend_ratio(part.z).mul_(v), gradient)
            if in_target is not None and part.target_v_out is not None:
                _write(part.target_v_out, _target_product(part, terms, in_target, u, u_y), weight)
            _write(part.v_out, product, weight)
        if in_target is not None and part.target_out is not None:
            _write(part.target_out, _through_target(part, in_target), weight)
        _write(part.out, gradient if slope is None else gradient.mul_(slope), weight)
    return tangents


def _target_gradient(tile: DenseTile, terms: pairs.Terms) -> Tensor | None:
    """Return ∂L/∂t for the target's logits ``t``, or ∂L/∂y for probabilities ``y`` that no softmax has made."""
    if not tile.wants_target or not tile.is_by_logits:
        return terms.target.score() if tile.wants_target else None
    return unless_masked(tile.target, pairs.pulled_back(tile, TARGET, terms.target))


def _product(tile: DenseTile, terms: pairs.Terms, u: Tensor, u_y: Tensor | None) -> Tensor:
    """Return the change of :func:`~softcurve.head.aten.dense_terms.gradient_of`."""
    product, z_loss = _pulled_back_change(tile, MODEL, terms.model, u, u_y), tile.loss.z_loss
    if z_loss:
        mean = tile.number(pairs.MEAN_V)
        product.addcmul_(terms.model.p(), (tile.number(pairs.LSE) * u).add_(mean), value=2 * z_loss)
    return unless_masked(tile.z, product)


def _target_product(tile: DenseTile, terms: pairs.Terms, in_target: Tensor, u: Tensor, u_y: Tensor | None) -> Tensor:
    """Return the change of the gradient with respect to the target as the caller gave it."""
    if tile.is_by_logits:
        change = unless_masked(tile.target, _pulled_back_change(tile, TARGET, terms.target, u_y, u))
    else:
        change = _change_of_score(terms.target, u_y, u)
    product = _through_target(tile, change)
    if tile.takes_logarithm and tile.target_v is not None:
        bend = in_target * tile.target_v / tile.target.square()
        product = product - torch.where(tile.target > 0, bend, 0.0) * tile.target_scale
    return product


def _pulled_back_change(tile: DenseTile, side: int, of: pairs.Side, u: Tensor | None, u_other: Tensor | None) -> Tensor:
    """Return ``ṡ − p Σṡ − p ⊙ u S`` with ``ṡ = c ⊙ u + x ⊙ u_other``."""
    product = _change_of_score(of, u, u_other).addcmul_(of.p(), tile.number(pairs.CHANGE, side), value=-1)
    return product if u is None else product.addcmul_(of.p() * u, tile.number(pairs.SCORE, side), value=-1)


def _change_of_score(of: pairs.Side, u: Tensor | None, u_other: Tensor | None) -> Tensor:
    """Return ``ṡ = c ⊙ u + x ⊙ u_other``."""
    curve = None if u is None else of.curve()
    change = torch.zeros_like(of.p()) if u is None or curve is None else curve * u
    cross = None if u_other is None else of.cross()
    return change if cross is None or u_other is None else change.addcmul_(cross, u_other)


def _directions(tile: DenseTile) -> tuple[Tensor | None, Tensor | None]:
    """Return the changes of what the softmax sees, and of the target's logits (or of plain probabilities)."""
    v, slope = tile.v, None if tile.v is None else pairs.slope_of(tile)
    v = v if v is None or slope is None else v * slope
    return v, None if tile.target_v is None else _through_target(tile, tile.target_v)


def _centred(tile: DenseTile, v: Tensor | None, target_v: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Return ``u = v − p·v`` of both sides, and the change itself of probabilities that no softmax has made."""
    assert v is not None
    if target_v is not None and tile.is_by_logits:
        target_v = pairs.without_mean(
            target_v, tile.number(pairs.MEAN_V, TARGET), tile, TARGET, tile.number(pairs.TOP_U, TARGET)
        )
    return pairs.without_mean(v, tile.number(pairs.MEAN_V), tile, MODEL, tile.number(pairs.TOP_U)), target_v


def _through_target(tile: DenseTile, values: Tensor) -> Tensor:
    """Return ``values`` times the derivative of the target's logits with respect to what the caller gave."""
    if tile.takes_logarithm:
        values = torch.where(tile.target > 0, values / tile.target, 0.0)
    return values if tile.target_scale == 1 else values * tile.target_scale


def _inner(gradient: Tensor | None, v: Tensor | None) -> Tensor | float:
    return 0.0 if gradient is None or v is None else (gradient * v).sum(-1, keepdim=True)


def _write(out: Tensor | None, values: Tensor, weight: Tensor) -> None:
    """Set ``out ← weight ⊙ values``, and exactly 0 in a row of weight 0, where ``0 · NaN`` may stand."""
    assert out is not None
    torch.mul(values, weight, out=out)
    if not values_visible(weight) or not weight.all():
        out.masked_fill_(weight == 0, 0.0)


# --- second order, for many columns that share a softmax --------------------------------------------------------------


def prepare(tile: DenseTile, matrix: str) -> None:
    """Set ``z ← p``, and the tile's buffers, if there are any, to the logits before their cap, ``q`` and ``m′ g``."""
    for _, part in tile.row_groups():
        terms = pairs.terms_of(part)
        if part.residual is not None:
            gradient, slope = pairs.gradient_of(part, terms), pairs.slope_of(part)
            part.residual.copy_(gradient if slope is None else gradient.mul_(slope))
        if part.q is not None:
            assert terms.pair is not None
            q = divergence_second_order(part.loss.divergence, matrix, terms.pair, part.number(pairs.SCORE))
            part.q.copy_(torch.where(terms.model.p() == 0, 0.0, q))
        if part.raw is not None:
            part.raw.copy_(part.z)
        part.z.copy_(terms.model.p())


def accumulate_column(tile: DenseTile) -> Tensor:
    """Return ``Σ p v`` without the top, ``Σ q v`` and ``v`` at the top, ``(3, rows, 1)``, of ``v`` times ``m′``."""
    found = tile.z.new_zeros(3, len(tile.z), 1)
    for rows, part in tile.row_groups():
        assert part.v is not None
        slope = pairs.slope_of(part, part.raw)
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

    It sets ``v ← m′ (q ⊙ u − p rest) + (m″/m′) (m′ g′) v`` with ``u = m′ v − mean``; ``numbers (4, rows, 1)`` are the
    mean, ``u`` at the top, ``rest``, and the factor of ``p`` that ``q`` is if the tile has no ``q``.
    """
    numbers = numbers.to(tile.z.dtype)
    for rows, part in tile.row_groups():
        v, (mean, at_top, rest, factor) = part.v, numbers[:, rows].unbind(0)
        assert v is not None
        slope, bend = slope_and_bend(part, part.loss.logit_map)
        bend = None if bend is None else bend.mul_(v)
        if slope is not None:
            v.mul_(slope)
        u = pairs.without_mean(v, mean, part, MODEL, at_top)
        if part.q is None:
            torch.mul(u.mul_(factor).sub_(rest), part.z, out=v)
        else:
            torch.mul(u, part.q, out=v).addcmul_(part.z, rest, value=-1)
        through_cap(v, slope, bend)


def diagonal(tile: DenseTile, factor: Tensor, total: Tensor, complement: Tensor) -> None:
    """Set ``v ← m′² (q (1 − p) − p (q − total p)) + (m″/m′) (m′ g′)``; ``complement`` is ``1 − p`` at the top."""
    factor, total, complement = (column.to(tile.z.dtype) for column in (factor, total, complement))
    for rows, part in tile.row_groups():
        assert part.v is not None
        p, (slope, bend) = part.z, slope_and_bend(part, part.loss.logit_map)
        q = factor[rows] * p if part.q is None else part.q
        others = 1 - p
        row, column = part.top_entries(MODEL)
        others[row, column] = complement[rows][row, 0]
        v = torch.mul(q, others, out=part.v).sub_((q - total[rows] * p).mul_(p))
        through_cap(v, None if slope is None else slope.square_(), bend)
