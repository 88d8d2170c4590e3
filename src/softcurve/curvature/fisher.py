"""The Fisher matrices of a network: exact, by sampled classes, and the empirical one."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from softcurve.array_types import Float
from softcurve.curvature.ggn import JacobianSandwich
from softcurve.curvature.losses import Loss, Reduction
from softcurve.curvature.network import Batch, NetworkOperator, Rows
from softcurve.head.curvature import add_outer_products
from softcurve.head.per_row import row_masses, sample_classes
from softcurve.head.tensors import RowLosses
from softcurve.losses.divergences import CrossEntropy
from softcurve.losses.rows import FISHER
from softcurve.typing import Integer, Number


class Fisher(JacobianSandwich):
    """``Σ_i m_i E_{k∼p_i}[∇log p_ik ∇log p_ikᵀ] = Σ_i m_i Jᵢᵀ (diag(p) − p pᵀ) Jᵢ`` of the model's own distribution.

    ``m_i`` is the row's weight in the reduced loss times the mass of its target, so that it is the Gauss-Newton matrix
    of the cross-entropy. The z-loss has no part in it.

    Args:
        samples: ``None`` for the exact expectation; else so many classes drawn for each row, whose outer products have
            this matrix as their mean. They depend on ``seed``, the batch's number and the batch alone.

    The other arguments and errors are those of :class:`~softcurve.curvature.Hessian`.
    Source: Martens 2020, "New insights and perspectives on the natural gradient method".
    """

    matrix = FISHER

    def __init__(
        self,
        features: nn.Module,
        head: nn.Linear,
        data: Iterable[Batch],
        *,
        samples: int | None = None,
        loss: Loss = "cross_entropy",
        beta: Number = 0.5,
        weight: Float[Tensor, " classes"] | None = None,
        ignore_index: Integer | None = None,
        label_smoothing: Number = 0.0,
        temperature: Number = 1.0,
        softcap: Number | None = None,
        z_loss: Number = 0.0,
        shift: Integer = 0,
        reduction: Reduction = "mean",
        base: Number = math.e,
        memory_budget: Integer | None = None,
        seed: int = 0,
        progress: bool = False,
        process_group: ProcessGroup | None = None,
        check_deterministic: bool = True,
    ) -> None:
        if samples is not None and (isinstance(samples, bool) or not isinstance(samples, int) or samples < 1):
            raise ValueError(f"samples must be a positive int, or None for the exact matrix, got {samples!r}")
        self.samples = samples
        super().__init__(
            features, head, data, loss=loss, beta=beta, weight=weight, ignore_index=ignore_index,
            label_smoothing=label_smoothing, temperature=temperature, softcap=softcap, z_loss=z_loss, shift=shift,
            reduction=reduction, base=base, memory_budget=memory_budget, seed=seed, progress=progress,
            process_group=process_group, check_deterministic=check_deterministic,
        )  # fmt: skip

    @property
    def by_order(self) -> bool:
        """Each batch has classes of its own, drawn by its number."""
        return self.samples is not None

    def _add(self, rows: Rows, columns: Tensor, into: Tensor) -> None:
        if self.samples is None:
            super()._add(rows, columns, into)
            return
        t = rows.losses.tensors
        generator = torch.Generator().manual_seed(self.seed_of("classes", rows.number))
        uniforms = torch.rand(len(t.input), self.samples, generator=generator, dtype=torch.float64)
        classes = sample_classes(rows.losses, uniforms.to(t.input.device))
        loss = replace(rows.losses.loss, divergence=CrossEntropy(), target="sparse", z_loss=0.0, smoothing=0.0)
        mass = t.row_weight * row_masses(rows.losses) / self.samples
        bare = t._replace(target=None, target_weight=None, target_bias=None, class_weight=None)
        draws = [
            rows.losses._replace(loss=loss, tensors=bare._replace(indices=drawn.unsqueeze(-1)))
            for drawn in classes.unbind(-1)
        ]
        add_outer(self, rows, draws, mass, columns, into)


class EmpiricalFisher(NetworkOperator):
    """``Σ_i ∇ℓ_i ∇ℓ_iᵀ / m_i`` with each row's own gradient, at the target; not the Fisher, but the gradients' moment.

    ``m_i`` is what the row's weights and its target's mass add up to, so that a weight counts once, as if the row came
    so many times: ``Σ_i m_i ∇ℓ̂_i ∇ℓ̂_iᵀ`` of losses ``ℓ_i = m_i ℓ̂_i``. They
    are in nats, and ``base`` divides the matrix once, as it does the others. Positions of a sequence are rows. A row
    whose class has the weight 0 is left out, also where a z-loss leaves it a gradient.

    Arguments and errors are those of :class:`~softcurve.curvature.Hessian`.
    Source: Kunstner, Balles, Hennig 2019, "Limitations of the empirical Fisher approximation".
    """

    is_positive = True

    def _add(self, rows: Rows, columns: Tensor, into: Tensor) -> None:
        mass = row_masses(rows.losses)
        factor = torch.where(mass > 0, rows.losses.tensors.row_weight / mass, 0.0)
        add_outer(self, rows, [rows.losses], factor, columns, into)


def add_outer(
    operator: NetworkOperator,
    rows: Rows,
    losses: Sequence[RowLosses],
    factor: Tensor,
    columns: Tensor,
    into: Tensor,
) -> None:
    """``into += Σ_i factor_i ∇ℓ_i (∇ℓ_i · column)`` for each of the losses of the same rows."""
    changes = None
    if rows.e.requires_grad:
        u, h = operator.linearized(rows, torch.zeros_like(rows.e))
        changes = [operator.pushed_forward(u, h, v, second=False)[0] for v in columns]
    sums, directions = operator.sums(rows, into, rows.losses.tensors.dtype), operator.along(columns, changes)
    for each in losses:
        add_outer_products(each, factor, directions, sums)
    operator.add_pulled_back(rows, [each.input for each in sums], into)
