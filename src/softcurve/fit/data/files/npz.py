"""The arrays of an .npz archive: held in memory, or each for as long as it is read."""

from __future__ import annotations

import math
import zipfile
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.lib import format as npy_format
from numpy.typing import NDArray

from softcurve.fit import DataError
from softcurve.fit.data.dataset import Dataset
from softcurve.fit.data.files.decoding import check_file, decoding
from softcurve.fit.data.files.file_rows import FileRows, FileState
from softcurve.fit.data.files.naming import named_dataset
from softcurve.fit.data.rows import ArrayRows, Rows

__all__ = ["npz_dataset"]

KIND = "an .npz archive (numpy.savez)"
HEADERS = {(1, 0): npy_format.read_array_header_1_0, (2, 0): npy_format.read_array_header_2_0}


def npz_dataset(path: Path, with_target: bool, *, held: bool) -> Dataset:
    """Open an archive; ``held`` keeps its arrays in memory, otherwise they are decompressed for each walk."""
    check_file(path, "data")
    with decoding(path, "data", KIND), path.open("rb") as file:
        archive = np.load(file, allow_pickle=False)
        if not isinstance(archive, np.lib.npyio.NpzFile):
            raise DataError(f"data: {path} is a single array, not an archive; rename it to .npy")
        state, members = FileState.of(path), archive.zip
        assert members is not None

        def rows(name: str) -> Rows:
            named, (shape, dtype, checksum) = f"array {name!r} of {path}", _member(members, name)
            if held:
                return ArrayRows(archive[name], named)

            def ranges(bounds: Sequence[int]) -> Iterator[NDArray[Any]]:
                with np.load(path, allow_pickle=False) as again:
                    array = again[name]
                return (array[start:stop] for start, stop in pairwise(bounds))

            return FileRows(named, KIND, state, shape, dtype, ranges, lambda _: checksum.to_bytes(4, "little"))

        return named_dataset(path, "array", archive.files, rows, with_target)


def _member(members: zipfile.ZipFile, name: str) -> tuple[tuple[int, ...], np.dtype[Any], int]:
    """Return shape, dtype and checksum of an array. Raises ValueError for a member that is no array.

    The sizes are compared before memory is taken for the array, since a header may claim any.
    """
    member = name if name in members.namelist() else f"{name}.npy"
    info = members.getinfo(member)
    with members.open(info) as entry:
        try:
            shape, _, dtype = HEADERS[npy_format.read_magic(entry)](entry)
        except (KeyError, ValueError) as error:
            raise ValueError(f"its member {member!r} is no array ({error})") from error
        needed, left = math.prod(shape) * dtype.itemsize, info.file_size - entry.tell()
    if dtype.hasobject:
        raise ValueError(f"its member {member!r} holds pickled objects")
    if needed != left:
        raise ValueError(f"its member {member!r} says {shape} of {dtype}, which are {needed} bytes, and has {left}")
    return shape, dtype, info.CRC
