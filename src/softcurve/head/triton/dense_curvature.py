"""The second order of the tiles of :mod:`softcurve.head.triton.dense`, for many columns that share a softmax."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, no_type_check

import torch
import triton.language as tl
from torch import Tensor

from softcurve.head.triton.dense import (
    ENTRIES,
    Description,
    class_factors,
    load_pair,
    pair_terms,
    pulled_back,
    row_entry,
)
from softcurve.head.triton.math import cap_slope, column, here, jit, launch, own_row, stride, tanh

HESSIAN, GAUSS_NEWTON = range(2)
_HESSIAN: tl.constexpr = tl.constexpr(HESSIAN)


@jit
@no_type_check
def _prepare(
    z, z_stride, target, target_stride, raw_out, raw_out_stride, q_out, q_out_stride, out, out_stride, class_weight,
    class_share, of_rows, places, softcap, temperature, target_scale, beta, beta_rest, own_share, uniform_each, z_loss,
    rows, classes, first, FAMILY: tl.constexpr, CAPPED: tl.constexpr, LOGARITHM: tl.constexpr, WEIGHED: tl.constexpr,
    MATRIX: tl.constexpr, WANTS_Q: tl.constexpr, RESIDUAL: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    row, at, inside = here(ROWS, BLOCK, rows, classes, tl.program_id(1) * BLOCK)
    exists = row < rows
    raw, seen, given, t = load_pair(
        z, z_stride, target, target_stride, row, at, inside, softcap, temperature, target_scale, CAPPED, LOGARITHM
    )
    weight, uniform_weight = class_factors(class_weight, class_share, at, inside, WEIGHED)
    p, score, curve, _, _, _, _, _, _, _, _ = pair_terms(
        seen, given, t, weight, uniform_weight, of_rows, row, exists, rows, beta, beta_rest, own_share, uniform_each,
        inside, FAMILY, WEIGHED
    )  # fmt: skip
    total = row_entry(of_rows, 7, row, exists, rows)
    if RESIDUAL:
        is_top = at == tl.load(places + row, mask=exists, other=-1) - first
        gradient = pulled_back(p, score, total, row_entry(of_rows, 8, row, exists, rows), is_top)
        gradient += 2 * z_loss * row_entry(of_rows, 11, row, exists, rows) * p
        if CAPPED:
            gradient = gradient * cap_slope(raw, softcap, temperature)
        tl.store(out + row * out_stride + at, tl.where(seen == -float("inf"), 0.0, gradient), mask=inside)
    if WANTS_Q:
        q = curve - score
        if MATRIX == _HESSIAN:
            q = curve - p * total
        tl.store(q_out + row * q_out_stride + at, tl.where(p == 0, 0.0, q), mask=inside)
    if CAPPED:
        tl.store(raw_out + row * raw_out_stride + at, raw, mask=inside)
    tl.store(z + row * z_stride + at, p, mask=inside)


def prepare(
    description: Description,
    tile: Mapping[str, Any],
    out: Mapping[str, Any],
    of_rows: Tensor,
    places: Tensor,
    first: int,
    matrix: int,
) -> None:
    """``z ← p``; the logits before their cap, ``q`` and the residual where there is room for them."""
    arguments = {
        **description.arguments(),
        **{name: tile[name] for name in ("z", "z_stride", "target", "target_stride")},
        **{name: tile[name] for name in ("class_weight", "class_share", "WEIGHED")},
        **out,
        "of_rows": of_rows,
        "places": places,
        "first": first,
        "z_loss": description.z_loss,
        "MATRIX": matrix,
        "WANTS_Q": out["q_out"] is not None,
        "RESIDUAL": out["out"] is not None,
    }
    launch(_prepare, tile["z"], arguments, by_rows=False, entries=ENTRIES)


@jit
@no_type_check
def _gather(
    p, p_stride, q, q_stride, raw, raw_stride, v, v_stride, places, found, softcap, temperature, rows, classes, first,
    CAPPED: tl.constexpr, HAS_Q: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    row, exists = own_row(ROWS, rows)
    top = tl.load(places + row, mask=exists, other=-1) - first
    means = tl.zeros([ROWS, BLOCK], tl.float32)
    moments = tl.zeros([ROWS, BLOCK], tl.float32)
    tops = tl.zeros([ROWS, BLOCK], tl.float32)
    for start in range(0, classes, BLOCK):
        at = start + tl.arange(0, BLOCK)[None, :]
        inside = exists & (at < classes)
        mass = tl.load(p + row * p_stride + at, mask=inside, other=0.0)
        change = tl.load(v + row * v_stride + at, mask=inside, other=0.0)
        if CAPPED:
            before = tl.load(raw + row * raw_stride + at, mask=inside, other=0.0)
            change = change * cap_slope(before, softcap, temperature)
        means += tl.where(at == top, 0.0, mass * change)
        tops += tl.where(at == top, change, 0.0)
        if HAS_Q:
            moments += tl.load(q + row * q_stride + at, mask=inside, other=0.0) * change
    tl.store(found + row, tl.sum(means, axis=1)[:, None], mask=exists)
    tl.store(found + rows + row, tl.sum(moments, axis=1)[:, None], mask=exists)
    tl.store(found + 2 * rows + row, tl.sum(tops, axis=1)[:, None], mask=exists)


def gather(block: Mapping[str, Any], places: Tensor, first: int, softcap: float | None, temperature: float) -> Tensor:
    """``Σ p v`` but for the top's, ``Σ q v`` and the top's ``v``, ``(3, rows)``; ``v`` times the cap's slope."""
    p: Tensor = block["p"]
    found = p.new_empty(3, len(p))
    arguments = {
        **block,
        "places": places,
        "found": found,
        "first": first,
        "softcap": 1.0 if softcap is None else softcap,
        "temperature": temperature,
        "CAPPED": softcap is not None,
        "HAS_Q": block["q"] is not None,
    }
    launch(_gather, p, arguments, by_rows=True)
    return found


@jit
@no_type_check
def _multiply(
    p, p_stride, q, q_stride, raw, raw_stride, v, v_stride, residual, residual_stride, of_rows, places, softcap,
    temperature, rows, classes, first, CAPPED: tl.constexpr, HAS_Q: tl.constexpr, BENT: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    row, at, inside = here(ROWS, BLOCK, rows, classes, tl.program_id(1) * BLOCK)
    exists = row < rows
    mass = tl.load(p + row * p_stride + at, mask=inside, other=0.0)
    given = tl.load(v + row * v_stride + at, mask=inside, other=0.0)
    change = given
    slope = tl.full([ROWS, BLOCK], 1.0, tl.float32)
    before = tl.zeros([ROWS, BLOCK], tl.float32)
    if CAPPED:
        before = tl.load(raw + row * raw_stride + at, mask=inside, other=0.0)
        slope = cap_slope(before, softcap, temperature)
        change = change * slope
    is_top = at == tl.load(places + row, mask=exists, other=-1) - first
    centred = tl.where(
        is_top, row_entry(of_rows, 1, row, exists, rows), change - row_entry(of_rows, 0, row, exists, rows)
    )
    rest = row_entry(of_rows, 2, row, exists, rows)
    if HAS_Q:
        product = tl.load(q + row * q_stride + at, mask=inside, other=0.0) * centred - mass * rest
    else:
        product = mass * (row_entry(of_rows, 3, row, exists, rows) * centred - rest)
    product = product * slope
    if BENT:
        g = tl.load(residual + row * residual_stride + at, mask=inside, other=0.0)
        product -= 2 / softcap * tanh(before / softcap) * g * given
    tl.store(v + row * v_stride + at, product, mask=inside)


def multiply(
    block: Mapping[str, Any],
    residual: Tensor | None,
    rows: list[Tensor],
    places: Tensor,
    first: int,
    softcap: float | None,
    temperature: float,
) -> None:
    """``v ← m′ (q (v′ − mean) − p rest) + (m″/m′) g v`` with ``v′ = m′ v``, at the top ``apart`` for ``v′ − mean``.

    ``rows`` are mean, apart, rest and, of a ``q`` that is a multiple of ``p``, that multiple.
    """
    arguments = {
        **block,
        "residual": residual,
        "residual_stride": stride(residual),
        "of_rows": torch.stack([column(tensor) for tensor in rows]),
        "places": places,
        "first": first,
        "softcap": 1.0 if softcap is None else softcap,
        "temperature": temperature,
        "CAPPED": softcap is not None,
        "HAS_Q": block["q"] is not None,
        "BENT": softcap is not None and residual is not None,
    }
    launch(_multiply, block["p"], arguments, by_rows=False)
