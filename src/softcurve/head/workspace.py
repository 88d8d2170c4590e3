"""Room for tiles that outlives a call.

On the CPU, memory that is fresh from the system costs a page fault for every 4 KiB, which for a tile takes longer than
its matrix product. So the tiles of the last pass are kept for the next, up to ``KEPT_BYTES`` in all. On CUDA torch's
own allocator does this.
"""

from __future__ import annotations

import torch
from torch import Tensor

KEPT_BYTES = 128 * 2**20

_kept: list[Tensor] = []  # flat CPU tensors; popping and appending are atomic, so threads do not share one


def take(entries: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A flat tensor of at least ``entries``, with anything in it."""
    if device.type == "cpu":
        for i in reversed(range(len(_kept))):
            try:
                room = _kept.pop(i)
            except IndexError:  # another thread was faster
                continue
            if room.dtype == dtype and room.numel() >= entries:
                return room
            _kept.append(room)
    return torch.empty(entries, dtype=dtype, device=device)


def give_back(rooms: list[Tensor]) -> None:
    """Keep what is no longer needed, the latest first, as far as ``KEPT_BYTES`` allow."""
    _kept.extend(room for room in rooms if room.device.type == "cpu" and room.nbytes <= KEPT_BYTES)
    while sum(room.nbytes for room in list(_kept)) > KEPT_BYTES:
        try:
            _kept.pop(0)
        except IndexError:
            return
