"""The next block is read while the present one is computed on."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from queue import SimpleQueue
from typing import TypeVar

__all__ = ["read_ahead"]

T = TypeVar("T")


def read_ahead(iterator: Iterator[T]) -> Iterator[T]:
    """Equals ``iterator``, which a thread advances, one item ahead.

    Item ``i + 2`` is begun only when item ``i + 1`` has been asked for, so an iterator may take two buffers in turn for
    items that are valid until the next is asked for. What the iterator raises is raised here, with its traceback. The
    thread ends, and closes the iterator, when this generator is exhausted or closed, or an exception goes through it.
    """
    wanted = threading.Semaphore(1)
    ready: SimpleQueue[tuple[T] | BaseException | None] = SimpleQueue()
    stop = threading.Event()
    thread = threading.Thread(target=_advance, args=(iterator, wanted, ready, stop), name="read-ahead", daemon=True)
    thread.start()
    try:
        while (found := ready.get()) is not None:
            if isinstance(found, BaseException):
                try:
                    raise found
                finally:
                    del found  # the traceback refers to this frame: no cycle
            wanted.release()
            yield found[0]
            del found  # or the item would live on while the next is waited for
    finally:
        stop.set()
        wanted.release()
        thread.join()


def _advance(
    iterator: Iterator[T],
    wanted: threading.Semaphore,
    ready: SimpleQueue[tuple[T] | BaseException | None],
    stop: threading.Event,
) -> None:
    try:
        while wanted.acquire() and not stop.is_set():
            try:
                item = (next(iterator),)
            except StopIteration:
                break
            ready.put(item)
            del item
        close = getattr(iterator, "close", None)
        if close is not None:
            close()
    except BaseException as error:  # also what would end a thread in silence
        ready.put(error)
    else:
        ready.put(None)
