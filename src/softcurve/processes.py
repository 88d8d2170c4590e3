"""Sums and maxima over the processes of a group, with one message for several tensors."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup


def named_group(name: str) -> ProcessGroup:
    """Return the process group of a name, because custom operators accept only plain values."""
    return dist.distributed_c10d._resolve_process_group(name)  # type: ignore[attr-defined,arg-type]


def part_of(count: int, rank: int, size: int) -> slice:
    """Return which of ``count`` entries are those of process ``rank`` of ``size``, as ``distribute_tensor`` cuts."""
    most = -(-count // size)
    start = min(most * rank, count)
    return slice(start, min(start + most, count))


def sum_over(tensors: Sequence[Tensor], group: ProcessGroup | None) -> None:
    """Replace tensors of one dtype by their sums over the processes, which are bitwise equal in all of them.

    A single process (``None``) changes nothing.
    """
    _reduce(tensors, group, dist.ReduceOp.SUM)


def max_over(tensors: Sequence[Tensor], group: ProcessGroup | None) -> None:
    """Replace tensors of one dtype by their elementwise maxima over the processes."""
    _reduce(tensors, group, dist.ReduceOp.MAX)


def _reduce(tensors: Sequence[Tensor], group: ProcessGroup | None, operation: dist.ReduceOp.RedOpType) -> None:
    if group is None:
        return
    if len(tensors) == 1 and tensors[0].is_contiguous():
        dist.all_reduce(tensors[0], operation, group=group)
        return
    message = torch.cat([tensor.reshape(-1) for tensor in tensors])
    dist.all_reduce(message, operation, group=group)
    for tensor, part in zip(tensors, message.split([tensor.numel() for tensor in tensors]), strict=True):
        tensor.copy_(part.view(tensor.shape))
