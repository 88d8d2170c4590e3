"""Ctrl-C, remembered: a KeyboardInterrupt that is raised in a destructor or a callback Python prints and forgets."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable
from types import FrameType

__all__ = ["interrupted", "postpone_interrupts", "remember_interrupts", "stop_if_interrupted"]

AGAIN = 5.0  # seconds from which on a second interrupt is a second one: torchrun passes on what a terminal sent too

_asked = False
_since = 0.0
_in_block: Callable[[], bool] = lambda: False  # noqa: E731


def remember_interrupts() -> None:
    """From here on an interrupt is raised at once, as ever, and noted for :func:`stop_if_interrupted`."""
    global _asked
    _asked = False
    signal.signal(signal.SIGINT, _interrupted)


def stop_if_interrupted() -> None:
    """Raise KeyboardInterrupt if one was asked for and got lost. Long work calls this at every step."""
    if _asked:
        raise KeyboardInterrupt


def postpone_interrupts(in_block: Callable[[], bool] = lambda: False) -> None:
    """From here on an interrupt, or a request to end, is noted alone; one that comes later again is raised at once.

    Processes that work together stop at one place, where they tell each other. ``in_block`` says whether they do so at
    the end of what is being done, whatever is raised in it: that need not be waited for.
    """
    global _in_block
    _in_block = in_block
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _noted)


def interrupted() -> bool:
    """Whether one was asked for."""
    return _asked


def _noted(number: int, frame: FrameType | None) -> None:
    global _asked, _since
    again = _asked and time.monotonic() - _since > AGAIN
    if not _asked:
        _asked, _since = True, time.monotonic()
    if again or _in_block():
        raise KeyboardInterrupt


def _interrupted(number: int, frame: FrameType | None) -> None:
    global _asked
    _asked = True
    raise KeyboardInterrupt
