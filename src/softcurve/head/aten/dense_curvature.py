"""Second order of the tiles of :mod:`softcurve.head.aten.dense`, for many columns that share a softmax."""

from __future__ import annotations

import torch
from torch import Tensor

from softcurve.head.aten.dense_terms import bend_ratio, gradient_of, slope_of, terms_of, without_mean
from softcurve.head.aten.dense_tile import MODEL, SCORE, DenseTile
from softcurve.losses.rows import divergence_second_order


def prepare(tile: DenseTile, matrix: str) -> None:
    """``z ← p``; the logits before their cap, ``q`` and ``m′ g`` go into the buffers that the tile has for them."""
    for _, part in tile.row_groups():
        terms = terms_of(part)
        if part.residual is not None:
            gradient, slope = gradient_of(part, terms), slope_of(part)
            part.residual.copy_(gradient if slope is None else gradient.mul_(slope))
        if part.q is not None:
            assert terms.pair is not None
            q = divergence_second_order(part.loss.divergence, matrix, terms.pair, part.number(SCORE))
            part.q.copy_(torch.where(terms.model.p == 0, 0.0, q))
        if part.raw is not None:
            part.raw.copy_(part.z)
        part.z.copy_(terms.model.p)


def accumulate_column(tile: DenseTile) -> Tensor:
    """Return ``Σ p v`` without the top, ``Σ q v`` and ``v`` at the top, ``(3, rows, 1)``, of ``v`` times ``m′``."""
    found = tile.z.new_zeros(3, len(tile.z), 1)
    for rows, part in tile.row_groups():
        assert part.v is not None
        slope = slope_of(part, part.raw)
        v = part.v if slope is None else part.v * slope
        row, column = part.top_entries(MODEL)
        along = part.z * v
        along[row, column] = 0.0
        found[0, rows] = along.sum(-1, keepdim=True)
        if part.q is not None:
            found[1, rows] = torch.mul(part.q, v, out=along).sum(-1, keepdim=True)
        found[2, rows][row, 0] = v[row, column]
    return found


def multiply_column(tile: DenseTile, numbers: Tensor) -> None:
    """Form the product of a Hessian or Gauss-Newton matrix with a column: the only function of this backend that does.

    ``v ← m′ (q ⊙ u − p rest) + (m″/m′) (m′ g′) v`` with ``u = m′ v − mean``; ``numbers (4, rows, 1)`` are the mean,
    ``u`` at the top, ``rest``, and the factor of ``p`` that ``q`` is if the tile has no ``q``.
    """
    numbers = numbers.to(tile.z.dtype)
    for rows, part in tile.row_groups():
        v, (mean, at_top, rest, factor) = part.v, numbers[:, rows].unbind(0)
        assert v is not None
        slope, bend = slope_of(part, part.raw), None
        if part.raw is not None and part.residual is not None:
            bend = bend_ratio(part, part.raw).mul_(part.residual).mul_(v)
        if slope is not None:
            v.mul_(slope)
        u = without_mean(v, mean, part, MODEL, at_top)
        if part.q is None:
            torch.mul(u.mul_(factor).sub_(rest), part.z, out=v)
        else:
            torch.mul(u, part.q, out=v).addcmul_(part.z, rest, value=-1)
        _back_through_cap(v, slope, bend)


def diagonal(tile: DenseTile, factor: Tensor, total: Tensor, complement: Tensor) -> None:
    """``v ← m′² (q (1 − p) − p (q − total p)) + (m″/m′) (m′ g′)``; ``complement`` is ``1 − p`` at the top."""
    factor, total, complement = (column.to(tile.z.dtype) for column in (factor, total, complement))
    for rows, part in tile.row_groups():
        assert part.v is not None
        p, slope, bend = part.z, slope_of(part, part.raw), None
        q = factor[rows] * p if part.q is None else part.q
        others = 1 - p
        row, column = part.top_entries(MODEL)
        others[row, column] = complement[rows][row, 0]
        v = torch.mul(q, others, out=part.v).sub_((q - total[rows] * p).mul_(p))
        if slope is not None and part.raw is not None:
            v.mul_(slope)
            bend = None if part.residual is None else bend_ratio(part, part.raw).mul_(part.residual)
        _back_through_cap(v, slope, bend)


def _back_through_cap(v: Tensor, slope: Tensor | None, bend: Tensor | None) -> None:
    if slope is not None:
        v.mul_(slope)
    if bend is not None:
        v.add_(bend)
