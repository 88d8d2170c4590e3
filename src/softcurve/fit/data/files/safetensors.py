"""The tensors of a .safetensors file, read where they stand."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from softcurve.fit import DataError
from softcurve.fit.data.columns import Part
from softcurve.fit.data.files.decoding import check_file, decoding
from softcurve.fit.data.files.naming import named_part
from softcurve.fit.data.files.raw import RawColumn
from softcurve.fit.data.files.stamp import Stamp

__all__ = ["opened_tensors", "safetensors_part"]

KIND = "a .safetensors file"
STORED = {
    "F64": "<f8", "F32": "<f4", "F16": "<f2", "I64": "<i8", "I32": "<i4", "I16": "<i2", "I8": "i1", "U64": "<u8",
    "U32": "<u4", "U16": "<u2", "U8": "u1", "BOOL": "?", "BF16": "<u2", "F8_E4M3": "u1", "F8_E5M2": "u1",
}  # fmt: skip
# What numpy lacks.
MEANT = {"BF16": torch.bfloat16, "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2}


def safetensors_part(path: Path, with_target: bool) -> Part:
    """The rows of a file, which safetensors itself has found whole by its header."""
    check_file(path, "data")
    with decoding(path, "data", KIND):
        with opened_tensors(path, "np") as opened:  # checks the header against the size of the file
            names = list(opened.keys())
        stamp = Stamp.of(path)
        start, header = _header(path)

        def column(name: str) -> RawColumn:
            entry = header[name]
            if entry["dtype"] not in STORED:
                raise DataError(f"data: tensor {name!r} of {path} has dtype {entry['dtype']}; convert it to F32")
            stored, first = np.dtype(STORED[entry["dtype"]]), start + entry["data_offsets"][0]
            meant = MEANT.get(entry["dtype"])
            return RawColumn(f"tensor {name!r} of {path}", KIND, stamp, first, tuple(entry["shape"]), stored, meant)

        return named_part(path, "tensor", names, column, with_target)


@contextmanager
def opened_tensors(path: Path, framework: str) -> Iterator[Any]:
    """Give what ``safetensors.safe_open`` gives.

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


def _header(path: Path) -> tuple[int, dict[str, Any]]:
    """Where the tensors begin, and where each is: safetensors says where only to those who read through its map."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        return 8 + length, json.loads(file.read(length))
