"""The tiles of a head: some rows of the features against blocks of the classes, and the buffers that they share."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from softcurve.head import backends, workspace
from softcurve.head.aten.sparse import Places
from softcurve.head.composite import CompositeKernel, terms_beside
from softcurve.head.dense import DenseKernel
from softcurve.head.fast_rows import FastRows
from softcurve.head.grouped import GroupedKernel, Side
from softcurve.head.half import half_on_cpu, shared_half
from softcurve.head.kernel import (
    Block,
    Kernel,
    Residuals,
    RowData,
    back_through_cap,
    cap_logits,
    fillers_of,
    largest,
    smoothing_of_rows,
)
from softcurve.head.plan import aligned, plan_curvature, plan_list, plan_pass
from softcurve.head.products import EVERY_ROW, ClassRows, LinearMap, MapParts
from softcurve.head.sparse import SparseKernel
from softcurve.head.statistics import StatisticsKernel
from softcurve.head.tensors import NONE, NOTHING, TARGET, Directions, HeadTensors, Wanted, sides
from softcurve.losses.rows import HESSIAN
from softcurve.losses.spec import LossSpec
from softcurve.losses.topk import NOT_LISTED
from softcurve.processes import max_over


@dataclass
class Tiles:
    """The tiles of some rows, one after the other, with the buffers that all of them share.

    A pass of first order, or along ``directions``, names the gradients ``wanted``. A pass for a ``matrix`` of second
    order has no direction of its own: its columns come one by one, and ``columns`` says whether there are any.
    A pass that lists the most probable classes of each row says how many by ``listed``, and has neither.
    """

    spec: LossSpec
    tensors: HeadTensors
    budget: int | None
    rows: slice | Tensor  # see kept_rows
    wanted: Wanted = NOTHING
    directions: Directions | None = None
    matrix: str | None = None
    columns: bool = False
    listed: int = 0

    def __post_init__(self) -> None:
        spec, t, rows = self.spec, self.tensors, self.rows
        require_classes(spec, t)
        self.group, self.dtype = spec.processes, t.dtype
        self.target_tops = _target_tops(spec, t)
        # The gradient of a list of classes comes with the rows' statistics.
        self.wants_residuals = any(w and not (spec.lists_classes and i == TARGET) for i, w in enumerate(self.wanted))
        self.wants_target = any((*self.wanted[TARGET : TARGET + 3], self.wanted[-1]))  # the teacher's low rank last
        self.in_triton = backends.serves(spec, t.input.device, self.dtype)
        bias = t.target_bias if spec.target == "teacher" and t.input.device.type == "cpu" else None
        self.masks_target = bias is not None and bool((bias == -math.inf).any())
        self.groups: tuple[Side, Side] | None = None
        if t.groups is not None and t.target_groups is not None:
            of_model = Side.of_classes(spec, t.groups, cut=True)
            self.groups = (of_model, Side.of_classes(spec, t.target_groups, cut=spec.cuts_target))
            # All processes are to compare the groups alike, whichever of them has a masked class.
            may_mask = spec.group is not None and bias is not None
            self.masks_target = self.masks_target or may_mask or any(side.has_empty for side in self.groups)
        self.count = rows.stop if isinstance(rows, slice) else rows.shape[0]
        self.wants_q = (
            self.columns and not spec.lists_classes and DenseKernel.needs_q(spec.divergence, self.matrix or HESSIAN)
        )
        # A soft cap bends products by the residual; without one a list's is formed when its product is taken back.
        bends = spec.softcap is not None or not spec.lists_classes
        self.wants_residual = self.columns and self.matrix == HESSIAN and bends
        self.buffers = workspace.Buffers(self.dtype, t.input.device)
        self.put = backends.kernels("sparse", "triton" if self.in_triton else "aten").put

    def __iter__(self) -> Iterator[Tile]:
        if self.count == 0:
            return
        shape = (self.spec, self.tensors, self.count, self.budget)
        if self.listed:
            self.plan = plan_list(*shape, self.listed)
        elif self.matrix is None:
            self.plan = plan_pass(
                *shape, directed=self.directions is not None, in_triton=self.in_triton,
                streamed=not (self.wants_residuals or self.spec.pairs),
            )  # fmt: skip
        else:
            self.plan = plan_curvature(
                *shape, self.columns + self.wants_q + self.wants_residual, kept=self.columns and not self.in_triton
            )
        self.entries = self.plan.entries
        self.buffers.reserve(math.ceil(self.plan.needs.buffers * self.entries))
        try:
            for start in range(0, self.count, self.plan.rows):
                some = slice(start, min(start + self.plan.rows, self.count))
                yield Tile(self, some if isinstance(self.rows, slice) else self.rows[some])
        finally:
            self.buffers.release()

    def scratch(self, number: int) -> Tensor:
        """Return a buffer for a group of rows of a tile."""
        return self.buffers.take(f"scratch {number}", max(self.plan.cached, self.plan.classes))


class Tile:
    """Some rows: their features, as the model and a teacher take them, and their blocks of classes."""

    def __init__(self, tiles: Tiles, rows: slice | Tensor) -> None:
        self.tiles, self.rows = tiles, rows
        spec, t = tiles.spec, tiles.tensors
        model, teacher = zip(sides(t.differentiable), sides(tiles.directions or NONE), strict=True)
        self.model = self._map(spec.scale, *model, EVERY_ROW)
        self.teacher = None
        if spec.target == "teacher":
            self.teacher = self._map(spec.target_scale, *teacher, ClassRows(t.target_classes))

    def _map(self, scale: float, at: MapParts, along: MapParts, classes: ClassRows) -> LinearMap:
        assert at.input is not None
        assert at.weight is not None
        if along.input is not None:
            along = along._replace(input=along.input[self.rows])
        rows = at.input[self.rows]
        narrow = None if shared_half(rows, at.weight) is None else rows
        wide = rows.to(self.tiles.dtype)
        map = LinearMap(wide, at.weight, at.bias, at.low_rank, narrow, scale, along, classes)
        scales_rows = self.tiles.tensors.row_scale is not None and self.tiles.spec.softcap is None
        return map.with_reference(self.tiles.group, scales_rows=scales_rows)

    def __len__(self) -> int:
        return self.model.input.shape[0]

    def row_data(self, *, weight: Tensor | None = None, **wants: bool) -> RowData:
        """Return what the kernel knows of the rows; ``weight`` in place of their own."""
        tiles, rows, dtype = self.tiles, self.rows, self.tiles.dtype
        spec, t, plan, reference = tiles.spec, tiles.tensors, tiles.plan, self.model.reference
        target_v = None if tiles.directions is None else tiles.directions[TARGET]
        listed = spec.lists_classes
        held, excluded = t.weight.shape[0], None if t.excluded is None else t.excluded[rows]
        surplus, mass = smoothing_of_rows(t.class_weight, excluded) if spec.smooths_labels else (None, 1.0)
        indices, fillers = None if t.indices is None else t.indices[rows], None
        if indices is not None and t.target is not None:
            fillers = fillers_of(indices)
        return RowData(
            weight=t.row_weight[rows].to(dtype) if weight is None else weight,
            indices=None if indices is None else indices - spec.first, fillers=fillers,
            target=t.target[rows] if listed and t.target is not None else None,
            target_v=target_v[rows] if listed and target_v is not None else None,
            class_weight=None if t.class_weight is None else t.class_weight.to(dtype),
            excluded=None if excluded is None else excluded - spec.first, share_surplus=surplus, share_mass=mass,
            class_count=spec.class_count(held), first=spec.first, held=held,
            cuts_classes=plan.cuts_classes, cached=plan.cached,
            row_scale=None if t.row_scale is None else t.row_scale[rows].unsqueeze(-1),
            offset=None if reference is None else spec.scale * reference.double(),
            has_direction=tiles.directions is not None, wants_target=tiles.wants_target, **wants,
        )  # fmt: skip

    def kernel(self, data: RowData) -> Kernel:
        """Return the kernel that gives the losses and residuals of these rows, and does so fast where it can."""
        spec, t = self.tiles.spec, self.tiles.tensors
        if spec.beside is None:
            return self._kernel(spec, data)
        weight = spec.beside.divergence * data.weight
        of_divergence = dataclasses.replace(
            data, weight=weight, class_weight=None, share_surplus=None, share_mass=1.0, wants_stats=False
        )
        main = self._kernel(dataclasses.replace(spec, beside=None), of_divergence)
        labels, values = (None if each is None else each[self.rows] for each in (t.labels, t.label_values))
        terms = terms_beside(spec, data, labels, values, t.label_factor)
        return CompositeKernel(spec, data, main, terms, self._buffer)

    def _kernel(self, spec: LossSpec, data: RowData) -> Kernel:
        if spec.target == "sparse":
            return SparseKernel(spec, data)
        if spec.target == "statistics":
            return StatisticsKernel(spec, data, scratch=self.tiles.scratch)
        if self.tiles.groups is not None:
            return GroupedKernel(spec, data, self.tiles.groups, self._buffer, self._dense_kernel)
        return self._dense_kernel(spec, data, self.again)

    def _dense_kernel(self, spec: LossSpec, data: RowData, again: Callable[[Tensor], Block]) -> Kernel:
        # FastRows would leave every row of an excluded class to the other kernel.
        if not self.tiles.in_triton and data.excluded is None and FastRows.serves(spec, data):
            masks = self.tiles.masks_target
            return FastRows(spec, data, again=again, scratch=self.tiles.scratch, masks_target=masks)
        return DenseKernel(spec, data)

    def accumulate(self, kernel: Kernel) -> list[Block]:
        """Show every block to the kernel, as often as it wants; return them unless classes are cut."""
        loaded: list[Block] = []
        for number in range(kernel.sweeps):
            for block, fresh in self.blocks(loaded):
                kernel.accumulate(number, block)
                if fresh and not self.tiles.plan.cuts_classes:
                    loaded.append(block)
            if self.tiles.group is not None:
                kernel.reduce_over(number, self.tiles.group)
            kernel.finish(number)
        return loaded

    def residuals(self, kernel: Kernel, loaded: Sequence[Block]) -> Iterator[tuple[Block, Residuals]]:
        """Yield the blocks with residuals, of which the model's replace logits; ``loaded`` is as in :meth:`blocks`."""
        for block, fresh in self.blocks(loaded):
            found = kernel.residuals(block, fresh)
            if block.target_raw is not None and found.target is not None:
                back_through_cap(
                    self.tiles.spec.teacher_map, block.target_raw, block.target_bend, found.target, found.target_v,
                    self.tiles.plan.cached,
                )  # fmt: skip
            yield block, found

    def target_classes(self, classes: slice) -> slice:
        """Return the classes of the target beside those of a block: the same, but for grouped classes all of them."""
        return classes if self.tiles.groups is None else slice(0, len(self.tiles.groups[-1].here.of))

    def class_blocks(self) -> Iterator[slice]:
        """Yield the classes of each block."""
        held = self.model.weight.shape[0]
        # Groups may have classes of the target where there is none of the model.
        return iter([slice(0, held)]) if self.tiles.groups is not None else self.tiles.plan.class_blocks(held)

    def blocks(self, loaded: Sequence[Block] = ()) -> Iterator[tuple[Block, bool]]:
        """Yield each block, and whether it was computed anew: those that are ``loaded`` serve again."""
        if loaded:
            yield from [(block, False) for block in loaded]
            return
        for classes in self.class_blocks():
            yield self.load(classes), True

    def load(self, classes: slice) -> Block:
        """Compute the logits of a block and their changes, with buffers for what becomes of them."""
        tiles, spec, sides = self.tiles, self.tiles.spec, []
        excluded = self._excluded(classes)
        for name, map in {"z": self.model, "target": self.teacher}.items():
            if map is None:
                continue
            here = classes if map is self.model else self.target_classes(classes)
            half, v, out, v_out = None, None, None, None
            z = map.logits_into(self._buffer(name, here), here)
            if tiles.directions is not None:
                v = map.change_into(self._buffer(f"{name} v", here), map.along, here)
            if excluded is not None and (map is self.model or tiles.groups is None):  # a masked logit does not change
                tiles.put(z, excluded, None)
                if v is not None:
                    tiles.put(v, excluded, torch.zeros_like(excluded.columns, dtype=v.dtype))
            if tiles.wants_residuals:
                half = backends.residual_dtype(spec, map.narrow, map.weight, tiles.dtype)
            if half is not None:
                out = self._buffer(f"{name} out", here, half)
                v_out = None if v is None else self._buffer(f"{name} v out", here, half)
            sides.append((z, v, out, v_out))
        z, v, out, v_out = sides[0]
        block = Block(classes, z, v=v, out=out, v_out=v_out)
        if spec.beside is not None and spec.beside.target != "sparse":
            assert tiles.tensors.label_values is not None
            values = tiles.tensors.label_values[self.rows, classes]
            block.labels = self._masked(values, "labels", classes) if spec.beside.target == "logits" else values
        if spec.softcap is not None and (tiles.matrix is not None or not tiles.in_triton):
            block.raw = self._buffer("raw", classes)
        if tiles.columns:
            block.v = self._buffer("v", classes)
            block.q = self._buffer("q", classes) if tiles.wants_q else None
            block.residual = self._buffer("residual", classes) if tiles.wants_residual else None
        if self.teacher is not None:
            block.target, block.target_v, out, v_out = sides[1]
            if spec.teacher_softcap is not None:
                self._cap_target(block, block.target, block.target_v)
            if tiles.wants_target:  # in place unless in half precision
                block.target_out = block.target if out is None else out
                block.target_v_out = block.target_v if v_out is None else v_out
        elif not spec.lists_classes:
            self._load_target(block)
        return block

    def _cap_target(self, block: Block, target: Tensor, v: Tensor | None) -> None:
        """Map a teacher's logits and their change by its own soft cap, so that no kernel needs to know of it."""
        tiles, classes = self.tiles, self.target_classes(block.classes)
        if tiles.wants_target:
            block.target_raw = self._buffer("target raw", classes)
            block.target_bend = None if v is None else self._buffer("target bend", classes)
        cap_logits(tiles.spec.teacher_map, target, v, block.target_raw, block.target_bend, tiles.plan.cached)

    def _load_target(self, block: Block) -> None:
        tiles, classes = self.tiles, self.target_classes(block.classes)
        block.target = self._given_target(self.rows, classes)
        if tiles.spec.target == "logits" and tiles.groups is None:
            block.target = self._masked(block.target, "target", classes)
        if tiles.directions is not None:
            direction = tiles.directions[TARGET]
            moved = torch.zeros_like(block.target) if direction is None else direction[self.rows, classes]
            block.target_v = moved.to(tiles.dtype)
        if tiles.wants_target:
            block.target_out = torch.empty_like(block.target, dtype=tiles.dtype)
            block.target_v_out = None if tiles.directions is None else torch.empty_like(block.target_out)

    def _masked(self, logits: Tensor, name: str, classes: slice) -> Tensor:
        """Return logits, which may be the caller's, without the classes that the rows exclude."""
        excluded = self._excluded(classes)
        if excluded is None:
            return logits
        copy = self._buffer(name, classes).copy_(logits)
        self.tiles.put(copy, excluded, None)
        return copy

    def _excluded(self, classes: slice) -> Places | None:
        """Return where the classes that the rows exclude stand in a block."""
        excluded = self.tiles.tensors.excluded
        return None if excluded is None else Places.of(excluded[self.rows] - self.tiles.spec.first, classes)

    def _given_target(self, rows: slice | Tensor, classes: slice) -> Tensor:
        """Return some rows and classes of a target that is given for every class, less its largest logits if known."""
        tiles = self.tiles
        assert tiles.tensors.target is not None
        block, tops = tiles.tensors.target[rows, classes], tiles.target_tops
        return block if tops is None else block.to(tiles.dtype) - tops[rows].to(tiles.dtype)

    def again(self, rows: Tensor) -> Block:
        """Compute the logits and the target of some rows of the tile again, in memory of their own."""
        everything = slice(0, self.model.weight.shape[0])

        def logits(map: LinearMap) -> Tensor:
            reference = None if map.reference is None else map.reference[rows]
            some = map._replace(input=map.input[rows], narrow=None, reference=reference)
            return some.logits_into(map.input.new_empty(rows.shape[0], everything.stop), everything)

        block = Block(everything, logits(self.model))
        if self.teacher is not None:
            block.target = self.tiles.spec.teacher_map.value(logits(self.teacher))
        else:
            chosen = rows + self.rows.start if isinstance(self.rows, slice) else self.rows[rows]
            block.target = self._given_target(chosen, everything)
        if self.tiles.wants_target:
            block.target_out = torch.empty_like(block.z)
        return block

    @property
    def holds_every_class(self) -> bool:
        """Whether its one block holds all classes of the head, also those of other processes."""
        return self.tiles.plan.is_one_block and self.tiles.group is None

    def halved(
        self, name: str, map: LinearMap, residual: Tensor, change: Tensor | None, classes: slice,
        scaling: Tensor | None,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:  # fmt: skip
        """Return residuals of the ATen kernels as the CPU multiplies them by half-precision factors, if it does.

        They are then scaled row by row before they are rounded, so that their products need not be scaled after they
        are rounded; the rows' factors that remain are the last that is returned. A class's entries are adjacent, which
        is how the product with the features reads them.
        """
        half = half_on_cpu(map.narrow, map.weight)
        if half is None or residual.dtype == half:
            return residual, change, scaling

        def by_class(suffix: str, tensor: Tensor) -> Tensor:
            tensor = tensor if scaling is None else tensor.mul_(scaling)
            flat = self.tiles.buffers.take(f"{name} {suffix}", self.tiles.entries // 2).view(half)
            return flat[: tensor.numel()].view(tensor.shape[::-1]).T.copy_(tensor)

        return by_class("half", residual), None if change is None else by_class("v half", change), None

    def _buffer(self, name: str, classes: slice, half: torch.dtype | None = None) -> Tensor:
        """Return a buffer for a block, the same for every tile; in half precision in half the memory."""
        width, entries, buffers = classes.stop - classes.start, self.tiles.entries, self.tiles.buffers
        flat = buffers.take(name, entries) if half is None else buffers.take(name, entries // 2).view(half)
        padded = self.tiles.buffers.device.type == "cpu" and not self.tiles.in_triton
        step = aligned(width) if padded else width
        first = len(self) * classes.start if self.tiles.plan.kept else 0
        return flat[first : first + len(self) * step].view(len(self), step)[:, :width]


def kept_rows(weight: Tensor) -> slice | Tensor:
    """Return the rows of weight other than 0; all of them where looking would make the device wait."""
    kept = weight != 0
    if weight.device.type != "cpu" or kept.all():
        return slice(0, weight.shape[0])
    return kept.nonzero().squeeze(-1)


def require_classes(spec: LossSpec, tensors: HeadTensors) -> None:
    """Raise ``IndexError`` for class indices out of range, which a graph or a transform hid from the public call."""
    classes = spec.class_count(tensors.weight.shape[0])
    named = (("target", tensors.indices, 0), ("target", tensors.labels, 0), ("exclude", tensors.excluded, -1))
    for name, indices, lowest in named:
        if indices is None or indices.device.type != "cpu" or indices.numel() == 0:
            continue
        least, most = (int(bound) for bound in torch.where(indices == NOT_LISTED, 0, indices).aminmax())
        if least < lowest or most >= classes:
            wrong = least if least < lowest else most
            raise IndexError(f"{name} must hold classes from {lowest} to {classes - 1}, got {wrong}")


def _target_tops(loss: LossSpec, tensors: HeadTensors) -> Tensor | None:
    """Return the largest logit of each row of the target, ``(n, 1)``, where a temperature would round at its size."""
    given = tensors.target
    if loss.target != "logits" or given is None or math.frexp(loss.target_scale)[0] == 0.5:
        return None
    top = largest(given)
    if top.numel() and (loss.cuts_target or not loss.groups):
        max_over([top], loss.processes)
    return torch.where(top.isfinite(), top, 0.0)
