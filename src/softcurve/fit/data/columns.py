"""What rows are made of: columns that are read from one row to another, from memory or from a file."""

from __future__ import annotations

import hashlib
import mmap
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

__all__ = ["ArrayColumn", "Column", "Fill", "MappedColumn", "Part", "SparseColumn", "array_digest", "places"]

# Fills all of an array with the rows from a given one on, in the array's dtype.
Fill = Callable[[int, NDArray[Any]], None]

PIECE = 2**20  # bytes that are hashed at a time


@runtime_checkable
class Column(Protocol):
    """An array of rows, ``(n,)`` or ``(n, …)``, of which only some are in memory at a time."""

    @property
    def name(self) -> str:
        """What an error calls it."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Rows first."""

    @property
    def dtype(self) -> np.dtype[Any]:
        """A dtype of numpy's that holds every entry."""

    def opened(self) -> AbstractContextManager[Fill]:
        """A way to read rows, in their order and from any one on. Raises DataError that names what is damaged."""

    def labels(self, start: int, stop: int) -> Iterator[NDArray[Any]]:
        """The entries from one row to another of a column ``(n,)``, in pieces, with no change of dtype."""

    def digest(self, most: int) -> bytes:
        """What changes when the entries do.

        It is of all that is stored, or where that is more than ``most`` bytes, of as many in pieces spread over it.
        """


@dataclass(frozen=True, eq=False)
class Part:
    """Rows that stand together, in a file or in memory. A target is one column, or a teacher's lists are two.

    ``first`` is the number of the first row here in a target that is one for many parts.
    """

    features: Column
    target: Column | None = None
    lists: tuple[Column, Column] | None = None  # indices, log_probs
    absent: str = "none is given"  # why there is no target
    first: int | None = None

    @property
    def rows(self) -> int:
        """How many."""
        return self.features.shape[0]


@dataclass(frozen=True, eq=False)
class ArrayColumn:
    """A numpy array."""

    array: NDArray[Any]
    name: str

    @property
    def shape(self) -> tuple[int, ...]:
        """The array's."""
        return self.array.shape

    @property
    def dtype(self) -> np.dtype[Any]:
        """The array's."""
        return self.array.dtype

    def opened(self) -> AbstractContextManager[Fill]:
        """Rows by copying them."""
        return nullcontext(self._fill)

    def view(self, dtype: np.dtype[Any]) -> NDArray[Any] | None:
        """The array itself, where a tensor can share its memory and have this dtype."""
        flags = self.array.flags
        return self.array if self.array.dtype == dtype and flags.c_contiguous and flags.writeable else None

    def labels(self, start: int, stop: int) -> Iterator[NDArray[Any]]:
        """Of the array, in one piece."""
        yield self.array[start:stop]

    def digest(self, most: int) -> bytes:
        """Of the array."""
        return array_digest(self.array, most)

    def _fill(self, start: int, out: NDArray[Any]) -> None:
        out[...] = self.array[start : start + len(out)]


@dataclass(frozen=True, eq=False)
class MappedColumn(ArrayColumn):
    """An array in a file that is mapped to memory, of which no page stays resident once it is read.

    Pages of a shared map count among the resident set of the process until they are dropped; the kernel's cache
    still has them.
    """

    pages: mmap.mmap

    def view(self, dtype: np.dtype[Any]) -> None:
        """None: what is read through the map would stay."""
        return

    def _fill(self, start: int, out: NDArray[Any]) -> None:
        super()._fill(start, out)
        self._drop()

    def digest(self, most: int) -> bytes:
        """Of the array."""
        found = super().digest(most)
        self._drop()
        return found

    def _drop(self) -> None:
        if hasattr(mmap, "MADV_DONTNEED"):
            self.pages.madvise(mmap.MADV_DONTNEED)


@dataclass(frozen=True, eq=False)
class SparseColumn:
    """A sparse matrix of scipy's in CSR form, made dense row by row."""

    matrix: Any
    name: str

    @property
    def shape(self) -> tuple[int, ...]:
        """The matrix's."""
        return tuple(int(length) for length in self.matrix.shape)

    @property
    def dtype(self) -> np.dtype[Any]:
        """Of the entries."""
        dtype: np.dtype[Any] = self.matrix.dtype
        return dtype

    def opened(self) -> AbstractContextManager[Fill]:
        """Rows by filling in their zeros."""
        return nullcontext(self._fill)

    def labels(self, start: int, stop: int) -> Iterator[NDArray[Any]]:
        """Nothing: a matrix has no labels."""
        return iter(())

    def digest(self, most: int) -> bytes:
        """Of the entries and their places."""
        parts = (self.matrix.indptr, self.matrix.indices, self.matrix.data)
        return str(self.shape).encode() + b"".join(array_digest(part, most // len(parts)) for part in parts)

    def _fill(self, start: int, out: NDArray[Any]) -> None:
        rows = self.matrix[start : start + len(out)]
        if rows.dtype == out.dtype:
            rows.toarray(out=out)
        else:
            out[...] = rows.toarray()


def array_digest(array: NDArray[Any], most: int) -> bytes:
    """Of shape, dtype and entries: of all rows, or where they take more than ``most`` bytes, of some of them."""
    state = hashlib.sha256(f"{array.shape} {array.dtype.str}".encode())
    if array.dtype.hasobject:  # whose bytes are addresses
        return state.digest()
    of_row = max(array.nbytes // max(len(array), 1), 1)
    for start, count in places(len(array), max(most // of_row, 1), max(PIECE // of_row, 1)):
        state.update(np.ascontiguousarray(array[start : start + count]).tobytes())
    return state.digest()


def places(length: int, most: int, piece: int) -> Iterator[tuple[int, int]]:
    """``(start, count)`` of pieces that are all of a length, or ``most`` of it, with the first and the last."""
    if length <= most:
        for start in range(0, length, piece):
            yield start, min(piece, length - start)
        return
    piece = max(min(piece, most // 2), 1)
    pieces = max(most // piece, 2)
    for number in range(pieces):
        yield (length - piece) * number // (pieces - 1), piece
