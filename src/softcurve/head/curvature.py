"""Passes of second order over a head's tiles, for many columns at once, added to where their sums are kept.

A tile's logits are computed once for all columns; each column then costs its change of the logits and the way back.
Unlike :func:`softcurve.head.passes.hessian_product` nothing here is differentiable, and the target does not move.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from softcurve.head import products
from softcurve.head.curvature_tiles import CurvaturePass, RowLosses
from softcurve.head.dense import DenseKernel
from softcurve.head.kernel import CurvatureBlock
from softcurve.head.products import Direction
from softcurve.losses.rows import FISHER, HESSIAN


def add_products(
    rows: RowLosses, matrix: str, columns: Sequence[Direction], into: Sequence[Direction], scale: float = 1.0
) -> None:
    """``into += scale Σ_i weight_i (∂z_i)ᵀ B_i ∂z_i`` along each column, in the parts that ``into`` has.

    For the Hessian the second derivative of ``z = W e + b`` is included.
    """
    run = CurvaturePass(rows, matrix, directed=True)
    for tile in run.tiles():
        kernel = tile.curvature_kernel()
        # One block, which each column takes to its end; or many, which all must have seen before any is multiplied.
        cut = run.plan.cuts_classes
        kept: list[CurvatureBlock] = []
        for block in tile.prepared(kernel):
            for j, column in enumerate(columns if cut else ()):
                tile.change(block, column)
                kernel.accumulate_column(block, j)
            if not cut:
                kept.append(block)
        for j, column in enumerate(columns):
            for block in kept:
                tile.change(block, column)
                kernel.accumulate_column(block, j)
            if run.group is not None:
                kernel.reduce_column(j, run.group)
            for block in kept:
                kernel.multiply_column(block, j)
                tile.take_back(block, kernel.row_factor, column, into[j], scale)
        for block in tile.prepared(kernel, swept=True) if cut else ():
            for j, column in enumerate(columns):
                tile.change(block, column)
                kernel.multiply_column(block, j)
                tile.take_back(block, kernel.row_factor, column, into[j], scale)
    run.release()


class Diagonal(NamedTuple):
    """Of the matrix in the weight and the bias, and each row's part of the trace, its weight included."""

    weight: Tensor | None  # (C, d)
    bias: Tensor | None  # (C,)
    rows: Tensor  # (n,): Σ_k B_kk, not times ‖e‖² or 1


def diagonal(rows: RowLosses, matrix: str, *, wants_diagonal: bool) -> Diagonal:
    """``Σ_i weight_i diag(B_i) ⊗ (e ⊙ e)``; only the rows' traces unless ``wants_diagonal``."""
    run = CurvaturePass(rows, matrix, directed=True)
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
            here = factor if kernel.row_factor is None else factor * kernel.row_factor.to(run.dtype)
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
    bucket = rows.merges_tail and matrix != FISHER
    plain = not bucket and rows.loss.softcap is None and matrix != HESSIAN
    return plain and not DenseKernel.needs_q(rows.loss.divergence, matrix)


def add_class_products(
    rows: RowLosses, matrix: str, vectors: Tensor | None, into: Tensor | None, diagonal: Tensor
) -> None:
    """``diagonal += Σ_i w_i a_i p_i`` and ``into += Σ_i w_i b_i p_i (p_iᵀ vectors)``, ``(C,)`` and ``(C, k)``.

    For rows of :func:`class_coefficients`; the curvature's ``Σ_i w_i B_i`` is ``diag(diagonal)`` minus the latter.
    """
    run = CurvaturePass(rows, matrix, directed=False)
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


def add_outer_products(
    rows: RowLosses, row_factor: Tensor, columns: Sequence[Direction], into: Sequence[Direction], scale: float = 1.0
) -> None:
    """``into += scale Σ_i row_factor_i g_i (g_i · column)`` with each row's own gradient ``g_i`` in (e, W, b).

    The features' part of ``g_i`` is of row ``i`` alone. Rows of weight 0 have no part.
    """
    run = CurvaturePass(rows, HESSIAN, directed=False)
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
