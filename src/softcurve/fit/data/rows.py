"""Arrays in memory, in files and in directories of shards, which are read by ranges of rows."""

from __future__ import annotations

import hashlib
import math
from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from itertools import accumulate, pairwise
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

PIECE, LEAST = 2**20, 2**12  # bytes that are hashed at a time, and of each shard


@runtime_checkable
class Rows(Protocol):
    """An array of shape ``(n,)`` or ``(n, …)``, of which only some rows are in memory at a time."""

    name: str  # in errors
    shape: tuple[int, ...]
    dtype: np.dtype[Any]  # holds every entry

    def read(self, bounds: Sequence[int]) -> Iterator[NDArray[Any]]:
        """Yield the rows from each bound to the next. Raises DataError that names what is damaged or has changed."""

    def digest(self, most: int) -> bytes:
        """Hash all entries or, where they take more than ``most`` bytes, pieces of them that are spread over all."""


class ArrayRows:
    """The rows of a numpy array; what is read shares its memory."""

    def __init__(self, array: NDArray[Any], name: str) -> None:
        self.array, self.name, self.shape, self.dtype = array, name, array.shape, array.dtype

    def read(self, bounds: Sequence[int]) -> Iterator[NDArray[Any]]:
        """Yield views of the array."""
        return (self.array[start:stop] for start, stop in pairwise(bounds))

    def digest(self, most: int) -> bytes:
        """Hash the array."""
        return digest_rows(self, most)


class SparseRows:
    """The rows of a scipy matrix in CSR form; what is read is dense."""

    def __init__(self, matrix: Any, name: str) -> None:
        self.matrix, self.name, self.dtype = matrix, name, np.dtype(matrix.dtype)
        self.shape = tuple(int(length) for length in matrix.shape)

    def read(self, bounds: Sequence[int]) -> Iterator[NDArray[Any]]:
        """Yield dense copies of the rows."""
        return (self.matrix[start:stop].toarray() for start, stop in pairwise(bounds))

    def digest(self, most: int) -> bytes:
        """Hash the stored entries and their places."""
        arrays = (self.matrix.indptr, self.matrix.indices, self.matrix.data)
        return str(self.shape).encode() + b"".join(digest_rows(ArrayRows(each, ""), most // 3) for each in arrays)


class Shards:
    """The rows of several arrays, one after the other; the bounds of what is read must include the ends of shards."""

    def __init__(self, shards: Sequence[Rows], name: str) -> None:
        self.shards, self.name = tuple(shards), name
        self.edges = list(accumulate((shard.shape[0] for shard in shards), initial=0))
        self.shape, self.dtype = (self.edges[-1], *shards[0].shape[1:]), shards[0].dtype

    def read(self, bounds: Sequence[int]) -> Iterator[NDArray[Any]]:
        """Yield the rows; only one shard is open at a time."""
        for shard, (first, end) in zip(self.shards, pairwise(self.edges), strict=True):
            inside = bounds[bisect_left(bounds, first) : bisect_right(bounds, end)]
            if len(inside) > 1:
                yield from shard.read([bound - first for bound in inside])

    def digest(self, most: int) -> bytes:
        """Hash the shards."""
        return b"".join(digest for _, digest in digests(self, most))


def shards_of(rows: Rows) -> tuple[Rows, ...]:
    """Return the shards, or the rows themselves where they are one array."""
    return rows.shards if isinstance(rows, Shards) else (rows,)


def locate(rows: Rows, row: int) -> tuple[str, int]:
    """Return the name of the array that has a row, and the number of the row in it."""
    edges = rows.edges if isinstance(rows, Shards) else [0]
    number = bisect_right(edges, row) - 1
    return shards_of(rows)[number].name, row - edges[number]


def float_dtype(rows: Rows) -> np.dtype[Any]:
    """Return float32 where it holds every number of the rows' dtypes, otherwise float64."""
    return np.dtype(np.float32 if all(np.can_cast(each.dtype, np.float32) for each in shards_of(rows)) else np.float64)


def tensor_array(tensor: Tensor) -> NDArray[Any]:
    """Return a CPU tensor as an array, in float32 where numpy lacks its dtype."""
    lacking = tensor.dtype == torch.bfloat16 or (tensor.is_floating_point() and tensor.dtype.itemsize == 1)
    return np.asarray(tensor.float() if lacking else tensor)


def digests(rows: Rows, most: int) -> list[tuple[str, bytes]]:
    """Return the name and the digest of each shard, of which so large a part of ``most`` bytes is hashed as it has."""
    of_row = most / max(rows.shape[0], 1)
    return [(shard.name, shard.digest(max(int(of_row * shard.shape[0]), LEAST))) for shard in shards_of(rows)]


def digest_rows(rows: Rows, most: int) -> bytes:
    """Hash shape, dtype and entries: all rows or, where they take more than ``most`` bytes, some of them."""
    state = hashlib.sha256(f"{rows.shape} {rows.dtype.str}".encode())
    if not rows.dtype.hasobject:  # the bytes of objects are addresses
        of_row = max(rows.dtype.itemsize * math.prod(rows.shape[1:]), 1)
        for start, count in places(rows.shape[0], max(most // of_row, 1), max(PIECE // of_row, 1)):
            for piece in rows.read([start, start + count]):
                state.update(piece.tobytes())
    return state.digest()


def places(length: int, most: int, piece: int) -> Iterator[tuple[int, int]]:
    """Yield ``(start, count)`` of pieces that cover a length, or about ``most`` of it with the first and the last."""
    if length <= most:
        yield from ((start, min(piece, length - start)) for start in range(0, length, piece))
    else:
        piece = max(min(piece, most // 2), 1)
        pieces = max(most // piece, 2)
        yield from (((length - piece) * number // (pieces - 1), piece) for number in range(pieces))
