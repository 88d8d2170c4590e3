"""The targets of a block of rows: some of its rows, its labels, and the probability that it gives to a class."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from softcurve.array_types import Float64, Int64
from softcurve.fit.data.source import BlockTarget
from softcurve.losses.targets import TopK

__all__ = ["concatenated", "is_soft", "target_labels", "target_probability", "target_rows"]


def is_soft(target: BlockTarget) -> bool:
    """Whether the target is a distribution or a top-k list, and not a label."""
    return isinstance(target, TopK) or target.is_floating_point()


def target_rows(target: BlockTarget, rows: Int64[Tensor, " chosen"]) -> Tensor | TopK:
    """Return the target of some of the rows."""
    if isinstance(target, TopK):
        return TopK(target.indices[rows], target.log_probs[rows], target.tail)
    return target[rows]


def concatenated(targets: Sequence[Tensor | TopK]) -> Tensor | TopK:
    """Return one target of the rows of several targets of the same kind."""
    lists = [target for target in targets if isinstance(target, TopK)]
    if lists:
        indices, log_probs = (torch.cat([getattr(each, name) for each in lists]) for name in ("indices", "log_probs"))
        return TopK(indices, log_probs, lists[0].tail)
    return torch.cat([target for target in targets if isinstance(target, Tensor)])


def target_labels(target: BlockTarget) -> Int64[Tensor, " rows"]:
    """Return the most probable class of each row; of equally probable classes, the first."""
    if isinstance(target, TopK):
        return target.indices.gather(-1, target.log_probs.argmax(dim=-1, keepdim=True)).squeeze(-1)
    return target.argmax(dim=-1) if target.is_floating_point() else target


def target_probability(target: BlockTarget, index: Int64[Tensor, " rows"], classes: int) -> Float64[Tensor, " rows"]:
    """Return the probability of the class ``index`` in each row's target, which for a label is one or zero.

    The probability that a top-k list leaves to all unlisted classes is divided equally among them.
    """
    if isinstance(target, TopK):
        probs = target.log_probs.double().exp()
        total = probs.sum(-1)
        if target.tail == "renormalize":
            probs, unlisted = probs / total[:, None], torch.zeros_like(total)
        else:
            unlisted = (1.0 - total).clamp_(min=0.0) / max(classes - probs.shape[-1], 1)
        listed = target.indices == index[:, None]
        return torch.where(listed.any(-1), (probs * listed).sum(-1), unlisted)
    if target.is_floating_point():
        return target.gather(-1, index[:, None]).squeeze(-1).double()
    return (target == index).double()
