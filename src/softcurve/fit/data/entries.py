"""Checks of the entries of features, labels, distributions and a teacher's lists, block by block.

Errors name the file and the row in it; ``first`` is the number of a block's first row among all ``rows``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.sparse import csr_array

from softcurve.array_types import Float, Float64, Int64
from softcurve.fit import DataError
from softcurve.fit.data.dataset import Rows, float_dtype, locate
from softcurve.fit.data.source import Label
from softcurve.fit.group import ALONE, Group
from softcurve.losses.topk import TopK

# Float16 probabilities sum to one no better than this.
MASS_TOLERANCE = 1e-3


def require_finite(block: Float[np.ndarray, "rows columns"], rows: Rows, first: int, remedy: str) -> None:
    """Raise DataError that gives the place of an entry that is not finite."""
    with np.errstate(over="ignore", invalid="ignore"):
        if not np.isfinite(block.sum()):  # an infinity or NaN makes the sum one too: one pass, and no mask
            _require(np.isfinite(block), block, "be finite", remedy, rows, first)


def require_finite_entries(block: csr_array, rows: Rows, first: int, remedy: str) -> None:
    """Raise DataError that gives the place of a stored entry that is not finite."""
    good = np.isfinite(block.data)
    if not good.all():
        bad = int(np.argmin(good))
        row = int(np.searchsorted(block.indptr, bad, side="right")) - 1
        place = row, int(block.indices[bad])
        _refuse(block.data[bad], place, int((~good).sum()), block.shape[0], "be finite", remedy, rows, first)


def rescale(block: NDArray[Any], rows: Rows, first: int) -> Float64[np.ndarray, "rows classes"]:
    """Divide each row by its sum. Raises DataError unless the sum was 1 within 1e-3 and no entry negative."""
    block = block.astype(np.float64, copy=False)
    require_finite(block, rows, first, "give probabilities")
    remedy = "if these are log-probabilities, take their exponential"
    _require(block >= 0, block, "be probabilities", remedy, rows, first)
    mass = block.sum(axis=1)
    remedy = "divide each row by its sum, or apply softmax if these are logits"
    _require(np.abs(mass - 1.0) <= MASS_TOLERANCE, mass, "sum to 1 in every row", remedy, rows, first)
    return np.asarray(block / mass[:, None])


def to_top_k(lists: Sequence[NDArray[Any]], classes: int, targets: tuple[Rows, ...], first: int) -> TopK:
    """Return a teacher's lists as a target. Raises DataError for lists that are of no distribution over the classes."""
    indices = np.require(lists[0], np.int64, ["C", "W"])
    log_probs = np.require(lists[1], float_dtype(targets[1]), ["C", "W"])
    fillers = log_probs == -np.inf
    _require(~fillers.all(axis=1), log_probs, "list a class in each row", "drop the rows of -inf", targets[1], first)
    what, remedy = f"be classes from 0 to {classes - 1}", "give the number of classes, or lists over these"
    _require(fillers | ((indices >= 0) & (indices < classes)), indices, what, remedy, targets[0], first)
    named = np.where(fillers, -1 - np.arange(indices.shape[1]), indices)
    distinct = (np.diff(np.sort(named, axis=1)) != 0).all(axis=1)
    what, remedy = "name distinct classes in each row", "keep one of those that are the same"
    _require(distinct, indices, what, remedy, targets[0], first)
    with np.errstate(over="ignore"):
        mass = np.exp(log_probs, dtype=np.float64).sum(axis=1)
    what = "be natural log-probabilities with a mass of at most 1 a row"
    remedy = "take log_softmax over all classes before topk"
    _require(mass <= 1.0 + MASS_TOLERANCE, mass, what, remedy, targets[1], first)  # NaN is wrong too
    return TopK(torch.from_numpy(indices), torch.from_numpy(log_probs))


def _require(good: NDArray[np.bool_], values: NDArray[Any], what: str, remedy: str, rows: Rows, first: int) -> None:
    """Raise DataError for entries or rows that are not ``good``, with the value and the place of the first."""
    if not good.all():
        bad = np.argwhere(~good)
        place = tuple(bad[0].tolist())
        _refuse(values[place], place, len(bad), len(good), what, remedy, rows, first)


def _refuse(
    value: Any, place: tuple[int, ...], wrong: int, count: int, what: str, remedy: str, rows: Rows, first: int
) -> None:
    """Raise DataError for the first of the ``wrong`` entries or rows of a block of ``count`` rows."""
    name, start = locate(rows, first)
    entry, column = ("entry ", f", column {place[1]}") if len(place) == 2 else ("", "")
    shown = f"{value:g}" if isinstance(value, np.floating) else repr(value.tolist())
    count_of_wrong = f"1 {entry}" if wrong == 1 else f"{wrong} {entry.replace('entry', 'entries')}"
    verb = "is" if wrong == 1 else "are"
    raise DataError(
        f"{name} must {what}; {count_of_wrong}of rows {start} to {start + count - 1} {verb} wrong, the first, "
        f"{shown}, in row {start + place[0]}{column}: {remedy}"
    )


def index_labels(
    rows: Rows, bounds: Sequence[int], classes: tuple[Label, ...] | None = None, group: Group = ALONE
) -> tuple[tuple[Label, ...], Int64[np.ndarray, " rows"]]:
    """Return the classes, and the index among them of every row that these bounds enclose.

    The classes are the sorted distinct labels of all processes, as in scikit-learn, unless they are given.
    Raises DataError for entries that are no labels, a single class, or a label that is none of the given classes.
    """
    pieces: list[tuple[list[Label], NDArray[np.int64]]] = []
    distinct: dict[str, dict[Label, None]] = {}  # the labels by the name of their array
    with group.agreed():
        for start, piece in zip(bounds, rows.read(bounds), strict=False):
            name, _ = locate(rows, start)
            values, inverse = np.unique(_checked_labels(piece, name), return_inverse=True)
            labels = values.tolist()
            pieces.append((labels, inverse))
            distinct.setdefault(name, {}).update(dict.fromkeys(labels))
            if classes is not None and (unknown := set(labels).difference(classes)):
                known = np.array([label not in unknown for label in labels])[inverse]
                shown = ", ".join(map(repr, classes[:8])) + (", …" if len(classes) > 8 else "")
                remedy = "leave the target out, or fit a head to all classes"
                _require(known, piece, f"be labels of the head's {len(classes)} classes ({shown})", remedy, rows, start)
    if classes is None:
        texts = group.values([(name, list(labels)) for name, labels in distinct.items()])
        classes = _all_classes([named for text in texts for named in text])
    position = {label: index for index, label in enumerate(classes)}
    indices = [np.array([position[label] for label in labels], dtype=np.int64)[inverse] for labels, inverse in pieces]
    return classes, np.concatenate([np.empty(0, np.int64), *indices])


def _all_classes(named: Sequence[tuple[str, list[Label]]]) -> tuple[Label, ...]:
    """Return the sorted distinct labels of named arrays. Raises DataError for text beside numbers, or for one class."""
    kinds = [(name, "text" if isinstance(labels[0], str) else "numbers") for name, labels in named]
    first, expected = kinds[0]
    for name, kind in kinds:
        if kind != expected:
            raise DataError(f"{name} has {kind} for labels, and {first} has {expected}: convert one to the other")
    classes = tuple(sorted({label for _, labels in named for label in labels}))
    if len(classes) < 2:
        raise DataError(f"{first} has one class only, {classes[0]!r}; a softmax head needs two or more")
    return classes


def _checked_labels(labels: NDArray[Any], name: str) -> NDArray[Any]:
    if labels.dtype.kind in "iubU":
        return labels
    if labels.dtype.kind != "f":
        raise DataError(f"{name} has labels of dtype {labels.dtype}; they must be integers or strings: convert them")
    if not (np.isfinite(labels).all() and (labels == np.rint(labels)).all() and (np.abs(labels) < 2**53).all()):
        raise DataError(
            f"{name} is one-dimensional but not whole numbers; labels must be integers or strings, and "
            "distributions need shape (n, C)"
        )
    return labels.astype(np.int64)
