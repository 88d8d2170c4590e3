"""Output files that are either whole or as before: all are written beside their places, then all are renamed."""

from __future__ import annotations

import io
import os
import shutil
import stat
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from itertools import combinations
from pathlib import Path
from typing import Any, BinaryIO

from softcurve.fit import DataError
from softcurve.fit.data.files.shards import is_shard_of, shards_in
from softcurve.fit.system_errors import unusable

__all__ = ["check_outputs", "check_writable", "replacing", "replacing_all"]


@contextmanager
def replacing(path: Path, argument: str = "path") -> Iterator[BinaryIO]:
    """As :func:`replacing_all` for a single output, which errors call ``argument``."""
    with replacing_all({argument: path}) as files:
        yield files[argument]


@contextmanager
def replacing_all(outputs: Mapping[str, Path]) -> Iterator[dict[str, BinaryIO]]:
    """Give a binary file for each output, by its argument. All take their places when the block ends without an error.

    Otherwise whatever stood at any of the paths stands there still. A symbolic link is followed, not replaced, and the
    permissions of a file that is replaced are kept. Raises DataError that names the argument and the path of an output
    that cannot be written.
    """
    with ExitStack() as discarded:
        written: list[_Output] = []
        for argument, path in outputs.items():
            written.append(_Output(argument, path))
            discarded.callback(written[-1].discard)
        yield {output.argument: output.file for output in written}
        for output in written:
            output.finish()
        _rename_all(written)


def check_writable(path: Path, argument: str) -> None:
    """Raise DataError where ``replacing(path)`` would fail, so that no work is done for nothing."""
    place = Path(os.path.realpath(path))
    try:
        mode = os.stat(path).st_mode
    except (FileNotFoundError, NotADirectoryError):
        mode = stat.S_IFREG
    except OSError as error:
        raise unusable(argument, path, "written", error) from error
    if stat.S_ISDIR(mode):
        raise DataError(f"{argument}: {path} is a folder; give the name of a file in it")
    if not stat.S_ISREG(mode):
        raise DataError(f"{argument}: {path} is not a regular file; give another name")
    if not os.path.isdir(place.parent):
        folder = place.parent if os.path.islink(path) else path.parent
        raise DataError(f"{argument}: there is no folder {folder}; create it first or give another path")
    part = _beside(place)
    try:
        part.touch(exist_ok=False)
        part.unlink()
    except OSError as error:
        raise unusable(argument, path, "written", error) from error


def check_outputs(outputs: Mapping[str, Path], inputs: Mapping[str, str | Path | None]) -> None:
    """As :func:`check_writable` for outputs that must be different files, no inputs and no shards of one.

    Both are given by the arguments that name them. Two names of one file are found, whatever links lead to it.
    """
    for option, out in outputs.items():
        check_writable(out, option)
        for argument, given in inputs.items():
            if given is not None:
                _refuse_input(option, out, argument, Path(given))
    for (earlier, first), (option, out) in combinations(outputs.items(), 2):
        if _same_file(first, out):
            raise DataError(f"{option}: {out} is also an output ({earlier}); give another name")


def _refuse_input(option: str, out: Path, argument: str, given: Path) -> None:
    if _same_file(given, out):
        raise DataError(f"{option}: {out} is also an input ({argument}); give another name")
    if not os.path.isdir(given):
        return
    if is_shard_of(out, given) or any(_same_file(shard, out) for shard in shards_in(given)):
        raise DataError(f"{option}: {out} would be one of the shards in {given} ({argument}); give a path elsewhere")


def _same_file(first: Path, second: Path) -> bool:
    """Whether both names lead to one file, through symbolic or hard links; or would, if it were there."""
    if os.path.realpath(first) == os.path.realpath(second):
        return True
    try:
        return os.path.samefile(first, second)
    except OSError:
        return False


class _PartFile(io.FileIO):
    """A new file whose errors name the output that it will become."""

    def __init__(self, part: Path, mode: int, argument: str, path: Path) -> None:
        super().__init__(part, "x", opener=lambda name, flags: os.open(name, flags, mode))
        self.argument, self.path = argument, path

    def write(self, data: Any) -> int:
        try:
            return super().write(data)
        except OSError as error:
            raise unusable(self.argument, self.path, "written", error) from error


class _Output:
    """The file that is written beside the place of an output."""

    def __init__(self, argument: str, path: Path) -> None:
        self.argument, self.path = argument, path
        self.place = Path(os.path.realpath(path))
        self.part, self.old = _beside(self.place), _beside(self.place)
        self.new = not os.path.lexists(self.place)
        try:
            # Nobody may read what only some may read in the end, not even before it is written.
            self.raw = _PartFile(self.part, 0o666 if self.new else 0o600, argument, path)
        except OSError as error:
            raise unusable(argument, path, "written", error) from error
        if not self.new:
            with suppress(OSError):  # only root gives a file to another user
                os.chown(self.part, (found := os.stat(self.place)).st_uid, found.st_gid)
            with suppress(OSError):  # a file system without permissions
                shutil.copystat(self.place, self.part)
        self.file = io.BufferedWriter(self.raw)

    def finish(self) -> None:
        """Make sure that all is on the disk."""
        try:
            self.file.flush()
            os.fsync(self.raw.fileno())
            self.file.close()
        except OSError as error:
            raise unusable(self.argument, self.path, "written", error) from error

    def rename(self) -> None:
        """Take the place, and keep a second name of what stood there for :meth:`undo`."""
        with suppress(OSError):  # nothing stood there, or the file system has no hard links
            os.link(self.place, self.old)
        try:
            self.part.replace(self.place)
        except OSError as error:
            raise unusable(self.argument, self.path, "written", error) from error

    def undo(self) -> None:
        """Put back what stood there."""
        with suppress(OSError):
            if self.old.exists():
                self.old.replace(self.place)
            elif self.new and not self.part.exists():
                self.place.unlink()

    def discard(self) -> None:
        """Remove what has not become the output."""
        with suppress(OSError):
            self.raw.close()  # not the buffer, which would try once more to write
        for name in (self.part, self.old):
            with suppress(OSError):
                name.unlink(missing_ok=True)


def _rename_all(outputs: Sequence[_Output]) -> None:
    """Where one cannot be renamed, those before it are undone: the files at the places belong together."""
    with ExitStack() as undone:
        for output in outputs:
            undone.callback(output.undo)
            output.rename()
        undone.pop_all()


def _beside(place: Path) -> Path:
    """A hidden name in the same folder, short, so that every name that a file may have can be an output's."""
    return place.with_name(f".softcurve-{uuid.uuid4().hex[:12]}.part")
