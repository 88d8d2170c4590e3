"""The loop of second order: products of many columns with a head's matrix, added to where their sums are kept.

The logits of a tile are computed once for all columns; each column then costs its change of the logits and the way
back. Nothing here is differentiable, and the target does not move.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from softcurve.head.dense import DenseKernel
from softcurve.head.kernel import Block, CurvatureKernel, Kernel
from softcurve.head.products import Direction, MapParts, MapSums, Term, back_to_weight, to_features
from softcurve.head.sparse import SparseKernel
from softcurve.head.tensors import RowLosses
from softcurve.head.tiles import Tile, Tiles, kept_rows
from softcurve.losses.rows import FISHER, HESSIAN
from softcurve.processes import sum_over


def curvature_tiles(rows: RowLosses, matrix: str, *, columns: bool) -> Iterator[tuple[Tile, CurvatureKernel]]:
    """Yield the tiles of the rows of weight other than 0; with ``columns`` they have buffers for a column's change.

    Their kernels see rows of weight 1: the passes weigh what comes back.
    """
    loss, t = rows.loss, rows.tensors
    kind: type[CurvatureKernel] = SparseKernel if loss.target == "sparse" else DenseKernel
    for tile in Tiles(loss, t, rows.memory_budget, kept_rows(t.row_weight), matrix=matrix, columns=columns):
        data = tile.row_data(weight=tile.model.input.new_ones(len(tile)), wants_gradient=True)
        yield tile, kind(loss, data, matrix=matrix, merges_tail=rows.merges_tail)


def add_products(
    rows: RowLosses, matrix: str, columns: Sequence[Direction], into: Sequence[Direction], scale: float = 1.0
) -> None:
    """``into += scale Σ_i weight_i (∂z_i)ᵀ B_i ∂z_i`` along each column, in the parts that ``into`` has.

    For the Hessian the second derivative of ``z = W e + b`` is included. Where classes are cut, every column must have
    seen all blocks of a row before any block is multiplied.
    """
    for tile, kernel in curvature_tiles(rows, matrix, columns=True):
        cut, numbered = tile.tiles.plan.cuts_classes, list(enumerate(columns))
        blocks: Iterable[Block] = prepared(tile, kernel)
        blocks = blocks if cut else list(blocks)
        # A block holds one change at a time. Where it is all of a row, a column is multiplied before the next is read.
        for batch in [numbered] if cut else [[pair] for pair in numbered]:
            for block in blocks:
                for j, column in batch:
                    change(tile, block, column)
                    kernel.accumulate_column(block, j)
            for j, _ in batch:
                kernel.reduce_column(j, tile.tiles.group)
            for block in prepared(tile, kernel, again=True) if cut else blocks:
                for j, column in batch:
                    if cut:
                        change(tile, block, column)
                    kernel.multiply_column(block, j)
                    add_column(tile, block, kernel, column, into[j], scale)


class Diagonal(NamedTuple):
    """The diagonal in the weight and the bias, and each row's part of the trace, its weight included."""

    weight: Tensor | None  # (C, d)
    bias: Tensor | None  # (C,)
    rows: Tensor  # (n,): Σ_k B_kk, not times ‖e‖² or 1


def diagonal(rows: RowLosses, matrix: str, *, wants_diagonal: bool) -> Diagonal:
    """Return ``Σ_i weight_i diag(B_i) ⊗ (e ⊙ e)``; only the rows' traces unless ``wants_diagonal``."""
    t = rows.tensors
    traces = torch.zeros(len(t.input), dtype=t.dtype, device=t.input.device)
    in_weight = torch.zeros(t.weight.shape, dtype=t.dtype, device=t.input.device) if wants_diagonal else None
    in_bias = traces.new_zeros(len(t.weight)) if wants_diagonal else None
    for tile, kernel in curvature_tiles(rows, matrix, columns=True):
        factor = row_weight(tile) * rows.loss.scale**2
        blocks: Iterable[Block] = prepared(tile, kernel)
        if rows.loss.target == "sparse":
            # What lies beside the largest class of a confident row is known after the last block.
            if tile.tiles.plan.cuts_classes:
                for _ in blocks:
                    pass
                blocks = prepared(tile, kernel, again=True)
            else:
                blocks = list(blocks)
        for block in blocks:
            assert block.v is not None
            kernel.diagonal(block)
            here = factor if kernel.row_factor is None else factor * kernel.row_factor.to(t.dtype)
            traces[tile.rows] += (here * block.v.sum(-1, keepdim=True)).squeeze(-1)
            if in_weight is not None and in_bias is not None:
                squares = tile.model.input[:, : t.weight.shape[1]].square() * here
                back_to_weight(in_weight[block.classes], block.v, squares, accumulate=True)
                in_bias[block.classes].addmv_(block.v.T, here.squeeze(-1))
    sum_over([traces], rows.loss.processes)
    return Diagonal(in_weight, in_bias, traces)


def class_coefficients(rows: RowLosses, matrix: str) -> bool:
    """Return whether each row's matrix is ``a diag(p) − b p pᵀ``, as for a Fisher or a loss convex in the logits."""
    bucket = rows.merges_tail and matrix != FISHER
    plain = not bucket and rows.loss.softcap is None and matrix != HESSIAN
    return plain and not DenseKernel.needs_q(rows.loss.divergence, matrix)


def add_class_products(
    rows: RowLosses, matrix: str, vectors: Tensor | None, into: Tensor | None, diagonal: Tensor
) -> None:
    """``diagonal += Σ_i w_i a_i p_i`` and ``into += Σ_i w_i b_i p_i (p_iᵀ vectors)``, ``(C,)`` and ``(C, k)``.

    For rows of :func:`class_coefficients`; the curvature's ``Σ_i w_i B_i`` is ``diag(diagonal)`` minus the latter.
    """
    for tile, kernel in curvature_tiles(rows, matrix, columns=False):
        along = None if vectors is None else tile.model.input.new_zeros(len(tile), vectors.shape[1])
        block = None
        for block in probabilities(tile, kernel):
            a, b = (row_weight(tile) * rows.loss.scale**2 * c.to(tile.tiles.dtype) for c in kernel.coefficients())
            diagonal[block.classes] += (block.z.T @ a).squeeze(-1)
            if vectors is not None and along is not None:
                along += block.z @ vectors[block.classes]
        if along is None or into is None:
            continue
        sum_over([along], tile.tiles.group)
        again: Iterable[Block] = probabilities(tile, kernel, again=True)
        for each in again if block is None or tile.tiles.plan.cuts_classes else [block]:
            into[each.classes] += each.z.T @ (b * along)


def add_outer_products(
    rows: RowLosses, row_factor: Tensor, columns: Sequence[Direction], into: Sequence[Direction], scale: float = 1.0
) -> None:
    """``into += scale Σ_i row_factor_i g_i (g_i · column)`` with each row's own gradient ``g_i`` in (e, W, b).

    The features' part of ``g_i`` belongs to row ``i`` alone. Rows of weight 0 have no part.
    """
    for tile, kernel in curvature_tiles(rows, "", columns=False):
        e = tile.model.input
        back, inner = torch.zeros_like(e), e.new_zeros(len(e), len(columns))  # Wᵀ g, and g · column
        block, loaded = None, tile.accumulate(kernel)
        kernel.prepare_residuals()
        for block, _ in tile.residuals(kernel, loaded):
            factor = residual_factor(tile, kernel)
            back += factor * to_features(block.z, tile.model.weight[block.classes], tile.tiles.dtype)
            for j, column in enumerate(columns):
                if column.weight is not None:
                    part = to_features(block.z, column.weight[block.classes], tile.tiles.dtype)
                    inner[:, j] += factor.squeeze(-1) * (part * e).sum(-1)
                if column.bias is not None:
                    inner[:, j] += factor.squeeze(-1) * (block.z @ column.bias[block.classes].to(tile.tiles.dtype))
        for j, column in enumerate(columns):
            if column.input is not None:
                inner[:, j] += (back * column.input[tile.rows].to(tile.tiles.dtype)).sum(-1)
        sum_over([inner], tile.tiles.group)
        inner *= scale * row_factor[tile.rows].to(tile.tiles.dtype).unsqueeze(-1)
        for j, out in enumerate(into):
            if out.input is not None:
                out.input[tile.rows] += (inner[:, j : j + 1] * back).to(out.input.dtype)
        again: Iterable[Block] = (each for each, _ in tile.residuals(kernel, ()))
        for each in again if block is None or tile.tiles.plan.cuts_classes else [block]:
            for j, out in enumerate(into):
                along = residual_factor(tile, kernel) * inner[:, j : j + 1]
                sums = MapSums(MapParts(None, out.weight, out.bias))
                sums.add(tile.rows, each.classes, [Term(each.z, MapParts(e, None, None), along)])


# --- blocks and columns ----------------------------------------------------------------------------------------------


def row_weight(tile: Tile) -> Tensor:
    """Return the rows' weights, ``(r, 1)``."""
    return tile.tiles.tensors.row_weight[tile.rows].to(tile.tiles.dtype).unsqueeze(-1)


def prepared(tile: Tile, kernel: CurvatureKernel, *, again: bool = False) -> Iterator[Block]:
    """Yield the blocks, ready for columns; ``again`` if the rows' statistics are known."""
    loaded = [] if again else tile.accumulate(kernel)
    if not again:
        kernel.prepare_columns()
    count, group = len(list(tile.class_blocks())), None if again else tile.tiles.group
    if group is not None and count == 0:  # the other processes have classes
        kernel.reduce_prepared(group)
    for number, (block, fresh) in enumerate(tile.blocks(loaded), 1):
        kernel.prepare_block(block, fresh=fresh, again=again)
        if group is not None and number == count:
            kernel.reduce_prepared(group)
        yield block


def probabilities(tile: Tile, kernel: CurvatureKernel, *, again: bool = False) -> Iterator[Block]:
    """Yield the blocks with the model's probabilities in place of logits."""
    for block in prepared(tile, kernel, again=again):
        kernel.to_probabilities(block)
        yield block


def residual_factor(tile: Tile, kernel: Kernel) -> Tensor:
    """Return the factor of the residuals of each row, ``(r, 1)``; the rows' weights are not in it."""
    ones = tile.model.input.new_full((len(tile), 1), tile.model.scale)
    return ones if kernel.row_factor is None else ones * kernel.row_factor.to(ones.dtype)


def change(tile: Tile, block: Block, column: Direction) -> None:
    """Write the change of the logits along a column into ``block.v``."""
    assert block.v is not None
    along = column if column.input is None else column._replace(input=column.input[tile.rows])
    tile.model.change_into(block.v, MapParts(*along), block.classes)


def add_column(
    tile: Tile, block: Block, kernel: CurvatureKernel, column: Direction, into: Direction, scale: float
) -> None:
    """Take the product with one column back: ``ġ W (+ g Ẇ)``, ``ġᵀ e (+ gᵀ ė)``, ``Σ ġ``."""
    assert block.v is not None
    outer = row_weight(tile) * (scale * tile.model.scale)
    of_change = outer if kernel.row_factor is None else outer * kernel.row_factor.to(block.v.dtype)
    sums = MapSums(MapParts(*into))
    sums.add(tile.rows, block.classes, [Term(block.v, tile.model.at, of_change)])
    if column.input is None and column.weight is None:
        return
    if (residual := kernel.residual(block)) is not None:
        along = column if column.input is None else column._replace(input=column.input[tile.rows])
        sums.add(tile.rows, block.classes, [Term(residual, MapParts(*along), outer, in_bias=False)])
