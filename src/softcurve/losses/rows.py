"""The losses of a row of logits in closed form, as frozen descriptions that hold no tensors.

A :class:`RowLoss` computes its value, its gradient and its Hessian product, with respect to the logits and the target,
in ``O(C)`` a row. :mod:`softcurve.losses.autograd` makes it differentiable.

The logits pass through a :class:`LogitMap` (soft cap, then temperature) first; the z-loss is on the log-sum-exp of what
the softmax sees. With ``z′ = m(z)``, ``g′`` and ``H′`` in ``z′``: ``g = m′ ⊙ g′`` and
``H v = m′ ⊙ H′(m′ ⊙ v) + m″ ⊙ g′ ⊙ v``.
"""

from __future__ import annotations

import functools
import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from softcurve import checks
from softcurve.array_types import Values
from softcurve.losses import fast_forms, softmax
from softcurve.losses.divergences import CrossEntropy, Divergence, Pair
from softcurve.losses.reduction import Reduction
from softcurve.losses.softmax import RowCurvature
from softcurve.losses.spec import LogitMap, LossSpec
from softcurve.typing import Number, ReductionKind

# The second-order matrices of a row's loss with respect to the mapped logits, the input of the softmax.
HESSIAN, GAUSS_NEWTON, FISHER = "hessian", "gauss_newton", "fisher"

Gradients = tuple[Tensor | None, Tensor | None]  # with respect to the logits and to the target
ValueAndGradients = tuple[Values, Tensor | None, Tensor | None]


@dataclass(frozen=True)
class RowLoss(ABC):
    """The loss of each row, with both derivatives. Half-precision inputs are computed in float32."""

    logit_map: LogitMap
    z_loss: float = 0.0

    # Each subclass implements the closed forms with respect to the mapped logits.

    @abstractmethod
    def loss(self, z: Tensor, target: Tensor) -> Values:
        """Return the value of each row."""

    @abstractmethod
    def residuals(self, scale: Tensor, z: Tensor, target: Tensor, wanted: tuple[bool, bool]) -> Gradients:
        """Return ``scale ⊙ ∂loss/∂z`` and ``scale ⊙ ∂loss/∂target`` where wanted."""

    def second_order(self, matrix: str, z: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """Return ``p`` and ``q`` of the matrix of each row, as in :class:`~softcurve.losses.softmax.RowCurvature`."""
        raise NotImplementedError(f"{type(self).__name__} has no {matrix} matrix by these means")

    @abstractmethod
    def products(self, z: Tensor, target: Tensor, v_z: Tensor | None, v_target: Tensor | None) -> Gradients:
        """Return the joint Hessian times a direction; ``None`` is a direction of zeros."""

    def value_and_residuals(self, z: Tensor, target: Tensor, wanted: tuple[bool, bool]) -> ValueAndGradients | None:
        """Return the value and the gradients that are ``wanted`` from the same passes, or ``None`` without any."""
        return None

    # The base class adds the map, the z-loss, the scale of the rows and the dtypes.

    def value(self, z: Tensor, target: Tensor) -> Values:
        """Return the loss of each row, in float32 or wider."""
        z, target = _widened(z, target)
        z, offset = self.logit_map.shifted_value(z)
        rows = self.loss(z, target)
        return rows + self.z_loss * (softmax.softmax_rows(z).log_sum_exp + offset).square() if self.z_loss else rows

    def gradient(self, scale: Tensor, z: Tensor, target: Tensor, wanted: tuple[bool, bool]) -> Gradients:
        """Return ``scale ⊙ ∂value`` in the inputs' dtypes; a row of scale 0 has gradient 0, whatever it holds."""
        wide_z, wide_target = _widened(z, target)
        mapped, offset = self.logit_map.shifted_value(wide_z)
        in_z, in_target = self._mapped_gradient(scale, mapped, offset, wide_target, wanted)
        if in_z is not None and not self.logit_map.is_identity:
            in_z = in_z * self.logit_map.slope(wide_z)
        return _rounded(scale, in_z, z.dtype), _rounded(scale, in_target, target.dtype)

    def _mapped_gradient(
        self, scale: Tensor, z: Tensor, offset: Tensor | float, target: Tensor, wanted: tuple[bool, bool]
    ) -> Gradients:
        """Return ``g′``: the residuals with the z-loss's ``2 λ lse p``."""
        in_z, in_target = self.residuals(scale, z, target, wanted)
        if self.z_loss and wanted[0]:
            rows = softmax.softmax_rows(z)
            factor = 2 * self.z_loss * scale * (rows.log_sum_exp + offset)
            in_z = total_of([in_z, factor.unsqueeze(-1) * rows.probabilities])
        return in_z, in_target

    def hessian_product(
        self, scale: Tensor, z: Tensor, target: Tensor, v_z: Tensor | None, v_target: Tensor | None
    ) -> Gradients:
        """Return ``scale ⊙ H v``, jointly in logits and target, in the inputs' dtypes."""
        wide_z, wide_target = _widened(z, target)
        mapped, offset = self.logit_map.shifted_value(wide_z)
        v_z = None if v_z is None else v_z.to(wide_z.dtype)
        v_target = None if v_target is None else v_target.to(wide_target.dtype)
        slope = None if self.logit_map.is_identity else self.logit_map.slope(wide_z)
        inner = v_z if v_z is None or slope is None else v_z * slope
        in_z, in_target = self.products(mapped, wide_target, inner, v_target)
        if self.z_loss and inner is not None:
            in_z = total_of([in_z, self._z_loss_product(mapped, offset, inner)])
        if in_z is not None and slope is not None:
            in_z = in_z * slope
        if inner is not None and self.logit_map.softcap is not None:
            gradient = self._differentiable_gradient(mapped, offset, wide_target)
            in_z = total_of([in_z, self.logit_map.bend_ratio(wide_z) * gradient * inner])
        column = scale.unsqueeze(-1)
        in_z, in_target = (None if part is None else column * part for part in (in_z, in_target))
        return _rounded(scale, in_z, z.dtype), _rounded(scale, in_target, target.dtype)

    def curvature(self, matrix: str, z: Tensor, target: Tensor) -> RowCurvature:
        """Return the Hessian, Gauss-Newton or Fisher matrix of each row with respect to the mapped logits ``z``.

        The Gauss-Newton matrix is the Hessian where the loss is convex in the logits (cross-entropy, forward KL);
        reverse KL and JS are convex in ``p``, and it is ``J φ″ J``. Of a z-loss it keeps
        ``2 λ (p pᵀ + max(lse, 0) J)``. The Fisher matrix is ``(Σy) J``; it depends on the model alone, not on a z-loss.
        """
        p, q = self.second_order(matrix, z, target)
        total = q.sum(-1, keepdim=True)
        if self.z_loss and matrix != FISHER:
            lse = softmax.softmax_rows(z).log_sum_exp.unsqueeze(-1)
            lse = lse if matrix == HESSIAN else lse.clamp(min=0)
            q, total = q + 2 * self.z_loss * lse * p, total + 2 * self.z_loss * (lse + 1)
        return RowCurvature(p, q, total)

    def _differentiable_gradient(self, z: Tensor, offset: Tensor | float, target: Tensor) -> Tensor:
        """Return ``g′`` with respect to the logits, as differentiable operations."""
        gradient, _ = self._mapped_gradient(z.new_ones(z.shape[:-1]), z, offset, target, (True, False))
        assert gradient is not None
        return gradient

    def _z_loss_product(self, z: Tensor, offset: Tensor | float, v: Tensor) -> Tensor:
        """Return ``2 λ [lse p ⊙ (v − p·v) + p (p·v)]``."""
        rows = softmax.softmax_rows(z)
        p = rows.probabilities
        mean = (p * v).sum(-1, keepdim=True)
        lse = (rows.log_sum_exp + offset).unsqueeze(-1)
        return 2 * self.z_loss * p * (lse * softmax.centred(v, p) + mean)


@dataclass(frozen=True)
class IndexCrossEntropy(RowLoss):
    """The cross-entropy ``−log p_t`` of class indices ``t``; with smoothing ``ε``, of ``(1−ε) y + ε/C``."""

    smoothing: float = 0.0

    def loss(self, z: Tensor, target: Tensor) -> Values:
        """Return the value by few passes where they are accurate, otherwise by the exact form."""
        at = target.unsqueeze(-1)
        if not fast_forms.serves(z, at):
            return self._exact_loss(z, at)
        sure: Tensor | None
        if self.smoothing:
            value, sure = fast_forms.smoothed_index_losses(self.smoothing, z, at)
        else:
            value, sure = fast_forms.index_losses(z, at)
        fast_forms.completed((value,), sure, lambda *rows: (self._exact_loss(*rows),), z, at)
        return value

    def _exact_loss(self, z: Tensor, at: Tensor) -> Values:
        """Return ``log Σ_k e^{z_k} − z_t`` as ``(m − z_t) + log Σ_k e^{z_k − m}``, two terms ≥ 0."""
        _, at_target, others, gap = softmax.around_target(z, at)
        rows = (gap + torch.where(gap == 0, torch.log1p(others), torch.log(others + at_target))).squeeze(-1)
        if not self.smoothing:
            return rows
        row = softmax.softmax_rows(z)
        mean = torch.log1p(row.rest).squeeze(-1) - row.shifted.mean(-1)
        return (1 - self.smoothing) * rows + self.smoothing * mean

    def value_and_residuals(self, z: Tensor, target: Tensor, wanted: tuple[bool, bool]) -> ValueAndGradients | None:
        """Return value and gradient by few passes, if they are accurate in every row."""
        if not self.logit_map.is_identity or self.z_loss or not fast_forms.serves(z, target):
            return None
        at = target.unsqueeze(-1)
        if self.smoothing:
            both = fast_forms.smoothed_losses_and_residuals(self.smoothing, z, at)
        else:
            both = fast_forms.index_losses_and_residuals(z, at)
        return None if both is None else (both[0].squeeze(-1), both[1], None)

    def residuals(self, scale: Tensor, z: Tensor, target: Tensor, wanted: tuple[bool, bool]) -> Gradients:
        """Return ``scale (p − y)`` by few passes where they are accurate, otherwise by the exact form."""
        at = target.unsqueeze(-1)
        if not fast_forms.serves(z, scale, at):
            return self._exact_residual(scale, z, at), None
        residual, sure = fast_forms.index_residuals(scale, z, at, self.smoothing)
        fast_forms.completed((residual,), sure, lambda *rows: (self._exact_residual(*rows),), scale, z, at)
        return residual, None

    def _exact_residual(self, scale: Tensor, z: Tensor, at: Tensor) -> Tensor:
        """Return ``scale (p − y)``; at the target ``−Σ_{k≠t} (p_k − ε/C)``, or 0 if the target is masked."""
        exponentials, at_target, others, gap = softmax.around_target(z, at)
        factor = scale.unsqueeze(-1) / (others + at_target)
        residual, of_target = exponentials * factor, -factor * others
        if self.smoothing:
            share = scale.unsqueeze(-1) * (self.smoothing / z.shape[-1])
            residual, of_target = residual - share, of_target + (z.shape[-1] - 1) * share
        return residual.scatter_(-1, at, torch.where(gap == math.inf, 0.0, of_target))

    def second_order(self, matrix: str, z: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """Return ``q = p`` for every matrix."""
        p = softmax.softmax_rows(z).probabilities
        return p, p

    def _differentiable_gradient(self, z: Tensor, offset: Tensor | float, target: Tensor) -> Tensor:
        share = self.smoothing / z.shape[-1]
        y = torch.full_like(z, share).scatter(-1, target.unsqueeze(-1), 1 - self.smoothing + share)
        return DenseCrossEntropy(self.logit_map, self.z_loss)._differentiable_gradient(z, offset, y)

    def products(self, z: Tensor, target: Tensor, v_z: Tensor | None, v_target: Tensor | None) -> Gradients:
        """Return ``p ⊙ (v − p·v)``; the target has no derivative."""
        return None if v_z is None else softmax.jacobian_product(z, v_z), None


@dataclass(frozen=True)
class DenseCrossEntropy(RowLoss):
    """The cross-entropy ``−Σ_k y_k log p_k`` of rows ``y ≥ 0`` of any sum, also differentiable in ``y``."""

    def loss(self, z: Tensor, target: Tensor) -> Values:
        """Return the value by few passes where they are accurate, otherwise by the exact form."""
        if not fast_forms.serves(z, target):
            return self._exact_loss(z, target)
        value, sure = fast_forms.dense_losses(z, target)
        fast_forms.completed((value,), sure, lambda *rows: (self._exact_loss(*rows),), z, target)
        return value

    def _exact_loss(self, z: Tensor, target: Tensor) -> Values:
        """Return ``(Σ_k y_k) log1p(rest) + Σ_k y_k (m − z_k)``, two sums of terms ≥ 0."""
        rows = softmax.softmax_rows(z)
        from_top = (target * rows.shifted).sum(-1)
        if not checks.values_visible(from_top) or from_top.isnan().any():
            from_top = torch.where(target == 0, 0.0, target * rows.shifted).sum(-1)  # 0 · log 0 = 0
        return target.sum(-1) * torch.log1p(rows.rest).squeeze(-1) - from_top

    def value_and_residuals(self, z: Tensor, target: Tensor, wanted: tuple[bool, bool]) -> ValueAndGradients | None:
        """Return the value and the gradient in ``z`` from the same exponentials, if every row is finite."""
        plain = self.logit_map.is_identity and not self.z_loss and z.dtype == target.dtype
        if not plain or wanted[1] or not fast_forms.serves(z, target):
            return None
        value, residual, sure = fast_forms.dense_losses_and_residuals(z, target)

        def exact(z: Tensor, target: Tensor) -> Gradients:
            return self._exact_loss(z, target), softmax.dense_residual(z.new_ones(z.shape[:-1]), z, target)

        fast_forms.completed((value, residual), sure, exact, z, target)
        return (value, residual, None) if math.isfinite(value.sum().item()) else None

    def residuals(self, scale: Tensor, z: Tensor, target: Tensor, wanted: tuple[bool, bool]) -> Gradients:
        """Return ``scale [(Σ_k y_k) p − y]`` and ``−scale log p``, which is 0 where a masked class has no mass."""
        in_z, in_target = self._residual(scale, z, target) if wanted[0] else None, None
        if wanted[1]:
            log_p = softmax.softmax_rows(z).log_probabilities
            if softmax.may_be_masked(z):
                log_p = torch.where((z == -math.inf) & (target == 0), 0.0, log_p)
            in_target = -scale.unsqueeze(-1) * log_p
        return in_z, in_target

    @staticmethod
    def _residual(scale: Tensor, z: Tensor, target: Tensor) -> Tensor:
        if not fast_forms.serves(z, scale, target):
            return softmax.dense_residual(scale, z, target)
        residual, sure = fast_forms.dense_residuals(scale, z, target)
        fast_forms.completed((residual,), sure, lambda *rows: (softmax.dense_residual(*rows),), scale, z, target)
        return residual

    def second_order(self, matrix: str, z: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """Return ``q = (Σy) p`` for every matrix."""
        p = softmax.softmax_rows(z).probabilities
        return p, target.sum(-1, keepdim=True) * p

    def products(self, z: Tensor, target: Tensor, v_z: Tensor | None, v_target: Tensor | None) -> Gradients:
        """Return ``(Σy) p ⊙ u + (Σẏ) p − ẏ`` for the logits, ``−u`` for the target, with ``u = v − p·v``."""
        p = softmax.softmax_rows(z).probabilities
        in_z, in_target = None, None
        if v_z is not None:
            u = softmax.centred(v_z, p)
            in_z, in_target = target.sum(-1, keepdim=True) * p * u, softmax.unless_masked(z, -u)
        if v_target is not None:
            v_target = softmax.unless_masked(z, v_target)
            in_z = total_of([in_z, v_target.sum(-1, keepdim=True) * p - v_target])
        return in_z, in_target


@dataclass(frozen=True)
class LogitDivergence(RowLoss):
    """A separable divergence ``D(y, p)`` of two distributions given by logits, differentiable in both."""

    divergence: Divergence = field(kw_only=True)

    def loss(self, z: Tensor, target: Tensor) -> Values:
        """Return the value by few passes where they are accurate, otherwise by the exact form."""
        if not (fast_forms.compares(self.divergence) and fast_forms.serves(z, target)):
            return self._exact_loss(z, target)
        forms = fast_forms.divergence_forms(self.divergence, None, z, target, (False, False), wants_value=True)
        assert forms.value is not None
        fast_forms.completed((forms.value,), forms.sure, lambda *rows: (self._exact_loss(*rows),), z, target)
        return forms.value

    def _exact_loss(self, z: Tensor, target: Tensor) -> Values:
        return softmax.term_of(self.divergence, "value", softmax.pair(z, target))

    def residuals(self, scale: Tensor, z: Tensor, target: Tensor, wanted: tuple[bool, bool]) -> Gradients:
        """Return the gradients by few passes where they are accurate, otherwise by the exact form."""
        if not (fast_forms.compares(self.divergence) and fast_forms.serves(z, scale, target)):
            return self._exact_residuals(scale, z, target, wanted)
        forms = fast_forms.divergence_forms(self.divergence, scale, z, target, wanted, wants_value=False)
        exact = functools.partial(self._exact_residuals, wanted=wanted)
        fast_forms.completed((forms.in_z, forms.in_target), forms.sure, exact, scale, z, target)
        return forms.in_z, forms.in_target

    def value_and_residuals(self, z: Tensor, target: Tensor, wanted: tuple[bool, bool]) -> ValueAndGradients | None:
        """Return value and gradients by few passes where they are accurate, otherwise by the exact form.

        A row that is not finite may have no part in the loss, which the gradient must know.
        """
        plain = self.logit_map.is_identity and fast_forms.compares(self.divergence)
        if not plain or z.dtype != target.dtype or not fast_forms.serves(z, target):
            return None
        forms = fast_forms.divergence_forms(self.divergence, None, z, target, wanted, wants_value=True)
        assert forms.value is not None

        def exact(z: Tensor, target: Tensor) -> ValueAndGradients:
            ones = z.new_ones(z.shape[:-1])
            return self._exact_loss(z, target), *self._exact_residuals(ones, z, target, wanted)

        fast_forms.completed((forms.value, forms.in_z, forms.in_target), forms.sure, exact, z, target)
        return (forms.value, forms.in_z, forms.in_target) if math.isfinite(forms.value.sum().item()) else None

    def _exact_residuals(self, scale: Tensor, z: Tensor, target: Tensor, wanted: tuple[bool, bool]) -> Gradients:
        pair, column, gradient = softmax.pair(z, target), scale.unsqueeze(-1), softmax.divergence_gradient
        in_z, in_target = None, None
        if wanted[0]:
            in_z = softmax.unless_masked(z, column * gradient(self.divergence, pair))
        if wanted[1]:
            exchanged = gradient(self.divergence.exchanged(), pair.exchanged())
            in_target = softmax.unless_masked(target, column * exchanged)
        return in_z, in_target

    def second_order(self, matrix: str, z: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """Return ``q = c − p S``, or ``p² φ″ = c − s`` for Gauss-Newton unless the loss is convex in the logits."""
        pair = softmax.pair(z, target)
        return pair.p, divergence_second_order(self.divergence, matrix, pair)

    def products(self, z: Tensor, target: Tensor, v_z: Tensor | None, v_target: Tensor | None) -> Gradients:  # noqa: D102
        pair = softmax.pair(z, target)
        zeros = torch.zeros_like(pair.p)
        u_z = zeros if v_z is None else softmax.centred(v_z, pair.p)
        u_y = zeros if v_target is None else softmax.centred(v_target, pair.y)
        product = softmax.divergence_hessian_product
        return (
            softmax.unless_masked(z, product(self.divergence, pair, u_z, u_y)),
            softmax.unless_masked(target, product(self.divergence.exchanged(), pair.exchanged(), u_y, u_z)),
        )


@dataclass(frozen=True)
class Entropy(RowLoss):
    """The entropy ``H(p)``, which does not depend on the target."""

    def loss(self, z: Tensor, target: Tensor) -> Values:  # noqa: D102
        return softmax.entropy_rows(z)

    def residuals(self, scale: Tensor, z: Tensor, target: Tensor, wanted: tuple[bool, bool]) -> Gradients:
        """Return ``∂H/∂z = −p ⊙ (log p + H)``, times the scale."""
        rows = softmax.softmax_rows(z)
        p = rows.probabilities
        return -scale.unsqueeze(-1) * p * softmax.centred(softmax.finite_log(rows), p), None

    def products(self, z: Tensor, target: Tensor, v_z: Tensor | None, v_target: Tensor | None) -> Gradients:
        """Return ``−p ⊙ [u ⊙ (log p + H + 1) − Σ_k p_k log p_k u_k]`` with ``u = v − p·v``."""
        if v_z is None:
            return None, None
        rows = softmax.softmax_rows(z)
        p = rows.probabilities
        u, information = softmax.centred(v_z, p), softmax.centred(softmax.finite_log(rows), p)
        return -p * (u * (information + 1) - (p * information * u).sum(-1, keepdim=True)), None


def cross_entropy_options(*options: Any) -> tuple[Reduction, IndexCrossEntropy]:
    """Return the reduction and the loss of class indices for the options that ``_checked_options`` lists.

    Most calls have the options of the one before. Numbers in tensors may change, so only plain ones are remembered.
    """
    if torch.compiler.is_compiling() or not _PLAIN.issuperset(map(type, options)):
        return _checked_options(*options)
    return _remembered_options(*options)


def _checked_options(
    reduction: ReductionKind, base: Number, temperature: Number, softcap: Number | None, z_loss: Number,
    label_smoothing: Number,
) -> tuple[Reduction, IndexCrossEntropy]:  # fmt: skip
    reducer = Reduction.of(reduction, base)
    loss = LossSpec.of(CrossEntropy(), reducer, temperature, softcap, z_loss, label_smoothing)
    return reducer, IndexCrossEntropy(LogitMap(loss.temperature, loss.softcap), loss.z_loss, loss.smoothing)


_PLAIN = frozenset((int, float, str, type(None)))
_remembered_options = functools.lru_cache(64)(_checked_options)


def divergence_second_order(divergence: Divergence, matrix: str, pair: Pair, score: Tensor | None = None) -> Tensor:
    """Return ``q`` of a divergence's matrix on some classes of a row; on all of them if no ``score`` ``S`` is given."""
    if matrix == FISHER or divergence.hessian_is_fisher:
        return pair.p
    if matrix == GAUSS_NEWTON:
        return softmax.term_of(divergence, "curve", pair) - softmax.term_of(divergence, "score", pair)
    score = softmax.term_of(divergence, "score", pair).sum(-1, keepdim=True) if score is None else score
    return softmax.term_of(divergence, "curve", pair) - pair.p * score


def _widened(z: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Return logits and a floating-point target in their common dtype, at least float32."""
    if not target.is_floating_point():
        return checks.widened(z), target
    dtype = checks.wide_dtype(z.dtype, target.dtype)
    return z.to(dtype), target.to(dtype)


def _rounded(scale: Tensor, rows: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """Round rows to ``dtype``; a row of scale 0 is exactly 0, also where a factor is NaN."""
    if rows is None:
        return None
    if not checks.values_visible(scale) or not scale.all():
        rows = torch.where(scale.unsqueeze(-1) == 0, 0.0, rows)
    return rows.to(dtype)


def total_of(terms: Sequence[Tensor | None]) -> Tensor | None:
    """Return the sum of the terms that are not ``None``; ``None`` if there are none."""
    present = [term for term in terms if term is not None]
    return sum(present[1:], start=present[0]) if present else None
