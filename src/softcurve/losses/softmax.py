"""The softmax of a row: log-sum-exp, Jacobian products, and the pull-back of a loss through it.

Everything here costs ``O(C)`` a row. The one rule of rounding: a row's largest class is kept apart. With ``m = max z``
at class ``top`` and ``rest = Σ_{k≠top} e^{z_k − m}``, ``log p_k = (z_k − m) − log1p(rest)`` and
``1 − p_top = rest/(1 + rest)`` have no subtraction that cancels, however confident the row and however large a common
offset of its logits.
"""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from softcurve.array_types import Column, Float, Rows, Values
from softcurve.checks import values_visible
from softcurve.losses.divergences import Divergence, Pair


class SoftmaxRows(NamedTuple):
    """A softmax with its largest class apart; ``offset`` and ``rest`` keep a last dimension of 1."""

    shifted: Rows  # z − m
    exponentials: Rows  # e^{z − m}
    offset: Column  # m
    rest: Column  # Σ_{k≠top} e^{z_k − m}

    @property
    def probabilities(self) -> Rows:
        """The probabilities ``p``."""
        return self.exponentials / (1 + self.rest)

    @property
    def log_probabilities(self) -> Rows:
        """The log-probabilities, each with a small relative error."""
        return self.shifted - torch.log1p(self.rest)

    @property
    def log_sum_exp(self) -> Values:
        """The log-sum-exp ``log Σ_k e^{z_k}``."""
        return (self.offset + torch.log1p(self.rest)).squeeze(-1)


def softmax_rows(z: Rows) -> SoftmaxRows:
    """Return the softmax of each row of logits ``z``; a row without a finite class gives NaN."""
    offset = z.amax(-1, keepdim=True)
    shifted = z - offset
    exponentials = torch.exp(shifted)
    total = exponentials.sum(-1, keepdim=True)
    # The largest class is an exact 1, which the fractional part drops: no index is needed. Two of them make total ≥ 2.
    rest = torch.where(total < 2, torch.frac(exponentials).sum(-1, keepdim=True), total - 1)
    if feels_rounding(rest):
        exponentials = compensated(exponentials, z, offset)
        rest = torch.where(total < 2, torch.frac(exponentials).sum(-1, keepdim=True), rest)
    return SoftmaxRows(shifted, exponentials, offset, rest)


def feels_rounding(rest: Column) -> bool:
    """Return whether a row is so confident that the rounding of ``z − m`` (half an ulp of 32) affects ``rest``."""
    return rest.dtype == torch.float32 and (not values_visible(rest) or bool((rest < 1e-9).any()))


def compensated(exponentials: Rows, z: Rows, offset: Column) -> Rows:
    """Return ``e^{z − m}`` from its value at the rounded difference, whose exact error is Knuth's two-sum."""
    z, offset = z.detach(), offset.detach()
    shifted = z - offset
    back = shifted - z
    error = (z - (shifted - back)) - (offset + back)
    return exponentials + exponentials * torch.where(shifted == -math.inf, 0.0, error)


def log_complement(log_probs: Float[Tensor, "*rows k"]) -> Column:
    """Return ``log(1 − Σ_k e^{l_k})``, the largest apart as ``1 − e^l = −expm1(l)``, or −inf if nothing is left."""
    at = log_probs.argmax(-1, keepdim=True)
    rest = -torch.expm1(log_probs.gather(-1, at)) - log_probs.exp().scatter(-1, at, 0.0).sum(-1, keepdim=True)
    return torch.where(rest > 0, torch.where(rest > 0, rest, 1.0).log(), -math.inf)


def log_sum_exp(z: Rows) -> Column:
    """Return the log-sum-exp, with derivatives of 0 for a row of −inf only, where torch's second one is NaN."""
    top = z.detach().amax(-1, keepdim=True)
    top = torch.where(top == -math.inf, 0.0, top)
    total = (z - top).exp().sum(-1, keepdim=True)
    return torch.where(total > 0, top + torch.where(total > 0, total, 1.0).log(), -math.inf)


def jacobian(z: Rows) -> Float[Tensor, "*rows classes classes"]:
    """Return ``J = diag(p) − p pᵀ``, its diagonal as ``p_i Σ_{j≠i} p_j``: ``J 1 = 0`` also for a confident row."""
    p = torch.softmax(z, -1)
    off_diagonal = -p.unsqueeze(-1) * p.unsqueeze(-2) * (1 - torch.eye(z.shape[-1], dtype=p.dtype, device=p.device))
    return off_diagonal - torch.diag_embed(off_diagonal.sum(-1))


def jacobian_product(z: Rows, vector: Rows) -> Rows:
    """Return ``J v = p ⊙ (v − p·v)``, symmetric: also ``Jᵀ v``."""
    p = torch.softmax(z, -1)
    return p * centred(vector, p)


def centred(v: Rows, p: Rows) -> Rows:
    """Return ``v − p·v``, taken from ``v_top`` on, so that a confident row's largest class does not cancel."""
    from_top = v - v.gather(-1, p.argmax(-1, keepdim=True))
    return from_top - (p * from_top).sum(-1, keepdim=True)


def unless_masked(z: Rows, values: Tensor) -> Rows:
    """Return ``values``, but 0 at a masked class, where a formula may contain ``0 · ∞``."""
    return torch.where(z == -math.inf, 0.0, values) if may_be_masked(z) else values


def may_be_masked(z: Tensor) -> bool:
    """Return whether a logit may be −inf; the check is cheaper than ``where``, which costs several exponentials."""
    return not values_visible(z) or z.numel() == 0 or not z.amin() > -math.inf  # beside NaN too


def around_target(z: Tensor, at: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return ``e^{z − m}`` with 0 at the target, ``e^{z_t − m}``, ``Σ_{k≠t} e^{z_k − m}`` and ``m − z_t``.

    It writes into its temporaries for speed, so autograd must not record it.
    """
    offset = z.amax(-1, keepdim=True)
    shifted = z - offset
    gap = -shifted.gather(-1, at)
    in_place = not torch.compiler.is_compiling()  # a compiled graph is differentiated, and fused anyway
    exponentials = shifted.exp_() if in_place else shifted.exp()
    at_target = exponentials.gather(-1, at)
    exponentials = exponentials.scatter_(-1, at, 0.0) if in_place else exponentials.scatter(-1, at, 0.0)
    others = exponentials.sum(-1, keepdim=True)
    if feels_rounding(others):
        exponentials = compensated(exponentials, z, offset)
        others = exponentials.sum(-1, keepdim=True)
    return exponentials, at_target, others, gap


def dense_residual(scale: Values, z: Rows, y: Rows) -> Rows:
    """Return ``scale [(Σ_k y_k) p − y]``.

    The row sums to 0; what it misses of that is the rounding error of a class above one half, which takes it up.
    """
    rows, scale = softmax_rows(z), scale.unsqueeze(-1)
    factor = scale * y.sum(-1, keepdim=True) / (1 + rows.rest)
    residual = torch.addcmul(rows.exponentials * factor, y, -scale)
    surplus = torch.where(rows.rest < 1, residual.sum(-1, keepdim=True), 0.0)
    return unless_masked(z, torch.addcmul(residual, torch.trunc(rows.exponentials), -surplus))


# --- a separable divergence of two softmaxes -------------------------------------------------------------------------


def pair(z_p: Rows, z_y: Rows) -> Pair:
    """Return both softmaxes and their log-ratio, with a small relative error even where the two nearly agree.

    The log-ratio comes from the *difference of the logits*, exact for near-equal ones (Sterbenz), and its constant from
    ``Σ_k (p_k − y_k) = 0``, which a difference of two rounded log-sum-exps would satisfy only to an ulp of ``log C``.
    """
    model, target = softmax_rows(z_p), softmax_rows(z_y)
    offset = model.offset - target.offset
    ratio = torch.where(offset.abs() < 1, (z_p - z_y) - offset, model.shifted - target.shifted)
    ratio = ratio - (torch.log1p(model.rest) - torch.log1p(target.rest))
    both_masked = (z_p == -math.inf) & (z_y == -math.inf)
    ratio = torch.where(both_masked, 0.0, ratio)
    p, y = model.probabilities, target.probabilities
    near = torch.where(ratio.abs() < 0.5, y * torch.expm1(ratio.clamp(-0.5, 0.5)), p - y)
    constant = torch.log1p(near.sum(-1, keepdim=True)).detach()
    return Pair(p, y, torch.where(both_masked, ratio, ratio - constant), near - constant * p)


def term_of(divergence: Divergence, name: Literal["value", "score", "curve", "cross"], pair: Pair) -> Tensor:
    """Return what a method of a member gives, and raise ``ValueError`` for a shape that would only broadcast."""
    term: Tensor = getattr(divergence, name)(pair)
    shape = pair.log_ratio.shape[:-1] if name == "value" else pair.log_ratio.shape
    if term.shape != shape:
        what = "one number per row, the sum over the last dimension" if name == "value" else "one entry per class"
        raise ValueError(
            f"{type(divergence).__name__}.{name} must return {what}: shape {tuple(shape)} for a pair of shape "
            f"{tuple(pair.log_ratio.shape)}, got {tuple(term.shape)}"
        )
    return term


def divergence_gradient(divergence: Divergence, pair: Pair) -> Rows:
    """Return ``∂D/∂z_p = s − p Σ_k s_k``.

    Where ``Σ s`` is infinite it is the limit: ``+inf`` at classes with mass that the target excludes and ``−inf`` at
    those of the target without mass, if their ``s`` is infinite, and the opposite at the others with mass.
    """
    score = term_of(divergence, "score", pair)
    total = score.sum(-1, keepdim=True)
    infinite = total.isinf()
    limit = torch.where(score.isinf(), score, torch.where(pair.p > 0, -total, 0.0))
    gradient = score - pair.p * total
    # As in dense_residual, a class above one half takes up what the row misses of its sum of 0.
    surplus = torch.where(infinite, 0.0, gradient.sum(-1, keepdim=True))
    return torch.where(infinite, limit, torch.where(pair.p > 0.5, gradient - surplus, gradient))


def divergence_hessian_product(divergence: Divergence, pair: Pair, u_p: Rows, u_y: Rows) -> Rows:
    """Return the change of ``∂D/∂z_p``: ``ṡ − p Σṡ − (p ⊙ u_p) Σs`` for ``ṡ = c ⊙ u_p + x ⊙ u_y``."""
    change = term_of(divergence, "curve", pair) * u_p + term_of(divergence, "cross", pair) * u_y
    total = term_of(divergence, "score", pair).sum(-1, keepdim=True)
    return change - pair.p * change.sum(-1, keepdim=True) - pair.p * u_p * total


class RowCurvature(NamedTuple):
    """The matrix ``B = diag(q) − q pᵀ − p qᵀ + total p pᵀ``, the form of all second-order matrices of softmax losses.

    With ``total = Σq`` this is ``J diag(q ⊘ p²) J``: the Hessian for ``q = c − p S``, the Fisher for ``q = p``.
    A z-loss adds ``2 λ (p pᵀ + lse J)``.
    """

    p: Rows
    q: Rows
    total: Column

    def product(self, v: Rows) -> Rows:
        """Return ``B v = q ⊙ u − p (q·u) + (total − Σq) p (p·v)`` with ``u = v − p·v``."""
        u = centred(v, self.p)
        surplus = self.total - self.q.sum(-1, keepdim=True)
        along = (self.q * u).sum(-1, keepdim=True) - surplus * (self.p * v).sum(-1, keepdim=True)
        return self.q * u - self.p * along

    def diagonal(self) -> Rows:
        """Return ``q (1 − 2p) + total p²``."""
        return self.q * (1 - 2 * self.p) + self.total * self.p.square()


def entropy_rows(z: Rows) -> Values:
    """Return ``H(p) = −Σ_k p_k log p_k``, a sum of terms ≥ 0."""
    rows = softmax_rows(z)
    return -(rows.probabilities * finite_log(rows)).sum(-1)


def collision_rows(z: Rows, within: Rows | float = 0.0) -> Values:
    """Return ``log Σ_k p_k² w_k``, where ``within`` is ``log w ≤ 0``: 0, unless a class stands for several others."""
    rows = softmax_rows(z)
    squares = softmax_rows(2 * rows.shifted + within)
    return squares.log_sum_exp - 2 * torch.log1p(rows.rest).squeeze(-1)


def finite_log(rows: SoftmaxRows) -> Tensor:
    """Return ``log p``, with 0 in place of −inf, which is only multiplied by ``p = 0``."""
    return unless_masked(rows.shifted, rows.log_probabilities)
