"""A Laplace posterior of a head: normal, around its trained weight and bias, with the curvature as precision.

``N(θ*, (H + δ I)⁻¹)`` with ``θ* = [W | b]``, the prior ``N(0, I/δ)`` and the Gauss-Newton matrix ``H`` of the sum of
the rows' losses, ``Σ_i B_i ⊗ ẽ_i ẽ_iᵀ`` over ``ẽ = [e; 1]`` (the 1 with a bias). Two forms of ``H`` are offered:

- ``"kronecker"``: ``B ⊗ A`` (:mod:`softcurve.curvature.kfac`). With ``A = U diag(a) Uᵀ`` the variance of a logit is
  ``Σ_j (ẽ·u_j)² [(a_j B + δ I)⁻¹]_kk``, one product of ``(n, d)`` and ``(d, C)``.
- ``"diagonal"``: the exact diagonal ``h``; the variance is ``(ẽ ⊙ ẽ) · 1/(h_k + δ)``.

No Jacobian of the logits in the parameters, ``(n, C, C d)``, and no covariance ``C × C`` of a row is made.

MacKay 1992, "The evidence framework applied to classification networks".
Ritter, Botev, Barber 2018, "A scalable Laplace approximation for neural networks".
Kristiadi, Hein, Hennig 2020, "Being Bayesian, even just a bit, fixes overconfidence in ReLU networks".
"""

from __future__ import annotations

import copy
import functools
import math
from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from softcurve import checks
from softcurve.array_types import Float, Float64
from softcurve.curvature.class_forms import ClassForm
from softcurve.curvature.ggn import GGN
from softcurve.curvature.kfac import Form
from softcurve.curvature.linear_head import require_head
from softcurve.curvature.network import Batch
from softcurve.curvature.operator import require_count
from softcurve.extras import needed
from softcurve.head import curvature, loop
from softcurve.head.plan import DEFAULT_BUDGET
from softcurve.head.problem import require_budget
from softcurve.head.products import linear_into
from softcurve.head.sharded import lies_over_processes
from softcurve.losses.rows import GAUSS_NEWTON
from softcurve.losses.spec import LogitMap
from softcurve.records import dataclass_repr
from softcurve.typing import Integer, Number

__all__ = ["LastLayerLaplace"]


class LastLayerLaplace:
    """``N([W | b], (H + prior_precision I)⁻¹)``, a posterior of ``head`` given ``data``.

    Args:
        head: an ``nn.Linear``, trained; what a posterior should be around is its mode, so a weight decay that it was
            trained with is the natural prior: ``prior_precision = N · weight_decay`` for a mean loss. It is copied.
        data: batches ``(x, target)`` or ``(x, target, sample_weight)`` that can be walked again. Weights of rows and
            classes count as if a row came so many times; soft labels and smoothing share a row between classes.
        features: maps a batch ``x`` to ``e (..., d)``, in its present mode; ``None`` where ``x`` is ``e`` itself.
        structure: ``"kronecker"`` or ``"diagonal"``.
        prior_precision: ``δ``, of each weight and bias.
        form, rank: how the Kronecker class factor is held: ``"dense"`` ``(C, C)``, ``"low_rank"`` ``(C, rank)``
            or ``"auto"``, dense up to 2,048 classes. A form of low rank is above ``B``: what it leaves out makes
            variances smaller.
        weight, ignore_index, label_smoothing, temperature, softcap, shift, memory_budget: as in
            :func:`softcurve.linear_cross_entropy`, the negative logarithm of the likelihood, summed over rows, in nats.
        seed: of dropout, and of a class factor of low rank.
        progress, process_group, check_deterministic: as in :class:`~softcurve.curvature.Hessian`.

    Nothing here records a graph. An instance does not change: what gives another prior gives another instance.

    Raises:
        TypeError, ValueError: for an argument of the wrong type or value; what the loss raises for a batch.
    """

    def __init__(
        self,
        head: nn.Linear,
        data: Iterable[Batch],
        *,
        features: nn.Module | None = None,
        structure: Literal["kronecker", "diagonal"] = "kronecker",
        prior_precision: float = 1.0,
        form: Form = "auto",
        rank: int = 128,
        weight: Float[Tensor, " classes"] | None = None,
        ignore_index: Integer | None = None,
        label_smoothing: Number = 0.0,
        temperature: Number = 1.0,
        softcap: Number | None = None,
        shift: Integer = 0,
        memory_budget: Integer | None = None,
        seed: int = 0,
        progress: bool = False,
        process_group: ProcessGroup | None = None,
        check_deterministic: bool = True,
    ) -> None:
        checks.require_choice("structure", structure, ("kronecker", "diagonal"))
        checks.require_positive("prior_precision", prior_precision)
        self.features = nn.Identity() if features is None else features
        self.head = _copied(head)
        rows = GGN(
            self.features, self.head, data, weight=weight, ignore_index=ignore_index, label_smoothing=label_smoothing,
            temperature=temperature, softcap=softcap, shift=shift, reduction="sum", memory_budget=memory_budget,
            seed=seed, progress=progress, process_group=process_group, check_deterministic=check_deterministic,
        )  # fmt: skip
        self._map, self._seed = rows.map, rows.seed_of("features", 0)
        self.logit_map = LogitMap.of(rows.losses.temperature, rows.losses.softcap)
        self.log_likelihood = _log_likelihood(rows)
        budget = require_budget(rows.losses.memory_budget)
        if budget is None:
            budget = DEFAULT_BUDGET.get(self.head.weight.device.type, 2**28)
        self.structure: Structure
        if structure == "diagonal":
            self.structure = Diagonal(float(prior_precision), budget, *_diagonal_of(rows))
        else:
            factors = rows.kfac(form=form, rank=rank, seed=seed)
            values, vectors = factors.feature_spectrum()
            self.structure = Kronecker(float(prior_precision), budget, values.double(), vectors, factors.form.double())

    def __repr__(self) -> str:
        """One line."""
        shape = f"classes={self.head.out_features}, features={self.head.in_features}"
        kind = type(self.structure).__name__.lower()
        return f"LastLayerLaplace(structure={kind!r}, prior_precision={self.prior_precision:.6g}, {shape})"

    @property
    def prior_precision(self) -> float:
        """``δ``."""
        return self.structure.prior

    # --- the prior ---------------------------------------------------------------------------------------------------

    def with_prior_precision(self, prior_precision: float) -> LastLayerLaplace:
        """The same curvature under another prior; nothing is computed again."""
        checks.require_positive("prior_precision", prior_precision)
        other = copy.copy(self)
        other.structure = replace(self.structure, prior=float(prior_precision))
        return other

    def log_marginal_likelihood(self, prior_precision: float | Tensor | None = None) -> Float64[Tensor, "*precisions"]:
        """``log p(D) ≈ log p(D|θ*) − ½ (δ ‖θ*‖² + log det(I + H/δ))``, in nats, for each of ``prior_precision``.

        That is ``log p(D|θ*) + log N(θ*; 0, I/δ) + ½ P log 2π − ½ log det(H + δ I)``, and concave in ``log δ``. Up to a
        constant only where rows have weights or soft labels. For a class factor of low rank each value costs ``d``
        decompositions of ``(C, rank)``. Source: MacKay 1992; Immer et al. 2021, "Scalable marginal likelihood
        estimation for model selection in deep learning".

        Raises:
            ValueError: a precision is not a finite number above 0.
        """
        given = self.prior_precision if prior_precision is None else prior_precision
        asked = torch.as_tensor(given, dtype=torch.float64)
        if not (asked.isfinite() & (asked > 0)).all():
            raise ValueError(f"prior_precision must hold finite numbers above 0, got {given!r}")
        found = [self._evidence(prior) for prior in asked.flatten().tolist()]
        return torch.tensor(found, dtype=torch.float64).reshape(asked.shape)

    def optimize_prior_precision(
        self, *, bounds: tuple[float, float] = (1e-6, 1e6), tol: float = 1e-6
    ) -> LastLayerLaplace:
        """The same posterior with the ``δ`` of the largest evidence within ``bounds``, to ``tol`` relatively.

        The evidence has one maximum: there ``δ ‖θ*‖² = Σ h/(h + δ)``, the number of well-determined parameters. Where
        it still rises at a bound, it is that bound. By Brent's method in ``log δ``; needs scipy.
        """
        low, high = bounds
        checks.require_positive("bounds", low)
        checks.require_positive("bounds", high)
        checks.require_positive("tol", tol)
        if low >= high:
            raise ValueError(f"bounds must be a smaller and a larger prior precision, got {bounds}")
        with needed("optimize_prior_precision", "fit"):
            from scipy.optimize import minimize_scalar
        found = minimize_scalar(
            lambda s: -self._evidence(math.exp(s)),
            bounds=(math.log(low), math.log(high)),
            method="bounded",
            options={"xatol": tol},
        )
        return self.with_prior_precision(math.exp(float(found.x)))

    def _evidence(self, prior: float) -> float:
        square = sum(float(p.detach().double().square().sum()) for p in self.head.parameters())
        return self.log_likelihood - (prior * square + replace(self.structure, prior=prior).log_ratio()) / 2

    # --- predictions -------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def predictive_variance(self, x: Any) -> Float[Tensor, "*rows classes"]:
        """``diag(J Σ Jᵀ)``: the posterior variance of each logit ``W e + b``, before soft cap and temperature.

        ``x`` is what ``features`` takes; ``e (..., d)`` itself where there are none.
        """
        e = self._features_of(x)
        return self.structure.variance(e.reshape(-1, e.shape[-1]), self._bias() is not None).reshape(*e.shape[:-1], -1)

    @torch.no_grad()
    def predict_proba(
        self, x: Any, *, correction: Literal["probit", "mc", "none"] = "probit", samples: int = 256, seed: int = 0
    ) -> Float[Tensor, "*rows classes"]:
        """The probabilities of the classes, averaged over the posterior as ``correction`` says.

        ``"probit"``: ``softmax(z / √(1 + π/8 var))`` (MacKay 1992; Lu, Ie, Sha 2020); ``"mc"``: the mean of ``samples``
        softmaxes of normal logits, independent of one another, with these variances, drawn from ``seed``; ``"none"``:
        the softmax at the mean. The soft cap and the temperature are between logits and softmax; for the probit the
        variances pass them by their slope. All rows see the same draws, so that a row does not depend on its batch.
        """
        checks.require_choice("correction", correction, ("probit", "mc", "none"))
        require_count("samples", samples, 1)
        e = self._features_of(x)
        flat, bias = e.reshape(-1, e.shape[-1]), self._bias()
        classes = self.head.out_features
        exact = correction == "none"
        found = (
            flat.new_empty(len(flat), classes) if exact else self.structure.variance(flat, bias is not None)
        )  # a row's variances are replaced by its probabilities
        step = self.structure.fitting(6 * classes * flat.itemsize)
        for start in range(0, len(flat), step):
            rows = slice(start, start + step)
            variance = found[rows]
            z = linear_into(torch.empty_like(variance), flat[rows], self.head.weight.detach(), bias, scale=1.0)
            if correction == "mc":
                variance.copy_(self._sampled(z, variance.sqrt(), samples, seed))
                continue
            mapped = self.logit_map.value(z)
            if not exact:
                mapped = mapped / torch.sqrt(1 + math.pi / 8 * self.logit_map.slope(z).square() * variance)
            torch.softmax(mapped, -1, out=variance)
        return found.reshape(*e.shape[:-1], classes)

    def _sampled(self, z: Tensor, deviation: Tensor, samples: int, seed: int) -> Tensor:
        """The mean of the softmax of ``z + deviation ⊙ ε``."""
        generator = torch.Generator().manual_seed(seed)
        total = torch.zeros_like(z)
        for _ in range(samples):
            noise = torch.randn(z.shape[1], generator=generator, dtype=z.dtype).to(z.device)
            total += torch.softmax(self.logit_map.value(torch.addcmul(z, deviation, noise)), -1)
        return total / samples

    def _bias(self) -> Tensor | None:
        bias: Tensor | None = self.head.bias
        return None if bias is None else bias.detach()

    def _features_of(self, x: Any) -> Tensor:
        """In the dtype of the computation; dropout in training mode is drawn as for the first batch of the data."""
        wanted, weight = self.head.in_features, self.head.weight
        e = self._map(x, self._seed, device=weight.device, graph=False)
        if not isinstance(e, Tensor) or not e.is_floating_point() or e.ndim == 0 or e.shape[-1] != wanted:
            came = checks.describe(e) if isinstance(e, Tensor) else type(e).__name__
            raise ValueError(f"x must have floating-point features of shape (..., {wanted}), as head takes, got {came}")
        if e.device != weight.device:
            raise ValueError(f"x must have features on head's device {weight.device}, got {e.device}; move it there")
        return e.detach().to(torch.promote_types(torch.promote_types(e.dtype, weight.dtype), torch.float32))


# --- what the curvature is held as -----------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Structure(ABC):
    """A form of ``H + prior I``; what it needs beyond results, and what it holds, stays within ``budget`` bytes."""

    prior: float
    budget: int

    @abstractmethod
    def log_ratio(self) -> float:
        """``log det(I + H / prior)``."""

    @abstractmethod
    def variance(self, e: Float[Tensor, "n features"], has_bias: bool) -> Float[Tensor, "n classes"]:
        """``ẽᵀ [(H + prior I)⁻¹]_kk ẽ`` of each row and class."""

    def fitting(self, each: int) -> int:
        """How many things of ``each`` bytes are in hand at a time; at least one."""
        return max(1, self.budget // each)


@dataclass(frozen=True, eq=False)
class Diagonal(Structure):
    """The exact diagonal of ``H``."""

    weight: Float[Tensor, "classes features"]
    bias: Float[Tensor, " classes"] | None

    __repr__ = dataclass_repr

    def log_ratio(self) -> float:
        """``Σ log1p(h / prior)``."""
        found = 0.0 if self.bias is None else float(torch.log1p(self.bias.double() / self.prior).sum())
        for part in self.weight.split(self.fitting(3 * 8 * self.weight.shape[1])):
            found += float(torch.log1p(part.double() / self.prior).sum())
        return found

    def variance(self, e: Float[Tensor, "n features"], has_bias: bool) -> Float[Tensor, "n classes"]:
        """``(e ⊙ e) @ (1 / (h + prior))ᵀ``, some rows and classes at a time."""
        found = e.new_empty(len(e), len(self.weight))
        step = self.fitting(4 * e.itemsize * e.shape[1])
        for start in range(0, len(self.weight), step):
            classes = slice(start, start + step)
            inverse = (1 / (self.weight[classes] + self.prior)).to(e.dtype)
            for first in range(0, len(e), step):
                rows = slice(first, first + step)
                torch.matmul(e[rows].square(), inverse.T, out=found[rows, classes])
        if self.bias is not None:
            found += (1 / (self.bias + self.prior)).to(e.dtype)
        return found


@dataclass(frozen=True, eq=False)
class Kronecker(Structure):
    """``B ⊗ A`` with ``A = vectors diag(values) vectorsᵀ``; the form of ``B`` is in float64."""

    values: Float64[Tensor, " d"]
    vectors: Float[Tensor, "d d"]
    form: ClassForm

    __repr__ = dataclass_repr

    def log_ratio(self) -> float:
        """``Σ_j log det(a_j / prior B + I)``."""
        found = 0.0
        for part in self.values.split(self._step):
            damped = self.form.damped(part, self.prior, name="prior_precision")
            found += float((damped.log_determinants() - self.form.classes * math.log(self.prior)).sum())
        return found

    def variance(self, e: Float[Tensor, "n features"], has_bias: bool) -> Float[Tensor, "n classes"]:
        """``Σ_j (ẽ·u_j)² [(a_j B + prior I)⁻¹]_kk``, some rows and eigenvectors at a time."""
        found = e.new_zeros(len(e), self.form.classes)
        vectors = self.vectors.to(e.dtype)
        for start in range(0, len(self.values), self._step):
            columns = slice(start, start + self._step)
            inverse = (self._whole if self._is_kept else self._inverse_diagonal(columns)).to(e.dtype)
            step = self.fitting(4 * e.itemsize * inverse.shape[1])
            for first in range(0, len(e), step):
                rows = slice(first, first + step)
                along = e[rows] @ vectors[: e.shape[1], columns]
                if has_bias:
                    along += vectors[-1, columns]
                found[rows].addmm_(along.square_(), inverse.T)
        return found

    @property
    def _step(self) -> int:
        """Eigenvectors at a time."""
        return self.fitting(4 * 8 * self.form.classes)

    @property
    def _is_kept(self) -> bool:
        """Whether the inverse diagonals of all eigenvectors are within the budget, and so kept for the next call."""
        return self._step >= len(self.values)

    @functools.cached_property
    def _whole(self) -> Tensor:
        return self._inverse_diagonal(slice(None))

    def _inverse_diagonal(self, columns: slice) -> Tensor:
        """``[(a_j B + prior I)⁻¹]_kk``, ``(C, j)``."""
        return self.form.damped(self.values[columns], self.prior, name="prior_precision").inverse_diagonal()


# --- from the data ---------------------------------------------------------------------------------------------------


def _copied(head: nn.Linear) -> nn.Linear:
    """The parameters alone, free of ties, hooks and freezing: later training does not move the posterior."""
    require_head(head)
    if lies_over_processes(head.weight):
        raise TypeError("head must hold plain tensors, got a DTensor; gather it by head.weight.full_tensor() first")
    own = nn.Linear(head.in_features, head.out_features, bias=head.bias is not None, device="meta")
    own.weight = nn.Parameter(head.weight.detach().clone())
    if head.bias is not None:
        own.bias = nn.Parameter(head.bias.detach().clone())
    if not all(parameter.detach().isfinite().all() for parameter in own.parameters()):
        raise ValueError(
            "head must hold finite numbers, got NaN or infinity, of which no normal distribution is the mean; leave "
            "out classes that are masked"
        )
    return own


def _log_likelihood(network: GGN) -> float:
    """``Σ weight_i log p(y_i)``."""
    found, counted = 0.0, 0.0
    for rows in network.rows("Log-likelihood", graph=False):
        loss, tensors, _, budget = rows.losses
        losses = loop.evaluate(loss, tensors, budget).rows.double()
        found -= float((losses * tensors.row_weight.double()).sum())
        counted += float((tensors.row_weight != 0).sum())
    if not network.over_rows(counted):
        raise ValueError("data must hold a row that counts, got none; see ignore_index and sample weights")
    return network.over_rows(found)


def _diagonal_of(network: GGN) -> tuple[Tensor, Tensor | None]:
    """In weight and bias. A rounding error below 0 is none."""
    weight = torch.zeros_like(network.head.weight.detach(), dtype=network.dtype)
    bias = weight.new_zeros(len(weight))
    for rows in network.rows("Diagonal", graph=False):
        found = curvature.diagonal(rows.losses, GAUSS_NEWTON, wants_diagonal=True)
        assert found.weight is not None
        assert found.bias is not None
        weight += found.weight
        bias += found.bias
    weight, bias = network.summed(weight), network.summed(bias)
    return weight.clamp_(min=0), None if network.head.bias is None else bias.clamp_(min=0)
