"""Two approximate inverses of the damped Gauss-Newton matrix, and which of them a step should use.

``Eigenbasis``: the diagonal in a basis of the classes times the axes of the features (George et al., 2018). At the
start every row has the same probabilities, the matrix is a Kronecker product, and this is all of it. Later it still has
the spread of each class's curvature over the axes of the features, by many orders of magnitude.

``ClassBlocks``: each class's own block of the matrix, from the rows where its curvature is largest; of all other rows
the diagonal. Where rows are mostly settled, few rows carry a class's curvature, and no product of two factors is near
it. It takes 2 to 15 times fewer products, and costs as much as some of them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from softcurve.array_types import Float64
from softcurve.fit.group import Group
from softcurve.fit.solver.curvature import Curvature

__all__ = ["ClassBlocks", "Eigenbasis", "blocks_pay"]

# Above it, eigenvectors over the classes take longer than the products that they save.
MOST_CLASSES = 512
# Of an axis's largest curvature: a direction without any, such as the same change in all classes, is left to the
# gradient, which is zero there.
FLOOR = 1e-10
# Of the curvature that its features would have if they varied, what a redundant axis may have of the penalty.
UNSEEN = 1e-14
# Rows of a class's block: for narrow features, and for each of many.
FEWEST_ROWS = 256
ROWS_A_FEATURE = 2
# Bytes of what is gathered at a time.
GATHERED = 2**25
# A multiply-add of small batched matrices beside one of a product's.
SLOWER = 3.0


class Eigenbasis:
    """``V ⊗ I`` times the diagonal, ``V`` the eigenvectors of the matrix summed over the features' axes."""

    def __init__(self, curvature: Curvature) -> None:
        self.basis: Tensor | None = None
        if curvature.classes <= MOST_CLASSES:
            basis = torch.linalg.eigh(curvature.class_factor()).eigenvectors
            self.basis = curvature.together.from_first(basis)  # another machine's may have other signs
        diagonal = curvature.diagonal(None if self.basis is None else self.basis.to(curvature.dtype))
        self.inverse = _reciprocal(diagonal, curvature)

    def __call__(self, gradient: Float64[Tensor, "classes size"]) -> Float64[Tensor, "classes size"]:
        """Apply the inverse."""
        if self.basis is None:
            return gradient * self.inverse
        return self.basis @ ((self.basis.T @ gradient) * self.inverse)


def _reciprocal(diagonal: Float64[Tensor, "classes size"], curvature: Curvature) -> Float64[Tensor, "classes size"]:
    """The diagonal's inverse, in its place; zero on redundant axes, as far as no penalty gives them a curvature.

    No axis is compared with another but for that, and then in units of its own features: by theirs, curvatures may
    differ as much as they like.
    """
    coordinates, largest = curvature.coordinates, diagonal.amax(0)
    inverse = diagonal.clamp_(min=FLOOR * largest).reciprocal_()
    if (redundant := coordinates.redundant) is not None and redundant.any():
        assert coordinates.moments is not None
        of_unit = ((largest - curvature.penalties) / coordinates.moments).nan_to_num_(nan=0.0, posinf=0.0).max()
        inverse[:, redundant & (largest <= UNSEEN * of_unit * coordinates.moments)] = 0.0
    return inverse.nan_to_num_(nan=0.0, posinf=0.0)


def blocks_pay(curvature: Curvature, products: int, memory: int) -> bool:
    """Whether ``ClassBlocks`` cost less than the ``products`` that the last step took with the eigenbasis."""
    rows, size = curvature.all_rows, curvature.coordinates.size
    if curvature.features is None or curvature.classes * size**2 * curvature.dtype.itemsize > memory:
        return False
    in_products = (2 * _rows_of_block(curvature) * size + size**2) / (4 * rows)
    return products > 2 * SLOWER * in_products


def _rows_of_block(curvature: Curvature) -> int:
    return min(curvature.all_rows, max(FEWEST_ROWS, ROWS_A_FEATURE * curvature.coordinates.size))


class ClassBlocks:
    """The inverses of the classes' blocks, with their diagonals scaled to one before they are factorised."""

    def __init__(self, curvature: Curvature) -> None:
        assert curvature.features is not None
        count = _rows_of_block(curvature)
        top = _Top(min(count, curvature.source.rows), curvature)
        diagonal = curvature.diagonal(None, top.see)
        weights, rows = _of_all(*top.found(), count, curvature.together)
        self.scale = _reciprocal(diagonal, curvature).sqrt_()
        classes, size = self.scale.shape
        self.inverses = torch.empty(classes, size, size, dtype=curvature.dtype)
        step = max(1, GATHERED // (count * size * curvature.dtype.itemsize))
        scale = self.scale.to(curvature.dtype)
        roots = (weights * curvature.mean_weight).sqrt_()
        for start in range(0, classes, step):
            these = slice(start, start + step)
            features = curvature.features[rows[these]].mul_(roots[these, :, None]).mul_(scale[these, None, :])
            blocks = torch.empty(features.shape[0], size, size, dtype=curvature.dtype)
            with curvature.together.summed(blocks):
                torch.bmm(features.mT, features, out=blocks)
            blocks.diagonal(dim1=1, dim2=2).fill_(1.0)
            self.inverses[these] = _inverses(blocks)

    def __call__(self, gradient: Float64[Tensor, "classes size"]) -> Float64[Tensor, "classes size"]:
        """Apply the inverse."""
        scaled = (gradient * self.scale).to(self.inverses.dtype)
        return torch.bmm(self.inverses, scaled[:, :, None])[:, :, 0].double().mul_(self.scale)


def _of_all(weights: Tensor, rows: Tensor, count: int, together: Group) -> tuple[Tensor, Tensor]:
    """Of the rows of this process with the largest weights of each class, those that are among ``count`` of all rows.

    Where they are fewer for one class than for another, rows without weight fill their places.
    """
    if together.size == 1:
        return weights, rows
    found = [each.T for each in together.gathered(weights.T.contiguous())]
    before = sum(each.shape[1] for each in found[: together.rank])
    every = torch.cat(found, 1)
    chosen = torch.zeros_like(every, dtype=torch.bool)
    chosen.scatter_(1, every.topk(min(count, every.shape[1]), dim=1, sorted=False).indices, True)
    own = chosen[:, before : before + weights.shape[1]]
    kept, at = (weights * own).topk(int(own.sum(1).amax()) if own.numel() else 0, dim=1, sorted=False)
    return kept, rows.gather(1, at)


def _inverses(blocks: Tensor) -> Tensor:
    """Of positive matrices with a diagonal of one; what is not positive by rounding is made so."""
    jitter = 16 * torch.finfo(blocks.dtype).eps
    while True:
        blocks.diagonal(dim1=1, dim2=2).add_(jitter)
        factors, failed = torch.linalg.cholesky_ex(blocks)
        if not failed.any():
            return torch.cholesky_inverse(factors)
        jitter *= 10


class _Top:
    """The rows with the largest weights of each class, found tile by tile."""

    def __init__(self, count: int, curvature: Curvature) -> None:
        self.count = count
        self.weights = torch.empty(curvature.classes, 0, dtype=curvature.dtype)
        self.rows = torch.empty(curvature.classes, 0, dtype=torch.int64)
        self.tiles: list[tuple[Tensor, Tensor]] = []
        self.waiting = 0
        self.patience = max(count, GATHERED // (curvature.classes * curvature.dtype.itemsize))

    def see(self, numbers: Tensor, weights: Tensor) -> None:
        """Look at the rows with these numbers."""
        self.tiles.append((numbers, weights))
        self.waiting += len(weights)
        if self.waiting >= self.patience:
            self._merge()

    def found(self) -> tuple[Tensor, Tensor]:
        """Weights and numbers of the rows, ``(C, count)`` each."""
        self._merge()
        return self.weights, self.rows

    def _merge(self) -> None:
        if not self.tiles:
            return
        numbers = torch.cat([numbers for numbers, _ in self.tiles])
        seen = torch.cat([weights.T for _, weights in self.tiles], 1)
        self.tiles, self.waiting = [], 0
        best, at = seen.topk(min(self.count, seen.shape[1]), dim=1, sorted=False)
        weights, rows = torch.cat([self.weights, best], 1), torch.cat([self.rows, numbers[at]], 1)
        if weights.shape[1] > self.count:
            weights, at = weights.topk(self.count, dim=1, sorted=False)
            rows = rows.gather(1, at)
        self.weights, self.rows = weights, rows
