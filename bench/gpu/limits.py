"""Time limits: of a contestant's first calls, in which it may compile for ever, and of everything."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager


class TooLong(BaseException):
    """The limit is over. No Exception, for autotuners survive those."""


class Deadline:
    """Of all that is run from now on, or from a reading of the system's monotonic clock on."""

    def __init__(self, seconds: float, since: float | None = None) -> None:
        self.end = (time.monotonic() if since is None else since) + seconds

    def left(self) -> float:
        """Seconds."""
        return self.end - time.monotonic()


@contextmanager
def limited(seconds: float) -> Iterator[None]:
    """Raise TooLong in the block after so many seconds, once Python has the thread again."""

    def ring(*_: object) -> None:
        raise TooLong

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
