"""The parts of a target that covers every class, for some rows and classes."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from softcurve.head.tensors import HeadTensors
from softcurve.losses.spec import LossSpec
from softcurve.processes import max_over


def target_tops(loss: LossSpec, tensors: HeadTensors) -> Tensor | None:
    """Return the largest logit of each row of the target, ``(n, 1)``, where a temperature would round at its size."""
    given = tensors.target
    if loss.target != "logits" or given is None or math.frexp(loss.target_scale)[0] == 0.5:
        return None
    top = given.new_full((len(given), 1), -math.inf)
    if given.numel():  # a process of a sharded head may hold no class
        top = given.amax(-1, keepdim=True)
    if loss.processes is not None and len(given):
        max_over([top], loss.processes)
    return torch.where(top.isfinite(), top, 0.0)


def target_block(
    loss: LossSpec, given: Tensor, tops: Tensor | None, rows: slice | Tensor, classes: slice, dtype: torch.dtype
) -> Tensor:
    """Return the target of some rows and classes as the caller gave it, less ``tops`` unless these are ``None``."""
    block = given[rows, classes]
    return block if tops is None else block.to(dtype) - tops[rows].to(dtype)
