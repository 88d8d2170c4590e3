"""The generalised Gauss-Newton matrix of a network's loss."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Literal

import torch
from torch import Tensor

from softcurve import checks
from softcurve.curvature.algorithms.nystrom import nystrom_preconditioner
from softcurve.curvature.kfac import FactorForm, KroneckerFactors, StreamedClassFactor
from softcurve.curvature.network import BatchRows, NetworkOperator, Parts
from softcurve.head.curvature import add_products
from softcurve.head.products import Direction
from softcurve.head.tensors import RowLosses
from softcurve.losses.rows import GAUSS_NEWTON


class JacobianSandwich(NetworkOperator):
    """``Σ_i Jᵢᵀ Bᵢ Jᵢ`` with the Jacobian ``J`` of the softmax's input and a positive semidefinite ``B``."""

    is_positive = True
    matrix = GAUSS_NEWTON

    def _add_products(self, rows: BatchRows, columns: Tensor, sums: Sequence[Direction]) -> Sequence[Parts]:
        add_products(rows.losses, self.matrix, self.network.directions(rows, columns)[0], sums)
        return ()

    def kfac(self, *, form: FactorForm = "auto", rank: int = 128, seed: int = 0) -> KroneckerFactors:
        """Return the Kronecker factors of the head's block; see :meth:`softcurve.curvature.HeadCurvature.kfac`."""
        network, head = self.network, self.network.head
        total = sum(rows.divisor for rows in network.rows("Rows", graph=False))

        def batches() -> Iterable[RowLosses]:
            return (rows.losses for rows in network.rows("Kronecker factors", graph=False))

        scale = 1 / network.divisor(total)
        factor = StreamedClassFactor(batches, self.matrix, scale, head.weight, network.sum_data_shards)
        return KroneckerFactors.of(factor, has_bias=head.bias is not None, form=form, rank=rank, seed=seed)

    def preconditioner(
        self, damping: float, *, kind: Literal["auto", "kronecker", "nystrom"] = "auto", products: int = 16,
        form: FactorForm = "auto", rank: int = 128, seed: int = 0,
    ) -> Callable[[Tensor], Tensor]:  # fmt: skip
        """Return a preconditioner for :meth:`solve`: near ``(A + damping I)⁻¹``, symmetric and positive definite.

        ``"kronecker"``: ``(B ⊗ A + damping I)⁻¹`` of :meth:`kfac` (``form``, ``rank``) on the head, and on each other
        parameter ``1 / (mean of its diagonal + damping)``, estimated from ``products`` random products. It is by far
        the better one where only the head is trained, but may cost iterations where the features are trained too.
        ``"nystrom"``: for all parameters, from ``products`` random products; it holds as many vectors.
        ``"auto"``: the former where the whole head is trained and nothing else, otherwise the latter.

        Raises ``ValueError`` for ``"kronecker"`` where the head's weight is frozen or tied, or only its bias is frozen,
        because the factors are those of both.
        """
        checks.require_positive("damping", damping)
        checks.require_choice("kind", kind, ("auto", "kronecker", "nystrom"))
        checks.require_count("products", products, 1)
        checks.require_count("seed", seed, 0)
        layout, weight, bias = self.layout, self.layout.head_weight, self.layout.head_bias
        frozen_bias = self.network.head.bias is not None and bias is None
        if kind == "auto":
            only_head = not layout.of_features and weight is not None and not frozen_bias
            kind = "kronecker" if only_head else "nystrom"
        if kind == "nystrom":
            return nystrom_preconditioner(self, rank=products, damping=damping, seed=seed)
        if weight is None or weight in layout.of_features:
            raise ValueError("head must have a weight of its own that is trained, got one that is frozen or tied")
        if frozen_bias:
            raise ValueError("head must be trained whole, got a bias that is frozen; unfreeze it, or leave it out")
        factors = self.kfac(form=form, rank=rank, seed=seed)
        elsewhere = (self._mean_diagonals(products, seed) + damping).unsqueeze(-1)

        def apply(columns: Tensor) -> Tensor:
            rows, solved = columns.T.contiguous(), (columns / elsewhere).T.contiguous()
            for row, into in zip(rows, solved, strict=True):
                in_bias = None if bias is None else layout.view(row, bias)
                in_weight, in_bias = factors.solve(layout.view(row, weight), in_bias, damping=damping)
                layout.view(into, weight).copy_(in_weight)
                if bias is not None and in_bias is not None:
                    layout.view(into, bias).copy_(in_bias)
            return solved.T

        return apply

    def _mean_diagonals(self, products: int, seed: int) -> Tensor:
        """Return the mean of the diagonal over each parameter of the features, by Hutchinson's estimate; head: 0."""
        generator = torch.Generator().manual_seed(seed)
        parts = [self.layout.slices[number] for number in self.layout.of_features]
        probes = torch.zeros(self.layout.size, products, dtype=self.dtype, device=self.device)
        for part in parts:
            probes[part] = (torch.randint(2, probes[part].shape, generator=generator) * 2 - 1).to(probes)
        means = (probes * (self @ probes)).mean(1) if parts else probes[:, 0]
        for part in parts:
            means[part] = means[part].mean().clamp(min=0)
        return means


class GGN(JacobianSandwich):
    """``Σ_i Jᵢᵀ Bᵢ Jᵢ`` of the mean loss: the Hessian without the second derivatives of the network.

    ``J`` is the Jacobian of the softmax's input, after soft cap and temperature. Where the loss is convex in that
    (cross-entropy, forward KL) ``B`` is its Hessian ``(Σy) (diag(p) − p pᵀ)``, and the matrix is the Fisher. Reverse KL
    and JS are convex in the probabilities instead, and ``B = J_p diag(φ″) J_p`` with the softmax's ``J_p``: again
    ``diag(p) − p pᵀ`` for reverse KL. A :class:`~softcurve.TopK` with a bucket is compared outcome by outcome, the
    bucket being one of them. Of a z-loss ``2 λ (p pᵀ + max(lse, 0) J_p)`` is kept. So the matrix is positive
    semidefinite for every loss, and equals the Hessian of the loss with respect to the logits at ``p = y``.

    Arguments and errors are those of :class:`~softcurve.curvature.Hessian`. Source: Schraudolph 2002,
    "Fast curvature matrix-vector products for second-order gradient descent".
    """
