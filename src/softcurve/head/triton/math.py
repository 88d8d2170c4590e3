"""Launches of Triton kernels, and elementary functions that are relatively exact where the hardware's are not.

Only the modules of :mod:`softcurve.head.triton` import Triton, and :mod:`softcurve.head.backends` imports them when a
loss runs on them.
"""

from __future__ import annotations

import inspect
from contextlib import nullcontext
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

LOG2E: tl.constexpr = tl.constexpr(1.4426950216293335)  # log2 e, rounded to float32, and what is left of it
LOG2E_REST: tl.constexpr = tl.constexpr(1.925963033500117e-08)
LN2: tl.constexpr = tl.constexpr(0.6931471805599453)
HUGE: tl.constexpr = tl.constexpr(1e30)

# Entries of a tile that one program works on at a time.
ENTRIES = 4096
INTERPRETED_SHAPE = (32, 256)  # an interpreted operation costs the same for one row as for many


def launch(kernel: Any, out: Tensor, values: dict[str, Any], *, by_rows: bool, entries: int = ENTRIES) -> None:
    """Run ``kernel`` over the rows of ``out``, and over pieces of its classes unless a program is to see whole rows.

    A kernel that sees whole rows loops over their pieces of ``BLOCK`` classes, ``ROWS`` rows at a time. Its parameters
    receive those of the ``values`` that have their names, and ``NAME_stride`` the row stride of the tensor ``NAME``.
    """
    count, width = out.shape
    if count == 0 or width == 0:
        return
    rows, block = shape(out, entries)
    grid = (triton.cdiv(count, rows), 1 if by_rows else triton.cdiv(width, block))
    warps = max(1, min(8, rows * block // 256))
    values = values | {"rows": count, "classes": width, "ROWS": rows, "BLOCK": block}
    for name in (name for name in kernel.arg_names if name.endswith("_stride")):
        tensor = values[name.removesuffix("_stride")]
        assert tensor is None or tensor.shape[-1] <= 1 or tensor.stride(-1) == 1  # a kernel reads classes at stride 1
        values[name] = 0 if tensor is None else tensor.stride(0)
    arguments = {name: values[name] for name in kernel.arg_names}
    # Triton launches on the current device.
    with torch.cuda.device(out.device) if out.device.type == "cuda" else nullcontext():
        run(kernel, grid, arguments, {"num_warps": warps, "enable_fp_fusion": True})


def run(kernel: Any, grid: tuple[int, int], arguments: dict[str, Any], options: dict[str, Any]) -> None:
    """Launch a kernel once: the tests look on here."""
    kernel[grid](**arguments, **options)


def shape(tile: Tensor, entries: int = ENTRIES) -> tuple[int, int]:
    """Return how many rows and classes a program works on at a time."""
    if not isinstance(_probe, triton.runtime.JITFunction):
        return INTERPRETED_SHAPE
    block = min(triton.next_power_of_2(tile.shape[1]), entries)
    return max(1, min(triton.next_power_of_2(len(tile)), entries // block // 4)), block


def column(tensor: Tensor) -> Tensor:
    """Return a number for each row as a contiguous float32 vector."""
    return tensor.reshape(len(tensor)).to(torch.float32).contiguous()


def jit(function: Any) -> Any:
    """Return ``triton.jit`` that compiles once for all numbers of rows and first classes of a block."""
    function = inspect.unwrap(function)  # a run-time check of annotations may wrap it
    counts = [name for name in ("rows", "first") if name in function.__code__.co_varnames]
    return triton.jit(function, do_not_specialize=counts)


@jit
def _probe():
    """Show by its type whether Triton's interpreter was on when Triton was imported."""


@jit
def difference_exp(z, offset):
    """Return ``e^{z − offset}`` for a finite ``offset``, less two roundings that matter where they are far apart.

    They are that of the difference, by Knuth's two-sum, and of its product with ``log2 e``, by a fused multiply-add.
    """
    d = z - offset
    back = d - z
    error = (z - (d - back)) - (offset + back)
    high = d * LOG2E
    low = tl.fma(d, LOG2E, -high) + d * LOG2E_REST
    correction = tl.where(tl.abs(d) < HUGE, error + LN2 * low, 0.0)
    return tl.exp2(high) * (1 + correction)


@jit
def exp_excess(t):
    """Return ``h(t) = e^t − 1 − t`` for ``|t| ≤ ½`` by its series."""
    total = t * 2.7557319223985893e-06 + 2.48015873015873e-05
    total = total * t + 0.0001984126984126984
    total = total * t + 0.001388888888888889
    total = total * t + 0.008333333333333333
    total = total * t + 0.041666666666666664
    total = total * t + 0.16666666666666666
    total = total * t + 0.5
    return total * t * t


@jit
def clamp_half(t):
    """Return ``t`` clamped to [−½, ½]."""
    return tl.minimum(tl.maximum(t, -0.5), 0.5)


@jit
def log_mixture(t, weight, other):
    """Return ``log(other + weight e^t)`` for ``other = 1 − weight``, as in :mod:`softcurve.losses.divergences`."""
    small = clamp_half(t)
    low = tl.minimum(t, 80.0)
    grown = tl.exp(low)
    change = tl.where(tl.abs(t) < 0.5, small + exp_excess(small), grown - 1)
    x = weight * change
    u = 1 + x  # rounded, so log(1 + x) = log u + (x − (u − 1))/u
    near = tl.log(u) + (x - (u - 1)) / u
    # 1 + w (e^t − 1) cancels towards 1 − w
    near = tl.where((t < -1) & (weight > 0.5), tl.log(other + weight * tl.exp(tl.minimum(t, -1.0))), near)
    far = tl.maximum(t, 80.0)
    far = far + tl.log(weight + other * tl.exp(-far))
    return tl.where(t < 80, near, far)


@jit
def tanh(x):
    """Return ``(1 − e)/(1 + e)`` with ``e = e^{−2|x|}``; near 0, where that cancels, its series."""
    e = tl.exp(-2 * tl.abs(x))
    away = tl.where(x < 0, -(1 - e), 1 - e) / (1 + e)
    s = tl.minimum(x * x, 0.0625)
    series = s * -0.008863235529902197 + 0.021869488536155203
    series = series * s - 0.05396825396825397
    series = series * s + 0.13333333333333333
    series = series * s - 0.3333333333333333
    return tl.where(tl.abs(x) < 0.25, x + x * s * series, away)


@jit
def capped(z, softcap, temperature):
    """Return ``m(z) = κ tanh(z/κ) / T``, or ``z`` without a soft cap; a masked class stays masked."""
    if softcap is not None:
        z = tl.where(z == -float("inf"), z, softcap * tanh(z / softcap) / temperature)
    return z


@jit
def cap_slope(z, softcap, temperature):
    """Return ``m′(z) = 4 e / (T (1 + e)²)`` with ``e = e^{−2|z|/κ}``, or 1 without a soft cap."""
    slope = tl.full(z.shape, 1.0, tl.float32)
    if softcap is not None:
        e = tl.exp(-2 * tl.abs(z / softcap))
        slope = 4 * e / ((1 + e) * (1 + e) * temperature)
    return slope


@jit
def bend_ratio(z, softcap):
    """Return ``m″/m′ = −(2/κ) tanh(z/κ)``."""
    return -2 / softcap * tanh(z / softcap)


@jit
def own_rows(ROWS: tl.constexpr):
    """Return the rows of a program as a column, in 64 bits: rows times classes pass 2³¹."""
    return tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]


@jit
def here(ROWS: tl.constexpr, BLOCK: tl.constexpr, rows, classes, start):
    """Return the rows and classes of a piece, and which of its entries exist."""
    row = own_rows(ROWS)
    at = start + tl.arange(0, BLOCK)[None, :]
    return row, at, (row < rows) & (at < classes)


@jit
def number(table, which, row, rows):
    """Return one number of each row from a table of ``rows`` numbers a line."""
    return tl.load(table + which * rows + row, mask=row < rows, other=0)


@jit
def store_sum(table, which, values, row, rows):
    """Store the sums of ``values`` over classes as a line of such a table."""
    tl.store(table + which * rows + row, tl.sum(values, axis=1)[:, None], mask=row < rows)
