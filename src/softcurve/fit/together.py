"""The processes that fit one head: what each adds up alone becomes a sum over all, and an error in one ends all.

All take the same way through the fit, as they decide from sums alone. Whatever may fail in one of them, as reading a
file may, stands in a block of :meth:`Together.summed` or :meth:`Together.agreed`, at whose end they hear of each other:
with the sums, in the same message.
"""

from __future__ import annotations

import json
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, suppress
from datetime import timedelta

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from softcurve.fit import DataError
from softcurve.processes import max_over, sum_over

__all__ = ["ALONE", "LostProcess", "Processes", "Together", "raised_by_all", "require_same"]

PIECE = 2**20  # entries of a row-wise tensor that are sent at a time
LEAVING = 2**20  # the tag of what is never sent


class LostProcess(RuntimeError):
    """Another process has ended, or did not answer in time."""


class Together:
    """A process alone: every sum is its own, and nothing is sent."""

    rank, size = 0, 1

    @property
    def first(self) -> bool:
        """Whether this is the process that writes and prints."""
        return self.rank == 0

    @contextmanager
    def summed(self, *tensors: Tensor) -> Iterator[None]:
        """At the end of the block the tensors, of one dtype, become their sums over all processes, the same bits.

        What one process raises in the block, all raise. In it nothing may be sent.
        """
        yield

    def agreed(self) -> AbstractContextManager[None]:
        """A block that ends without an error in all processes, or with the same one."""
        return self.summed()

    def largest(self, *numbers: int | float) -> tuple[int | float, ...]:
        """Each number's maximum over the processes."""
        return numbers

    def gathered(self, tensor: Tensor) -> list[Tensor]:
        """The tensors of all processes, in order; they may differ in length."""
        return [tensor]

    def texts(self, text: str) -> list[str]:
        """The texts of all processes, in order."""
        return [text]

    def from_first(self, tensor: Tensor) -> Tensor:
        """The first process's tensor, in the place of this."""
        return tensor

    def in_order(self, rows: Tensor) -> Iterator[Tensor]:
        """What all processes have of a tensor with an entry a row, in order and in pieces."""
        yield rows


ALONE = Together()


class Processes(Together):
    """The processes of a group. Where one is ``asked_to_stop``, all are interrupted at the next sum.

    It returns the number of the signal that asks, or 0; the KeyboardInterrupt that all raise has that number.
    """

    def __init__(self, group: ProcessGroup, asked_to_stop: Callable[[], int] = lambda: 0) -> None:
        self.group, self.asked_to_stop = group, asked_to_stop
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)
        self.in_block = False

    @contextmanager
    def summed(self, *tensors: Tensor) -> Iterator[None]:
        """As of one process; one message."""
        assert not self.in_block, "no sums within a block that may end early"
        error: BaseException | None = None
        try:
            self.in_block = True
            yield
        except BaseException as caught:
            error = caught
        finally:
            self.in_block = False
        status = tensors[0].new_zeros(2) if tensors else torch.zeros(2)
        status[0], status[1] = float(error is not None), float(self.asked_to_stop() > 0)
        with _sending():
            sum_over([*tensors, status], self.group)
        if status.any():
            agreed = self._common(error) if status[0] else self._stop()
            agreed.raised_by_all = True  # type: ignore[attr-defined]
            try:
                raise agreed
            finally:
                # The traceback refers to this frame. If the frame referred to the error, the cycle would keep the group
                # alive until the interpreter ends, and the threads of a group that ends then may abort the process.
                del agreed, error

    def largest(self, *numbers: int | float) -> tuple[int | float, ...]:
        """As of one process; one message."""
        found = torch.tensor(numbers, dtype=torch.float64)
        with _sending():
            max_over([found], self.group)
        return tuple(found.tolist())

    def gathered(self, tensor: Tensor) -> list[Tensor]:
        """As of one process; two messages, the second as long as the longest tensor."""
        lengths = torch.zeros(self.size, dtype=torch.int64)
        lengths[self.rank] = len(tensor)
        longest = tensor.new_zeros(0)
        with _sending():
            sum_over([lengths], self.group)
            longest = tensor.new_zeros(int(lengths.max()), *tensor.shape[1:])
            longest[: len(tensor)] = tensor
            found = [torch.empty_like(longest) for _ in range(self.size)]
            dist.all_gather(found, longest, group=self.group)
        return [each[:length] for each, length in zip(found, lengths.tolist(), strict=True)]

    def texts(self, text: str) -> list[str]:
        """As of one process."""
        encoded = torch.from_numpy(np.frombuffer(text.encode("ascii"), np.uint8).copy())
        return [bytes(each.numpy()).decode("ascii") for each in self.gathered(encoded)]

    def from_first(self, tensor: Tensor) -> Tensor:
        """As of one process; one message."""
        sent = tensor.contiguous()
        with _sending():
            dist.broadcast(sent, group=self.group, group_src=0)
        return sent

    def in_order(self, rows: Tensor) -> Iterator[Tensor]:
        """As of one process; a message for each piece."""
        for owner, length in enumerate(len(each) for each in self.gathered(rows.new_zeros(len(rows), 0))):
            for start in range(0, length, PIECE):
                piece = rows.new_empty(min(PIECE, length - start), *rows.shape[1:])
                if owner == self.rank:
                    piece.copy_(rows[start : start + PIECE])
                with _sending():
                    dist.broadcast(piece, group=self.group, group_src=owner)
                yield piece

    def leave(self) -> None:
        """Close the connections, so that nobody waits for this process.

        A group that is destroyed keeps them as long as anything refers to it, a traceback for one; what a receiver does
        not get in time closes them.
        """
        for other in set(range(self.size)) - {self.rank}:
            with suppress(RuntimeError):
                work = dist.irecv(torch.zeros(1), group=self.group, group_src=other, tag=LEAVING)
                if work is not None:
                    work.wait(timedelta(milliseconds=1))

    def _stop(self) -> KeyboardInterrupt:
        """The signal that has asked, the one with the largest number where there were several."""
        return KeyboardInterrupt(int(self.largest(self.asked_to_stop())[0]))

    def _common(self, error: BaseException | None) -> BaseException:
        """What the lowest process that failed has raised."""
        said = self.texts("" if error is None else _told(error))
        rank = next(rank for rank, text in enumerate(said) if text)
        if rank == self.rank and error is not None:
            return error
        kind, text = json.loads(said[rank])
        found: BaseException = RuntimeError(f"process {rank} of {self.size} failed:\n{text}")
        if kind == "interrupt":
            found = KeyboardInterrupt(*text)
        elif kind == "data":
            found = DataError(text)
        found.__cause__ = error
        return found


def raised_by_all(error: BaseException) -> bool:
    """Whether all processes have raised this error, at the end of a block of :meth:`Together.summed`."""
    return getattr(error, "raised_by_all", False)


def require_same(together: Together, options: Mapping[str, object], remedy: str) -> None:
    """Raise DataError, in all processes, that names the first of these options that is not the same in all of them."""
    if together.size == 1:
        return
    own = {name: "nothing" if option is None else str(option) for name, option in options.items()}
    said = [json.loads(text) for text in together.texts(json.dumps(own))]
    for name in own:
        other = next((rank for rank, of_process in enumerate(said) if of_process[name] != said[0][name]), None)
        if other is not None:
            with together.agreed():
                raise DataError(
                    f"{name} must be the same in all processes; process 0 has {said[0][name]}, and process {other} "
                    f"has {said[other][name]}: {remedy}"
                )


def _told(error: BaseException) -> str:
    """What the others need to know of an error."""
    if isinstance(error, KeyboardInterrupt):
        return json.dumps(("interrupt", error.args))
    if isinstance(error, ValueError | OSError):
        return json.dumps(("data", str(error)))
    return json.dumps(("other", "".join(traceback.format_exception(error))))


@contextmanager
def _sending() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        raise LostProcess(
            f"another process has ended, or did not answer in time ({str(error).splitlines()[0]})"
        ) from error
