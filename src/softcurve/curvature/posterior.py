"""The precision ``H + prior I`` of a head's Laplace posterior: its determinant, and the variances of the logits."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from softcurve.array_types import Float, Float64
from softcurve.curvature.class_factors import ClassFactor
from softcurve.records import dataclass_repr


def slices(count: int, each: int, budget: int) -> list[slice]:
    """Slices of ``count`` items of ``each`` bytes that need at most ``budget`` bytes, but hold at least one item."""
    step = max(1, budget // each)
    return [slice(start, start + step) for start in range(0, count, step)]


@dataclass(frozen=True, eq=False)
class DiagonalPrecision:
    """The exact diagonal of ``H``; temporary tensors take at most ``budget`` bytes."""

    prior: float
    budget: int
    weight: Float[Tensor, "classes features"]
    bias: Float[Tensor, " classes"] | None

    __repr__ = dataclass_repr

    def log_ratio(self) -> float:
        """``log det(I + H / prior) = Σ log1p(h / prior)``."""
        total = 0.0 if self.bias is None else float(torch.log1p(self.bias.double() / self.prior).sum())
        for classes in slices(len(self.weight), 3 * 8 * self.weight.shape[1], self.budget):
            total += float(torch.log1p(self.weight[classes].double() / self.prior).sum())
        return total

    def variance(self, e: Float[Tensor, "n features"], has_bias: bool) -> Float[Tensor, "n classes"]:
        """``(e ⊙ e) @ (1 / (h + prior))ᵀ``, some rows and classes at a time."""
        variance = e.new_empty(len(e), len(self.weight))
        bytes_each = 4 * e.itemsize * e.shape[1]
        for classes in slices(len(self.weight), bytes_each, self.budget):
            inverse = (1 / (self.weight[classes] + self.prior)).to(e.dtype)
            for rows in slices(len(e), bytes_each, self.budget):
                torch.matmul(e[rows].square(), inverse.T, out=variance[rows, classes])
        if self.bias is not None:
            variance += (1 / (self.bias + self.prior)).to(e.dtype)
        return variance


@dataclass(frozen=True, eq=False)
class KroneckerPrecision:
    """``B ⊗ A`` with ``A = vectors diag(values) vectorsᵀ`` and ``form`` for ``B``; its inverses are in float64."""

    prior: float
    budget: int
    values: Float64[Tensor, " d"]
    vectors: Float[Tensor, "d d"]
    form: ClassFactor

    __repr__ = dataclass_repr

    def log_ratio(self) -> float:
        """``log det(I + H / prior) = Σ_j log det(a_j / prior B + I)``."""
        total = 0.0
        for part in self._parts():
            damped = self.form.damped(self.values[part], self.prior, name="prior_precision")
            total += float((damped.log_determinants() - self.form.classes * math.log(self.prior)).sum())
        return total

    def variance(self, e: Float[Tensor, "n features"], has_bias: bool) -> Float[Tensor, "n classes"]:
        """``Σ_j (ẽ·u_j)² [(a_j B + prior I)⁻¹]_kk``, some rows and eigenvectors at a time."""
        variance = e.new_zeros(len(e), self.form.classes)
        vectors = self.vectors.to(e.dtype)
        parts = self._parts()
        for part in parts:
            inverse = (self._inverse_diagonals if len(parts) == 1 else self._inverse_diagonal(part)).to(e.dtype)
            for rows in slices(len(e), 4 * e.itemsize * inverse.shape[1], self.budget):
                along = e[rows] @ vectors[: e.shape[1], part]
                if has_bias:
                    along += vectors[-1, part]
                variance[rows].addmm_(along.square_(), inverse.T)
        return variance

    def _parts(self) -> list[slice]:
        """The eigenvectors, as many at a time as the budget allows."""
        return slices(len(self.values), 4 * 8 * self.form.classes, self.budget)

    @functools.cached_property
    def _inverse_diagonals(self) -> Tensor:
        """Those of all eigenvectors, kept for the next call where they fit within the budget."""
        return self._inverse_diagonal(slice(None))

    def _inverse_diagonal(self, part: slice) -> Tensor:
        """``[(a_j B + prior I)⁻¹]_kk``, ``(C, j)``."""
        return self.form.damped(self.values[part], self.prior, name="prior_precision").inverse_diagonal()
