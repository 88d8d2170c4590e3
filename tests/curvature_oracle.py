"""Matrices of second order, dense, that owe nothing to softcurve: torch's autograd of the closed forms in ``oracle``.

:class:`DenseRows` are the rows behind the features, :class:`DenseNetwork` is a whole network over batches. All is in
units of the problem's ``base``, and in the raw logits: soft cap and temperature are within the matrices.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from . import oracle
from .cases import FLOAT, INDICES, PROBABILITIES, Leaves, Problem

MATRICES = ("hessian", "gauss_newton", "fisher")

OfRows = Callable[[Tensor], Tensor]

# --- derivatives of functions whose rows see only their own row ----------------------------------------------------------


def row_gradients(f: OfRows, z: Tensor, *, create_graph: bool = False) -> Tensor:
    """``(n, C) → (n,)`` gives ``(n, C)``."""
    z = z if create_graph else z.detach().requires_grad_()
    return torch.autograd.grad(f(z).sum(), z, create_graph=create_graph)[0]


def row_jacobians(f: OfRows, z: Tensor) -> Tensor:
    """``(n, C) → (n, m)`` gives ``(n, m, C)``."""
    z = z.detach().requires_grad_()
    values = f(z)
    one_hot = torch.eye(values.shape[-1], dtype=z.dtype).unsqueeze(1).expand(-1, len(z), -1)
    return torch.autograd.grad(values, z, one_hot, is_grads_batched=True)[0].movedim(0, 1)


def row_hessians(f: OfRows, z: Tensor) -> Tensor:
    """``(n, C) → (n,)`` gives ``(n, C, C)``."""
    return row_jacobians(partial(row_gradients, f, create_graph=True), z)


def softmax_jacobians(z: Tensor) -> Tensor:
    """``diag(p) − p pᵀ``."""
    p = torch.softmax(z, -1)
    return torch.diag_embed(p) - p.unsqueeze(-1) * p.unsqueeze(-2)


# --- the rows behind the features ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class DenseRows:
    """A problem's rows, flattened, each beside the target it is compared with; ``weight`` is 0 where there is none."""

    problem: Problem
    indices: Tensor  # (n,), or (n, k) of a list
    leaves: Leaves
    weight: Tensor  # (n,): the samples' weights
    batch: int  # the size of the first dimension

    @staticmethod
    def of(problem: Problem) -> DenseRows:
        named, leaves = problem._named(tuple(a.detach() for a in problem.arguments))
        rows = named["input"].shape[:-1]
        indices, kept = problem.indices, problem._kept(problem.indices)
        weight = named.get("sample_weight", torch.ones(rows, dtype=torch.float64))
        if s := problem.options.get("shift", 0):
            indices = torch.cat([indices[..., s:], torch.zeros_like(indices[..., :s])], -1)
            kept = torch.cat([kept[..., s:], torch.zeros_like(kept[..., :s])], -1)
            weight = torch.cat([weight[..., s:], torch.zeros_like(weight[..., :s])], -1)
        indices = indices if problem.case.kind.listed else torch.where(kept, indices, 0)
        listed = indices.shape[len(rows) :]
        one_a_row = 1 if "Teacher" in problem.case.kind.name else len(leaves)
        return DenseRows(
            problem,
            indices.reshape(-1, *listed),
            tuple(leaf.flatten(0, -2) if n < one_a_row else leaf for n, leaf in enumerate(leaves)),
            (kept * weight).flatten(),
            rows[0] if rows else 1,
        )

    @property
    def nats(self) -> float:
        return math.log(self.problem.options.get("base", math.e))

    def losses(self, z: Tensor) -> Tensor:
        """Each row's loss, class weights in it and ``weight`` not."""
        return self.problem._dense_rows(z, self.indices, self.leaves)

    def gradients(self, z: Tensor) -> Tensor:
        return row_gradients(self.losses, z)

    def matrices(self, matrix: str, z: Tensor) -> Tensor:
        """Each row's matrix, ``(n, C, C)``, ``weight`` not in it."""
        if matrix == "hessian":
            return row_hessians(self.losses, z)
        slope, seen = row_gradients(lambda z: self.seen(z).sum(-1), z), self.seen(z)
        of_seen = {"gauss_newton": self._gauss_newton, "fisher": self._fisher}[matrix](seen)
        return slope.unsqueeze(-1) * of_seen * slope.unsqueeze(-2)

    def seen(self, z: Tensor) -> Tensor:
        """What the softmax sees."""
        options = self.problem.options
        return oracle.seen_by_softmax(z, options.get("temperature", 1.0), options.get("softcap"))

    def _fisher(self, z: Tensor) -> Tensor:
        return self.masses(z).view(-1, 1, 1) * softmax_jacobians(z) / self.nats

    def _gauss_newton(self, z: Tensor) -> Tensor:
        """``Jᵀ H J``: ``H`` in the outcomes' logits where the loss is convex in them, else in their probabilities."""
        case, options, outcomes = self.problem.case, self.problem.options, self._outcomes
        if case.is_cross_entropy:
            y = self.target(z)
            inner, outer = outcomes, lambda c: -(y * torch.log_softmax(c, -1)).sum(-1)
        else:
            log_y = torch.log_softmax(outcomes(self._raw_target(z) / options.get("temperature", 1.0)), -1)
            if case.name == "forward":
                inner, outer = outcomes, lambda c: case.rows(log_y, torch.log_softmax(c, -1))
            else:
                inner, outer = lambda z: torch.softmax(outcomes(z), -1), lambda p: case.rows(log_y, p.log())
        jacobians = row_jacobians(inner, z)
        curvature = jacobians.mT @ row_hessians(outer, inner(z)) @ jacobians / self.nats
        if of_lse := options.get("z_loss", 0.0):
            p, lse = torch.softmax(z, -1), torch.logsumexp(z, -1).view(-1, 1, 1)
            curvature += 2 * of_lse * (p.unsqueeze(-1) * p.unsqueeze(-2) + lse.clamp(min=0) * softmax_jacobians(z))
        return curvature

    # --- targets

    def masses(self, z: Tensor) -> Tensor:
        """``Σ_k w_k y_k`` of each row; 1 for a divergence."""
        return self.target(z).sum(-1) if self.problem.case.is_cross_entropy else torch.ones_like(z[:, 0])

    def target(self, z: Tensor) -> Tensor:
        """Of a cross-entropy: smoothed, then times the class weights."""
        kind, smoothing = self.problem.case.kind, self.problem.options.get("label_smoothing", 0.0)
        dense = kind in (FLOAT, PROBABILITIES)
        y = self.leaves[0] if dense else torch.softmax(self._outcomes(self._raw_target(z)), -1)
        uniform = self._outcomes(torch.full_like(z, -math.log(z.shape[-1]))).exp()
        y = (1 - smoothing) * y + smoothing * uniform
        return y if self.problem.weight is None else y * self.problem.weight

    def _raw_target(self, z: Tensor) -> Tensor:
        kind = self.problem.case.kind
        leaves = tuple(leaf[..., kind.entries] for leaf in self.leaves) if kind.listed else self.leaves
        return kind.raw(z, self._listed, *leaves)

    @property
    def _listed(self) -> Tensor:
        """The classes that are listed, without the entries that are fillers."""
        kind = self.problem.case.kind
        return self.indices[..., kind.entries] if kind.listed else self.indices

    def _outcomes(self, z: Tensor) -> Tensor:
        """Logits over the outcomes: of a bucket the listed classes and all others."""
        coarse = self.problem.case.kind.bucket and self._listed.shape[-1] < z.shape[-1]
        return oracle.listed_and_rest(z, self._listed) if coarse else z

    # --- reduction

    def divisor(self, reduction: str) -> float:
        """These rows' part of what the sum over all rows is divided by."""
        of_indices = self.problem.case.kind is INDICES and self.problem.weight is not None
        mass = self.weight * self.problem.weight[self.indices] if of_indices else self.weight
        return {"mean": float(mass.sum()), "batchmean": float(self.batch)}[reduction]


# --- a network over batches ----------------------------------------------------------------------------------------------


class Network(nn.Module):
    """``head(features(x))``, or ``head(features(**x))``."""

    def __init__(self, features: nn.Module, head: nn.Linear) -> None:
        super().__init__()
        self.features, self.head = features, head

    def forward(self, x: Any) -> Tensor:
        return self.head(self.features(**x) if isinstance(x, Mapping) else self.features(x))


@dataclass(frozen=True)
class DenseNetwork:
    """The matrices of a network, ``(P, P)`` over its trained parameters, those of the features first, a tied one once."""

    network: Network
    batches: Sequence[tuple[Any, DenseRows]]  # x, and its rows
    reduction: str = "mean"

    @property
    def trained(self) -> dict[str, nn.Parameter]:
        return {name: p for name, p in self.network.named_parameters() if p.requires_grad}

    @property
    def point(self) -> Tensor:
        return torch.cat([p.detach().flatten() for p in self.trained.values()])

    def matrix(self, name: str) -> Tensor:
        """``"hessian"``, ``"gauss_newton"``, ``"fisher"`` or ``"empirical_fisher"``."""
        if name == "hessian":
            return torch.autograd.functional.hessian(self.loss, self.point, vectorize=True)
        parts = [self._of_batch(name, x, rows) for x, rows in self.batches]
        return sum(parts[1:], start=parts[0]) / self.divisor

    def loss(self, flat: Tensor) -> Tensor:
        parts = [(rows.weight * rows.losses(self.logits(flat, x))).sum() for x, rows in self.batches]
        return sum(parts[1:], start=parts[0]) / self.divisor

    @property
    def divisor(self) -> float:
        return 1.0 if self.reduction == "sum" else sum(rows.divisor(self.reduction) for _, rows in self.batches)

    def logits(self, flat: Tensor, x: Any) -> Tensor:
        """Raw ``(n, C)``. The buffers are copies, which a forward may write to."""
        sizes = [p.numel() for p in self.trained.values()]
        parts = zip(self.trained.items(), flat.split(sizes), strict=True)
        values = {name: part.view(p.shape) for (name, p), part in parts}
        buffers = {name: buffer.clone() for name, buffer in self.network.named_buffers()}
        with sdpa_kernel(SDPBackend.MATH):
            return torch.func.functional_call(self.network, values | buffers, (x,)).flatten(0, -2)

    def jacobian(self, x: Any) -> Tensor:
        """Of the logits in all parameters, ``(n, C, P)``."""
        return torch.autograd.functional.jacobian(partial(self.logits, x=x), self.point, vectorize=True)

    def _of_batch(self, name: str, x: Any, rows: DenseRows) -> Tensor:
        jacobian, z = self.jacobian(x), self.logits(self.point, x).detach()
        if name == "empirical_fisher":
            return self._gradient_moments(jacobian, z, rows)
        weighted = rows.weight.view(-1, 1, 1) * rows.matrices(name, z)
        return torch.einsum("nap,nab,nbq->pq", jacobian, weighted, jacobian)

    def _gradient_moments(self, jacobian: Tensor, z: Tensor, rows: DenseRows) -> Tensor:
        """``Σ ∇ℓ_i ∇ℓ_iᵀ / m_i``, the gradients in nats and the sum in units of ``base``."""
        gradients = torch.einsum("n,na,nap->np", rows.weight * rows.nats, rows.gradients(z), jacobian)
        masses = rows.weight * rows.masses(rows.seen(z))
        assert not gradients[masses == 0].any(), "a row without mass must have no gradient"
        inverse = torch.where(masses == 0, 0.0, 1 / torch.where(masses == 0, 1.0, masses))
        return torch.einsum("n,np,nq->pq", inverse, gradients, gradients) / rows.nats


# --- softcurve's names for a problem -------------------------------------------------------------------------------------


def loss_options(problem: Problem) -> dict[str, Any]:
    """What names the problem's loss to an operator."""
    loss: dict[str, Any] = {"forward": {"loss": "forward_kl"}, "reverse": {"loss": "reverse_kl"}}.get(
        problem.case.name, {"loss": "cross_entropy"} if problem.case.is_cross_entropy else {"loss": "js", "beta": 0.3}
    )
    return loss | ({} if problem.weight is None else {"weight": problem.weight}) | dict(problem.options)


def batch_of(problem: Problem, x: Any) -> tuple[Any, ...]:
    """``(x, target)`` or ``(x, target, sample_weight)``."""
    named, leaves = problem._named(tuple(a.detach() for a in problem.arguments))
    target = problem.case.kind.target(problem.indices, *leaves)
    return (x, target, named["sample_weight"]) if "sample_weight" in named else (x, target)
