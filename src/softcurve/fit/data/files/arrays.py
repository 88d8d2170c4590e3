"""Arrays in files, which must not change while their rows are in use: .npy, .npz and .safetensors."""

from __future__ import annotations

import hashlib
import math
import mmap
import zipfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.lib import format as npy_format
from numpy.typing import NDArray

from softcurve.files import DataError
from softcurve.files.tensors import FileState, opened_tensors
from softcurve.fit.data.dataset import PIECE, ArrayRows, Dataset, Keys, Rows, digest_rows, named_dataset, tensor_array
from softcurve.fit.data.files.sparse import archived_rows, is_sparse_archive

HEADERS = {(1, 0): npy_format.read_array_header_1_0, (2, 0): npy_format.read_array_header_2_0}


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


def file_digest(state: FileState, most: int) -> bytes:
    """Hash the bytes of a file, whatever array they belong to."""
    ranges = partial(read_map, lambda: np.memmap(state.path, np.uint8, "r"))
    return digest_rows(FileRows(str(state.path), state, (state.size,), np.dtype(np.uint8), ranges), most)


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


def npy_rows(path: Path, argument: str, name: str) -> FileRows:
    """Map an .npy file; errors call the array ``name``. Raises DataError for a file of another length than it says."""
    state = FileState.of(path, "an .npy array (numpy.save)", argument)
    with state.decoding():
        mapped = np.load(path, mmap_mode="r")
        if not isinstance(mapped, np.memmap):
            raise DataError(f"{argument}: {path} is an archive of several arrays; rename it to .npz")
        shape, dtype, needed, left = mapped.shape, mapped.dtype, mapped.nbytes, state.size - mapped.offset
        if needed != left:
            raise ValueError(f"its header says {shape} of {dtype}, which are {needed} bytes, and {left} bytes follow")
    # It is mapped anew for each walk: a map keeps its file open, and there may be more shards than a process may open.
    ranges = partial(read_map, lambda: np.load(path, mmap_mode="r"))
    return FileRows(name, state, shape, dtype, ranges, partial(file_digest, state))


def npz_dataset(path: Path, with_target: bool, keys: Keys, *, held: bool) -> Dataset:
    """Open an .npz archive; ``held`` keeps its arrays in memory, otherwise they are decompressed for each walk."""
    state = FileState.of(path, "an .npz archive (numpy.savez)")
    with state.decoding(), path.open("rb") as file:
        archive: Any = np.load(file, allow_pickle=False)
        if isinstance(archive, np.ndarray):
            raise DataError(f"data: {path} is a single array, not an archive; rename it to .npy")

        if is_sparse_archive(archive.files):
            keys.require_none(str(path))
            named = f"the sparse matrix of {path}"
            for name in archive.files:
                _member(archive.zip, name)
            return Dataset(archived_rows(path, named), absent="it is one sparse matrix")

        def ranges(name: str, bounds: Sequence[int]) -> Iterator[NDArray[Any]]:
            with np.load(path, allow_pickle=False) as again:
                return ArrayRows(again[name], name).read(bounds)

        def rows(name: str) -> Rows:
            named, (shape, dtype, checksum) = f"array {name!r} of {path}", _member(archive.zip, name)
            if held:
                return ArrayRows(archive[name], named)
            return FileRows(named, state, shape, dtype, partial(ranges, name), lambda _: checksum)

        return named_dataset(path, "array", archive.files, rows, with_target, keys=keys)


def _member(archive: zipfile.ZipFile, name: str) -> tuple[tuple[int, ...], np.dtype[Any], bytes]:
    """Return shape, dtype and checksum of an array. Raises ValueError for a member that is no array.

    The sizes are compared before memory is taken for the array, since a header may claim any.
    """
    member = name if name in archive.namelist() else f"{name}.npy"
    info = archive.getinfo(member)
    with archive.open(info) as entry:
        try:
            shape, _, dtype = HEADERS[npy_format.read_magic(entry)](entry)
        except (KeyError, ValueError) as error:
            raise ValueError(f"its member {member!r} is no array ({error})") from error
        needed, left = math.prod(shape) * dtype.itemsize, info.file_size - entry.tell()
    if dtype.hasobject:
        raise ValueError(f"its member {member!r} holds pickled objects")
    if needed != left:
        raise ValueError(f"its member {member!r} says {shape} of {dtype}, which are {needed} bytes, and has {left}")
    return shape, dtype, info.CRC.to_bytes(4, "little")


def safetensors_dataset(path: Path, with_target: bool, keys: Keys) -> Dataset:
    """Open a .safetensors file, whose header the library compares with the size of the file."""
    state = FileState.of(path, "a .safetensors file")
    with state.decoding(), opened_tensors(path) as file:

        def rows(name: str) -> FileRows:
            tensor = file.get_tensor(name)  # a map, of which nothing is read
            shape, dtype = tuple(tensor.shape), tensor_array(tensor.flatten()[:0]).dtype
            ranges = partial(_slices, path, name, np.empty((0, *shape[1:]), dtype))
            return FileRows(f"tensor {name!r} of {path}", state, shape, dtype, ranges)

        return named_dataset(path, "tensor", list(file.keys()), rows, with_target, keys=keys)


def _slices(path: Path, name: str, like: NDArray[Any], bounds: Sequence[int]) -> Iterator[NDArray[Any]]:
    """Yield copies of rows. The file is opened for each: the pages of its map stay resident until it is closed."""
    for (start, stop), rows in zip(pairwise(bounds), two_buffers(like.shape, like.dtype, bounds), strict=True):
        with opened_tensors(path) as file:
            torch.from_numpy(rows).copy_(file.get_slice(name)[start:stop])
        yield rows
