"""Ctrl-C and SIGTERM as a KeyboardInterrupt that says which it was, and that is not lost.

A KeyboardInterrupt that is raised in a destructor or a callback Python prints and forgets: it is remembered here.
"""

from __future__ import annotations

import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

__all__ = [
    "ended_by_signals",
    "how_to_go_on",
    "interrupted",
    "postpone_interrupts",
    "remember_interrupts",
    "stop_if_interrupted",
]

# Seconds from which on a second signal is a second one. Before, it is taken for the first: torchrun passes on what a
# terminal sent too; and it would end the writing of the state that the first has asked for.
AGAIN = 5.0

_asked = 0  # the number of the signal that came, or 0
_since = 0.0
_in_block: Callable[[], bool] = lambda: False  # noqa: E731


def remember_interrupts() -> None:
    """From here on a signal is raised at once, and noted for :func:`stop_if_interrupted`."""
    global _asked
    _asked = 0
    _handle(_interrupted)


def stop_if_interrupted() -> None:
    """Raise KeyboardInterrupt if a signal came and its own got lost. Long work calls this at every step."""
    if _asked:
        raise KeyboardInterrupt(_asked)


def postpone_interrupts(in_block: Callable[[], bool] = lambda: False) -> None:
    """From here on a signal is noted alone; one that comes later again is raised at once.

    Processes that work together stop at one place, where they tell each other. ``in_block`` says whether they do so at
    the end of what is being done, whatever is raised in it: that need not be waited for.
    """
    global _in_block
    _in_block = in_block
    _handle(_noted)


def interrupted() -> int:
    """The number of the signal that came, or 0."""
    return _asked


@contextmanager
def ended_by_signals() -> Iterator[None]:
    """End the command after an interrupt with one line, in which the notes of the interrupt stand too.

    The exit code is that which a shell gives a command that the signal has ended: 130 for Ctrl-C, 143 for SIGTERM.
    """
    try:
        yield
    except KeyboardInterrupt as error:
        for number in (signal.SIGINT, signal.SIGTERM):  # there is nothing left to end
            if signal.getsignal(number) in (_interrupted, _noted):
                signal.signal(number, signal.SIG_IGN)
        print("softcurve:", "; ".join(["interrupted", *getattr(error, "__notes__", [])]), file=sys.stderr, flush=True)
        raise SystemExit(128 + (error.args[0] if error.args else signal.SIGINT)) from error


@contextmanager
def how_to_go_on(checkpoint: Path | None) -> Iterator[Callable[[object], None]]:
    """Add a note to an interrupt that says how to go on with a fit. What it gives is to be called at every step.

    Before the first one, a file that is there may be of another run.
    """
    steps: list[object] = []
    try:
        yield steps.append
    except KeyboardInterrupt as error:
        if checkpoint is None:
            error.add_note("the same command starts anew; --checkpoint FILE keeps the state of a fit")
        elif not checkpoint.exists():
            error.add_note(f"the same command starts anew, since {checkpoint} was not yet written")
        elif steps:
            error.add_note(f"{checkpoint} has the state, and the same command goes on")
        else:
            error.add_note(f"{checkpoint} was not yet read, and is as it was: give the same command again")
        raise


def _handle(handler: Callable[[int, FrameType | None], None]) -> None:
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, handler)


def _noted(number: int, frame: FrameType | None) -> None:
    if _again(number) or _in_block():
        raise KeyboardInterrupt(_asked)


def _interrupted(number: int, frame: FrameType | None) -> None:
    first = not _asked
    if _again(number) or first:
        raise KeyboardInterrupt(_asked)


def _again(number: int) -> bool:
    """Note the signal; whether another came before, and not just now."""
    global _asked, _since
    again = bool(_asked) and time.monotonic() - _since > AGAIN
    if not _asked:
        _asked, _since = number, time.monotonic()
    return again
