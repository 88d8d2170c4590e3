"""The trace and the diagonal of a symmetric matrix from its products with random vectors.

Every estimate is unbiased and carries a standard error that is computed from its own samples.

Hutchinson, A stochastic estimator of the trace of the influence matrix, 1990: ``E ωᵀA ω = tr A``.
Bekas, Kokiopoulou, Saad, An estimator for the diagonal of a matrix, 2007: ``E ω ⊙ A ω = diag A`` for signs ``ω``.
Meyer, Musco, Musco, Woodruff, Hutch++: Optimal stochastic trace estimation, 2021: the trace on the range of a sketch
exactly, the rest by Hutchinson.
Epperly, Tropp, Webber, XTrace: Making the most of every sample in stochastic trace estimation, 2024: every vector
serves as a sketch for all others and as a sample beyond their range.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import get_args

import torch
from torch import Tensor

from softcurve import checks
from softcurve.array_types import Float, Float64
from softcurve.curvature.operator import (
    DiagonalMethod,
    Distribution,
    SymmetricOperator,
    TraceMethod,
    identity_columns,
    require_count,
    working_dtype,
)
from softcurve.records import dataclass_repr

__all__ = ["DiagonalEstimate", "Estimate", "diagonal", "trace"]

LEAST_PRODUCTS = {"hutchinson": 2, "hutch++": 4, "xtrace": 4, "xdiag": 4}  # for a standard error
ROWS_AT_ONCE = 1 << 16  # widened to float64 for an inner product


@dataclass(frozen=True)
class Estimate:
    """A number with its standard error; 0 where the number is exact, NaN where there is a single sample.

    ``samples`` of the estimate from ``products`` of the matrix with a vector, by ``method`` (``"exact"``: the matrix
    was no larger than the products allowed, and they were those with the identity).
    """

    value: float
    standard_error: float
    samples: int
    products: int
    method: str

    def __str__(self) -> str:
        value, error = _rounded_together(self.value, self.standard_error)
        return f"{value} ± {error} ({self.method}, {self.products} products)"


@dataclass(frozen=True, eq=False)
class DiagonalEstimate:
    """A diagonal with the standard error of each entry; the counts are those of :class:`Estimate`."""

    values: Float[Tensor, " n"]
    standard_error: Float[Tensor, " n"]
    samples: int
    products: int
    method: str

    __repr__ = dataclass_repr


def trace(
    operator: SymmetricOperator,
    *,
    method: TraceMethod = "xtrace",
    products: int = 64,
    distribution: Distribution = "rademacher",
    seed: int = 0,
    columns_at_once: int = 16,
) -> Estimate:
    """``tr A`` by ``"hutchinson"``, ``"hutch++"`` or ``"xtrace"``, from at most ``products`` products.

    The error falls like ``products^(−1/2)`` by Hutchinson, and like ``1/products`` or faster by the other two where the
    spectrum decays; where it is flat, they gain nothing with random signs, and Hutchinson is better. They
    are exact for a rank below ``products/3`` and ``products/2``, and hold about three times as many columns of length
    ``n`` as there are products (in the operator's dtype, at least float32); Hutchinson holds ``columns_at_once``.
    From ``products ≥ n`` on, the trace is exact, by ``n`` products with the identity.

    The standard error is that of the mean of independent samples for Hutchinson and for the part of Hutch++ beyond the
    sketch. XTrace's samples are exchangeable, not independent: their covariance is estimated and counted. Of few
    samples (below some 30 products) it is itself a rough estimate, and covers the truth less often than a normal one.

    The vectors are drawn from ``seed`` on the CPU, alike on every device and for every ``columns_at_once``.

    Raises:
        ValueError: an unknown method or distribution, or fewer products than the method needs for a standard error.
    """
    checks.require_choice("method", method, get_args(TraceMethod))
    checks.require_choice("distribution", distribution, get_args(Distribution))
    _require_budget(operator, method, products, columns_at_once)
    if products >= operator.shape[0]:
        return _exact_trace(operator, columns_at_once)
    draws = Draws(operator, distribution, seed)
    if method == "hutchinson":
        samples = torch.cat([_dots(v, _products(operator, v)) for v in draws.chunks(products, columns_at_once)])
        return _mean(samples, products, method)
    if method == "hutch++":
        return _hutch_plus_plus(operator, draws, products, columns_at_once)
    return _xtrace(operator, draws, products // 2, columns_at_once)


def diagonal(
    operator: SymmetricOperator,
    *,
    method: DiagonalMethod = "xdiag",
    products: int = 64,
    seed: int = 0,
    columns_at_once: int = 16,
) -> DiagonalEstimate:
    """``diag A`` by ``"hutchinson"`` or ``"xdiag"`` with random signs, from at most ``products`` products.

    XDiag is exact for a rank below ``products/2`` and holds three times as many columns of length ``n`` as products;
    Hutchinson holds ``columns_at_once``.
    From ``products ≥ n`` on, the diagonal is exact, by ``n`` products with the
    identity. Standard errors, ``seed`` and errors raised are as for :func:`trace`.
    """
    checks.require_choice("method", method, get_args(DiagonalMethod))
    _require_budget(operator, method, products, columns_at_once)
    if products >= operator.shape[0]:
        return _exact_diagonal(operator, columns_at_once)
    draws = Draws(operator, "rademacher", seed)
    if method == "hutchinson":
        return _hutchinson_diagonal(operator, draws, products, columns_at_once)
    return _xdiag(operator, draws, products // 2, columns_at_once)


@dataclass(frozen=True)
class Draws:
    """Columns of independent entries of mean 0 and variance 1, one after another from a seed."""

    operator: SymmetricOperator
    distribution: Distribution
    seed: int

    def chunks(self, count: int, columns_at_once: int) -> Iterator[Float[Tensor, "n k"]]:
        """``count`` columns from the first on, in matrices of ``columns_at_once``."""
        generator = torch.Generator().manual_seed(self.seed)
        column = torch.empty(self.operator.shape[0], dtype=torch.float64)
        for start in range(0, count, columns_at_once):
            chunk = torch.empty(len(column), min(columns_at_once, count - start), dtype=working_dtype(self.operator))
            for i in range(chunk.shape[1]):
                if self.distribution == "normal":
                    chunk[:, i] = column.normal_(generator=generator)
                else:
                    chunk[:, i] = column.bernoulli_(0.5, generator=generator).mul_(2).sub_(1)
            yield chunk.to(self.operator.device)

    def columns(self, count: int) -> Float[Tensor, "n {count}"]:
        """The first ``count`` columns."""
        (columns,) = self.chunks(count, count)
        return columns


def _hutch_plus_plus(operator: SymmetricOperator, draws: Draws, products: int, columns_at_once: int) -> Estimate:
    """``tr QᵀA Q`` plus Hutchinson's mean of ``(Pω)ᵀA(Pω)``, ``P = I − QQᵀ``: a third of the products each."""
    sketched = products // 3
    sampled = products - 2 * sketched
    vectors = draws.columns(sketched + sampled)
    basis, _ = torch.linalg.qr(_products(operator, vectors[:, :sketched], columns_at_once))
    inside = _dots(basis, _products(operator, basis, columns_at_once)).sum().item()
    outside = vectors[:, sketched:]
    for _ in range(2):  # once leaves what Q lacks of orthogonality
        outside = outside - basis @ _inner(basis, outside).to(basis.dtype)
    rest = _mean(_dots(outside, _products(operator, outside, columns_at_once)), products, "hutch++")
    return Estimate(inside + rest.value, rest.standard_error, sampled, products, "hutch++")


@dataclass(frozen=True, eq=False)
class LeaveOneOut:
    """An orthonormal basis ``Q`` of the range of ``Y`` and, in its coordinates, what each column alone brings.

    ``Q(I − s_i s_iᵀ)Qᵀ`` projects onto the range of ``Y`` without column i: ``s_i`` is the unit vector orthogonal to
    the coordinates of all other columns (``R^{−T} e_i``, normalised, for an invertible R of ``Y = QR``), and 0 where
    column i depends on the others. Without columns i and j, the projector loses ``u_ij ∝ s_j − s_i(s_i·s_j)`` too.
    """

    basis: Float[Tensor, "n rank"]
    directions: Float64[Tensor, "rank k"]
    cosines: Float64[Tensor, "k k"]  # s_i·s_j
    sines: Float64[Tensor, "k k"]  # ‖s_j − s_i(s_i·s_j)‖, infinite for i = j and where either is 0: then u_ij = 0

    @classmethod
    def of(cls, columns: Float[Tensor, "n k"]) -> LeaveOneOut:
        """From ``Y = Q U Σ Vᵀ``: ``s_i ∝ Σ⁻¹Vᵀe_i`` if ``‖Vᵀe_i‖ = 1``, for ``e_i`` is then in the row space of Y."""
        q, r = torch.linalg.qr(columns)
        u, sigma, vt = torch.linalg.svd(r.double(), full_matrices=False)
        rank = int((sigma > columns.shape[1] * torch.finfo(columns.dtype).eps * sigma[0]).sum())
        vt = vt[:rank]
        essential = vt.square().sum(0) > 1 - 1e-8
        directions = vt / sigma[:rank, None]
        directions = torch.where(essential, directions / torch.linalg.vector_norm(directions, dim=0), 0.0)
        # sin = ‖s_i − s_j‖ ‖s_i + s_j‖ / 2: the s_i are nearly parallel where the spectrum falls steeply.
        apart, opposed = (
            torch.cdist(directions.mT, sign * directions.mT, compute_mode="donot_use_mm_for_euclid_dist")
            for sign in (1, -1)
        )
        sines = (apart * opposed / 2).fill_diagonal_(0)
        sines = torch.where(essential & essential.unsqueeze(1) & (sines > 1e-12), sines, math.inf)
        return cls(q @ u[:, :rank].to(q.dtype), directions, directions.mT @ directions, sines)

    def without(self, coordinates: Float64[Tensor, "rank k"]) -> Float64[Tensor, "rank k"]:
        """``(I − s_i s_iᵀ) c_i`` for each column."""
        return coordinates - self.directions * (self.directions * coordinates).sum(0)


def _exchangeable_error(
    samples: Float64[Tensor, "*n k"], covariance: Float64[Tensor, "*n"] | Float64[Tensor, ""]
) -> Tensor:
    """The standard error of the mean of exchangeable samples: ``s²/k + Cov(t_i, t_j)``, ``E s² = Var(t_i) − Cov``.

    The paper takes ``s²/k`` alone, which is too small by up to two thirds of the variance. Let ``t_i^{(j)}`` be sample
    i without vector j altogether. Given all vectors but the j-th, ``t_j`` and ``t_j^{(i)}`` have mean ``tr A``
    whatever the others, so that ``Cov(t_i, t_j) = E δ_ij δ_ji``, ``δ_ij = t_i − t_i^{(j)}``: an unbiased estimate from
    the same products. A negative one is taken for 0.
    """
    return (samples.var(-1) / samples.shape[-1] + covariance.clamp(min=0)).sqrt()


def _xtrace(operator: SymmetricOperator, draws: Draws, count: int, columns_at_once: int) -> Estimate:
    """The mean over i of ``tr Q_iᵀA Q_i + (P_i ω_i)ᵀA(P_i ω_i)``, ``Q_i`` the range of all columns of ``AΩ`` but i.

    In the coordinates of the whole range Q, with ``H = QᵀAQ`` and ``v_i = (I − s_i s_iᵀ)Qᵀω_i``, these are
    ``tr H − s_iᵀH s_i``, ``P_i ω_i = ω_i − Q v_i`` and ``A P_i ω_i = y_i − (AQ)v_i``. Normal vectors are rescaled to
    ``‖P_i ω_i‖² = n − rank Q_i`` (the paper's §2.3): their direction is uniform there, whatever their length.
    Without vector j, ``P_i ω_i`` gains ``Q u_ij (u_ij·Qᵀω_i)``.
    """
    n = operator.shape[0]
    vectors = draws.columns(count)
    images = _products(operator, vectors, columns_at_once)
    out = LeaveOneOut.of(images)
    basis, s = out.basis, out.directions
    images_of_basis = _products(operator, basis, columns_at_once)
    inside = _inner(basis, images_of_basis)
    coordinates = _inner(basis, vectors)
    kept = out.without(coordinates).to(basis.dtype)
    outside = vectors - basis @ kept
    slopes = _inner(images_of_basis, outside)
    squares = _dots(outside, images - images_of_basis @ kept)
    lengths = _dots(outside, outside)
    ranks = basis.shape[1] - s.square().sum(0)
    normal = draws.distribution == "normal"

    scaled = squares * (n - ranks) / lengths if normal else squares
    inside_s = inside @ s
    samples = scaled + inside.trace() - (s * inside_s).sum(0)
    changes = torch.empty(count, count, dtype=torch.float64, device=s.device)  # δ_ij
    block = max(1, (1 << 20) // (count * max(1, basis.shape[1])))
    for i in torch.arange(count, device=s.device).split(block):
        cosines, sines = out.cosines[i].unsqueeze(1), out.sines[i].unsqueeze(1)
        u, inside_u = ((t - t[:, i].mT.unsqueeze(2) * cosines) / sines for t in (s, inside_s))
        curvature = (u * inside_u).sum(1)
        along, slope = ((t[:, i].mT.unsqueeze(1) @ u).squeeze(1) for t in (coordinates, slopes))
        square = squares[i].unsqueeze(1) + 2 * along * slope + along.square() * curvature
        if normal:
            length = lengths[i].unsqueeze(1) + along.square()
            square = square * (n - ranks[i].unsqueeze(1) + u.square().sum(1)) / length
        changes[i] = curvature + scaled[i].unsqueeze(1) - square
    changes.fill_diagonal_(0)
    covariance = (changes * changes.mT).sum() / (count * (count - 1))
    error = _exchangeable_error(samples, covariance).item()
    return Estimate(samples.mean().item(), error, count, count + basis.shape[1], "xtrace")


def _xdiag(operator: SymmetricOperator, draws: Draws, count: int, columns_at_once: int) -> DiagonalEstimate:
    """The mean over i of ``diag Q_iQ_iᵀA + ω_i ⊙ (I − Q_iQ_iᵀ)A ω_i`` for signs ``ω_i``, ``Q_i`` as for XTrace.

    With ``y_i = A ω_i`` in the range Q: ``t_i = diag QQᵀA − Qs_i ⊙ AQs_i + ω_i ⊙ Qs_i (s_i·Qᵀy_i)`` and, since
    ``s_j·Qᵀy_i = 0``, ``δ_ij = Qu_ij ⊙ AQu_ij − ω_i ⊙ Qu_ij (u_ij·Qᵀy_i)`` with
    ``u_ij·Qᵀy_i = −(s_i·s_j)(s_i·Qᵀy_i)/‖s_j − s_i(s_i·s_j)‖``. Row by row of the matrix, in float64.
    """
    vectors = draws.columns(count)
    images = _products(operator, vectors, columns_at_once)
    out = LeaveOneOut.of(images)
    images_of_basis = _products(operator, out.basis, columns_at_once)
    lengths = (out.directions * _inner(out.basis, images)).sum(0)
    cosines, sines = out.cosines, out.sines
    bends = (lengths.unsqueeze(1) * cosines / sines).fill_diagonal_(0)
    values, errors = torch.empty_like(vectors[:, 0]), torch.empty_like(vectors[:, 0])
    block = max(1, (1 << 20) // count**2)
    for rows in (slice(start, start + block) for start in range(0, operator.shape[0], block)):
        omega, q, aq = (t[rows].double() for t in (vectors, out.basis, images_of_basis))
        qs, aqs = q @ out.directions, aq @ out.directions
        samples = (q * aq).sum(1, keepdim=True) + qs * (omega * lengths - aqs)
        qu, aqu = ((t.unsqueeze(1) - t.unsqueeze(2) * cosines) / sines for t in (qs, aqs))
        changes = qu * (aqu + omega.unsqueeze(2) * bends)
        covariance = (changes * changes.mT).sum((1, 2)) / (count * (count - 1))
        values[rows] = samples.mean(1).to(values.dtype)
        errors[rows] = _exchangeable_error(samples, covariance).to(errors.dtype)
    return DiagonalEstimate(values, errors, count, count + out.basis.shape[1], "xdiag")


def _hutchinson_diagonal(
    operator: SymmetricOperator, draws: Draws, products: int, columns_at_once: int
) -> DiagonalEstimate:
    """The mean of ``ω ⊙ A ω``; mean and squared deviations are merged chunk by chunk (Chan, Golub, LeVeque 1983)."""
    mean = torch.zeros(operator.shape[0], dtype=working_dtype(operator), device=operator.device)
    deviations = torch.zeros_like(mean)
    seen = 0
    for vectors in draws.chunks(products, columns_at_once):
        samples = vectors * _products(operator, vectors)
        chunk = samples.mean(1)
        count = samples.shape[1]
        shift = chunk - mean
        deviations += (samples - chunk.unsqueeze(1)).square().sum(1) + shift.square() * (seen * count / (seen + count))
        mean += shift * (count / (seen + count))
        seen += count
    return DiagonalEstimate(mean, (deviations / (seen - 1) / seen).sqrt(), seen, seen, "hutchinson")


def _exact_diagonal(operator: SymmetricOperator, columns_at_once: int) -> DiagonalEstimate:
    n = operator.shape[0]
    values = torch.empty(n, dtype=working_dtype(operator), device=operator.device)
    for start in range(0, n, columns_at_once):
        chunk = identity_columns(operator, start, min(start + columns_at_once, n))
        values[start : start + chunk.shape[1]] = _products(operator, chunk)[start:].diagonal()
    return DiagonalEstimate(values, torch.zeros_like(values), n, n, "exact")


def _exact_trace(operator: SymmetricOperator, columns_at_once: int) -> Estimate:
    n = operator.shape[0]
    return Estimate(_exact_diagonal(operator, columns_at_once).values.double().sum().item(), 0.0, n, n, "exact")


def _products(
    operator: SymmetricOperator, vectors: Float[Tensor, "n k"], columns_at_once: int | None = None
) -> Float[Tensor, "n k"]:
    """``A V``, ``columns_at_once`` (all) at a time, in the working dtype."""
    products = torch.empty_like(vectors, dtype=working_dtype(operator))
    if vectors.shape[1]:
        for into, chunk in zip(*(t.split(columns_at_once or t.shape[1], 1) for t in (products, vectors)), strict=True):
            into.copy_(operator @ chunk)
    if not products.isfinite().all():
        raise ValueError("operator must give finite products, got NaN or infinity; look for where they come from")
    return products


def _inner(a: Float[Tensor, "n k"], b: Float[Tensor, "n m"]) -> Float64[Tensor, "k m"]:
    """``aᵀb`` in float64, by blocks of rows so that no wide copy of either is held."""
    total = torch.zeros(a.shape[1], b.shape[1], dtype=torch.float64, device=a.device)
    for rows_a, rows_b in zip(a.split(ROWS_AT_ONCE), b.split(ROWS_AT_ONCE), strict=True):
        total.addmm_(rows_a.double().mT, rows_b.double())
    return total


def _dots(a: Float[Tensor, "n k"], b: Float[Tensor, "n k"]) -> Float64[Tensor, " k"]:
    """``a_i·b_i`` of the columns, in float64."""
    blocks = zip(a.split(ROWS_AT_ONCE), b.split(ROWS_AT_ONCE), strict=True)
    return torch.stack([torch.linalg.vecdot(x.double(), y.double(), dim=0) for x, y in blocks]).sum(0)


def _mean(samples: Float64[Tensor, " k"], products: int, method: str) -> Estimate:
    error = samples.std().item() / math.sqrt(len(samples))
    return Estimate(samples.mean().item(), error, len(samples), products, method)


def _require_budget(operator: SymmetricOperator, method: str, products: int, columns_at_once: int) -> None:
    require_count("products", products, 1)
    require_count("columns_at_once", columns_at_once, 1)
    n = operator.shape[0]
    least = min(LEAST_PRODUCTS[method], n)
    if products < least:
        raise ValueError(
            f"products must be at least {least} for method={method!r} on a matrix of shape ({n}, {n}), got {products}; "
            "fewer give no standard error"
        )


def _rounded_together(value: float, error: float) -> tuple[str, str]:
    """The error to two digits and the value to the same decimal place; an exact value to twelve digits."""
    if not (math.isfinite(value) and math.isfinite(error)) or error <= 0:
        return f"{value:.12g}", f"{error:.2g}"
    place = math.floor(math.log10(error)) - 1
    if -12 <= place <= 0:
        return f"{value:.{-place}f}", f"{error:.{-place}f}"
    digits = max(1, math.floor(math.log10(abs(value))) - place + 1) if value else 1
    return f"{value:.{min(digits, 17)}g}", f"{error:.2g}"
