"""A head with the rows that it was fitted to, which its covariance is computed from."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from softcurve.array_types import Float64
from softcurve.fit import DataError
from softcurve.fit.data.source import BlockTarget, Source, block_rows, is_sparse, share_of
from softcurve.fit.data.sparse_features import dense_features, linear
from softcurve.fit.fitting import separates
from softcurve.fit.solver.coordinates import SPREAD, Coordinates
from softcurve.fit.solver.objective import FitProblem, Objective
from softcurve.losses.divergences import Divergence, divergence_of
from softcurve.records import ShortRepr

FOR_TILES = 0.125  # share of the memory budget


class FittedRows(NamedTuple):
    """Some rows: centred features with a column of ones for the intercept, probabilities, weights and target."""

    features: Float64[Tensor, "rows size"]
    probabilities: Float64[Tensor, "rows classes"]
    weights: Float64[Tensor, "rows 1"]
    target: BlockTarget

    def residuals(self) -> Float64[Tensor, "rows classes"]:
        """Return ``p − y``, the gradient of each row's loss with respect to its logits."""
        target, p = self.target, self.probabilities
        assert isinstance(target, Tensor)
        if target.is_floating_point():
            return p - target
        return p.scatter_add(1, target[:, None], p.new_full((1, 1), -1.0).expand(len(p), 1))


class Moments(NamedTuple):
    """The weighted mean of each feature, zero without an intercept, the standard deviation from it, and that of x²."""

    mean: Float64[Tensor, " d"]
    deviation: Float64[Tensor, " d"]
    squares: Float64[Tensor, " d"]


@dataclass(frozen=True, eq=False, repr=False)
class FittedHead(ShortRepr):
    """A head that minimises ``Σ w_i loss_i + ½ penalty ‖W‖²`` over the rows of a source.

    A weight counts how often its row occurs. ``names`` are those of the features, and ``budget`` is the memory in bytes
    that its covariance may take.
    """

    source: Source
    weights: Float64[Tensor, " rows"]
    loss: str | Divergence
    weight: Float64[Tensor, "classes d"]
    bias: Float64[Tensor, " classes"]
    penalty: float
    intercept: bool
    names: tuple[str, ...]
    budget: int

    @property
    def size(self) -> int:
        """The number of coefficients of a class."""
        return self.source.width + self.intercept

    @property
    def rows_at_once(self) -> int:
        """The number of rows whose logits and features fit in the part of the budget for them."""
        return block_rows(self.source, len(self.bias), int(FOR_TILES * self.budget))

    @cached_property
    def total(self) -> float:
        """The sum of the weights of all rows."""
        total = self.weights.sum()[None]
        with share_of(self.source).group.summed(total):
            pass
        return float(total)

    @cached_property
    def moments(self) -> Moments:
        """The moments of the features."""
        mean = torch.zeros(self.source.width, dtype=torch.float64)
        for _ in range(2 * self.intercept):  # twice, so that the mean of a constant column is rounded once
            mean = mean + self._means(mean)[0]
        _, variance, squares = self._means(mean)
        return Moments(mean, variance.sqrt(), squares)

    @cached_property
    def coordinates(self) -> Coordinates:
        """The features about their mean, which are not rotated."""
        mean, deviation, squares = self.moments
        redundant = deviation <= SPREAD * squares.sqrt()
        if self.intercept:
            squares, redundant = (
                torch.cat([squares, squares.new_ones(1)]),
                torch.cat([redundant, redundant.new_zeros(1)]),
            )
        return Coordinates(mean, None, self.intercept, squares, redundant, sparse=is_sparse(self.source))

    def _means(self, mean: Float64[Tensor, " d"]) -> Float64[Tensor, "3 d"]:
        """Return the weighted means of ``x − mean``, of its square, and of ``x²``."""
        sums = torch.zeros(3, len(mean), dtype=torch.float64)
        with share_of(self.source).group.summed(sums):
            for block in self.source.blocks(self.rows_at_once):
                x = dense_features(block.features).double()
                weights = self.weights[block.start : block.start + len(block)]
                sums += torch.stack([weights @ (x - mean), weights @ (x - mean).square_(), weights @ x.square()])
        return sums / self.total

    def rows(self, at_most: int) -> Iterator[FittedRows]:
        """Yield all rows, ``at_most`` at a time."""
        for block in self.source.blocks(at_most):
            assert block.target is not None
            features = dense_features(block.features).double()
            p = linear(features, self.weight, self.bias).softmax(1)
            centred = torch.empty(len(block), self.size, dtype=torch.float64)
            self.coordinates.turned_into(centred, features)
            yield FittedRows(centred, p, self.weights[block.start : block.start + len(block), None], block.target)

    def require_covariance(self, tolerance: float) -> str:
        """Raise DataError if the coefficients have no covariance; return a warning if they are not at the minimum.

        That is the case if an entry of the gradient of the mean objective exceeds ``tolerance``.
        """
        if not divergence_of(self.loss).hessian_is_fisher or self.source.kind == "top_k":
            raise DataError(
                "covariance is that of a maximum-likelihood estimate, from labels or distributions with the loss "
                f"cross_entropy or forward_kl; got loss {self.loss!r} and targets of kind {self.source.kind!r}: fit "
                "one of these"
            )
        problem = FitProblem(
            self.source, self.weights / self.total, self.loss, self.penalty / self.total, self.rows_at_once
        )
        if not self.penalty:
            if separates(problem, self.weight, self.bias):
                raise DataError(
                    "covariance does not exist: the classes can be separated, and without a penalty (C = inf) the loss "
                    "has no minimum; give a finite C"
                )
            if self.coordinates.redundant.any():
                raise self.dependent(int(self.coordinates.redundant.int().argmax()))
        point = Objective(problem, self.coordinates).at(self.coordinates.parameters(self.weight, self.bias))
        if point.gradient_max <= tolerance:
            return ""
        return (
            f"the largest entry of the gradient at these rows is {point.gradient_max:.1e}, so the coefficients are not "
            "at the minimum, which standard errors assume: give the X, y and sample_weight of the fit, and lower tol "
            "or raise max_iter"
        )

    def dependent(self, place: int) -> DataError:
        """Return the error of a Hessian whose row ``place``, by classes and features, depends on those before it."""
        feature = place % self.size
        return self.singular("the intercept" if feature == self.source.width else f"feature {self.names[feature]!r}")

    def singular(self, where: str) -> DataError:
        """Return the error of a singular Hessian; ``where`` names coefficients that are not determined."""
        return DataError(
            f"covariance does not exist: the Hessian is singular at {where}. A feature may be constant or a linear "
            "combination of others, or certain predictions leave it undetermined; leave it out, or give a smaller C"
        )
