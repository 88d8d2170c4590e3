"""Sources by their names on the command line: a word, a file or a directory."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

from softcurve.fit import DataError
from softcurve.fit.data.dataset import Dataset
from softcurve.fit.data.files.arrays import npy_rows
from softcurve.fit.data.files.shards import SUFFIXES, open_directory, open_file
from softcurve.fit.data.row_source import RowSource, assemble
from softcurve.fit.data.rows import ArrayRows
from softcurve.fit.data.source import Label
from softcurve.fit.group import ALONE
from softcurve.fit.group import Group as Group

__all__ = ["open_source", "open_source_for"]


def open_source(
    data: str, target: Path | None = None, *, class_count: int | None = None, group: Group = ALONE
) -> RowSource:
    """Open rows with targets to fit a head to: the word ``digits``, a file, or a directory of shards.

    ``target``, an .npy file, takes the place of the targets in ``data``. ``class_count`` is that of a teacher's lists,
    by default the largest index and one. Of several processes ``group``, each has a share of the rows, which follow
    one another, and reads no others. Raises DataError.
    """
    with group.agreed():
        dataset = _open(data, target)
        if not dataset.targets:
            raise DataError(f"data: {data} has no targets ({dataset.absent}); give them in an .npy file as target")
    return assemble(dataset, class_count=class_count, group=group)


def open_source_for(data: str, classes: tuple[Label, ...], width: int, target: Path | None = None) -> RowSource:
    """Open rows for a head of this width, with or without targets, which are in terms of its classes.

    Raises DataError, also for a label that is none of the classes.
    """
    dataset = _open(data, target)
    dataset.check()
    name, columns = dataset.features.name, dataset.features.shape[1]
    if columns != width:
        raise DataError(f"{name} must have {width} columns, as the features that the head was fitted to; got {columns}")
    return assemble(dataset, classes=classes)


def _open(data: str, target: Path | None) -> Dataset:
    path = Path(data)
    if data == "digits":
        dataset = _digits()
    elif os.path.isdir(path) and path.suffix.lower() not in SUFFIXES:
        dataset = open_directory(path, with_target=target is None, without=target)
    else:
        dataset = open_file(path, with_target=target is None)
    if target is None:
        return dataset
    if target.suffix.lower() != ".npy":
        raise DataError(f"target: {target} must be an .npy file (numpy.save); put other formats into data")
    return replace(dataset, targets=(npy_rows(target, "target", f"target {target}"),))


def _digits() -> Dataset:
    from sklearn.datasets import load_digits

    digits = load_digits()
    features = ArrayRows(digits.data / 16.0, "features of digits")
    return Dataset(features, (ArrayRows(digits.target, "target of digits"),))
