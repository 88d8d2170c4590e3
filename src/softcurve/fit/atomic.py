"""Files that are either whole or not there: written beside their place, then renamed."""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from softcurve.fit import DataError
from softcurve.fit.data.files.shards import is_shard_of

__all__ = ["check_output", "check_writable", "replacing"]


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """Give a binary file that takes the place of ``path`` once the block has ended without an error.

    Otherwise whatever stood at ``path`` stands there still. A symbolic link is followed, not replaced.
    """
    place = Path(os.path.realpath(path))
    part = _beside(place)
    try:
        with part.open("xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        part.replace(place)
    except BaseException:
        part.unlink(missing_ok=True)
        raise


def check_writable(path: Path, argument: str) -> None:
    """Raise DataError where ``replacing(path)`` would fail, so that no work is done for nothing."""
    place = Path(os.path.realpath(path))
    if place.is_dir():
        raise DataError(f"{argument}: {path} is a folder; give the name of a file in it")
    if place.exists() and not place.is_file():
        raise DataError(f"{argument}: {path} is not a regular file; give another name")
    if not place.parent.is_dir():
        raise DataError(f"{argument}: there is no folder {path.parent}; create it first or give another path")
    part = _beside(place)
    try:
        part.touch(exist_ok=False)
        part.unlink()
    except OSError as error:
        raise DataError(
            f"{argument}: {path} cannot be written ({error.strerror}); give a path in a folder that can be"
        ) from error


def check_output(out: Path, *inputs: str | Path | None, option: str = "--out") -> None:
    """As ``check_writable``, for an ``option`` that must not be an input or become a shard of one."""
    check_writable(out, option)
    place = out.resolve()
    for given in inputs:
        if given is not None and Path(given).resolve() == place:
            raise DataError(f"{option}: {out} is also an input; give another name")
        if given is not None and is_shard_of(out, Path(given)):
            raise DataError(f"{option}: {out} would be one of the shards in {given}; give a path elsewhere")


def _beside(place: Path) -> Path:
    return place.with_name(f".{place.name}.{uuid.uuid4().hex[:12]}.part")
