"""Sources of the rows of arrays: numpy's, torch's, scipy's sparse matrices, and arrays mapped from a file."""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
import torch
from torch import Tensor

from softcurve.fit import DataError
from softcurve.fit.data.dataset import Dataset
from softcurve.fit.data.files.file_rows import memmap_rows
from softcurve.fit.data.row_source import RowSource, assemble
from softcurve.fit.data.rows import ArrayRows, Rows, SparseRows, tensor_array
from softcurve.fit.data.source import Label
from softcurve.losses.targets import TopK


def to_source(
    features: Any,
    target: Any = None,
    *,
    classes: tuple[Label, ...] | None = None,
    class_count: int | None = None,
    features_name: str = "features",
    target_name: str = "target",
) -> RowSource:
    """Make arrays a source, checked: features (n, d); a target of labels (n,), distributions (n, C), or a ``TopK``.

    The classes are the sorted distinct labels, as in scikit-learn, or 0…C-1, unless they are given. Float32 and float64
    arrays in C order are shared, not copied. A ``numpy.memmap``, or a view of one, is read block by block, and a sparse
    matrix is made dense so; a tensor on another device, or of a dtype that numpy lacks, is converted whole. Raises
    DataError, which uses the names.
    """
    targets: tuple[Rows, ...] = ()
    if isinstance(target, TopK):
        if target.tail != "bucket":
            raise DataError(f"{target_name} must be a TopK with tail 'bucket'; got {target.tail!r}")
        lists = {"indices": target.indices, "log_probs": target.log_probs}
        targets = tuple(_rows(tensor, f"{target_name}.{part}") for part, tensor in lists.items())
    elif target is not None:
        targets = (_rows(target, target_name),)
    return assemble(Dataset(_rows(features, features_name), targets), classes=classes, class_count=class_count)


def _rows(array: Any, name: str) -> Rows:
    sparse = sys.modules.get("scipy.sparse")  # whoever has a sparse matrix has imported it
    if sparse is not None and sparse.issparse(array):
        return SparseRows(array.tocsr(), name)
    if isinstance(array, Tensor):
        if array.layout != torch.strided:
            raise DataError(f"{name} must be a dense tensor; got layout {array.layout}: convert it to scipy's CSR")
        return ArrayRows(tensor_array(array.detach().cpu()), name)
    try:
        array = np.asanyarray(array)
    except ValueError as error:
        raise DataError(f"{name} must be an array; {error}: give every row the same length") from error
    return memmap_rows(array, name) or ArrayRows(np.asarray(array), name)
