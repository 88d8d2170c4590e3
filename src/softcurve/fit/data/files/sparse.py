"""Sparse features in files, which are held in memory: .npz archives of scipy, and svmlight files."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import scipy.sparse
from numpy.typing import NDArray

from softcurve.files import DataError
from softcurve.files.tensors import FileState
from softcurve.fit.data.dataset import ArrayRows, Dataset, SparseRows

# What scipy.sparse.save_npz writes for every format.
MEMBERS = {"format", "shape", "data"}
BASE = re.compile(rb"#\s*column indices are (zero|one)-based", re.IGNORECASE)
HEADER = 4096  # bytes in which a comment on the indices is looked for


def is_sparse_archive(names: list[str]) -> bool:
    """Whether an .npz archive of arrays with these names was written by ``scipy.sparse.save_npz``."""
    return set(names) >= MEMBERS


def archived_rows(path: Path, name: str) -> SparseRows:
    """Read a matrix that ``scipy.sparse.save_npz`` wrote. Raises ValueError for indices out of range."""
    matrix: Any = scipy.sparse.load_npz(path)
    if len(matrix.shape) != 2:
        raise DataError(f"{name} must have shape (n, d); got {matrix.shape}: save a matrix")
    if hasattr(matrix, "check_format"):
        matrix.check_format(full_check=True)  # scipy's products would read beyond the arrays
    return SparseRows(matrix, name)


def svmlight_datasets(paths: Sequence[Path], with_target: bool, width: int | None) -> list[Dataset]:
    """Read svmlight files, whose features have ``width`` columns, by default as many as the largest index needs.

    The first column has the index 0 if a file says so in a comment, as scikit-learn writes it, or uses that index;
    otherwise 1, the convention of the format.
    """
    read = [_read_svmlight(path) for path in paths]
    bases = set().union(*(base for _, _, base in read))
    indices = [matrix.indices for matrix, _, _ in read if matrix.nnz]
    smallest, largest = min(map(np.min, indices), default=0), max(map(np.max, indices), default=-1)
    first, where = (bases.pop() if bases else min(smallest, 1)), f"data: the features of {paths[0]}"
    if bases or smallest < first:
        raise DataError(f"{where} have indices from {smallest}, and a comment says otherwise: mend the comment")
    if width is not None and first and largest < width and not any(base for _, _, base in read):
        raise DataError(
            f"{where} have indices from {smallest} to {largest}, which does not tell whether the first of {width} "
            "columns has the index 0 or 1: write '# Column indices are one-based' or zero-based as the first line"
        )
    columns = max(int(largest) + 1 - first, width or 0)
    datasets = []
    for path, (matrix, labels, _) in zip(paths, read, strict=True):
        entries = matrix.data, matrix.indices - first, matrix.indptr
        features = scipy.sparse.csr_array(entries, shape=(matrix.shape[0], columns))
        targets = (ArrayRows(_integers(labels), f"labels of {path}"),) if with_target else ()
        datasets.append(Dataset(SparseRows(features, f"features of {path}"), targets, "another is given"))
    return datasets


def _read_svmlight(path: Path) -> tuple[Any, NDArray[Any], set[int]]:
    """Return the features by their indices, the labels, and what the comments say is the index of the first column."""
    from sklearn.datasets import load_svmlight_file

    state = FileState.of(path, "an svmlight file")
    with state.decoding(), path.open("rb") as file:
        comments = BASE.findall(file.read(HEADER))
        file.seek(0)
        matrix, labels = load_svmlight_file(file, zero_based=True)
        state.check()
    return matrix, labels, {int(word.lower() == b"one") for word in comments}


def _integers(labels: NDArray[Any]) -> NDArray[Any]:
    """Return whole numbers, such as -1 and +1, as integers; others are left for the check of labels to refuse."""
    return labels.astype(np.int64) if np.isfinite(labels).all() and (labels == np.rint(labels)).all() else labels
