"""Rows from arrays that a program holds: numpy's, torch's, scipy's sparse matrices, and arrays mapped from a file."""

from __future__ import annotations

import mmap
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from softcurve.fit import DataError
from softcurve.fit.data.column_source import ColumnSource, assemble
from softcurve.fit.data.columns import ArrayColumn, Column, MappedColumn, Part, SparseColumn
from softcurve.fit.data.files.raw import RawColumn
from softcurve.fit.data.files.stamp import Stamp
from softcurve.fit.data.source import Label
from softcurve.losses.targets import TopK

__all__ = ["to_source"]


def to_source(
    features: Any,
    target: Any = None,
    *,
    classes: tuple[Label, ...] | None = None,
    class_count: int | None = None,
    features_name: str = "features",
    target_name: str = "target",
) -> ColumnSource:
    """Make arrays a source, checked: features (n, d); a target of labels (n,), distributions (n, C), or a ``TopK``.

    The classes are the sorted distinct labels, as in scikit-learn, or 0…C-1, unless they are given. Float32 and float64
    arrays in C order are shared, not copied. Of a ``numpy.memmap``, or a view of one, no more than two blocks are in
    memory: rows in C or Fortran order are read from its file, others through the map. A sparse matrix, converted to
    CSR, is made dense block by block; a tensor on another device, or of a dtype that numpy lacks, is converted whole.
    Raises DataError, which uses the names.
    """
    column = _column(features, features_name)
    if isinstance(target, TopK):
        if target.tail != "bucket":
            raise DataError(f"{target_name} must be a TopK with tail 'bucket'; got {target.tail!r}")
        lists = (
            _column(target.indices, f"{target_name}.indices"),
            _column(target.log_probs, f"{target_name}.log_probs"),
        )
        part = Part(column, lists=lists)
    else:
        part = Part(column, None if target is None else _column(target, target_name))
    streamed = any(isinstance(c, RawColumn | MappedColumn) for c in (part.features, part.target))
    return assemble([part], classes=classes, class_count=class_count, in_memory=not streamed)


def _column(given: Any, name: str) -> Column:
    sparse = sys.modules.get("scipy.sparse")  # whoever has a sparse matrix has imported it
    if sparse is not None and sparse.issparse(given):
        return SparseColumn(given.tocsr(), name)
    if isinstance(given, Tensor):
        tensor = given.detach().cpu()
        if tensor.layout != torch.strided:
            raise DataError(f"{name} must be a dense tensor; got layout {tensor.layout}: convert it to scipy's CSR")
        if tensor.dtype == torch.bfloat16 or (tensor.is_floating_point() and tensor.dtype.itemsize == 1):
            tensor = tensor.float()
        return ArrayColumn(tensor.numpy(), name)
    try:
        array = np.asanyarray(given)
    except ValueError as error:
        raise DataError(f"{name} must be an array; {error}: give every row the same length") from error
    return _mapped(array, name) or ArrayColumn(np.asarray(array), name)


def _mapped(array: NDArray[Any], name: str) -> Column | None:
    """A column that leaves nothing resident, where ``array`` is seen through a map of a file that it shares."""
    holder: Any = array
    while isinstance(holder, np.ndarray) and not (isinstance(holder, np.memmap) and isinstance(holder.base, mmap.mmap)):
        holder = holder.base
    if not isinstance(holder, np.memmap) or holder.mode == "c":  # a private copy may differ from its file
        return None
    pages: Any = holder.base
    if holder.filename is not None and (array.flags.c_contiguous or array.flags.f_contiguous):
        stamp = Stamp.of(Path(holder.filename))
        offset = holder.offset + array.__array_interface__["data"][0] - holder.__array_interface__["data"][0]
        fortran = not array.flags.c_contiguous
        return RawColumn(name, "a memory map", stamp, offset, array.shape, array.dtype, fortran=fortran)
    return MappedColumn(np.asarray(array), name, pages)
