"""The coordinates that a head is fitted in: features about their mean, rotated to the axes of their covariance.

``z = W x + b = V u + c`` with ``u = Uᵀ(x − μ)``, ``V = W U`` and ``c = b + W μ``. The penalty is the same,
``‖V‖ = ‖W‖``; the bias is not correlated with the weight; and the Gauss-Newton matrix, ``Σ J ⊗ u uᵀ``, is nearly
diagonal for every class.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from softcurve.array_types import Bool, Float, Float64
from softcurve.fit import DataError
from softcurve.fit.data.source import Source, is_sparse, share_of
from softcurve.fit.data.sparse_features import SparseFeatures, dense_features
from softcurve.fit.group import Group

WIDEST = 4096  # the widest features whose covariance is decomposed
WORTH_PRODUCTS = 60  # what the eigenvectors may cost, in products: 10 d³ operations against 4 n d C for a product
SPAN_BYTES = 2**30  # of the copy of the rows that is made to find their span, if there are fewer rows than features
SPREAD = 4e-15  # the largest spread of a column or an axis by rounding alone, relative to its entries
# The largest eigenvalue per feature of a singular correlation matrix, by the rounding of its sums or of the features.
SINGULAR = {True: 4e-15, False: (16.0 * 2.0**-23) ** 2}
CLEARLY = 4.0  # the multiple of that eigenvalue from which on the rounding of a Cholesky factorisation does not matter


@dataclass(frozen=True, eq=False)
class Coordinates:
    """The map between a head and the parameters of the fit.

    ``mean`` is zero without an intercept; ``basis`` is ``None`` for the axes of the features. ``moments`` are for each
    axis the second moments about zero of its columns, weighted by their part in it. ``redundant`` are the axes along
    which rows differ only by rounding: a constant column, or the difference of a column and its copy. With ``sparse``
    features there is no ``basis``, and parameters lie in memory feature by feature, as the products need them.
    """

    mean: Float64[Tensor, " d"]
    basis: Float64[Tensor, "d r"] | None
    intercept: bool
    moments: Float64[Tensor, " size"]
    redundant: Bool[Tensor, " size"]
    sparse: bool = False

    @property
    def width(self) -> int:
        """The number of axes without that of the intercept."""
        return len(self.mean) if self.basis is None else self.basis.shape[1]

    @property
    def size(self) -> int:
        """The number of parameters of a class."""
        return self.width + self.intercept

    def penalties(self, penalty: float) -> Float64[Tensor, " size"]:
        """Return the curvature of the penalty for each parameter of a class, which is 0 for the intercept."""
        return torch.tensor([penalty] * self.width + [0.0] * self.intercept, dtype=torch.float64)

    def laid_out(self, parameters: Float[Tensor, "classes size"]) -> Float[Tensor, "classes size"]:
        """Return parameters in the order in memory in which all parameters, gradients and directions of a fit are."""
        return parameters.T.contiguous().T if self.sparse else parameters.contiguous()

    def turned_into(self, out: Float[Tensor, "rows size"], features: Float[Tensor, "rows d"]) -> None:
        """Write ``[u, 1]`` of each row to ``out``."""
        centred = features.double() - self.mean
        out[:, : self.width] = centred if self.basis is None else centred @ self.basis
        if self.intercept:
            out[:, -1] = 1.0

    def about_mean(self, parameters: Float[Tensor, "classes size"]) -> tuple[Tensor, Tensor | None]:
        """Return ``(W, c)``, the parameters for centred features that are not rotated."""
        turned = parameters[:, : self.width]
        weight = turned if self.basis is None else turned @ self.basis.T.to(turned.dtype)
        return weight, parameters[:, -1] if self.intercept else None

    def from_mean(self, weight: Float64[Tensor, "classes d"], bias: Float64[Tensor, " classes"]) -> Tensor:
        """Apply the transpose of :meth:`about_mean`, which maps gradients with respect to ``(W, c)``."""
        turned = weight if self.basis is None else weight @ self.basis.to(weight.dtype)
        if not self.intercept:
            return turned
        return torch.cat([turned.T, bias[None]]).T if self.sparse else torch.cat([turned, bias[:, None]], 1)

    def head(self, parameters: Float64[Tensor, "classes size"]) -> tuple[Tensor, Tensor]:
        """Return ``(W, b)`` for the original features."""
        weight, bias = self.about_mean(parameters)
        return weight.contiguous(), weight.new_zeros(len(weight)) if bias is None else bias - weight @ self.mean

    def parameters(self, weight: Float64[Tensor, "classes d"], bias: Float64[Tensor, " classes"]) -> Tensor:
        """Return the parameters of a head, without its part outside the span of the features."""
        return self.from_mean(weight, bias + weight @ self.mean)

    def largest_gradient(self, weight: Tensor, bias: Tensor | None) -> float:
        """Return the largest entry of the gradient with respect to ``(W, b)``, from that with respect to ``(W, c)``."""
        if bias is None or not self.intercept:
            return float(weight.abs().max())
        about_zero = torch.addr(weight, bias, self.mean.to(weight.dtype))
        return max(float(about_zero.abs().max()), float(bias.abs().max()))


def find_coordinates(
    source: Source, weights: Float64[Tensor, " rows"], classes: int, *, intercept: bool, rows_at_once: int
) -> Coordinates:
    """Find the coordinates in one pass over the rows; ``weights`` sum to one."""
    width, rows, group = source.width, share_of(source).total, share_of(source).group
    if is_sparse(source):
        return _of_columns(source, weights, intercept, rows_at_once)
    axes = min(width, rows)
    pays = 10 * axes**2 <= WORTH_PRODUCTS * 4 * rows * classes and axes <= WIDEST
    if source.in_memory and rows < width and 8 * rows * width <= SPAN_BYTES:
        return _span(source, weights, intercept, rows_at_once, turned=pays)
    moments = _Moments(width, pairs=pays)
    first = torch.zeros(2, width, dtype=torch.float64)
    with group.summed(first):
        for block in source.blocks(rows_at_once):
            moments.add(dense_features(block.features).double(), weights[block.start : block.start + len(block)])
        first += torch.stack([moments.origin * moments.mass + moments.first, moments.squares])
    mean, squares = first[0] if intercept else torch.zeros_like(first[0]), first[1]
    covariance = torch.zeros_like(moments.second)
    with group.summed(covariance):
        covariance += moments.about(mean)
    if not pays:
        return _of_axes(mean, None, intercept, squares, covariance <= SPREAD**2 * squares)
    if not covariance.isfinite().all():
        raise DataError("data: the squares of the features overflow; scale the features to the order of 1")
    basis, null = _axes(covariance, covariance.diagonal() <= SPREAD**2 * squares, source)
    return _of_axes(mean, basis, intercept, squares, torch.arange(width) < null)


def _of_columns(source: Source, weights: Tensor, intercept: bool, rows_at_once: int) -> Coordinates:
    """Return coordinates along the columns of sparse features, from two passes over the stored entries.

    The variance of a column is ``Σ w (x − μ)² + μ² Σ w``, where the first sum is over the rows that store an entry and
    the second over all others, so that nothing cancels.
    """
    group = share_of(source).group
    # The sums of w x and w x², and the numbers of rows of positive weight: those that store an entry, and all.
    first = torch.zeros(source.width, 3, dtype=torch.float64)
    rows = torch.zeros(1, dtype=torch.float64)
    with group.summed(first, rows):
        for features, of_rows in _stored(source, weights, rows_at_once):
            entries = features.matrix.data
            first[:, 0] += features.transposed_times(of_rows)[:, 0]
            first[:, 1] += features.with_entries(entries**2).transposed_times(of_rows)[:, 0]
            ones = features.with_entries(np.ones_like(entries))
            first[:, 2] += ones.transposed_times((of_rows > 0).double())[:, 0]
            rows += (of_rows > 0).sum()
    sums, squares, counts = first.unbind(1)
    if not squares.isfinite().all():
        raise DataError("data: the squares of the features overflow; scale the features to the order of 1")
    mean = sums.clone() if intercept else torch.zeros_like(sums)
    second = torch.zeros(source.width, 2, dtype=torch.float64)
    with group.summed(second):
        for features, of_rows in _stored(source, weights, rows_at_once):
            about = features.matrix.data - mean.numpy()[features.matrix.indices]
            second[:, 0] += features.with_entries(about**2).transposed_times(of_rows)[:, 0]
            second[:, 1] += features.with_entries(np.ones_like(about)).transposed_times(of_rows)[:, 0]
    unstored = torch.where(counts == rows, 0.0, (1.0 - second[:, 1]).clamp(min=0.0))
    variance = second[:, 0] + mean.square() * unstored
    redundant = variance <= SPREAD**2 * squares
    return replace(_of_axes(mean, None, intercept, squares, redundant), sparse=True)


def _stored(source: Source, weights: Tensor, rows_at_once: int) -> Iterator[tuple[SparseFeatures, Tensor]]:
    """Yield the sparse features of each block in float64, and the weights of its rows as a column."""
    for block in source.blocks(rows_at_once):
        assert isinstance(block.features, SparseFeatures)
        yield block.features.double(), weights[block.start : block.start + len(block), None].contiguous()


def _of_axes(mean: Tensor, basis: Tensor | None, intercept: bool, squares: Tensor, redundant: Tensor) -> Coordinates:
    """Return coordinates whose moments are those of the axes, from the squares of the columns."""
    moments = squares if basis is None else basis.square().T @ squares
    if intercept:
        moments, redundant = torch.cat([moments, moments.new_ones(1)]), torch.cat([redundant, redundant.new_zeros(1)])
    return Coordinates(mean, basis, intercept, moments, redundant)


def _axes(covariance: Tensor, constant: Tensor, source: Source) -> tuple[Tensor, int]:
    """Return the eigenvectors of the covariance, first those of the null space, and the dimension of the null space.

    The null space is that of the correlation matrix, as the rounding of the largest entries of the covariance hides the
    zeros among the entries of columns with much smaller units. It includes ``constant`` columns.
    """
    group = share_of(source).group
    scale = torch.where(constant, math.inf, covariance.diagonal().clamp(min=0.0).sqrt())
    correlation, least = covariance / scale / scale[:, None], SINGULAR[source.double] * len(scale)
    if _exceeds(correlation, CLEARLY * least, group):
        return _eigh(covariance, group)[1], 0
    values, vectors = _eigh(correlation, group)
    null = int((values <= least).sum())
    if not null:
        return _eigh(covariance, group)[1], 0
    # Features D x̂ do not vary along D⁻¹ n if x̂ does not vary along n.
    scale = torch.where(constant, 1.0, scale)
    turned = group.from_first(torch.linalg.qr(vectors[:, :null] / scale[:, None], mode="complete").Q)
    rest = turned[:, null:]
    return torch.cat([turned[:, :null], rest @ _eigh(rest.T @ covariance @ rest, group)[1]], 1), null


def _exceeds(matrix: Tensor, bound: float, group: Group) -> bool:
    """Return whether the first process can factorise ``matrix − bound I``, so that every eigenvalue is above the bound.

    This takes a tenth of the time of the eigenvalues.
    """
    failed = torch.ones((), dtype=torch.int32)
    with group.agreed():
        if group.first:
            failed = torch.linalg.cholesky_ex(matrix - bound * torch.eye(len(matrix), dtype=matrix.dtype)).info
    return not group.from_first(failed).any()


def _eigh(matrix: Tensor, group: Group) -> tuple[Tensor, Tensor]:
    """Return the decomposition of the first process, as another machine may find other signs."""
    values, vectors = matrix.new_zeros(len(matrix)), torch.zeros_like(matrix)
    with group.agreed():
        if group.first:
            values, vectors = torch.linalg.eigh(matrix)
    return group.from_first(values), group.from_first(vectors)


def _span(source: Source, weights: Tensor, intercept: bool, rows_at_once: int, *, turned: bool) -> Coordinates:
    """Return coordinates of the span of fewer rows than features, in which the optimal weight lies."""
    group = share_of(source).group
    features = torch.zeros(source.rows, source.width, dtype=torch.float64)
    with group.agreed():
        for block in source.blocks(rows_at_once):
            features[block.start : block.start + len(block)] = dense_features(block.features)
    features, weights = torch.cat(group.gathered(features)), torch.cat(group.gathered(weights))
    mean = weights @ features if intercept else torch.zeros(source.width, dtype=torch.float64)
    squares = weights @ features.square()
    features -= mean
    basis, triangle = torch.linalg.qr(features.T)
    basis, triangle = group.from_first(basis), group.from_first(triangle)
    gram = (triangle * weights) @ triangle.T
    constant = gram.diagonal() <= SPREAD**2 * (basis.square().T @ squares)
    if not turned:
        return _of_axes(mean, basis, intercept, squares, constant)
    axes, null = _axes(gram, constant, source)
    return _of_axes(mean, basis @ axes, intercept, squares, torch.arange(len(gram)) < null)


class _Moments:
    """First and second moments about the mean of the first rows, which avoids cancellation, and squares about zero.

    The second moments are those of all pairs of features, or of each feature.
    """

    def __init__(self, width: int, *, pairs: bool) -> None:
        self.origin = torch.zeros(width, dtype=torch.float64)
        self.first, self.squares = torch.zeros_like(self.origin), torch.zeros_like(self.origin)
        self.second = torch.zeros((width, width) if pairs else (width,), dtype=torch.float64)
        self.mass = 0.0

    def add(self, features: Tensor, weights: Tensor) -> None:
        if not self.mass:
            self.origin = features.mean(0)
        self.mass += float(weights.sum())
        self.squares += weights @ features.square()
        features = features - self.origin
        self.first += weights @ features
        if self.second.ndim == 2:
            self.second.addmm_(features.T * weights, features)
        else:
            self.second += weights @ features.square()

    def about(self, point: Tensor) -> Tensor:
        # Σ w (x − c)(x − c)ᵀ with δ = c − origin is S − m δᵀ − δ mᵀ + Σw δ δᵀ, m being the first moment.
        delta = point - self.origin
        if self.second.ndim == 1:
            return self.second - 2.0 * self.first * delta + self.mass * delta.square()
        cross = torch.outer(self.first, delta)
        return self.second - cross - cross.T + self.mass * torch.outer(delta, delta)
