"""The plain cross-entropy of a head with few logits, which are held: the loop over tiles would take longer to set up.

The values and derivatives are those of the losses on logits, :mod:`softcurve.losses.few_logits`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from softcurve.checks import values_visible
from softcurve.losses import few_logits
from softcurve.losses.autograd import in_transform

FEW_LOGITS = 2**16  # a quarter of a megabyte


def few_logits_loss(
    options: tuple[Any, ...], input: Any, weight: Any, bias: Any, target: Any, ignore_index: Any
) -> Tensor | None:
    """Return the loss of class indices, or ``None`` where the general path must compute it or raise an error."""
    if not _are_few(input, weight, bias, target):
        return None
    return few_logits.few_logits_loss(options, F.linear(input, weight, bias), target, ignore_index)


def _are_few(input: Any, weight: Any, bias: Any, target: Any) -> bool:
    """Return whether the arguments are of the right kinds and shapes for at most ``FEW_LOGITS`` logits."""
    tensors = (input, weight) if bias is None else (input, weight, bias)
    if type(target) is not Tensor or target.dtype != torch.int64 or in_transform():
        return False
    for each in tensors:
        if type(each) not in few_logits.PLAIN or each.dtype != torch.float32:
            return False
    if not input.ndim or input.shape[:-1] != target.shape or weight.ndim != 2 or weight.shape[1] != input.shape[-1]:
        return False
    if (bias is not None and bias.shape != weight.shape[:1]) or not 0 < target.numel() * len(weight) <= FEW_LOGITS:
        return False
    return weight.shape[1] > 0 and not torch.is_autocast_enabled("cpu") and values_visible(*tensors)
