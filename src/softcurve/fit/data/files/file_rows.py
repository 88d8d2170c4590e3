"""Arrays in files, which must not change while their rows are in use."""

from __future__ import annotations

import hashlib
import math
import mmap
import stat
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from softcurve.fit import DataError
from softcurve.fit.data.rows import PIECE, digest_rows
from softcurve.fit.system_errors import out_of_memory, unusable


@dataclass(frozen=True)
class FileState:
    """A file of a format (``kind``), its size in bytes and its modification time; errors call it ``argument``."""

    path: Path
    kind: str
    argument: str
    size: int
    modified: int

    @classmethod
    def of(cls, path: Path, kind: str, argument: str = "data") -> FileState:
        """Return the present state. Raises DataError unless there is a file at ``path`` with something in it."""
        try:
            status = path.stat()
        except (FileNotFoundError, NotADirectoryError) as error:
            raise DataError(f"{argument}: there is no file {path}; check the path") from error
        except OSError as error:
            raise unusable(argument, path, "read", error) from error
        if not stat.S_ISREG(status.st_mode):
            raise DataError(f"{argument}: {path} is not a file; give the path of a file")
        if status.st_size == 0:
            raise DataError(f"{argument}: {path} is empty (0 bytes); write it again")
        return cls(path, kind, argument, status.st_size, status.st_mtime_ns)

    def check(self) -> None:
        """Raise DataError if the file is no longer in this state."""
        now = FileState.of(self.path, self.kind, self.argument)
        if now != self:
            size = f"{now.size} bytes, {self.size} before" if now.size != self.size else f"still {now.size} bytes"
            what = f"{self.argument}: {self.path} has changed since it was opened"
            raise DataError(f"{what} ({size}); leave it as it is and start again")

    def digest(self, most: int) -> bytes:
        """Hash the bytes of the file, whatever array they belong to."""
        ranges = partial(read_map, lambda: np.memmap(self.path, np.uint8, "r"))
        return digest_rows(FileRows(str(self.path), self, (self.size,), np.dtype(np.uint8), ranges), most)

    @contextmanager
    def decoding(self) -> Iterator[None]:
        """Turn errors of the block into a DataError, which says that the file cannot be read as its kind, and why."""
        try:
            yield
        except (DataError, ImportError):
            raise
        except Exception as error:  # the decoders raise what they like on a damaged file
            if isinstance(error, OSError) and error.errno:
                raise unusable(self.argument, self.path, "read", error) from error
            if (missing := out_of_memory(error)) is not None:
                reason = f"{missing}; store it as .npy, .safetensors or .parquet, which are read block by block"
            elif any(word in str(error) for word in ("allow_pickle", "pickled", "Python objects")):
                reason = "it is none, or holds pickled objects, which are never loaded; save numbers or text"
            else:
                first = (str(error).strip() or type(error).__name__).splitlines()[0]
                reason = f"{first.rstrip('.')}; write it again"
            raise DataError(f"{self.argument}: {self.path} cannot be read as {self.kind}: {reason}") from error


@dataclass(eq=False)
class FileRows:
    """Rows that ``ranges`` reads from a file by the bounds that it is given."""

    name: str
    state: FileState
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    ranges: Callable[[Sequence[int]], Iterator[NDArray[Any]]]
    hash: Callable[[int], bytes] | None = None  # a digest that costs less than that of the entries

    def read(self, bounds: Sequence[int]) -> Iterator[NDArray[Any]]:
        """Yield rows. The file is checked before each read: one beyond the end of a mapped file ends the process."""
        if len(bounds) < 2:  # a share without rows
            return
        with self.state.decoding():
            self.state.check()
            for rows in self.ranges(bounds):
                yield rows
                self.state.check()

    def digest(self, most: int) -> bytes:
        """Hash the entries, or what stands for them."""
        if self.hash is None:
            return digest_rows(self, most)
        return hashlib.sha256(f"{self.shape} {self.dtype.str}".encode() + self.hash(most)).digest()


def two_buffers(shape: tuple[int, ...], dtype: np.dtype[Any], bounds: Sequence[int]) -> Iterator[NDArray[Any]]:
    """Yield an array for the rows between each two bounds, which is valid until the next but one is asked for.

    They are parts of two buffers in turn, because freed blocks would stay resident in the heap of the reading thread.
    """
    counts = [stop - start for start, stop in pairwise(bounds)]
    buffers = [np.empty((max(counts[turn::2], default=0), *shape[1:]), dtype) for turn in range(2)]
    for number, count in enumerate(counts):
        yield buffers[number % 2][:count]


def read_map(open_map: Callable[[], NDArray[Any]], bounds: Sequence[int]) -> Iterator[NDArray[Any]]:
    """Yield copies of rows of a mapped array, of which about 1 MiB is resident at a time; see :func:`two_buffers`.

    Pages of a map count among the memory of the process until they are dropped; the cache of the system keeps them.
    In Fortran order the rows lie on pages of all columns, so that these are copied one by one.
    """
    mapped = open_map()
    pages: Any = mapped
    while isinstance(pages, np.ndarray):
        pages = pages.base
    by_column = mapped.ndim == 2 and abs(mapped.strides[0]) < abs(mapped.strides[1])
    step = 1 if by_column else max(1, PIECE // max(1, mapped.dtype.itemsize * math.prod(mapped.shape[1:])))
    for (start, stop), rows in zip(pairwise(bounds), two_buffers(mapped.shape, mapped.dtype, bounds), strict=True):
        part = mapped[start:stop]
        copy, part = (rows.T, part.T) if by_column else (rows, part)
        for first in range(0, len(copy), step):
            copy[first : first + step] = part[first : first + step]
            if hasattr(mmap, "MADV_DONTNEED"):
                pages.madvise(mmap.MADV_DONTNEED)
        yield rows


def memmap_rows(array: NDArray[Any], name: str) -> FileRows | None:
    """Return the rows of a ``numpy.memmap`` or of a view of one, or None for any other array."""
    holder: Any = array
    while isinstance(holder, np.ndarray) and not isinstance(holder.base, mmap.mmap):
        holder = holder.base
    # A private copy may differ from its file, and of a file without a name no change can be seen.
    if not isinstance(holder, np.memmap) or holder.mode == "c" or holder.filename is None:
        return None
    state = FileState.of(Path(holder.filename), "a memory map")
    return FileRows(name, state, array.shape, array.dtype, partial(read_map, lambda: array))
