"""Relative errors of softcurve and torch in float32 where the textbook formula cancels.

The exact values are from mpmath or float64.
"""

from __future__ import annotations

import mpmath
import torch
import torch.nn.functional as F
from torch import Tensor

import softcurve as sc

CLASSES = 50_257


def confident_rows() -> list[tuple[str, float, float, float]]:
    """Return (name, exact, ours, torch's) of the loss and the gradient at the true class of two classes."""
    table = []
    for gap in (5, 10, 17, 20, 40, 80):
        z, target = torch.tensor([[float(gap), 0.0]], requires_grad=True), torch.tensor([0])
        with mpmath.workdps(50):
            rest = mpmath.exp(-gap)
            truths = float(mpmath.log1p(rest)), float(-rest / (1 + rest))
        values = []
        for cross_entropy in (sc.cross_entropy, F.cross_entropy):
            loss = cross_entropy(z, target)
            (gradient,) = torch.autograd.grad(loss, z)
            values.append((loss.item(), gradient[0, 0].item()))
        for i, what in enumerate(("loss", "gradient")):
            table.append((f"{what} at a gap of {gap}", truths[i], values[0][i], values[1][i]))
    return table


def nearly_equal() -> list[tuple[str, float, float, float]]:
    """Return (name, exact, ours, torch's) of the KL of two distributions over 50,257 classes."""
    table = []
    for ratio in (1e-1, 1e-2, 1e-3, 1e-4, 1e-5):
        generator = torch.Generator().manual_seed(0)
        p = torch.log_softmax(2 * torch.randn(1, CLASSES, generator=generator), -1)
        q = p + ratio * torch.randn(1, CLASSES, generator=generator)
        theirs = F.kl_div(torch.log_softmax(q, -1), torch.log_softmax(p, -1), log_target=True, reduction="batchmean")
        table.append((f"KL at log-ratios of {ratio:g}", _kl(p, q), sc.kl_divergence(p, q).item(), theirs.item()))
    return table


def _kl(p: Tensor, q: Tensor) -> float:
    log_p, log_q = torch.log_softmax(p.double(), -1), torch.log_softmax(q.double(), -1)
    t = log_q - log_p
    return (log_p.exp() * (torch.expm1(t) - t)).sum().item()
