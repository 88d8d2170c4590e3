"""The Fisher matrix of a network, exact or by sampled classes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Unpack

import torch
from torch import Tensor, nn

from softcurve.curvature.ggn import JacobianSandwich
from softcurve.curvature.losses import NetworkOptions, with_options_of
from softcurve.curvature.network import Batch, BatchRows, NetworkOperator, Parts
from softcurve.head.curvature import add_outer_products
from softcurve.head.per_row import row_masses, sample_classes
from softcurve.head.products import Direction
from softcurve.losses.divergences import CrossEntropy
from softcurve.losses.rows import FISHER


class Fisher(JacobianSandwich):
    """``Σ_i m_i E_{k∼p_i}[∇log p_ik ∇log p_ikᵀ] = Σ_i m_i Jᵢᵀ (diag(p) − p pᵀ) Jᵢ`` of the model's own distribution.

    ``m_i`` is the row's weight in the reduced loss times the mass of its target, so that the matrix is the Gauss-Newton
    matrix of the cross-entropy. The z-loss has no part in it.

    Args:
        samples: ``None`` for the exact expectation, or the number of classes drawn for each row, whose outer products
            have this matrix as their mean. They depend only on ``seed``, the batch's number and the batch.

    The other arguments and errors are those of :class:`~softcurve.curvature.Hessian`.
    Source: Martens 2020, "New insights and perspectives on the natural gradient method".
    """

    matrix = FISHER

    @with_options_of(NetworkOperator)
    def __init__(
        self, features: nn.Module, head: nn.Linear, data: Iterable[Batch], *, samples: int | None = None,
        **options: Unpack[NetworkOptions],
    ) -> None:  # fmt: skip
        if samples is not None and (isinstance(samples, bool) or not isinstance(samples, int) or samples < 1):
            raise ValueError(f"samples must be a positive int, or None for the exact matrix, got {samples!r}")
        self.samples = samples
        self.depends_on_order = samples is not None  # the classes are drawn by the batch's number
        super().__init__(features, head, data, **options)

    def _add_products(self, rows: BatchRows, columns: Tensor, sums: Sequence[Direction]) -> Sequence[Parts]:
        if self.samples is None:
            return super()._add_products(rows, columns, sums)
        t = rows.losses.tensors
        generator = torch.Generator().manual_seed(self.network.random_seed("classes", rows.number))
        uniforms = torch.rand(len(t.input), self.samples, generator=generator, dtype=torch.float64)
        classes = sample_classes(rows.losses, uniforms.to(t.input.device))
        loss = replace(rows.losses.loss, divergence=CrossEntropy(), target="sparse", z_loss=0.0, smoothing=0.0)
        mass = t.row_weight * row_masses(rows.losses) / self.samples
        bare = t._replace(target=None, target_weight=None, target_bias=None, class_weight=None)
        directions = self.network.directions(rows, columns)[0]
        for drawn in classes.unbind(-1):
            losses = rows.losses._replace(loss=loss, tensors=bare._replace(indices=drawn.unsqueeze(-1)))
            add_outer_products(losses, mass, directions, sums)
        return ()
