"""Distributions and a teacher's lists as targets: what they must be, block by block."""

from __future__ import annotations

import numpy as np
import torch

from softcurve.array_types import Float, Float64, Int64
from softcurve.fit import DataError
from softcurve.fit.data.columns import Column
from softcurve.fit.data.features import refuse_not_finite
from softcurve.losses.targets import TopK

__all__ = ["check_distributions", "check_lists", "rescale", "to_top_k"]

# Float16 probabilities sum to one no better than this.
MASS_TOLERANCE = 1e-3


def check_distributions(column: Column) -> None:
    """Raise DataError unless they are numbers of shape (n, C), C of 2 or more."""
    if column.dtype.kind not in "iufb":
        raise DataError(
            f"{column.name} must be probabilities; got {column.dtype}: give floats, or labels of shape (n,)"
        )
    if len(column.shape) != 2 or column.shape[1] < 2:
        raise DataError(
            f"{column.name} must be labels of shape (n,) or distributions of shape (n, C) with C of 2 or more; "
            f"got {column.shape}: reshape it"
        )


def rescale(rows: Float64[np.ndarray, "rows classes"], name: str, first: int) -> None:
    """Divide each row by its sum, in place. Raises DataError, which uses the name, unless it was 1 within 1e-3."""
    refuse_not_finite(rows, name, first, "give probabilities")
    if rows.min() < 0:
        row, column = np.argwhere(rows < 0)[0].tolist()
        raise DataError(
            f"{name} must be probabilities; row {first + row}, column {column} is {rows[row, column]:g}: "
            "if these are log-probabilities, take their exponential"
        )
    mass = rows.sum(axis=1)
    if (off := np.abs(mass - 1.0) > MASS_TOLERANCE).any():
        row = int(off.argmax())
        raise DataError(
            f"{name} must sum to 1 in every row; {int(off.sum())} rows do not, the first, row {first + row}, sums to "
            f"{mass[row]:g} (of rows {first} to {first + len(rows) - 1}): divide each row by its sum, or apply "
            "softmax if these are logits"
        )
    rows /= mass[:, None]


def check_lists(indices: Column, log_probs: Column) -> None:
    """Raise DataError unless they are integers and floats of one shape (n, k)."""
    if indices.dtype.kind not in "iu":
        raise DataError(f"{indices.name} must be numbers of classes; got dtype {indices.dtype}: convert to integers")
    if log_probs.dtype.kind != "f":
        raise DataError(f"{log_probs.name} must be log-probabilities; got dtype {log_probs.dtype}: convert to floats")
    if len(indices.shape) != 2 or indices.shape != log_probs.shape or indices.shape[1] < 1:
        raise DataError(
            f"{indices.name} and {log_probs.name} must have one shape (n, k); got {indices.shape} and "
            f"{log_probs.shape}: give each listed class its log-probability"
        )


def to_top_k(
    indices: Int64[np.ndarray, "rows k"],
    log_probs: Float[np.ndarray, "rows k"],
    classes: int,
    names: tuple[str, str],
    first: int,
) -> TopK:
    """The lists as a target. Raises DataError, which gives the row, for what a teacher cannot have said."""
    if indices.min() < 0 or indices.max() >= classes:
        row, column = np.argwhere((indices < 0) | (indices >= classes))[0].tolist()
        raise DataError(
            f"{names[0]} must be classes from 0 to {classes - 1}; row {first + row}, column {column} is "
            f"{indices[row, column]}: give the number of classes, or lists over these"
        )
    in_order = np.sort(indices, axis=1)
    if (twice := (in_order[:, 1:] == in_order[:, :-1]).any(axis=1)).any():
        raise DataError(
            f"{names[0]} must name distinct classes in each row; row {first + int(twice.argmax())} names one twice: "
            "keep one of them"
        )
    with np.errstate(over="ignore"):
        mass = np.exp(log_probs, dtype=np.float64).sum(axis=1)
    if (wrong := ~(mass <= 1.0 + MASS_TOLERANCE)).any():  # NaN is wrong too
        row = int(wrong.argmax())
        raise DataError(
            f"{names[1]} must be natural log-probabilities with a mass of at most 1 a row; row {first + row} has "
            f"{mass[row]:g}: take log_softmax over all classes before topk"
        )
    return TopK(torch.from_numpy(indices), torch.from_numpy(log_probs))
