"""A Laplace posterior of a head: normal, around its trained weight and bias, with the curvature as precision.

``N(θ*, (H + δ I)⁻¹)`` with ``θ* = [W | b]``, the prior ``N(0, I/δ)`` and the Gauss-Newton matrix ``H`` of the sum of
the rows' losses, ``Σ_i B_i ⊗ ẽ_i ẽ_iᵀ`` over ``ẽ = [e; 1]`` (the 1 with a bias). ``H`` has one of two structures:

- ``"kronecker"``: ``B ⊗ A`` (:mod:`softcurve.curvature.kfac`). With ``A = U diag(a) Uᵀ`` the variance of a logit is
  ``Σ_j (ẽ·u_j)² [(a_j B + δ I)⁻¹]_kk``, one product of ``(n, d)`` and ``(d, C)``.
- ``"diagonal"``: the exact diagonal ``h``; the variance is ``(ẽ ⊙ ẽ) · 1/(h_k + δ)``.

Neither the Jacobian of the logits with respect to the parameters, ``(n, C, C d)``, nor a row's covariance ``C × C`` is
ever formed.

MacKay 1992, "The evidence framework applied to classification networks".
Ritter, Botev, Barber 2018, "A scalable Laplace approximation for neural networks".
Kristiadi, Hein, Hennig 2020, "Being Bayesian, even just a bit, fixes overconfidence in ReLU networks".
"""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any, Literal, Unpack

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from softcurve import checks
from softcurve.array_types import Float, Float64
from softcurve.curvature.ggn import GGN
from softcurve.curvature.kfac import ClassFactor, FactorForm
from softcurve.curvature.losses import LikelihoodOptions, with_options_of
from softcurve.curvature.network import Batch, NetworkOperator, SplitNetwork
from softcurve.curvature.split import require_head
from softcurve.extras import needed
from softcurve.head import curvature, loop
from softcurve.head.plan import DEFAULT_BUDGET
from softcurve.head.products import linear_into
from softcurve.head.sharded import lies_over_processes
from softcurve.losses.rows import GAUSS_NEWTON
from softcurve.losses.spec import LogitMap
from softcurve.records import ShortRepr


class LastLayerLaplace:
    """``N([W | b], (H + prior_precision I)⁻¹)``, a posterior of ``head`` given ``data``.

    Args:
        head: a trained ``nn.Linear``, which is copied. The posterior should be around its mode, so a weight decay that
            it was trained with is the natural prior: ``prior_precision = N · weight_decay`` for a mean loss.
        data: a re-iterable of batches ``(x, target)`` or ``(x, target, sample_weight)``. Weights of rows and classes
            count as if a row occurred that many times; soft labels and smoothing share a row between classes.
        features: maps a batch ``x`` to ``e (..., d)``, in its present mode; ``None`` where ``x`` is ``e`` itself.
        structure: ``"kronecker"`` or ``"diagonal"``.
        prior_precision: ``δ``, of each weight and bias.
        form, rank: the explicit form of the Kronecker class factor: ``"dense"`` ``(C, C)``, ``"low_rank"``
            ``(C, rank)`` or ``"auto"``, dense up to 2,048 classes. A form of low rank is above ``B``, which makes
            variances smaller.
        weight, ignore_index, label_smoothing, temperature, softcap, shift, memory_budget: as in
            :func:`softcurve.linear_cross_entropy`, the negative log-likelihood, summed over rows, in nats.
        seed: the seed of dropout, and of a class factor of low rank.
        progress, process_group, check_deterministic: as in :class:`~softcurve.curvature.Hessian`.

    Nothing here records a graph. Instances are immutable: methods that change the prior return a new instance.

    Raises:
        TypeError, ValueError: for an argument of the wrong type or value; what the loss raises for a batch.
    """

    @with_options_of(NetworkOperator, without=("loss", "beta", "z_loss", "reduction", "base"))
    def __init__(
        self, head: nn.Linear, data: Iterable[Batch], *, features: nn.Module | None = None,
        structure: Literal["kronecker", "diagonal"] = "kronecker", prior_precision: float = 1.0,
        form: FactorForm = "auto", rank: int = 128, seed: int = 0, progress: bool = False,
        process_group: ProcessGroup | None = None, check_deterministic: bool = True,
        **options: Unpack[LikelihoodOptions],
    ) -> None:  # fmt: skip
        checks.require_choice("structure", structure, ("kronecker", "diagonal"))
        checks.require_positive("prior_precision", prior_precision)
        self.features = nn.Identity() if features is None else features
        self.head = _copy_parameters(head)
        operator = GGN(
            self.features, self.head, data, reduction="sum", seed=seed, progress=progress, process_group=process_group,
            check_deterministic=check_deterministic, **options,
        )  # fmt: skip
        network = operator.network
        self._map, self._seed = network.map, network.random_seed("features", 0)
        spec, budget = operator.losses.spec, operator.losses.memory_budget
        self.logit_map = LogitMap(spec.temperature, spec.softcap)
        self.log_likelihood = _log_likelihood(network)
        if budget is None:
            budget = DEFAULT_BUDGET.get(self.head.weight.device.type, 2**28)
        prior = float(prior_precision)
        self.structure: DiagonalPrecision | KroneckerPrecision
        if structure == "diagonal":
            self.structure = DiagonalPrecision(prior, budget, *_diagonal_of(network))
        else:
            factors = operator.kfac(form=form, rank=rank, seed=seed)
            values, vectors = factors.feature_spectrum
            classes = self.head.out_features
            self.structure = KroneckerPrecision(prior, budget, values.double(), vectors, factors.form, classes)

    def __repr__(self) -> str:
        shape = f"classes={self.head.out_features}, features={self.head.in_features}"
        kind = "diagonal" if isinstance(self.structure, DiagonalPrecision) else "kronecker"
        return f"LastLayerLaplace(structure={kind!r}, prior_precision={self.prior_precision:.6g}, {shape})"

    @property
    def prior_precision(self) -> float:
        """The precision ``δ`` of the prior."""
        return self.structure.prior

    def with_prior_precision(self, prior_precision: float) -> LastLayerLaplace:
        """Return the same curvature under another prior, without another pass over the data."""
        checks.require_positive("prior_precision", prior_precision)
        other = copy.copy(self)
        other.structure = replace(self.structure, prior=float(prior_precision))
        return other

    def log_marginal_likelihood(self, prior_precision: float | Tensor | None = None) -> Float64[Tensor, "*precisions"]:
        """Return ``log p(D) ≈ log p(D|θ*) − ½ (δ ‖θ*‖² + log det(I + H/δ))``, in nats, for each of ``prior_precision``.

        That is ``log p(D|θ*) + log N(θ*; 0, I/δ) + ½ P log 2π − ½ log det(H + δ I)``, and concave in ``log δ``. It is
        only up to a constant where rows have weights or soft labels. For a class factor of low rank each value costs
        ``d`` decompositions of ``(C, rank)``. Source: MacKay 1992; Immer et al. 2021, "Scalable marginal likelihood
        estimation for model selection in deep learning".

        Raises:
            ValueError: a precision is not a finite number above 0.
        """
        precision = self.prior_precision if prior_precision is None else prior_precision
        precisions = torch.as_tensor(precision, dtype=torch.float64)
        if not (precisions.isfinite() & (precisions > 0)).all():
            raise ValueError(f"prior_precision must hold finite numbers above 0, got {precision!r}")
        evidence = [self._evidence(prior) for prior in precisions.flatten().tolist()]
        return torch.tensor(evidence, dtype=torch.float64).reshape(precisions.shape)

    def optimize_prior_precision(
        self, *, bounds: tuple[float, float] = (1e-6, 1e6), tol: float = 1e-6
    ) -> LastLayerLaplace:
        """Return the same posterior with the ``δ`` of the largest evidence within ``bounds``, to ``tol`` relatively.

        The evidence has one maximum: there ``δ ‖θ*‖² = Σ h/(h + δ)``, the number of well-determined parameters. Where
        it still rises at a bound, the result is that bound. Brent's method in ``log δ``; needs scipy.
        """
        low, high = (checks.require_positive("bounds", bound) for bound in bounds)
        checks.require_positive("tol", tol)
        if low >= high:
            raise ValueError(f"bounds must be a smaller and a larger prior precision, got {bounds}")
        with needed("optimize_prior_precision", "fit"):
            from scipy.optimize import minimize_scalar

        def negative_evidence(s: float) -> float:
            return -self._evidence(math.exp(s))

        limits = math.log(low), math.log(high)
        best = minimize_scalar(negative_evidence, bounds=limits, method="bounded", options={"xatol": tol})
        return self.with_prior_precision(math.exp(float(best.x)))

    def _evidence(self, prior: float) -> float:
        square = sum(float(p.detach().double().square().sum()) for p in self.head.parameters())
        return self.log_likelihood - (prior * square + replace(self.structure, prior=prior).log_ratio()) / 2

    @torch.no_grad()
    def predictive_variance(self, x: Any) -> Float[Tensor, "*rows classes"]:
        """Return ``diag(J Σ Jᵀ)``: the posterior variance of each logit ``W e + b``, before soft cap and temperature.

        ``x`` is an input of ``features``, or ``e (..., d)`` itself where there are none.
        """
        e = self._features_of(x)
        return self.structure.variance(e.reshape(-1, e.shape[-1])).reshape(*e.shape[:-1], -1)

    @torch.no_grad()
    def predict_proba(
        self, x: Any, *, correction: Literal["probit", "mc", "none"] = "probit", samples: int = 256, seed: int = 0
    ) -> Float[Tensor, "*rows classes"]:
        """Return the probabilities of the classes, averaged over the posterior as ``correction`` says.

        ``"probit"``: ``softmax(z / √(1 + π/8 var))`` (MacKay 1992; Lu, Ie, Sha 2020); ``"mc"``: the mean of ``samples``
        softmaxes of independent normal logits with these variances, drawn from ``seed``; ``"none"``: the softmax at the
        mean. Soft cap and temperature are applied to the logits before the softmax; for the probit their slope scales
        the variances. All rows share the draws, so that a row does not depend on its batch.
        """
        checks.require_choice("correction", correction, ("probit", "mc", "none"))
        checks.require_count("samples", samples, 1)
        e = self._features_of(x)
        flat, classes = e.reshape(-1, e.shape[-1]), self.head.out_features
        exact = correction == "none"
        output = flat.new_empty(len(flat), classes) if exact else self.structure.variance(flat)
        for rows in slices(len(flat), 6 * classes * flat.itemsize, self.structure.budget):
            variance = output[rows]  # replaced by the rows' probabilities
            z = linear_into(torch.empty_like(variance), flat[rows], self.head.weight, self.head.bias, scale=1.0)
            if correction == "mc":
                variance.copy_(self._mean_softmax(z, variance.sqrt(), samples, seed))
                continue
            mapped = self.logit_map.value(z)
            if not exact:
                mapped = mapped / torch.sqrt(1 + math.pi / 8 * self.logit_map.slope(z).square() * variance)
            torch.softmax(mapped, -1, out=variance)
        return output.reshape(*e.shape[:-1], classes)

    def _mean_softmax(self, z: Tensor, deviation: Tensor, samples: int, seed: int) -> Tensor:
        """Return the mean of the softmax of ``z + deviation ⊙ ε``."""
        generator = torch.Generator().manual_seed(seed)
        total = torch.zeros_like(z)
        for _ in range(samples):
            noise = torch.randn(z.shape[1], generator=generator, dtype=z.dtype).to(z.device)
            total += torch.softmax(self.logit_map.value(torch.addcmul(z, deviation, noise)), -1)
        return total / samples

    def _features_of(self, x: Any) -> Tensor:
        """Return features in the computation's dtype; dropout in training mode is that of the data's first batch."""
        width, weight = self.head.in_features, self.head.weight
        e = self._map(x, self._seed, device=weight.device, graph=False)
        if not isinstance(e, Tensor) or not e.is_floating_point() or e.ndim == 0 or e.shape[-1] != width:
            came = checks.describe(e)
            raise ValueError(f"x must have floating-point features of shape (..., {width}), as head takes, got {came}")
        if e.device != weight.device:
            raise ValueError(f"x must have features on head's device {weight.device}, got {e.device}; move it there")
        return e.detach().to(checks.wide_dtype(e.dtype, weight.dtype))


def slices(count: int, each: int, budget: int) -> list[slice]:
    """Yield slices of ``count`` items of ``each`` bytes that need at most ``budget`` bytes, but hold at least one."""
    step = max(1, budget // each)
    return [slice(start, start + step) for start in range(0, count, step)]


@dataclass(frozen=True, eq=False, repr=False)
class DiagonalPrecision(ShortRepr):
    """The exact diagonal of ``H``; temporary tensors take at most ``budget`` bytes."""

    prior: float
    budget: int
    weight: Float[Tensor, "classes features"]
    bias: Float[Tensor, " classes"] | None

    def log_ratio(self) -> float:
        """Return ``log det(I + H / prior) = Σ log1p(h / prior)``."""
        total = 0.0 if self.bias is None else float(torch.log1p(self.bias.double() / self.prior).sum())
        for classes in slices(len(self.weight), 3 * 8 * self.weight.shape[1], self.budget):
            total += float(torch.log1p(self.weight[classes].double() / self.prior).sum())
        return total

    def variance(self, e: Float[Tensor, "n features"]) -> Float[Tensor, "n classes"]:
        """Return ``(e ⊙ e) @ (1 / (h + prior))ᵀ``, some rows and classes at a time."""
        variance = e.new_empty(len(e), len(self.weight))
        bytes_each = 4 * e.itemsize * e.shape[1]
        for classes in slices(len(self.weight), bytes_each, self.budget):
            inverse = (1 / (self.weight[classes] + self.prior)).to(e.dtype)
            for rows in slices(len(e), bytes_each, self.budget):
                torch.matmul(e[rows].square(), inverse.T, out=variance[rows, classes])
        if self.bias is not None:
            variance += (1 / (self.bias + self.prior)).to(e.dtype)
        return variance


@dataclass(frozen=True, eq=False, repr=False)
class KroneckerPrecision(ShortRepr):
    """``B ⊗ A`` with ``A = vectors diag(values) vectorsᵀ`` and ``form`` for ``B``; its inverses are in float64."""

    prior: float
    budget: int
    values: Float64[Tensor, " d"]
    vectors: Float[Tensor, "d d"]
    form: ClassFactor
    classes: int

    def log_ratio(self) -> float:
        """Return ``log det(I + H / prior) = Σ_j log det(a_j / prior B + I)``."""
        total = 0.0
        for part in self._parts:
            damped = self.form.damped(self.values[part], self.prior, name="prior_precision")
            total += float((damped.log_determinants() - self.classes * math.log(self.prior)).sum())
        return total

    def variance(self, e: Float[Tensor, "n features"]) -> Float[Tensor, "n classes"]:
        """Return ``Σ_j (ẽ·u_j)² [(a_j B + prior I)⁻¹]_kk``, some rows and eigenvectors at a time."""
        variance = e.new_zeros(len(e), self.classes)
        vectors = self.vectors.to(e.dtype)
        for part, inverse in self._inverse_diagonals or map(self._inverse_diagonal, self._parts):
            for rows in slices(len(e), 4 * e.itemsize * inverse.shape[1], self.budget):
                along = e[rows] @ vectors[: e.shape[1], part]
                if len(vectors) > e.shape[1]:
                    along += vectors[-1, part]
                variance[rows].addmm_(along.square_(), inverse.T.to(e.dtype))
        return variance

    @property
    def _parts(self) -> list[slice]:
        """The eigenvectors, as many at a time as the budget allows."""
        return slices(len(self.values), 4 * 8 * self.classes, self.budget)

    @functools.cached_property
    def _inverse_diagonals(self) -> list[tuple[slice, Tensor]]:
        """Those of all eigenvectors, kept for the next call if they fit within the budget."""
        return list(map(self._inverse_diagonal, self._parts)) if len(self._parts) == 1 else []

    def _inverse_diagonal(self, part: slice) -> tuple[slice, Tensor]:
        """Return ``[(a_j B + prior I)⁻¹]_kk``, ``(C, j)``, for some eigenvectors."""
        return part, self.form.damped(self.values[part], self.prior, name="prior_precision").inverse_diagonal()


def _copy_parameters(head: nn.Linear) -> nn.Linear:
    """Return a head without ties, hooks and freezing, so that later training does not move the posterior."""
    require_head(head)
    if lies_over_processes(head.weight):
        raise TypeError("head must hold plain tensors, got a DTensor; gather it by head.weight.full_tensor() first")
    copied = nn.Linear(head.in_features, head.out_features, bias=head.bias is not None, device="meta")
    for name, parameter in head.named_parameters():
        if not parameter.detach().isfinite().all():
            raise ValueError(
                "head must hold finite numbers, got NaN or infinity, of which no normal distribution is the mean; "
                "leave out classes that are masked"
            )
        setattr(copied, name, nn.Parameter(parameter.detach().clone()))
    return copied


def _log_likelihood(network: SplitNetwork) -> float:
    """Return ``Σ weight_i log p(y_i)``."""
    total, counted = 0.0, 0.0
    for rows in network.rows("Log-likelihood", graph=False):
        loss, tensors, _, budget = rows.losses
        losses = loop.evaluate(loss, tensors, budget).rows.double()
        total -= float((losses * tensors.row_weight.double()).sum())
        counted += float((tensors.row_weight != 0).sum())
    network.require_rows(counted)
    return network.sum_number(total)


def _diagonal_of(network: SplitNetwork) -> tuple[Tensor, Tensor | None]:
    """Return the diagonal of ``H`` in weight and bias, without rounding errors below 0."""
    weight = torch.zeros_like(network.head.weight.detach(), dtype=network.layout.dtype)
    bias = weight.new_zeros(len(weight))
    for rows in network.rows("Diagonal", graph=False):
        in_weight, in_bias, _ = curvature.diagonal(rows.losses, GAUSS_NEWTON, wants_diagonal=True)
        assert in_weight is not None
        assert in_bias is not None
        weight += in_weight
        bias += in_bias
    weight, bias = network.sum_data_shards(weight), network.sum_data_shards(bias)
    return weight.clamp_(min=0), None if network.head.bias is None else bias.clamp_(min=0)
