"""The end of a command that cannot continue: one line on stderr and exit code 2; after an interrupt, exit code 130."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

from softcurve.cli.interrupt import interrupted
from softcurve.extras import needed
from softcurve.fit.system_errors import out_of_memory, remedy_for

__all__ = ["refusals"]


@contextmanager
def refusals(work: str = "softcurve", less_memory: str = "free some memory") -> Iterator[None]:
    """End the command at an error that its user can correct; any other error is a defect and is raised.

    If memory runs out, the message names the ``work`` and the remedy ``less_memory``.
    """
    try:
        with needed("this command"):
            yield
    except BrokenPipeError:
        raise
    except Exception as error:
        if interrupted():  # during an import, for example, an interrupt becomes an ImportError
            raise KeyboardInterrupt(interrupted()) from error
        message = _message(error, work, less_memory)
        if message is None:
            raise
        print("softcurve:", " ".join(message.split("\n")), file=sys.stderr, flush=True)
        raise SystemExit(2) from error


def _message(error: Exception, work: str, less_memory: str) -> str | None:
    if (missing := out_of_memory(error)) is not None:
        return f"{work}: {missing}; {less_memory}"
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename or work}: {error.strerror}; {remedy_for(error)}"
    return str(error) if isinstance(error, ImportError | ValueError | OSError) else None
