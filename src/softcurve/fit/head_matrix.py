"""The second derivative of a head's losses as a dense matrix, and its inverse within the same memory."""

from __future__ import annotations

import torch
from scipy.linalg import lapack
from torch import Tensor

from softcurve.array_types import Float64

STRIP = 256  # rows that are copied from one triangle to the other at a time


class SingularMatrix(ValueError):
    """A matrix is not positive definite after rounding; ``place`` is the first row that depends on those before it."""

    def __init__(self, place: int) -> None:
        super().__init__(f"row {place} depends on the rows before it")
        self.place = place


def add_rows(
    matrix: Float64[Tensor, "classes size classes size"], p: Float64[Tensor, "rows classes"],
    q: Float64[Tensor, "rows classes"], total: Float64[Tensor, "rows 1"], features: Float64[Tensor, "rows size"],
) -> None:  # fmt: skip
    """Add ``Σ_i B_i ⊗ x_i x_iᵀ`` with ``B = diag(q) − q pᵀ − p qᵀ + total p pᵀ`` to the lower triangle of the classes.

    ``total`` is ``Σ q`` over all classes, of which ``p`` and ``q`` may be some. With ``q = w p`` and ``total = w`` the
    matrix is the Hessian of the sum of ``w`` times the cross-entropy of each row.
    """
    classes, size, _, _ = matrix.shape
    for j in range(classes):
        to_j = slice(j + 1)
        mass = (total * p[:, j, None] - q[:, j, None]) * p[:, to_j] - p[:, j, None] * q[:, to_j]
        mass[:, j] += q[:, j]
        weighted = mass[:, :, None] * features[:, None]
        matrix[j, :, to_j] += (features.T @ weighted.flatten(1)).view(size, -1, size)


def factorise(matrix: Float64[Tensor, "n n"]) -> Float64[Tensor, " n"]:
    """Replace the lower triangle of ``A`` by the Cholesky factor of ``D A D`` with a diagonal of one, and return ``D``.

    The scaled factor does not depend on the units of the features, and its pivots tell how nearly singular ``A`` is.
    Raises :class:`SingularMatrix` if a pivot is zero after rounding.
    """
    diagonal = matrix.diagonal()
    if not (diagonal > 0).all():
        raise SingularMatrix(int((diagonal > 0).int().argmin()))
    scale = diagonal.rsqrt()
    matrix.mul_(scale).mul_(scale[:, None])
    # The lower triangle of rows is the upper one of LAPACK's columns.
    _, failed = lapack.dpotrf(matrix.numpy().T, lower=0, overwrite_a=1, clean=0)
    if failed:
        raise SingularMatrix(failed - 1)
    pivots = matrix.diagonal().square()
    if float(pivots.min()) <= 16 * len(matrix) * torch.finfo(matrix.dtype).eps:
        raise SingularMatrix(int(pivots.argmin()))
    return scale


def invert(matrix: Float64[Tensor, "n n"]) -> None:
    """Replace a symmetric matrix, of which the lower triangle is read, by its inverse.

    Raises :class:`SingularMatrix`.
    """
    scale = factorise(matrix)
    lapack.dpotri(matrix.numpy().T, lower=0, overwrite_c=1)
    for start in range(0, len(matrix), STRIP):
        here, below = slice(start, start + STRIP), slice(start + STRIP, None)
        block = matrix[here, here]
        block.copy_(block.tril() + block.tril(-1).T)
        matrix[here, below] = matrix[below, here].T
    matrix.mul_(scale).mul_(scale[:, None])
