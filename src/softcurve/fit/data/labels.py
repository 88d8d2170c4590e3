"""Labels, and the indices into a list of classes that they become."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Int64
from numpy.typing import NDArray

from softcurve.fit import DataError
from softcurve.fit.data.columns import Column
from softcurve.fit.data.source import Label

__all__ = ["index_labels"]


def index_labels(
    columns: Sequence[Column], classes: tuple[Label, ...] | None = None
) -> tuple[tuple[Label, ...], Int64[np.ndarray, " rows"]]:
    """The classes and every row's index among them, over all columns in turn.

    The classes are the sorted distinct labels, as in scikit-learn, unless they are given.
    Raises DataError for entries that are no labels, a single class, or a label that is none of the given classes.
    """
    pieces: list[tuple[list[Label], NDArray[np.int64]]] = []
    text: bool | None = None
    for column in columns:
        row = 0
        for piece in column.labels():
            labels = _checked(piece, column.name)
            if text is not None and text != (labels.dtype.kind == "U"):
                raise DataError(
                    f"{column.name} has {'numbers' if text else 'text'} for labels, and {columns[0].name} has "
                    f"{'text' if text else 'numbers'}: convert one to the other"
                )
            text = labels.dtype.kind == "U"
            values, inverse = np.unique(labels, return_inverse=True)
            pieces.append((values.tolist(), inverse))
            if classes is not None:
                _refuse_unknown(classes, values, inverse, column.name, row)
            row += len(labels)
    # Not by numpy, which would make floats of int64 and uint64 together.
    known = tuple(sorted({label for values, _ in pieces for label in values})) if classes is None else classes
    if classes is None and len(known) < 2:
        raise DataError(f"{columns[0].name} has one class only, {known[0]!r}; a softmax head needs two or more")
    position = {label: index for index, label in enumerate(known)}
    found = [np.array([position[label] for label in values], dtype=np.int64)[inverse] for values, inverse in pieces]
    return known, np.concatenate(found)


def _checked(labels: NDArray[Any], name: str) -> NDArray[Any]:
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


def _refuse_unknown(
    classes: tuple[Label, ...], values: NDArray[Any], inverse: NDArray[np.int64], name: str, first: int
) -> None:
    known = set(classes)
    unknown = np.array([label not in known for label in values.tolist()], dtype=np.bool_)
    if not unknown.any():
        return
    row = int(unknown[inverse].argmax())
    shown = ", ".join(map(repr, classes[:8])) + (", …" if len(classes) > 8 else "")
    raise DataError(
        f"{name}: row {first + row} has the label {values[inverse[row]].item()!r}, which is none of the head's "
        f"{len(classes)} classes ({shown}); "
        "leave the target out, or fit a head to all classes"
    )
