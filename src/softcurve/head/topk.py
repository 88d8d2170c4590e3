"""The most probable classes of each row, with log-probabilities over all classes, from one pass over the tiles.

A row is read three times while it is in the cache. The first pass takes the maximum of chunks of its classes; the ``k``
largest classes of a row lie in the ``k`` chunks of the largest maxima, whose classes alone are sorted. The second is
torch's softmax, which is faster than an exponential and a sum, and the third sums it without the largest class: the
normaliser is ``1 + rest`` with ``rest = Σ_{k≠top} e^{z_k − z_top}``, which keeps the digits of a confident row.

Only a row with equal logits among or beside its ``k`` largest is looked at again as a whole, because torch's ``topk``
selects and orders equal numbers as it likes: the lower class comes first here.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from softcurve.array_types import Float, Int
from softcurve.head.kernel import row_groups
from softcurve.head.plan import GROUP_PIECES
from softcurve.head.tensors import HeadTensors
from softcurve.head.tiles import Tile, Tiles
from softcurve.losses.spec import LossSpec
from softcurve.processes import sum_over

# Entries of a chunk: with fewer, the maxima take longer than what they save; with more, they are no longer vectorised.
LEAST_CHUNKED, MOST_CHUNKED = 3, 16

# The rows of so many pieces are searched at a time, so that torch shares them among its threads.
SEARCHED_PIECES = 16


class TopRows(NamedTuple):
    """The largest logits of some classes, in falling order, and ``Σ_{k≠top} e^{z_k − z_top}`` over these classes."""

    values: Float[Tensor, "rows k"]
    classes: Int[Tensor, "rows k"]
    rest: Float[Tensor, "rows 1"]  # in float64


def top_classes(
    spec: LossSpec, tensors: HeadTensors, k: int, budget: int | None
) -> tuple[Int[Tensor, "rows k"], Float[Tensor, "rows k"]]:
    """Return the ``k`` most probable classes of each row and their log-probabilities; of equal ones the lower first."""
    n, device = len(tensors.input), tensors.input.device
    indices = torch.zeros((n, k), dtype=torch.int64, device=device)
    log_probs = torch.zeros((n, k), dtype=tensors.dtype, device=device)
    for tile in Tiles(spec, tensors, budget, slice(0, n), listed=k):
        found = _top_of_tile(tile, k)
        largest = found.values.double()
        indices[tile.rows] = found.classes
        log_probs[tile.rows] = (largest - largest[:, :1] - torch.log1p(found.rest)).to(log_probs.dtype)
    return indices, log_probs


def _top_of_tile(tile: Tile, k: int) -> TopRows:
    """Return the largest logits of a tile's rows over the classes of all processes."""
    spec, group = tile.tiles.spec, tile.tiles.group
    found: list[TopRows] = []
    for block, _ in tile.blocks():
        groups = row_groups(block.z, SEARCHED_PIECES * tile.tiles.plan.cached)
        parts = [_top_of_rows(tile, block.z[rows], k) for rows in groups]
        values, classes, rest = (torch.cat(part) for part in zip(*parts, strict=True))
        new = TopRows(values, classes + spec.first + block.classes.start, rest)
        found = [_merged([*found, new], k)]
    return found[0] if group is None else _merged(_gathered(tile, found, k, group), k)


def _top_of_rows(tile: Tile, z: Tensor, k: int) -> TopRows:
    """Map the logits of some rows in place, and return the largest of each."""
    logit_map, cached, count = tile.tiles.spec.logit_map, tile.tiles.plan.cached, z.shape[1]
    more = min(k + 1, count)  # the one behind the largest may be equal to the last of them
    size = _chunk_size(count, more)
    maxima = z.new_empty(len(z), count // size + count % size) if size > 1 else z
    scratch = tile.tiles.buffers.take("softmax", max(GROUP_PIECES * cached, count))
    rests = []
    if not logit_map.is_identity:
        for rows in row_groups(z, cached):
            z[rows] = logit_map.value(z[rows])
    for rows in row_groups(z, GROUP_PIECES * cached):
        part = z[rows]
        if size > 1:
            _maxima(part, size, maxima[rows])
        rests.append(_rest(part, maxima[rows], size, scratch[: part.numel()].view(part.shape)))
    values, columns = _some_largest(z, more, maxima)
    equal = (values[:, 1:] == values[:, :-1]).any(-1) & ~values[:, 0].isnan()
    values, columns = values[:, :k], columns[:, :k]
    for rows in equal.nonzero().squeeze(-1).split(max(1, cached // count)):
        columns[rows] = _first_of_equal(z[rows], values[rows, -1:], values.shape[1])
    return TopRows(values, columns, torch.cat(rests))


def _chunk_size(count: int, k: int) -> int:
    """Return the number of entries of a chunk: 1 where it would save nothing."""
    size = min(MOST_CHUNKED, math.isqrt(count // k))
    return size if size >= LEAST_CHUNKED else 1


def _maxima(z: Tensor, size: int, out: Tensor) -> Tensor:
    """Set ``out`` to the maxima of chunks of ``size`` columns, and behind them the columns that are left over.

    Chunk ``j`` has the columns ``j, j + chunks, j + 2 chunks, …``, since the maximum over such chunks is vectorised.
    """
    chunks = z.shape[1] // size
    torch.amax(z[:, : size * chunks].view(-1, size, chunks), 1, out=out[:, :chunks])
    out[:, chunks:] = z[:, size * chunks :]
    return out


def _rest(z: Tensor, maxima: Tensor, size: int, out: Tensor) -> Tensor:
    """Return ``Σ_{k≠top} e^{z_k − z_top}`` of each row, in float64; ``out`` is a buffer."""
    chunks = z.shape[1] // size
    top, at = maxima.max(-1, keepdim=True)
    if size > 1:
        members = at.clamp(max=chunks - 1) + chunks * torch.arange(size, device=z.device)
        inside = members.gather(-1, z.gather(-1, members).argmax(-1, keepdim=True))
        at = torch.where(at < chunks, inside, at + (size - 1) * chunks)
    p = torch.softmax(z, -1, out=out)
    of_top = p.gather(-1, at)
    rest = p.scatter_(-1, at, 0.0).sum(-1, keepdim=True).double() / of_top.double()
    return torch.where(top == -math.inf, 0.0, rest)  # every class of the block is masked


def _some_largest(z: Tensor, k: int, maxima: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Return the ``k`` largest of each row in falling order, and columns of them.

    The maxima, and the entries of the chunks with the largest, are searched in the same way: for one number torch's
    ``topk`` takes longer than its softmax.
    """
    count = z.shape[1]
    size = _chunk_size(count, k)
    if size == 1:
        return z.topk(k)
    chunks = count // size
    if maxima is None:
        maxima = _maxima(z, size, z.new_empty(len(z), chunks + count % size))
    _, at = _some_largest(maxima[:, :chunks], k)
    every = torch.arange(count, device=z.device)
    columns = (at.unsqueeze(1) + every[: size * chunks : chunks].unsqueeze(-1)).flatten(1)
    if count > size * chunks:
        columns = torch.cat([columns, every[size * chunks :].expand(len(z), -1)], -1)
    values, at = _some_largest(z.gather(-1, columns), k)
    return values, columns.gather(-1, at)


def _first_of_equal(z: Tensor, least: Tensor, k: int) -> Tensor:
    """Return the columns of the ``k`` largest of each row, of which ``least`` is the last; of equal ones the first."""
    above, equal = z > least, z == least
    kept = above | (equal & (equal.cumsum(-1, dtype=torch.int32) <= k - above.sum(-1, keepdim=True)))
    columns = kept.nonzero()[:, 1].view(len(z), k)
    return columns.gather(-1, z.gather(-1, columns).sort(dim=-1, descending=True, stable=True).indices)


def _merged(parts: Sequence[TopRows], k: int) -> TopRows:
    """Return the largest of several parts, whose classes are in the order of the parts."""
    if len(parts) == 1:
        return parts[0]
    values, order = torch.cat([part.values for part in parts], -1).sort(dim=-1, descending=True, stable=True)
    classes = torch.cat([part.classes for part in parts], -1).gather(-1, order[:, :k])
    tops = torch.cat([part.values[:, :1] for part in parts], -1).double()
    top, first = tops.max(-1, keepdim=True)
    weight = torch.where(tops == -math.inf, 0.0, torch.exp(tops - torch.where(top == -math.inf, 0.0, top)))
    rest = (torch.cat([part.rest for part in parts], -1) * weight).sum(-1, keepdim=True)
    return TopRows(values[:, :k], classes, rest + weight.scatter(-1, first, 0.0).sum(-1, keepdim=True))


def _gathered(tile: Tile, found: Sequence[TopRows], k: int, group: ProcessGroup) -> list[TopRows]:
    """Return what each process has found among its classes, if it has any, by one message."""
    spec = tile.tiles.spec
    widest, classes = spec.widest(0), spec.class_count(0)
    message = tile.model.input.new_zeros((group.size(), len(tile), 2 * k + 1), dtype=torch.float64)
    for part in found:
        own, columns = message[group.rank()], part.values.shape[1]
        own[:, :columns], own[:, k : k + columns], own[:, -1:] = part
    sum_over([message], group)
    parts = []
    for process, own in enumerate(message):
        columns = min(k, max(0, min(widest, classes - process * widest)))
        if columns:
            parts.append(TopRows(own[:, :columns], own[:, k : k + columns].long(), own[:, -1:]))
    return parts
