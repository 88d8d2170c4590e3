"""Forms in which the class factor ``B (C, C)`` of a head's curvature is held, and their damped inverses.

``(a B + damping I)⁻¹`` is wanted for as many ``a ≥ 0`` as the features have dimensions: :meth:`ClassForm.damped`
prepares all of them at once, and what it returns serves many columns.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from softcurve.array_types import Float, Float64
from softcurve.records import dataclass_repr

__all__ = ["ClassForm", "Damped", "DenseForm", "LowRankForm"]


class Damped(ABC):
    """``M_j = a_j B + damping I`` for each of ``k`` scales ``a_j``."""

    @abstractmethod
    def solve(self, columns: Float[Tensor, "classes k"]) -> Float[Tensor, "classes k"]:
        """``M_j⁻¹ x_j`` of each column."""

    @abstractmethod
    def inverse_diagonal(self) -> Float[Tensor, "classes k"]:
        """``diag(M_j⁻¹)``."""

    @abstractmethod
    def log_determinants(self) -> Float64[Tensor, " k"]:
        """``log det M_j``."""


class ClassForm(ABC):
    """A positive semidefinite ``B (C, C)``, held."""

    @property
    @abstractmethod
    def classes(self) -> int:
        """``C``."""

    @abstractmethod
    def damped(self, scales: Float[Tensor, " k"], damping: float, *, name: str = "damping") -> Damped:
        """``a B + damping I`` for each scale ``a ≥ 0``.

        Raises:
            ValueError: ``damping``, which the caller calls ``name``, is lost in the rounding errors of ``B``.
        """

    @abstractmethod
    def double(self) -> ClassForm:
        """The same in float64."""


@dataclass(frozen=True, eq=False)
class DenseForm(ClassForm):
    """All of ``B``, by its eigenvectors."""

    values: Float[Tensor, " classes"]
    vectors: Float[Tensor, "classes classes"]

    __repr__ = dataclass_repr

    @property
    def classes(self) -> int:
        """``C``."""
        return len(self.values)

    def damped(self, scales: Float[Tensor, " k"], damping: float, *, name: str = "damping") -> Damped:
        """Never refused: the eigenvalues are ``≥ 0``."""
        return _DampedDense(self.vectors, self.values.unsqueeze(-1) * scales + damping)

    def double(self) -> DenseForm:
        """The same in float64."""
        return DenseForm(self.values.double(), self.vectors.double())


@dataclass(frozen=True, eq=False)
class _DampedDense(Damped):
    vectors: Float[Tensor, "classes classes"]
    values: Float[Tensor, "classes k"]

    def solve(self, columns: Float[Tensor, "classes k"]) -> Float[Tensor, "classes k"]:
        return self.vectors @ (self.vectors.T @ columns / self.values)

    def inverse_diagonal(self) -> Float[Tensor, "classes k"]:
        return self.vectors.square() @ (1 / self.values)

    def log_determinants(self) -> Float64[Tensor, " k"]:
        return self.values.double().log().sum(0)


@dataclass(frozen=True, eq=False)
class LowRankForm(ClassForm):
    """``B = diag(diagonal) − low lowᵀ``."""

    diagonal: Float[Tensor, " classes"]
    low: Float[Tensor, "classes rank"]
    rounding: float  # of their entries, relatively

    __repr__ = dataclass_repr

    @property
    def classes(self) -> int:
        """``C``."""
        return len(self.diagonal)

    def damped(self, scales: Float[Tensor, " k"], damping: float, *, name: str = "damping") -> Damped:
        """By Woodbury: with ``D = a diagonal + damping``, a core ``I − a lowᵀ D⁻¹ low (rank, rank)`` for each scale."""
        inverse = 1 / (self.diagonal.unsqueeze(-1) * scales + damping)
        # In float64: a vector with B x = 0, such as that of ones, makes an eigenvalue of the core as small as damping.
        low = self.low.double()
        cores = torch.eye(low.shape[1], dtype=low.dtype, device=low.device).repeat(len(scales), 1, 1)
        for core, a, column in zip(cores, scales.double(), inverse.double().T, strict=True):
            core -= low.T @ ((a * column).unsqueeze(-1) * low)
        factors, failed = torch.linalg.cholesky_ex(cores)
        # The rounding of an eigenvalue of the core is to be at most a tenth of it.
        if failed.any() or (torch.linalg.eigvalsh(cores) < 10 * self.rounding).any():
            raise ValueError(
                f"{name} must be larger than the rounding errors of a class factor of low rank, got {damping:g}; "
                f"raise it, use form='dense', or compute in float64"
            )
        return _DampedLowRank(self.low, scales, inverse, factors)

    def double(self) -> LowRankForm:
        """The same in float64."""
        return LowRankForm(self.diagonal.double(), self.low.double(), self.rounding)


@dataclass(frozen=True, eq=False)
class _DampedLowRank(Damped):
    low: Float[Tensor, "classes rank"]
    scales: Float[Tensor, " k"]
    inverse: Float[Tensor, "classes k"]  # D⁻¹
    factors: Float64[Tensor, "k rank rank"]  # of the cores, lower

    def solve(self, columns: Float[Tensor, "classes k"]) -> Float[Tensor, "classes k"]:
        first = self.inverse * columns
        small = (self.low.T @ first).double()
        within = torch.cholesky_solve(small.T.unsqueeze(-1), self.factors).squeeze(-1).T * self.scales.double()
        return first + self.inverse * (self.low @ within.to(first.dtype))

    def inverse_diagonal(self) -> Float[Tensor, "classes k"]:
        found = self.inverse.clone()
        for j, (factor, a) in enumerate(zip(self.factors, self.scales, strict=True)):
            half = torch.linalg.solve_triangular(factor, self.low.T.double(), upper=False)
            found[:, j] += a * self.inverse[:, j] * (self.inverse[:, j] * half.square().sum(0).to(found.dtype))
        return found

    def log_determinants(self) -> Float64[Tensor, " k"]:
        cores = 2 * self.factors.diagonal(dim1=1, dim2=2).log().sum(1)
        return cores - self.inverse.double().log().sum(0)
