"""How a head is cut into tiles, so that what it needs beyond inputs and gradients stays within a budget of bytes.

Row tiles with all classes cost three matrix products for a loss and its gradients. Where the budget leaves so few rows
that the weight's gradient would be read and written too often, classes are cut as well; each block of logits is then
computed once more for every sweep over a row's statistics.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from softcurve.head import backends
from softcurve.head.tensors import HeadTensors
from softcurve.losses.spec import LossSpec

DEFAULT_BUDGET = {"cpu": 128 * 2**20, "cuda": 2**30}


def default_budget(device: torch.device, tiles: int = 2) -> int:
    """Bytes for ``tiles`` tiles of which each is as large as the one that a loss takes by default."""
    return tiles * DEFAULT_BUDGET.get(device.type, 2**30)


# Entries that the elementwise passes work on at a time. On the CPU they then stay in the cache.
CACHE_ENTRIES = {"cpu": 2**18, "cuda": 2**25}

# Rows below which cutting classes is cheaper than accumulating the weight's gradient once more for each tile.
FEWEST_ROWS = 64


@dataclass(frozen=True)
class Plan:
    """Tiles of ``rows`` × ``classes``; ``cached`` entries at a time go through the elementwise passes."""

    row_count: int
    class_count: int
    rows: int
    classes: int
    cached: int
    buffers: int | float  # tiles alive at a time; of half precision half a one
    temporaries: int  # buffers of ``cached`` entries alive at a time
    row_entries: int  # for each row of a tile: its features once more, its statistics
    itemsize: int

    @property
    def cuts_classes(self) -> bool:
        """Whether a tile holds only part of a row."""
        return self.classes < self.class_count

    @property
    def entries(self) -> int:
        """The size of a tile's buffer, rounded up to a multiple of 16 so that every buffer is 64-byte aligned."""
        return -(-self.rows * self.classes // 16) * 16

    @property
    def bytes(self) -> int:
        """The most that tiles and temporaries occupy."""
        each_row = self.buffers * self.classes + self.row_entries
        return int(self.itemsize * (self.rows * each_row + self.temporaries * self.cached))

    def class_blocks(self, held: int) -> Iterator[slice]:
        """The classes of each tile, of ``held``: all, unless other processes have more."""
        for start in range(0, held, self.classes):
            yield slice(start, min(start + self.classes, held))

    def __str__(self) -> str:
        """Return one line that shows the tiles and their memory."""
        return (
            f"{self.row_count} rows × {self.class_count} classes in tiles of {self.rows} × {self.classes}, "
            f"{self.buffers:g} at a time: {self.bytes / 2**20:.1f} MiB"
        )


def make_plan(
    row_count: int,
    class_count: int,
    *,
    dtype: torch.dtype,
    device: torch.device,
    buffers: int | float,
    temporaries: int,
    row_entries: int,
    least_pieces: int | float,
    least_row_entries: int,
    whole_rows: bool,
    memory_budget: int | None,
) -> Plan:
    """The plan of fewest tiles within ``memory_budget`` bytes.

    ``buffers`` tiles and ``temporaries`` cache-sized pieces are alive at a time, and ``row_entries`` numbers for each
    row of a tile; with ``whole_rows`` the pieces are whole rows as long as classes are not cut. Raises ``ValueError``
    for less than one row of ``least_pieces`` of a few classes and ``least_row_entries``.
    """
    itemsize = dtype.itemsize
    entries = (default_budget(device, 1) if memory_budget is None else memory_budget) // itemsize
    row_count, class_count = max(row_count, 1), max(class_count, 1)

    def planned(rows: int, classes: int, cached: int) -> Plan:
        return Plan(row_count, class_count, rows, classes, cached, buffers, temporaries, row_entries, itemsize)

    fewest_classes = min(class_count, 16)
    least = math.ceil(least_pieces * fewest_classes) + least_row_entries
    if entries < least:
        raise ValueError(
            f"memory_budget must be at least {least * itemsize} bytes for features and targets as wide as these, "
            f"got {memory_budget}"
        )
    # Half of the budget, at most, is for the temporaries.
    spare = entries - least_row_entries
    cached = min(CACHE_ENTRIES.get(device.type, 2**18), max(fewest_classes, spare // max(1, 2 * temporaries)))
    fits = cached >= class_count or not whole_rows
    if not fits and spare // 2 >= temporaries * class_count:
        cached, fits = class_count, True
    rows = int((entries - temporaries * cached) // (buffers * class_count + row_entries))
    if fits and rows >= min(row_count, FEWEST_ROWS):
        tiles = -(-row_count // rows)
        rows = -(-row_count // tiles)
        return planned(rows, class_count, min(cached, max(rows * class_count, 1)))
    cached = min(CACHE_ENTRIES.get(device.type, 2**18), max(fewest_classes, spare // max(1, 2 * temporaries)))
    free = entries - temporaries * cached
    rows = max(1, min(row_count, 1024, int(free // (buffers * min(class_count, 256) + row_entries))))
    classes = max(1, min(class_count, int((free - rows * row_entries) // (buffers * rows))))
    blocks = -(-class_count // classes)
    return planned(rows, -(-class_count // blocks), min(cached, rows * classes))


def plan_pass(
    spec: LossSpec, tensors: HeadTensors, count: int, budget: int | None, *, directed: bool, in_triton: bool
) -> Plan:
    """Plan a pass of first order over ``count`` rows; a ``directed`` one holds the changes beside the logits."""
    teacher, sparse = spec.target == "teacher", spec.target == "sparse"
    halves = [backends.residual_dtype(spec, tensors.input, tensors.weight, tensors.dtype)]
    halves += [backends.residual_dtype(spec, tensors.target, tensors.target_weight, tensors.dtype)] if teacher else []

    def needs(directed: bool) -> tuple[int | float, int, int]:
        """Return the buffers, the cache-sized temporaries, and the numbers for each row, alive at a time."""
        buffers: int | float = (1 + teacher) * (1 + directed) + (spec.softcap is not None and not in_triton)
        written = 2 * (spec.target in ("probabilities", "logits"))
        # The features' own copy, their part of a gradient, and times a factor; the listed classes in float64.
        row = (3 + 2 * directed) * _width(spec, tensors) + 32
        if tensors.indices is not None:
            row += (24 + 16 * directed) * (tensors.indices.shape[1] + 1)
        if in_triton:  # no temporaries but a target's gradient and numbers of rows
            buffers += (1 + directed) * sum(half is not None for half in halves) / 2
            return buffers + (1 + 2 * directed) * (written > 0), 0, row + 64
        return buffers, (6 if sparse else 24) + 4 * directed + written, row

    buffers, temporaries, row_entries = needs(directed)
    return make_plan(
        count,
        spec.widest(len(tensors.weight)),
        dtype=tensors.dtype,
        device=tensors.input.device,
        buffers=buffers,
        temporaries=temporaries,
        row_entries=row_entries,
        least_pieces=sum(needs(True)[:2]),  # one least for all passes
        least_row_entries=needs(True)[2],
        whole_rows=not (sparse or in_triton),
        memory_budget=budget,
    )


def plan_curvature(spec: LossSpec, tensors: HeadTensors, count: int, budget: int | None, extra_buffers: int) -> Plan:
    """Plan a pass of second order: ``extra_buffers`` for a column's change, for ``q`` and for the residual."""
    row = 5 * _width(spec, tensors) + 64
    if tensors.indices is not None:
        row += 40 * (tensors.indices.shape[1] + 1)
    return make_plan(
        count,
        spec.widest(len(tensors.weight)),
        dtype=tensors.dtype,
        device=tensors.input.device,
        buffers=1 + (spec.target == "teacher") + (spec.softcap is not None) + extra_buffers,
        temporaries=6 if spec.target == "sparse" else 24,
        row_entries=row,
        least_pieces=30,
        least_row_entries=row,
        whole_rows=False,
        memory_budget=default_budget(tensors.input.device) if budget is None else budget,
    )


def _width(spec: LossSpec, tensors: HeadTensors) -> int:
    """The features of a row, those of a teacher included."""
    teacher = spec.target == "teacher" and tensors.target is not None
    return tensors.input.shape[1] + (tensors.target.shape[1] if teacher and tensors.target is not None else 0)
