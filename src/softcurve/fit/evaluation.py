"""What a head is worth on rows: the losses it can be fitted with, and its figures."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor

from softcurve.fit import DataError
from softcurve.fit.rows import Rows
from softcurve.functional import cross_entropy, kl_divergence
from softcurve.targets import Probabilities

__all__ = ["LOSSES", "Loss", "Scores", "check_loss", "evaluate", "mean_loss", "tensors"]

Loss = Literal["cross_entropy", "forward_kl", "reverse_kl"]
LOSSES: tuple[str, ...] = get_args(Loss)


@dataclass(frozen=True)
class Scores:
    """Means over rows, in nats; ``kl`` is D(target‖model), for distributions alone."""

    loss: float
    accuracy: float
    kl: float | None


def check_loss(loss: str, rows: Rows) -> None:
    """Raise DataError for an unknown loss, or for a reverse KL that is infinite."""
    if loss not in LOSSES:
        raise DataError(f"loss must be one of {', '.join(LOSSES)}; got {loss!r}")
    if loss != "reverse_kl":
        return
    # D(model‖target) = Σ p log(p/y), and p is positive everywhere.
    if not rows.soft:
        raise DataError(
            "loss reverse_kl is infinite for labels, which are zero on all classes but one; "
            "use forward_kl, or give distributions that are positive everywhere (smoothed labels)"
        )
    zero = (rows.target == 0).any(axis=1)
    if zero.any():
        raise DataError(
            f"loss reverse_kl is infinite where a target is zero; {int(zero.sum())} rows have "
            f"zeros, the first is row {int(zero.argmax())}: use forward_kl, or mix a little of the uniform "
            "distribution into the targets"
        )


def tensors(
    rows: Rows, dtype: torch.dtype
) -> tuple[Float[Tensor, "rows d"], Int[Tensor, " rows"] | Float[Tensor, "rows classes"]]:
    """Return features and target as tensors, distributions in ``dtype`` too. Raises DataError on overflow."""
    features = torch.tensor(rows.features, dtype=dtype)
    if not features.isfinite().all():
        raise DataError(f"data: features go beyond the range of {dtype}; scale them, or use float64")
    return features, torch.tensor(rows.target, dtype=dtype if rows.soft else torch.int64)


def mean_loss(
    loss: str,
    logits: Float[Tensor, "rows classes"],
    target: Int[Tensor, " rows"] | Float[Tensor, "rows classes"],
) -> Float[Tensor, ""]:
    """Return the mean over rows of the loss, in nats."""
    # H(y) = 0 for a label: its forward KL is its cross-entropy.
    if loss == "cross_entropy" or not target.is_floating_point():
        return cross_entropy(logits, target)
    given = Probabilities(target)
    if loss == "forward_kl":
        return kl_divergence(given, logits, reduction="batchmean")
    return kl_divergence(logits, given, reduction="batchmean")


@torch.no_grad()
def evaluate(weight: Float[Tensor, "classes d"], bias: Float[Tensor, " classes"], rows: Rows, loss: str) -> Scores:
    """Return the head's figures on rows; the largest class of a distribution counts as its label."""
    features, target = tensors(rows, weight.dtype)
    logits = torch.addmm(bias, features, weight.T)
    label = target.argmax(dim=1) if rows.soft else target
    return Scores(
        loss=float(mean_loss(loss, logits, target)),
        accuracy=float((logits.argmax(dim=1) == label).double().mean()),
        kl=float(mean_loss("forward_kl", logits, target)) if rows.soft else None,
    )
