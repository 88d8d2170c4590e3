"""The generalised Gauss-Newton matrix of a network's loss."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Literal

import torch
from torch import Tensor

from softcurve import checks
from softcurve.curvature.kfac import Form, KroneckerFactors, one_a_class, preconditioner
from softcurve.curvature.network import NetworkOperator, Rows
from softcurve.curvature.nystrom import NystromPreconditioner
from softcurve.curvature.operator import require_count
from softcurve.head.curvature import add_products
from softcurve.head.tensors import RowLosses
from softcurve.losses.rows import GAUSS_NEWTON


class JacobianSandwich(NetworkOperator):
    """``Σ_i Jᵢᵀ Bᵢ Jᵢ`` with the Jacobian ``J`` of what the softmax sees and a positive semidefinite ``B``."""

    is_positive = True
    matrix = GAUSS_NEWTON

    def _add(self, rows: Rows, columns: Tensor, into: Tensor) -> None:
        changes = None
        if rows.e.requires_grad:
            u, h = self.linearized(rows, torch.zeros_like(rows.e))
            changes = [self.pushed_forward(u, h, v, second=False)[0] for v in columns]
        sums = self.sums(rows, into, rows.losses.tensors.dtype)
        add_products(rows.losses, self.matrix, self.along(columns, changes), sums)
        self.add_pulled_back(rows, [each.input for each in sums], into)

    def kfac(self, *, form: Form = "auto", rank: int = 128, seed: int = 0) -> KroneckerFactors:
        """The Kronecker factors of the head's block; see :meth:`softcurve.curvature.HeadCurvature.kfac`."""

        def batches() -> Iterator[RowLosses]:
            for rows in self.rows("Kronecker factors", graph=False):
                yield rows.losses

        total = sum(float(rows.posed.divisor(self.losses.reducer)) for rows in self.rows("Rows", graph=False))
        total = 1.0 if self.losses.reduction == "sum" else self.over_rows(total)
        return KroneckerFactors.of(
            batches,
            self.matrix,
            1 / self._divisor(total),
            one_a_class(self.head.weight),
            width=self.head.in_features,
            has_bias=self.head.bias is not None,
            form=form,
            rank=rank,
            seed=seed,
            summed=self.summed,
        )

    def preconditioner(
        self,
        damping: float,
        *,
        kind: Literal["auto", "kronecker", "nystrom"] = "auto",
        products: int = 16,
        form: Form = "auto",
        rank: int = 128,
        seed: int = 0,
    ) -> Callable[[Tensor], Tensor]:
        """For :meth:`solve`: near ``(A + damping I)⁻¹``, symmetric and positive definite.

        ``"kronecker"``: ``(B ⊗ A + damping I)⁻¹`` of :meth:`kfac` (``form``, ``rank``) on the head; on each other
        parameter ``1 / (mean of its diagonal + damping)``, estimated from ``products`` random products. By far the
        better one where the head alone is trained, which may cost iterations where the features are trained with it.
        ``"nystrom"``: of all parameters, from ``products`` random products, of which it holds as many vectors.
        ``"auto"``: the former where the head is trained whole and nothing else is, otherwise the latter.

        Raises ``ValueError`` where ``"kronecker"`` is asked for and the head's weight is frozen or tied, or its bias
        alone is frozen: the factors are of both.
        """
        checks.require_positive("damping", damping)
        checks.require_choice("kind", kind, ("auto", "kronecker", "nystrom"))
        require_count("products", products, 1)
        require_count("seed", seed, 0)
        layout, head = self.layout, self.head
        alone = not layout.of_features and layout.head_weight is not None
        if kind == "auto":
            kind = "kronecker" if alone and (head.bias is None or layout.head_bias is not None) else "nystrom"
        if kind == "nystrom":
            like = torch.empty(layout.size, dtype=self.dtype, device=self.device)
            return NystromPreconditioner(self.__matmul__, like, rank=products, damping=damping, seed=seed)
        if layout.head_weight is None or layout.head_weight in layout.of_features:
            raise ValueError("head must have a weight of its own that is trained, got one that is frozen or tied")
        if head.bias is not None and layout.head_bias is None:
            raise ValueError("head must be trained whole, got a bias that is frozen; unfreeze it, or leave it out")
        generator = torch.Generator().manual_seed(seed)
        probes = torch.zeros(layout.size, products, dtype=self.dtype, device=self.device)
        elsewhere = torch.full_like(probes[:, 0], damping)
        if layout.of_features:
            for number in layout.of_features:
                part = probes[layout.slices[number]]
                part.copy_(torch.randint(2, part.shape, generator=generator) * 2 - 1)
            entries = (probes * (self @ probes)).mean(1)
            for number in layout.of_features:
                elsewhere[layout.slices[number]] += entries[layout.slices[number]].mean().clamp(min=0)
        bias = None if layout.head_bias is None else layout.slices[layout.head_bias]
        factors = self.kfac(form=form, rank=rank, seed=seed)
        return preconditioner(factors, damping, layout.slices[layout.head_weight], bias, elsewhere)


class GGN(JacobianSandwich):
    """``Σ_i Jᵢᵀ Bᵢ Jᵢ`` of the mean loss: the Hessian without the second derivatives of the network.

    ``J`` is the Jacobian of what the softmax sees, after soft cap and temperature. Where the loss is convex in that
    (cross-entropy, forward KL) ``B`` is its Hessian ``(Σy) (diag(p) − p pᵀ)``, and the matrix is the Fisher. Reverse KL
    and JS are convex in the probabilities instead, and ``B = J_p diag(φ″) J_p`` with the softmax's ``J_p``: again
    ``diag(p) − p pᵀ`` for reverse KL. A :class:`~softcurve.TopK` with a bucket is compared outcome by outcome, the
    bucket being one of them; of a z-loss ``2 λ (p pᵀ + max(lse, 0) J_p)`` is kept. So it is positive semidefinite for
    every loss, and equals the Hessian of the loss in the logits at ``p = y``.

    Arguments and errors are those of :class:`~softcurve.curvature.Hessian`. Source: Schraudolph 2002.
    """
