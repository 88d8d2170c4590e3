"""The scores of logits on rows, computed once for the report, the diagnostics and ``softcurve predict``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from softcurve.array_types import Float, Float64, Int64
from softcurve.fit.data.source import BlockTarget
from softcurve.fit.group import Group
from softcurve.fit.losses import row_losses
from softcurve.fit.targets import is_soft, target_labels, target_probability
from softcurve.functional import entropy
from softcurve.losses.divergences import Divergence
from softcurve.losses.targets import TopK

__all__ = ["RowScores", "ScoreSums", "Scores"]


@dataclass(frozen=True)
class Scores:
    """Means over rows, in nats: see :class:`~softcurve.fit.diagnostics.Diagnostics`."""

    loss: float
    accuracy: float
    kl: float | None  # D(target‖model); None for labels
    entropy: float
    brier: float


class RowScores(NamedTuple):
    """The scores of each row of a block; ``target_at_predicted`` is the target's probability of the predicted class."""

    loss: Float64[Tensor, " rows"]
    kl: Float64[Tensor, " rows"] | None
    entropy: Float64[Tensor, " rows"]
    squared_el2n: Float64[Tensor, " rows"]
    confidence: Float64[Tensor, " rows"]
    label_probability: Float64[Tensor, " rows"]
    label: Int64[Tensor, " rows"]
    predicted: Int64[Tensor, " rows"]
    target_at_predicted: Float64[Tensor, " rows"]


class ScoreSums:
    """Sums of the scores over the rows of all blocks so far; ``loss`` is the name of the loss."""

    def __init__(self, loss: str | Divergence) -> None:
        self.loss = loss
        self.rows = 0
        self.soft = False
        self._totals = torch.zeros(5, dtype=torch.float64)

    def add(self, logits: Float[Tensor, "rows classes"], target: BlockTarget) -> RowScores:
        """Score the rows of a block, and add their scores; the most probable class of a soft target is its label."""
        scores = _row_scores(self.loss, logits, target)
        self.rows += len(logits)
        self.soft = scores.kl is not None
        right = scores.label == scores.predicted
        columns = (scores.loss, right, scores.kl, scores.entropy, scores.squared_el2n)
        self._totals += torch.stack([torch.zeros(()) if each is None else each.double().sum() for each in columns])
        return scores

    def add_processes(self, group: Group) -> None:
        """Add the sums over the rows of all other processes."""
        rows = torch.tensor([self.rows, self.soft], dtype=torch.float64)
        with group.summed(self._totals, rows):
            pass
        self.rows, self.soft = int(rows[0]), bool(rows[1])

    def means(self) -> Scores:
        """Return the means over the rows, of which there must be one."""
        loss, accuracy, kl, mean_entropy, brier = (self._totals / self.rows).tolist()
        return Scores(loss, accuracy, kl if self.soft else None, mean_entropy, brier)


def _row_scores(loss: str | Divergence, logits: Float[Tensor, "rows classes"], target: BlockTarget) -> RowScores:
    losses, label = row_losses(loss, logits, target).double(), target_labels(target)
    kl = None
    if is_soft(target):
        kl = losses if loss == "forward_kl" else row_losses("forward_kl", logits, target).double()
    p = logits.softmax(-1)
    confidence, predicted = p.max(-1)
    label_probability = p.gather(-1, label[:, None]).squeeze(-1)
    if isinstance(target, TopK):  # the bucket of a list is one outcome
        model, teacher = target.against(logits)
        residual = model.softmax(-1).sub_(teacher.double().softmax(-1))
    elif target.is_floating_point():
        residual = p.sub_(target)
    else:
        residual = p.scatter_add_(-1, label[:, None], torch.full_like(label_probability, -1.0)[:, None])
    return RowScores(
        losses, kl, entropy(logits), residual.square_().sum(-1), confidence, label_probability, label, predicted,
        target_probability(target, predicted, logits.shape[-1]),
    )  # fmt: skip
