"""The next block is read while the present one is computed on."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

__all__ = ["read_ahead"]

T = TypeVar("T")
END = object()


def read_ahead(iterator: Iterator[T]) -> Iterator[T]:
    """Yield what ``iterator`` yields; a thread advances it, one item ahead.

    Item ``i + 2`` is begun only when item ``i + 1`` has been asked for. What the iterator raises is raised here, with
    its traceback. The thread ends, and the iterator is closed, when this generator is exhausted or closed, or an
    exception goes through it.
    """
    ahead: Future[Any] | None = None
    try:
        with ThreadPoolExecutor(1, thread_name_prefix="read-ahead") as thread:
            ahead = thread.submit(next, iterator, END)
            while (item := ahead.result()) is not END:
                ahead = thread.submit(next, iterator, END)
                yield item
                del item  # or it would live on while the next is waited for
    finally:
        del ahead  # an error that it holds refers to this frame: no cycle
        getattr(iterator, "close", lambda: None)()
