"""The processes that fit one head: sums over all of them, and errors that all of them raise.

All processes take the same path through a fit, because they decide from the sums alone. Whatever may fail in one
process, such as reading a file, runs in a block of :meth:`Group.summed` or :meth:`Group.agreed`. The message that sums
the tensors at the end of the block also tells whether a process has failed.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import timedelta
from itertools import product
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from softcurve.fit import DataError
from softcurve.processes import sum_over

T = TypeVar("T")

UNUSED_TAG = 2**20


class LostProcess(RuntimeError):
    """Another process has ended, or did not answer in time."""


class Group:
    """The processes of a ``torch.distributed`` group, or this process alone.

    ``stop_signal`` returns the number of the signal that asks this process to stop, or 0. Where one process is asked,
    all raise KeyboardInterrupt with that number at the end of the next block.
    """

    def __init__(self, processes: ProcessGroup | None = None, stop_signal: Callable[[], int] = lambda: 0) -> None:
        self.processes, self.stop_signal, self.in_block = processes, stop_signal, False
        self.rank = 0 if processes is None else dist.get_rank(processes)
        self.size = 1 if processes is None else dist.get_world_size(processes)
        self.first = self.rank == 0  # the process that writes and prints

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
        status = torch.tensor([error is not None, self.stop_signal() > 0]).to(tensors[0] if tensors else torch.float32)
        with _communication():
            sum_over([*tensors, status], self.processes)
        if status.any():
            agreed = self._agreed_error(error) if status[0] else KeyboardInterrupt(self.largest(self.stop_signal())[0])
            agreed.raised_by_all = True  # type: ignore[attr-defined]
            try:
                raise agreed
            finally:
                # The traceback refers to this frame. If the frame referred to the error, the cycle would keep the group
                # alive until the interpreter ends, and the threads of a group that ends then may abort the process.
                del agreed, error

    agreed = summed  # without tensors: a block that ends without an error in all processes, or with the same one

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
        if self.processes is not None:
            tensor = tensor.contiguous()
            with _communication():
                dist.broadcast(tensor, group=self.processes, group_src=0)
        return tensor

    def close_connections(self) -> None:
        """Close the connections, so that no process waits for this one.

        Neither abort nor destruction of a group closes them; gloo does where a message does not arrive in time.
        """
        for other in set(range(self.size)) - {self.rank}:
            with suppress(RuntimeError):
                work = dist.irecv(torch.zeros(1), group=self.processes, group_src=other, tag=UNUSED_TAG)
                if work is not None:
                    work.wait(timedelta(milliseconds=1))

    def _agreed_error(self, error: BaseException | None) -> BaseException:
        """Return the error of the lowest process that has failed; in the other processes, one with its message."""
        sent: BaseException | None = None
        if isinstance(error, KeyboardInterrupt):
            sent = KeyboardInterrupt(*error.args)
        elif isinstance(error, ValueError | OSError):
            sent = DataError(str(error))
        elif error is not None:
            trace = "".join(traceback.format_exception(error))
            sent = RuntimeError(f"process {self.rank} of {self.size} failed:\n{trace}")
        rank, agreed = next((rank, each) for rank, each in enumerate(self.values(sent)) if each is not None)
        if rank == self.rank and error is not None:
            return error
        agreed.__cause__ = error
        return agreed


ALONE = Group()


def raised_by_all(error: BaseException) -> bool:
    """Whether all processes have raised this error, at the end of a block of :meth:`Group.summed`."""
    return getattr(error, "raised_by_all", False)


def require_same(group: Group, options: Mapping[str, object], remedy: str) -> None:
    """Raise DataError in all processes where an option differs between them, which names the first such option."""
    by_rank = group.values({name: "nothing" if option is None else str(option) for name, option in options.items()})
    for name, (rank, there) in product(options, enumerate(by_rank)):
        if there[name] != by_rank[0][name]:
            with group.agreed():
                raise DataError(
                    f"{name} must be the same in all processes; process 0 has {by_rank[0][name]}, and process {rank} "
                    f"has {there[name]}: {remedy}"
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
