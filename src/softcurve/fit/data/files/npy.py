"""An array in an .npy file, read where it stands."""

from __future__ import annotations

from io import BufferedIOBase
from pathlib import Path
from typing import Any

import numpy as np
from numpy.lib import format as npy_format

from softcurve.fit import DataError
from softcurve.fit.data.files.decoding import check_file, decoding
from softcurve.fit.data.files.raw import RawColumn
from softcurve.fit.data.files.stamp import Stamp

__all__ = ["npy_column", "read_header"]

KIND = "an .npy array (numpy.save)"
ZIP = b"PK\x03\x04"


def npy_column(path: Path, argument: str, name: str) -> RawColumn:
    """The array, which errors call ``name``. Raises DataError also where the file is shorter or longer than it says."""
    check_file(path, argument)
    with decoding(path, argument, KIND), path.open("rb") as file:
        if file.read(len(ZIP)) == ZIP:
            raise DataError(f"{argument}: {path} is an archive of several arrays; rename it to .npz")
        file.seek(0)
        shape, fortran, dtype = read_header(file)
        column = RawColumn(name, KIND, Stamp.of(path, argument), file.tell(), shape, dtype, fortran=fortran)
        if column.stamp.size != column.offset + column.nbytes:
            raise ValueError(
                f"its header says {shape} of {dtype}, which are {column.nbytes} bytes, and "
                f"{column.stamp.size - column.offset} bytes follow"
            )
        return column


def read_header(file: BufferedIOBase) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    """Shape, whether in Fortran order, and dtype; the file then stands where the entries begin.

    Raises ValueError for what is no header, or for objects, which only a pickle can hold.
    """
    version = npy_format.read_magic(file)
    if version == (1, 0):
        shape, fortran, dtype = npy_format.read_array_header_1_0(file)
    elif version == (2, 0):
        shape, fortran, dtype = npy_format.read_array_header_2_0(file)
    else:  # 3.0 is for the names of fields in other scripts
        raise ValueError(f"its format is version {version[0]}.{version[1]}, which plain numbers never have")
    if dtype.hasobject:
        raise ValueError("it holds pickled objects")
    if any(length < 0 for length in shape):
        raise ValueError(f"its header says {shape}")
    return shape, fortran, dtype
