"""Contrastive losses in both directions: the rows' softmax over the classes and the classes' softmax over the rows.

Row ``i`` and class ``i`` are a pair, and its loss is ``½ (−log p_ii − log c_ii)`` with ``p`` the softmax of the logits
``z`` along a row and ``c`` that along a column. The gradient needs the sums of whole columns, so that all tiles are
walked twice: one walk gathers the sums of rows and columns, one forms

    ∂L/∂z_ij = ½ w_i (p_ij − 1_{i=j}) + ½ w_j (c_ij − 1_{i=j}),

or its change along a direction, in place of the logits. That is four matrix products, three where one tile holds all
logits, instead of the six of two cross-entropies. The statistics of each side are those of a
:class:`~softcurve.head.sparse.SparseKernel` whose list is the pair, whose coarse loss gives values and derivatives.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Iterator
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

from softcurve.head.aten.sparse import Places, SparseSums, or_zero, put
from softcurve.head.kernel import Block, Residuals, RowData, row_groups
from softcurve.head.sparse import SparseKernel
from softcurve.head.tiles import Tile, Tiles
from softcurve.processes import sum_over

# Where the largest logits of a block's rows and columns lie this close together, one exponential serves both: float32
# has normal numbers down to e^-87, so that of the lowest row it still has what is above e^-37 of the largest.
COMMON = 50.0
Add: TypeAlias = Callable[[Tile, slice, Residuals, Tensor | None], None]


def evaluate_pairs(tiles: Tiles, add: Add, *, tangents: bool) -> Tensor:
    """Return each pair's loss, not weighted, or its change along a direction if ``tangents``; ``add`` residuals."""
    rows, columns = _side(tiles, of_rows=True), _side(tiles, of_rows=False)
    walk = _blocks(tiles)
    kept: tuple[Tile, Block] | None = None
    for tile, block in walk:
        _accumulate(tile, block, rows, columns)
        if tiles.plan.rows >= tiles.count and not tiles.plan.cuts_classes:
            kept = tile, block  # its buffers stay taken as long as the walk is not resumed
            break
    if tiles.group is not None:
        rows.reduce_over(0, tiles.group)
    for side in (rows, columns):
        side.finish(0)
        if tiles.wants_residuals or tangents:
            side.prepare_residuals()
    if tiles.wants_residuals:
        of_rows, of_columns = SideNumbers.of(rows), SideNumbers.of(columns)
        for tile, block in _blocks(tiles) if kept is None else [kept]:
            _form_residuals(tile, block, of_rows, of_columns)
            add(tile, block.classes, Residuals(block.z, v=block.v), None)
    walk.close()
    found = [side.tangents(None) if tangents else side.losses() for side in (rows, columns)]
    return (found[0] + _of_all_classes(tiles, found[1])) / 2


def _side(tiles: Tiles, *, of_rows: bool) -> SparseKernel:
    """Return the statistics of all rows, or of the columns of this process, with half the weight of each pair."""
    spec, t = tiles.spec, tiles.tensors
    held = t.weight.shape[0]
    weight = t.row_weight.to(tiles.dtype) / 2
    own = slice(None) if of_rows else slice(spec.first, spec.first + held)
    index = torch.arange(t.input.shape[0], device=weight.device)[own].unsqueeze(-1)
    data = RowData(
        weight[own], index - spec.first, class_count=spec.class_count(held), held=held, first=spec.first,
        wants_gradient=True, has_direction=tiles.directions is not None, cuts_classes=True,
    )  # fmt: skip
    side = SparseKernel(spec, data)
    side.unlisted = SparseSums(*(part.clone() for part in side.unlisted))  # to be written in place
    return side


def _blocks(tiles: Tiles) -> Generator[tuple[Tile, Block], None, None]:
    for tile in tiles:
        for classes in tile.class_blocks():
            yield tile, tile.load(classes)


def _of_all_classes(tiles: Tiles, columns: Tensor) -> Tensor:
    """Return one number for each class of all processes."""
    whole = columns.new_zeros(tiles.tensors.input.shape[0])
    first = tiles.spec.first
    whole[first : first + len(columns)] = columns
    sum_over([whole], tiles.spec.processes)
    return whole


def _pairs_in(tile: Tile, block: Block) -> tuple[slice, Places]:
    """Return the rows of a tile, and where the classes that they are paired with stand in a block."""
    assert isinstance(tile.rows, slice)
    rows, first = tile.rows, tile.tiles.spec.first
    index = torch.arange(rows.start, rows.stop, device=block.z.device).unsqueeze(-1)
    return rows, Places.of(index - first, block.classes)


# --- statistics ------------------------------------------------------------------------------------------------------


def _accumulate(tile: Tile, block: Block, rows: SparseKernel, columns: SparseKernel) -> None:
    """Read the pairs of a block, which are masked, and add its other entries to the sums of rows and columns."""
    of_tile, places = _pairs_in(tile, block)
    assert places.inside is not None
    inside = places.inside.squeeze(-1)
    row = torch.arange(of_tile.start, of_tile.stop, device=inside.device)[inside]
    for side, pair in ((rows, row), (columns, places.columns.squeeze(-1)[inside] + block.classes.start)):
        side.raw = side.listed = side.listed.index_put((pair,), places.take(block.z)[inside])
        if block.v is not None:
            side.v_listed = side.v_listed.index_put((pair,), places.take(block.v)[inside])
    put(block.z, places, None)
    of_rows, of_columns = _sums(block, list(row_groups(block.z, tile.tiles.plan.cached)))
    _merge(rows, of_rows, of_tile)
    _merge(columns, of_columns, block.classes)


def _sums(block: Block, groups: list[slice]) -> tuple[SparseSums, SparseSums]:
    """Return ``Σ e^{z − shift}`` and ``Σ e^{z − shift} ż`` along the rows and along the columns, ``(entries, 1)``."""
    z, v = block.z, block.v
    row_top, column_top = z.new_empty(len(z), 1), z.new_full((1, z.shape[1]), -math.inf)
    for group in groups:
        torch.amax(z[group], -1, keepdim=True, out=row_top[group])
        torch.maximum(column_top, z[group].amax(0, keepdim=True), out=column_top)
    level = _common_level(row_top, column_top)
    row_shift, column_shift = (or_zero(top) if level is None else level.expand_as(top) for top in (row_top, column_top))
    of_rows, of_columns = z.new_zeros(2, len(z), 1), z.new_zeros(2, 1, z.shape[1], dtype=torch.float64)
    for group in groups:
        part = z[group]
        e = torch.sub(part, row_shift[group]).exp_()
        c = e if level is not None else torch.sub(part, column_shift).exp_()
        of_rows[0, group], of_columns[0] = e.sum(-1, keepdim=True), of_columns[0] + c.sum(0, keepdim=True)
        if v is not None:
            of_rows[1, group] = (e * v[group]).sum(-1, keepdim=True)
            of_columns[1] += (c * v[group]).sum(0, keepdim=True)

    def as_sums(top: Tensor, shift: Tensor, found: Tensor) -> SparseSums:
        lowest = torch.where(top == -math.inf, top, shift)  # without mass the shift is left to other blocks
        total, change = found.double().reshape(2, -1, 1)
        return SparseSums.of(lowest.double().reshape(-1, 1), total, change=change)

    return as_sums(row_top, row_shift, of_rows), as_sums(column_top, column_shift, of_columns)


def _common_level(rows: Tensor, columns: Tensor) -> Tensor | None:
    """Return the largest logit, ``()``, if one exponential serves rows and columns; not where a look would wait."""
    if rows.device.type != "cpu":
        return None
    finite = torch.cat([rows.reshape(-1), columns.reshape(-1)])
    finite = finite[finite != -math.inf]
    return finite.amax() if len(finite) and bool(finite.amax() - finite.amin() <= COMMON) else None


def _merge(side: SparseKernel, sums: SparseSums, entries: slice) -> None:
    """Add the sums of a block to those of some rows or columns."""
    before = SparseSums(*(part[entries] for part in side.unlisted))
    shift = torch.maximum(before.shift, sums.shift)
    for whole, part in zip(side.unlisted, before.shifted(shift).plus(sums.shifted(shift)), strict=True):
        whole[entries] = part


# --- residuals -------------------------------------------------------------------------------------------------------


class SideNumbers(NamedTuple):
    """The numbers of each row or column that form its part of the residuals, ``(entries, 1)``."""

    shift: Tensor
    alpha: Tensor  # see SparseResiduals; these include the factor that other passes leave to the products
    beta: Tensor
    listed: Tensor
    listed_v: Tensor
    lse: Tensor  # the log-sum-exp over all entries but the pair; +inf if there are no others

    @staticmethod
    def of(side: SparseKernel) -> SideNumbers:
        """Collect the numbers of a side whose residuals are prepared."""
        shift, alpha, beta, _, listed, listed_v = side.rows
        factor = 1.0 if side.row_factor is None else side.row_factor
        lse = torch.where(side.others > 0, shift + torch.log(side.others), math.inf)
        return SideNumbers(shift, alpha * factor, beta * factor, listed * factor, listed_v * factor, lse)

    def of_some(self, entries: slice) -> SideNumbers:
        """Return the numbers of some rows or columns."""
        return SideNumbers(*(part[entries] for part in self))

    def shifted(self, shift: Tensor) -> SideNumbers:
        """Return the numbers for exponentials that are relative to one ``shift``, ``()``."""
        raised = torch.exp(shift - self.shift)
        return self._replace(shift=shift.expand_as(raised), alpha=self.alpha * raised, beta=self.beta * raised)


def _form_residuals(tile: Tile, block: Block, of_rows: SideNumbers, of_columns: SideNumbers) -> None:
    """Set ``z ← ∂L/∂z`` and ``v`` to its change along the direction.

    With ``e = e^{z − shift}`` of each side, an entry is the sum of ``β e`` over the sides, and its change the sum of
    ``e (β ż + α)``; pairs have the numbers of the coarse losses.
    """
    of_tile, places = _pairs_in(tile, block)
    rows, columns = of_rows.of_some(of_tile), of_columns.of_some(block.classes)
    put(block.z, places, None)  # once more in a block that is computed again
    _form_unlisted(block, rows, columns, row_groups(block.z, tile.tiles.plan.cached))
    pair = places.columns.squeeze(-1)
    put(block.z, places, rows.listed + columns.listed[pair])
    if block.v is not None:
        put(block.v, places, rows.listed_v + columns.listed_v[pair])


def _form_unlisted(block: Block, rows: SideNumbers, columns: SideNumbers, groups: Iterator[slice]) -> None:
    """Form the entries of a block that are no pairs, in place."""
    dtype = block.z.dtype
    highest, least = torch.cat([rows.shift, columns.shift]).amax(), torch.cat([rows.lse, columns.lse]).amin()
    common = block.z.device.type == "cpu" and bool(highest - least <= COMMON)
    if common:  # one exponential, whose factors are of moderate size
        rows, columns = rows.shifted(highest), columns.shifted(highest)
    shift, alpha, beta = (part.to(dtype) for part in (rows.shift, rows.alpha, rows.beta))
    of_columns = (part.to(dtype).T for part in (columns.shift, columns.alpha, columns.beta))
    column_shift, column_alpha, column_beta = of_columns
    for group in groups:
        z, v = block.z[group], None if block.v is None else block.v[group]
        e = torch.sub(z, shift[group]).exp_()
        if common:
            total = torch.add(beta[group], column_beta)
            torch.mul(e, total, out=z)
            if v is not None:
                v.mul_(z).addcmul_(e, torch.add(alpha[group], column_alpha, out=total))
            continue
        c = torch.sub(z, column_shift).exp_()
        torch.mul(e, beta[group], out=z).addcmul_(c, column_beta)
        if v is not None:
            v.mul_(z).addcmul_(e, alpha[group]).addcmul_(c, column_alpha)
