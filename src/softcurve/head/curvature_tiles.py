"""A head's tiles for second order: logits, once for all columns, what a kernel makes of them, and the way back."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from softcurve.head import backends, products, workspace
from softcurve.head.dense import DenseKernel
from softcurve.head.kernel import CurvatureBlock, CurvatureKernel, Kernel, RowData
from softcurve.head.passes import kept_rows, require_classes
from softcurve.head.plan import Plan, default_budget, make_plan
from softcurve.head.products import Direction, LinearMap
from softcurve.head.sparse import SparseKernel
from softcurve.head.sparse_curvature import SparseCurvature
from softcurve.head.sparse_triton import TritonSparseCurvature, TritonSparseKernel
from softcurve.head.target import target_block, target_tops
from softcurve.head.tensors import HeadTensors
from softcurve.losses.rows import HESSIAN
from softcurve.losses.spec import LossSpec
from softcurve.processes import sum_over


class RowLosses(NamedTuple):
    """The losses of a head's rows; ``merges_tail`` says whether a list's other classes are one outcome."""

    loss: LossSpec
    tensors: HeadTensors
    merges_tail: bool
    memory_budget: int | None


@dataclass
class CurvaturePass:
    """The tiles of rows whose weight is not 0."""

    given: RowLosses
    matrix: str
    directed: bool  # whether changes stand beside the logits

    def __post_init__(self) -> None:
        loss, t = self.given.loss, self.given.tensors
        require_classes(loss, t)
        self.group = loss.processes
        self.dtype = t.dtype
        self.rooms = workspace.Rooms(t.dtype, t.input.device)
        self.dense = loss.target != "sparse"
        self.target_tops = target_tops(loss, t)
        self.wants_q = self.dense and self.directed and DenseKernel.needs_q(loss.divergence, self.matrix)
        self.wants_residual = self.directed and self.matrix == HESSIAN

    def tiles(self) -> Iterator[CurvatureTile]:
        """Of the rows whose weight is not 0."""
        loss, t = self.given.loss, self.given.tensors
        kept = kept_rows(t.row_weight)
        count = kept.stop if isinstance(kept, slice) else len(kept)
        if count == 0:
            return
        self.plan = self._plan(count)
        self.rooms.reserve(math.ceil(self.plan.buffers * self.plan.entries))
        for start in range(0, count, self.plan.rows):
            stop = min(start + self.plan.rows, count)
            rows = slice(start, stop) if isinstance(kept, slice) else kept[start:stop]
            target = None
            if loss.target == "teacher":
                assert t.target is not None
                assert t.target_weight is not None
                target = LinearMap.of(t.target[rows], t.target_weight, t.target_bias, self.dtype)
                target = target.with_reference(loss.target_scale, self.group)
            model = LinearMap.of(t.input[rows], t.weight, t.bias, self.dtype).with_reference(loss.scale, self.group)
            weight = t.row_weight[rows].to(self.dtype).unsqueeze(-1)
            yield CurvatureTile(self, rows, model, target, weight)

    def _plan(self, count: int) -> Plan:
        loss, t, budget = self.given.loss, self.given.tensors, self.given.memory_budget
        # The logits, the target's, their change, q, the residual, the logits before the cap.
        buffers = 1 + (loss.target == "teacher") + self.directed + self.wants_q + self.wants_residual
        buffers += loss.softcap is not None
        temporaries = 24 if self.dense else 6
        width = t.input.shape[1] + (t.target.shape[1] if loss.target == "teacher" and t.target is not None else 0)
        row = 5 * width + 64
        if t.indices is not None:
            row += 40 * (t.indices.shape[1] + 1)
        return make_plan(
            count,
            loss.widest(len(t.weight)),
            dtype=self.dtype,
            device=t.input.device,
            buffers=buffers,
            temporaries=temporaries,
            row_entries=row,
            least_pieces=30,
            least_row_entries=row,
            whole_rows=False,
            memory_budget=default_budget(t.input.device) if budget is None else budget,
        )

    def release(self) -> None:
        """Tiles are no longer needed."""
        self.rooms.release()

    def sum_over_classes(self, sums: Tensor) -> None:
        """Of all processes that share the classes, in place."""
        if self.group is not None:
            sum_over([sums], self.group)


@dataclass
class CurvatureTile:
    """Some rows, block by block of their classes."""

    run: CurvaturePass
    rows: slice | Tensor
    map: LinearMap
    target: LinearMap | None
    weight: Tensor  # (r, 1)

    # --- kernels

    def data(self) -> RowData:
        """Rows of weight 1: the passes weigh what comes back."""
        given, ones = self.run.given, torch.ones_like(self.weight).squeeze(-1)
        return RowData.of(
            given.loss, given.tensors, self.rows, self.run.plan, self.map.reference, weight=ones, wants_gradient=True
        )

    def kernel(self) -> Kernel:
        """For residuals."""
        kind: type[Kernel] = DenseKernel if self.run.dense else SparseKernel
        if backends.serves(self.run.given.loss, self.map.input.device, self.run.dtype):
            kind = DenseKernel if self.run.dense else TritonSparseKernel
        return kind(self.run.given.loss, self.data())

    def curvature_kernel(self) -> CurvatureKernel:
        """For the matrix."""
        kind: type[CurvatureKernel] = DenseKernel if self.run.dense else SparseCurvature
        if backends.serves(self.run.given.loss, self.map.input.device, self.run.dtype):
            kind = DenseKernel if self.run.dense else TritonSparseCurvature
        given = self.run.given
        return kind(given.loss, self.data(), matrix=self.run.matrix, merges_tail=given.merges_tail)

    # --- blocks

    def logits(self) -> Iterator[CurvatureBlock]:
        """Each block of classes, computed anew; of a whole row only once."""
        for classes in self._class_blocks():
            yield self._load(classes)

    def _class_blocks(self) -> Iterator[slice]:
        return self.run.plan.class_blocks(len(self.map.weight))

    def prepared(self, kernel: CurvatureKernel, *, swept: bool = False) -> Iterator[CurvatureBlock]:
        """The blocks, ready for columns; ``swept`` if the rows' statistics are known."""
        single = not self.run.plan.cuts_classes
        block = None if swept else self.sweep(kernel)
        if not swept:
            kernel.prepare_columns()
        held = list(self._class_blocks())
        for i, classes in enumerate(held):
            ready = block if single and block is not None else self._load(classes)
            kernel.prepare_block(ready, fresh=not single, again=swept)
            if self.run.group is not None and not swept and i == len(held) - 1:
                kernel.reduce_prepared(self.run.group)
            yield ready
        if self.run.group is not None and not swept and not held:
            kernel.reduce_prepared(self.run.group)

    def probabilities(self, kernel: CurvatureKernel, *, swept: bool = False) -> Iterator[CurvatureBlock]:
        """The blocks with the model's probabilities in place of logits."""
        for block in self.prepared(kernel, swept=swept):
            kernel.to_probabilities(block)
            yield block

    def residuals(self, kernel: Kernel, *, swept: bool = False) -> Iterator[CurvatureBlock]:
        """The blocks with residuals in place of logits, to be multiplied by :meth:`own_factor`."""
        single = not self.run.plan.cuts_classes
        block = None if swept else self.sweep(kernel)
        if not swept:
            kernel.prepare_residuals()
        for classes in self._class_blocks():
            ready = block if single and block is not None else self._load(classes)
            kernel.residuals(ready, not single)
            yield ready

    def sweep(self, kernel: Kernel) -> CurvatureBlock | None:
        """All that a kernel must see before residuals; the last block."""
        block = None
        for number in range(kernel.sweeps):
            if block is not None and not self.run.plan.cuts_classes:
                kernel.accumulate(number, block)
            else:
                for block in self.logits():
                    kernel.accumulate(number, block)
            if self.run.group is not None:
                kernel.reduce_over(number, self.run.group)
            kernel.finish(number)
        return block

    def _load(self, classes: slice) -> CurvatureBlock:
        run, loss, width = self.run, self.run.given.loss, classes.stop - classes.start

        def room(name: str) -> Tensor:
            whole = run.rooms.room(name, run.plan.entries)
            return whole[: len(self.weight) * width].view(len(self.weight), width)

        block = CurvatureBlock(classes, self.map.logits_into(room("z"), classes, loss.scale))
        block.raw = room("raw") if loss.softcap is not None else None
        block.v = room("v") if run.directed else None
        block.q = room("q") if run.wants_q else None
        block.residual = room("residual") if run.wants_residual else None
        if self.target is not None:
            block.target = self.target.logits_into(room("target"), classes, loss.target_scale)
        elif run.dense:
            given = run.given.tensors.target
            assert given is not None
            block.target = target_block(loss, given, run.target_tops, self.rows, classes, run.dtype)
        return block

    # --- columns

    def change(self, block: CurvatureBlock, column: Direction) -> None:
        """The change of the logits along a column."""
        assert block.v is not None
        along = column if column.input is None else column._replace(input=column.input[self.rows])
        self.map.change_into(block.v, along, block.classes, self.run.given.loss.scale)

    def take_back(
        self, block: CurvatureBlock, factor: Tensor | None, column: Direction, into: Direction, scale: float
    ) -> None:
        """``ġ W (+ g Ẇ)``, ``ġᵀ e (+ gᵀ ė)``, ``Σ ġ``."""
        assert block.v is not None
        v, g, e = block.v, block.residual, self.map.input
        outer = self.weight * (scale * self.run.given.loss.scale)
        own = outer if factor is None else outer * factor.to(v.dtype)
        if into.input is not None:
            part = own * self.to_features(v, self.map.weight[block.classes])
            if g is not None and column.weight is not None:
                part += outer * self.to_features(g, column.weight[block.classes])
            into.input[self.rows] += part
        if into.weight is not None:
            products.back_to_weight(into.weight[block.classes], v, own * e, accumulate=True)
            if g is not None and column.input is not None:
                e_v = column.input[self.rows].to(v.dtype)
                products.back_to_weight(into.weight[block.classes], g, outer * e_v, accumulate=True)
        if into.bias is not None:
            into.bias[block.classes] += torch.mv(v.T, own.squeeze(-1))

    def to_features(self, residual: Tensor, weight: Tensor) -> Tensor:
        """``residual @ weight``."""
        out = residual.new_empty(len(residual), weight.shape[1])
        products.back_to_features(out, residual, weight, accumulate=False)
        return out

    def own_factor(self, kernel: Kernel) -> Tensor:
        """What residuals are to be multiplied by, ``(r, 1)``; the rows' weights are not in it."""
        ones = torch.full_like(self.weight, self.run.given.loss.scale)
        return ones if kernel.row_factor is None else ones * kernel.row_factor.to(ones.dtype)
