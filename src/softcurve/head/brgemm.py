"""Products of bfloat16 matrices into float32 on the CPU, by the micro-kernel of oneDNN that torch's library exports.

``at::native::cpublas::brgemm`` is the function that torch's attention and the code of its compiler call. It multiplies
one block on the calling thread, and its arguments alone determine the result, so no switch of the process is touched.
Its right factor has two rows side by side, so that one instruction adds two products:

    b = [b00 b01 ...]   packed:   b00 b10  b01 b11  ...
        [b10 b11 ...]             b20 b30  b21 b31  ...

A part of the right factor is packed at a time, by torch's own threads; then threads of Python multiply it, which
release the interpreter's lock. They are new for every part, because the function keeps its compiled kernels for each
shape and thread: those of a varying number of rows would otherwise accumulate.
"""

from __future__ import annotations

import ctypes
import functools
import os
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from threading import Thread
from typing import Any

import torch
from torch import Tensor

# Releases of torch whose function has been verified: its mangled name fixes the types of its arguments, but not their
# order or what each means.
VERIFIED = ((2, 13),)
# Rows and columns of a block, and the length of its sums: its packed factor then stays in the second-level cache.
ROWS, COLUMNS, LENGTH = 256, 256, 4096
# Entries of the right factor that are packed at a time, 8 MiB.
PACKED_ENTRIES = 2**22
LIMITS = ("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA")


def has_instructions() -> bool:
    """Return whether the processor multiplies bfloat16 numbers."""
    supported = getattr(torch.cpu, "_is_avx512_bf16_supported", None)
    return supported is not None and bool(supported())


def torch_uses_instructions() -> bool:
    """Return whether torch's own products of bfloat16 matrices use them.

    Where oneDNN is switched off or limited to older instructions, these take ten times as long as in float32.
    """
    limited = any(name in os.environ for name in LIMITS)
    return has_instructions() and _is_enabled() and not limited


def available() -> bool:
    """Return whether the function can be called, which ends the process where oneDNN cannot use the instructions."""
    return torch_uses_instructions() and _is_right()


def _is_enabled() -> bool:
    """Return whether oneDNN is switched on now."""
    return torch.backends.mkldnn.is_available() and bool(torch._C._get_mkldnn_enabled())


@functools.cache
def _is_right() -> bool:
    """Return whether the function is there and has the right numbers, at its first use, in a block with odd sizes."""
    if _functions() is None:
        return False
    with torch.inference_mode(mode=False), torch.no_grad():
        entries = torch.arange(5 * 37 + 37 * 19, dtype=torch.float32, device="cpu").mul_(0.7).sin_().mul_(8).round_()
        a, b = entries[: 5 * 37].view(5, 37), entries[5 * 37 :].view(37, 19)
        out = entries.new_ones(5, 21)[:, 1:-1]
        multiply(out, a.bfloat16(), b.bfloat16(), 1.0, 2.0)
        # Small integers, whose sums are exact in any order.
        return torch.equal(out, 1 + 2 * (a.unsqueeze(-1) * b).sum(1))


@functools.cache
def _functions() -> tuple[Callable[..., None], Callable[[bool], None]] | None:
    """Return the product of a block, and the function that ends a thread's use of it, of a release in ``VERIFIED``."""
    if tuple(int(part) for part in torch.__version__.split(".")[:2]) not in VERIFIED:
        return None
    with suppress(OSError, AttributeError):
        library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"))
        multiply: Any = library["_ZN2at6native7cpublas6brgemmEllllllbPKN3c108BFloat16ES5_Pfb"]
        release: Any = library["_ZN2at6native7cpublas14brgemm_releaseEb"]
        pointer = ctypes.c_void_p
        multiply.argtypes = [ctypes.c_int64] * 6 + [ctypes.c_bool] + [pointer] * 3 + [ctypes.c_bool]
        release.argtypes = [ctypes.c_bool]
        multiply.restype = release.restype = None
        return multiply, release
    return None


def multiply(out: Tensor, a: Tensor, b: Tensor, beta: float, alpha: float) -> None:
    """``out = beta out + alpha a @ b`` of bfloat16 factors, all sums in float32."""
    (rows, length), columns = a.shape, b.shape[1]
    if beta == 0 and (length == 0 or alpha == 0):
        out.zero_()
    elif beta not in (0, alpha):
        out.mul_(beta if alpha == 0 else beta / alpha)
    if 0 in (rows, length, columns) or alpha == 0:
        return
    a = a if a.stride(1) == 1 and a.stride(0) >= length else a.contiguous()
    whole = out if out.stride(1) == 1 and out.stride(0) >= columns else out.contiguous()
    step = max(1, PACKED_ENTRIES // (min(length, LENGTH) * COLUMNS)) * COLUMNS
    for first in range(0, length, LENGTH):
        inner = slice(first, first + LENGTH)
        for start in range(0, columns, step):
            part = slice(start, start + step)
            _multiply_part(whole[:, part], a[:, inner], _packed(b[inner, part]), adds=beta != 0 or first > 0)
    if alpha != 1:
        whole.mul_(alpha)
    if whole is not out:
        out.copy_(whole)


def _packed(b: Tensor) -> Tensor:
    """Return the columns of ``b (length, columns)`` in panels, ``(panels, pairs of rows, COLUMNS, 2)``.

    A row that is lacking in the last pair is 0; columns that are lacking in the last panel hold anything.
    """
    length, columns = b.shape
    if length % 2:
        b = torch.cat([b, b.new_zeros(1, columns)])
    pairs, full = len(b) // 2, columns // COLUMNS
    packed = b.new_empty(-(-columns // COLUMNS), pairs, COLUMNS, 2)
    of_columns = b.T
    if of_columns.stride(1) == 1 and of_columns.stride(0) % 2 == 0 and of_columns.storage_offset() % 2 == 0:
        # Two rows of one column are adjacent already: they are moved as one number.
        source, into = of_columns.view(torch.int32).T, packed.view(torch.int32).squeeze(-1)
    else:
        source, into = b.unflatten(0, (pairs, 2)).transpose(1, 2), packed
    for panels, some in ((slice(0, full), slice(0, full * COLUMNS)), (slice(full, None), slice(full * COLUMNS, None))):
        here = source[:, some]
        width = min(COLUMNS, here.shape[1])
        if width:
            into[panels, :, :width] = here.unflatten(1, (-1, width)).transpose(0, 1)
    return packed


def _multiply_part(out: Tensor, a: Tensor, packed: Tensor, *, adds: bool) -> None:
    """``out (+)= a @ b`` of a packed ``b``, the blocks distributed over as many threads as torch uses."""
    functions = _functions()
    assert functions is not None
    multiply, release = functions
    (rows, columns), length = out.shape, a.shape[1]
    blocks = deque((row, column) for row in range(0, rows, ROWS) for column in range(0, columns, COLUMNS))
    threads = min(len(blocks), torch.get_num_threads())
    a_start, b_start, out_start = a.data_ptr(), packed.data_ptr(), out.data_ptr()
    a_stride, out_stride, panel_stride = a.stride(0), out.stride(0), packed.stride(0)

    def work() -> None:
        with suppress(IndexError):  # no block is left
            while True:
                row, column = blocks.popleft()
                height, width = min(ROWS, rows - row), min(COLUMNS, columns - column)
                if not _is_enabled():  # another thread has switched it off since, and the call would end the process
                    blocks.append((row, column))
                    break
                multiply(
                    height, width, length, a_stride, COLUMNS, out_stride, adds,
                    a_start + 2 * row * a_stride, b_start + 2 * (column // COLUMNS) * panel_stride,
                    out_start + 4 * (row * out_stride + column), True,
                )  # fmt: skip
        release(True)

    _run(work, threads, blocks)
    for row, column in blocks:
        panel = packed[column // COLUMNS, :, : columns - column].transpose(1, 2).flatten(0, 1)[:length]
        here = out[row : row + ROWS, column : column + COLUMNS]
        here.addmm_(a[row : row + ROWS].float(), panel.float(), beta=float(adds))


def _run(work: Callable[[], None], threads: int, blocks: deque[tuple[int, int]]) -> None:
    """Run ``work`` in new threads until no block is left; none of them outlives an interrupt, as their memory may not.

    Where no thread can be started, as when the interpreter ends, the calling thread does it.
    """
    workers: list[Thread] = []
    try:
        for _ in range(threads):
            worker = Thread(target=work)
            with suppress(RuntimeError):
                worker.start()
                workers.append(worker)
        if not workers:
            work()
        for worker in workers:
            worker.join()
    except BaseException:
        blocks.clear()
        for worker in workers:
            worker.join()
        raise
