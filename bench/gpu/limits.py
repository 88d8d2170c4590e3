"""Time limits for the first calls of an implementation, which may compile for a long time, and for the whole run."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager


class TooLong(BaseException):
    """The time limit is reached. This is not an Exception, because autotuners catch those."""


class Deadline:
    """A time limit that starts now, or at a reading of the system's monotonic clock."""

    def __init__(self, seconds: float, since: float | None = None) -> None:
        self.end = (time.monotonic() if since is None else since) + seconds

    def left(self) -> float:
        """Return the remaining seconds."""
        return self.end - time.monotonic()


@contextmanager
def limited(seconds: float) -> Iterator[None]:
    """Raise TooLong in the block after ``seconds``, as soon as Python code runs."""

    def ring(*_: object) -> None:
        raise TooLong

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
