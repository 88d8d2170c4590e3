"""Second-order products of many columns that share a softmax: the kernels that both kinds of target launch.

``z`` holds the probabilities ``p`` of a block, or exponentials ``e`` in proportion to them, and ``raw`` the logits
before the soft cap. In a kernel ``None`` stands for a tensor that there is not.
"""

from __future__ import annotations

import triton.language as tl

from softcurve.head.triton import math
from softcurve.head.triton.math import here, jit, number, own_rows, store_sum


@jit
def accumulate(
    z, z_stride, q, q_stride, raw, raw_stride, v, v_stride, top, found, softcap, temperature, rows, classes,
    ROWS: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """Write ``Σ p m′ v`` without the top, ``Σ q m′ v``, and ``m′ v`` at the top into ``found``."""
    row = own_rows(ROWS)
    means = tl.zeros([ROWS, BLOCK], tl.float32)
    moments = tl.zeros([ROWS, BLOCK], tl.float32)
    at_top = tl.zeros([ROWS, BLOCK], tl.float32)
    for start in range(0, classes, BLOCK):
        _, at, inside = here(ROWS, BLOCK, rows, classes, start)
        change = tl.load(v + row * v_stride + at, mask=inside, other=0.0)
        if raw is not None:
            before = tl.load(raw + row * raw_stride + at, mask=inside, other=0.0)
            change = change * math.cap_slope(before, softcap, temperature)
        along = tl.load(z + row * z_stride + at, mask=inside, other=0.0) * change
        if q is not None:
            moments += tl.load(q + row * q_stride + at, mask=inside, other=0.0) * change
        if top is not None:
            is_top = at == number(top, 0, row, rows)
            along = tl.where(is_top, 0.0, along)
            at_top += tl.where(is_top, change, 0.0)
        means += along
    store_sum(found, 0, means, row, rows)
    store_sum(found, 1, moments, row, rows)
    store_sum(found, 2, at_top, row, rows)


@jit
def multiply(
    z, z_stride, q, q_stride, raw, raw_stride, residual, residual_stride, v, v_stride, numbers, top, softcap,
    temperature, rows, classes, ROWS: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """Set ``v ← m′ (q ⊙ u − p rest) + (m″/m′) (m′ g′) v · inverse`` with ``u = m′ v − mean``.

    The lines of ``numbers`` are ``mean``, ``u`` at the top, ``rest``, the factor of ``p`` that ``q`` is if there is no
    ``q``, and ``inverse``.
    """
    row, at, inside = here(ROWS, BLOCK, rows, classes, tl.program_id(1) * BLOCK)
    p = tl.load(z + row * z_stride + at, mask=inside, other=0.0)
    change = tl.load(v + row * v_stride + at, mask=inside, other=0.0)
    slope = tl.full([ROWS, BLOCK], 1.0, tl.float32)
    bent = tl.zeros([ROWS, BLOCK], tl.float32)
    if raw is not None:
        before = tl.load(raw + row * raw_stride + at, mask=inside, other=0.0)
        slope = math.cap_slope(before, softcap, temperature)
        if residual is not None:
            g = tl.load(residual + row * residual_stride + at, mask=inside, other=0.0)
            bent = math.bend_ratio(before, softcap) * g * change * number(numbers, 4, row, rows)
    u = change * slope - number(numbers, 0, row, rows)
    if top is not None:
        u = tl.where(at == number(top, 0, row, rows), number(numbers, 1, row, rows), u)
    rest = number(numbers, 2, row, rows)
    if q is not None:
        product = tl.load(q + row * q_stride + at, mask=inside, other=0.0) * u - p * rest
    else:
        product = p * (number(numbers, 3, row, rows) * u - rest)
    tl.store(v + row * v_stride + at, product * slope + bent, mask=inside)
