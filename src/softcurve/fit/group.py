"""The processes that fit one head: sums over all of them, and errors that all of them raise.

All processes take the same path through a fit, because they decide from the sums alone. Whatever may fail in one
process, such as reading a file, runs in a block of :meth:`Group.summed` or :meth:`Group.agreed`. The message that sums
the tensors at the end of the block also tells whether a process has failed.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, suppress
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from softcurve.fit import DataError
from softcurve.processes import sum_over

__all__ = ["ALONE", "Group", "LostProcess", "raised_by_all", "require_same"]

T = TypeVar("T")

ROWS_PER_MESSAGE = 2**20
UNUSED_TAG = 2**20


class LostProcess(RuntimeError):
    """Another process has ended, or did not answer in time."""


class Group:
    """The processes of a ``torch.distributed`` group, or this process alone.

    ``stop_signal`` returns the number of the signal that asks this process to stop, or 0. Where one process is asked,
    all raise KeyboardInterrupt with that number at the end of the next block.
    """

    def __init__(self, processes: ProcessGroup | None = None, stop_signal: Callable[[], int] = lambda: 0) -> None:
        self.processes, self.stop_signal = processes, stop_signal
        self.rank = 0 if processes is None else dist.get_rank(processes)
        self.size = 1 if processes is None else dist.get_world_size(processes)
        self.in_block = False

    @property
    def first(self) -> bool:
        """Whether this is the process that writes and prints."""
        return self.rank == 0

    @contextmanager
    def summed(self, *tensors: Tensor) -> Iterator[None]:
        """Replace tensors of one dtype by their sums over the processes at the end of the block, in one message.

        The sums have the same bits in all processes. An error that one process raises in the block is raised by all.
        The block itself must not communicate.
        """
        if self.processes is None:
            yield
            return
        assert not self.in_block, "a block must not communicate, as it may end early"
        error: BaseException | None = None
        try:
            self.in_block = True
            yield
        except BaseException as caught:
            error = caught
        finally:
            self.in_block = False
        status = tensors[0].new_zeros(2) if tensors else torch.zeros(2)
        status[0], status[1] = float(error is not None), float(self.stop_signal() > 0)
        with _communication():
            sum_over([*tensors, status], self.processes)
        if status.any():
            agreed = self._agreed_error(error) if status[0] else KeyboardInterrupt(max(self.values(self.stop_signal())))
            agreed.raised_by_all = True  # type: ignore[attr-defined]
            try:
                raise agreed
            finally:
                # The traceback refers to this frame. If the frame referred to the error, the cycle would keep the group
                # alive until the interpreter ends, and the threads of a group that ends then may abort the process.
                del agreed, error

    def agreed(self) -> AbstractContextManager[None]:
        """Return a block that ends without an error in all processes, or with the same one."""
        return self.summed()

    def largest(self, *numbers: int | float) -> tuple[int | float, ...]:
        """Return each number's maximum over the processes."""
        return tuple(max(column) for column in zip(*self.values(numbers), strict=True))

    def values(self, value: T) -> list[T]:
        """Return the values of all processes, by rank."""
        values = [value] * self.size
        if self.processes is not None:
            with _communication():
                dist.all_gather_object(values, value, group=self.processes)
        return values

    def gathered(self, tensor: Tensor) -> list[Tensor]:
        """Return the tensors of all processes, by rank; they may differ in length."""
        if self.processes is None:
            return [tensor]
        lengths = self.values(len(tensor))
        padded = tensor.new_zeros(max(lengths), *tensor.shape[1:])
        padded[: len(tensor)] = tensor
        received = [torch.empty_like(padded) for _ in lengths]
        with _communication():
            dist.all_gather(received, padded, group=self.processes)
        return [each[:length] for each, length in zip(received, lengths, strict=True)]

    def from_first(self, tensor: Tensor) -> Tensor:
        """Return the first process's tensor."""
        return tensor if self.processes is None else self._broadcast(tensor.contiguous(), 0)

    def in_order(self, rows: Tensor) -> Iterator[Tensor]:
        """Yield the rows of all processes, by rank, in pieces of bounded size."""
        if self.processes is None:
            yield rows
            return
        for owner, length in enumerate(self.values(len(rows))):
            for start in range(0, length, ROWS_PER_MESSAGE):
                piece = rows.new_empty(min(ROWS_PER_MESSAGE, length - start), *rows.shape[1:])
                if owner == self.rank:
                    piece.copy_(rows[start : start + ROWS_PER_MESSAGE])
                yield self._broadcast(piece, owner)

    def close_connections(self) -> None:
        """Close the connections, so that no process waits for this one.

        Destroying a group does not close them while anything, such as a traceback, refers to it. Gloo closes them where
        a message does not arrive in time.
        """
        for other in set(range(self.size)) - {self.rank}:
            with suppress(RuntimeError):
                work = dist.irecv(torch.zeros(1), group=self.processes, group_src=other, tag=UNUSED_TAG)
                if work is not None:
                    work.wait(timedelta(milliseconds=1))

    def _broadcast(self, tensor: Tensor, source: int) -> Tensor:
        if self.processes is not None:
            with _communication():
                dist.broadcast(tensor, group=self.processes, group_src=source)
        return tensor

    def _agreed_error(self, error: BaseException | None) -> BaseException:
        """Return the error of the lowest process that has failed; in the other processes, one with its message."""
        errors = self.values(None if error is None else self._without_traceback(error))
        rank, agreed = next((rank, each) for rank, each in enumerate(errors) if each is not None)
        if rank == self.rank and error is not None:
            return error
        agreed.__cause__ = error
        return agreed

    def _without_traceback(self, error: BaseException) -> BaseException:
        """Return an error that can be sent to the other processes."""
        if isinstance(error, KeyboardInterrupt):
            return KeyboardInterrupt(*error.args)
        if isinstance(error, ValueError | OSError):
            return DataError(str(error))
        trace = "".join(traceback.format_exception(error))
        return RuntimeError(f"process {self.rank} of {self.size} failed:\n{trace}")


ALONE = Group()


def raised_by_all(error: BaseException) -> bool:
    """Whether all processes have raised this error, at the end of a block of :meth:`Group.summed`."""
    return getattr(error, "raised_by_all", False)


def require_same(group: Group, options: Mapping[str, object], remedy: str) -> None:
    """Raise DataError in all processes where an option differs between them, which names the first such option."""
    by_rank = group.values({name: "nothing" if option is None else str(option) for name, option in options.items()})
    for name, expected in by_rank[0].items():
        for rank, options_there in enumerate(by_rank):
            if options_there[name] != expected:
                with group.agreed():
                    raise DataError(
                        f"{name} must be the same in all processes; process 0 has {expected}, and process {rank} has "
                        f"{options_there[name]}: {remedy}"
                    )


@contextmanager
def _communication() -> Iterator[None]:
    """Raise LostProcess for an error of the communication within the block."""
    try:
        yield
    except RuntimeError as error:
        raise LostProcess(
            f"another process has ended, or did not answer in time ({str(error).splitlines()[0]})"
        ) from error
