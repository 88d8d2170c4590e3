"""The processes of one command: how they connect, and how all end when one of them is lost.

torchrun ends all processes when one fails, but does not say how to continue. Without it they do not end each other.
"""

from __future__ import annotations

import os
import socket
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path

import torch.distributed as dist

from softcurve.cli.interrupt import how_to_continue, interrupted, raise_interrupts_when
from softcurve.fit import DataError
from softcurve.fit.group import ALONE, Group, LostProcess, raised_by_all

STARTING = 300.0  # seconds that the imports of one process may take longer than those of another
GRACE = 5.0  # seconds in which the other processes must show that they are alive


@contextmanager
def processes(timeout: float, checkpoint: Path | None) -> Iterator[Group]:
    """Yield the group that the environment describes (``WORLD_SIZE`` and ``RANK``, as torchrun sets them).

    No process waits for another for more than ``timeout`` seconds. If one ends or hangs, the others end with exit code
    1, and one of them prints which process was lost and how to continue.
    """
    if os.environ.get("WORLD_SIZE", "1") in ("", "0", "1"):
        yield ALONE
        return
    if not timeout > 0:
        raise DataError(f"--timeout: {timeout:g} must be a positive number of seconds")
    raise_interrupts_when(lambda: False)
    group, names = _connect(timeout)
    raise_interrupts_when(lambda: group.in_block)
    try:
        yield group
    except BaseException as error:
        if not raised_by_all(error):
            shows, missing = _leave(group)
            if shows and not isinstance(error, LostProcess):
                sys.stderr = sys.__stderr__
                raise
            if shows:
                lost = " and ".join(names[rank] for rank in missing) or "a connection between the processes"
                print(
                    f"softcurve: {lost} ended or stopped answering, so that all {group.size} processes end (none waits "
                    f"for more than {timeout:g} s, --timeout); {how_to_continue(checkpoint)}",
                    file=sys.__stderr__, flush=True,
                )  # fmt: skip
            # Skip all cleanup, which may wait for the other processes.
            os._exit(1)
        raise
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def _connect(timeout: float) -> tuple[Group, list[str]]:
    """Return the group of all processes and, by rank, what the messages call them."""
    starting = timedelta(seconds=max(timeout, STARTING))
    host = socket.gethostname().encode("ascii", "replace").decode()
    try:
        dist.init_process_group("gloo", timeout=starting)
        group = Group(dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout)), interrupted)
        return group, group.values(f"process {group.rank} (pid {os.getpid()} on {host})")
    except (RuntimeError, ValueError) as error:
        sys.stderr = sys.__stderr__  # no process knows which others there are
        raise DataError(
            f"the {os.environ['WORLD_SIZE']} processes did not find each other within {starting.total_seconds():g} s "
            f"({str(error).splitlines()[0]}); start all by torchrun, or each with RANK, WORLD_SIZE, MASTER_ADDR "
            "and MASTER_PORT"
        ) from error


def _leave(group: Group) -> tuple[bool, list[int]]:
    """Leave the group. Return whether this process shows what happened, and the processes that have not left.

    The first process that leaves shows what happened. The store is lost with the first process of the group, unless
    torchrun holds it.
    """
    outcome = [(group.rank <= 1, [0])]
    marks = [f"left/{rank}" for rank in range(group.size)]
    store = dist.distributed_c10d._get_default_store()

    def leave() -> None:
        with suppress(RuntimeError):
            shows = store.add("leaving", 1) == 1
            store.set(marks[group.rank], "")
            group.close_connections()
            if shows or group.first:
                with suppress(dist.DistStoreError):
                    store.wait(marks, timedelta(seconds=GRACE))
            outcome.append((shows, [rank for rank, mark in enumerate(marks) if shows and not store.check([mark])]))
            if shows:
                store.set("shown", "")
            elif group.first:  # the store may end with this process
                with suppress(dist.DistStoreError):
                    store.wait(["shown"], timedelta(seconds=GRACE))

    # In a thread, as a request to a store that hangs never returns; torch writes to stderr about one that has ended.
    thread = threading.Thread(target=leave, daemon=True)
    with open(os.devnull, "wb") as devnull:
        stderr = os.dup(2)
        os.dup2(devnull.fileno(), 2)
        thread.start()
        thread.join(3 * GRACE)
        os.dup2(stderr, 2)
    return outcome[-1]
