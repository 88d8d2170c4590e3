"""The largest entry of each row by way of the maxima of chunks of its columns.

Chunk ``j`` has the columns ``j, j + chunks, j + 2 chunks, …``: the maximum over such chunks is vectorised, and torch's
``max``, which also finds the column, takes many times as long for one entry.
"""

from __future__ import annotations

import torch
from torch import Tensor

# Columns of a chunk at most: with more, the maxima take longer.
CHUNK = 16


def maxima_of_chunks(z: Tensor, size: int = CHUNK) -> Tensor:
    """Return the maxima of chunks of ``size`` columns, and behind them the columns that are left over."""
    chunks = z.shape[1] // size
    if size == 1:
        return z
    maxima = z[:, : size * chunks].unflatten(-1, (size, chunks)).amax(1)
    return maxima if size * chunks == z.shape[1] else torch.cat([maxima, z[:, size * chunks :]], -1)


def largest(z: Tensor, maxima: Tensor | None = None, size: int = CHUNK) -> tuple[Tensor, Tensor]:
    """Return the largest entry of each row and its column, ``(rows, 1)``; the maxima are those of its chunks."""
    width = z.shape[1]
    if maxima is None:
        if width < CHUNK**2:
            return z.max(-1, keepdim=True)
        maxima = maxima_of_chunks(z, size)
    top, at = maxima.max(-1, keepdim=True)
    if size == 1:
        return top, at
    chunks = width // size
    members = at.clamp(max=chunks - 1) + chunks * torch.arange(size, device=z.device)
    inside = members.gather(-1, z.gather(-1, members).argmax(-1, keepdim=True))
    return top, torch.where(at < chunks, inside, at + (size - 1) * chunks)
