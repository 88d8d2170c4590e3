"""Ctrl-C, remembered: a KeyboardInterrupt that is raised in a destructor or a callback Python prints and forgets."""

from __future__ import annotations

import signal
from types import FrameType

__all__ = ["remember_interrupts", "stop_if_interrupted"]

_asked = False


def remember_interrupts() -> None:
    """From here on an interrupt is raised at once, as ever, and noted for :func:`stop_if_interrupted`."""
    global _asked
    _asked = False
    signal.signal(signal.SIGINT, _interrupted)


def stop_if_interrupted() -> None:
    """Raise KeyboardInterrupt if one was asked for and got lost. Long work calls this at every step."""
    if _asked:
        raise KeyboardInterrupt


def _interrupted(number: int, frame: FrameType | None) -> None:
    global _asked
    _asked = True
    raise KeyboardInterrupt
