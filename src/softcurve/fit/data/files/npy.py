"""An array in an .npy file, read through a memory map."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np

from softcurve.fit import DataError
from softcurve.fit.data.files.decoding import check_file, decoding
from softcurve.fit.data.files.file_rows import FileRows, FileState, file_bytes, read_map

__all__ = ["npy_rows"]

KIND = "an .npy array (numpy.save)"


def npy_rows(path: Path, argument: str, name: str) -> FileRows:
    """Return the rows, which errors call ``name``. Raises DataError for a file of another length than it says."""
    check_file(path, argument)
    with decoding(path, argument, KIND):
        mapped = np.load(path, mmap_mode="r")
        if not isinstance(mapped, np.memmap):
            raise DataError(f"{argument}: {path} is an archive of several arrays; rename it to .npz")
        state, shape, dtype = FileState.of(path, argument), mapped.shape, mapped.dtype
        if (follow := state.size - mapped.offset) != mapped.nbytes:
            raise ValueError(
                f"its header says {shape} of {dtype}, which are {mapped.nbytes} bytes, and {follow} bytes follow"
            )
    # It is mapped anew for each walk: a map keeps its file open, and there may be more shards than a process may open.
    ranges = partial(read_map, lambda: np.load(path, mmap_mode="r"))
    return FileRows(name, KIND, state, shape, dtype, ranges, file_bytes(state, KIND).digest)
