"""Kronecker factors of a head's Gauss-Newton matrix: ``Σ_i B_i ⊗ ẽ_i ẽ_iᵀ ≈ B ⊗ A``.

``A = Σ_i m_i ẽ_i ẽ_iᵀ / Σ_i m_i`` over features ``ẽ = [e; 1]`` (the 1 with a bias) is dense, ``(d, d)``.
``B = Σ_i B_i`` over classes is known by its products; for a cross-entropy ``B = diag(Σ m p) − Pᵀ diag(m) P``. Its
inverse needs an explicit form: all of it where the classes are few, or its diagonal minus a matrix of low rank. The
inverse of ``a B + damping I`` is wanted for as many ``a ≥ 0`` as the features have dimensions: ``damped`` prepares all
of these at once, and its result is used for many columns.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from softcurve import checks
from softcurve.array_types import Float, Float64
from softcurve.curvature.algorithms.nystrom import nystrom_factor
from softcurve.curvature.operator import SymmetricOperator
from softcurve.head.curvature import add_class_products, add_products, class_coefficients
from softcurve.head.per_row import row_masses
from softcurve.head.products import WIDENED_ENTRIES, Direction
from softcurve.head.tensors import RowLosses
from softcurve.processes import sum_over
from softcurve.records import ShortRepr

FactorForm = Literal["auto", "dense", "low_rank"]

DENSE_CLASSES = 2048  # the most classes for which the form "auto" is dense


def split_rows(input: Float[Tensor, "n d"], *others: Tensor) -> Iterable[tuple[Tensor, ...]]:
    """Return parts of the rows of several tensors, few enough to be widened to float64 at a time."""
    step = max(1, WIDENED_ENTRIES // max(1, input.shape[1]))
    return zip(*(tensor.split(step) for tensor in (input, *others)), strict=True)


def weighted_moment(
    input: Float[Tensor, "n d"], mass: Float[Tensor, " n"], *, has_bias: bool, dtype: torch.dtype
) -> Float[Tensor, "m m"]:
    """Return ``Σ_i mass_i ẽ_i ẽ_iᵀ`` without the rows of mass 0, some rows at a time."""
    width = input.shape[1] + has_bias
    moment = torch.zeros(width, width, dtype=dtype, device=input.device)
    for e, m in split_rows(input, mass):
        kept = e[m != 0].to(dtype)
        kept = torch.cat([kept, torch.ones_like(kept[:, :1])], -1) if has_bias else kept
        moment.addmm_(kept.T, m[m != 0].to(dtype).unsqueeze(-1) * kept)
    return moment


@dataclass(frozen=True, eq=False, repr=False)
class DenseClassFactor(ShortRepr):
    """A positive semidefinite ``B``, by all of its eigenvalues and eigenvectors."""

    values: Float[Tensor, " classes"]
    vectors: Float[Tensor, "classes classes"]

    def damped(self, scales: Float[Tensor, " k"], damping: float, *, name: str = "damping") -> DampedDenseFactor:
        """Return ``a B + damping I`` for each scale ``a ≥ 0``, in the dtype of the scales."""
        vectors, values = self.vectors.to(scales.dtype), self.values.to(scales.dtype)
        return DampedDenseFactor(vectors, values.unsqueeze(-1) * scales + damping)


@dataclass(frozen=True, eq=False)
class DampedDenseFactor:
    """The matrices ``M_j = a_j B + damping I`` by eigenvectors."""

    vectors: Float[Tensor, "classes classes"]
    values: Float[Tensor, "classes k"]

    def solve(self, columns: Float[Tensor, "classes k"]) -> Float[Tensor, "classes k"]:
        """Return ``M_j⁻¹ x_j`` of each column."""
        return self.vectors @ (self.vectors.T @ columns / self.values)

    def inverse_diagonal(self) -> Float[Tensor, "classes k"]:
        """Return ``diag(M_j⁻¹)``."""
        return self.vectors.square() @ (1 / self.values)

    def log_determinants(self) -> Float64[Tensor, " k"]:
        """Return ``log det M_j``."""
        return self.values.double().log().sum(0)


@dataclass(frozen=True, eq=False, repr=False)
class LowRankClassFactor(ShortRepr):
    """A class factor ``B = diag(diagonal) − low lowᵀ``."""

    diagonal: Float[Tensor, " classes"]
    low: Float[Tensor, "classes rank"]
    rounding: float  # the relative rounding error of the entries

    def damped(self, scales: Float[Tensor, " k"], damping: float, *, name: str = "damping") -> DampedLowRankFactor:
        """Return it by Woodbury's formula: with ``D = a diagonal + damping``, each has a core ``I − a lowᵀ D⁻¹ low``.

        Raises ``ValueError`` if the damping, which the caller calls ``name``, is lost in the rounding errors of ``B``.
        """
        inverse = 1 / (self.diagonal.to(scales.dtype).unsqueeze(-1) * scales + damping)
        # In float64: a vector with B x = 0, such as that of ones, makes an eigenvalue of the core as small as damping.
        low = self.low.double()
        cores = torch.eye(low.shape[1], dtype=low.dtype, device=low.device).repeat(len(scales), 1, 1)
        for core, a, column in zip(cores, scales.double(), inverse.double().T, strict=True):
            core -= low.T @ ((a * column).unsqueeze(-1) * low)
        factors, failed = torch.linalg.cholesky_ex(cores)
        # The rounding error of an eigenvalue of the core must be at most a tenth of the eigenvalue.
        if failed.any() or (torch.linalg.eigvalsh(cores) < 10 * self.rounding).any():
            raise ValueError(
                f"{name} must be larger than the rounding errors of a class factor of low rank, got {damping:g}; "
                "raise it, use form='dense', or compute in float64"
            )
        return DampedLowRankFactor(self.low.to(scales.dtype), scales, inverse, factors)


@dataclass(frozen=True, eq=False)
class DampedLowRankFactor:
    """The matrices ``M_j = a_j B + damping I`` by Woodbury's formula."""

    low: Float[Tensor, "classes rank"]
    scales: Float[Tensor, " k"]
    inverse: Float[Tensor, "classes k"]  # D⁻¹
    cholesky: Float64[Tensor, "k rank rank"]  # of the cores, lower

    def solve(self, columns: Float[Tensor, "classes k"]) -> Float[Tensor, "classes k"]:
        """Return ``M_j⁻¹ x_j`` of each column."""
        first = self.inverse * columns
        small = (self.low.T @ first).double()
        core = torch.cholesky_solve(small.T.unsqueeze(-1), self.cholesky).squeeze(-1).T * self.scales.double()
        return first + self.inverse * (self.low @ core.to(first.dtype))

    def inverse_diagonal(self) -> Float[Tensor, "classes k"]:
        """Return ``diag(M_j⁻¹)``."""
        diagonal = self.inverse.clone()
        for j, (factor, a) in enumerate(zip(self.cholesky, self.scales, strict=True)):
            half = torch.linalg.solve_triangular(factor, self.low.T.double(), upper=False)
            diagonal[:, j] += a * self.inverse[:, j] * (self.inverse[:, j] * half.square().sum(0).to(diagonal.dtype))
        return diagonal

    def log_determinants(self) -> Float64[Tensor, " k"]:
        """Return ``log det M_j``."""
        cores = 2 * self.cholesky.diagonal(dim1=1, dim2=2).log().sum(1)
        return cores - self.inverse.double().log().sum(0)


ClassFactor = DenseClassFactor | LowRankClassFactor


@dataclass(frozen=True, eq=False, repr=False)
class StreamedClassFactor(SymmetricOperator):
    """``B``, ``(C, C)``, by its products: the curvature with respect to the bias of the head.

    ``batches`` gives the head's rows, again for each product; ``scale`` multiplies the sum over rows; ``weight`` is
    that of all processes; ``summed`` sums over the processes of other rows.
    """

    batches: Callable[[], Iterable[RowLosses]]
    matrix: str
    scale: float
    weight: Tensor  # (C, d)
    summed: Callable[[Tensor], Tensor]

    is_positive = True

    @property
    def shape(self) -> tuple[int, int]:
        """The shape ``(C, C)``."""
        return len(self.weight), len(self.weight)

    @property
    def dtype(self) -> torch.dtype:
        """The weight's dtype, at least float32."""
        return checks.wide_dtype(self.weight.dtype)

    @property
    def device(self) -> torch.device:
        """The device of the head."""
        return self.weight.device

    def _columns(self, vectors: Tensor) -> Tensor:
        if vectors.shape[1] == 0:
            return torch.zeros_like(vectors)
        if self._is_diagonal_minus_products:
            diagonal, outer = self._diagonal_and_products(vectors)
            return torch.addcmul(-outer, diagonal.unsqueeze(-1), vectors)
        sums, columns = torch.zeros_like(vectors.T, memory_format=torch.contiguous_format), vectors.T.contiguous()

        def add(rows: RowLosses, own: slice) -> None:
            directions, into = ([Direction(None, None, part[own]) for part in parts] for parts in (columns, sums))
            add_products(rows, self.matrix, directions, into)

        return self._accumulated(add, sums)[0].T

    @functools.cached_property
    def _is_diagonal_minus_products(self) -> bool:
        """Whether ``B = diag(diagonal) − Σ b p pᵀ``; all processes must agree, because their messages differ."""
        others = sum(not class_coefficients(rows, self.matrix) for rows in self.batches())
        return not self.total(float(others))

    def total(self, number: float) -> float:
        """Return the sum of a number over the processes of other rows."""
        return float(self.summed(torch.tensor(number, dtype=torch.float64, device=self.device)))

    def _diagonal_and_products(self, vectors: Tensor) -> list[Tensor]:
        """Return ``diagonal`` of ``B = diag(diagonal) − Σ b p pᵀ``, and ``Σ b p pᵀ`` times ``vectors``."""
        diagonal = torch.zeros(len(vectors), dtype=self.dtype, device=self.device)
        outer = torch.zeros(vectors.shape, dtype=self.dtype, device=self.device)

        def add(rows: RowLosses, own: slice) -> None:
            add_class_products(rows, self.matrix, vectors[own], outer[own], diagonal[own])

        return self._accumulated(add, diagonal, outer)

    def _accumulated(self, add: Callable[[RowLosses, slice], None], *sums: Tensor) -> list[Tensor]:
        """Call ``add`` with the rows of each batch and this process's classes, then sum over processes and scale."""
        group = None
        for rows in self.batches():
            group = rows.loss.processes
            add(rows, slice(rows.loss.first, rows.loss.first + len(rows.tensors.weight)))
        if group is not None:
            for part in sums:
                sum_over([part], group)
        return [self.summed(part).mul_(self.scale) for part in sums]

    def dense(self) -> DenseClassFactor:
        """Return all of ``B``."""
        matrix = self.to_dense(columns_at_once=256).double()
        values, vectors = torch.linalg.eigh((matrix + matrix.T) / 2)
        return DenseClassFactor(values.clamp(min=0).to(self.dtype), vectors.to(self.dtype))

    def low_rank(self, rank: int, seed: int) -> LowRankClassFactor:
        """Return ``diag − low lowᵀ`` by the Nyström method after one step of subspace iteration.

        Nyström's approximation of ``Pᵀ m P`` is below it, so that the result is above ``B`` and stays positive. On the
        way it takes about four times the memory of ``low``.
        """
        if not self._is_diagonal_minus_products:
            raise ValueError(
                "form must be 'dense' for a soft cap, JS or a TopK with a bucket, whose class factor is not a "
                "diagonal minus products of probabilities, got 'low_rank'"
            )
        generator = torch.Generator().manual_seed(seed)
        probes = torch.randn(self.shape[0], rank, generator=generator, dtype=self.dtype).to(self.device)
        probes = torch.linalg.qr(self._diagonal_and_products(probes)[1])[0]
        diagonal, image = self._diagonal_and_products(probes)
        try:
            low = nystrom_factor(probes, image)
        except ValueError as error:
            raise ValueError(
                "form must be 'dense' for so large a z_loss, whose class factor is a diagonal plus products of "
                "probabilities, got 'low_rank'"
            ) from error
        return LowRankClassFactor(diagonal, low, torch.finfo(self.dtype).eps)


@dataclass(frozen=True, eq=False, repr=False)
class KroneckerFactors(ShortRepr):
    """``B ⊗ A``, which maps a head's weight and bias ``[W | b] (C, d + 1)`` to ``B [W | b] A``."""

    features: Float[Tensor, "d d"]  # A
    classes: StreamedClassFactor  # B
    form: ClassFactor  # the explicit form of B
    has_bias: bool

    @staticmethod
    def of(factor: StreamedClassFactor, *, has_bias: bool, form: FactorForm, rank: int, seed: int) -> KroneckerFactors:
        """Compute the factors in one pass for ``A`` and a few for the explicit form of ``B``."""
        checks.require_choice("form", form, get_args(FactorForm))
        checks.require_count("rank", rank, 1)
        checks.require_count("seed", seed, 0)
        classes, width = factor.shape[0], factor.weight.shape[1] + has_bias
        moment = torch.zeros(width, width, dtype=factor.dtype, device=factor.device)
        total = 0.0
        for rows in factor.batches():
            mass = rows.tensors.row_weight * row_masses(rows)
            moment += weighted_moment(rows.tensors.features, mass, has_bias=has_bias, dtype=moment.dtype)
            total += float(mass.sum())
        total = factor.total(total)
        if total == 0:
            raise ValueError("the rows must hold one that counts, got none; see ignore_index and sample weights")
        dense = form == "dense" or (form == "auto" and classes <= DENSE_CLASSES)
        explicit = factor.dense() if dense else factor.low_rank(min(rank, classes), seed)
        return KroneckerFactors(factor.summed(moment) / total, factor, explicit, has_bias)

    def product(self, weight: Tensor, bias: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """Return ``B [weight | bias] A``, ``(C, d)`` and ``(C,)``, with the exact ``B``."""
        return self._split(self.classes @ (self._join(weight, bias) @ self.features))

    def solve(self, weight: Tensor, bias: Tensor | None = None, *, damping: float) -> tuple[Tensor, Tensor | None]:
        """Return ``(B ⊗ A + damping I)⁻¹ [weight | bias]``, ``(C, d)`` and ``(C,)``, exact for an explicit ``B``.

        Raises ``ValueError`` where a form of low rank in float32 cannot resolve the ``damping``.
        """
        checks.require_positive("damping", damping)
        vectors = self.feature_spectrum[1]
        if damping not in self._damped:
            self._damped.clear()
            self._damped[damping] = self.form.damped(self.feature_spectrum[0], damping)
        rotated = self._damped[damping].solve(self._join(weight, bias) @ vectors)
        return self._split(rotated @ vectors.T)

    @functools.cached_property
    def feature_spectrum(self) -> tuple[Tensor, Tensor]:
        """The eigenvalues ``≥ 0`` and eigenvectors of ``A``."""
        values, vectors = torch.linalg.eigh(self.features.double())
        return values.clamp(min=0).to(self.features.dtype), vectors.to(self.features.dtype)

    @functools.cached_property
    def _damped(self) -> dict[float, DampedDenseFactor | DampedLowRankFactor]:
        """``a B + damping I`` for each eigenvalue ``a`` of ``A``, by the last ``damping``."""
        return {}

    def _join(self, weight: Tensor, bias: Tensor | None) -> Tensor:
        if (bias is not None) != self.has_bias:
            raise ValueError(
                f"bias must be {'given, as the head has one' if self.has_bias else 'None: the head has none'}"
            )
        shape = (self.classes.shape[0], len(self.features) - self.has_bias)
        for name, part, expected in (("weight", weight, shape), ("bias", bias, shape[:1])):
            if part is not None and (not isinstance(part, Tensor) or part.shape != expected):
                raise ValueError(f"{name} must be a tensor of shape {expected}, got {checks.describe(part)}")
        joined = weight if bias is None else torch.cat([weight, bias.unsqueeze(-1)], -1)
        return joined.to(self.features.dtype)

    def _split(self, joined: Tensor) -> tuple[Tensor, Tensor | None]:
        return (joined[:, :-1], joined[:, -1]) if self.has_bias else (joined, None)
