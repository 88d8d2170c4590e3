"""Errors of the operating system as one message: the argument, the path, the reason and a remedy."""

from __future__ import annotations

import errno
import re
from pathlib import Path

from softcurve.files import DataError

FULL = "free some space there, or give a path on another disk"
DENIED = "change its permissions or those of its folder, or give another path"
REMEDIES = {
    errno.ENOSPC: FULL,
    errno.EDQUOT: FULL,
    errno.EFBIG: "raise the limit on the size of files (ulimit -f), or give a path on another file system",
    errno.EACCES: DENIED,
    errno.EPERM: DENIED,
    errno.EROFS: "its file system is read-only: give a path on another",
    errno.ELOOP: "its symbolic links lead back to themselves: mend them, or give another path",
    errno.ENAMETOOLONG: "give a shorter path",
    errno.EMFILE: "raise the limit on open files (ulimit -n)",
    errno.EIO: "check its disk",
}
PICKLES = (".pt", ".pth", ".bin", ".ckpt", ".pkl", ".pickle", ".joblib")
# torch and the C++ libraries have no error type for it.
NO_MEMORY = re.compile(r"allocate memory|bad_alloc|out of memory|MemoryError", re.IGNORECASE)
REQUESTED = re.compile(r"(you tried|Unable) to allocate (.+?)(?=\.? Error code|$)", re.MULTILINE)


def unusable(argument: str, path: str | Path, action: str, error: OSError) -> DataError:
    """Return the error to raise where ``path`` cannot be "read" or "written", the ``action``."""
    reason = error.strerror or str(error) or type(error).__name__
    return DataError(f"{argument}: {path} cannot be {action} ({reason}); {remedy_for(error)}")


def refuse_pickle(argument: str, path: Path, conversion: str) -> None:
    """Raise DataError if the path ends as a pickle does; ``conversion`` says what to do after loading it in Python."""
    if path.suffix.lower() in PICKLES:
        loading = "torch.load" if path.suffix.lower() in PICKLES[:4] else "pickle.load"
        raise DataError(
            f"{argument}: {path} is a pickle, which may run any code when it is loaded, and is not read; if you trust "
            f"it, load it in Python ({loading}) and {conversion}"
        )


def remedy_for(error: OSError) -> str:
    """Return what to do about an error of the operating system."""
    return REMEDIES.get(error.errno or 0, "check the path and its disk")


def out_of_memory(error: BaseException) -> str | None:
    """Return what could not be allocated if the error says that memory has run out, and None otherwise."""
    text = str(error)
    no_memory = isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno == errno.ENOMEM)
    if not no_memory and not (isinstance(error, RuntimeError | ImportError) and NO_MEMORY.search(text)):
        return None
    requested = REQUESTED.search(text)
    return f"out of memory: {requested[2]} could not be allocated" if requested else "out of memory"
