"""Products of half-precision matrices into float32.

The product of two such numbers is exact in float32, and so are the factors as they are: nothing is lost against
widening them first, and nothing of the weight's size is copied. Which product a device has is decided here, call by
call:

- CUDA, and releases of torch that have it on the CPU: torch's own, by ``out_dtype``.
- A CPU that multiplies bfloat16 in tiles (AMX): the function of MKL that torch's library exports.
- A CPU with AVX512-BF16 alone, where MKL takes as long as in float32: :mod:`softcurve.head.brgemm`.
- Elsewhere none: the factors are widened.

torch's float32 product may be computed in bfloat16 too, but by a switch that acts on every thread of the process.
A product that may be rounded to half precision at once (:func:`rounds_once`) is torch's own.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor

from softcurve.head import brgemm

# ``out = beta out + alpha a @ b`` of (out, a, b, beta, alpha)
Product: TypeAlias = Callable[[Tensor, Tensor, Tensor, float, float], None]
# Entries of a product that is added to float32 in steps, where no function adds it.
STEP_ENTRIES = 2**20
# Entries of a matrix from which on the CPU multiplies it as it is: residuals are then rounded to half precision, as in
# torch's own backward pass, and of a smaller one a float32 copy costs nothing.
LEAST_ENTRIES = 2**20
# Rows of features from which on it does: for fewer, widening the weight takes less time than packing it.
LEAST_ROWS = 64


def multiplies_half(device: torch.device, dtype: torch.dtype) -> bool:
    """Return whether matrices of a half precision can be multiplied into float32 where that should pay."""
    if device.type == "cpu":
        return dtype == torch.bfloat16 and _cpu_product() is not None
    return device.type == "cuda"


def is_half(*tensors: Tensor) -> bool:
    """Return whether tensors have one half precision in which they can be multiplied into float32."""
    dtype, device = tensors[0].dtype, tensors[0].device
    same = dtype in (torch.float16, torch.bfloat16) and all(tensor.dtype == dtype for tensor in tensors)
    return same and multiplies_half(device, dtype)


def shared_half(first: Tensor | None, *others: Tensor | None) -> torch.dtype | None:
    """Return the half precision in which a map should multiply features by these factors; ``None`` if it widens them.

    On the CPU it widens small factors, so that residuals are not rounded for a copy that costs nothing, and the factors
    of few rows.
    """
    tensors = [tensor for tensor in (first, *others) if tensor is not None]
    if first is None or len(tensors) <= len(others) or not is_half(*tensors):
        return None
    few_rows = first.numel() < LEAST_ROWS * first.shape[-1]
    small = few_rows or max(tensor.numel() for tensor in tensors[1:]) < LEAST_ENTRIES
    return None if small and first.device.type == "cpu" else first.dtype


def half_on_cpu(first: Tensor | None, *others: Tensor | None) -> torch.dtype | None:
    """Return :func:`shared_half` on the CPU, where residuals are rounded to it after they are formed in float32."""
    return shared_half(first, *others) if first is not None and first.device.type == "cpu" else None


def half_product(out: Tensor, a: Tensor, b: Tensor, *, beta: float, alpha: float = 1.0) -> None:
    """``out = beta out + alpha a @ b`` of half-precision factors, all sums in float32."""
    product = _cpu_product() if out.device.type == "cpu" else _multiply_by_torch
    if product is None:  # oneDNN has been switched off since the factors were chosen
        out.mul_(beta) if beta else out.zero_()
        out.addmm_(a.to(out.dtype), b.to(out.dtype), alpha=alpha)
        return
    product(out, a, b, beta, alpha)


def rounds_once(*tensors: Tensor) -> bool:
    """Return whether a product of these that is rounded at once takes less time than one into float32.

    On the CPU torch's own has its right factor packed by oneDNN; the functions below would have to do that themselves.
    """
    return tensors[0].device.type == "cpu" and is_half(*tensors) and brgemm.torch_uses_instructions()


def _cpu_product() -> Product | None:
    """Return the product of bfloat16 matrices into float32 of this processor, if it has one that pays."""
    if not (_has_tiles() or brgemm.has_instructions()):
        return None
    if _multiplies_into_float32(torch.device("cpu"), torch.bfloat16):
        return _multiply_by_torch
    if _has_tiles() and _mkl_product() is not None:
        return _multiply_by_mkl
    return brgemm.multiply if brgemm.available() else None


# --- torch ------------------------------------------------------------------------------------------------------------


def _multiply_by_torch(out: Tensor, a: Tensor, b: Tensor, beta: float, alpha: float) -> None:
    if beta == 0 and alpha == 1:
        _mm(out, a, b)
    elif _adds_into_float32(out.device, a.dtype):
        torch.addmm(out, a, b, out_dtype=out.dtype, beta=beta, alpha=alpha, out=out)
    elif beta == 0:
        _mm(out, a, b)
        out.mul_(alpha)
    else:
        step = max(1, STEP_ENTRIES // max(1, out.shape[1]))
        for start in range(0, len(out), step):
            rows = out[start : start + step]
            part = torch.empty_like(rows)
            _mm(part, a[start : start + step], b)
            rows.mul_(beta).add_(part, alpha=alpha)


def _mm(out: Tensor, a: Tensor, b: Tensor) -> None:
    torch.mm(a, b, out_dtype=out.dtype, out=out)


@functools.cache
def _multiplies_into_float32(device: torch.device, dtype: torch.dtype) -> bool:
    """Return whether ``mm`` multiplies half-precision matrices into float32, on the CPU not in torch 2.13."""
    a = torch.zeros(16, 16, dtype=dtype, device=device)
    try:
        _mm(torch.zeros(16, 16, dtype=torch.float32, device=device), a, a)
    except RuntimeError:
        return False
    return True


@functools.cache
def _adds_into_float32(device: torch.device, dtype: torch.dtype) -> bool:
    """Return whether ``addmm`` adds half-precision products to float32: some releases want the sum in half too."""
    a = torch.zeros(16, 16, dtype=dtype, device=device)
    out = torch.zeros(16, 16, dtype=torch.float32, device=device)
    try:
        torch.addmm(out, a, a, out_dtype=out.dtype, out=out)
    except RuntimeError:
        return False
    return True


# --- MKL --------------------------------------------------------------------------------------------------------------

ROW_MAJOR, PLAIN, TRANSPOSED = 101, 111, 112  # of CBLAS


def _has_tiles() -> bool:
    """Return whether the processor multiplies bfloat16 in tiles (AMX).

    Without them MKL was measured to take as long as in float32; with them it has not been measured yet.
    """
    supported = getattr(torch.cpu, "_is_amx_tile_supported", None)
    return supported is not None and bool(supported())


@functools.cache
def _mkl_product() -> Callable[..., None] | None:
    """Return ``cblas_gemm_bf16bf16f32`` of torch's library, if it is there and multiplies."""
    with suppress(OSError, AttributeError):
        library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"))
        function: Any = library.cblas_gemm_bf16bf16f32
        number, pointer, size = ctypes.c_float, ctypes.c_void_p, ctypes.c_int
        sizes = [size] * 3
        function.argtypes = [size] * 3 + sizes + [number, pointer, size, pointer, size, number, pointer, size]
        function.restype = None
        return function  # type: ignore[no-any-return]
    return None


def _multiply_by_mkl(out: Tensor, a: Tensor, b: Tensor, beta: float, alpha: float) -> None:
    """``out = beta out + alpha a @ b`` of bfloat16 factors. The call releases the interpreter's lock."""
    if 0 in (*out.shape, a.shape[1]):
        out.mul_(beta) if beta else out.zero_()
        return
    product = _mkl_product()
    assert product is not None
    (a, a_layout, a_stride), (b, b_layout, b_stride) = _laid_out(a), _laid_out(b)
    whole = out if out.stride(1) == 1 and out.stride(0) >= out.shape[1] else out.contiguous()
    product(
        ROW_MAJOR, a_layout, b_layout, *out.shape, a.shape[1], alpha, a.data_ptr(), a_stride, b.data_ptr(), b_stride,
        beta, whole.data_ptr(), max(whole.stride(0), whole.shape[1]),
    )  # fmt: skip
    if whole is not out:
        out.copy_(whole)


def _laid_out(matrix: Tensor) -> tuple[Tensor, int, int]:
    """Return a matrix whose rows or columns are contiguous, which of them, and the stride from one to the next."""
    rows, columns = matrix.shape
    if (matrix.stride(1) == 1 or columns == 1) and matrix.stride(0) >= columns:
        return matrix, PLAIN, matrix.stride(0)
    if (matrix.stride(0) == 1 or rows == 1) and matrix.stride(1) >= rows:
        return matrix, TRANSPOSED, matrix.stride(1)
    return matrix.contiguous(), PLAIN, max(1, columns)
