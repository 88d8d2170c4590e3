"""Sources by their names on the command line: the word ``digits``, a file, or a directory of shards."""

from __future__ import annotations

import os
import re
from dataclasses import replace
from pathlib import Path

from softcurve.files.errors import refuse_pickle, unusable
from softcurve.fit import DataError
from softcurve.fit.data.dataset import DEFAULT_KEYS, ArrayRows, Dataset, Keys, join
from softcurve.fit.data.files.arrays import npy_rows, npz_dataset, safetensors_dataset
from softcurve.fit.data.files.csv_file import csv_dataset
from softcurve.fit.data.files.parquet import parquet_dataset
from softcurve.fit.data.files.sparse import svmlight_datasets
from softcurve.fit.data.row_source import RowSource, assemble
from softcurve.fit.data.source import Label
from softcurve.fit.group import ALONE, Group

SVMLIGHT = (".svmlight", ".libsvm", ".svm")
SUFFIXES = (".npz", ".npy", ".safetensors", ".parquet", ".csv", *SVMLIGHT)


def open_source(
    data: str, target: Path | None = None, *, keys: Keys = DEFAULT_KEYS, class_count: int | None = None,
    group: Group = ALONE,
) -> RowSource:  # fmt: skip
    """Open rows with targets to fit a head to: the word ``digits``, a file, or a directory of shards.

    ``target``, an .npy file, takes the place of the targets in ``data``, and ``keys`` names the arrays there.
    ``class_count`` is that of a teacher's lists, by default the largest index and one. Of several processes ``group``,
    each has a share of the rows, which follow one another, and reads no others. Raises DataError.
    """
    with group.agreed():
        dataset = _open(data, target, keys)
        if not dataset.targets:
            raise DataError(f"data: {data} has no targets ({dataset.absent}); give them in an .npy file by --target")
    return assemble(dataset, class_count=class_count, group=group)


def open_source_for(
    data: str, classes: tuple[Label, ...], width: int, target: Path | None = None, *, keys: Keys = DEFAULT_KEYS
) -> RowSource:
    """Open rows for a head of this width, with or without targets, which are in terms of its classes.

    Raises DataError, also for a label that is none of the classes.
    """
    dataset = _open(data, target, keys, width)
    dataset.check()
    name, columns = dataset.features.name, dataset.features.shape[1]
    if columns != width:
        raise DataError(f"{name} must have {width} columns, as the features that the head was fitted to; got {columns}")
    return assemble(dataset, classes=classes)


def _open(data: str, target: Path | None, keys: Keys, width: int | None = None) -> Dataset:
    path = Path(data)
    if target is not None and keys.target is not None:
        raise DataError(f"--target-key: the target is in {target} (--target); leave {keys.target!r} out")
    if data == "digits":
        keys.require_none("digits")
        from sklearn.datasets import load_digits

        digits = load_digits()
        features = ArrayRows(digits.data / 16.0, "features of digits")
        dataset = Dataset(features, (ArrayRows(digits.target, "target of digits"),))
    elif os.path.isdir(path) and path.suffix.lower() not in SUFFIXES:
        dataset = _open_directory(path, target, keys, width)
    else:
        dataset = _open_file(path, keys, with_target=target is None, width=width)
    if target is None:
        return dataset
    refuse_pickle("target", target, "write its content as .npy: numpy.save('target.npy', target)")
    if target.suffix.lower() != ".npy":
        raise DataError(f"target: {target} must be an .npy file (numpy.save); put other formats into data")
    return replace(dataset, targets=(npy_rows(target, "target", f"target {target}"),))


def _open_file(path: Path, keys: Keys, *, with_target: bool, held: bool = True, width: int | None = None) -> Dataset:
    """Open a file whose suffix tells its format; ``held`` keeps the arrays of an .npz in memory.

    ``width`` is the number of features, which an svmlight file does not tell.
    """
    suffix = path.suffix.lower()
    if suffix == ".npz":
        return npz_dataset(path, with_target, keys, held=held)
    if suffix == ".npy":
        keys.require_none(str(path))
        return Dataset(npy_rows(path, "data", str(path)), absent="it is one array")
    if suffix == ".safetensors":
        return safetensors_dataset(path, with_target, keys)
    if suffix == ".parquet":
        return parquet_dataset(path, with_target, keys)
    if suffix == ".csv":
        return csv_dataset(path, with_target, keys)
    if suffix in SVMLIGHT:
        keys.require_none(str(path))
        return svmlight_datasets([path], with_target, width)[0]
    refuse_pickle("data", path, "write its content as .npz: numpy.savez('data.npz', features=features, target=target)")
    raise DataError(
        f"data: {path} has {f'suffix {path.suffix!r}' if suffix else 'no suffix'}; it must be the word digits or a "
        f"file that ends in {', '.join(SUFFIXES)}, or a directory of such files"
    )


def _open_directory(directory: Path, target: Path | None, keys: Keys, width: int | None) -> Dataset:
    """Open all shards in a directory but ``target``, in the order of their names, ``shard-2`` before ``shard-10``."""
    excluded = None if target is None else os.path.realpath(target)
    paths = sorted((path for path in shards_in(directory) if os.path.realpath(path) != excluded), key=_natural)
    if not paths:
        raise DataError(f"data: the directory {directory} has no files that end in {', '.join(SUFFIXES)}")
    formats = sorted({path.suffix.lower() for path in paths})
    if len(formats) > 1:
        raise DataError(
            f"data: the directory {directory} has shards in several formats, {', '.join(formats)}; keep one"
        )
    with_target = target is None
    if formats[0] in SVMLIGHT:  # all of which tell the number of columns
        keys.require_none(str(directory))
        shards = svmlight_datasets(paths, with_target, width)
    else:
        shards = [_open_file(path, keys, with_target=with_target, held=False) for path in paths]
    return join(shards, f"data: {directory} with its {len(shards)} shards")


def shards_in(directory: Path) -> list[Path]:
    """Return the shards of a directory in any order, also links; hidden files and other suffixes are no shards."""
    try:
        paths = list(directory.iterdir())
    except OSError as error:
        raise unusable("data", directory, "read", error) from error
    # A link that leads nowhere stays, to be refused: rows must not be left out in silence.
    return [path for path in paths if _is_shard_name(path) and not os.path.isdir(path)]


def is_shard_of(path: Path, directory: Path) -> bool:
    """Whether a file at ``path``, or where a link at ``path`` leads, would be one of the shards in a directory."""
    folder = os.path.realpath(directory)
    places = path, Path(os.path.realpath(path))
    return os.path.isdir(folder) and any(
        _is_shard_name(place) and os.path.realpath(place.parent) == folder for place in places
    )


def _is_shard_name(path: Path) -> bool:
    return path.suffix.lower() in SUFFIXES and not path.name.startswith(".")


def _natural(path: Path) -> tuple[list[tuple[int, str]], str]:
    """Order numbers in a name by their value; equal ones, such as 1 and 01, as they are written."""
    pieces = re.split(r"(\d+)", path.name)
    return [(int(piece), "") if piece.isdecimal() else (-1, piece) for piece in pieces], path.name
