"""Errors of the decoders of damaged files, as one message."""

from __future__ import annotations

import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from softcurve.fit import DataError
from softcurve.fit.system_errors import out_of_memory, unusable

__all__ = ["check_file", "decoding"]


def check_file(path: Path, argument: str) -> None:
    """Raise DataError unless there is a file at ``path`` with something in it."""
    try:
        status = path.stat()
    except (FileNotFoundError, NotADirectoryError) as error:
        raise DataError(f"{argument}: there is no file {path}; check the path") from error
    except OSError as error:
        raise unusable(argument, path, "read", error) from error
    if not stat.S_ISREG(status.st_mode):
        raise DataError(f"{argument}: {path} is not a file; give the path of a file")
    if status.st_size == 0:
        raise DataError(f"{argument}: {path} is empty (0 bytes); write it again")


@contextmanager
def decoding(path: Path, argument: str, kind: str) -> Iterator[None]:
    """Turn every error of the block into a DataError that says that ``path`` cannot be read as ``kind``, and why."""
    try:
        yield
    except (DataError, ImportError):
        raise
    except Exception as error:  # the decoders raise what they like on a damaged file
        if isinstance(error, OSError) and error.errno:
            raise unusable(argument, path, "read", error) from error
        if (missing := out_of_memory(error)) is not None:
            reason = f"{missing}; store it as .npy, .safetensors or .parquet, which are read block by block"
        elif any(word in str(error) for word in ("allow_pickle", "pickled", "Python objects")):
            reason = "it is none, or holds pickled objects, which are never loaded; save numbers or text"
        else:
            first = (str(error).strip() or type(error).__name__).splitlines()[0]
            reason = f"{first.rstrip('.')}; write it again"
        raise DataError(f"{argument}: {path} cannot be read as {kind}: {reason}") from error
