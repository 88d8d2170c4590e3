"""The processes of one command, as torchrun starts them: how they meet, and what is said, once, when one is lost."""

from __future__ import annotations

import json
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from typing import TypeVar

import torch.distributed as dist
from torch.distributed.distributed_c10d import Store

from softcurve.cli.interrupt import interrupted, postpone_interrupts
from softcurve.fit import DataError
from softcurve.fit.together import ALONE, LostProcess, Processes, Together, raised_by_all

__all__ = ["processes"]

T = TypeVar("T")

STARTING = 300.0  # seconds that imports may take longer in one process than in another
GRACE = 5.0  # seconds that the others have to say that they are alive
NOTE, SAID, LEFT = "softcurve/note", "softcurve/said", "softcurve/left"


@contextmanager
def processes(timeout: float, checkpoint: Path | None) -> Iterator[Together]:
    """Those that the environment names (``WORLD_SIZE`` and ``RANK``, as torchrun sets them), or this one alone.

    None waits for another for more than ``timeout`` seconds. A process that ends or hangs ends the others with exit
    code 1, and one of them says so.
    """
    if _size() == 1:
        yield ALONE
        return
    if not timeout > 0:
        raise DataError(f"--timeout: {timeout:g} must be a positive number of seconds")
    postpone_interrupts()
    together = _meet(timeout)
    postpone_interrupts(lambda: together.in_block)
    store = dist.distributed_c10d._get_default_store()
    who = ["not heard of yet"] * together.size
    try:
        who = together.texts(f"pid {os.getpid()} on {socket.gethostname().encode('ascii', 'replace').decode()}")
        yield together
    except BaseException as error:
        if not raised_by_all(error):  # with those that are, all processes leave
            _leave(store, together, error, lambda missing: _lost(missing, who, timeout, checkpoint))
        raise
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def _size() -> int:
    given = os.environ.get("WORLD_SIZE", "1")
    return max(1, int(given)) if given.isdecimal() else 1


def _meet(timeout: float) -> Processes:
    starting = timedelta(seconds=max(timeout, STARTING))
    try:
        dist.init_process_group("gloo", timeout=starting)
        group = dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout))
    except (RuntimeError, ValueError) as error:
        sys.stderr = sys.__stderr__  # nobody knows who else is there
        raise DataError(
            f"the {_size()} processes did not find each other within {starting.total_seconds():g} s "
            f"({str(error).splitlines()[0]}); start all by torchrun, or each with RANK, WORLD_SIZE, MASTER_ADDR "
            "and MASTER_PORT"
        ) from error
    return Processes(group, interrupted)


def _leave(store: Store, together: Processes, error: BaseException, lost: Callable[[Sequence[int]], str]) -> None:
    """Return in the one process whose own error is to be shown; end all others, of which one shows what was lost."""
    own = not isinstance(error, LostProcess)
    parted = _in_time(lambda: _part(store, together, own), 3 * GRACE)
    # Or else the first process, which may hold the store, is not there to ask.
    missing, speaks = parted or ([0], own or together.rank <= 1)
    if speaks and own:
        sys.stderr = sys.__stderr__
        return
    if speaks:
        print(f"softcurve: {lost(missing)}", file=sys.__stderr__, flush=True)
    # Nothing that waits for the others, as the ends of their connections may, is run any more.
    os._exit(1)


def _part(store: Store, together: Processes, own: bool) -> tuple[list[int], bool]:
    """Leave the group, so that nobody waits for this process; see who has not, and whether to say what happened.

    It is for the first process that has failed by its own, or else the first one that is left, to say so.
    """
    rank, size = together.rank, together.size
    store.set(f"{NOTE}/{rank}", json.dumps(own))
    together.leave()
    _until(lambda: len(_found(store, NOTE, size)) == size)
    found = {other: json.loads(store.get(f"{NOTE}/{other}")) for other in _found(store, NOTE, size)}
    first = min((other for other, failed in found.items() if failed), default=min(found))
    speaks = rank == first and store.add(SAID, 1) == 1
    store.set(f"{LEFT}/{rank}", "")
    if rank == 0:  # the store ends with it
        _until(lambda: _found(store, LEFT, size) >= found.keys())
    return [other for other in range(size) if other not in found], speaks


def _found(store: Store, name: str, size: int) -> set[int]:
    return {rank for rank in range(size) if store.check([f"{name}/{rank}"])}


def _until(reached: Callable[[], bool]) -> None:
    end = time.monotonic() + GRACE
    while not reached() and time.monotonic() < end:
        time.sleep(0.02)


def _in_time(work: Callable[[], T], seconds: float) -> T | None:
    """What it returns, or None after an error; what hangs is left behind."""
    found: list[T] = []

    def run() -> None:
        with suppress(RuntimeError):
            found.append(work())

    thread = threading.Thread(target=run, daemon=True)
    with _without_traces():
        thread.start()
        thread.join(seconds)
    return found[0] if found else None


@contextmanager
def _without_traces() -> Iterator[None]:
    """Leave out what torch itself writes to the standard error of a store that it cannot reach."""
    with open(os.devnull, "wb") as nowhere:
        shown = os.dup(2)
        os.dup2(nowhere.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(shown, 2)
        os.close(shown)


def _lost(missing: Sequence[int], who: Sequence[str], timeout: float, checkpoint: Path | None) -> str:
    if missing:
        shown = ", ".join(f"{rank} ({who[rank]})" for rank in missing)
        what = (
            f"process {shown} of {len(who)} has ended or hangs"
            if len(missing) == 1
            else (f"processes {shown} of {len(who)} have ended or hang")
        )
    else:
        what = f"the {len(who)} processes have lost their connections"
    if checkpoint is None:
        how = "start again; --checkpoint FILE keeps the state of a fit"
    elif checkpoint.exists():
        how = f"{checkpoint} has the state, and the same command goes on, with any number of processes"
    else:
        how = f"start again; {checkpoint} was not yet written"
    return f"{what}, so that the others ended too (none waits for more than {timeout:g} s, --timeout); {how}"
