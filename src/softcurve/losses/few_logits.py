"""The plain cross-entropy of few logits, of which checks and calls of operations take longer than the computation.

An autograd function in Python takes as long by itself as ``torch.nn.functional.cross_entropy`` with its gradient. So
torch's loss is used where its rounding error, about 1e-7 beside a loss and a gradient that are above a tenth, leaves
six digits in every row; a row that is more confident takes the call to :class:`_Quotient`, which loses no digits.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.nn import functional as F

from softcurve.checks import values_visible
from softcurve.losses.autograd import SMALL_ELEMENTS, differentiable_gradients, in_transform
from softcurve.losses.fast_forms import LEAST_LOSS, index_losses_and_residuals
from softcurve.losses.labels import resolve_ignore_index
from softcurve.losses.rows import IndexCrossEntropy, cross_entropy_options
from softcurve.losses.spec import LogitMap

PLAIN = (Tensor, torch.nn.Parameter)
_WITHOUT_OPTIONS = IndexCrossEntropy(LogitMap())


def few_logits_loss(options: tuple[Any, ...], logits: Any, target: Any, ignore_index: Any) -> Tensor | None:
    """Return the loss of class indices, or ``None`` where the general path must compute it or raise an error.

    It is for plain float32 tensors on the CPU in eager mode, with a class in every row, a reduction to a number, no
    other ``options`` (in the order of :func:`~softcurve.losses.rows.cross_entropy_options`), and a loss that is finite.
    No pass looks for indices out of range: the computation itself fails for them.
    """
    if type(logits) not in PLAIN or type(target) is not Tensor or in_transform():
        return None
    if logits.dtype != torch.float32 or target.dtype != torch.int64 or logits.shape[:-1] != target.shape:
        return None
    if not 0 < logits.numel() <= SMALL_ELEMENTS or not logits.ndim or not values_visible(logits, target):
        return None
    reducer, loss = cross_entropy_options(*options)
    if loss != _WITHOUT_OPTIONS or reducer.kind == "none" or 0 <= resolve_ignore_index(ignore_index) < logits.shape[-1]:
        return None
    divisor = reducer.nats
    if reducer.kind != "sum":
        divisor *= target.numel() if reducer.kind == "mean" else reducer.batch(target.shape)
    flat = logits if logits.ndim <= 2 else logits.flatten(0, -2)
    try:
        rows = F.cross_entropy(flat, target.flatten() if logits.ndim > 2 else target, reduction="none")
        least, most = rows.detach().aminmax()
        if least.item() > LEAST_LOSS and most.item() < math.inf:
            return rows.sum() / divisor
        result = super(Function, _Quotient).apply(divisor, logits, target)  # type: ignore[no-untyped-call]
    except (IndexError, RuntimeError):  # an index out of range, which may be that of an ignored row
        return None
    return result if math.isfinite(result.item()) else None


class _Quotient(Function):
    """``Σ loss / divisor`` of all rows, outside of transforms: operations for a mean would take as long as the rest."""

    @staticmethod
    def forward(ctx: Any, divisor: float, z: Tensor, target: Tensor) -> Tensor:
        both = index_losses_and_residuals(z, target.unsqueeze(-1)) if ctx.needs_input_grad[1] else None
        rows, residual = (_WITHOUT_OPTIONS.value(z, target), None) if both is None else both
        ctx.divisor = divisor
        ctx.save_for_backward(z, target, residual)
        return rows.sum().div_(divisor)

    @staticmethod
    def backward(ctx: Any, scale: Tensor) -> tuple[None, Tensor | None, None]:
        z, target, residual = ctx.saved_tensors
        if residual is None or torch.is_grad_enabled() or not values_visible(scale) or in_transform():
            each = (scale / ctx.divisor).expand(target.shape)
            in_z, _ = differentiable_gradients(_WITHOUT_OPTIONS, each, z, target, (True, False))
            return None, in_z, None
        return None, residual * (scale.item() / ctx.divisor), None
