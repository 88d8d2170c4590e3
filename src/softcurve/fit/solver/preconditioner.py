"""Two approximate inverses of the damped Gauss-Newton matrix, and the choice between them.

``Eigenbasis`` is the diagonal in a basis of the classes times the axes of the features (George et al., 2018). At the
start every row has the same probabilities, the matrix is a Kronecker product, and the inverse is exact. Later it still
represents how the curvature of each class varies over the axes of the features, by many orders of magnitude.

``ClassBlocks`` is the block of each class, assembled from the rows where its curvature is largest, and the diagonal of
all rows. Once most rows are predicted with certainty, few rows carry the curvature of a class, and no Kronecker product
is near it. The blocks take 2 to 15 times fewer products, and cost as much as some of them.
"""

from __future__ import annotations

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
FEWEST_ROWS, ROWS_PER_FEATURE = 256, 2  # of the block of a class
# Bytes of features or weights of rows that are gathered at a time, at most this share of the memory for the blocks.
GATHERED, SHARE_GATHERED = 2**25, 0.125
# The time of a multiply-add of small batched matrices and of eigenvectors, relative to one of a product in float32.
SLOWER, EIGENVECTORS = 3.0, 30.0
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
    """The inverses of the blocks of the classes, whose diagonals are scaled to one before they are factorised.

    ``memory`` is the number of bytes for the inverses, by which what is gathered to compute them is limited too.
    """

    def __init__(self, curvature: Curvature, memory: int) -> None:
        assert curvature.features is not None
        count, at_once = _block_rows(curvature), min(GATHERED, int(SHARE_GATHERED * memory))
        largest = _LargestWeights(min(count, curvature.source.rows), curvature, at_once)
        diagonal = curvature.diagonal(None, largest.add)
        weights, rows = largest.found()
        if curvature.group.size > 1:
            weights, rows = _among_all(weights, rows, count, curvature.group)
        self.scale = _reciprocal(diagonal, curvature).sqrt_()
        classes, size = self.scale.shape
        self.inverses = torch.empty(classes, size, size, dtype=curvature.dtype)
        step = max(1, at_once // (count * size * curvature.dtype.itemsize))
        scale = self.scale.to(curvature.dtype)
        roots = (weights * curvature.mean_weight).sqrt_()
        for start in range(0, classes, step):
            these = slice(start, start + step)
            features = curvature.features[rows[these]].mul_(roots[these, :, None]).mul_(scale[these, None, :])
            blocks = torch.empty(features.shape[0], size, size, dtype=curvature.dtype)
            with curvature.group.summed(blocks):
                torch.bmm(features.mT, features, out=blocks)
            blocks.diagonal(dim1=1, dim2=2).fill_(1.0)
            self.inverses[these] = _inverses(blocks)

    def __call__(self, gradient: Float64[Tensor, "classes size"]) -> Float64[Tensor, "classes size"]:
        """Apply the inverse."""
        scaled = (gradient * self.scale).to(self.inverses.dtype)
        return torch.bmm(self.inverses, scaled[:, :, None])[:, :, 0].double().mul_(self.scale)


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


def blocks_pay(curvature: Curvature, products: int, memory: int, *, rounded: bool) -> bool:
    """Return whether ``ClassBlocks`` cost less than the eigenbasis and the ``products`` that the last step took.

    ``rounded`` is whether these were in bfloat16.
    """
    rows, size, classes = curvature.all_rows, curvature.coordinates.size, curvature.classes
    if curvature.features is None or memory_of_blocks(classes, size, curvature.dtype) > memory:
        return False
    cost = (2 * _block_rows(curvature) * size + size**2) / (4 * rows)  # in products in float32
    replaced = 0.5  # those of the eigenbasis
    if classes <= MOST_CLASSES:
        replaced += (6 * classes + EIGENVECTORS * classes**2 / rows) / (4 * size)
    saved = products * ((0.5 * size + LOGIT) / (size + LOGIT) if rounded else 1.0)
    return saved + replaced > 2 * SLOWER * cost


def memory_of_blocks(classes: int, size: int, dtype: torch.dtype) -> int:
    """Return the bytes of ``ClassBlocks``."""
    return classes * size**2 * dtype.itemsize


def _block_rows(curvature: Curvature) -> int:
    return min(curvature.all_rows, max(FEWEST_ROWS, ROWS_PER_FEATURE * curvature.coordinates.size))


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


def _among_all(weights: Tensor, rows: Tensor, count: int, group: Group) -> tuple[Tensor, Tensor]:
    """Keep those of the largest weights of this process that are among the ``count`` largest of all processes.

    Where one class keeps fewer rows than another, rows of weight zero fill the places.
    """
    by_rank = [each.T for each in group.gathered(weights.T.contiguous())]
    before = sum(each.shape[1] for each in by_rank[: group.rank])
    every = torch.cat(by_rank, 1)
    chosen = torch.zeros_like(every, dtype=torch.bool)
    chosen.scatter_(1, every.topk(min(count, every.shape[1]), dim=1, sorted=False).indices, True)
    chosen = chosen[:, before : before + weights.shape[1]]
    kept, at = (weights * chosen).topk(int(chosen.sum(1).amax()) if chosen.numel() else 0, dim=1, sorted=False)
    return kept, rows.gather(1, at)


def _inverses(blocks: Tensor) -> Tensor:
    """Invert positive matrices with a diagonal of one, which is raised until they are positive after rounding."""
    jitter = 16 * torch.finfo(blocks.dtype).eps
    while True:
        blocks.diagonal(dim1=1, dim2=2).add_(jitter)
        factors, failed = torch.linalg.cholesky_ex(blocks)
        if not failed.any():
            return torch.cholesky_inverse(factors)
        jitter *= 10


class _LargestWeights:
    """The rows with the largest weights of each class, collected tile by tile."""

    def __init__(self, count: int, curvature: Curvature, at_once: int) -> None:
        self.count = count
        self.weights = torch.empty(curvature.classes, 0, dtype=curvature.dtype)
        self.rows = torch.empty(curvature.classes, 0, dtype=torch.int64)
        self.pending: list[tuple[Tensor, Tensor]] = []
        self.most_pending = max(count, at_once // (curvature.classes * curvature.dtype.itemsize))

    def add(self, numbers: Tensor, weights: Tensor) -> None:
        self.pending.append((numbers, weights))
        if sum(len(numbers) for numbers, _ in self.pending) >= self.most_pending:
            self._merge()

    def found(self) -> tuple[Tensor, Tensor]:
        """Return weights and numbers of the rows, ``(C, count)`` each."""
        self._merge()
        return self.weights, self.rows

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
