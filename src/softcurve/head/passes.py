"""The three passes over a head's tiles: the losses, the losses with their gradients, the Hessian product.

A tile of logits comes from one matrix product, a kernel turns it into residuals where it stands, and two more products
take these back to features and weight. Rows of weight 0 have no part in a gradient and are left out.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from softcurve.head import backends, products, workspace
from softcurve.head.dense import DenseKernel
from softcurve.head.fast_rows import FastRows
from softcurve.head.kernel import Block, Kernel, Residuals, RowData, Statistics
from softcurve.head.plan import Plan, make_plan
from softcurve.head.products import Direction, LinearMap
from softcurve.head.sparse import SparseKernel
from softcurve.head.sparse_triton import TritonSparseKernel
from softcurve.head.target import target_block, target_tops
from softcurve.head.tensors import NOTHING, Directions, HeadTensors, Wanted
from softcurve.losses.spec import LossSpec
from softcurve.processes import sum_over


class Outcome(NamedTuple):
    """What a pass returns; what was not asked for is ``None``."""

    rows: Tensor  # (n,): each row's loss, or its change along a direction
    statistics: Statistics
    gradients: Directions  # of Σ weight · loss, or their changes along a direction


def plan_of(loss: LossSpec, tensors: HeadTensors, rows: int, directed: bool, budget: int | None) -> Plan:
    """The tiles of a pass over ``rows`` rows; a Hessian product wants the changes beside the logits."""
    teacher, listed = loss.target == "teacher", loss.target == "sparse"
    in_triton = backends.serves(loss, tensors.input.device, tensors.dtype)
    halves = [backends.residual_dtype(loss, tensors.input, tensors.weight, tensors.dtype)]
    halves += [backends.residual_dtype(loss, tensors.target, tensors.target_weight, tensors.dtype)] if teacher else []

    def needs(directed: bool) -> tuple[int | float, int, int]:
        """Tiles, cache-sized temporaries, and numbers for each row of a tile, that are alive at a time."""
        buffers: int | float = (1 + teacher) * (1 + directed) + (loss.softcap is not None and not in_triton)
        written = 2 * (loss.target in ("probabilities", "logits"))
        # The features' own copy, their part of a gradient, and times a factor; the listed classes in float64.
        width = tensors.input.shape[1] + (tensors.target.shape[1] if teacher and tensors.target is not None else 0)
        row = (3 + 2 * directed) * width + 32
        if listed and tensors.indices is not None:
            row += (24 + 16 * directed) * (tensors.indices.shape[1] + 1)
        if in_triton:  # which needs no temporaries, but for a target's gradient and for numbers of rows
            buffers += (1 + directed) * sum(half is not None for half in halves) / 2
            return buffers + (1 + 2 * directed) * (written > 0), 0, row + 64
        return buffers, (6 if listed else 24) + 4 * directed + written, row

    buffers, temporaries, row_entries = needs(directed)
    return make_plan(
        rows,
        loss.widest(len(tensors.weight)),
        dtype=tensors.dtype,
        device=tensors.input.device,
        buffers=buffers,
        temporaries=temporaries,
        row_entries=row_entries,
        least_pieces=sum(needs(True)[:2]),  # one least for all passes
        least_row_entries=needs(True)[2],
        whole_rows=not (listed or in_triton),
        memory_budget=budget,
    )


def evaluate(
    loss: LossSpec,
    tensors: HeadTensors,
    budget: int | None,
    *,
    wanted: Wanted = NOTHING,
    stats: bool = False,
    all_rows: bool = False,
) -> Outcome:
    """Each row's loss, not weighted, and the gradients of ``Σ weight · loss`` in the tensors that are ``wanted``.

    Rows of weight 0 have a loss of 0 unless ``all_rows``, or statistics, are asked for.
    """
    if len(tensors.input) == 0:
        return _Pass(loss, tensors, budget, wanted, stats=stats).outcome()
    kept = kept_rows(tensors.row_weight)
    run = _Pass(loss, tensors, budget, wanted, stats=stats)
    run.over(kept)
    if isinstance(kept, Tensor) and (stats or all_rows):
        rest = _Pass(loss, tensors, budget, NOTHING, stats=stats, into=run)
        rest.over((tensors.row_weight == 0).nonzero().squeeze(-1))
        rest.release()
    return run.outcome()


def hessian_product(
    loss: LossSpec,
    tensors: HeadTensors,
    directions: Directions,
    budget: int | None,
    *,
    wanted: Wanted,
    wants_tangents: bool = False,
) -> Outcome:
    """The changes of the gradients along ``directions`` (``None``: zero), and of each row's loss if wanted."""
    run = _Pass(loss, tensors, budget, wanted, directions=directions, wants_tangents=wants_tangents)
    if len(tensors.input):
        kept = kept_rows(tensors.row_weight)
        run.over(kept)
        if isinstance(kept, Tensor) and wants_tangents:
            rest = _Pass(loss, tensors, budget, NOTHING, directions=directions, wants_tangents=True, into=run)
            rest.over((tensors.row_weight == 0).nonzero().squeeze(-1))
            rest.release()
    return run.outcome()


def kept_rows(weight: Tensor) -> slice | Tensor:
    """The rows of weight other than 0; all of them where looking would make the device wait."""
    if weight.device.type != "cpu":
        return slice(0, len(weight))
    kept = weight != 0
    return slice(0, len(weight)) if kept.all() else kept.nonzero().squeeze(-1)


def require_classes(loss: LossSpec, tensors: HeadTensors) -> None:
    """Where a graph or a transform hid the indices from the public door. Looking would make a device wait."""
    indices, classes = tensors.indices, loss.class_count(len(tensors.weight))
    if indices is None or indices.device.type != "cpu" or indices.numel() == 0:
        return
    least, most = (int(bound) for bound in indices.aminmax())
    if least < 0 or most >= classes:
        raise IndexError(f"target must hold classes from 0 to {classes - 1}, got {least if least < 0 else most}")


@dataclass
class _Pass:
    loss: LossSpec
    tensors: HeadTensors
    budget: int | None
    wanted: Wanted
    stats: bool = False
    directions: Directions | None = None
    wants_tangents: bool = False
    into: _Pass | None = None  # whose rows and statistics are completed
    started: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        t = self.tensors
        n, self.dtype, device = len(t.input), t.dtype, t.input.device
        require_classes(self.loss, t)
        self.group = self.loss.processes
        self.target_tops = target_tops(self.loss, t)
        self.rooms = workspace.Rooms(self.dtype, device)
        self.rows = torch.zeros(n, dtype=self.dtype, device=device)
        self.statistics = Statistics()
        if self.stats:
            integers = [torch.zeros(n, dtype=torch.int64, device=device) for _ in range(2)]
            self.statistics = Statistics(torch.zeros_like(self.rows), torch.zeros_like(self.rows), *integers)
        if self.into is not None:
            self.rows, self.statistics = self.into.rows, self.into.statistics
        # Gradients of weights and biases are summed over tiles: in the dtype of the computation.
        self.gradients: list[Tensor | None] = []
        for i, (tensor, wanted) in enumerate(zip(t[:6], self.wanted, strict=True)):
            written_once = i == 3 and self.loss.target != "teacher"
            dtype = tensor.dtype if tensor is not None and written_once else self.dtype
            self.gradients.append(
                workspace.empty(tensor.shape, dtype, device) if wanted and tensor is not None else None
            )

    def outcome(self) -> Outcome:
        """What no tile has touched is 0; changes of gradients are rounded to the dtypes of their tensors."""
        self.release()
        final: list[Tensor | None] = []
        for i, (gradient, tensor) in enumerate(zip(self.gradients, self.tensors[:6], strict=True)):
            if gradient is not None and tensor is not None:
                if str(i) not in self.started:
                    gradient.zero_()
                if self.group is not None and self._sums_over_classes(i) and gradient.numel():
                    sum_over([gradient], self.group)  # before it is rounded to half precision
                if self.directions is not None:
                    gradient = gradient.to(tensor.dtype)
            final.append(gradient)
        return Outcome(self.rows, self.statistics, tuple(final))  # type: ignore[arg-type]

    def _sums_over_classes(self, number: int) -> bool:
        """Whether a gradient is a sum over the classes: of features, the teacher's too."""
        return number == 0 or (number == 3 and self.loss.target == "teacher")

    # --- rows --------------------------------------------------------------------------------------------------------

    def over(self, kept: slice | Tensor) -> None:
        """Every tile of the rows that are kept."""
        count = kept.stop if isinstance(kept, slice) else len(kept)
        self._prepare_rows(kept)
        if count == 0:
            return
        self.plan = plan_of(self.loss, self.tensors, count, self.directions is not None, self.budget)
        self.rooms.reserve(math.ceil(self.plan.buffers * self.plan.entries))
        for start in range(0, count, self.plan.rows):
            stop = min(start + self.plan.rows, count)
            self._tile(slice(start, stop) if isinstance(kept, slice) else kept[start:stop])

    def _prepare_rows(self, kept: slice | Tensor) -> None:
        """Rows that no tile will visit have gradient 0."""
        if isinstance(kept, Tensor):
            for i in (0, 3):
                gradient = self.gradients[i]
                if gradient is not None:
                    gradient.zero_()

    def given_target(self, rows: slice | Tensor, classes: slice) -> Tensor:
        """What is given as a target of every class, of some rows and classes."""
        given = self.tensors.target
        assert given is not None
        return target_block(self.loss, given, self.target_tops, rows, classes, self.dtype)

    def _take(self, tensor: Tensor | None, rows: slice | Tensor) -> Tensor | None:
        return None if tensor is None else tensor[rows]

    def _tile(self, rows: slice | Tensor) -> None:
        t, loss = self.tensors, self.loss
        listed, teacher = loss.target == "sparse", loss.target == "teacher"
        direction = self.directions
        model = LinearMap.of(t.input[rows], t.weight, t.bias, self.dtype).with_reference(loss.scale, self.group)
        data = RowData.of(
            loss,
            t,
            rows,
            self.plan,
            model.reference,
            target_v=None if direction is None else direction[3],
            wants_target=any(self.wanted[3:]),
            wants_gradient=any(self.wanted),
            wants_stats=self.stats,
            wants_tangents=self.wants_tangents,
            has_direction=direction is not None,
        )
        moved = direction or (None,) * 6
        along = Direction(self._take(moved[0], rows), moved[1], moved[2])
        side = _Side(model, along)
        target = None
        if teacher:
            assert t.target is not None
            assert t.target_weight is not None
            others = LinearMap.of(t.target[rows], t.target_weight, t.target_bias, self.dtype)
            others = others.with_reference(loss.target_scale, self.group)
            target = _Side(others, Direction(self._take(moved[3], rows), moved[4], moved[5]))
        tile = _Tile(self, rows, data, side, target)
        kernel = tile.kernel()
        block = None
        for number in range(kernel.sweeps):
            for classes in self.plan.class_blocks(data.held):
                if block is None or self.plan.cuts_classes:
                    block = tile.load(classes)
                kernel.accumulate(number, block)
            if self.group is not None:
                kernel.reduce_over(number, self.group)
            kernel.finish(number)
        if any(self.wanted) or self.wants_tangents:
            kernel.prepare_residuals()
            for classes in self.plan.class_blocks(data.held):
                if block is None or self.plan.cuts_classes:
                    block = tile.load(classes)
                tile.take_back(kernel.residuals(block, self.plan.cuts_classes), kernel.row_factor, block)
        if self.wants_tangents:
            self.rows[rows] = kernel.tangents(self.group).to(self.dtype)
        elif direction is None:
            self.rows[rows] = kernel.losses().to(self.dtype)
        if self.stats:
            for name, column in vars(kernel.statistics).items():
                whole = getattr(self.statistics, name)
                if column is not None:
                    whole[rows] = column.to(whole.dtype)
        gradient = self.gradients[3]
        if listed and gradient is not None and isinstance(kernel, SparseKernel):
            found = kernel.target_gradient if direction is None else kernel.target_product
            assert found is not None
            gradient[rows] = found.to(gradient.dtype)
            self.started.add("3")

    def release(self) -> None:
        """Tiles are no longer needed."""
        self.rooms.release()

    # --- storage -----------------------------------------------------------------------------------------------------

    def buffer(self, name: str, rows: int, classes: int) -> Tensor:
        """Room for a tile, the same for every tile of a pass."""
        room = self.rooms.room(name, self.plan.entries)
        return room[: rows * classes].view(rows, classes)

    def narrow_buffer(self, name: str, dtype: torch.dtype, rows: int, classes: int) -> Tensor:
        """The same in half precision, in half the room."""
        room = self.rooms.room(name, self.plan.entries // 2)
        return room.view(dtype)[: rows * classes].view(rows, classes)

    def scratch(self, number: int) -> Tensor:
        """Room for a group of rows of a tile."""
        return self.rooms.room(f"scratch {number}", max(self.plan.cached, self.plan.class_count))

    def accumulates(self, name: str) -> bool:
        """Whether a gradient holds something already; from now on it does."""
        if name in self.started:
            return True
        self.started.add(name)
        return False


class _Side(NamedTuple):
    """One linear map on one tile of rows, and a direction."""

    map: LinearMap
    along: Direction


@dataclass
class _Tile:
    run: _Pass
    rows: slice | Tensor
    data: RowData
    model: _Side
    target: _Side | None

    def kernel(self) -> Kernel:
        """A new one; the tile does not hold it, since it may hold the tile."""
        run = self.run
        in_triton = backends.serves(run.loss, run.rows.device, run.dtype)
        if in_triton and run.loss.target == "sparse":
            return TritonSparseKernel(run.loss, self.data, single=not run.plan.cuts_classes)
        if run.loss.target == "sparse":
            return SparseKernel(run.loss, self.data)
        if FastRows.serves(run.loss, self.data):
            return FastRows(run.loss, self.data, again=self._again, scratch=run.scratch)
        return DenseKernel(run.loss, self.data)

    def load(self, classes: slice) -> Block:
        """The logits of a block, and what belongs to them."""
        run, count = self.run, len(self.data.weight)
        width = classes.stop - classes.start

        def room(name: str) -> Tensor:
            return run.buffer(name, count, width)

        def residual_room(name: str, map: LinearMap) -> Tensor | None:
            dtype = backends.residual_dtype(run.loss, map.narrow, map.weight, run.dtype) if any(run.wanted) else None
            return None if dtype is None else run.narrow_buffer(f"{name}, narrow", dtype, count, width)

        in_triton = backends.serves(run.loss, run.rows.device, run.dtype)
        block = Block(classes, self.model.map.logits_into(room("z"), classes, run.loss.scale))
        block.out = residual_room("z", self.model.map)
        block.v_out = None if run.directions is None else residual_room("v", self.model.map)
        if run.loss.softcap is not None and not in_triton and run.loss.target == "sparse":
            block.raw = room("raw")
        if run.directions is not None:
            block.v = self.model.map.change_into(room("v"), self.model.along, classes, run.loss.scale)
        wants_target = self.data.wants_target
        if self.target is not None:
            scale = run.loss.target_scale
            block.target = self.target.map.logits_into(room("target"), classes, scale)
            narrow = residual_room("target", self.target.map) if wants_target else None
            block.target_out = (block.target if narrow is None else narrow) if wants_target else None
            if run.directions is not None:
                block.target_v = self.target.map.change_into(room("target_v"), self.target.along, classes, scale)
                narrow = residual_room("target_v", self.target.map) if wants_target else None
                block.target_v_out = (block.target_v if narrow is None else narrow) if wants_target else None
        elif run.loss.target != "sparse":
            assert run.tensors.target is not None
            block.target = run.given_target(self.rows, classes)
            direction = None if run.directions is None else run.directions[3]
            if run.directions is not None:
                block.target_v = (
                    torch.zeros_like(block.target) if direction is None else direction[self.rows, classes]
                ).to(run.dtype)
            if wants_target:
                block.target_out = torch.empty_like(block.target, dtype=run.dtype)
                block.target_v_out = None if run.directions is None else torch.empty_like(block.target_out)
        return block

    def _again(self, rows: Tensor) -> Block:
        """Logits and target of some rows of the tile anew, all classes; in memory of their own."""
        run, everything = self.run, slice(0, self.data.class_count)

        def product(side: _Side, scale: float) -> Tensor:
            reference = None if side.map.reference is None else side.map.reference[rows]
            some = side.map._replace(input=side.map.input[rows], reference=reference)
            return some.logits_into(some.input.new_empty(len(rows), self.data.class_count), everything, scale)

        block = Block(everything, product(self.model, run.loss.scale))
        if self.target is not None:
            block.target = product(self.target, run.loss.target_scale)
        else:
            assert run.tensors.target is not None
            chosen = rows + self.rows.start if isinstance(self.rows, slice) else self.rows[rows]
            block.target = run.given_target(chosen, everything)
        if self.data.wants_target:
            block.target_out = torch.empty_like(block.z)
        return block

    # --- back --------------------------------------------------------------------------------------------------------

    def take_back(self, residuals: Residuals, factor: Tensor | None, block: Block) -> None:
        """Residuals to features, weight and bias, on both sides; the model's still to be multiplied by ``factor``."""
        loss = self.run.loss
        self._side(0, self.model, residuals.z, residuals.v, factor, loss.scale, block.classes)
        if self.target is not None:
            assert residuals.target is not None or not self.data.wants_target
            if residuals.target is not None:
                v = residuals.target_v
                self._side(3, self.target, residuals.target, v, None, loss.target_scale, block.classes)
        elif residuals.target is not None and self.run.gradients[3] is not None:
            out = residuals.target if self.run.directions is None else residuals.target_v
            assert out is not None
            self.run.gradients[3][self.rows, block.classes] = out.to(self.run.gradients[3].dtype)
            self.run.started.add("3")

    def _side(
        self,
        first: int,
        side: _Side,
        residual: Tensor,
        residual_v: Tensor | None,
        factor: Tensor | None,
        scale: float,
        classes: slice,
    ) -> None:
        """Gradients of one linear map; with a direction their changes ``ġ W + g Ẇ``, ``ġᵀ e + gᵀ ė``, ``Σ ġ``."""
        run = self.run
        in_input, in_weight, in_bias = run.gradients[first : first + 3]
        scaling = None if factor is None else factor.to(run.dtype)
        if scale != 1:
            ones = self.data.weight.new_full((len(residual), 1), scale)
            scaling = ones if scaling is None else scaling * scale
        outer = residual if residual_v is None else residual_v
        if in_input is not None:
            part = self._features(outer, side.map.weight[classes])
            if residual_v is not None and side.along.weight is not None:
                products.back_to_features(part, residual, side.along.weight[classes], accumulate=True)
            if scaling is not None:
                part.mul_(scaling)
            if classes.start == 0:
                in_input[self.rows] = part
            else:
                in_input[self.rows] += part
            run.started.add(str(first))
        if in_weight is not None:
            e = side.map.input if scaling is None else side.map.input * scaling
            more = run.accumulates(f"{first + 1}:{classes.start}")
            run.started.add(str(first + 1))
            products.back_to_weight(in_weight[classes], outer, e, accumulate=more)
            if residual_v is not None and side.along.input is not None:
                e_v = side.along.input.to(run.dtype)
                e_v = e_v if scaling is None else e_v * scaling
                products.back_to_weight(in_weight[classes], residual, e_v, accumulate=True)
        if in_bias is not None:
            each = self.data.weight.new_ones(len(residual)) if scaling is None else scaling.squeeze(-1)
            more = run.accumulates(f"{first + 2}:{classes.start}")
            run.started.add(str(first + 2))
            products.back_to_bias(in_bias[classes], outer, each, accumulate=more)

    def _features(self, residual: Tensor, weight: Tensor) -> Tensor:
        out = residual.new_empty((len(residual), weight.shape[1]), dtype=self.run.dtype)
        products.back_to_features(out, residual, weight, accumulate=False)
        return out
