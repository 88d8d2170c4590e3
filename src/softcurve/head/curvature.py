"""Passes of second order over a head's tiles, for many columns at once, added to where their sums are kept.

A tile's logits are computed once for all columns; each column then costs its change of the logits and the way back.
Unlike :func:`softcurve.head.passes.hessian_product` nothing here is differentiable, and the target does not move.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from softcurve.head import fused, products, workspace
from softcurve.head.blocks import BlockKernel
from softcurve.head.curvature_kernels import CurvatureBlock, CurvatureKernel, DenseCurvature, ListCurvature
from softcurve.head.fused_curvature import FusedDenseCurvature, FusedListCurvature
from softcurve.head.kernel import Kernel, RowData
from softcurve.head.lists import ListKernel
from softcurve.head.passes import kept_rows, require_classes
from softcurve.head.plan import Plan, default_budget, make_plan
from softcurve.head.problem import HeadLoss, HeadTensors
from softcurve.head.products import WIDENED_ENTRIES, Direction, LinearMap
from softcurve.objective import FISHER, HESSIAN
from softcurve.processes import max_over, sum_over


class RowLosses(NamedTuple):
    """The losses of a head's rows; ``coarsens`` says whether a list's other classes are one outcome."""

    loss: HeadLoss
    tensors: HeadTensors
    coarsens: bool
    memory_budget: int | None


def add_products(
    rows: RowLosses, matrix: str, columns: Sequence[Direction], into: Sequence[Direction], scale: float = 1.0
) -> None:
    """``into += scale Σ_i weight_i (∂z_i)ᵀ B_i ∂z_i`` along each column, in the parts that ``into`` has.

    For the Hessian the second derivative of ``z = W e + b`` is included.
    """
    run = _Pass(rows, matrix, directed=True)
    for tile in run.tiles():
        kernel = tile.curvature_kernel()
        # One block, which each column takes to its end; or many, which all must have seen before any is multiplied.
        cut = run.plan.cuts_classes
        kept: list[CurvatureBlock] = []
        for block in tile.prepared(kernel):
            for j, column in enumerate(columns if cut else ()):
                tile.change(block, column)
                kernel.gather(block, j)
            if not cut:
                kept.append(block)
        for j, column in enumerate(columns):
            for block in kept:
                tile.change(block, column)
                kernel.gather(block, j)
            if run.group is not None:
                kernel.merge_column(j, run.group)
            for block in kept:
                kernel.multiply(block, j)
                tile.take_back(block, kernel.factor, column, into[j], scale)
        for block in tile.prepared(kernel, swept=True) if cut else ():
            for j, column in enumerate(columns):
                tile.change(block, column)
                kernel.multiply(block, j)
                tile.take_back(block, kernel.factor, column, into[j], scale)
    run.release()


class Diagonal(NamedTuple):
    """Of the matrix in the weight and the bias, and each row's part of the trace, its weight included."""

    weight: Tensor | None  # (C, d)
    bias: Tensor | None  # (C,)
    rows: Tensor  # (n,): Σ_k B_kk, not times ‖e‖² or 1


def diagonal(rows: RowLosses, matrix: str, *, wants_diagonal: bool) -> Diagonal:
    """``Σ_i weight_i diag(B_i) ⊗ (e ⊙ e)``; only the rows' traces unless ``wants_diagonal``."""
    run = _Pass(rows, matrix, directed=True)
    t = rows.tensors
    traces = torch.zeros(len(t.input), dtype=run.dtype, device=t.input.device)
    in_weight = torch.zeros(t.weight.shape, dtype=run.dtype, device=t.input.device) if wants_diagonal else None
    in_bias = traces.new_zeros(len(t.weight)) if wants_diagonal else None
    for tile in run.tiles():
        kernel = tile.curvature_kernel()
        factor = tile.weight * rows.loss.scale**2
        blocks = tile.prepared(kernel)
        if run.plan.cuts_classes and not run.dense:
            for _ in blocks:  # what stands beside a confident row's top is known after the last
                pass
            blocks = tile.prepared(kernel, swept=True)
        for block in blocks:
            assert block.v is not None
            kernel.diagonal(block)
            here = factor if kernel.factor is None else factor * kernel.factor.to(run.dtype)
            traces[tile.rows] += (here * block.v.sum(-1, keepdim=True)).squeeze(-1)
            if in_weight is not None and in_bias is not None:
                products.back_to_weight(
                    in_weight[block.classes], block.v, tile.map.input.square() * here, accumulate=True
                )
                in_bias[block.classes].addmv_(block.v.T, here.squeeze(-1))
    run.release()
    run.sum_over_classes(traces)
    return Diagonal(in_weight, in_bias, traces)


def class_coefficients(rows: RowLosses, matrix: str) -> bool:
    """Whether each row's matrix is ``a diag(p) − b p pᵀ``, as for a Fisher, or a loss that is convex in the logits."""
    bucket = rows.coarsens and matrix != FISHER
    plain = not bucket and rows.loss.softcap is None and matrix != HESSIAN
    return plain and not DenseCurvature.needs_q(rows.loss.family, matrix)


def add_class_products(
    rows: RowLosses, matrix: str, vectors: Tensor | None, into: Tensor | None, diagonal: Tensor
) -> None:
    """``diagonal += Σ_i w_i a_i p_i`` and ``into += Σ_i w_i b_i p_i (p_iᵀ vectors)``, ``(C,)`` and ``(C, k)``.

    For rows of :func:`class_coefficients`; the curvature's ``Σ_i w_i B_i`` is ``diag(diagonal)`` minus the latter.
    """
    run = _Pass(rows, matrix, directed=False)
    loss = rows.loss
    for tile in run.tiles():
        kernel = tile.curvature_kernel()
        along = None if vectors is None else tile.weight.new_zeros(len(tile.weight), vectors.shape[1])
        block = None
        weight = tile.weight * loss.scale**2
        for block in tile.probabilities(kernel):
            a, b = (weight * c.to(run.dtype) for c in kernel.coefficients())
            diagonal[block.classes] += (block.z.T @ a).squeeze(-1)
            if vectors is not None and along is not None:
                along += block.z @ vectors[block.classes]
        if along is None or into is None:
            continue
        run.sum_over_classes(along)
        if run.plan.cuts_classes:
            blocks = tile.probabilities(kernel, swept=True)
        else:
            blocks = iter(() if block is None else (block,))
        for ready in blocks:
            into[ready.classes] += ready.z.T @ (b * along)
    run.release()


def gradient_norms(rows: RowLosses) -> Tensor:
    """``‖∂ loss_i/∂z_i‖`` of each row, not weighted; 0 for rows of weight 0."""
    run = _Pass(rows, HESSIAN, directed=False)
    t = rows.tensors
    norms = torch.zeros(len(t.input), dtype=torch.float64, device=t.input.device)
    for tile in run.tiles():
        kernel = tile.kernel()
        for block in tile.residuals(kernel):
            factor = 1.0 if kernel.factor is None else kernel.factor.double().squeeze(-1)
            # In float64: the square of a small residual is below float32's range.
            squares = [block.z[rows].double().square_().sum(-1) for rows in kernel.groups(block)]
            norms[tile.rows] += torch.cat(squares) * factor**2
    run.release()
    run.sum_over_classes(norms)
    return norms.sqrt().mul_(rows.loss.scale)


def add_outer_products(
    rows: RowLosses, row_factor: Tensor, columns: Sequence[Direction], into: Sequence[Direction], scale: float = 1.0
) -> None:
    """``into += scale Σ_i row_factor_i g_i (g_i · column)`` with each row's own gradient ``g_i`` in (e, W, b).

    The features' part of ``g_i`` is of row ``i`` alone. Rows of weight 0 have no part.
    """
    run = _Pass(rows, HESSIAN, directed=False)
    for tile in run.tiles():
        kernel = tile.kernel()
        e = tile.map.input
        back = torch.zeros_like(e)  # Wᵀ g
        inner = e.new_zeros(len(e), len(columns))
        block = None
        for block in tile.residuals(kernel):
            own = tile.own_factor(kernel)
            back += own * tile.to_features(block.z, tile.map.weight[block.classes])
            for j, column in enumerate(columns):
                if column.weight is not None:
                    part = tile.to_features(block.z, column.weight[block.classes])
                    inner[:, j] += own.squeeze(-1) * (part * e).sum(-1)
                if column.bias is not None:
                    inner[:, j] += own.squeeze(-1) * (block.z @ column.bias[block.classes].to(run.dtype))
        for j, column in enumerate(columns):
            if column.input is not None:
                inner[:, j] += (back * column.input[tile.rows].to(run.dtype)).sum(-1)
        run.sum_over_classes(inner)
        inner *= scale * row_factor[tile.rows].to(run.dtype).unsqueeze(-1)
        for j, out in enumerate(into):
            if out.input is not None:
                out.input[tile.rows] += (inner[:, j : j + 1] * back).to(out.input.dtype)
        if run.plan.cuts_classes:
            blocks = tile.residuals(kernel, swept=True)
        else:
            blocks = iter(() if block is None else (block,))
        for block in blocks:
            own = tile.own_factor(kernel)
            for j, out in enumerate(into):
                weighing = own * inner[:, j : j + 1]
                if out.weight is not None:
                    products.back_to_weight(out.weight[block.classes], block.z, e * weighing, accumulate=True)
                if out.bias is not None:
                    out.bias[block.classes].addmv_(block.z.T, weighing.squeeze(-1))
    run.release()


def row_masses(rows: RowLosses) -> Tensor:
    """``Σ_k w_k y_k`` of each row, ``(n,)``, smoothing and class weights ``w`` included; 1 for a divergence."""
    loss, t = rows.loss, rows.tensors
    ones = torch.ones_like(t.row_weight)
    if loss.family != "cross_entropy" or (loss.target == "list" and t.target is None):
        return ones
    weights = None if t.class_weight is None else t.class_weight.to(ones.dtype)
    smoothed = loss.smoothing * (1.0 if weights is None else weights.mean())
    group = loss.processes
    if loss.target == "list":
        assert t.target is not None
        return t.target.to(ones.dtype).sum(-1) + smoothed
    if loss.target == "probabilities":
        assert t.target is not None
        held = t.target.shape[1]
        own = None if weights is None else weights[loss.first : loss.first + held]
        step = max(1, WIDENED_ENTRIES // max(1, held))
        parts = [
            part.sum(-1, dtype=ones.dtype) if own is None else part.to(ones.dtype) @ own
            for part in t.target.split(step)
        ]
        sums = torch.cat(parts)
        if group is not None:
            sum_over([sums], group)
        return (1 - loss.smoothing) * sums + smoothed
    if weights is None:
        return ones
    run = _Pass(rows, HESSIAN, directed=False)
    for tile in run.tiles():
        kernel = BlockKernel(loss, tile.data())
        tile.sweep(kernel)
        ones[tile.rows] = -kernel.model.score.squeeze(-1).to(ones.dtype)
    run.release()
    return ones


def sample_classes(rows: RowLosses, uniforms: Tensor) -> Tensor:
    """Classes drawn from each row's softmax: where the cumulated ``p`` passes its ``uniforms (n, s)`` in [0, 1)."""
    run = _Pass(rows, HESSIAN, directed=False)
    classes = torch.zeros(uniforms.shape, dtype=torch.int64, device=rows.tensors.input.device)
    for tile in run.tiles():
        wanted = uniforms[tile.rows].to(torch.float64).contiguous()
        top = tile.map.input.new_full((len(wanted), 1), -torch.inf)
        total = torch.zeros_like(top, dtype=torch.float64)
        for block in tile.logits():
            z = rows.loss.logit_map.value(block.z)
            new = torch.maximum(top, z.amax(-1, keepdim=True))
            shift = torch.where(new == -torch.inf, 0.0, new)  # every class so far is masked
            total = total * torch.exp((top - shift).double()) + (z - shift).exp_().sum(-1, keepdim=True).double()
            top = new
        left = wanted * total
        mine = None
        if run.group is not None:
            top, left, mine = _own_part(top, total, wanted, run.group)
        found = torch.zeros_like(left, dtype=torch.bool)
        chosen = torch.zeros_like(left, dtype=torch.int64)
        for block in tile.logits():
            mass = (rows.loss.logit_map.value(block.z) - top).exp_()
            cumulated = mass.cumsum(-1, dtype=torch.float64)
            at = torch.searchsorted(cumulated, left, right=True)
            here = at < mass.shape[-1]
            if not here.all():
                # Where rounding leaves all classes short of the total, the last that has mass is taken.
                last = torch.searchsorted(cumulated, cumulated[:, -1:].contiguous())
                at = torch.where(here, at, last)
            has_mass = cumulated[:, -1:] > 0
            chosen = torch.where(~found & has_mass, at + block.classes.start, chosen)
            left = left - cumulated[:, -1:]
            found |= here
        if run.group is not None and mine is not None:
            chosen = torch.where(mine, chosen + rows.loss.first, 0)
            sum_over([chosen], run.group)
        classes[tile.rows] = chosen
    run.release()
    return classes


def _own_part(top: Tensor, total: Tensor, wanted: Tensor, group: ProcessGroup) -> tuple[Tensor, Tensor, Tensor]:
    """The largest logit of all processes, what each draw has left when this one's classes begin, and which are its."""
    highest = top.clone()
    max_over([highest], group)
    lowered = torch.where(highest == -torch.inf, 0.0, (top - highest).double())
    masses = total.new_zeros(len(total), group.size())
    masses[:, group.rank()] = (total * torch.where(top == -torch.inf, 0.0, torch.exp(lowered))).squeeze(-1)
    sum_over([masses], group)
    cumulated = masses.cumsum(-1)
    left = wanted * cumulated[:, -1:]
    # Where rounding leaves all short of the total, the last that has mass.
    last = torch.searchsorted(cumulated, cumulated[:, -1:].contiguous())
    owner = torch.minimum(torch.searchsorted(cumulated, left, right=True), last)
    before = cumulated[:, group.rank()] - masses[:, group.rank()]
    return highest, left - before.unsqueeze(-1), owner == group.rank()


# --- tiles -----------------------------------------------------------------------------------------------------------


@dataclass
class _Pass:
    given: RowLosses
    matrix: str
    directed: bool  # whether changes stand beside the logits

    def __post_init__(self) -> None:
        loss, t = self.given.loss, self.given.tensors
        require_classes(loss, t)
        self.group = loss.processes
        self.dtype = t.dtype
        self.rooms = workspace.Rooms(t.dtype, t.input.device)
        self.dense = loss.target != "list"
        self.wants_q = self.dense and self.directed and DenseCurvature.needs_q(loss.family, self.matrix)
        self.wants_residual = self.directed and self.matrix == HESSIAN

    def tiles(self) -> Iterator[_Tile]:
        """Of the rows whose weight is not 0."""
        loss, t = self.given.loss, self.given.tensors
        kept = kept_rows(t.row_weight)
        count = kept.stop if isinstance(kept, slice) else len(kept)
        if count == 0:
            return
        self.plan = self._plan(count)
        self.rooms.reserve(math.ceil(self.plan.buffers * self.plan.rows * self.plan.classes))
        for start in range(0, count, self.plan.rows):
            stop = min(start + self.plan.rows, count)
            rows = slice(start, stop) if isinstance(kept, slice) else kept[start:stop]
            target = None
            if loss.target == "teacher":
                assert t.target is not None
                assert t.target_weight is not None
                target = LinearMap.of(t.target[rows], t.target_weight, t.target_bias, self.dtype)
            weight = t.row_weight[rows].to(self.dtype).unsqueeze(-1)
            yield _Tile(self, rows, LinearMap.of(t.input[rows], t.weight, t.bias, self.dtype), target, weight)

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
        self.rooms.release()

    def sum_over_classes(self, sums: Tensor) -> None:
        """Of all processes that share the classes, in place."""
        if self.group is not None:
            sum_over([sums], self.group)


@dataclass
class _Tile:
    run: _Pass
    rows: slice | Tensor
    map: LinearMap
    target: LinearMap | None
    weight: Tensor  # (r, 1)

    # --- kernels

    def data(self) -> RowData:
        """Rows of weight 1: the passes weigh what comes back."""
        given, ones = self.run.given, torch.ones_like(self.weight).squeeze(-1)
        return RowData.of(given.loss, given.tensors, self.rows, self.run.plan, weight=ones, wants_gradient=True)

    def kernel(self) -> Kernel:
        """For residuals."""
        kind: type[Kernel] = BlockKernel if self.run.dense else ListKernel
        if fused.serves(self.map.input.device, self.run.dtype):
            kind = fused.FusedBlocks if self.run.dense else fused.FusedList
        return kind(self.run.given.loss, self.data())

    def curvature_kernel(self) -> CurvatureKernel:
        """For the matrix."""
        kind: type[CurvatureKernel] = DenseCurvature if self.run.dense else ListCurvature
        if fused.serves(self.map.input.device, self.run.dtype):
            kind = FusedDenseCurvature if self.run.dense else FusedListCurvature
        given = self.run.given
        return kind(given.loss, self.data(), matrix=self.run.matrix, coarsens=given.coarsens)

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
            kernel.settle()
        held = list(self._class_blocks())
        for i, classes in enumerate(held):
            ready = block if single and block is not None else self._load(classes)
            kernel.prepare(ready, fresh=not single, again=swept)
            if self.run.group is not None and not swept and i == len(held) - 1:
                kernel.merge_prepared(self.run.group)
            yield ready
        if self.run.group is not None and not swept and not held:
            kernel.merge_prepared(self.run.group)

    def probabilities(self, kernel: CurvatureKernel, *, swept: bool = False) -> Iterator[CurvatureBlock]:
        """The blocks with the model's probabilities in place of logits."""
        for block in self.prepared(kernel, swept=swept):
            kernel.normalize(block)
            yield block

    def residuals(self, kernel: Kernel, *, swept: bool = False) -> Iterator[CurvatureBlock]:
        """The blocks with residuals in place of logits, to be multiplied by :meth:`own_factor`."""
        single = not self.run.plan.cuts_classes
        block = None if swept else self.sweep(kernel)
        if not swept:
            kernel.form()
        for classes in self._class_blocks():
            ready = block if single and block is not None else self._load(classes)
            kernel.residuals(ready, not single)
            yield ready

    def sweep(self, kernel: Kernel) -> CurvatureBlock | None:
        """All that a kernel must see before residuals; the last block."""
        block = None
        for number in range(kernel.sweeps):
            if block is not None and not self.run.plan.cuts_classes:
                kernel.sweep(number, block)
            else:
                for block in self.logits():
                    kernel.sweep(number, block)
            if self.run.group is not None:
                kernel.merge(number, self.run.group)
            kernel.close(number)
        return block

    def _load(self, classes: slice) -> CurvatureBlock:
        run, loss, width = self.run, self.run.given.loss, classes.stop - classes.start

        def room(name: str) -> Tensor:
            whole = run.rooms.room(name, run.plan.rows * run.plan.classes)
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
            block.target = given[self.rows, classes]
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
        return ones if kernel.factor is None else ones * kernel.factor.to(ones.dtype)
