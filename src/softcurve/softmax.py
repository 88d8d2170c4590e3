"""The softmax of a row: log-sum-exp, Jacobian products, and the pull-back of a loss through it.

Everything here costs ``O(C)`` a row. The one rule of rounding: a row's largest class is kept apart. With ``m = max z`` at
class ``top`` and ``rest = Σ_{k≠top} e^{z_k − m}``, ``log p_k = (z_k − m) − log1p(rest)`` and ``1 − p_top = rest/(1 + rest)``
have no subtraction that cancels, however confident the row and however large a common offset of its logits.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from softcurve.divergences import Divergence, Pair


class SoftmaxRows(NamedTuple):
    """A softmax with its largest class apart; ``offset`` and ``rest`` keep a last dimension of 1."""

    shifted: Float[Tensor, "*rows classes"]  # z − m
    exponentials: Float[Tensor, "*rows classes"]  # e^{z − m}
    top: Int[Tensor, "*rows 1"]
    offset: Float[Tensor, "*rows 1"]  # m
    rest: Float[Tensor, "*rows 1"]  # Σ_{k≠top} e^{z_k − m}

    @property
    def probabilities(self) -> Float[Tensor, "*rows classes"]:
        """``p``."""
        return self.exponentials / (1 + self.rest)

    @property
    def log_probabilities(self) -> Float[Tensor, "*rows classes"]:
        """``log p``, each entry right relatively."""
        return self.shifted - torch.log1p(self.rest)

    @property
    def log_sum_exp(self) -> Float[Tensor, "*rows"]:
        """``log Σ_k e^{z_k}``."""
        return (self.offset + torch.log1p(self.rest)).squeeze(-1)


def softmax_rows(z: Float[Tensor, "*rows classes"]) -> SoftmaxRows:
    """The softmax of each row of logits ``z``. A row without a finite class gives NaN."""
    offset, top = z.max(-1, keepdim=True)
    shifted = z - offset
    exponentials = torch.exp(shifted)
    rest = exponentials.scatter(-1, top, 0.0).sum(-1, keepdim=True)
    return SoftmaxRows(shifted, exponentials, top, offset, rest)


def jacobian(z: Float[Tensor, "*rows classes"]) -> Float[Tensor, "*rows classes classes"]:
    """``J = diag(p) − p pᵀ``, its diagonal as ``p_i Σ_{j≠i} p_j``, so that ``J 1 = 0`` also for a confident row."""
    p = torch.softmax(z, -1)
    off_diagonal = -p.unsqueeze(-1) * p.unsqueeze(-2) * (1 - torch.eye(z.shape[-1], dtype=p.dtype, device=p.device))
    return off_diagonal - torch.diag_embed(off_diagonal.sum(-1))


def jacobian_product(
    z: Float[Tensor, "*rows classes"], vector: Float[Tensor, "*rows classes"]
) -> Float[Tensor, "*rows classes"]:
    """``J v = p ⊙ (v − p·v)``, symmetric: also ``Jᵀ v``."""
    p = torch.softmax(z, -1)
    return p * centred(vector, p, z.argmax(-1, keepdim=True))


def centred(
    v: Float[Tensor, "*rows classes"], p: Float[Tensor, "*rows classes"], top: Int[Tensor, "*rows 1"]
) -> Float[Tensor, "*rows classes"]:
    """``v − p·v``, taken from ``v_top`` on, so that a confident row's own entry is the small sum that it is."""
    from_top = v - v.gather(-1, top)
    return from_top - (p * from_top).sum(-1, keepdim=True)


# --- cross-entropy against one class ---------------------------------------------------------------------------------


def index_loss(z: Float[Tensor, "*rows classes"], target: Int[Tensor, "*rows"]) -> Float[Tensor, "*rows"]:
    """``log Σ_k e^{z_k} − z_t`` as ``(m − z_t) + log Σ_k e^{z_k − m}``: two terms ≥ 0, ``log1p`` where ``t`` is the top."""
    at = target.unsqueeze(-1)
    shifted, own, others = _around_target(z, at)
    gap = -shifted.gather(-1, at)
    return (gap + torch.where(gap == 0, torch.log1p(others), torch.log(others + own))).squeeze(-1)


def index_residual(
    z: Float[Tensor, "*rows classes"], target: Int[Tensor, "*rows"]
) -> Float[Tensor, "*rows classes"]:
    """``p − y`` for one-hot ``y``; at the target ``−Σ_{k≠t} p_k``, and 0 where the target itself is masked."""
    at = target.unsqueeze(-1)
    shifted, own, others = _around_target(z, at)
    total = others + own
    at_target = torch.where(own == 0, -_unmasked(z.gather(-1, at)), -others / total)
    return (torch.exp(shifted) / total).scatter(-1, at, at_target)


def _around_target(z: Tensor, at: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """``z − m``, ``e^{z_t − m}`` and ``Σ_{k≠t} e^{z_k − m}``."""
    shifted = z - z.amax(-1, keepdim=True)
    exponentials = torch.exp(shifted)
    own = exponentials.gather(-1, at)
    return shifted, own, exponentials.scatter(-1, at, 0.0).sum(-1, keepdim=True)


def _unmasked(z: Tensor) -> Tensor:
    """1 where a logit is above −inf (or NaN, which must stay visible), else 0."""
    return (z != -math.inf).to(z.dtype)


# --- cross-entropy against a distribution ----------------------------------------------------------------------------


def dense_loss(
    z: Float[Tensor, "*rows classes"], y: Float[Tensor, "*rows classes"]
) -> Float[Tensor, "*rows"]:
    """``−Σ_k y_k log p_k``, a sum of terms ≥ 0; ``y`` of any mass."""
    log_p = softmax_rows(z).log_probabilities
    return -torch.where(y == 0, torch.zeros_like(log_p), y * log_p).sum(-1)


def dense_residual(
    z: Float[Tensor, "*rows classes"], y: Float[Tensor, "*rows classes"]
) -> Float[Tensor, "*rows classes"]:
    """``(Σ_k y_k) p − y``; a class above one half is minus the sum of the others, as the row sums to 0."""
    rows = softmax_rows(z)
    residual = y.sum(-1, keepdim=True) * rows.probabilities - y
    from_others = -residual.scatter(-1, rows.top, 0.0).sum(-1, keepdim=True)
    at_top = torch.where(rows.rest < 1, from_others, residual.gather(-1, rows.top))
    return torch.where(z == -math.inf, torch.zeros_like(z), residual.scatter(-1, rows.top, at_top))


def dense_target_gradient(
    z: Float[Tensor, "*rows classes"], y: Float[Tensor, "*rows classes"]
) -> Float[Tensor, "*rows classes"]:
    """``∂L/∂y = −log p``; 0 where a masked class has no mass, as it has no part in the loss."""
    log_p = softmax_rows(z).log_probabilities
    return torch.where((z == -math.inf) & (y == 0), torch.zeros_like(log_p), -log_p)


# --- a separable divergence of two softmaxes -------------------------------------------------------------------------


def pair(z_p: Float[Tensor, "*rows classes"], z_y: Float[Tensor, "*rows classes"]) -> Pair:
    """Both softmaxes and their log-ratio, right relatively even where the two nearly agree.

    The log-ratio comes from the *difference of the logits*, exact for near-equal ones (Sterbenz), and its constant from
    ``Σ_k (p_k − y_k) = 0``, which a difference of two rounded log-sum-exps would satisfy only to an ulp of ``log C``.
    """
    model, target = softmax_rows(z_p), softmax_rows(z_y)
    offset = model.offset - target.offset
    ratio = torch.where(offset.abs() < 1, (z_p - z_y) - offset, model.shifted - target.shifted)
    both_masked = (z_p == -math.inf) & (z_y == -math.inf)
    ratio = torch.where(both_masked, torch.zeros_like(ratio), ratio) - (
        torch.log1p(model.rest) - torch.log1p(target.rest)
    )
    ratio = torch.where(both_masked, torch.zeros_like(ratio), ratio)
    p, y = model.probabilities, target.probabilities
    near = torch.where(ratio.abs() < 0.5, y * torch.expm1(ratio.clamp(-0.5, 0.5)), p - y)
    constant = torch.log1p(near.sum(-1, keepdim=True)).detach()
    return Pair(p, y, torch.where(both_masked, ratio, ratio - constant), near - constant * p)


def divergence_gradient(divergence: Divergence, pair: Pair) -> Float[Tensor, "*rows classes"]:
    """``∂D/∂z_p = s − p Σ_k s_k``.

    Where ``Σ s`` is ``+inf`` (mass on a class that the target excludes) it is the limit: ``+inf`` at those classes, ``−inf`` at
    the others with mass.
    """
    score = divergence.score(pair)
    total = score.sum(-1, keepdim=True)
    limit = torch.where(score == math.inf, score, torch.where(pair.p > 0, -math.inf, 0.0).to(score.dtype))
    return torch.where(total == math.inf, limit, score - pair.p * total)


def divergence_hessian_product(
    divergence: Divergence, pair: Pair, u_p: Float[Tensor, "*rows classes"], u_y: Float[Tensor, "*rows classes"]
) -> Float[Tensor, "*rows classes"]:
    """The change of ``∂D/∂z_p`` along centred directions: ``ṡ − p Σṡ − (p ⊙ u_p) Σs`` with ``ṡ = c ⊙ u_p + x ⊙ u_y``."""
    change = divergence.curve(pair) * u_p + divergence.cross(pair) * u_y
    total = divergence.score(pair).sum(-1, keepdim=True)
    return change - pair.p * change.sum(-1, keepdim=True) - pair.p * u_p * total


# --- entropy ---------------------------------------------------------------------------------------------------------


def entropy_rows(z: Float[Tensor, "*rows classes"]) -> Float[Tensor, "*rows"]:
    """``H(p) = −Σ_k p_k log p_k``, a sum of terms ≥ 0."""
    rows = softmax_rows(z)
    return -(rows.probabilities * _finite_log(rows)).sum(-1)


def entropy_gradient(z: Float[Tensor, "*rows classes"]) -> Float[Tensor, "*rows classes"]:
    """``∂H/∂z = −p ⊙ (log p + H)``."""
    rows = softmax_rows(z)
    p, log_p = rows.probabilities, _finite_log(rows)
    return -p * centred(log_p, p, rows.top)


def entropy_hessian_product(
    z: Float[Tensor, "*rows classes"], v: Float[Tensor, "*rows classes"]
) -> Float[Tensor, "*rows classes"]:
    """``−p ⊙ [u ⊙ (log p + H + 1) − Σ_k p_k log p_k u_k]`` with ``u = v − p·v``."""
    rows = softmax_rows(z)
    p = rows.probabilities
    u, information = centred(v, p, rows.top), centred(_finite_log(rows), p, rows.top)
    return -p * (u * (information + 1) - (p * information * u).sum(-1, keepdim=True))


def _finite_log(rows: SoftmaxRows) -> Tensor:
    """``log p``, with 0 in place of −inf: only ever multiplied by its ``p = 0``."""
    log_p = rows.log_probabilities
    return torch.where(rows.shifted == -math.inf, torch.zeros_like(log_p), log_p)
