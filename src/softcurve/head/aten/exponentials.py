"""Exponentials of a tile."""

from __future__ import annotations

import math

import torch
from torch import Tensor

LOG2_E = 1 / math.log(2)


def exponentials_into(out: Tensor, delta: Tensor) -> Tensor:
    """Return ``out = e^delta``, where ``delta ≤ 0`` is a logit relative to the largest of its row.

    In float32 it is computed as ``2^(δ log₂ e)``, which takes torch half the time of ``exp``. Rounding the exponent
    adds a relative error of at most ``|δ| ε / 2``, which is below that of the largest terms in a sum over a row whose
    mass is spread.
    """
    if delta.dtype != torch.float32:
        return torch.exp(delta, out=out)
    return torch.exp2(torch.mul(delta, LOG2_E, out=out), out=out)
