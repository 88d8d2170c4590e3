"""Buffers for tiles, which outlive a call.

On the CPU, memory that is fresh from the system costs a page fault for every 4 KiB, which for a tile takes longer than
its matrix product. So the tiles of the last pass are kept for the next, up to ``KEPT_BYTES`` in all, and Linux is asked
for pages of 2 MiB, as torch does where ``THP_MEM_ALLOC_ENABLE`` is set. Gradients, which every call returns in fresh
memory, are not on such pages: where the system has to move others to make one, that takes longer than the faults. On
CUDA torch's own allocator keeps memory.
"""

from __future__ import annotations

import ctypes
import functools
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field

import torch
from torch import Tensor

KEPT_BYTES = 128 * 2**20
LARGE_BYTES = 4 * 2**20  # from here on large pages are asked for
PAGE, MADV_HUGEPAGE = 4096, 14

_kept: list[Tensor] = []  # flat CPU tensors; popping and appending are atomic, so threads do not share one


def _reuse(entries: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return a flat tensor of at least ``entries``, with anything in it. What is kept and too small is freed for it."""
    if device.type == "cpu":
        for i in reversed(range(len(_kept))):
            with suppress(IndexError):  # another thread was faster
                kept = _kept.pop(i)
                if kept.dtype == dtype and kept.numel() >= entries:
                    return kept
                _kept.append(kept)
        _kept.clear()
    return _empty(entries, dtype, device)


def _empty(entries: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return a flat ``torch.empty``, on large pages where the system has them."""
    with torch.inference_mode(mode=False):  # it may be kept for a pass outside
        fresh = torch.empty(entries, dtype=dtype, device=device)
    if device.type == "cpu" and fresh.nbytes >= LARGE_BYTES and (advise := _madvise()) is not None:
        start, stop = -(-fresh.data_ptr() // PAGE) * PAGE, (fresh.data_ptr() + fresh.nbytes) // PAGE * PAGE
        advise(start, stop - start, MADV_HUGEPAGE)  # a refusal costs nothing but time
    return fresh


@functools.cache
def _madvise() -> Callable[[int, int, int], int] | None:
    if sys.platform != "linux":
        return None
    with suppress(OSError, AttributeError):
        function = ctypes.CDLL(None).madvise
        function.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
        return function
    return None


@dataclass
class Buffers:
    """The buffers of one pass, by name, the same for all of its tiles.

    They are parts of one tensor as far as they fit into what was reserved, so that the next pass can reuse that tensor
    however it divides it.
    """

    dtype: torch.dtype
    device: torch.device
    taken: list[Tensor] = field(default_factory=list)
    free: Tensor | None = None
    buffers: dict[str, Tensor] = field(default_factory=dict)

    def reserve(self, size: int) -> None:
        """Reserve entries in one piece. On the CPU they occupy nothing until they are written."""
        self.taken.append(_reuse(size, self.dtype, self.device))
        self.free = self.taken[-1]

    def take(self, name: str, size: int) -> Tensor:
        """Return a flat tensor of at least ``size`` entries."""
        if name not in self.buffers or self.buffers[name].numel() < size:
            if self.free is None or self.free.numel() < size:
                self.reserve(size)
            assert self.free is not None
            self.buffers[name], self.free = self.free[:size], self.free[size:]
        return self.buffers[name]

    def release(self) -> None:
        """Keep the buffers for later passes, the latest first, as far as ``KEPT_BYTES`` allow."""
        _kept.extend(buffer for buffer in self.taken if buffer.device.type == "cpu" and buffer.nbytes <= KEPT_BYTES)
        while sum(buffer.nbytes for buffer in list(_kept)) > KEPT_BYTES:
            with suppress(IndexError):
                _kept.pop(0)
        self.taken, self.free, self.buffers = [], None, {}
