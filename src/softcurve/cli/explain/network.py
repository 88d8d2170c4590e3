"""The network that the page explains: digits, 64 → 32 tanh → 10, trained on soft targets in float64."""

from __future__ import annotations

from collections import OrderedDict
from typing import NamedTuple

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

import softcurve
from softcurve.array_types import Float, Int

CLASSES, HIDDEN = 10, 32
TRAINING_ROWS = 1437
STEPS, RECORD_EVERY = 240, 4


class Digits(NamedTuple):
    """Images in [0, 1], their labels, and a soft target for each."""

    x: Float[Tensor, "n 64"]
    labels: Int[Tensor, " n"]
    soft: Float[Tensor, "n 10"]

    def one_hot(self) -> Float[Tensor, "n 10"]:
        """Return the labels as distributions."""
        return nn.functional.one_hot(self.labels, CLASSES).to(self.x)


class History(NamedTuple):
    """Held-out losses during the training, in nats."""

    steps: list[int]
    cross_entropy: list[float]
    divergence: list[float]


class Network(NamedTuple):
    """The trained network, the digits that were held out, and the losses during the training."""

    features: nn.Sequential
    head: nn.Linear
    held_out: Digits
    history: History

    def logits(self, x: Float[Tensor, "n 64"]) -> Float[Tensor, "n 10"]:
        """Return the logits z, without a graph."""
        with torch.no_grad():
            return self.head(self.features(x))  # type: ignore[no-any-return]

    def parameters(self) -> tuple[nn.Parameter, ...]:
        """Return W, b and the parameters θ of the features."""
        return (*self.head.parameters(), *self.features.parameters())

    def accuracy(self) -> float:
        """Return the share of the held-out digits that is classified correctly."""
        predicted = self.logits(self.held_out.x).argmax(-1)
        return (predicted == self.held_out.labels).double().mean().item()

    def ambiguous(self) -> int:
        """Return the held-out digit whose two most probable classes have the closest probabilities."""
        two = self.logits(self.held_out.x).softmax(-1).topk(2).values
        return int((two[:, 0] - two[:, 1]).argmin())


def train(seed: int) -> Network:
    """Train on soft targets by gradient descent with momentum; torch's global generator keeps its state."""
    generator = torch.Generator().manual_seed(seed)
    training, held_out = _digits(generator)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        hidden = nn.Linear(64, HIDDEN, dtype=torch.float64)
        head = nn.Linear(HIDDEN, CLASSES, dtype=torch.float64)
    features = nn.Sequential(OrderedDict(hidden=hidden, tanh=nn.Tanh()))
    optimizer = torch.optim.SGD([*features.parameters(), *head.parameters()], lr=0.1, momentum=0.9)
    history = History([], [], [])
    network = Network(features, head, held_out, history)
    for step in range(STEPS + 1):
        if step % RECORD_EVERY == 0:
            z = network.logits(held_out.x)
            history.steps.append(step)
            history.cross_entropy.append(softcurve.cross_entropy(z, held_out.soft).item())
            history.divergence.append(softcurve.kl_divergence(held_out.soft.log(), z).item())
        rows = torch.randint(len(training.x), (128,), generator=generator)
        optimizer.zero_grad()
        softcurve.cross_entropy(head(features(training.x[rows])), training.soft[rows]).backward()
        optimizer.step()
    optimizer.zero_grad()
    return network


def _digits(generator: torch.Generator) -> tuple[Digits, Digits]:
    """Split scikit-learn's digits and give each a soft target.

    The target is the mean of the one-hot label and of a softmax of minus the squared distance to the mean image of
    each class: it is fixed before the training and positive everywhere, and uncertain where the image is.
    """
    data = load_digits()
    order = torch.randperm(len(data.target), generator=generator)
    x = torch.as_tensor(data.data, dtype=torch.float64)[order] / 16
    labels = torch.as_tensor(data.target, dtype=torch.int64)[order]
    one_hot = nn.functional.one_hot(labels, CLASSES).to(x)
    first = one_hot[:TRAINING_ROWS]
    means = first.T @ x[:TRAINING_ROWS] / first.sum(0)[:, None]
    soft = (one_hot + (-(x[:, None, :] - means).square().sum(-1)).softmax(-1)) / 2
    training, held_out = zip(*(part.tensor_split([TRAINING_ROWS]) for part in (x, labels, soft)), strict=True)
    return Digits(*training), Digits(*held_out)
