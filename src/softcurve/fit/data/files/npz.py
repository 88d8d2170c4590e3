"""The arrays of an .npz archive: held in memory, or each for as long as it is read."""

from __future__ import annotations

import hashlib
import math
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from softcurve.fit import DataError
from softcurve.fit.data.columns import ArrayColumn, Column, Fill, Part
from softcurve.fit.data.files.decoding import check_file, decoding
from softcurve.fit.data.files.naming import named_part
from softcurve.fit.data.files.npy import read_header
from softcurve.fit.data.files.stamp import Stamp

__all__ = ["npz_part"]

KIND = "an .npz archive (numpy.savez)"


def npz_part(path: Path, with_target: bool, *, held: bool) -> Part:
    """The rows of an archive; ``held`` keeps the arrays, else they are read anew in every walk."""
    check_file(path, "data")
    with decoding(path, "data", KIND), path.open("rb") as file:
        archive = np.load(file, allow_pickle=False)
        if not isinstance(archive, np.lib.npyio.NpzFile):
            raise DataError(f"data: {path} is a single array, not an archive; rename it to .npy")
        stamp, members = Stamp.of(path), archive.zip
        assert members is not None

        def column(name: str) -> Column:
            named = f"array {name!r} of {path}"
            shape, dtype, checksum = _member_header(members, name)
            if held:
                return ArrayColumn(archive[name], named)
            return NpzColumn(named, stamp, name, shape, dtype, checksum)

        return named_part(path, "array", archive.files, column, with_target)


def _member_header(members: zipfile.ZipFile, name: str) -> tuple[tuple[int, ...], np.dtype[Any], int]:
    """Shape, dtype and checksum of an array. Raises ValueError for a member that is no array, or is of another size.

    The size is compared before memory is taken for the array: a header may claim any.
    """
    member = name if name in members.namelist() else f"{name}.npy"
    info = members.getinfo(member)
    with members.open(info) as entry:
        try:
            shape, _, dtype = read_header(entry)  # type: ignore[arg-type]
        except ValueError as error:
            raise ValueError(f"its member {member!r} is no array ({error})") from error
        nbytes, left = math.prod(shape) * dtype.itemsize, info.file_size - entry.tell()
    if nbytes != left:
        raise ValueError(f"its member {member!r} says {shape} of {dtype}, which are {nbytes} bytes, and has {left}")
    return shape, dtype, info.CRC


@dataclass(frozen=True, eq=False)
class NpzColumn:
    """One array of an archive, which may be compressed: whole in memory while it is open."""

    name: str
    stamp: Stamp
    member: str
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    checksum: int

    @contextmanager
    def opened(self) -> Iterator[Fill]:
        """Rows of the array."""
        array = self._array()

        def fill(start: int, out: NDArray[Any]) -> None:
            out[...] = array[start : start + len(out)]

        yield fill

    def labels(self, start: int, stop: int) -> Iterator[NDArray[Any]]:
        """Of the array, in one piece."""
        yield self._array()[start:stop]

    def digest(self, most: int) -> bytes:
        """Of shape, dtype, and the checksum that the archive has of all bytes."""
        return hashlib.sha256(f"{self.shape} {self.dtype.str} {self.checksum}".encode()).digest()

    def _array(self) -> NDArray[Any]:
        path = self.stamp.path
        with self.stamp.opened() as file, decoding(path, "data", KIND):
            with np.load(file, allow_pickle=False) as archive:
                array: NDArray[Any] = archive[self.member]
            if array.shape != self.shape:
                raise zipfile.BadZipFile(f"array {self.member!r} has shape {array.shape}, by its header {self.shape}")
            return array
