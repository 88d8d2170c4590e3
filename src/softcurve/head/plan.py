"""How a head is cut into tiles, so that what it needs beyond inputs and gradients stays within a budget of bytes.

Row tiles with all classes cost three matrix products for a loss and its gradients. Where the budget leaves so few rows
that the weight's gradient would be read and written too often, classes are cut as well; each block of logits is then
computed once more for every sweep over a row's statistics.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch

from softcurve.head import backends
from softcurve.head.half import half_on_cpu
from softcurve.head.tensors import HeadTensors
from softcurve.losses.spec import LossSpec

DEFAULT_BUDGET = {"cpu": 128 * 2**20, "cuda": 2**30}

# Entries that the elementwise passes work on at a time. On the CPU they then stay in the cache.
CACHE_ENTRIES = {"cpu": 2**18, "cuda": 2**25}

# Pieces of so many entries that a pass which lists classes works on at a time: it calls more operations for each.
GROUP_PIECES = 4

# Entries of a block of logits that no residual replaces, and its rows at most. On the CPU they stay in the cache from
# their product to their statistics: at a width of 128, a product that writes them to memory takes 1.5 times as long.
# A product of more features takes as long either way, and whole rows need fewer operations.
STREAMED_ENTRIES, STREAMED_ROWS, STREAMED_WIDTH = 2**20, 512, 160

# Entries of a block that is kept beside the others of its rows, so that it is in the cache from the product that writes
# it to the passes that read it, and its most rows.
KEPT_ENTRIES, KEPT_ROWS = 2**20, 512

# Classes of a list from which on it is collected from cached blocks; a shorter one is found faster in whole rows.
LONG_LIST = 128

# The rows of a tile of many classes begin at multiples of so many entries: on the CPU a product into 50,257 columns
# takes 1.4 times as long if they do not.
ALIGNED, LEAST_ALIGNED = 16, 1024

# Multiples of rows that a product takes: with 342 rows, one takes a tenth longer for each row than with 384.
ROWS_OF_PRODUCT = 64

# Rows below which cutting classes is cheaper than accumulating the weight's gradient once more for each tile. Targets
# over all classes need every block of both logits three times if classes are cut, and the kernel of more passes: with
# 15 whole rows they take two fifths of the time.
FEWEST_ROWS, FEWEST_ROWS_OF_DENSE = 64, 8


class Needs(NamedTuple):
    """The memory that a pass holds at a time, in buffers and numbers."""

    buffers: int | float  # tiles; one of half precision counts half
    temporaries: int  # pieces of ``Plan.cached`` entries
    row_entries: int  # numbers for each row of a tile: its features once more, its statistics


class Plan(NamedTuple):
    """Tiles of ``rows`` × ``classes``; ``cached`` entries at a time go through the elementwise passes.

    With ``kept`` every block of ``classes`` has memory of its own, and the buffers hold whole rows.
    """

    row_count: int
    class_count: int
    rows: int
    classes: int
    cached: int
    needs: Needs
    kept: bool = False

    @property
    def cuts_classes(self) -> bool:
        """Whether a tile holds only part of a row, so that a block is computed again for every use."""
        return self.classes < self.class_count and not self.kept

    @property
    def is_one_block(self) -> bool:
        """Whether a tile holds whole rows as one block."""
        return self.classes >= self.class_count

    @property
    def entries(self) -> int:
        """The size of a tile's buffer, rounded up to a multiple of 16 so that every buffer is 64-byte aligned."""
        return _rounded(self.rows * aligned(self.class_count if self.kept else self.classes), ALIGNED)

    def class_blocks(self, held: int) -> Iterator[slice]:
        """Yield the classes of each tile, of ``held``: all of them unless other processes have more."""
        return (slice(start, min(start + self.classes, held)) for start in range(0, held, self.classes))


def aligned(classes: int) -> int:
    """Return the entries from one row of a tile to the next."""
    return classes if classes < LEAST_ALIGNED else _rounded(classes, ALIGNED)


def _rounded(count: int, unit: int) -> int:
    """Return the least multiple of ``unit`` that is no less than ``count``."""
    return -(-count // unit) * unit


def _classes_within(entries: int, class_count: int) -> int:
    """Return how many classes, of ``class_count`` at most, a row of so many entries has room for."""
    if aligned(class_count) <= entries:
        return class_count
    return entries if entries < LEAST_ALIGNED else entries // ALIGNED * ALIGNED


def make_plan(
    row_count: int, class_count: int, *, dtype: torch.dtype, device: torch.device, needs: Needs,
    least_pieces: int | float, least_row_entries: int, whole_rows: bool, memory_budget: int | None,
    may_cut: bool = True, streamed: bool = False, fewest_rows: int = FEWEST_ROWS, kept: bool = False,
) -> Plan:  # fmt: skip
    """Return the plan of fewest tiles within ``memory_budget`` bytes; with ``whole_rows`` temporaries are whole rows.

    In a ``streamed`` pass every block of logits is computed and read once, so that on the CPU it is small. Where whole
    rows fit, ``kept`` cuts them into blocks that stay beside each other.

    Raises ``ValueError`` for less than one row of ``least_pieces`` of a few classes and ``least_row_entries``; of all
    classes, unless they ``may_cut``.
    """
    buffers, temporaries, row_entries = needs
    itemsize = dtype.itemsize
    entries = (DEFAULT_BUDGET.get(device.type, 2**30) if memory_budget is None else memory_budget) // itemsize
    row_count, class_count = max(row_count, 1), max(class_count, 1)
    fewest_classes = min(class_count, 16) if may_cut else class_count
    least = math.ceil(least_pieces * fewest_classes) + least_row_entries
    if entries < least:
        raise ValueError(
            f"memory_budget must be at least {least * itemsize} bytes for features and targets as wide as these, "
            f"got {memory_budget}"
        )
    # Half of the budget, at most, is for the temporaries.
    spare = entries - least_row_entries
    few = min(CACHE_ENTRIES.get(device.type, 2**18), max(fewest_classes, spare // max(1, 2 * temporaries)))
    few = few if may_cut else max(few, class_count)
    cached, fits = few, few >= class_count or not whole_rows
    if not fits and spare // 2 >= temporaries * class_count:
        cached, fits = class_count, True
    rows = int((entries - temporaries * cached) // (buffers * aligned(class_count) + row_entries))
    streamed = streamed and device.type == "cpu" and row_count * class_count > STREAMED_ENTRIES
    if fits and not streamed and rows >= (min(row_count, fewest_rows) if may_cut else 1):
        kept = kept and device.type == "cpu" and min(rows, row_count) * class_count > 2 * KEPT_ENTRIES
        rows = min(rows, KEPT_ROWS) if kept else rows
        even = -(-row_count // -(-row_count // rows))  # tiles of equal size
        rows = min(rows, row_count, _rounded(even, ROWS_OF_PRODUCT))
        cached = min(cached, max(rows * class_count, 1))
        classes = min(class_count, _rounded(-(-KEPT_ENTRIES // rows), ALIGNED)) if kept else class_count
        return Plan(row_count, class_count, rows, classes, cached, needs, kept)
    free = entries - temporaries * few
    most = STREAMED_ROWS if streamed else 1024
    rows = max(1, min(row_count, most, int(free // (buffers * min(class_count, 256) + row_entries))))
    rows = -(-row_count // -(-row_count // rows)) if streamed else rows
    classes = _classes_within(max(1, int((free - rows * row_entries) // (buffers * rows))), class_count)
    classes = min(classes, STREAMED_ENTRIES // rows) if streamed else classes
    blocks = -(-class_count // classes)
    even = -(-class_count // blocks)
    if streamed:  # operations on whole vectors of the processor
        even = min(classes, -(-even // 256) * 256)
    return Plan(row_count, class_count, rows, even, min(few, rows * even), needs)


def plan_pass(
    spec: LossSpec, tensors: HeadTensors, count: int, budget: int | None, *, directed: bool, in_triton: bool,
    streamed: bool,
) -> Plan:  # fmt: skip
    """Plan a pass of first order over ``count`` rows; a ``directed`` one holds the changes beside the logits.

    A ``streamed`` pass forms no residuals.
    """
    teacher, sparse = spec.target == "teacher", not spec.compares_every_class
    width, dtype = _width(spec, tensors), tensors.dtype

    def needs(directed: bool) -> Needs:
        buffers: int | float = (1 + teacher) * (1 + directed) + (spec.softcap is not None and not in_triton)
        if spec.beside is not None:
            terms = 1 + bool(spec.beside.entropy)  # the labels' also for statistics alone
            buffers += terms * (1 + directed + (spec.softcap is not None))
        buffers += (spec.teacher_softcap is not None) * (1 + directed)
        if spec.groups:  # the groups of both sides, and what takes changes back through the model's soft cap
            buffers += 2 * (1 + directed) + (directed and spec.softcap is not None)
            if spec.group is not None:  # the groups' logits are kept, and those that several processes have are sent
                buffers += 2 * (1 + directed) + 1
        buffers += _copies_target(spec, tensors)
        if spec.beside is not None:  # a copy of the logits of labels likewise
            buffers += spec.beside.target == "logits" and tensors.excluded is not None
        written = 2 * (spec.target in ("probabilities", "logits"))
        # The features' own copy, their part of a gradient, and times a factor; the listed classes in float64.
        row = (3 + 2 * directed) * width + 32
        if tensors.indices is not None:
            row += (24 + 16 * directed) * (tensors.indices.shape[1] + 1)
        if tensors.label_values is not None and tensors.labels is not None:
            row += (24 + 16 * directed) * (tensors.labels.shape[1] + 1)
        row += _excluded_entries(tensors)
        maps = [(tensors.input, tensors.weight), *([(tensors.target, tensors.target_weight)] if teacher else [])]
        if not in_triton:
            halves = sum(half_on_cpu(*operands) is not None for operands in maps)
            buffers += (1 + directed) * halves / 2
            return Needs(buffers, (6 if sparse else 24) + 4 * directed + written, row)
        # No temporaries but a target's gradient and numbers of rows; residuals may have half-precision buffers.
        halves = sum(backends.residual_dtype(spec, *operands, dtype) is not None for operands in maps)
        return Needs(buffers + (1 + directed) * halves / 2 + (1 + 2 * directed) * (written > 0), 0, row + 64)

    classes = spec.widest(tensors.weight.shape[0])
    if tensors.target_groups is not None:
        count_of_target = len(tensors.target_groups)
        part = spec.widest_part(count_of_target) if spec.cuts_target else count_of_target
        classes = max(classes, part, spec.groups)
    most = needs(True)  # one least budget for all passes
    return make_plan(
        count, classes, dtype=dtype, device=tensors.input.device, may_cut=not spec.groups,
        needs=most if directed else needs(False), least_pieces=most.buffers + most.temporaries,
        least_row_entries=most.row_entries, whole_rows=not (sparse or in_triton), memory_budget=budget,
        streamed=streamed and sparse and width <= STREAMED_WIDTH,
        fewest_rows=FEWEST_ROWS if sparse else FEWEST_ROWS_OF_DENSE,
        kept=directed and not (in_triton or spec.pairs) and spec.target == "sparse" and spec.beside is None,
    )  # fmt: skip


def plan_curvature(
    spec: LossSpec, tensors: HeadTensors, count: int, budget: int | None, extra_buffers: int, *, kept: bool
) -> Plan:
    """Plan a pass of second order: ``extra_buffers`` for a column's change, for ``q`` and for the residual."""
    device, row = tensors.input.device, 5 * _width(spec, tensors) + 64 + _excluded_entries(tensors)
    if tensors.indices is not None:
        row += 40 * (tensors.indices.shape[1] + 1)
    buffers = 1 + (spec.target == "teacher") + (spec.softcap is not None) + extra_buffers
    buffers += _copies_target(spec, tensors)
    kept = kept and spec.target == "sparse" and device.type == "cpu"
    if budget is None:  # more than a pass of first order has, but for blocks that are kept: those of 256 rows are large
        budget = (2 - kept) * DEFAULT_BUDGET.get(device.type, 2**30)
    return make_plan(
        count, spec.widest(tensors.weight.shape[0]), dtype=tensors.dtype, device=device,
        needs=Needs(buffers, 6 if spec.target == "sparse" else 24, row), least_pieces=30, least_row_entries=row,
        whole_rows=False, memory_budget=budget, kept=kept,
    )  # fmt: skip


def plan_list(spec: LossSpec, tensors: HeadTensors, count: int, budget: int | None, k: int) -> Plan:
    """Plan a pass that lists the ``k`` most probable classes of each row, of which every process sends its own."""
    processes = 1 if spec.processes is None else spec.processes.size()
    # A group of rows: its softmax, and at most as much for chunks, their columns as int64 and their logits.
    row = 2 * _width(spec, tensors) + 16 * k * processes + 32 + _excluded_entries(tensors)
    needs = Needs(1 + (spec.softcap is not None), 4 * GROUP_PIECES, row)
    streamed = tensors.dtype == torch.float32 and k >= LONG_LIST and _width(spec, tensors) <= STREAMED_WIDTH
    return make_plan(
        count, spec.widest(tensors.weight.shape[0]), dtype=tensors.dtype, device=tensors.input.device, needs=needs,
        least_pieces=needs.buffers + needs.temporaries, least_row_entries=needs.row_entries, whole_rows=False,
        memory_budget=budget, streamed=streamed,
    )  # fmt: skip


def _copies_target(spec: LossSpec, tensors: HeadTensors) -> bool:
    """Return whether a tile copies the target's logits to mask the classes that its rows exclude."""
    return spec.target == "logits" and tensors.excluded is not None and not spec.groups


def _excluded_entries(tensors: HeadTensors) -> int:
    """Return what the places of a row's excluded classes occupy: their columns, and the pairs that lie in a block."""
    return 0 if tensors.excluded is None else 12 * tensors.excluded.shape[1]


def _width(spec: LossSpec, tensors: HeadTensors) -> int:
    """Return the number of features of a row, those of a teacher included."""
    of_teacher = tensors.target if spec.target == "teacher" else None
    return tensors.input.shape[1] + (0 if of_teacher is None else of_teacher.shape[1])
