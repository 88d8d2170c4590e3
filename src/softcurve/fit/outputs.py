"""Checks of the output files of a command before any work is done."""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import suppress
from itertools import combinations
from pathlib import Path

from softcurve.files import DataError
from softcurve.files.atomic import check_writable
from softcurve.fit.data.opening import is_shard_of, shards_in


def check_outputs(
    outputs: Mapping[str, Path], inputs: Mapping[str, str | Path | None], *, overwrite: bool = True
) -> None:
    """Check outputs as :func:`check_writable` does, and that they are different files, and neither inputs nor shards.

    Without ``overwrite`` they must not exist.

    Both mappings are by argument. Names of the same file are compared through symbolic and hard links.
    """
    for option, out in outputs.items():
        check_writable(out, option)
        for argument, path in inputs.items():
            if path is None:
                continue
            if _same_file(Path(path), out):
                raise DataError(f"{option}: {out} is also an input ({argument}); give another name")
            if not os.path.isdir(path):
                continue
            if is_shard_of(out, Path(path)) or any(_same_file(shard, out) for shard in shards_in(Path(path))):
                raise DataError(
                    f"{option}: {out} would be one of the shards in {path} ({argument}); give a path elsewhere"
                )
    for (earlier, first), (option, out) in combinations(outputs.items(), 2):
        if _same_file(first, out):
            raise DataError(f"{option}: {out} is also an output ({earlier}); give another name")
    if not overwrite:
        require_new(outputs)


def require_new(outputs: Mapping[str, Path]) -> None:
    """Raise DataError for the first output that exists."""
    for option, out in outputs.items():
        if os.path.lexists(out):
            raise DataError(f"{option}: {out} exists already; give another path, or --overwrite to replace it")


def _same_file(first: Path, second: Path) -> bool:
    """Return whether both names lead to the same file, or would if it existed."""
    with suppress(OSError):
        if os.path.samefile(first, second):
            return True
    return os.path.realpath(first) == os.path.realpath(second)
