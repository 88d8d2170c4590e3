"""The loop over the tiles of a head, of first and second order.

A tile is some rows of the features against a block of the classes: all of them, unless the plan cuts classes. For each
tile of rows

1. every block of logits comes from one matrix product, and the kernel accumulates the statistics of the rows from it,
   in as many sweeps over the blocks as it needs;
2. over a sharded head the statistics of each sweep are reduced over the processes;
3. the kernel overwrites the logits of each block with residuals ``∂L/∂z``, and forms their changes along a direction;
   a block is computed again only where classes are cut;
4. products with the weight and the features take the residuals back.

:func:`evaluate` is the loop, of first order or along a direction; :mod:`softcurve.head.autograd` differentiates it.
A loss of rows and columns (:mod:`softcurve.head.pairs`) walks the tiles twice, because a column ends with the last row.
:mod:`softcurve.head.curvature` and :mod:`softcurve.head.per_row` walk the same tiles for many columns. Rows of weight
0 have no part in a gradient and are left out.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from softcurve.head.kernel import Kernel, Residuals, Statistics
from softcurve.head.pairs import evaluate_pairs
from softcurve.head.products import STILL, ClassRows, MapSums, scaling_of, terms_of
from softcurve.head.tensors import NOTHING, TARGET, Directions, HeadTensors, Wanted, joined, sides
from softcurve.head.tiles import Tile, Tiles, kept_rows
from softcurve.losses.spec import LossSpec


class Outcome(NamedTuple):
    """The result of a pass; a part that was not asked for is ``None``."""

    rows: Tensor  # (n,): each row's loss, or its change along a direction
    statistics: Statistics
    gradients: Directions  # of Σ weight · loss, or their changes along a direction


def evaluate(
    spec: LossSpec, tensors: HeadTensors, budget: int | None, *, wanted: Wanted = NOTHING,
    directions: Directions | None = None, stats: bool = False, tangents: bool = False, all_rows: bool = False,
) -> Outcome:  # fmt: skip
    """Return each row's loss, not weighted, and the gradients of ``Σ weight · loss`` in the tensors ``wanted``.

    With ``directions`` (``None``: zero) return the changes of the gradients along them, and with ``tangents`` those of
    the rows' losses. Rows of weight 0 have a loss of 0 unless ``all_rows``, statistics or tangents are asked for.
    """
    results = _Results(spec, tensors, wanted, directions is not None, stats=stats)
    if spec.pairs:
        everything = slice(0, tensors.input.shape[0])  # a row of weight 0 is still compared with others
        tiles = Tiles(spec, tensors, budget, everything, wanted, directions)
        results.rows = evaluate_pairs(tiles, results.add, tangents=tangents).to(results.rows.dtype)
        return results.outcome()
    kept = kept_rows(tensors.row_weight)
    parts = [(kept, wanted)]
    if isinstance(kept, Tensor):
        results.clear_rows()
        if all_rows or stats or tangents:
            parts.append(((tensors.row_weight == 0).nonzero().squeeze(-1), NOTHING))
    for rows, in_tensors in parts:
        for tile in Tiles(spec, tensors, budget, rows, in_tensors, directions):
            gradient = tile.tiles.wants_residuals
            data = tile.row_data(wants_gradient=gradient, wants_stats=stats, wants_tangents=tangents)
            kernel = tile.kernel(data)
            loaded = tile.accumulate(kernel)
            if any(in_tensors) or tangents:
                kernel.prepare_residuals()
            if gradient or (tangents and spec.compares_every_class):
                for block, residuals in tile.residuals(kernel, loaded):
                    if gradient:
                        results.add(tile, block.classes, residuals, kernel.row_factor)
            results.add_rows(tile, kernel, tangents=tangents)
    return results.outcome()


class _Results:
    """The rows' losses, their statistics and the gradients of one pass, to which the tiles add."""

    def __init__(self, spec: LossSpec, tensors: HeadTensors, wanted: Wanted, directed: bool, *, stats: bool) -> None:
        self.tensors, self.directed, self.group = tensors, directed, spec.processes
        n, dtype, device = tensors.input.shape[0], tensors.dtype, tensors.input.device
        self.rows = torch.zeros(n, dtype=dtype, device=device)
        kinds = Statistics.dtypes(dtype) if stats else ()
        self.statistics = Statistics(*(torch.zeros(n, dtype=kind, device=device) for kind in kinds))
        # Gradients are summed over tiles in the dtype of the computation. One written once has its tensor's own.
        teacher = spec.target == "teacher"
        of_model, of_target = sides([
            tensor.new_empty(tensor.shape, dtype=tensor.dtype if number == TARGET and not teacher else dtype)
            if is_wanted and tensor is not None
            else None
            for number, (tensor, is_wanted) in enumerate(zip(tensors.differentiable, wanted, strict=True))
        ])  # fmt: skip
        self.model = MapSums(of_model, set())
        self.teacher = MapSums(of_target if teacher else STILL, set(), ClassRows(tensors.target_classes))
        self.target, self.target_started = None if teacher else of_target.input, False

    def clear_rows(self) -> None:
        """Set to 0 what has one entry for each row: not every row will be visited."""
        for gradient in (self.model.into.input, self.teacher.into.input, self.target):
            if gradient is not None:
                gradient.zero_()

    def add(self, tile: Tile, classes: slice, residuals: Residuals, factor: Tensor | None) -> None:
        """Take the residuals of a block back to features, weight and bias; the model's times ``factor``, row by row."""
        (z, target, v, target_v), of_target = residuals, tile.target_classes(classes)
        if classes.stop > classes.start:  # a process may have classes of one side of a ClassMap alone
            halved = tile.halved("z", tile.model, z, v, classes, scaling_of(tile.model, factor))
            self.model.add(tile.rows, classes, terms_of(tile.model, *halved), is_whole=tile.holds_every_class)
        if of_target.stop == of_target.start:
            return
        if tile.teacher is not None and target is not None:
            halved = tile.halved("target", tile.teacher, target, target_v, of_target, scaling_of(tile.teacher, None))
            self.teacher.add(tile.rows, of_target, terms_of(tile.teacher, *halved), is_whole=tile.holds_every_class)
        elif target is not None:
            self.add_target(tile.rows, of_target, target_v if self.directed else target)

    def add_target(self, rows: slice | Tensor, classes: slice, gradient: Tensor | None) -> None:
        """Write the gradient of some rows and classes of a target that is given as a tensor."""
        if self.target is not None:
            assert gradient is not None
            self.target[rows, classes] = gradient.to(self.target.dtype)
            self.target_started = True

    def add_rows(self, tile: Tile, kernel: Kernel, *, tangents: bool) -> None:
        """Write what the tile has found for each of its rows."""
        if tangents or not self.directed:
            found = kernel.tangents(self.group) if tangents else kernel.losses()
            self.rows[tile.rows] = found.to(self.rows.dtype)
        for whole, column in zip(self.statistics, kernel.statistics, strict=True):
            if column is not None and whole is not None:
                whole[tile.rows] = column.to(whole.dtype)
        if tile.tiles.wanted[TARGET] and tile.tiles.spec.lists_classes:
            change = kernel.target_product if self.directed else kernel.target_gradient
            self.add_target(tile.rows, slice(None), change)

    def outcome(self) -> Outcome:
        """Return the results, summed over the classes of all processes; changes in the dtypes of their tensors."""
        gradients = joined(self.model.finish(self.group), self.teacher.finish(self.group))
        if self.target is not None:
            gradients[TARGET] = self.target if self.target_started else self.target.zero_()
        if self.directed:
            gradients = rounded(gradients, self.tensors)
        return Outcome(self.rows, self.statistics, gradients)


def rounded(gradients: Directions, tensors: Sequence[Tensor | None]) -> list[Tensor | None]:
    """Return gradients, which are summed and saved in the dtype of the computation, in the dtypes of their tensors."""
    return [g if g is None or t is None else g.to(t.dtype) for g, t in zip(gradients, tensors, strict=False)]
