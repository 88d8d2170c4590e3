"""Ctrl-C and SIGTERM as a KeyboardInterrupt whose argument is the number of the signal.

Python prints and forgets a KeyboardInterrupt that is raised in a destructor or a callback, so the signal is kept here.
"""

from __future__ import annotations

import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

# Seconds after which another signal counts as a second one. torchrun passes on what a terminal has sent as well, and a
# second KeyboardInterrupt would end the writing of the checkpoint that the first one has asked for.
REPEATED = 5.0
STOPPING = signal.SIGINT, signal.SIGTERM

_number = 0  # of the first signal, or 0
_received = 0.0
_may_raise: Callable[[], bool] = lambda: True  # noqa: E731


def remember_interrupts() -> None:
    """Forget earlier signals; from here on raise a signal at once, and keep it for :func:`stop_if_interrupted`."""
    global _number
    _number = 0
    raise_interrupts_when(lambda: True)


def raise_interrupts_when(may_raise: Callable[[], bool]) -> None:
    """From here on raise a first signal at once only where ``may_raise()``, and otherwise only keep its number.

    Several processes stop where they tell each other. A signal that comes again later is raised at once.
    """
    global _may_raise
    _may_raise = may_raise
    for number in STOPPING:
        signal.signal(number, _handle)


def interrupted() -> int:
    """Return the number of the signal that came, or 0."""
    return _number


def stop_if_interrupted() -> None:
    """Raise KeyboardInterrupt if a signal came. Long work calls this at every step."""
    if _number:
        raise KeyboardInterrupt(_number)


def how_to_continue(checkpoint: Path | None) -> str:
    """Say what the same command does after a fit has ended early."""
    if checkpoint is None:
        return "the same command starts from the beginning; --checkpoint FILE saves the state of a fit"
    if not checkpoint.exists():
        return f"the same command starts from the beginning, because {checkpoint} was not written yet"
    return f"{checkpoint} has the state of the fit; the same command resumes it"


@contextmanager
def ended_by_signals() -> Iterator[None]:
    """End the command after an interrupt with one line, which includes the notes of the KeyboardInterrupt.

    The exit code is the one that a shell reports for the signal: 130 for Ctrl-C, 143 for SIGTERM.
    """
    try:
        yield
    except KeyboardInterrupt as error:
        for number in STOPPING:
            if signal.getsignal(number) is _handle:
                signal.signal(number, signal.SIG_IGN)  # the command is ending already
        print("softcurve:", "; ".join(["interrupted", *getattr(error, "__notes__", [])]), file=sys.stderr, flush=True)
        raise SystemExit(128 + (error.args[0] if error.args else signal.SIGINT)) from error


@contextmanager
def how_to_go_on(checkpoint: Path | None) -> Iterator[Callable[[object], None]]:
    """Add to an interrupt how to continue the fit. The function that is yielded must be called at every step.

    Before the first step a checkpoint that exists has not been read, and may be that of another run.
    """
    steps: list[object] = []
    try:
        yield steps.append
    except KeyboardInterrupt as error:
        unread = checkpoint is not None and checkpoint.exists() and not steps
        how = f"{checkpoint} was not read yet and is unchanged; run the same command again"
        error.add_note(how if unread else how_to_continue(checkpoint))
        raise


def _handle(number: int, frame: FrameType | None) -> None:
    global _number, _received
    first = not _number
    if first:
        _number, _received = number, time.monotonic()
    if (first and _may_raise()) or time.monotonic() - _received > REPEATED:
        raise KeyboardInterrupt(_number)
