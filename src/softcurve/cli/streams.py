"""Standard streams that may be closed or full, and text that an encoding may lack."""

from __future__ import annotations

import io
import os
import sys
from typing import Any

from softcurve.fit import DataError

LONGEST_NAME = 48


def encoded(text: str) -> bytes:
    r"""Return the text in UTF-8, with an escape such as ``\udcff`` for a lone surrogate.

    Python decodes each byte of a file name that is not UTF-8 to a lone surrogate.
    """
    return text.encode("utf-8", "backslashreplace")


def encodable(text: str) -> str:
    """Return the text with escapes in place of lone surrogates."""
    return encoded(text).decode()


def shortened(name: str) -> str:
    """Return a name that is short enough for a table."""
    return name if len(name) <= LONGEST_NAME else name[: LONGEST_NAME - 1] + "…"


def use_standard_streams() -> None:
    """Name standard output in the error when it cannot be written, and drop what standard error cannot take."""
    for number, flags in enumerate((os.O_RDONLY, os.O_RDONLY, os.O_WRONLY)):
        try:
            os.fstat(number)
        except OSError:
            # Otherwise the next file that is opened gets this number, and with it whatever a library prints. Writing to
            # an output that is opened for reading fails.
            os.open(os.devnull, flags)
    sys.stdout, sys.stderr = _text(1, sys.stdout), _text(2, sys.stderr)
    sys.__stderr__ = sys.stderr  # type: ignore[misc]


def _text(number: int, replaced: Any) -> io.TextIOWrapper:
    # The run must not end at a class name with a letter that the encoding of the terminal lacks.
    encoding = getattr(replaced, "encoding", None) or "utf-8"
    raw = _StandardStream(number, "w", closefd=False)
    return io.TextIOWrapper(io.BufferedWriter(raw), encoding, "backslashreplace", line_buffering=True)


class _StandardStream(io.FileIO):
    """Standard output, which reports its first error only, or standard error, whose errors must not end a long fit."""

    failed = False

    def write(self, data: Any) -> int:
        try:
            return memoryview(data).nbytes if self.failed else super().write(data)
        except OSError as error:
            if self.fileno() == 2:
                return memoryview(data).nbytes
            self.failed = True
            if isinstance(error, BrokenPipeError):
                raise
            raise DataError(
                f"standard output cannot be written ({error.strerror}); redirect it to a place that takes it"
            ) from error
