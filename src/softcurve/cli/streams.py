"""The standard streams of a command, of which each may be closed, or lead to a disk that is full."""

from __future__ import annotations

import io
import os
import sys
from typing import Any

from softcurve.fit import DataError

__all__ = ["use_standard_streams"]


def use_standard_streams() -> None:
    """Make an error of writing to standard output one that names it, and drop what standard error does not take."""
    for number, flags in enumerate((os.O_RDONLY, os.O_RDONLY, os.O_WRONLY)):
        try:
            os.fstat(number)
        except OSError:
            # Or else the next file that is opened gets the number, and with it all that libraries print. Writing to
            # an output that is opened for reading fails.
            os.open(os.devnull, flags)
    sys.stdout = _text(_Output(1, "w", closefd=False), sys.stdout)
    sys.stderr = sys.__stderr__ = _text(_Messages(2, "w", closefd=False), sys.stderr)  # type: ignore[misc]


def _text(raw: io.FileIO, replaced: Any) -> io.TextIOWrapper:
    # A class name must not end the run on a terminal whose encoding lacks a letter of it.
    encoding = getattr(replaced, "encoding", None) or "utf-8"
    return io.TextIOWrapper(io.BufferedWriter(raw), encoding, "backslashreplace", line_buffering=True)


class _Output(io.FileIO):
    """Standard output. After one error nothing more is written: the error has been said."""

    failed = False

    def write(self, data: Any) -> int:
        if self.failed:
            return memoryview(data).nbytes
        try:
            return super().write(data)
        except OSError as error:
            self.failed = True
            if isinstance(error, BrokenPipeError):
                raise
            raise DataError(
                f"standard output cannot be written ({error.strerror}); redirect it to a place that takes it"
            ) from error


class _Messages(io.FileIO):
    """Standard error. That it cannot be written could only be said there, and is no reason to end a long fit."""

    def write(self, data: Any) -> int:
        try:
            return super().write(data)
        except OSError:
            return memoryview(data).nbytes
