"""An array in a file, which must not change while its rows are in use."""

from __future__ import annotations

import hashlib
import math
import mmap
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from softcurve.fit import DataError
from softcurve.fit.data.files.decoding import decoding
from softcurve.fit.data.rows import PIECE, digest_rows
from softcurve.fit.system_errors import unusable

__all__ = ["FileRows", "FileState", "file_bytes", "memmap_rows", "read_map"]


@dataclass(frozen=True)
class FileState:
    """Path, size in bytes and modification time of a file; ``argument`` is what errors call it."""

    path: Path
    size: int
    modified: int
    argument: str = "data"

    @classmethod
    def of(cls, path: Path, argument: str = "data") -> FileState:
        """Return the present state. Raises DataError where there is no file."""
        try:
            status = path.stat()
        except OSError as error:
            raise unusable(argument, path, "opened", error) from error
        return cls(path, status.st_size, status.st_mtime_ns, argument)

    def check(self) -> None:
        """Raise DataError if the file is no longer in this state."""
        now = FileState.of(self.path, self.argument)
        if now != self:
            size = f"{now.size} bytes, {self.size} before" if now.size != self.size else f"still {now.size} bytes"
            raise DataError(
                f"{self.argument}: {self.path} has changed since it was opened ({size}); leave it as it is and "
                "start again"
            )


@dataclass(frozen=True, eq=False)
class FileRows:
    """Rows that ``ranges`` reads from a file of a format (``kind``), by the bounds that it is given."""

    name: str
    kind: str
    state: FileState
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    ranges: Callable[[Sequence[int]], Iterator[NDArray[Any]]]
    hash: Callable[[int], bytes] | None = None  # the digest, where there is a cheaper one than of the entries

    def read(self, bounds: Sequence[int]) -> Iterator[NDArray[Any]]:
        """Yield rows. The file is checked before each read: one beyond the end of a mapped file ends the process."""
        with decoding(self.state.path, self.state.argument, self.kind):
            self.state.check()
            for rows in self.ranges(bounds):
                yield rows
                self.state.check()

    def digest(self, most: int) -> bytes:
        """Hash the entries, or what stands for them."""
        if self.hash is None:
            return digest_rows(self, most)
        return hashlib.sha256(f"{self.shape} {self.dtype.str}".encode() + self.hash(most)).digest()


def read_map(open_map: Callable[[], NDArray[Any]], bounds: Sequence[int]) -> Iterator[NDArray[Any]]:
    """Yield copies of rows of a mapped array, of which about 1 MiB is resident at a time.

    Pages of a map count among the memory of the process until they are dropped; the cache of the system keeps them.
    In Fortran order the rows lie on pages of all columns, so that these are copied one by one.
    """
    mapped = open_map()
    pages: Any = mapped
    while isinstance(pages, np.ndarray):
        pages = pages.base
    by_column = mapped.ndim == 2 and abs(mapped.strides[0]) < abs(mapped.strides[1])
    step = 1 if by_column else max(1, PIECE // max(1, mapped.dtype.itemsize * math.prod(mapped.shape[1:])))
    for start, stop in pairwise(bounds):
        rows, part = np.empty((stop - start, *mapped.shape[1:]), mapped.dtype), mapped[start:stop]
        copy, part = (rows.T, part.T) if by_column else (rows, part)
        for first in range(0, len(copy), step):
            copy[first : first + step] = part[first : first + step]
            if hasattr(mmap, "MADV_DONTNEED"):
                pages.madvise(mmap.MADV_DONTNEED)
        yield rows


def file_bytes(state: FileState, kind: str) -> FileRows:
    """Return the bytes of a file, one a row."""
    ranges = partial(read_map, lambda: np.memmap(state.path, np.uint8, "r"))
    return FileRows(str(state.path), kind, state, (state.size,), np.dtype(np.uint8), ranges)


def memmap_rows(array: NDArray[Any], name: str) -> FileRows | None:
    """Return the rows of a ``numpy.memmap`` or of a view of one, or None for any other array."""
    holder: Any = array
    while isinstance(holder, np.ndarray) and not isinstance(holder.base, mmap.mmap):
        holder = holder.base
    # A private copy may differ from its file, and of a file without a name no change can be seen.
    if not isinstance(holder, np.memmap) or holder.mode == "c" or holder.filename is None:
        return None
    state = FileState.of(Path(holder.filename))
    return FileRows(name, "a memory map", state, array.shape, array.dtype, partial(read_map, lambda: array))
