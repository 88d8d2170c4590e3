"""The tiles of a head: some rows of the features against blocks of the classes, and the buffers that they share."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from softcurve.head import backends, workspace
from softcurve.head.dense import DenseKernel
from softcurve.head.fast_rows import FastRows
from softcurve.head.kernel import Block, CurvatureBlock, CurvatureKernel, Kernel, RowData
from softcurve.head.plan import plan_curvature, plan_pass
from softcurve.head.products import STILL, Direction, LinearMap, linear_into
from softcurve.head.sparse import SparseKernel
from softcurve.head.target import target_block, target_tops
from softcurve.head.tensors import NOTHING, Directions, HeadTensors, Wanted
from softcurve.losses.rows import HESSIAN
from softcurve.losses.spec import LossSpec
from softcurve.processes import sum_over


@dataclass
class Tiles:
    """The tiles of some rows, one after the other, with the buffers that all of them share.

    A pass of first order, or along ``directions``, names the gradients ``wanted``. A pass for a ``matrix`` of second
    order has no direction of its own: its columns come one by one, and ``columns`` says whether there are any.
    """

    spec: LossSpec
    tensors: HeadTensors
    budget: int | None
    rows: slice | Tensor
    wanted: Wanted = NOTHING
    directions: Directions | None = None
    matrix: str | None = None
    columns: bool = False

    def __post_init__(self) -> None:
        spec, t = self.spec, self.tensors
        require_classes(spec, t)
        self.group = spec.processes
        self.dtype = t.dtype
        self.target_tops = target_tops(spec, t)
        self.in_triton = backends.serves(spec, t.input.device, t.dtype)
        self.count = len(t.input[self.rows]) if isinstance(self.rows, slice) else len(self.rows)
        self.wants_q = (
            self.columns and spec.target != "sparse" and DenseKernel.needs_q(spec.divergence, self.matrix or HESSIAN)
        )
        self.wants_residual = self.columns and self.matrix == HESSIAN
        self.buffers = workspace.Buffers(t.dtype, t.input.device)

    def __enter__(self) -> Tiles:
        return self

    def __exit__(self, *_: object) -> None:
        self.buffers.release()

    def __iter__(self) -> Iterator[Tile]:
        if self.count == 0:
            return
        shape = (self.spec, self.tensors, self.count, self.budget)
        if self.matrix is None:
            self.plan = plan_pass(*shape, directed=self.directions is not None, in_triton=self.in_triton)
        else:
            extra = self.columns + self.wants_q + self.wants_residual
            self.plan = plan_curvature(*shape, extra)
        self.buffers.reserve(math.ceil(self.plan.buffers * self.plan.entries))
        for start in range(0, self.count, self.plan.rows):
            stop = min(start + self.plan.rows, self.count)
            yield Tile(self, slice(start, stop) if isinstance(self.rows, slice) else self.rows[start:stop])

    def kernel(self, data: RowData) -> Kernel:
        """Return the kernel that gives the losses and residuals of these rows."""
        kind: type[Kernel] = SparseKernel if self.spec.target == "sparse" else DenseKernel
        return kind(self.spec, data)

    def curvature_kernel(self, data: RowData, *, merges_tail: bool) -> CurvatureKernel:
        """Return the kernel that multiplies by the pass's ``matrix``."""
        assert self.matrix is not None
        kind: type[CurvatureKernel] = SparseKernel if self.spec.target == "sparse" else DenseKernel
        return kind(self.spec, data, matrix=self.matrix, merges_tail=merges_tail)

    def buffer(self, name: str, rows: int, classes: int, dtype: torch.dtype | None = None) -> Tensor:
        """Return a buffer for a tile, the same for every tile; in half precision in half the memory."""
        if dtype is None:
            return self.buffers.take(name, self.plan.entries)[: rows * classes].view(rows, classes)
        return self.buffers.take(name, self.plan.entries // 2).view(dtype)[: rows * classes].view(rows, classes)

    def scratch(self, number: int) -> Tensor:
        """Return a buffer for a group of rows of a tile."""
        return self.buffers.take(f"scratch {number}", max(self.plan.cached, self.plan.class_count))

    def sum_over_classes(self, sums: Tensor) -> None:
        """Sum over all processes that share the classes, in place."""
        if self.group is not None:
            sum_over([sums], self.group)


class Tile:
    """Some rows: their features, as the model and a teacher take them, and their blocks of classes."""

    def __init__(self, tiles: Tiles, rows: slice | Tensor) -> None:
        self.tiles, self.rows = tiles, rows
        spec, t = tiles.spec, tiles.tensors
        self.model = LinearMap.of(t.input[rows], t.weight, t.bias, tiles.dtype)
        self.model = self.model.with_reference(spec.scale, tiles.group)
        self.along = self.teacher_along = STILL
        if tiles.directions is not None:
            in_input, in_weight, in_bias, in_target, in_target_weight, in_target_bias = tiles.directions
            self.along = Direction(None if in_input is None else in_input[rows], in_weight, in_bias)
            if spec.target == "teacher":
                of_rows = None if in_target is None else in_target[rows]
                self.teacher_along = Direction(of_rows, in_target_weight, in_target_bias)
        self.teacher = None
        if spec.target == "teacher":
            assert t.target is not None
            assert t.target_weight is not None
            teacher = LinearMap.of(t.target[rows], t.target_weight, t.target_bias, tiles.dtype)
            self.teacher = teacher.with_reference(spec.target_scale, tiles.group)

    def __len__(self) -> int:
        return len(self.model.input)

    def row_data(self, *, weight: Tensor | None = None, **wants: bool) -> RowData:
        """Return what the kernel knows of the rows; ``weight`` in place of their own."""
        tiles = self.tiles
        target_v = None if tiles.directions is None else tiles.directions[3]
        return RowData.of(
            tiles.spec, tiles.tensors, self.rows, tiles.plan, self.model.reference,
            weight=weight, target_v=target_v, **wants,
        )  # fmt: skip

    def accumulate(self, kernel: Kernel) -> CurvatureBlock | None:
        """Show every block to the kernel, as often as it wants; return the last one."""
        block = None
        for number in range(kernel.sweeps):
            for classes in self.class_blocks():
                if block is None or self.tiles.plan.cuts_classes:
                    block = self.load(classes)
                kernel.accumulate(number, block)
            if self.tiles.group is not None:
                kernel.reduce_over(number, self.tiles.group)
            kernel.finish(number)
        return block

    def kernel(self, data: RowData) -> Kernel:
        """Return the kernel that gives the losses and residuals of these rows, and does so fast where it can."""
        if FastRows.serves(self.tiles.spec, data):
            return FastRows(self.tiles.spec, data, again=self.again, scratch=self.tiles.scratch)
        return self.tiles.kernel(data)

    def again(self, rows: Tensor) -> Block:
        """Compute the logits and the target of some rows of the tile again, in memory of their own."""
        tiles, spec, everything = self.tiles, self.tiles.spec, slice(0, len(self.model.weight))

        def logits(map: LinearMap, scale: float) -> Tensor:
            operands, reference = map._replace(input=map.input[rows]).operands(everything), map.reference
            reference = None if reference is None else reference[rows]
            return linear_into(
                map.input.new_empty(len(rows), everything.stop), *operands, scale=scale, reference=reference
            )

        block = Block(everything, logits(self.model, spec.scale))
        if self.teacher is not None:
            block.target = logits(self.teacher, spec.target_scale)
        else:
            chosen = rows + self.rows.start if isinstance(self.rows, slice) else self.rows[rows]
            block.target = self.given_target(chosen, everything)
        if any(tiles.wanted[3:]):
            block.target_out = torch.empty_like(block.z)
        return block

    def class_blocks(self) -> Iterator[slice]:
        """The classes of each block."""
        return self.tiles.plan.class_blocks(len(self.model.weight))

    def blocks(self, loaded: CurvatureBlock | None = None) -> Iterator[tuple[CurvatureBlock, bool]]:
        """Yield each block, and whether it was computed anew: where a row is one block, ``loaded`` serves again."""
        for classes in self.class_blocks():
            if loaded is None or self.tiles.plan.cuts_classes:
                yield self.load(classes), True
            else:
                yield loaded, False

    def load(self, classes: slice) -> CurvatureBlock:
        """Compute the logits of a block, and what belongs to them."""
        tiles, spec = self.tiles, self.tiles.spec
        buffer = self._buffers_for(classes)
        model = self.model
        z = linear_into(buffer("z"), *model.operands(classes), scale=spec.scale, reference=model.reference)
        block = CurvatureBlock(classes, z)
        if spec.softcap is not None and (tiles.matrix is not None or not tiles.in_triton):
            block.raw = buffer("raw")
        if tiles.directions is not None:
            block.v = self.model.change_into(buffer("v"), self.along, classes, spec.scale)
        if any(tiles.wanted):
            block.out = self._half_buffer("z out", self.model, classes)
            block.v_out = None if block.v is None else self._half_buffer("v out", self.model, classes)
        if tiles.columns:
            block.v = buffer("v")
            block.q = buffer("q") if tiles.wants_q else None
            block.residual = buffer("residual") if tiles.wants_residual else None
        if self.teacher is not None:
            self._load_teacher(block)
        elif spec.target != "sparse":
            self._load_target(block)
        return block

    def _load_teacher(self, block: Block) -> None:
        assert self.teacher is not None
        tiles, classes, scale = self.tiles, block.classes, self.tiles.spec.target_scale
        buffer, wants_target = self._buffers_for(classes), any(tiles.wanted[3:])
        operands, reference = self.teacher.operands(classes), self.teacher.reference
        block.target = linear_into(buffer("target"), *operands, scale=scale, reference=reference)
        if wants_target:
            half = self._half_buffer("target out", self.teacher, classes)
            block.target_out = block.target if half is None else half
        if tiles.directions is not None:
            block.target_v = self.teacher.change_into(buffer("target_v"), self.teacher_along, classes, scale)
            if wants_target:
                half = self._half_buffer("target_v out", self.teacher, classes)
                block.target_v_out = block.target_v if half is None else half

    def _load_target(self, block: Block) -> None:
        tiles, classes = self.tiles, block.classes
        block.target = self.given_target(self.rows, classes)
        if tiles.directions is not None:
            direction = tiles.directions[3]
            moved = torch.zeros_like(block.target) if direction is None else direction[self.rows, classes]
            block.target_v = moved.to(tiles.dtype)
        if any(tiles.wanted[3:]):
            block.target_out = torch.empty_like(block.target, dtype=tiles.dtype)
            block.target_v_out = None if tiles.directions is None else torch.empty_like(block.target_out)

    def given_target(self, rows: slice | Tensor, classes: slice) -> Tensor:
        """Return some rows and classes of a target that is given for every class."""
        tiles = self.tiles
        assert tiles.tensors.target is not None
        return target_block(tiles.spec, tiles.tensors.target, tiles.target_tops, rows, classes, tiles.dtype)

    def _buffers_for(self, classes: slice) -> Callable[[str], Tensor]:
        return lambda name: self.tiles.buffer(name, len(self), classes.stop - classes.start)

    def _half_buffer(self, name: str, map: LinearMap, classes: slice) -> Tensor | None:
        """Return a buffer for residuals in the half precision of the products, if they are not left in place."""
        dtype = backends.residual_dtype(self.tiles.spec, map.narrow, map.weight, self.tiles.dtype)
        width = classes.stop - classes.start
        return None if dtype is None else self.tiles.buffer(name, len(self), width, dtype)


def kept_rows(weight: Tensor) -> slice | Tensor:
    """Return the rows of weight other than 0; all of them where looking would make the device wait."""
    if weight.device.type != "cpu":
        return slice(0, len(weight))
    kept = weight != 0
    return slice(0, len(weight)) if kept.all() else kept.nonzero().squeeze(-1)


def require_classes(spec: LossSpec, tensors: HeadTensors) -> None:
    """Raise ``IndexError`` for class indices out of range, which a graph or a transform hid from the public call."""
    indices, classes = tensors.indices, spec.class_count(len(tensors.weight))
    if indices is None or indices.device.type != "cpu" or indices.numel() == 0:
        return
    least, most = (int(bound) for bound in indices.aminmax())
    if least < 0 or most >= classes:
        raise IndexError(f"target must hold classes from 0 to {classes - 1}, got {least if least < 0 else most}")
