"""Labels, and the indices into a list of classes that they become."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from softcurve.array_types import Int64
from softcurve.fit import DataError
from softcurve.fit.data.columns import Column
from softcurve.fit.data.source import Label
from softcurve.fit.group import ALONE
from softcurve.fit.group import Group as Together

__all__ = ["index_labels"]


def index_labels(
    spans: Sequence[tuple[Column, int, int]],
    classes: tuple[Label, ...] | None = None,
    together: Together = ALONE,
) -> tuple[tuple[Label, ...], Int64[np.ndarray, " rows"]]:
    """The classes and every row's index among them, over the rows from one to another of all columns in turn.

    The classes are the sorted distinct labels of all processes, as in scikit-learn, unless they are given.
    Raises DataError for entries that are no labels, a single class, or a label that is none of the given classes.
    """
    pieces: list[tuple[list[Label], NDArray[np.int64]]] = []
    first: tuple[bool, str] | None = None  # whether it is text, and of which column
    with together.agreed():
        for column, start, stop in spans:
            row = start
            for piece in column.labels(start, stop):
                labels = _checked(piece, column.name)
                first = _like_first(first, (labels.dtype.kind == "U", column.name))
                values, inverse = np.unique(labels, return_inverse=True)
                pieces.append((values.tolist(), inverse))
                if classes is not None:
                    _refuse_unknown(classes, values, inverse, column.name, row)
                row += len(labels)
    known = _known(pieces, first, together) if classes is None else classes
    position = {label: index for index, label in enumerate(known)}
    found = [np.array([position[label] for label in values], dtype=np.int64)[inverse] for values, inverse in pieces]
    return known, np.concatenate([np.empty(0, np.int64), *found])


def _like_first(first: tuple[bool, str] | None, found: tuple[bool, str]) -> tuple[bool, str]:
    if first is not None and first[0] != found[0]:
        raise DataError(
            f"{found[1]} has {'text' if found[0] else 'numbers'} for labels, and {first[1]} has "
            f"{'text' if first[0] else 'numbers'}: convert one to the other"
        )
    return first or found


def _known(
    pieces: list[tuple[list[Label], NDArray[np.int64]]], first: tuple[bool, str] | None, together: Together
) -> tuple[Label, ...]:
    # Not by numpy, which would make floats of int64 and uint64 together.
    own = dict.fromkeys(label for values, _ in pieces for label in values)
    if together.size > 1:
        said = [json.loads(text) for text in together.texts(json.dumps((first, list(own))))]
        first = None
        for of_process, _ in said:
            first = first if of_process is None else _like_first(first, (of_process[0], of_process[1]))
        own = dict.fromkeys(label for _, labels in said for label in labels)
    known = tuple(sorted(own))
    if len(known) < 2 and first is not None:
        raise DataError(f"{first[1]} has one class only, {known[0]!r}; a softmax head needs two or more")
    return known


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
