"""The losses of a block of rows that a head can be fitted with, and parts of the targets of a block."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from softcurve.array_types import Float, Float64, Int64
from softcurve.fit import DataError
from softcurve.fit.data.source import BlockTarget, RowBlock, TargetKind
from softcurve.functional import cross_entropy, divergence
from softcurve.losses.divergences import LOSS_NAMES, CrossEntropy, Divergence, ForwardKL, divergence_of
from softcurve.losses.targets import Probabilities, Target
from softcurve.losses.topk import TopK


def check_loss(loss: str | Divergence, kind: TargetKind) -> None:
    """Raise DataError for an unknown loss, or one that is infinite for targets of this kind."""
    if not isinstance(loss, Divergence) and loss not in LOSS_NAMES:
        raise DataError(f"loss must be one of {', '.join(LOSS_NAMES)}, or a Divergence; got {loss!r}")
    if kind == "labels" and divergence_of(loss).is_infinite_off_target:
        raise DataError(
            f"loss {loss} is infinite for labels, which are zero on all classes but one; "
            "use forward_kl, or give distributions that are positive everywhere (smoothed labels)"
        )


def refuse_zeros(loss: str | Divergence, block: RowBlock, weights: Float64[Tensor, " rows"] | None = None) -> None:
    """Raise DataError where a row of positive weight has a target of 0 and the loss is infinite there, as ``p > 0``."""
    target = block.target
    if not isinstance(target, Tensor) or not (
        target.is_floating_point() and divergence_of(loss).is_infinite_off_target
    ):
        return
    zero = (target == 0).any(1)
    if weights is not None:
        zero &= weights > 0
    if zero.any():
        raise DataError(
            f"loss {loss} is infinite where a target is zero; the first such row is row "
            f"{block.number(int(zero.int().argmax()))}: use forward_kl, or mix a little of the uniform distribution "
            "into the targets"
        )


def row_losses(loss: str | Divergence, logits: Float[Tensor, "rows classes"], target: BlockTarget) -> Tensor:
    """Return each row's loss in nats; ``js`` is at β = ½, and the unlisted classes of a ``TopK`` are one outcome."""
    member = divergence_of(loss)
    given: Target
    if isinstance(target, Target):
        given = target
    elif target.is_floating_point():
        given = Probabilities(target)
    elif type(member) in (CrossEntropy, ForwardKL):  # the forward KL of a label is its cross-entropy, since H(y) = 0
        return cross_entropy(logits, target, reduction="none")
    else:
        given = Probabilities(logits.new_zeros(logits.shape).scatter_(-1, target[:, None], 1.0))
    if type(member) is CrossEntropy:
        return cross_entropy(logits, given, reduction="none")
    return divergence(given, logits, divergence=member, reduction="none")


def is_soft(target: BlockTarget) -> bool:
    """Whether the target is a distribution or a top-k list, and not a label."""
    return isinstance(target, TopK) or target.is_floating_point()


def concatenated(targets: Sequence[Tensor | TopK | None]) -> Tensor | TopK:
    """Return one target of the rows of several targets of the same kind."""
    lists = [target for target in targets if isinstance(target, TopK)]
    if lists:
        return TopK.cat(lists)
    return torch.cat([target for target in targets if isinstance(target, Tensor)])


def target_labels(target: BlockTarget) -> Int64[Tensor, " rows"]:
    """Return the most probable class of each row; of equally probable classes, the first."""
    if isinstance(target, TopK):
        return target.most_probable
    return target.argmax(dim=-1) if target.is_floating_point() else target


def named_classes(target: BlockTarget, dtype: torch.dtype) -> tuple[Tensor, Tensor] | None:
    """Return the classes that labels or lists name, ``(rows, k)``, and their probabilities; None for distributions.

    A filler of a list is a class of probability 0.
    """
    if isinstance(target, TopK):
        probs = target.log_probs.to(dtype).exp()
        return target.listed_classes().clamp(min=0), probs / probs.sum(
            1, keepdim=True
        ) if target.tail == "renormalize" else probs
    return None if target.is_floating_point() else (target[:, None], torch.ones(1, 1, dtype=dtype))


def target_sums(target: BlockTarget, classes: int) -> Float64[Tensor, " classes"]:
    """Return each class's sum over the rows of its probability in the target.

    The probability that a top-k list leaves to all unlisted classes is divided equally among them.
    """
    if (named := named_classes(target, torch.float64)) is None:
        return target.double().sum(0)  # type: ignore[union-attr]
    names, probs = named
    sums = torch.zeros(classes, dtype=torch.float64)
    if isinstance(target, TopK) and target.tail == "bucket":
        unlisted = (1.0 - probs.sum(-1)).clamp_(min=0.0) / target.outcome_sizes(classes)[:, -1].clamp(min=1)
        sums += unlisted.sum()
        probs = torch.where(probs > 0, probs - unlisted[:, None], 0.0)
    return sums.index_add_(0, names.flatten(), probs.expand(names.shape).flatten())


def target_probability(target: BlockTarget, index: Int64[Tensor, " rows"], classes: int) -> Float64[Tensor, " rows"]:
    """Return the probability of the class ``index`` in each row's target, which for a label is one or zero.

    The probability that a top-k list leaves to all unlisted classes is divided equally among them.
    """
    if (named := named_classes(target, torch.float64)) is None:
        return target.gather(-1, index[:, None]).squeeze(-1).double()  # type: ignore[union-attr]
    names, probs = named
    listed = (names == index[:, None]) & (probs > 0)
    unlisted = probs.new_zeros(1)
    if isinstance(target, TopK) and target.tail == "bucket":
        unlisted = (1.0 - probs.sum(-1)).clamp_(min=0.0)
        unlisted /= target.outcome_sizes(classes)[:, -1].clamp(min=1)
    return torch.where(listed.any(-1), (probs * listed).sum(-1), unlisted)
