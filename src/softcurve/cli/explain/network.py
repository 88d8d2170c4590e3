"""The network that the page explains: digits, 64 → 32 tanh → 10, trained on soft targets in float64."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

import softcurve
from softcurve.array_types import Float, Int

CLASSES = 10
HIDDEN = 32
TRAINING_ROWS = 1437
STEPS = 240
RECORD_EVERY = 4


@dataclass(frozen=True)
class Digits:
    """Images in [0, 1], their labels, and a soft target for each."""

    x: Float[Tensor, "n 64"]
    labels: Int[Tensor, " n"]
    soft: Float[Tensor, "n 10"]


@dataclass(frozen=True)
class History:
    """Held-out losses in nats along the training."""

    steps: tuple[int, ...]
    cross_entropy: tuple[float, ...]
    divergence: tuple[float, ...]


@dataclass(frozen=True)
class Network:
    """The trained network and what it was trained and tried on."""

    features: nn.Sequential
    head: nn.Linear
    held_out: Digits
    history: History

    def logits(self, x: Float[Tensor, "n 64"]) -> Float[Tensor, "n 10"]:
        """The chain up to z, without a graph."""
        with torch.no_grad():
            return self.head(self.features(x))  # type: ignore[no-any-return]

    def accuracy(self) -> float:
        """The part of the held-out digits that is read rightly."""
        read = self.logits(self.held_out.x).argmax(-1)
        return (read == self.held_out.labels).double().mean().item()

    def ambiguous(self) -> int:
        """The held-out digit whose two most probable classes are nearest to each other."""
        two = self.logits(self.held_out.x).softmax(-1).topk(2).values
        return int((two[:, 0] - two[:, 1]).argmin())


def train(seed: int) -> Network:
    """Train on soft targets by gradient descent with momentum, and leave torch's own generator as it was."""
    generator = torch.Generator().manual_seed(seed)
    training, held_out = _digits(generator)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        hidden = nn.Linear(64, HIDDEN, dtype=torch.float64)
        head = nn.Linear(HIDDEN, CLASSES, dtype=torch.float64)
    features = nn.Sequential(OrderedDict(hidden=hidden, tanh=nn.Tanh()))
    history = _descend(features, head, training, held_out, generator)
    return Network(features, head, held_out, history)


def _digits(generator: torch.Generator) -> tuple[Digits, Digits]:
    """Split scikit-learn's digits and give every one a soft target.

    The target is half the label and half a softmax of minus the squared distance to the mean image of each
    class: fixed before the training, positive everywhere, and undecided where the image is.
    """
    data = load_digits()
    order = torch.randperm(len(data.target), generator=generator)
    x = torch.as_tensor(data.data, dtype=torch.float64)[order] / 16
    labels = torch.as_tensor(data.target, dtype=torch.int64)[order]
    one_hot = nn.functional.one_hot(labels, CLASSES).to(x)
    first = one_hot[:TRAINING_ROWS]
    means = first.T @ x[:TRAINING_ROWS] / first.sum(0)[:, None]
    squared = (x[:, None, :] - means).square().sum(-1)
    soft = (one_hot + (-squared).softmax(-1)) / 2
    split = (slice(TRAINING_ROWS), slice(TRAINING_ROWS, None))
    training, held_out = (Digits(x[part], labels[part], soft[part]) for part in split)
    return training, held_out


def _descend(
    features: nn.Module, head: nn.Linear, training: Digits, held_out: Digits, generator: torch.Generator
) -> History:
    parameters = [*features.parameters(), *head.parameters()]
    velocities = [torch.zeros_like(parameter) for parameter in parameters]
    steps, cross_entropies, divergences = [], [], []
    for step in range(STEPS + 1):
        if step % RECORD_EVERY == 0:
            with torch.no_grad():
                z = head(features(held_out.x))
                steps.append(step)
                cross_entropies.append(softcurve.cross_entropy(z, held_out.soft).item())
                divergences.append(softcurve.kl_divergence(held_out.soft.log(), z).item())
        rows = torch.randint(len(training.x), (128,), generator=generator)
        loss = softcurve.cross_entropy(head(features(training.x[rows])), training.soft[rows])
        gradients = torch.autograd.grad(loss, parameters)
        with torch.no_grad():
            for parameter, velocity, gradient in zip(parameters, velocities, gradients, strict=True):
                velocity.mul_(0.9).sub_(gradient, alpha=0.1)
                parameter.add_(velocity)
    return History(tuple(steps), tuple(cross_entropies), tuple(divergences))
