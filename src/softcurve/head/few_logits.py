"""The plain cross-entropy of a head with few logits, which are held: the loop over tiles would take longer to set up.

The values and derivatives are those of the losses on logits, :mod:`softcurve.losses.autograd`.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from softcurve.checks import values_visible
from softcurve.losses.autograd import in_transform, row_losses
from softcurve.losses.labels import count_alike, resolve_ignore_index
from softcurve.losses.rows import IndexCrossEntropy, cross_entropy_options
from softcurve.losses.spec import LogitMap

FEW_LOGITS = 2**16  # a quarter of a megabyte
_PLAIN = (Tensor, torch.nn.Parameter)
_WITHOUT_OPTIONS = IndexCrossEntropy(LogitMap())


def few_logits_loss(
    options: tuple[Any, ...], input: Any, weight: Any, bias: Any, target: Any, ignore_index: Any
) -> Tensor | None:
    """Return the loss of class indices, or ``None`` where the general path must compute it or raise an error.

    It is for plain float32 tensors on the CPU in eager mode, with a class in every row, a reduction to a number, no
    other ``options`` (in the order of :func:`~softcurve.losses.rows.cross_entropy_options`), and a loss that is finite.
    """
    if not _are_few(input, weight, bias, target):
        return None
    reducer, loss = cross_entropy_options(*options)
    if loss != _WITHOUT_OPTIONS or reducer.kind == "none":
        return None
    if not count_alike(target, len(weight), resolve_ignore_index(ignore_index)):
        return None
    result = reducer.apply(row_losses(loss, F.linear(input, weight, bias), target))
    result = result if reducer.nats == 1 else result / reducer.nats
    return result if math.isfinite(result.item()) else None


def _are_few(input: Any, weight: Any, bias: Any, target: Any) -> bool:
    """Return whether the arguments are of the right kinds and shapes for at most ``FEW_LOGITS`` logits."""
    tensors = (input, weight) if bias is None else (input, weight, bias)
    if type(target) is not Tensor or target.dtype != torch.int64 or in_transform():
        return False
    if not all(type(each) in _PLAIN and each.dtype == torch.float32 for each in tensors):
        return False
    if not input.ndim or input.shape[:-1] != target.shape or weight.ndim != 2 or weight.shape[1] != input.shape[-1]:
        return False
    if (bias is not None and bias.shape != weight.shape[:1]) or not 0 < target.numel() * len(weight) <= FEW_LOGITS:
        return False
    return weight.shape[1] > 0 and not torch.is_autocast_enabled("cpu") and values_visible(*tensors)
