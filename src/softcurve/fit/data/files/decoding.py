"""What decoders raise on a damaged file, as one message."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from softcurve.fit import DataError

__all__ = ["check_file", "decoding"]


def check_file(path: Path, argument: str) -> None:
    """Raise DataError unless there is a file at ``path`` with something in it."""
    if not path.exists():
        raise DataError(f"{argument}: there is no file {path}; check the path")
    if not path.is_file():
        raise DataError(f"{argument}: {path} is not a file; give the path of a file")
    if path.stat().st_size == 0:
        raise DataError(f"{argument}: {path} is empty (0 bytes); write it again")


@contextmanager
def decoding(path: Path, argument: str, kind: str) -> Iterator[None]:
    """Whatever is raised within becomes a DataError that says that ``path`` cannot be read as ``kind``, and why."""
    try:
        yield
    except (DataError, ImportError):
        raise
    except PermissionError as error:
        raise DataError(f"{argument}: {path} may not be read; change its permissions") from error
    except Exception as error:  # the decoders raise what they like on a damaged file
        if "allow_pickle" in str(error) or "pickled" in str(error):
            reason = "it is none, or holds pickled objects, which are never loaded; save numbers or text"
        else:
            first = (str(error).strip() or type(error).__name__).splitlines()[0]
            reason = f"{first.rstrip('.')}; write it again"
        raise DataError(f"{argument}: {path} cannot be read as {kind}: {reason}") from error
