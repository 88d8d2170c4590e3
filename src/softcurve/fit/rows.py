"""Rows to fit a head to: checked features and targets, and their division into two sides."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float64, Int64
from numpy.typing import NDArray

from softcurve.fit import DataError
from softcurve.fit.arrays import read_arrays

__all__ = ["Label", "Rows", "load_rows", "load_rows_for", "make_rows", "split"]

Label = int | str  # a bool is an int

# Float16 probabilities sum to one no better than this.
MASS_TOLERANCE = 1e-3


@dataclass(frozen=True, eq=False)
class Rows:
    """Features with a target for each row: indices into ``classes``, or distributions over them."""

    features: Float64[np.ndarray, "rows d"]
    target: Int64[np.ndarray, " rows"] | Float64[np.ndarray, "rows classes"]
    classes: tuple[Label, ...]

    @property
    def soft(self) -> bool:
        """Whether the targets are distributions."""
        return self.target.ndim == 2

    def __len__(self) -> int:
        return len(self.features)

    def take(self, index: Int64[np.ndarray, " taken"]) -> Rows:
        """Return the rows at ``index``, with all the classes."""
        return Rows(self.features[index], self.target[index], self.classes)


def load_rows(data: str, target: Path | None = None) -> Rows:
    """Read rows to fit a head to; see ``read_arrays`` for ``data`` and ``target``. Raises DataError."""
    arrays = read_arrays(data, target)
    if arrays.target is None:
        raise DataError(f"data: {data} has no targets ({arrays.target_name}); give them in an .npy file as target")
    return make_rows(arrays.features, arrays.target, features_name=arrays.features_name, target_name=arrays.target_name)


def load_rows_for(
    data: str, classes: tuple[Label, ...], width: int, target: Path | None = None
) -> tuple[Float64[np.ndarray, "rows width"], Rows | None]:
    """Read features for a head of this width and, where there are targets, the rows in terms of its classes.

    Raises DataError, also for a label that is none of the classes.
    """
    arrays = read_arrays(data, target)
    features = _checked_features(arrays.features, arrays.features_name)
    if features.shape[1] != width:
        raise DataError(
            f"{arrays.features_name} must have {width} columns, as the features that the head was fitted to; "
            f"got {features.shape[1]}"
        )
    if arrays.target is None:
        return features, None
    _same_length(features, arrays.target, arrays.features_name, arrays.target_name)
    if arrays.target.ndim == 1:
        index = _index_in(classes, _checked_labels(arrays.target, arrays.target_name), arrays.target_name)
        return features, Rows(features, index, classes)
    distributions = _checked_distributions(arrays.target, arrays.target_name)
    if distributions.shape[1] != len(classes):
        raise DataError(
            f"{arrays.target_name} has distributions over {distributions.shape[1]} classes, the head has "
            f"{len(classes)}: give targets over the head's classes, in its order"
        )
    return features, Rows(features, distributions, classes)


def make_rows(
    features: NDArray[Any],
    target: NDArray[Any],
    *,
    features_name: str = "features",
    target_name: str = "target",
) -> Rows:
    """Check arrays and make them rows: labels (any integers or strings; (n,)) or distributions ((n, C)).

    The classes are the sorted distinct labels, as in scikit-learn, or 0…C-1. Distributions are rescaled to
    sum to one in float64 where they do within 1e-3. Raises DataError, which uses the names.
    """
    checked = _checked_features(features, features_name)
    _same_length(features, target, features_name, target_name)
    if target.ndim != 1:
        distributions = _checked_distributions(target, target_name)
        return Rows(checked, distributions, tuple(range(distributions.shape[1])))
    classes, index = np.unique(_checked_labels(target, target_name), return_inverse=True)
    if len(classes) < 2:
        raise DataError(f"{target_name} has one class only, {classes.tolist()[0]!r}; a softmax head needs two or more")
    return Rows(checked, index.astype(np.int64), tuple(classes.tolist()))


def split(rows: Rows, holdout: float, seed: int) -> tuple[Rows, Rows]:
    """Divide rows at random into those to fit and those held out, both in their first order.

    Raises DataError where either side would be empty.
    """
    held = round(holdout * len(rows)) if 0.0 < holdout < 1.0 else 0
    if not 0 < held < len(rows):
        raise DataError(
            f"holdout {holdout:g} of {len(rows)} rows must leave rows on both sides; "
            "give a share between 0 and 1, such as 0.2, or more rows"
        )
    order = np.random.default_rng(seed).permutation(len(rows))
    return rows.take(np.sort(order[held:])), rows.take(np.sort(order[:held]))


def _checked_features(features: NDArray[Any], name: str) -> Float64[np.ndarray, "rows d"]:
    if features.dtype.kind not in "iufb":
        raise DataError(f"{name} must be real numbers; got dtype {features.dtype}: convert them to floats")
    if features.ndim != 2:
        remedy = "reshape to (n, 1)" if features.ndim == 1 else "flatten every row"
        raise DataError(f"{name} must have shape (n, d); got {features.shape}: {remedy}")
    if 0 in features.shape:
        raise DataError(f"{name} is empty, of shape {features.shape}; give at least one row and one column")
    checked = np.ascontiguousarray(features, dtype=np.float64)
    _refuse_not_finite(checked, name, "drop or fill such rows")
    return checked


def _refuse_not_finite(array: Float64[np.ndarray, "rows columns"], name: str, remedy: str) -> None:
    bad = np.argwhere(~np.isfinite(array))
    if len(bad):
        row, column = bad[0].tolist()
        raise DataError(
            f"{name} must be finite; {len(bad)} entries are not, the first, {array[row, column]}, in "
            f"row {row}, column {column}: {remedy}"
        )


def _same_length(features: NDArray[Any], target: NDArray[Any], features_name: str, target_name: str) -> None:
    if target.ndim == 0 or len(target) != len(features):
        shape = "a single value" if target.ndim == 0 else f"{len(target)} rows"
        raise DataError(
            f"{features_name} has {len(features)} rows but {target_name} has {shape}; give one target a row"
        )


def _checked_labels(labels: NDArray[Any], name: str) -> NDArray[Any]:
    kind = labels.dtype.kind
    if kind in "iubU":
        return labels
    if kind != "f":
        raise DataError(f"{name} has labels of dtype {labels.dtype}; they must be integers or strings: convert them")
    if not (np.isfinite(labels).all() and (labels == np.rint(labels)).all() and (np.abs(labels) < 2**53).all()):
        raise DataError(
            f"{name} is one-dimensional but not whole numbers; labels must be integers or strings, and "
            "distributions need shape (n, C)"
        )
    return labels.astype(np.int64)


def _checked_distributions(target: NDArray[Any], name: str) -> Float64[np.ndarray, "rows classes"]:
    if target.dtype.kind not in "iufb":
        raise DataError(f"{name} must be probabilities; got {target.dtype}: give floats, or labels of shape (n,)")
    if target.ndim != 2 or target.shape[1] < 2:
        raise DataError(
            f"{name} must be labels of shape (n,) or distributions of shape (n, C) with C of 2 or more; "
            f"got {target.shape}: reshape it"
        )
    checked = target.astype(np.float64)
    _refuse_not_finite(checked, name, "give probabilities")
    mass = checked.sum(axis=1)
    if (checked < 0).any():
        row, column = np.argwhere(checked < 0)[0].tolist()
        raise DataError(
            f"{name} must be probabilities; row {row}, column {column} is {checked[row, column]:g}: "
            "if these are log-probabilities, take their exponential"
        )
    if (off := np.abs(mass - 1.0) > MASS_TOLERANCE).any():
        row = int(off.argmax())
        raise DataError(
            f"{name} must sum to 1 in every row; {int(off.sum())} rows do not, the first, row {row}, sums to "
            f"{mass[row]:g}: divide each row by its sum, or apply softmax if these are logits"
        )
    rescaled: Float64[np.ndarray, "rows classes"] = checked / mass[:, None]
    return rescaled


def _index_in(classes: tuple[Label, ...], labels: NDArray[Any], name: str) -> Int64[np.ndarray, " rows"]:
    position = {label: index for index, label in enumerate(classes)}
    values = labels.tolist()
    unknown = next((row for row, label in enumerate(values) if label not in position), None)
    if unknown is not None:
        known = ", ".join(map(repr, classes[:8])) + (", …" if len(classes) > 8 else "")
        raise DataError(
            f"{name}: row {unknown} has the label {values[unknown]!r}, which is none of the head's "
            f"{len(classes)} classes ({known}); "
            "leave the target out, or fit a head to all classes"
        )
    return np.array([position[label] for label in values], dtype=np.int64)
