"""The losses that a head can be fitted with, on the logits of some rows."""

from __future__ import annotations

from torch import Tensor

from softcurve.array_types import Float, Float64
from softcurve.fit import DataError
from softcurve.fit.data.source import BlockTarget, RowBlock, TargetKind
from softcurve.functional import cross_entropy, divergence
from softcurve.losses.divergences import LOSS_NAMES, CrossEntropy, Divergence, ForwardKL, divergence_of
from softcurve.losses.targets import Probabilities, Target

__all__ = ["check_loss", "refuse_zeros", "row_losses"]


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
    if (
        not isinstance(target, Tensor)
        or not target.is_floating_point()
        or not divergence_of(loss).is_infinite_off_target
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


def row_losses(
    loss: str | Divergence, logits: Float[Tensor, "rows classes"], target: BlockTarget
) -> Float[Tensor, " rows"]:
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
