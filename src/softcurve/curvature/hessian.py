"""The Hessian of a network's loss."""

from __future__ import annotations

from torch import Tensor

from softcurve.curvature.network import NetworkOperator, Rows
from softcurve.head import loop
from softcurve.head.curvature import add_products
from softcurve.losses.rows import HESSIAN


class Hessian(NetworkOperator):
    """``∂²L/∂θ²`` of the mean loss over ``data``, exact: ``Jᵀ H_e J + Σ_i (∂L/∂e_i) ∂²e_i/∂θ²`` and the head's own.

    Args:
        features: a module that maps a batch ``x`` (``**x``, if it is a mapping) to ``e (..., d)``, run in its present
            mode; its buffers are not changed.
        head: an ``nn.Linear`` from ``d`` to the classes; its weight may be tied to a parameter of the features.
        data: batches ``(x, target)`` or ``(x, target, sample_weight)``, walked once for each product.
        loss: ``"cross_entropy"``, ``"forward_kl"`` (``D(target‖model)``), ``"reverse_kl"`` or ``"js"``.
        seed: of dropout, with the batch's number: every product sees the same masks, given the same batches.
        progress: a bar over the batches of each product.
        process_group: of processes that each walk rows of their own; the matrix is of all rows, the same in each.
        check_deterministic: compare two passes over features and data at the start, without a graph, and raise
            ``ValueError`` where they differ: dropout or batch normalisation in training mode over batches that change,
            random augmentation or sampling, noise of the features' own. Rows in another order are no fault unless the
            matrix depends on it. Of batches in a list the first is enough.

    Further options are those of :func:`softcurve.linear_cross_entropy` and its kin, ``reduction`` among them:
    ``"mean"`` (over the rows of all batches together), ``"batchmean"`` or ``"sum"``. The matrix acts on the parameters
    that require gradients, of the features, then of the head, in ``named_parameters`` order, a tied one once.

    Raises:
        TypeError, ValueError: for an argument of the wrong type or value; what the loss raises for a batch; passes
            that differ.

    Source: the chain rule: ``ġW + gẆ``, ``ġᵀe + gᵀė``, ``Σġ`` with ``ġ = H_z ż``.
    """

    def _add(self, rows: Rows, columns: Tensor, into: Tensor) -> None:
        losses = rows.losses
        changes, terms = None, None
        if rows.e.requires_grad:
            wanted = (True, False, False, False, False, False)
            gradient = loop.evaluate(losses.loss, losses.tensors, losses.memory_budget, wanted=wanted).gradients[0]
            assert gradient is not None
            u, h = self.linearized(rows, self.own_share(gradient))
            changes, terms = zip(*(self.pushed_forward(u, h, v, second=True) for v in columns), strict=True)
        sums = self.sums(rows, into, losses.tensors.dtype)
        add_products(losses, HESSIAN, self.along(columns, changes), sums)
        self.add_pulled_back(rows, [each.input for each in sums], into)
        for j, parts in enumerate(terms or ()):
            self.add_parts(parts, into[j])
