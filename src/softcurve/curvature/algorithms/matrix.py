"""The matrix that the algorithms take, random columns to multiply it with, and inner products in float64."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator
from typing import Literal, Protocol, runtime_checkable

import torch
from torch import Tensor

from softcurve import checks
from softcurve.array_types import Float, Float64

Distribution = Literal["rademacher", "normal"]
Map = Callable[[Tensor], Tensor]

ROWS_AT_ONCE = 1 << 16  # widened to float64 for an inner product


@runtime_checkable
class SymmetricMatrix(Protocol):
    """A symmetric ``n × n`` matrix that is known by its products; a square torch tensor is one."""

    @property
    @abstractmethod
    def shape(self) -> tuple[int, ...]:
        """The shape ``(n, n)``."""

    @property
    @abstractmethod
    def dtype(self) -> torch.dtype:
        """The floating-point dtype of the products."""

    @property
    @abstractmethod
    def device(self) -> torch.device:
        """The device of the vectors and of their products."""

    @abstractmethod
    def __matmul__(self, vectors: Tensor, /) -> Tensor:
        """Return ``A v`` for a vector ``(n,)`` or columns ``(n, k)`` of the matrix's dtype and device."""


def working_dtype(matrix: SymmetricMatrix) -> torch.dtype:
    """Return the dtype of columns between products: the matrix's, at least float32."""
    return checks.wide_dtype(matrix.dtype)


def product(
    matrix: SymmetricMatrix, vectors: Float[Tensor, "n k"], columns_at_once: int | None = None
) -> Float[Tensor, "n k"]:
    """Return ``A V`` in the working dtype, ``columns_at_once`` columns (``None``: all) at a time.

    Raises ``ValueError`` for products that are not finite, because results made from NaN could look valid.
    """
    images = torch.empty_like(vectors, dtype=working_dtype(matrix))
    if vectors.shape[1]:
        for into, chunk in zip(*(t.split(columns_at_once or t.shape[1], 1) for t in (images, vectors)), strict=True):
            into.copy_(matrix @ chunk.to(matrix.dtype))
    # Their sum is finite unless one of them is not or it overflows, and takes a fifth of the passes.
    if not images.sum().isfinite() and not images.isfinite().all():
        raise checks.InvalidEntriesError(
            "operator must give finite products, got NaN or infinity; look for them in its parameters and its data"
        )
    return images


def identity_chunks(matrix: SymmetricMatrix, columns_at_once: int) -> Iterator[tuple[slice, Float[Tensor, "n k"]]]:
    """Yield columns of the identity in the matrix's dtype and on its device, each time with their places."""
    checks.require_count("columns_at_once", columns_at_once, 1)
    n = matrix.shape[0]
    for start in range(0, n, columns_at_once):
        place = slice(start, min(start + columns_at_once, n))
        columns = torch.zeros(n, place.stop - start, dtype=matrix.dtype, device=matrix.device)
        columns[place].fill_diagonal_(1)
        yield place, columns


def random_chunks(
    matrix: SymmetricMatrix, count: int, columns_at_once: int, *, seed: int, distribution: Distribution = "normal"
) -> Iterator[Float[Tensor, "n k"]]:
    """Yield ``count`` columns of independent entries of mean 0 and variance 1, ``columns_at_once`` at a time.

    They are drawn one by one on the CPU, so that they depend neither on the device nor on ``columns_at_once``.
    """
    generator = torch.Generator().manual_seed(seed)
    column = torch.empty(matrix.shape[0], dtype=torch.float64)
    for start in range(0, count, columns_at_once):
        chunk = torch.empty(len(column), min(columns_at_once, count - start), dtype=working_dtype(matrix))
        for into in chunk.unbind(1):
            if distribution == "normal":
                into.copy_(column.normal_(generator=generator))
            else:
                into.copy_(column.bernoulli_(0.5, generator=generator).mul_(2).sub_(1))
        yield chunk.to(matrix.device)


def random_columns(
    matrix: SymmetricMatrix, count: int, *, seed: int, distribution: Distribution = "normal"
) -> Float[Tensor, "n {count}"]:
    """Return all columns of :func:`random_chunks` in one tensor."""
    return next(random_chunks(matrix, count, count, seed=seed, distribution=distribution))


def inner(a: Float[Tensor, "n k"], b: Float[Tensor, "n m"]) -> Float64[Tensor, "k m"]:
    """Return ``aᵀb`` in float64, by blocks of rows so that no wide copy of either factor is held."""
    total = torch.zeros(a.shape[1], b.shape[1], dtype=torch.float64, device=a.device)
    for rows_a, rows_b in zip(a.split(ROWS_AT_ONCE), b.split(ROWS_AT_ONCE), strict=True):
        total.addmm_(rows_a.double().mT, rows_b.double())
    return total


def dots(a: Float[Tensor, "n k"], b: Float[Tensor, "n k"]) -> Float64[Tensor, " k"]:
    """Return ``a_i·b_i`` of the columns in float64, by blocks of rows."""
    blocks = zip(a.split(ROWS_AT_ONCE), b.split(ROWS_AT_ONCE), strict=True)
    return torch.stack([torch.linalg.vecdot(x.double(), y.double(), dim=0) for x, y in blocks]).sum(0)
