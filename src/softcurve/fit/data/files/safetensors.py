"""The tensors of a .safetensors file, read in slices."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from softcurve.fit.data.dataset import Dataset
from softcurve.fit.data.files.decoding import check_file, decoding
from softcurve.fit.data.files.file_rows import FileRows, FileState
from softcurve.fit.data.files.naming import named_dataset
from softcurve.fit.data.rows import tensor_array

__all__ = ["opened_tensors", "safetensors_dataset"]

KIND = "a .safetensors file"


def safetensors_dataset(path: Path, with_target: bool) -> Dataset:
    """Open a file; safetensors itself checks the header against the size of the file."""
    check_file(path, "data")
    with decoding(path, "data", KIND), opened_tensors(path, "pt") as file:
        state = FileState.of(path)

        def rows(name: str) -> FileRows:
            tensor = file.get_tensor(name)  # a map, of which nothing is read
            shape, dtype = tuple(tensor.shape), tensor_array(tensor.flatten()[:0]).dtype
            ranges = partial(_ranges, path, name, shape, dtype)
            return FileRows(f"tensor {name!r} of {path}", KIND, state, shape, dtype, ranges)

        return named_dataset(path, "tensor", list(file.keys()), rows, with_target)


@contextmanager
def opened_tensors(path: Path, framework: str) -> Iterator[Any]:
    """Open a file by ``safetensors.safe_open``.

    That calls a file absent which may not be read, and cannot open a name that is not UTF-8. Here the first raises
    PermissionError, and the number of the open file stands for the second.
    """
    from safetensors import safe_open

    with path.open("rb") as file:
        try:
            name = str(path)
            name.encode()
        except UnicodeEncodeError:
            name = f"/dev/fd/{file.fileno()}"
        with safe_open(name, framework=framework) as opened:
            yield opened


def _ranges(
    path: Path, name: str, shape: tuple[int, ...], dtype: np.dtype[Any], bounds: Sequence[int]
) -> Iterator[NDArray[Any]]:
    """Yield copies of rows. The file is opened for each: the pages of its map stay resident until it is closed."""
    for start, stop in pairwise(bounds):
        rows = np.empty((stop - start, *shape[1:]), dtype)
        with opened_tensors(path, "pt") as file:
            torch.from_numpy(rows).copy_(file.get_slice(name)[start:stop])
        yield rows
