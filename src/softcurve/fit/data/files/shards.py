"""A file, or a directory of files, opened as a dataset."""

from __future__ import annotations

import os
import re
from pathlib import Path

from softcurve.fit import DataError
from softcurve.fit.data.dataset import Dataset, join
from softcurve.fit.data.files.arrays import npy_rows, npz_dataset, safetensors_dataset
from softcurve.fit.data.files.parquet import parquet_dataset
from softcurve.fit.system_errors import unusable

__all__ = ["SUFFIXES", "is_shard_of", "open_directory", "open_file", "shards_in"]

SUFFIXES = (".npz", ".npy", ".safetensors", ".parquet")


def open_file(path: Path, *, with_target: bool, held: bool = True) -> Dataset:
    """Open a file whose suffix tells its format; ``held`` keeps the arrays of an .npz in memory. Raises DataError."""
    suffix = path.suffix.lower()
    if suffix == ".npz":
        return npz_dataset(path, with_target, held=held)
    if suffix == ".npy":
        return Dataset(npy_rows(path, "data", str(path)), absent="it is one array")
    if suffix == ".safetensors":
        return safetensors_dataset(path, with_target)
    if suffix == ".parquet":
        return parquet_dataset(path, with_target)
    raise DataError(
        f"data: {path} has {f'suffix {path.suffix!r}' if suffix else 'no suffix'}; it must be the word digits or a "
        f"file that ends in {', '.join(SUFFIXES)}, or a directory of such files"
    )


def open_directory(directory: Path, *, with_target: bool, without: Path | None = None) -> Dataset:
    """Open all files of one format in a directory, in the order of their names, ``shard-2`` before ``shard-10``.

    Hidden files, folders, files of other suffixes and the file ``without`` are no shards. Raises DataError.
    """
    excluded = None if without is None else os.path.realpath(without)
    paths = sorted((path for path in shards_in(directory) if os.path.realpath(path) != excluded), key=_natural)
    if not paths:
        raise DataError(f"data: the directory {directory} has no files that end in {', '.join(SUFFIXES)}")
    formats = sorted({path.suffix.lower() for path in paths})
    if len(formats) > 1:
        raise DataError(
            f"data: the directory {directory} has shards in several formats, {', '.join(formats)}; keep one"
        )
    shards = [open_file(path, with_target=with_target, held=False) for path in paths]
    return join(shards, f"data: {directory} with its {len(shards)} shards")


def shards_in(directory: Path) -> list[Path]:
    """Return the shards of a directory in any order, links to files elsewhere among them. Raises DataError."""
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
