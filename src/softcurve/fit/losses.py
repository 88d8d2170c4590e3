"""The losses that a head can be fitted with, by name."""

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
    """Raise DataError if a row of positive weight has a target of 0, for which Σ p log(p/y) is infinite, as p > 0."""
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
    """Return the loss of each row in nats; ``js`` has β = ½, and ``TopK`` defines the outcomes of a list."""
    wrapped: Target
    if isinstance(target, Target):
        wrapped = target
    elif target.is_floating_point():
        wrapped = Probabilities(target)
    elif loss in ("cross_entropy", "forward_kl"):  # H(y) = 0 for a label: its forward KL is its cross-entropy
        return cross_entropy(logits, target, reduction="none")
    else:
        one_hot = logits.new_zeros(logits.shape).scatter_(-1, target[:, None], 1.0)
        wrapped = Probabilities(one_hot)
    if loss == "cross_entropy":
        return cross_entropy(logits, wrapped, reduction="none")
    if loss == "forward_kl":
        return kl_divergence(wrapped, logits, reduction="none")
    if loss == "reverse_kl":
        return kl_divergence(logits, wrapped, reduction="none")
    return js_divergence(wrapped, logits, reduction="none")
