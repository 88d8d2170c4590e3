"""The loss and gradients in float64 by closed forms, tile by tile, and the errors of a result.

With ``a = log p`` of the model, a loss is a sum of values over the classes, and each class has a score
``s = p ∂loss/∂p``, from which ``∂loss/∂z = s − p Σ s``. This module does not use softcurve.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from bench.heads import Inputs, Tensors
from bench.tables import Record

ENTRIES = 2**24  # entries of a tile, which takes 128 MiB in float64

Terms = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]  # (log p, tile of the target) → (values, scores)
Tiles = Callable[[slice], Tensor]


def cross_entropy(a: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Return the terms of ``−Σ y log p`` for the target y."""
    return -y * a, -y


def forward_kl(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Return the terms of ``Σ q log(q/p)`` for the target log q."""
    q = b.exp()
    return q * (b - a), -q


def js(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Return the terms of ``½ Σ q log(q/m) + ½ Σ p log(p/m)``, ``m = (p + q)/2``, for the target log q."""
    m = torch.logaddexp(a, b) - math.log(2)
    score = a.exp() * (a - m) / 2
    return b.exp() * (b - m) / 2 + score, score


@dataclass(frozen=True)
class Truth:
    """The mean loss and its gradients with respect to features and weight."""

    loss: Tensor
    of_features: Tensor
    of_weight: Tensor

    @classmethod
    @torch.no_grad()
    def of(cls, terms: Terms, given: Inputs) -> Truth:
        """Compute the mean over the rows with a class index, or over all rows for a linear teacher."""
        features, weight = given.wanted[0].double(), given.wanted[1]
        log_p = _log_softmax(features, weight)
        if len(given.target) == 1:
            target, rows = _one_hot(given.target[0]), int((given.target[0] >= 0).sum())
        else:
            target, rows = _log_softmax(given.target[0].double(), given.target[1]), len(features)
        losses = scores = features.new_zeros(len(features))
        for tile in _tiles(weight, len(features)):
            values, score = terms(log_p(tile), target(tile))
            losses, scores = losses + values.sum(1), scores + score.sum(1)
        of_features, of_weight = torch.zeros_like(features), torch.empty_like(weight, dtype=torch.float64)
        for tile in _tiles(weight, len(features)):
            a = log_p(tile)
            residual = (terms(a, target(tile))[1] - a.exp() * scores[:, None]) / rows
            of_features.addmm_(residual, weight[tile].double())
            torch.mm(residual.T, features, out=of_weight[tile])
        return cls(losses.sum() / rows, of_features, of_weight)

    def rounded(self, dtype: torch.dtype) -> Tensors:
        """Return the exact results rounded to a dtype."""
        return self.loss.to(dtype), self.of_features.to(dtype), self.of_weight.to(dtype)

    def errors(self, results: Tensors) -> Record:
        """Return the errors of the loss and of each gradient; see :func:`off_by`."""
        loss, of_features, of_weight = results
        return {
            "loss": float((loss.detach().double() - self.loss).abs() / self.loss.abs()),
            "features": off_by(of_features, self.of_features),
            "weight": off_by(of_weight, self.of_weight),
        }


def _one_hot(labels: Tensor) -> Tiles:
    """Return tiles of one-hot targets, in which an ignored row is zero."""
    return lambda tile: (labels[:, None] == torch.arange(tile.start, tile.stop, device=labels.device)).double()


def _log_softmax(features: Tensor, weight: Tensor) -> Tiles:
    lse = features.new_full((len(features),), -math.inf)
    for tile in _tiles(weight, len(features)):
        lse = torch.logaddexp(lse, (features @ weight[tile].double().T).logsumexp(1))
    return lambda tile: features @ weight[tile].double().T - lse[:, None]


def _tiles(matrix: Tensor, beside: int) -> Iterator[slice]:
    """Yield slices of rows with at most ``ENTRIES`` entries, for ``beside`` columns or the matrix's own if larger."""
    step = max(1, ENTRIES // max(beside, matrix.shape[1]))
    for start in range(0, len(matrix), step):
        yield slice(start, min(start + step, len(matrix)))


@torch.no_grad()
def off_by(result: Tensor, truth: Tensor) -> Record:
    """Return the relative error in norm, of the worst entry (to the largest entry), and of the worst row's norm."""
    if result.shape != truth.shape:
        raise ValueError(f"a gradient of shape {tuple(result.shape)} where {tuple(truth.shape)} was expected")
    squares, largest = truth.new_zeros(2), truth.new_zeros(3)
    for tile in _tiles(truth, 1):
        own = truth[tile]
        wrong = result[tile].double() - own
        per_row = torch.stack([wrong.norm(dim=1), own.norm(dim=1)])
        ratio = torch.where(per_row[0] == 0, 0.0, per_row[0] / per_row[1])
        squares = squares + per_row.square().sum(1)
        largest = torch.maximum(largest, torch.stack([wrong.abs().max(), own.abs().max(), ratio.max()]))
    norm, entry, row = (squares[0] / squares[1]).sqrt(), largest[0] / largest[1], largest[2]
    return {"norm": float(norm), "entry": float(entry), "row": float(row)}
