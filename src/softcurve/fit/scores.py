"""The loss and the accuracy of logits on rows, added up block by block."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from softcurve.array_types import Float, Float64, Int64
from softcurve.fit.data.source import BlockTarget
from softcurve.fit.losses import row_losses
from softcurve.losses.divergences import Divergence
from softcurve.losses.targets import TopK

__all__ = ["ScoreSums", "Scores", "target_labels", "target_mass"]


@dataclass(frozen=True)
class Scores:
    """Means over rows, in nats; ``kl`` is D(target‖model), ``None`` for labels."""

    loss: float
    accuracy: float
    kl: float | None


class ScoreSums:
    """Sums over the rows of all blocks so far."""

    def __init__(self, loss: str | Divergence) -> None:
        self.name = loss
        self.rows = self.correct = 0
        self.loss = 0.0
        self.kl: float | None = None

    def add(self, logits: Float[Tensor, "rows classes"], target: BlockTarget) -> None:
        """Count the rows of a block; the most probable class of a distribution, or of a list, is its label."""
        losses = row_losses(self.name, logits, target)
        self.rows += len(logits)
        self.loss += losses.double().sum().item()
        self.correct += int((logits.argmax(dim=-1) == target_labels(target)).sum())
        if isinstance(target, TopK) or target.is_floating_point():
            kl = losses if self.name == "forward_kl" else row_losses("forward_kl", logits, target)
            self.kl = (self.kl or 0.0) + kl.double().sum().item()

    def means(self) -> Scores:
        """The figures of all rows, of which there must be one."""
        kl = None if self.kl is None else self.kl / self.rows
        return Scores(self.loss / self.rows, self.correct / self.rows, kl)


def target_labels(target: BlockTarget) -> Int64[Tensor, " rows"]:
    """The most probable class of each row; of equals the first."""
    if isinstance(target, TopK):
        return target.indices.gather(-1, target.log_probs.argmax(dim=-1, keepdim=True)).squeeze(-1)
    return target.argmax(dim=-1) if target.is_floating_point() else target


def target_mass(target: BlockTarget, index: Int64[Tensor, " rows"], classes: int) -> Float64[Tensor, " rows"]:
    """The probability that each row's target gives the class ``index``: of labels, one or zero.

    The mass that a list leaves over belongs to the unlisted classes together; each is given an equal part of it.
    """
    if isinstance(target, TopK):
        probs = target.log_probs.double().exp()
        mass = probs.sum(-1)
        if target.tail == "renormalize":
            probs, over = probs / mass[:, None], torch.zeros_like(mass)
        else:
            over = (1.0 - mass).clamp_(min=0.0) / max(classes - probs.shape[-1], 1)
        here = target.indices == index[:, None]
        return torch.where(here.any(-1), (probs * here).sum(-1), over)
    if target.is_floating_point():
        return target.gather(-1, index[:, None]).squeeze(-1).double()
    return (target == index).double()
