"""Two approximate inverses of the damped Gauss-Newton matrix, and the choice between them.

``Eigenbasis`` is the diagonal in a basis of the classes times the axes of the features (George et al., 2018). At the
start every row has the same probabilities, the matrix is a Kronecker product, and the inverse is exact. Later it still
represents how the curvature of each class varies over the axes of the features, by many orders of magnitude.

``ClassBlocks`` is the block of each class, assembled from the rows where its curvature is largest, and the diagonal of
all rows. Once most rows are predicted with certainty, few rows carry the curvature of a class, and no Kronecker product
is near it. The blocks take 2 to 15 times fewer products, and cost as much as some of them. Later points use them with
their own diagonals: what the rows of a class have in common changes little from step to step.
"""

from __future__ import annotations

import math
from copy import copy

import torch
from torch import Tensor

from softcurve.array_types import Float, Float64
from softcurve.curvature.algorithms.matrix import Map
from softcurve.fit.group import Group
from softcurve.fit.solver.curvature import Curvature

MOST_CLASSES = 512  # above it, eigenvectors over the classes take longer than the products that they save
# Lower bound for the diagonal, relative to the largest curvature of the axis. A direction without curvature, such as
# the same change in all classes, is left to the gradient, which is zero there.
FLOOR = 1e-10
# Curvature of a redundant axis that counts as none, relative to the curvature if its features varied.
UNSEEN = 1e-14
# Most rows of the block of a class that is a matrix, and the share of the curvature of all classes that is enough.
FEWEST_ROWS, ROWS_PER_FEATURE, COVERED = 256, 4, 0.9
ROWS_OF_UNCERTAIN = 8.0  # the rows of the blocks of all classes that have that share, for each uncertain row
# The rows from which on a block in factors pays, and the least that remains of its diagonal beside them, for each block
# and for each of its features: I − BᵀB would not be positive after rounding if less remained.
FEWEST_FACTORED, LEAST_REST, LEAST_REST_PER_FEATURE = 32, 1e-2, 2.5e-5
BYTES_PER_SELECTED = 24  # of the weights and numbers of the rows that are selected for a class
SAVED, REUSED = 0.6, 2.5  # the share of the products with the eigenbasis that blocks save, and the steps that use them
# Bytes of features or weights of rows that are gathered at a time, at most this share of the memory for the blocks.
GATHERED, SHARE_GATHERED = 2**23, 0.125
# The time of a multiply-add of small batched matrices and of eigenvectors, relative to one of a product in float32.
SLOWER, EIGENVECTORS = 3.0, 30.0
# The fixed part of the time of blocks and of a product, which small problems notice, in multiply-adds.
LEAST_OF_BLOCKS, LEAST_OF_PRODUCT = 1e8, 5e6
LOGIT = 60  # the time of a logit outside of the matrix products, in features; products in bfloat16 halve the others


class Eigenbasis:
    """``V ⊗ I`` times the diagonal, where ``V`` are the eigenvectors of the matrix summed over the feature axes."""

    def __init__(self, curvature: Curvature) -> None:
        self.basis: Tensor | None = None
        if curvature.classes <= MOST_CLASSES:
            basis = torch.linalg.eigh(curvature.class_factor()).eigenvectors
            self.basis = curvature.group.from_first(basis)  # those of another machine may have other signs
        diagonal = curvature.diagonal(None if self.basis is None else self.basis.to(curvature.dtype))
        dtype = curvature.vectors
        self.inverse = _reciprocal(diagonal, curvature).to(dtype)
        self.basis = None if self.basis is None else self.basis.to(dtype)

    def __call__(self, gradient: Float[Tensor, "classes size"]) -> Float[Tensor, "classes size"]:
        """Apply the inverse."""
        if self.basis is None:
            return gradient * self.inverse
        # The results are in the same order in memory as the gradient.
        turned = torch.mm(self.basis.T, gradient, out=torch.empty_like(gradient)).mul_(self.inverse)
        return torch.mm(self.basis, turned, out=torch.empty_like(gradient))


class ClassBlocks:
    """The inverses of the blocks of the classes, whose diagonals are scaled to one before they are inverted.

    A block is ``D + UᵀU`` with the rows ``U`` where the curvature of the class is largest. For few of them, or where
    matrices do not fit in ``memory`` bytes, the inverse is ``D⁻½ (I − BᵀB) D⁻½`` with as many rows (Woodbury, 1950).
    ``memory`` also limits what is gathered to compute the inverses.
    """

    def __init__(self, curvature: Curvature, memory: int) -> None:
        assert curvature.features is not None
        group, at_once = curvature.group, min(GATHERED, int(SHARE_GATHERED * memory))
        largest = _LargestWeights(most_rows(curvature, memory), curvature, at_once)
        diagonal = curvature.diagonal(None, largest.add)
        weights, rows, self.count = largest.chosen()
        self.scale = _reciprocal(diagonal, curvature).sqrt_()
        self.rest: Tensor | None = None
        classes, size = self.scale.shape
        self.factored = _is_factored(curvature, self.count, memory)
        self.parts = torch.empty(classes, self.count if self.factored else size, size, dtype=curvature.dtype)
        step = max(1, at_once // max(1, self.count * size * curvature.dtype.itemsize))
        scale = self.scale.to(curvature.dtype)
        roots = (weights * curvature.mean_weight).sqrt_()
        for start in range(0, classes, step):
            these = slice(start, start + step)
            features = curvature.features[rows[these]].mul_(roots[these, :, None]).mul_(scale[these, None, :])
            if self.factored:
                self.rest = torch.empty_like(self.scale) if self.rest is None else self.rest
                self.parts[these], self.rest[these] = _factors(_of_all(features, self.count, group))
            else:
                self.parts[these] = _inverses(features, group)

    def rescale(self, curvature: Curvature) -> None:
        """Give the blocks the diagonal at another point."""
        self.scale = _reciprocal(curvature.diagonal(None), curvature).sqrt_()

    def __call__(self, gradient: Float64[Tensor, "classes size"]) -> Float64[Tensor, "classes size"]:
        """Apply the inverse."""
        scale = self.scale if self.rest is None else self.scale * self.rest
        # A row times a matrix takes less than half the time of a matrix times a column.
        scaled = (gradient * scale).to(self.parts.dtype)[:, None, :]
        if self.factored:
            product = torch.baddbmm(scaled, torch.bmm(scaled, self.parts.mT), self.parts, alpha=-1.0)
        else:
            product = torch.bmm(scaled, self.parts)
        return product[:, 0].double().mul_(scale)


def centred(parameters: Tensor) -> Tensor:
    """Subtract the mean over the classes: of the heads with the same probabilities, this one has the smallest norm."""
    return parameters - parameters.mean(0)


def between_centred(inverse: ClassBlocks | Eigenbasis) -> Map:
    """Return the inverse with the mean over the classes subtracted from its argument and from its result.

    A gradient has no part that is the same in all classes, except for rounding. Subtracting the mean of the
    eigenvectors once does the same as passes over the gradients, which take longer than all else for wide features.
    """
    if not isinstance(inverse, Eigenbasis) or inverse.basis is None:
        return lambda gradient: centred(inverse(centred(gradient)))
    of_centred = copy(inverse)
    of_centred.basis = centred(inverse.basis)
    return of_centred


def expected_rows(curvature: Curvature, memory: int) -> int:
    """Estimate the number of rows of the block of a class at the present point; 0 if there is no memory for blocks."""
    most = most_rows(curvature, memory)
    if not most:
        return 0
    return min(most, max(FEWEST_ROWS, int(ROWS_OF_UNCERTAIN * curvature.uncertain_rows() / curvature.classes)))


def cost_of_blocks(curvature: Curvature, count: int, memory: int, *, rounded: bool) -> float:
    """Estimate what ``ClassBlocks`` of ``count`` rows cost, in products in float32 or in ``rounded`` ones."""
    rows, size = curvature.all_rows, curvature.coordinates.size
    if not count:
        return math.inf
    of_class = 2 * count**2 if _is_factored(curvature, count, memory) else 2 * count * size + SLOWER * size**2
    # Multiply-adds for each class and feature.
    of_blocks = of_class + 4 * rows + LEAST_OF_BLOCKS / (size * curvature.classes)
    of_product = 4 * rows + LEAST_OF_PRODUCT / (size * curvature.classes)
    return of_blocks / of_product * ((size + LOGIT) / (0.5 * size + LOGIT) if rounded else 1.0)


def saved_by_blocks(curvature: Curvature, products: int) -> float:
    """Return the products that blocks save in the steps that use them, after one of as many with the eigenbasis."""
    size, classes = curvature.coordinates.size, curvature.classes
    of_step = 0.5  # those of the eigenbasis
    if classes <= MOST_CLASSES:
        of_step += (6 * classes + EIGENVECTORS * classes**2 / curvature.all_rows) / (4 * size)
    return REUSED * (SAVED * products + of_step)


def memory_of_blocks(classes: int, size: int, dtype: torch.dtype) -> int:
    """Return the bytes of ``ClassBlocks`` as matrices."""
    return classes * size**2 * dtype.itemsize


def most_rows(curvature: Curvature, memory: int) -> int:
    """Return how many rows the block of a class may have; 0 if there is no memory for blocks, or for the features."""
    if curvature.features is None:
        return 0
    size, dtype = curvature.coordinates.size, curvature.dtype
    return rows_in_memory(curvature.all_rows, size, curvature.classes, dtype, memory)


def rows_in_memory(rows: int, size: int, classes: int, dtype: torch.dtype, memory: int) -> int:
    """Return how many rows the block of a class may have within ``memory`` bytes; 0 if there is too little."""
    if memory_of_blocks(classes, size, dtype) <= memory:
        selected = max(FEWEST_FACTORED, memory // (BYTES_PER_SELECTED * classes))
        return min(rows, selected, max(FEWEST_ROWS, ROWS_PER_FEATURE * size))
    most = min(size // 2, memory // (classes * size * dtype.itemsize))
    return min(rows, most) if most >= FEWEST_FACTORED else 0


def _is_factored(curvature: Curvature, count: int, memory: int) -> bool:
    """Return whether blocks of ``count`` rows stay in factors, which take less time than matrices or alone fit."""
    size = curvature.coordinates.size
    return 4 * count < 3 * size or memory_of_blocks(curvature.classes, size, curvature.dtype) > memory


def _reciprocal(diagonal: Float64[Tensor, "classes size"], curvature: Curvature) -> Float64[Tensor, "classes size"]:
    """Invert the diagonal in place; it becomes zero on redundant axes unless the penalty gives them curvature.

    Axes are compared only for that, and then in units of their own features, whose curvatures may differ by any factor.
    """
    coordinates, largest = curvature.coordinates, diagonal.amax(0)
    inverse = diagonal.clamp_(min=FLOOR * largest).reciprocal_()
    if coordinates.redundant.any():
        unit = ((largest - curvature.penalties) / coordinates.moments).nan_to_num_(nan=0.0, posinf=0.0).max()
        inverse[:, coordinates.redundant & (largest <= UNSEEN * unit * coordinates.moments)] = 0.0
    return inverse.nan_to_num_(nan=0.0, posinf=0.0)


def _of_all(
    features: Float[Tensor, "classes own size"], count: int, group: Group
) -> Float[Tensor, "classes rows size"]:
    """Return the rows of all processes, of which each class has at most ``count`` that are not zero."""
    if group.size == 1:
        return features
    every = torch.cat([each.transpose(0, 1) for each in group.gathered(features.transpose(0, 1).contiguous())], 1)
    rows = every.square().sum(2).topk(count, dim=1).indices
    return every.gather(1, rows[:, :, None].expand(-1, -1, every.shape[2]))


def _factors(features: Float[Tensor, "classes rows size"]) -> tuple[Tensor, Float[Tensor, "classes size"]]:
    """Return ``B`` and ``D⁻½`` with ``(D + UᵀU)⁻¹ = D⁻½ (I − BᵀB) D⁻½``.

    The sum has a diagonal of one, or a little more where the rows leave less than the least rest.
    """
    rest = (1.0 - features.square().sum(1)).clamp_(min=max(LEAST_REST, LEAST_REST_PER_FEATURE * features.shape[2]))
    rest = rest.rsqrt_()
    features = features * rest[:, None, :]
    inner = torch.bmm(features, features.mT)
    inner.diagonal(dim1=1, dim2=2).add_(1.0)
    return torch.linalg.solve_triangular(torch.linalg.cholesky(inner), features, upper=False), rest


def _inverses(features: Float[Tensor, "classes rows size"], group: Group) -> Float[Tensor, "classes size size"]:
    """Return ``(D + UᵀU)⁻¹`` of the rows of all processes where the sum has a diagonal of one.

    The diagonal is raised until the matrices are positive after rounding.
    """
    blocks = features.new_empty(len(features), features.shape[2], features.shape[2])
    with group.summed(blocks):
        torch.bmm(features.mT, features, out=blocks)
    blocks.diagonal(dim1=1, dim2=2).fill_(1.0)
    jitter = 16 * torch.finfo(blocks.dtype).eps
    while True:
        blocks.diagonal(dim1=1, dim2=2).add_(jitter)
        factors, failed = torch.linalg.cholesky_ex(blocks)
        if not failed.any():
            return torch.cholesky_inverse(factors)
        jitter *= 10


class _LargestWeights:
    """The rows with the largest weights of each class, collected tile by tile."""

    def __init__(self, most: int, curvature: Curvature, at_once: int) -> None:
        self.group, self.most, count = curvature.group, most, min(most, curvature.source.rows)
        self.count = count
        self.weights = torch.empty(curvature.classes, 0, dtype=curvature.dtype)
        self.rows = torch.empty(curvature.classes, 0, dtype=torch.int64)
        self.total = torch.zeros(1, dtype=torch.float64)
        self.pending: list[tuple[Tensor, Tensor]] = []
        self.most_pending = max(count, at_once // (curvature.classes * curvature.dtype.itemsize))

    def add(self, numbers: Tensor, weights: Tensor) -> None:
        self.total += weights.sum(dtype=torch.float64)
        self.pending.append((numbers, weights))
        if sum(len(numbers) for numbers, _ in self.pending) >= self.most_pending:
            self._merge()

    def chosen(self) -> tuple[Tensor, Tensor, int]:
        """Return weights and numbers of the rows, ``(C, count)`` each, and the count in all processes.

        The count is the least, from ``FEWEST_ROWS``, with which they have the share ``COVERED`` of all curvature. In
        several processes, each returns its own ones of these rows. Where one class has fewer of them than another, rows
        of weight zero fill the places.
        """
        self._merge()
        with self.group.summed(self.total):
            pass
        weights, rows = self.weights, self.rows
        by_rank = [each.T for each in self.group.gathered(weights.T.contiguous())]
        every = torch.cat(by_rank, 1)
        best, at = every.topk(min(self.most, every.shape[1]), dim=1)
        covered = best.sum(0, dtype=torch.float64).cumsum(0)
        count = min(best.shape[1], max(FEWEST_ROWS, int((covered < COVERED * self.total).sum()) + 1))
        if self.group.size == 1:
            return best[:, :count], rows.gather(1, at[:, :count]), count
        chosen = torch.zeros_like(every, dtype=torch.bool).scatter_(1, at[:, :count], True)
        before = sum(each.shape[1] for each in by_rank[: self.group.rank])
        chosen = chosen[:, before : before + weights.shape[1]]
        kept, at = (weights * chosen).topk(int(chosen.sum(1).amax()) if chosen.numel() else 0, dim=1, sorted=False)
        return kept, rows.gather(1, at), count

    def _merge(self) -> None:
        if not self.pending:
            return
        numbers = torch.cat([numbers for numbers, _ in self.pending])
        pending = torch.cat([weights.T for _, weights in self.pending], 1)
        self.pending = []
        best, at = pending.topk(min(self.count, pending.shape[1]), dim=1, sorted=False)
        self.weights, self.rows = torch.cat([self.weights, best], 1), torch.cat([self.rows, numbers[at]], 1)
        if self.weights.shape[1] > self.count:
            self.weights, at = self.weights.topk(self.count, dim=1, sorted=False)
            self.rows = self.rows.gather(1, at)
