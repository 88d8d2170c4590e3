"""What the command line opens: a word, a file or a directory becomes a source."""

from __future__ import annotations

import os
from dataclasses import replace
from itertools import accumulate
from pathlib import Path

from softcurve.fit import DataError
from softcurve.fit.data.column_source import ColumnSource, assemble
from softcurve.fit.data.columns import ArrayColumn, Part
from softcurve.fit.data.files.npy import npy_column
from softcurve.fit.data.files.shards import SUFFIXES, directory_parts, file_part
from softcurve.fit.data.source import Label
from softcurve.fit.group import ALONE
from softcurve.fit.group import Group as Together

__all__ = ["open_source", "open_source_for"]


def open_source(
    data: str, target: Path | None = None, *, class_count: int | None = None, together: Together = ALONE
) -> ColumnSource:
    """Rows with targets to fit a head to: the word ``digits``, a file, or a directory of shards.

    ``target``, an .npy file, takes the place of the targets in ``data``. ``class_count`` is that of a teacher's lists,
    by default the largest index and one. Of several processes ``together``, each has a share of the rows, which follow
    one another, and reads no others. Raises DataError.
    """
    with together.agreed():
        parts, held = _parts(data, target)
        if all(part.target is None and part.lists is None for part in parts):
            raise DataError(f"data: {data} has no targets ({parts[0].absent}); give them in an .npy file as target")
    return assemble(parts, class_count=class_count, in_memory=held, together=together)


def open_source_for(data: str, classes: tuple[Label, ...], width: int, target: Path | None = None) -> ColumnSource:
    """Rows for a head of this width, with or without targets, which are in terms of its classes.

    Raises DataError, also for a label that is none of the classes.
    """
    parts, held = _parts(data, target)
    for part in parts:
        shape = part.features.shape
        if len(shape) == 2 and 0 not in shape and shape[1] != width:
            raise DataError(
                f"{part.features.name} must have {width} columns, as the features that the head was fitted to; "
                f"got {shape[1]}"
            )
    return assemble(parts, classes=classes, in_memory=held)


def _parts(data: str, target: Path | None) -> tuple[list[Part], bool]:
    """The parts, and whether they are in memory."""
    path = Path(data)
    if data == "digits":
        parts = [_digits()]
    elif os.path.isdir(path) and path.suffix.lower() not in SUFFIXES:
        parts = directory_parts(path, with_target=target is None, without=target)
    else:
        parts = [file_part(path, with_target=target is None)]
    if target is not None:
        parts = _with_target(parts, data, target)
    columns = [column for part in parts for column in (part.features, part.target, *(part.lists or ()))]
    return parts, all(column is None or isinstance(column, ArrayColumn) for column in columns)


def _with_target(parts: list[Part], data: str, target: Path) -> list[Part]:
    if target.suffix.lower() != ".npy":
        raise DataError(f"target: {target} must be an .npy file (numpy.save); put other formats into data")
    column = npy_column(target, "target", f"target {target}")
    if len(parts) == 1:
        return [replace(parts[0], target=column, lists=None)]
    firsts = list(accumulate((part.rows for part in parts), initial=0))
    if not column.shape or column.shape[0] != firsts[-1]:
        shape = f"{column.shape[0]} rows" if column.shape else "a single value"
        raise DataError(
            f"data: {data} has {firsts[-1]} rows in {len(parts)} shards but {column.name} has {shape}; "
            "give one target a row"
        )
    return [replace(part, target=column, lists=None, first=first) for part, first in zip(parts, firsts, strict=False)]


def _digits() -> Part:
    from sklearn.datasets import load_digits

    digits = load_digits()
    return Part(ArrayColumn(digits.data / 16.0, "features of digits"), ArrayColumn(digits.target, "target of digits"))
