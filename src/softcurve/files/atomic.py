"""Output files that are replaced together: all are written as part files in the same folders, and then renamed."""

from __future__ import annotations

import io
import os
import shutil
import stat
import uuid
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

from softcurve.files import DataError
from softcurve.files.errors import unusable


@contextmanager
def replacing(path: Path, argument: str = "path") -> Iterator[BinaryIO]:
    """Replace one output as :func:`replacing_all` does; errors name it by ``argument``."""
    with replacing_all({argument: path}) as files:
        yield files[argument]


@contextmanager
def replacing_all(outputs: Mapping[str, Path]) -> Iterator[dict[str, BinaryIO]]:
    """Yield a binary file for each output, by its argument; all replace the outputs if the block ends without an error.

    Otherwise the files at all paths stay as they were. A symbolic link is followed, not replaced, and the permissions
    of a file that is replaced are kept. Raises DataError that names the argument and the path of an output that cannot
    be written.
    """
    with ExitStack() as discarded:
        parts = [_PartFile(argument, path, discarded) for argument, path in outputs.items()]
        files: dict[str, BinaryIO] = {part.argument: io.BufferedWriter(part) for part in parts}
        yield files
        for part in parts:
            with _named_errors(part.argument, part.path):
                files[part.argument].flush()
                os.fsync(part.fileno())
                files[part.argument].close()
        with ExitStack() as undone:  # if one output cannot be renamed, the others must not be replaced either
            for part in parts:
                undone.callback(part.undo)
                part.rename()
            undone.pop_all()


def check_writable(path: Path, argument: str) -> None:
    """Raise DataError where ``replacing(path)`` would fail, before any work is done."""
    place = Path(os.path.realpath(path))
    with _named_errors(argument, path):
        try:
            mode = os.stat(path).st_mode
        except (FileNotFoundError, NotADirectoryError):
            mode = stat.S_IFREG
    if stat.S_ISDIR(mode):
        raise DataError(f"{argument}: {path} is a folder; give the name of a file in it")
    if not stat.S_ISREG(mode):
        raise DataError(f"{argument}: {path} is not a regular file; give another name")
    if not os.path.isdir(place.parent):
        folder = place.parent if os.path.islink(path) else path.parent
        raise DataError(f"{argument}: there is no folder {folder}; create it first or give another path")
    with _named_errors(argument, path):
        part = _part_name(place)
        part.touch(exist_ok=False)
        part.unlink()


class _PartFile(io.FileIO):
    """The new file, in the folder of an output, that becomes it; ``discarded`` removes the file if it does not."""

    def __init__(self, argument: str, path: Path, discarded: ExitStack) -> None:
        self.argument, self.path, self.place = argument, path, Path(os.path.realpath(path))
        self.part, self.old = _part_name(self.place), _part_name(self.place)
        self.new = not os.path.lexists(self.place)
        # A file that only some may read must not be readable by others while it is written.
        mode = 0o666 if self.new else 0o600
        with _named_errors(argument, path):
            super().__init__(self.part, "x", opener=lambda name, flags: os.open(name, flags, mode))
        discarded.callback(self.discard)
        if not self.new:
            with suppress(OSError):  # only root can give a file to another user
                os.chown(self.part, (status := os.stat(self.place)).st_uid, status.st_gid)
            with suppress(OSError):  # the file system may have no permissions
                shutil.copystat(self.place, self.part)

    def write(self, data: Any) -> int:
        with _named_errors(self.argument, self.path):
            return super().write(data)

    def rename(self) -> None:
        """Rename the part file to the output, and keep a second name of the file that it replaces for :meth:`undo`."""
        with suppress(OSError):  # there is no file, or the file system has no hard links
            os.link(self.place, self.old)
        with _named_errors(self.argument, self.path):
            self.part.replace(self.place)

    def undo(self) -> None:
        with suppress(OSError):
            if self.old.exists():
                self.old.replace(self.place)
            elif self.new and not self.part.exists():
                self.place.unlink()

    def discard(self) -> None:
        """Remove the files that have not become the output."""
        with suppress(OSError):
            self.close()  # not the buffer, which would try to write again
        for name in (self.part, self.old):
            with suppress(OSError):
                name.unlink(missing_ok=True)


@contextmanager
def _named_errors(argument: str, path: Path) -> Iterator[None]:
    """Raise an OSError within the block as a DataError that names the output."""
    try:
        yield
    except OSError as error:
        raise unusable(argument, path, "written", error) from error


def _part_name(place: Path) -> Path:
    """Return a hidden name in the same folder, short enough wherever the name of the output is."""
    return place.with_name(f".softcurve-{uuid.uuid4().hex[:12]}.part")
