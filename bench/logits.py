"""The cases of the benchmark of losses on dense logits, compared with torch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

import softcurve as sc

Loss = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Case:
    """One loss of logits ``z`` and a target, in softcurve and in torch."""

    name: str
    ours: Loss
    torchs: Loss
    soft: bool  # whether the target is given by logits instead of class indices
    order: int = 1  # 2 is the HVP by double backward


# Shapes at which a loss costs little more than the calls of its operations, and the layout of torch, with the classes
# in dimension 1: logits of a segmentation.
SHAPES = ((1024, 128), (8, 100), (32, 100), (64, 1000), (256, 5000), (2, 21, 192, 192))


def _dim(z: Tensor) -> int:
    return -1 if z.ndim == 2 else 1


def _kl_torch(z: Tensor, b: Tensor) -> Tensor:
    log_p, log_y = torch.log_softmax(z, 1), torch.log_softmax(b, 1)
    return F.kl_div(log_p, log_y, log_target=True, reduction="sum") / (z.numel() / z.shape[1])


def _js_torch(z: Tensor, b: Tensor) -> Tensor:
    log_p, log_q = torch.log_softmax(z, 1), torch.log_softmax(b, 1)
    mixture = torch.logaddexp(log_p, log_q) - torch.log(torch.tensor(2.0))
    return (log_p.exp() * (log_p - mixture) + log_q.exp() * (log_q - mixture)).sum(1).mean() / 2


CASES = (
    Case("cross_entropy, indices", lambda z, t: sc.cross_entropy(z, t, dim=_dim(z)), F.cross_entropy, soft=False),
    Case(
        "cross_entropy, label smoothing",
        lambda z, t: sc.cross_entropy(z, t, label_smoothing=0.1, dim=_dim(z)),
        lambda z, t: F.cross_entropy(z, t, label_smoothing=0.1),
        soft=False,
    ),
    Case(
        "cross_entropy, distributions",
        lambda z, b: sc.cross_entropy(z, torch.softmax(b, 1), dim=_dim(z)),
        lambda z, b: F.cross_entropy(z, torch.softmax(b, 1)),
        soft=True,
    ),
    Case("kl_divergence, forward", lambda z, b: sc.kl_divergence(b, z, dim=_dim(z)), _kl_torch, soft=True),
    Case(
        "kl_divergence, reverse",
        lambda z, b: sc.kl_divergence(z, b, dim=_dim(z)),
        lambda z, b: _kl_torch(b, z),
        soft=True,
    ),
    Case("js_divergence", lambda z, b: sc.js_divergence(b, z, dim=_dim(z)), _js_torch, soft=True),
    Case("cross_entropy, Hessian product", sc.cross_entropy, F.cross_entropy, soft=False, order=2),
)


def inputs(shape: Sequence[int], soft: bool) -> tuple[Tensor, Tensor]:
    """Return logits ``(N, C, ...)`` that require a gradient, and a target: class indices or a teacher's logits."""
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(*shape, generator=generator).requires_grad_()
    if soft:
        return z, torch.randn(*shape, generator=generator)
    return z, torch.randint(shape[1], (shape[0], *shape[2:]), generator=generator)


def steps(number: int, loss: Loss, z: Tensor, target: Tensor) -> None:
    """Run a number of steps of first order, which makes the time of a small loss measurable."""
    for _ in range(number):
        step(loss, z, target, 1)


def step(loss: Loss, z: Tensor, target: Tensor, order: int) -> Tensor:
    """Run forward and backward, for ``order=2`` double backward, and return the last gradient."""
    (gradient,) = torch.autograd.grad(loss(z, target), z, create_graph=order == 2)
    if order == 2:
        (gradient,) = torch.autograd.grad(gradient, z, z.detach())
    return gradient
