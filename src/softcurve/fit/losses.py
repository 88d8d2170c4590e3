"""The losses that a head can be fitted with, by name, on the logits of some rows."""

from __future__ import annotations

from typing import Literal, get_args

from torch import Tensor

from softcurve.array_types import Float, Float64
from softcurve.fit import DataError
from softcurve.fit.data.source import Block, BlockTarget, TargetKind
from softcurve.functional import cross_entropy, js_divergence, kl_divergence
from softcurve.losses.targets import Probabilities, Target

__all__ = ["LOSSES", "Loss", "check_loss", "refuse_zeros", "row_losses"]

Loss = Literal["cross_entropy", "forward_kl", "reverse_kl", "js"]
LOSSES: tuple[str, ...] = get_args(Loss)


def check_loss(loss: str, kind: TargetKind) -> None:
    """Raise DataError for an unknown loss, or one that is infinite for targets of this kind."""
    if loss not in LOSSES:
        raise DataError(f"loss must be one of {', '.join(LOSSES)}; got {loss!r}")
    if loss == "reverse_kl" and kind == "labels":
        raise DataError(
            "loss reverse_kl is infinite for labels, which are zero on all classes but one; "
            "use forward_kl, or give distributions that are positive everywhere (smoothed labels)"
        )


def refuse_zeros(loss: str, block: Block, weights: Float64[Tensor, " rows"] | None = None) -> None:
    """Raise DataError where a row of positive weight has a target of 0: its Σ p log(p/y) is infinite, as p > 0."""
    target = block.target
    if loss != "reverse_kl" or not isinstance(target, Tensor) or not target.is_floating_point():
        return
    zero = (target == 0).any(1)
    if weights is not None:
        zero &= weights > 0
    if zero.any():
        raise DataError(
            f"loss reverse_kl is infinite where a target is zero; the first such row is row "
            f"{block.number(int(zero.int().argmax()))}: use forward_kl, or mix a little of the uniform distribution "
            "into the targets"
        )


def row_losses(loss: str, logits: Float[Tensor, "rows classes"], target: BlockTarget) -> Float[Tensor, " rows"]:
    """Each row's loss, in nats: ``js`` is at β = ½; a list's unlisted classes are one outcome, as ``TopK`` says."""
    given: Target
    if isinstance(target, Target):
        given = target
    elif target.is_floating_point():
        given = Probabilities(target)
    elif loss in ("cross_entropy", "forward_kl"):  # H(y) = 0 for a label: its forward KL is its cross-entropy
        return cross_entropy(logits, target, reduction="none")
    else:
        one_hot = logits.new_zeros(logits.shape).scatter_(-1, target[:, None], 1.0)
        given = Probabilities(one_hot)
    if loss == "cross_entropy":
        return cross_entropy(logits, given, reduction="none")
    if loss == "forward_kl":
        return kl_divergence(given, logits, reduction="none")
    if loss == "reverse_kl":
        return kl_divergence(logits, given, reduction="none")
    return js_divergence(given, logits, reduction="none")
