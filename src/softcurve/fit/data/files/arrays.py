"""The arrays of .npy and .npz files, which numpy reads, and of .safetensors files, which are read in slices."""

from __future__ import annotations

import json
import math
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.lib import format as npy_format
from numpy.typing import NDArray
from torch import Tensor

from softcurve.fit import DataError
from softcurve.fit.data.dataset import Dataset, named_dataset
from softcurve.fit.data.files.file_rows import FileRows, FileState, read_map, two_buffers
from softcurve.fit.data.rows import ArrayRows, Rows, tensor_array
from softcurve.fit.system_errors import out_of_memory

LENGTH = 8  # bytes that hold the length of the header of a .safetensors file
HEADERS = {(1, 0): npy_format.read_array_header_1_0, (2, 0): npy_format.read_array_header_2_0}


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
    return FileRows(name, state, shape, dtype, ranges, state.digest)


def npz_dataset(path: Path, with_target: bool, *, held: bool) -> Dataset:
    """Open an .npz archive; ``held`` keeps its arrays in memory, otherwise they are decompressed for each walk."""
    state = FileState.of(path, "an .npz archive (numpy.savez)")
    with state.decoding(), path.open("rb") as file:
        archive: Any = np.load(file, allow_pickle=False)
        if isinstance(archive, np.ndarray):
            raise DataError(f"data: {path} is a single array, not an archive; rename it to .npy")

        def ranges(name: str, bounds: Sequence[int]) -> Iterator[NDArray[Any]]:
            with np.load(path, allow_pickle=False) as again:
                return ArrayRows(again[name], name).read(bounds)

        def rows(name: str) -> Rows:
            named, (shape, dtype, checksum) = f"array {name!r} of {path}", _member(archive.zip, name)
            if held:
                return ArrayRows(archive[name], named)
            return FileRows(named, state, shape, dtype, partial(ranges, name), lambda _: checksum)

        return named_dataset(path, "array", archive.files, rows, with_target)


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


def safetensors_dataset(path: Path, with_target: bool) -> Dataset:
    """Open a .safetensors file, whose header the library compares with the size of the file."""
    state = FileState.of(path, "a .safetensors file")
    with state.decoding(), opened_tensors(path) as file:

        def rows(name: str) -> FileRows:
            tensor = file.get_tensor(name)  # a map, of which nothing is read
            shape, dtype = tuple(tensor.shape), tensor_array(tensor.flatten()[:0]).dtype
            ranges = partial(_slices, path, name, np.empty((0, *shape[1:]), dtype))
            return FileRows(f"tensor {name!r} of {path}", state, shape, dtype, ranges)

        return named_dataset(path, "tensor", list(file.keys()), rows, with_target)


def _slices(path: Path, name: str, like: NDArray[Any], bounds: Sequence[int]) -> Iterator[NDArray[Any]]:
    """Yield copies of rows. The file is opened for each: the pages of its map stay resident until it is closed."""
    for (start, stop), rows in zip(pairwise(bounds), two_buffers(like.shape, like.dtype, bounds), strict=True):
        with opened_tensors(path) as file:
            torch.from_numpy(rows).copy_(file.get_slice(name)[start:stop])
        yield rows


@contextmanager
def opened_tensors(path: Path) -> Iterator[Any]:
    """Open a file by ``safetensors.safe_open``.

    That reports a file without permission as absent, and cannot open a name that is not UTF-8. Here the first raises
    PermissionError, and the second is opened by its file descriptor.
    """
    from safetensors import safe_open

    with path.open("rb") as file:
        try:
            name = str(path).encode().decode()
        except UnicodeEncodeError:
            name = f"/dev/fd/{file.fileno()}"
        with safe_open(name, framework="pt") as opened:
            yield opened


def encode_tensors(tensors: dict[str, Tensor], metadata: dict[str, str]) -> tuple[bytes, memoryview]:
    """Return the bytes of a .safetensors file in two pieces. Equal content makes equal bytes.

    The metadata, which safetensors orders at random, are sorted.
    """
    from safetensors.torch import save

    content = save({name: tensor.contiguous() for name, tensor in tensors.items()}, metadata=metadata)
    end = LENGTH + int.from_bytes(content[:LENGTH], "little")
    header = json.loads(content[LENGTH:end]) | {"__metadata__": dict(sorted(metadata.items()))}
    encoded = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    encoded += b" " * (-len(encoded) % LENGTH)
    return len(encoded).to_bytes(LENGTH, "little") + encoded, memoryview(content)[end:]


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return tensors and metadata. Raises OSError for a file that cannot be read, ValueError for a damaged one."""
    try:
        with opened_tensors(path) as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except Exception as error:  # safetensors raises its own type, OSError or ValueError, depending on the damage
        if out_of_memory(error) is not None or (isinstance(error, OSError) and error.errno):
            raise
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise ValueError(f"it is no safetensors file ({reason})") from error
