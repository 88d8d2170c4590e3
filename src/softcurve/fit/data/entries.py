"""What the entries of features, distributions and a teacher's lists must be, checked block by block.

Errors give the file and the row in it; ``first`` is the number of a block's first row in all ``rows``.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from softcurve.array_types import Float, Float64, Int64
from softcurve.fit import DataError
from softcurve.fit.data.rows import Rows, locate
from softcurve.losses.targets import TopK

__all__ = ["require_finite", "rescale", "to_top_k"]

# Float16 probabilities sum to one no better than this.
MASS_TOLERANCE = 1e-3


def require_finite(block: Float[np.ndarray, "rows columns"], rows: Rows, first: int, remedy: str) -> None:
    """Raise DataError that gives the place of an entry that is not finite."""
    with np.errstate(over="ignore", invalid="ignore"):
        if np.isfinite(block.sum()):  # an infinity or NaN would make the sum one too: one pass, and no mask
            return
    bad: NDArray[np.int64] = np.argwhere(~np.isfinite(block))
    if len(bad):
        row, column = bad[0].tolist()
        name, start = locate(rows, first)
        raise DataError(
            f"{name} must be finite; {len(bad)} entries of rows {start} to {start + len(block) - 1} are not, the "
            f"first, {block[row, column]}, in row {start + row}, column {column}: {remedy}"
        )


def rescale(block: Float64[np.ndarray, "rows classes"], rows: Rows, first: int) -> Float64[np.ndarray, "rows classes"]:
    """Divide each row by its sum. Raises DataError unless the sum was 1 within 1e-3 and no entry negative."""
    require_finite(block, rows, first, "give probabilities")
    name, start = locate(rows, first)
    if block.min() < 0:
        row, column = np.argwhere(block < 0)[0].tolist()
        raise DataError(
            f"{name} must be probabilities; row {start + row}, column {column} is {block[row, column]:g}: "
            "if these are log-probabilities, take their exponential"
        )
    mass = block.sum(axis=1)
    if (off := np.abs(mass - 1.0) > MASS_TOLERANCE).any():
        row = int(off.argmax())
        raise DataError(
            f"{name} must sum to 1 in every row; {int(off.sum())} rows do not, the first, row {start + row}, sums to "
            f"{mass[row]:g} (of rows {start} to {start + len(block) - 1}): divide each row by its sum, or apply "
            "softmax if these are logits"
        )
    scaled: NDArray[np.float64] = block / mass[:, None]
    return scaled


def to_top_k(
    indices: Int64[np.ndarray, "rows k"],
    log_probs: Float[np.ndarray, "rows k"],
    classes: int,
    targets: tuple[Rows, ...],
    first: int,
) -> TopK:
    """Return a teacher's lists as a target. Raises DataError for lists that are of no distribution over the classes."""
    (name, start), (other, _) = (locate(rows, first) for rows in targets)
    if indices.min() < 0 or indices.max() >= classes:
        row, column = np.argwhere((indices < 0) | (indices >= classes))[0].tolist()
        raise DataError(
            f"{name} must be classes from 0 to {classes - 1}; row {start + row}, column {column} is "
            f"{indices[row, column]}: give the number of classes, or lists over these"
        )
    in_order = np.sort(indices, axis=1)
    if (twice := (in_order[:, 1:] == in_order[:, :-1]).any(axis=1)).any():
        raise DataError(
            f"{name} must name distinct classes in each row; row {start + int(twice.argmax())} names one twice: "
            "keep one of them"
        )
    with np.errstate(over="ignore"):
        mass = np.exp(log_probs, dtype=np.float64).sum(axis=1)
    if (wrong := ~(mass <= 1.0 + MASS_TOLERANCE)).any():  # NaN is wrong too
        row = int(wrong.argmax())
        raise DataError(
            f"{other} must be natural log-probabilities with a mass of at most 1 a row; row {start + row} has "
            f"{mass[row]:g}: take log_softmax over all classes before topk"
        )
    return TopK(torch.from_numpy(indices), torch.from_numpy(log_probs))
