"""The loop over the tiles of a head, of first and second order.

A tile is some rows of the features against a block of the classes: all of them, unless the plan cuts classes. For each
tile of rows

1. every block of logits comes from one matrix product, and the kernel accumulates the statistics of the rows from it,
   in as many sweeps over the blocks as it needs;
2. over a sharded head the statistics of each sweep are reduced over the processes;
3. the kernel turns each block into residuals ``∂L/∂z``, or into their changes along a direction, where the logits
   stood; a block is computed again only where classes are cut;
4. products with the weight and the features take the residuals back.

:func:`evaluate` is the loop, of first order or along a direction; :mod:`softcurve.head.autograd` differentiates it.
:mod:`softcurve.head.curvature` and :mod:`softcurve.head.per_row` walk the same tiles for many columns. Rows of weight
0 have no part in a gradient and are left out.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from softcurve.head import workspace
from softcurve.head.gradients import MapSums, terms_of
from softcurve.head.kernel import Kernel, Residuals, Statistics
from softcurve.head.products import STILL, Direction
from softcurve.head.tensors import NOTHING, Directions, HeadTensors, Wanted
from softcurve.head.tiles import Tile, Tiles, kept_rows
from softcurve.losses.spec import LossSpec


class Outcome(NamedTuple):
    """What a pass returns; what was not asked for is ``None``."""

    rows: Tensor  # (n,): each row's loss, or its change along a direction
    statistics: Statistics
    gradients: Directions  # of Σ weight · loss, or their changes along a direction


def evaluate(
    spec: LossSpec,
    tensors: HeadTensors,
    budget: int | None,
    *,
    wanted: Wanted = NOTHING,
    directions: Directions | None = None,
    stats: bool = False,
    tangents: bool = False,
    all_rows: bool = False,
) -> Outcome:
    """Return each row's loss, not weighted, and the gradients of ``Σ weight · loss`` in the tensors ``wanted``.

    With ``directions`` (``None``: zero) return the changes of the gradients along them, and with ``tangents`` those of
    the rows' losses. Rows of weight 0 have a loss of 0 unless ``all_rows``, statistics or tangents are asked for.
    """
    results = _Results(spec, tensors, wanted, directions, stats=stats)
    directed = directions is not None
    kept = kept_rows(tensors.row_weight)
    parts = [(kept, wanted)]
    if isinstance(kept, Tensor):
        results.clear_rows()
        if all_rows or stats or tangents:
            parts.append(((tensors.row_weight == 0).nonzero().squeeze(-1), NOTHING))
    for rows, in_tensors in parts:
        with Tiles(spec, tensors, budget, rows, in_tensors, directions) as tiles:
            for tile in tiles:
                data = tile.row_data(
                    wants_target=any(in_tensors[3:]),
                    wants_gradient=any(in_tensors),
                    wants_stats=stats,
                    wants_tangents=tangents,
                    has_direction=directed,
                )
                kernel = tile.kernel(data)
                loaded = tile.accumulate(kernel)
                if any(in_tensors) or tangents:
                    kernel.prepare_residuals()
                    for block, fresh in tile.blocks(loaded):
                        residuals = kernel.residuals(block, fresh)
                        if any(in_tensors):
                            results.add(tile, block.classes, residuals, kernel.row_factor)
                results.add_rows(tile, kernel, tangents=tangents)
    return results.outcome(None if directions is None else [t if t is None else t.dtype for t in tensors[:6]])


class _Results:
    """The rows' losses, their statistics and the gradients of one pass, to which the tiles add."""

    def __init__(
        self, spec: LossSpec, tensors: HeadTensors, wanted: Wanted, directions: Directions | None, *, stats: bool
    ) -> None:
        self.spec, self.group = spec, spec.processes
        n, dtype, device = len(tensors.input), tensors.dtype, tensors.input.device
        self.rows = torch.zeros(n, dtype=dtype, device=device)
        self.statistics = Statistics()
        if stats:
            integers = [torch.zeros(n, dtype=torch.int64, device=device) for _ in range(2)]
            self.statistics = Statistics(torch.zeros_like(self.rows), torch.zeros_like(self.rows), *integers)

        def empty(number: int, dtype: torch.dtype) -> Tensor | None:
            tensor = tensors[number]
            return workspace.empty(tensor.shape, dtype, device) if wanted[number] and tensor is not None else None

        # Gradients are summed over tiles in the dtype of the computation. One written once has its tensor's own.
        self.model = MapSums(Direction(empty(0, dtype), empty(1, dtype), empty(2, dtype)), set())
        self.teacher, self.target = MapSums(STILL, set()), None
        if spec.target == "teacher":
            self.teacher = MapSums(Direction(empty(3, dtype), empty(4, dtype), empty(5, dtype)), set())
        elif tensors.target is not None:
            self.target = empty(3, tensors.target.dtype)
        self.target_started = False

    def clear_rows(self) -> None:
        """Set to 0 what has one entry for each row: not every row will be visited."""
        for gradient in (self.model.into.input, self.teacher.into.input, self.target):
            if gradient is not None:
                gradient.zero_()

    def add(self, tile: Tile, classes: slice, residuals: Residuals, factor: Tensor | None) -> None:
        """Take the residuals of a block back to features, weight and bias; the model's times ``factor``, row by row."""
        spec = self.spec
        self.model.add(
            tile.rows, classes, terms_of(tile.model, tile.along, residuals.z, residuals.v, factor, spec.scale)
        )
        if tile.teacher is not None:
            if residuals.target is not None:
                terms = terms_of(
                    tile.teacher, tile.teacher_along, residuals.target, residuals.target_v, None, spec.target_scale
                )
                self.teacher.add(tile.rows, classes, terms)
        elif residuals.target is not None:
            self.add_target(tile.rows, classes, residuals.target if residuals.v is None else residuals.target_v)

    def add_target(self, rows: slice | Tensor, classes: slice, gradient: Tensor | None) -> None:
        """Write the gradient of some rows and classes of a target that is given as a tensor."""
        if self.target is not None:
            assert gradient is not None
            self.target[rows, classes] = gradient.to(self.target.dtype)
            self.target_started = True

    def add_rows(self, tile: Tile, kernel: Kernel, *, tangents: bool) -> None:
        """Write what the tile has found for each of its rows."""
        rows, directed = tile.rows, tile.tiles.directions is not None
        if tangents:
            self.rows[rows] = kernel.tangents(self.group).to(self.rows.dtype)
        elif not directed:
            self.rows[rows] = kernel.losses().to(self.rows.dtype)
        for name, column in vars(kernel.statistics).items():
            whole = getattr(self.statistics, name)
            if column is not None and whole is not None:
                whole[rows] = column.to(whole.dtype)
        if self.spec.target == "sparse" and tile.tiles.wanted[3]:
            self.add_target(rows, slice(None), kernel.target_product if directed else kernel.target_gradient)

    def outcome(self, dtypes: list[torch.dtype | None] | None) -> Outcome:
        """Return the results, summed over the classes of all processes; rounded to ``dtypes`` if they are given."""
        gradients = [*self.model.finish(self.group), *self.teacher.finish(self.group)]
        if self.target is not None:
            gradients[3] = self.target if self.target_started else self.target.zero_()
        if dtypes is not None:
            gradients = [g if g is None else g.to(dtype) for g, dtype in zip(gradients, dtypes, strict=True)]
        return Outcome(self.rows, self.statistics, tuple(gradients))  # type: ignore[arg-type]
