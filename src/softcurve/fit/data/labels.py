"""Labels, and the indices into a list of classes that they become."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from softcurve.array_types import Int64
from softcurve.fit import DataError
from softcurve.fit.data.rows import Rows, locate
from softcurve.fit.data.source import Label
from softcurve.fit.together import ALONE, Together

__all__ = ["index_labels"]


def index_labels(
    rows: Rows, bounds: Sequence[int], classes: tuple[Label, ...] | None = None, together: Together = ALONE
) -> tuple[tuple[Label, ...], Int64[np.ndarray, " rows"]]:
    """Return the classes, and the index among them of every row that these bounds enclose.

    The classes are the sorted distinct labels of all processes, as in scikit-learn, unless they are given.
    Raises DataError for entries that are no labels, a single class, or a label that is none of the given classes.
    """
    pieces: list[tuple[list[Label], NDArray[np.int64]]] = []
    kinds: list[tuple[bool, str]] = []  # whether the labels of an array are text, and its name
    with together.agreed():
        for start, piece in zip(bounds, rows.read(bounds), strict=False):
            name, row = locate(rows, start)
            labels = _checked(piece, name)
            kinds.append((labels.dtype.kind == "U", name))
            _require_one_kind(kinds)
            values, inverse = np.unique(labels, return_inverse=True)
            pieces.append((values.tolist(), inverse))
            if classes is not None:
                _require_known(classes, values, inverse, name, row)
    if classes is None:
        # Not by numpy, which would make floats of int64 and uint64 together.
        classes = _distinct(kinds[:1], list(dict.fromkeys(label for values, _ in pieces for label in values)), together)
    position = {label: index for index, label in enumerate(classes)}
    indices = [np.array([position[label] for label in values], dtype=np.int64)[inverse] for values, inverse in pieces]
    return classes, np.concatenate([np.empty(0, np.int64), *indices])


def _require_one_kind(kinds: Sequence[tuple[bool, str]]) -> None:
    """Raise DataError where the last array has text for labels and the first has numbers, or the other way round."""
    (first_text, first), (text, name) = kinds[0], kinds[-1]
    if text != first_text:
        words = {True: "text", False: "numbers"}
        raise DataError(
            f"{name} has {words[text]} for labels, and {first} has {words[first_text]}: convert one to the other"
        )


def _distinct(kinds: list[tuple[bool, str]], labels: list[Label], together: Together) -> tuple[Label, ...]:
    """Return the sorted distinct labels of all processes, of which each gives its own, and the kind of the first."""
    if together.size > 1:
        gathered = [json.loads(text) for text in together.texts(json.dumps((kinds, labels)))]
        kinds, labels = [], []
        for kinds_there, labels_there in gathered:
            kinds += [(text, name) for text, name in kinds_there]
            labels += labels_there
            if kinds:
                _require_one_kind(kinds)
    classes = tuple(sorted(set(labels)))
    if len(classes) < 2 and kinds:
        raise DataError(f"{kinds[0][1]} has one class only, {classes[0]!r}; a softmax head needs two or more")
    return classes


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


def _require_known(
    classes: tuple[Label, ...], values: NDArray[Any], inverse: NDArray[np.int64], name: str, first: int
) -> None:
    known = set(classes)
    unknown = np.array([label not in known for label in values.tolist()], dtype=np.bool_)
    if unknown.any():
        row = int(unknown[inverse].argmax())
        shown = ", ".join(map(repr, classes[:8])) + (", …" if len(classes) > 8 else "")
        raise DataError(
            f"{name}: row {first + row} has the label {values[inverse[row]].item()!r}, which is none of the head's "
            f"{len(classes)} classes ({shown}); "
            "leave the target out, or fit a head to all classes"
        )
