"""Explicit forms of the class factor ``B (C, C)`` of a head's curvature, with the inverses of ``a B + damping I``.

The inverse is wanted for as many ``a ≥ 0`` as the features have dimensions: ``damped`` prepares all of them at once,
and its result is used for many columns.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from softcurve.array_types import Float, Float64
from softcurve.records import ShortRepr


@dataclass(frozen=True, eq=False, repr=False)
class DenseClassFactor(ShortRepr):
    """All of a positive semidefinite ``B``, by its eigenvalues and eigenvectors."""

    values: Float[Tensor, " classes"]
    vectors: Float[Tensor, "classes classes"]

    @property
    def classes(self) -> int:
        """``C``."""
        return len(self.values)

    def damped(self, scales: Float[Tensor, " k"], damping: float, *, name: str = "damping") -> DampedDenseFactor:
        """``a B + damping I`` for each scale ``a ≥ 0``, in the dtype of the scales."""
        vectors, values = self.vectors.to(scales.dtype), self.values.to(scales.dtype)
        return DampedDenseFactor(vectors, values.unsqueeze(-1) * scales + damping)


@dataclass(frozen=True, eq=False)
class DampedDenseFactor:
    """``M_j = a_j B + damping I`` by eigenvectors."""

    vectors: Float[Tensor, "classes classes"]
    values: Float[Tensor, "classes k"]

    def solve(self, columns: Float[Tensor, "classes k"]) -> Float[Tensor, "classes k"]:
        """``M_j⁻¹ x_j`` of each column."""
        return self.vectors @ (self.vectors.T @ columns / self.values)

    def inverse_diagonal(self) -> Float[Tensor, "classes k"]:
        """``diag(M_j⁻¹)``."""
        return self.vectors.square() @ (1 / self.values)

    def log_determinants(self) -> Float64[Tensor, " k"]:
        """``log det M_j``."""
        return self.values.double().log().sum(0)


@dataclass(frozen=True, eq=False, repr=False)
class LowRankClassFactor(ShortRepr):
    """``B = diag(diagonal) − low lowᵀ``."""

    diagonal: Float[Tensor, " classes"]
    low: Float[Tensor, "classes rank"]
    rounding: float  # the relative rounding error of the entries

    @property
    def classes(self) -> int:
        """``C``."""
        return len(self.diagonal)

    def damped(self, scales: Float[Tensor, " k"], damping: float, *, name: str = "damping") -> DampedLowRankFactor:
        """As for a dense factor, by Woodbury: with ``D = a diagonal + damping``, a core ``I − a lowᵀ D⁻¹ low`` each.

        Raises:
            ValueError: the damping, which the caller calls ``name``, is lost in the rounding errors of ``B``.
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
    """``M_j = a_j B + damping I`` by Woodbury's formula."""

    low: Float[Tensor, "classes rank"]
    scales: Float[Tensor, " k"]
    inverse: Float[Tensor, "classes k"]  # D⁻¹
    cholesky: Float64[Tensor, "k rank rank"]  # of the cores, lower

    def solve(self, columns: Float[Tensor, "classes k"]) -> Float[Tensor, "classes k"]:
        """``M_j⁻¹ x_j`` of each column."""
        first = self.inverse * columns
        small = (self.low.T @ first).double()
        core = torch.cholesky_solve(small.T.unsqueeze(-1), self.cholesky).squeeze(-1).T * self.scales.double()
        return first + self.inverse * (self.low @ core.to(first.dtype))

    def inverse_diagonal(self) -> Float[Tensor, "classes k"]:
        """``diag(M_j⁻¹)``."""
        diagonal = self.inverse.clone()
        for j, (factor, a) in enumerate(zip(self.cholesky, self.scales, strict=True)):
            half = torch.linalg.solve_triangular(factor, self.low.T.double(), upper=False)
            diagonal[:, j] += a * self.inverse[:, j] * (self.inverse[:, j] * half.square().sum(0).to(diagonal.dtype))
        return diagonal

    def log_determinants(self) -> Float64[Tensor, " k"]:
        """``log det M_j``."""
        cores = 2 * self.cholesky.diagonal(dim1=1, dim2=2).log().sum(1)
        return cores - self.inverse.double().log().sum(0)


ClassFactor = DenseClassFactor | LowRankClassFactor
DampedFactor = DampedDenseFactor | DampedLowRankFactor
