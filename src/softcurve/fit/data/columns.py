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

__all__ = ["ArrayColumn", "Column", "Fill", "MappedColumn", "Part", "SparseColumn", "sampled_digest"]

# Fills all of an array with the rows from a given one on, in the array's dtype.
Fill = Callable[[int, NDArray[Any]], None]

SAMPLES = 64


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

    def digest(self) -> bytes:
        """What changes when the entries do; cheap."""


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

    def digest(self) -> bytes:
        """Of some rows."""
        return sampled_digest(self.array)

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

    def digest(self) -> bytes:
        """Of some entries and their places."""
        parts = (self.matrix.indptr, self.matrix.indices, self.matrix.data)
        return b"".join(sampled_digest(part) for part in parts)

    def _fill(self, start: int, out: NDArray[Any]) -> None:
        rows = self.matrix[start : start + len(out)]
        if rows.dtype == out.dtype:
            rows.toarray(out=out)
        else:
            out[...] = rows.toarray()


def sampled_digest(array: NDArray[Any]) -> bytes:
    """Of shape, dtype, and rows that are spread over all."""
    rows = np.unique(np.linspace(0, max(len(array) - 1, 0), min(SAMPLES, len(array)), dtype=np.int64))
    state = hashlib.sha256(f"{array.shape} {array.dtype.str}".encode())
    state.update(np.ascontiguousarray(array[rows]).tobytes())
    return state.digest()
