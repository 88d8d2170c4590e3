"""The most probable classes of each row, with log-probabilities over all classes, from one pass over the tiles.

A group of rows is read while it is in the cache: by the maxima of chunks of its classes, by torch's softmax, which is
faster than an exponential and a sum, and by the sum of that without the largest class. The normaliser is ``1 + rest``
with ``rest = Σ_{k≠top} e^{z_k − z_top}``, which keeps the digits of a confident row.

In float32 on the CPU, for long lists and for rows that are cut into many blocks, logits above a bound of their row
become candidates (:mod:`softcurve.head.candidates`). The bound follows from the maxima of the first block, or for a
long list from a sample of the classes. The rows of which a sample promised too much are computed again without it.

Elsewhere the ``k`` largest classes of a row are sorted, which lie in the ``k`` chunks of the largest maxima. Only a row
with equal logits among or beside its ``k`` largest is looked at again as a whole, because torch's ``topk`` selects and
orders equal numbers as it likes: the lower class comes first here.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from softcurve.array_types import Float, Int
from softcurve.head import candidates
from softcurve.head.kernel import row_groups
from softcurve.head.maxima import CHUNK, largest, maxima_of_chunks
from softcurve.head.plan import GROUP_PIECES, LONG_LIST
from softcurve.head.tensors import HeadTensors
from softcurve.head.tiles import Tile, Tiles
from softcurve.losses.spec import LossSpec
from softcurve.processes import sum_over

# Entries of a chunk: with fewer, the maxima take longer than what they save.
LEAST_CHUNKED = 3

# Places of a list of candidates beside those of its k largest, and every which class is sampled for a bound.
LEAST_ROOM, SAMPLED = 512, 32

# Classes of a block, for each of a list, in which sorting the lists of two blocks takes longer than collecting one.
MERGED = 256

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

    def write(rows: slice | Tensor, *, samples: bool) -> Tensor:
        """Write the lists of some rows, and return which rows a sample of their classes has misled."""
        misled = torch.zeros(n, dtype=torch.bool, device=device)
        for tile in Tiles(spec, tensors, budget, rows, listed=k):
            found, complete = _top_of_tile(tile, k, samples=samples)
            largest = found.values.double()
            indices[tile.rows] = found.classes
            log_probs[tile.rows] = (largest - largest[:, :1] - torch.log1p(found.rest)).to(log_probs.dtype)
            if complete is not None:
                misled[tile.rows] = ~complete
        return misled

    if spec.processes is not None:  # whose messages must be of the same rows
        write(slice(0, n), samples=False)
    elif len(again := write(slice(0, n), samples=True).nonzero().squeeze(-1)):
        write(again, samples=False)
    return indices, log_probs


def _top_of_tile(tile: Tile, k: int, *, samples: bool) -> tuple[TopRows, Tensor | None]:
    """Return the largest logits of a tile's rows over the classes of all processes.

    If the classes were sampled, also return which rows, ``(rows,)``, have as many above the bound of the sample.
    """
    spec, group, plan = tile.tiles.spec, tile.tiles.group, tile.tiles.plan
    is_merged_often = plan.cuts_classes and plan.classes < MERGED * k
    if candidates.serves(tile.model.input) and (k >= LONG_LIST or is_merged_often):
        top, complete = _collected(tile, k, samples=samples)
        found = [] if top is None else [top]
    else:
        found, complete = [], None
        for block, _ in tile.blocks():
            groups = row_groups(block.z, SEARCHED_PIECES * plan.cached)
            parts = [_top_of_rows(tile, block.z[rows], k) for rows in groups]
            values, classes, rest = (torch.cat(part) for part in zip(*parts, strict=True))
            new = TopRows(values, classes + spec.first + block.classes.start, rest)
            found = [_merged([*found, new], k)]
    return found[0] if group is None else _merged(_gathered(tile, found, k, group), k), complete


def _collected(tile: Tile, k: int, *, samples: bool) -> tuple[TopRows | None, Tensor | None]:
    """Collect the largest logits of a tile's rows from its blocks, each of which is read while it is in the cache."""
    spec, plan, held = tile.tiles.spec, tile.tiles.plan, len(tile.model.weight)
    if not held:
        return None, None
    bound = _sampled_bound(tile, k) if samples else None
    lists = candidates.Candidates(len(tile), k, max(k, min(LEAST_ROOM, 2 * plan.cached // len(tile))), bound)
    sums: list[tuple[Tensor, Tensor]] = []
    for block, _ in tile.blocks():
        width = block.z.shape[1]
        size = CHUNK if width >= CHUNK**2 else 1
        scratch = tile.tiles.buffers.take("softmax", max(plan.cached, width))
        parts = []
        for rows in row_groups(block.z, plan.cached):
            z = block.z[rows]
            if not spec.logit_map.is_identity:
                z.copy_(spec.logit_map.value(z))
            maxima = maxima_of_chunks(z, size)
            parts.append(_top_and_rest(z, maxima, size, scratch[: z.numel()].view(z.shape)))
            if bound is None and block.classes.start == 0 and 4 * k <= 3 * (width // size):
                lists.raise_bound(rows, _kth_largest(maxima, k))
            lists.add(z, maxima, size, rows, spec.first + block.classes.start)
        tops, rests = (torch.cat(part) for part in zip(*parts, strict=True))
        sums = [_merged_rest([*(top for top, _ in sums), tops], [*(rest for _, rest in sums), rests])]
    complete = None if bound is None else lists.complete()
    return TopRows(*lists.largest(min(k, held)), sums[0][1]), complete


def _sampled_bound(tile: Tile, k: int) -> Tensor | None:
    """Return a number of each row, ``(rows, 1)``, above which are probably somewhat more than ``k`` of its logits.

    It is a large logit of every ``SAMPLED``-th class. For short lists the maxima of the first block give a bound.
    """
    model, classes = tile.model, len(tile.model.weight)
    step = max(SAMPLED, -(-classes // tile.tiles.plan.classes))
    some = -(-classes // step)
    # As many of the sample as belong to the k largest, and what makes fewer unlikely.
    expected = k * some / classes
    rank = int(expected + 3.5 * math.sqrt(expected)) + 4
    if 4 * k <= 3 * (min(classes, tile.tiles.plan.classes) // CHUNK) or 2 * rank > some:
        return None
    bias, low_rank = (None if part is None else part[::step] for part in (model.bias, model.low_rank))
    sample = model._replace(weight=model.weight[::step], bias=bias, low_rank=low_rank)
    z = sample.logits_into(model.input.new_empty(len(tile), some), slice(0, some))
    return candidates.just_below(_kth_largest(tile.tiles.spec.logit_map.value(z), rank))


def _kth_largest(z: Tensor, k: int) -> Tensor:
    """Return the ``k``-th largest of each row, ``(rows, 1)``, which numpy takes half of the time to find."""
    at = z.shape[1] - k
    return torch.from_numpy(np.partition(z.numpy(), at, axis=-1)[:, at : at + 1])


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
            maxima[rows] = maxima_of_chunks(part, size)
        rests.append(_top_and_rest(part, maxima[rows], size, scratch[: part.numel()].view(part.shape))[1])
    values, columns = _some_largest(z, more, maxima)
    equal = (values[:, 1:] == values[:, :-1]).any(-1) & ~values[:, 0].isnan()
    values, columns = values[:, :k], columns[:, :k]
    for rows in equal.nonzero().squeeze(-1).split(max(1, cached // count)):
        columns[rows] = _first_of_equal(z[rows], values[rows, -1:], values.shape[1])
    return TopRows(values, columns, torch.cat(rests))


def _chunk_size(count: int, k: int) -> int:
    """Return the number of entries of a chunk: 1 where it would save nothing."""
    size = min(CHUNK, math.isqrt(count // k))
    return size if size >= LEAST_CHUNKED else 1


def _top_and_rest(z: Tensor, maxima: Tensor, size: int, out: Tensor) -> tuple[Tensor, Tensor]:
    """Return the largest logit and ``Σ_{k≠top} e^{z_k − z_top}`` of each row, in float64; ``out`` is a buffer."""
    top, at = largest(z, maxima, size)
    p = torch.softmax(z, -1, out=out)
    of_top = p.gather(-1, at)
    rest = p.scatter_(-1, at, 0.0).sum(-1, keepdim=True).double() / of_top.double()
    return top.double(), torch.where(top == -math.inf, 0.0, rest)  # every class of the block is masked


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
        maxima = maxima_of_chunks(z, size)
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
    _, rest = _merged_rest([part.values[:, :1].double() for part in parts], [part.rest for part in parts])
    return TopRows(values[:, :k], classes, rest)


def _merged_rest(tops: Sequence[Tensor], rests: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Return the largest logit of several parts, and ``Σ_{k≠top} e^{z_k − z_top}`` over the classes of all of them."""
    if len(tops) == 1:
        return tops[0], rests[0]
    each = torch.cat(list(tops), -1)
    top, first = each.max(-1, keepdim=True)
    weight = torch.where(each == -math.inf, 0.0, torch.exp(each - torch.where(top == -math.inf, 0.0, top)))
    rest = (torch.cat(list(rests), -1) * weight).sum(-1, keepdim=True)
    return top, rest + weight.scatter(-1, first, 0.0).sum(-1, keepdim=True)


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
