"""What features must be, and the floating-point numbers that they become."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from softcurve.array_types import Float
from softcurve.fit import DataError
from softcurve.fit.data.columns import Column

__all__ = ["check_features", "double_needed", "refuse_not_finite"]


def check_features(column: Column) -> None:
    """Raise DataError unless they are real numbers of shape (n, d), n and d of 1 or more."""
    shape = column.shape
    if column.dtype.kind not in "iufb":
        raise DataError(f"{column.name} must be real numbers; got dtype {column.dtype}: convert them to floats")
    if len(shape) != 2:
        remedy = "reshape to (n, 1)" if len(shape) == 1 else "flatten every row"
        raise DataError(f"{column.name} must have shape (n, d); got {shape}: {remedy}")
    if 0 in shape:
        raise DataError(f"{column.name} is empty, of shape {shape}; give at least one row and one column")


def double_needed(dtype: np.dtype[Any]) -> bool:
    """Whether float32 does not hold every number of this dtype."""
    return not np.can_cast(dtype, np.float32)


def refuse_not_finite(rows: Float[np.ndarray, "rows columns"], name: str, first: int, remedy: str) -> None:
    """Raise DataError that gives the place of an entry that is not finite; ``first`` is the first row's number."""
    with np.errstate(over="ignore", invalid="ignore"):
        if np.isfinite(rows.sum()):  # an infinity or NaN would have spoilt it; one pass, and no mask
            return
    bad: NDArray[np.int64] = np.argwhere(~np.isfinite(rows))
    if len(bad):
        row, column = bad[0].tolist()
        raise DataError(
            f"{name} must be finite; {len(bad)} entries of rows {first} to {first + len(rows) - 1} are not, the "
            f"first, {rows[row, column]}, in row {first + row}, column {column}: {remedy}"
        )
