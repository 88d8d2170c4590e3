"""A file, or a directory of files, as the parts of a source."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path

from softcurve.fit import DataError
from softcurve.fit.data.columns import Part
from softcurve.fit.data.files.npy import npy_column
from softcurve.fit.data.files.npz import npz_part
from softcurve.fit.data.files.parquet import parquet_part
from softcurve.fit.data.files.safetensors import safetensors_part
from softcurve.fit.system_errors import unusable

__all__ = ["SUFFIXES", "directory_parts", "file_part", "is_shard_of", "shards_in"]

SUFFIXES = (".npz", ".npy", ".safetensors", ".parquet")


def file_part(path: Path, *, with_target: bool, held: bool = True) -> Part:
    """The rows of a file whose suffix tells its format; ``held`` keeps those of an .npz in memory. Raises DataError."""
    readers: dict[str, Callable[[Path, bool], Part]] = {
        ".npz": partial(npz_part, held=held),
        ".npy": lambda path, _: Part(npy_column(path, "data", str(path)), absent="it is one array"),
        ".safetensors": safetensors_part,
        ".parquet": parquet_part,
    }
    reader = readers.get(path.suffix.lower())
    if reader is None:
        kind = f"suffix {path.suffix!r}" if path.suffix else "no suffix"
        raise DataError(
            f"data: {path} has {kind}; it must be the word digits or a file that ends in {', '.join(readers)}, or a "
            "directory of such files"
        )
    return reader(path, with_target)


def directory_parts(directory: Path, *, with_target: bool, without: Path | None = None) -> list[Part]:
    """The rows of all files of one format in a directory, by name, ``shard-2`` before ``shard-10``.

    Hidden files, folders, files of other suffixes and the file ``without`` are no shards. Raises DataError.
    """
    target = None if without is None else os.path.realpath(without)
    found = [path for path in shards_in(directory) if os.path.realpath(path) != target]
    if not found:
        raise DataError(f"data: the directory {directory} has no files that end in {', '.join(SUFFIXES)}")
    formats = sorted({path.suffix.lower() for path in found})
    if len(formats) > 1:
        raise DataError(
            f"data: the directory {directory} has shards in several formats, {', '.join(formats)}; keep one"
        )
    return [file_part(path, with_target=with_target, held=False) for path in sorted(found, key=_natural)]


def shards_in(directory: Path) -> list[Path]:
    """The shards of a directory, links to files elsewhere among them, in any order. Raises DataError."""
    try:
        found = list(directory.iterdir())
    except OSError as error:
        raise unusable("data", directory, "read", error) from error
    # A link that leads nowhere stays, to be refused: rows must not be left out in silence.
    return [path for path in found if _is_shard_name(path) and not os.path.isdir(path)]


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
    """Numbers in a name by their value; equal ones, such as 1 and 01, as they are written."""
    pieces = re.split(r"(\d+)", path.name)
    return [(int(piece), "") if piece.isdecimal() else (-1, piece) for piece in pieces], path.name
