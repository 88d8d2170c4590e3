"""The Hessian of a network's loss."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from softcurve.curvature.network import BatchRows, NetworkOperator, Parts
from softcurve.head import loop
from softcurve.head.curvature import add_products
from softcurve.head.products import Direction
from softcurve.head.tensors import DIFFERENTIABLE
from softcurve.losses.rows import HESSIAN


class Hessian(NetworkOperator):
    """``∂²L/∂θ²`` of the mean loss over ``data``, exact: ``Jᵀ H_e J + Σ_i (∂L/∂e_i) ∂²e_i/∂θ²`` and the head's own.

    Args:
        features: a module that maps a batch ``x`` (``**x``, if it is a mapping) to ``e (..., d)``, or to a record with
            it as ``last_hidden_state``, run in its present mode; its buffers are not changed.
        head: an ``nn.Linear`` from ``d`` to the classes; its weight may be tied to a parameter of the features.
        data: a re-iterable of batches ``(x, target)``, ``(x, target, sample_weight)`` or mappings with ``labels``, read
            once for each product. A mapping is passed whole, ``features(**batch)``, and its ``labels`` are the target.
        loss: ``"cross_entropy"``, ``"forward_kl"`` (``D(target‖model)``), ``"reverse_kl"`` or ``"js"``.
        seed: the seed of dropout, together with the batch's number: given the same batches, every product sees the
            same masks.
        progress: show a progress bar over the batches of each product.
        process_group: processes that each iterate over rows of their own; the matrix is of all rows, the same in each.
        check_deterministic: compare two passes over features and data at the start, without a graph, and raise
            ``ValueError`` where they differ: dropout or batch normalisation in training mode over batches that change,
            random augmentation or sampling, noise inside the features. Rows may come in another order unless the
            matrix depends on it. Of batches in a list only the first is compared.

    Further options are those of :func:`softcurve.linear_cross_entropy` and the other losses, among them ``reduction``:
    ``"mean"`` (over the rows of all batches together), ``"batchmean"`` or ``"sum"``. The matrix acts on the parameters
    that require gradients, of the features, then of the head, in ``named_parameters`` order, a tied one once.

    Raises:
        TypeError, ValueError: for an argument of the wrong type or value; what the loss raises for a batch; passes
            that differ.

    Source: Pearlmutter 1994, "Fast exact multiplication by the Hessian". The parts of the head are ``ġW + gẆ``,
    ``ġᵀe + gᵀė`` and ``Σġ`` with ``ġ = H_z ż``.
    """

    def _add_products(self, rows: BatchRows, columns: Tensor, sums: Sequence[Direction]) -> Sequence[Parts]:
        losses, cotangent = rows.losses, None
        if rows.e.requires_grad:
            wanted = [number == 0 for number in range(DIFFERENTIABLE)]  # in the features alone
            gradient = loop.evaluate(losses.loss, losses.tensors, losses.memory_budget, wanted=wanted).gradients[0]
            assert gradient is not None
            cotangent = self.network.class_share(gradient)
        directions, terms = self.network.directions(rows, columns, cotangent)
        add_products(losses, HESSIAN, directions, sums)
        return terms
