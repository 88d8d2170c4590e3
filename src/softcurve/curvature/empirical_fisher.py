"""The empirical Fisher matrix of a network: the second moment of the rows' gradients at their targets."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from softcurve.curvature.network import BatchRows, NetworkOperator, Parts
from softcurve.head.curvature import add_outer_products
from softcurve.head.per_row import row_masses
from softcurve.head.products import Direction


class EmpiricalFisher(NetworkOperator):
    """``Σ_i ∇ℓ_i ∇ℓ_iᵀ / m_i`` with each row's own gradient at its target: the gradients' moment, not the Fisher.

    ``m_i`` is the sum of the row's weights and its target's mass, so that a weight counts once, as if the row occurred
    that many times: ``Σ_i m_i ∇ℓ̂_i ∇ℓ̂_iᵀ`` of losses ``ℓ_i = m_i ℓ̂_i``. The losses are in nats, and ``base`` divides
    the matrix once, as it does the others. Positions of a sequence are rows. A row whose class has the weight 0 is left
    out, also where a z-loss leaves it a gradient.

    Arguments and errors are those of :class:`~softcurve.curvature.Hessian`.
    Source: Kunstner, Balles, Hennig 2019, "Limitations of the empirical Fisher approximation".
    """

    is_positive = True

    def _add_products(self, rows: BatchRows, columns: Tensor, sums: Sequence[Direction]) -> Sequence[Parts]:
        mass = row_masses(rows.losses)
        factor = torch.where(mass > 0, rows.losses.tensors.row_weight / mass, 0.0)
        add_outer_products(rows.losses, factor, self.network.directions(rows, columns)[0], sums)
        return ()
