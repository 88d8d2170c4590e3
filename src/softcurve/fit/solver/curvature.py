"""Products with the damped Gauss-Newton matrix of the mean loss, tile by tile.

The matrix of one row is ``((1 + τμ) κ J + μ diag|p − y|) ⊗ [u; 1][u; 1]ᵀ`` with ``J = diag(p) − ppᵀ``; the penalty is
added to their sum. κJ is the Hessian of cross-entropy and forward KL (κ = 1); for reverse KL and JS it is the Hessian
at p = y, and positive everywhere. The damping μ limits the change of a row's logits in proportion to its error: a row
that is certain of the wrong class has hardly any curvature, and Newton's step on it would be far too long.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from softcurve.array_types import Float, Float64, Int64
from softcurve.fit.data.source import BlockTarget, share_of
from softcurve.fit.data.sparse_features import Features, SparseFeatures, dense_features
from softcurve.fit.data.subset import rows_of
from softcurve.fit.group import Group
from softcurve.fit.losses import named_classes
from softcurve.fit.solver.coordinates import Coordinates
from softcurve.fit.solver.objective import FitProblem
from softcurve.fit.solver.tiles import DenseTile, SparseTile, Tile
from softcurve.head.brgemm import torch_uses_instructions
from softcurve.losses.divergences import divergence_of

OF_CURVATURE = 0.1  # τ, which also limits a long step where p = y
# Shares of the penalty's curvature, and of the logit curvature of all rows, that negligible rows may have together.
LEFT_OUT, LEFT_OUT_OF_INTERCEPTS = 0.1, 0.01
# Multiply-adds of the logits, and parameters of a class, below which products in bfloat16 save nothing.
LEAST_ROUNDED, NARROWEST_ROUNDED = 3_000_000, 96
# Logits of a tile of products in bfloat16, whose cost grows with the number of tiles; and the bytes of memory for each.
ROUNDED_LOGITS, BYTES_FOR_LOGIT = 2**18, 128
BRANCHES = 256  # candidates that one message compares in the search over the rows of all processes


@dataclass(eq=False)
class CurvatureTile:
    """Some rows: features in the coordinates of the fit, probabilities, weights and target."""

    numbers: slice | Tensor  # (r,)
    features: Tile  # (r, size), or sparse (r, d)
    probabilities: Tensor  # (r, C)
    weights: Tensor | None  # (r, 1); None for equal weights
    target: BlockTarget | None

    def weighted(self, values: Tensor) -> Tensor:
        """Multiply the values of each row by its weight."""
        return values if self.weights is None else values * self.weights


class Curvature:
    """The matrix at the probabilities last stored. What does not fit in ``memory`` bytes is computed again.

    ``vectors`` is the dtype of the vectors that it is multiplied by. That is float64, or ``dtype`` for sparse features,
    for which passes over vectors of the size of the head take as long as the products.

    ``rounded`` are the features in bfloat16, for :meth:`rounded_product`: in float32 on processors that multiply
    bfloat16 faster, if there is memory for them.
    """

    def __init__(
        self, problem: FitProblem, coordinates: Coordinates, *, dtype: torch.dtype, memory: int,
        on_product: Callable[[int], None] = lambda products: None,
    ) -> None:  # fmt: skip
        self.problem, self.coordinates, self.dtype, self.on_product = problem, coordinates, dtype, on_product
        self.source, self.classes, self.group = problem.source, problem.classes, problem.group
        self.scale = divergence_of(problem.loss).curvature_at_agreement
        self.penalties, self.damping, self.products = coordinates.penalties(problem.penalty), 0.0, 0
        self.vectors = dtype if coordinates.sparse else torch.float64
        self.parameters: Tensor | None = None
        self._left_out: Tensor | None = None
        self.all_rows = share_of(problem.source).total
        source, weights, rows, size = problem.source, problem.weights, problem.source.rows, coordinates.size
        extremes = (float(weights.max()), -float(weights.min())) if rows else (-math.inf, -math.inf)
        heaviest, minus_lightest, most_rows = self.group.largest(*extremes, rows)
        uniform = heaviest == -minus_lightest
        # Weights near one leave float32 room above and below.
        self.mean_weight = heaviest if uniform else 1.0 / self.all_rows
        self.weights = None if uniform else (weights / self.mean_weight).to(dtype)[:, None]
        # All processes store their features, or none, according to the process with most rows.
        # Sparse ones are stored whatever they take, which is no more than the rows themselves.
        self.features, self.rounded, self._sparse = None, None, list[SparseTile]()
        most = min(problem.rows_at_once, rows)
        self._rounded_at_once = max(
            most, min(rows, ROUNDED_LOGITS // self.classes, memory // (BYTES_FOR_LOGIT * self.classes))
        )
        most_entries = int(most_rows) * size
        if not coordinates.sparse and most_entries * dtype.itemsize <= memory:
            self.features = torch.empty(rows, size, dtype=dtype)
            memory -= self.features.nbytes
            rounded = dtype == torch.float32 and rounding_pays(self.all_rows, size, self.classes)
            if not self.group.largest(not rounded or most_entries * torch.bfloat16.itemsize > memory)[0]:
                self.rounded = torch.empty(rows, size, dtype=torch.bfloat16)
                memory -= self.rounded.nbytes
                most = self._rounded_at_once
        stored = min(rows, memory // (self.classes * dtype.itemsize))
        self.probabilities = torch.empty(stored, self.classes, dtype=dtype)
        self.labels = torch.empty(rows, dtype=torch.int64) if source.kind == "labels" else None
        # For each row 1 − the largest probability, 1 − that of the label, and ‖u‖².
        self._uncertainty, self._error, self._squares = torch.empty(3, rows, dtype=torch.float64)
        self._softmax_buffer, self._change_buffer, self._error_buffer = torch.empty(3, most, self.classes, dtype=dtype)
        width = 0 if coordinates.sparse else source.width + coordinates.intercept
        self._centred = torch.ones(min(problem.rows_at_once, rows), width, dtype=dtype)
        self._mean = coordinates.mean.to(dtype)
        with self.group.agreed():
            for block, _ in problem.blocks():
                here = slice(block.start, block.start + len(block))
                if self.features is not None:
                    coordinates.turned_into(self.features[here], dense_features(block.features))
                if self.features is not None and self.rounded is not None:
                    self.rounded[here] = self.features[here]
                if self.labels is not None:
                    assert isinstance(block.target, Tensor)
                    self.labels[here] = block.target
                centred = self._centre(block.features)
                if isinstance(centred, SparseTile):
                    self._sparse.append(centred)
                    self._squares[here] = centred.row_squares()
                else:
                    self._squares[here] = centred.matrix[:, : source.width].square().sum(1)

    def keep(self, start: int, probabilities: Tensor) -> None:
        """Store the probabilities of a block, as far as there is memory, and the uncertainty of its rows."""
        end = start + len(probabilities)
        self._uncertainty[start:end] = 1.0 - probabilities.amax(1)
        if self.labels is not None:
            self._error[start:end] = 1.0 - probabilities.gather(1, self.labels[start:end, None])[:, 0]
        if start < (stored := min(end, len(self.probabilities))):
            self.probabilities[start:stored] = probabilities[: stored - start]

    def move_to(self, parameters: Float64[Tensor, "classes size"]) -> None:
        """Set the parameters at which probabilities that are not stored are computed."""
        self.parameters = self._for_tiles(parameters)

    def uncertain_rows(self) -> float:
        """Return the effective number of uncertain rows, ``(Σu)² / Σu²`` with ``u = w (1 − max p)``."""
        uncertainty = self._uncertainty * self.problem.weights
        sums = torch.stack([uncertainty.sum(), uncertainty.square().sum()])
        with self.group.summed(sums):
            pass
        return float(sums[0] ** 2 / sums[1]) if sums[1] > 0 else 0.0

    def leave_out_negligible_rows(self) -> None:
        """Let products leave out the rows that together have less than a tenth of the penalty's curvature.

        ``‖J‖ ≤ 2 max_k p_k (1 − p_k) ≤ 2 (1 − max p)`` bounds the matrix of a row; at most a hundredth of the curvature
        of the intercepts, which have no penalty, is left out. The error of the matrix slows Newton's method down a
        little and does not change its limit.
        """
        self._left_out = None
        penalty = float(self.penalties[0])
        if not penalty or (self.damping and self.labels is None):
            return
        logit_curvatures = (2.0 * self._factor()) * self._uncertainty
        if self.damping:
            logit_curvatures += self.damping * self._error
        logit_curvatures *= self.problem.weights
        curvatures, most = logit_curvatures * self._squares, LEFT_OUT * penalty
        rows, count = negligible_rows(curvatures, most, logit_curvatures, LEFT_OUT_OF_INTERCEPTS, self.group)
        # Gathering the other rows costs as much as the products of a few rows.
        if 2 * count > self.all_rows:
            self._left_out = torch.zeros(len(logit_curvatures), dtype=torch.bool)
            self._left_out[rows] = True

    def __call__(self, direction: Float[Tensor, "classes size"]) -> Float[Tensor, "classes size"]:
        """Return the product with one direction."""
        return self._product(direction, rounded=False)

    def rounded_product(self, direction: Float[Tensor, "classes size"]) -> Float[Tensor, "classes size"]:
        """Return the product with one direction by matrix products in bfloat16, which have an error of 2⁻⁹ or so.

        The features are rounded once and for all, so that the matrix itself stays symmetric and positive. The part of
        the softmax is in float32, and so are the sums over the tiles.
        """
        return self._product(direction, rounded=True)

    def _product(self, direction: Tensor, *, rounded: bool) -> Tensor:
        self.products += 1
        along = self._for_tiles(direction)
        out = torch.zeros_like(along)
        (weight, bias), (weight_out, bias_out) = self._parts(along.bfloat16() if rounded else along), self._parts(out)
        result = out if out.dtype == self.vectors else torch.empty_like(along, dtype=self.vectors)
        with self.group.summed(result):
            self.on_product(self.products)
            for tile in self._tiles(rounded=rounded):
                change = tile.features.times(weight, bias, self._change_buffer[: len(tile.features)])
                tile.features.add_transposed(self._logit_product(tile, change), weight_out, bias_out)
            result.copy_(out)  # none if they are the same
        if self.features is None and not self.coordinates.sparse:
            result = self.coordinates.from_mean(result[:, : self.source.width], result[:, -1])
        return result.mul_(self.mean_weight).addcmul_(direction, self.penalties.to(self.vectors))

    def class_factor(self) -> Float64[Tensor, "classes classes"]:
        """Return the sum of the rows' matrices over the classes."""
        factor = torch.zeros(self.classes, self.classes, dtype=self.dtype)
        wide = torch.zeros_like(factor, dtype=torch.float64)
        diagonal = torch.zeros_like(wide[0])
        with self.group.summed(wide):
            for tile in self._tiles():
                weighted = tile.weighted(tile.probabilities)
                factor.addmm_(weighted.T, tile.probabilities, alpha=-self._factor())
                diagonal += self._factor() * weighted.sum(0)
                if self.damping:
                    diagonal += self.damping * tile.weighted(_errors(tile)).sum(0)
            wide.copy_(factor).diagonal().add_(diagonal)
        return wide.mul_(self.mean_weight)

    def diagonal(
        self, basis: Float[Tensor, "classes classes"] | None, seen: Callable[[Tensor, Tensor], None] | None = None
    ) -> Float64[Tensor, "classes size"]:
        """Return the diagonal in ``basis`` (the classes by default) ⊗ the axes of the features, with the penalty.

        ``seen`` is called with the numbers of each tile's rows and the diagonals of their matrices over the classes.
        """
        diagonal = torch.zeros(self.classes, self.coordinates.size, dtype=torch.float64)
        diagonal = self.coordinates.laid_out(diagonal)
        weight, bias = self._parts(diagonal)
        numbers = torch.arange(self.source.rows)
        with self.group.summed(diagonal):
            for tile in self._tiles():
                row_diagonals = self._row_diagonals(tile, basis)
                if seen is not None:
                    seen(numbers[tile.numbers], row_diagonals)
                weight += self._turned(tile.features).square_sums(row_diagonals)
                if bias is not None:
                    bias += row_diagonals.sum(0)
        return diagonal.clamp_(min=0.0).mul_(self.mean_weight).add_(self.penalties)

    def _parts(self, parameters: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return the weight and the bias that a tile's features are multiplied by; dense ones have a column of 1."""
        if self.coordinates.sparse and self.coordinates.intercept:
            return parameters[:, :-1], parameters[:, -1]
        return parameters, None

    def _turned(self, features: Tile) -> Tile:
        """Return the features of a tile along the axes of the coordinates."""
        basis = self.coordinates.basis
        if self.features is not None or basis is None or isinstance(features, SparseTile):
            return features
        centred, ones = features.matrix[:, : self.source.width], features.matrix[:, self.source.width :]
        return DenseTile(torch.cat([centred @ basis.to(self.dtype), ones], 1))

    def _factor(self) -> float:
        return self.scale * (1.0 + OF_CURVATURE * self.damping)

    def _row_diagonals(self, tile: CurvatureTile, basis: Tensor | None) -> Tensor:
        """Return the diagonals of the rows' matrices over the classes."""
        p = tile.probabilities
        diagonals = p - p.square() if basis is None else (p @ basis.square()).sub_((p @ basis).square_())
        diagonals.mul_(self._factor())
        if self.damping:
            errors = _errors(tile)
            diagonals.add_(errors if basis is None else errors @ basis.square(), alpha=self.damping)
        return tile.weighted(diagonals)

    def _logit_product(self, tile: CurvatureTile, change: Tensor) -> Tensor:
        """Replace a change ``v`` of the logits by ``w ((1 + τμ) κ J + μ diag|p − y|) v``."""
        p, mu = tile.probabilities, self.damping
        diagonal = factor = self._factor()
        classes, correction = _listed_errors(tile) if mu else (None, p)
        damped = None
        if classes is not None:
            # |p − y| equals p except for the few classes that a label or a list names.
            diagonal += mu
            damped = change.gather(1, classes).mul_(correction).mul_(mu)
        elif mu:
            assert isinstance(tile.target, Tensor)
            damped = torch.sub(p, tile.target, out=self._error_buffer[: len(p)]).abs_().mul_(mu).mul_(change)
        change.mul_(p)
        change.addcmul_(p, change.sum(1, keepdim=True), value=-factor / diagonal)
        if diagonal != 1.0:
            change.mul_(diagonal)
        if damped is not None:
            change = change.add_(damped) if classes is None else change.scatter_add_(1, classes, damped)
        return change if tile.weights is None else change.mul_(tile.weights)

    def _for_tiles(self, parameters: Tensor) -> Tensor:
        """Return the parameters for the features of a tile, which are centred but not turned if they are not stored."""
        if self.features is not None or self.coordinates.sparse:
            return self.coordinates.laid_out(parameters).to(self.dtype)
        weight, bias = self.coordinates.about_mean(parameters)
        return (weight if bias is None else torch.cat([weight, bias[:, None]], 1)).to(self.dtype)

    def _tiles(self, *, rounded: bool = False) -> Iterator[CurvatureTile]:
        for start, features, target in self._rows(self.rounded if rounded else self.features):
            end = start + len(features)
            numbers: slice | Tensor = slice(start, end)
            if self._left_out is not None:
                kept = (~self._left_out[start:end]).nonzero()[:, 0]
                if not len(kept):
                    continue
                numbers, features = kept + start, features[kept]
                target = rows_of(target, kept)
                end = int(numbers[-1]) + 1
            if end <= len(self.probabilities):
                stored = self.probabilities[numbers]
            else:
                stored = self._softmax(DenseTile(self.features[numbers]) if self.features is not None else features)
            weights = None if self.weights is None else self.weights[numbers]
            yield CurvatureTile(numbers, features, stored, weights, target)

    def _softmax(self, features: Tile) -> Tensor:
        assert self.parameters is not None
        p = features.times(*self._parts(self.parameters), self._softmax_buffer[: len(features)])
        p -= p.amax(1, keepdim=True)
        p.exp_()
        p /= p.sum(1, keepdim=True)
        return p

    def _rows(self, matrix: Tensor | None) -> Iterator[tuple[int, Tile, BlockTarget | None]]:
        """Yield the first row, the features and the target of each tile, from memory if they are there."""
        if (matrix is not None or self._sparse) and (self.labels is not None or not self.damping):
            start, rounded = 0, matrix is not None and matrix is self.rounded
            for features in self._stored(matrix, self._rounded_at_once if rounded else self.problem.rows_at_once):
                here = slice(start, start + len(features))
                yield start, features, None if self.labels is None else self.labels[here]
                start += len(features)
            return
        sparse = iter(self._sparse)
        for block, _ in self.problem.blocks():
            target = block.target
            if isinstance(target, Tensor) and target.is_floating_point():
                target = target.to(self.dtype)
            if matrix is not None:
                yield block.start, DenseTile(matrix[block.start : block.start + len(block)]), target
            else:
                yield block.start, next(sparse) if self._sparse else self._centre(block.features), target

    def _stored(self, matrix: Tensor | None, at_once: int) -> Iterator[Tile]:
        """Yield the features that are stored, tile by tile."""
        yield from self._sparse
        if matrix is not None:
            yield from map(DenseTile, matrix.split(at_once))

    def _centre(self, features: Features) -> Tile:
        if isinstance(features, SparseFeatures):
            return SparseTile.centred(features, self.coordinates.mean, self.dtype)
        out = self._centred[: len(features)]
        torch.sub(features, self._mean, out=out[:, : self.source.width])
        return DenseTile(out)


def rounding_pays(rows: int, size: int, classes: int) -> bool:
    """Return whether the processor has instructions for bfloat16, and the products are large enough to gain by them."""
    large = size >= NARROWEST_ROUNDED and rows * size * classes >= LEAST_ROUNDED
    return large and torch_uses_instructions()


def _errors(tile: CurvatureTile) -> Tensor:
    """Return ``|p − y|`` for all classes."""
    classes, correction = _listed_errors(tile)
    if classes is not None:
        return tile.probabilities.scatter_add(1, classes, correction)
    assert isinstance(tile.target, Tensor)
    return (tile.probabilities - tile.target).abs_()


def _listed_errors(tile: CurvatureTile) -> tuple[Tensor | None, Tensor]:
    """Return the classes that a label or a list names, ``(r, k)``, and ``|p − y| − p`` there."""
    p = tile.probabilities
    if tile.target is None or (named := named_classes(tile.target, p.dtype)) is None:
        return None, p
    listed = p.gather(1, named[0])
    return named[0], (listed - named[1]).abs_().sub_(listed)


def negligible_rows(
    curvatures: Float64[Tensor, " rows"], most: float, logit_curvatures: Float64[Tensor, " rows"], share: float,
    group: Group,
) -> tuple[Int64[Tensor, " negligible"], int]:  # fmt: skip
    """Return the rows of least curvature, and their number in all processes.

    Their curvatures sum to at most ``most``, their logit curvatures to at most this share of the sum over all rows.
    They are ``order[:count]`` with ``order = curvatures.argsort()`` and the largest such count. In several processes,
    all or none are taken of rows with equal curvatures.
    """
    order = curvatures.argsort()
    sums, logit_sums = curvatures[order].cumsum(0), logit_curvatures[order].cumsum(0)
    if group.size == 1:
        count = int(((sums <= most) & (logit_sums <= share * logit_curvatures.sum())).sum())
        return order[:count], count
    # The bits of numbers that are not negative, as integers, are in the order of the numbers. -0.0 would be the least.
    keys = (curvatures[order] + 0.0).view(torch.int64)
    zero = sums.new_zeros(1)
    sums, logit_sums = torch.cat([zero, sums]), torch.cat([zero, logit_sums])
    total = logit_sums[-1:].clone()
    with group.summed(total):
        pass
    # Rows with a key below ``low`` are negligible, those below ``high`` together are not.
    low, high, count = 0, 2**63 - 1, 0
    while high - low > 1:
        candidates = torch.tensor(sorted({low + (high - low) * i // BRANCHES for i in range(1, BRANCHES)} - {low}))
        places = torch.searchsorted(keys, candidates)
        at = torch.stack([sums[places], logit_sums[places], places.double()])
        with group.summed(at):
            pass
        within = int(((at[0] <= most) & (at[1] <= share * total)).sum())
        if within:
            low, count = int(candidates[within - 1]), int(at[2, within - 1])
        if within < len(candidates):
            high = int(candidates[within])
    return order[: int(torch.searchsorted(keys, low))], count
