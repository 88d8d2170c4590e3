"""Estimates of the trace and the diagonal of a symmetric matrix from its products with random vectors.

Every estimate is unbiased and carries a standard error that is computed from its own samples.

Hutchinson 1990, A stochastic estimator of the trace of the influence matrix: ``E ωᵀA ω = tr A``.
Bekas, Kokiopoulou, Saad 2007, An estimator for the diagonal of a matrix: ``E ω ⊙ A ω = diag A`` for signs ``ω``.
Meyer, Musco, Musco, Woodruff 2021, Hutch++: Optimal stochastic trace estimation: the exact trace on the range of a
sketch, plus Hutchinson's estimate of the rest.
Epperly, Tropp, Webber 2024, XTrace: Making the most of every sample in stochastic trace estimation: every vector is
part of the sketch for all others and a sample outside the others' range.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from softcurve import checks
from softcurve.array_types import Float, Float64
from softcurve.curvature.algorithms.matrix import (
    Distribution,
    SymmetricMatrix,
    dots,
    identity_chunks,
    inner,
    product,
    random_chunks,
    random_columns,
    working_dtype,
)
from softcurve.records import ShortRepr

TraceMethod = Literal["hutchinson", "hutch++", "xtrace"]
DiagonalMethod = Literal["xdiag", "hutchinson"]

LEAST_PRODUCTS = {"hutchinson": 2, "hutch++": 4, "xtrace": 4, "xdiag": 4}  # for a standard error


@dataclass(frozen=True)
class Estimate:
    """A number with its standard error, which is 0 for an exact number and NaN for a single sample.

    It is made of ``samples`` samples from ``products`` matrix-vector products. ``method`` is ``"exact"`` where the
    budget of products covered the whole matrix.
    """

    value: float
    standard_error: float
    samples: int
    products: int
    method: str

    @staticmethod
    def mean_of(samples: Float64[Tensor, " k"], products: int, method: str) -> Estimate:
        """Return the mean of independent samples."""
        error = samples.std().item() / math.sqrt(len(samples)) if len(samples) > 1 else math.nan
        return Estimate(samples.mean().item(), error, len(samples), products, method)

    def __str__(self) -> str:
        value, error = _round_to_error(self.value, self.standard_error)
        return f"{value} ± {error} ({self.method}, {self.products} products)"


@dataclass(frozen=True, eq=False, repr=False)
class DiagonalEstimate(ShortRepr):
    """A diagonal with the standard error of each entry; the counts are those of :class:`Estimate`."""

    values: Float[Tensor, " n"]
    standard_error: Float[Tensor, " n"]
    samples: int
    products: int
    method: str


def trace(
    matrix: SymmetricMatrix, *, method: TraceMethod = "xtrace", products: int = 64,
    distribution: Distribution = "rademacher", seed: int = 0, columns_at_once: int = 16,
) -> Estimate:  # fmt: skip
    """Return ``tr A`` by ``"hutchinson"``, ``"hutch++"`` or ``"xtrace"``, from at most ``products`` products.

    The error falls like ``products^(−1/2)`` by Hutchinson, and like ``1/products`` or faster by the other two where the
    spectrum decays. Where it is flat, Hutchinson with random signs is better. The other two are exact for a rank below
    ``products/3`` and ``products/2``, and hold about three times as many columns of length ``n`` as there are products
    (in the matrix's dtype, at least float32). Hutchinson holds ``columns_at_once``. From ``products ≥ n`` on the trace
    is exact, by ``n`` products with the identity.

    The standard error is that of the mean of independent samples for Hutchinson and for Hutch++ outside the sketch.
    XTrace's samples are exchangeable, not independent, and their covariance is estimated too. From few samples (below
    some 30 products) the standard error is itself rough and covers the truth less often than a normal one.

    The vectors are drawn from ``seed`` on the CPU and do not depend on the device or on ``columns_at_once``.

    Raises:
        ValueError: an unknown method or distribution, or fewer products than the method needs for a standard error.
    """
    checks.require_choice("method", method, get_args(TraceMethod))
    checks.require_choice("distribution", distribution, get_args(Distribution))
    _require_budget(matrix, method, products, columns_at_once)
    n = matrix.shape[0]
    if products >= n:
        return Estimate(_exact_diagonal(matrix, columns_at_once).values.double().sum().item(), 0.0, n, n, "exact")
    if method == "hutchinson":
        chunks = random_chunks(matrix, products, columns_at_once, seed=seed, distribution=distribution)
        return Estimate.mean_of(torch.cat([dots(v, product(matrix, v)) for v in chunks]), products, method)
    if method == "hutch++":
        sketched = products // 3
        vectors = random_columns(matrix, products - sketched, seed=seed, distribution=distribution)
        return _hutch_plus_plus(matrix, vectors, sketched, columns_at_once)
    vectors = random_columns(matrix, products // 2, seed=seed, distribution=distribution)
    return _xtrace(matrix, vectors, columns_at_once, is_normal=distribution == "normal")


def diagonal(
    matrix: SymmetricMatrix, *, method: DiagonalMethod = "xdiag", products: int = 64, seed: int = 0,
    columns_at_once: int = 16,
) -> DiagonalEstimate:  # fmt: skip
    """Return ``diag A`` by ``"hutchinson"`` or ``"xdiag"`` with random signs, from at most ``products`` products.

    XDiag is exact for a rank below ``products/2`` and holds three times as many columns of length ``n`` as products.
    Hutchinson holds ``columns_at_once``. From ``products ≥ n`` on the diagonal is exact, by ``n`` products with the
    identity. Standard errors, ``seed`` and the errors raised are those of :func:`trace`.
    """
    checks.require_choice("method", method, get_args(DiagonalMethod))
    _require_budget(matrix, method, products, columns_at_once)
    if products >= matrix.shape[0]:
        return _exact_diagonal(matrix, columns_at_once)
    if method == "hutchinson":
        return _hutchinson_diagonal(matrix, products, seed, columns_at_once)
    return _xdiag(matrix, random_columns(matrix, products // 2, seed=seed, distribution="rademacher"), columns_at_once)


def _hutch_plus_plus(
    matrix: SymmetricMatrix, vectors: Float[Tensor, "n k"], sketched: int, columns_at_once: int
) -> Estimate:
    """Return ``tr QᵀA Q`` plus Hutchinson's mean of ``(Pω)ᵀA(Pω)``, ``P = I − QQᵀ``: a third of the products each."""
    basis, _ = torch.linalg.qr(product(matrix, vectors[:, :sketched], columns_at_once))
    inside = dots(basis, product(matrix, basis, columns_at_once)).sum().item()
    outside = vectors[:, sketched:]
    for _ in range(2):  # the second projection removes what rounding leaves of Q in the first
        outside = outside - basis @ inner(basis, outside).to(basis.dtype)
    products = sketched + vectors.shape[1]
    rest = Estimate.mean_of(dots(outside, product(matrix, outside, columns_at_once)), products, "hutch++")
    return Estimate(inside + rest.value, rest.standard_error, rest.samples, products, "hutch++")


@dataclass(frozen=True, eq=False)
class LeaveOneOut:
    """An orthonormal basis ``Q`` of the range of ``Y`` and, in its coordinates, the direction only column i adds.

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


def _exchangeable_error(samples: Float64[Tensor, "*n k"], covariance: Float64[Tensor, "*n"]) -> Tensor:
    """Return the error of the mean of exchangeable samples: ``s²/k + Cov(t_i, t_j)``, ``E s² = Var(t_i) − Cov``.

    The paper takes ``s²/k`` alone, which is too small by up to two thirds of the variance. Let ``t_i^{(j)}`` be sample
    i without vector j altogether. Given all vectors but the j-th, ``t_j`` and ``t_j^{(i)}`` have mean ``tr A``
    whatever the others, so that ``Cov(t_i, t_j) = E δ_ij δ_ji``, ``δ_ij = t_i − t_i^{(j)}``: an unbiased estimate from
    the same products. A negative one is taken for 0.
    """
    return (samples.var(-1) / samples.shape[-1] + covariance.clamp(min=0)).sqrt()


def _xtrace(
    matrix: SymmetricMatrix, vectors: Float[Tensor, "n k"], columns_at_once: int, *, is_normal: bool
) -> Estimate:
    """Return the mean over i of ``tr Q_iᵀA Q_i + (P_i ω_i)ᵀA(P_i ω_i)``, ``Q_i`` the range of ``AΩ`` without column i.

    In the coordinates of the whole range Q, with ``H = QᵀAQ`` and ``v_i = (I − s_i s_iᵀ)Qᵀω_i``, these are
    ``tr H − s_iᵀH s_i``, ``P_i ω_i = ω_i − Q v_i`` and ``A P_i ω_i = y_i − (AQ)v_i``. Normal vectors are rescaled to
    ``‖P_i ω_i‖² = n − rank Q_i`` (the paper's §2.3): their direction is uniform there, whatever their length.
    Without vector j, ``P_i ω_i`` gains ``Q u_ij (u_ij·Qᵀω_i)``.
    """
    n, count = vectors.shape
    images = product(matrix, vectors, columns_at_once)
    out = LeaveOneOut.of(images)
    basis, s = out.basis, out.directions
    images_of_basis = product(matrix, basis, columns_at_once)
    inside = inner(basis, images_of_basis)
    coordinates = inner(basis, vectors)
    kept = (coordinates - s * (s * coordinates).sum(0)).to(basis.dtype)  # v_i
    outside = vectors - basis @ kept
    slopes = inner(images_of_basis, outside)
    squares = dots(outside, images - images_of_basis @ kept)
    lengths = dots(outside, outside)
    ranks = basis.shape[1] - s.square().sum(0)
    scaled = squares * (n - ranks) / lengths if is_normal else squares
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
        if is_normal:
            length = lengths[i].unsqueeze(1) + along.square()
            square = square * (n - ranks[i].unsqueeze(1) + u.square().sum(1)) / length
        changes[i] = curvature + scaled[i].unsqueeze(1) - square
    changes.fill_diagonal_(0)
    covariance = (changes * changes.mT).sum() / (count * (count - 1))
    error = _exchangeable_error(samples, covariance).item()
    return Estimate(samples.mean().item(), error, count, count + basis.shape[1], "xtrace")


def _xdiag(matrix: SymmetricMatrix, vectors: Float[Tensor, "n k"], columns_at_once: int) -> DiagonalEstimate:
    """Return the mean over i of ``diag Q_iQ_iᵀA + ω_i ⊙ (I − Q_iQ_iᵀ)A ω_i`` for signs ``ω_i``, ``Q_i`` as for XTrace.

    With ``y_i = A ω_i`` in the range Q: ``t_i = diag QQᵀA − Qs_i ⊙ AQs_i + ω_i ⊙ Qs_i (s_i·Qᵀy_i)`` and, since
    ``s_j·Qᵀy_i = 0``, ``δ_ij = Qu_ij ⊙ AQu_ij − ω_i ⊙ Qu_ij (u_ij·Qᵀy_i)`` with
    ``u_ij·Qᵀy_i = −(s_i·s_j)(s_i·Qᵀy_i)/‖s_j − s_i(s_i·s_j)‖``. Row by row of the matrix, in float64.
    """
    n, count = vectors.shape
    images = product(matrix, vectors, columns_at_once)
    out = LeaveOneOut.of(images)
    images_of_basis = product(matrix, out.basis, columns_at_once)
    lengths = (out.directions * inner(out.basis, images)).sum(0)
    cosines, sines = out.cosines, out.sines
    bends = (lengths.unsqueeze(1) * cosines / sines).fill_diagonal_(0)
    values, errors = torch.empty_like(vectors[:, 0]), torch.empty_like(vectors[:, 0])
    block = max(1, (1 << 20) // count**2)
    for rows in (slice(start, start + block) for start in range(0, n, block)):
        omega, q, aq = (t[rows].double() for t in (vectors, out.basis, images_of_basis))
        qs, aqs = q @ out.directions, aq @ out.directions
        samples = (q * aq).sum(1, keepdim=True) + qs * (omega * lengths - aqs)
        qu, aqu = ((t.unsqueeze(1) - t.unsqueeze(2) * cosines) / sines for t in (qs, aqs))
        changes = qu * (aqu + omega.unsqueeze(2) * bends)
        covariance = (changes * changes.mT).sum((1, 2)) / (count * (count - 1))
        values[rows] = samples.mean(1).to(values.dtype)
        errors[rows] = _exchangeable_error(samples, covariance).to(errors.dtype)
    return DiagonalEstimate(values, errors, count, count + out.basis.shape[1], "xdiag")


def _hutchinson_diagonal(matrix: SymmetricMatrix, products: int, seed: int, columns_at_once: int) -> DiagonalEstimate:
    """Return the mean of ``ω ⊙ A ω``; means and squared deviations of chunks are merged (Chan, Golub, LeVeque 1983)."""
    mean = torch.zeros(matrix.shape[0], dtype=working_dtype(matrix), device=matrix.device)
    deviations = torch.zeros_like(mean)
    seen = 0
    for vectors in random_chunks(matrix, products, columns_at_once, seed=seed, distribution="rademacher"):
        samples = vectors * product(matrix, vectors)
        chunk = samples.mean(1)
        count = samples.shape[1]
        shift = chunk - mean
        deviations += (samples - chunk.unsqueeze(1)).square().sum(1) + shift.square() * (seen * count / (seen + count))
        mean += shift * (count / (seen + count))
        seen += count
    return DiagonalEstimate(mean, (deviations / (seen - 1) / seen).sqrt(), seen, seen, "hutchinson")


def _exact_diagonal(matrix: SymmetricMatrix, columns_at_once: int) -> DiagonalEstimate:
    n = matrix.shape[0]
    values = torch.empty(n, dtype=working_dtype(matrix), device=matrix.device)
    for columns, chunk in identity_chunks(matrix, columns_at_once):
        values[columns] = product(matrix, chunk)[columns].diagonal()
    return DiagonalEstimate(values, torch.zeros_like(values), n, n, "exact")


def _require_budget(matrix: SymmetricMatrix, method: str, products: int, columns_at_once: int) -> None:
    checks.require_count("products", products, 1)
    checks.require_count("columns_at_once", columns_at_once, 1)
    n = matrix.shape[0]
    least = min(LEAST_PRODUCTS[method], n)
    if products < least:
        raise ValueError(
            f"products must be at least {least} for method={method!r} on a matrix of shape ({n}, {n}), got {products}; "
            "fewer give no standard error"
        )


def _round_to_error(value: float, error: float) -> tuple[str, str]:
    """Format the error to two digits and the value to the same decimal place; an exact value to twelve digits."""
    if not (math.isfinite(value) and math.isfinite(error)) or error <= 0:
        return f"{value:.12g}", f"{error:.2g}"
    place = math.floor(math.log10(error)) - 1
    if -12 <= place <= 0:
        return f"{value:.{-place}f}", f"{error:.{-place}f}"
    digits = max(1, math.floor(math.log10(abs(value))) - place + 1) if value else 1
    return f"{value:.{min(digits, 17)}g}", f"{error:.2g}"
