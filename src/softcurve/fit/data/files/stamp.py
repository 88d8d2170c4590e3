"""A file as it was when it was opened: it must stay so from one walk over its rows to the next."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from softcurve.fit import DataError
from softcurve.fit.data.columns import PIECE, places
from softcurve.fit.system_errors import unusable

__all__ = ["Stamp"]


@dataclass(frozen=True)
class Stamp:
    """Path, size and time of the last change; ``argument`` is what errors call the file."""

    path: Path
    size: int
    changed: int
    argument: str = "data"

    @classmethod
    def of(cls, path: Path, argument: str = "data") -> Stamp:
        """The file as it is now. Raises DataError where there is none."""
        try:
            found = path.stat()
        except OSError as error:
            raise unusable(argument, path, "opened", error) from error
        return cls(path, found.st_size, found.st_mtime_ns, argument)

    def check(self) -> None:
        """Raise DataError where the file is no longer as it was."""
        now = Stamp.of(self.path, self.argument)
        if now != self:
            size = f"{now.size} bytes, {self.size} before" if now.size != self.size else f"still {now.size} bytes"
            raise DataError(
                f"{self.argument}: {self.path} has changed since it was opened ({size}); leave it as it is and "
                "start again"
            )

    @contextmanager
    def opened(self) -> Iterator[BinaryIO]:
        """The file for reading at any place, unbuffered; checked before and, where all went well, after."""
        self.check()
        try:
            file = self.path.open("rb", buffering=0)
        except OSError as error:
            raise unusable(self.argument, self.path, "opened", error) from error
        with file:
            yield file
        self.check()

    def digest(self, most: int, offset: int = 0, length: int | None = None) -> bytes:
        """Of the length and of the bytes from ``offset`` on: of all, or of ``most`` of them, spread over all."""
        length = self.size - offset if length is None else length
        state = hashlib.sha256(str(length).encode())
        with self.opened() as file:
            for place, count in places(length, most, PIECE):
                file.seek(offset + place, os.SEEK_SET)
                state.update(file.read(count))
        return state.digest()
