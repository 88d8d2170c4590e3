"""The records of a softmax's statistics that public calls return."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from softcurve.array_types import Bool, Float, Int
from softcurve.records import short_repr


class HeadStatistics(NamedTuple):
    """Statistics of the softmax ``p`` of each row, in nats, differentiable; ``(...)`` as the rows of ``input``."""

    log_probs: Float[Tensor, "*rows_k"]  # log p of the classes asked for, (...) or (..., k); of no classes (..., 0)
    entropy: Float[Tensor, "*rows"]  # −Σ p log p
    lse: Float[Tensor, "*rows"]  # log Σ e^z of what the softmax sees
    mean_logit: Float[Tensor, "*rows"]  # Σ p z, which is lse − entropy
    collision: Float[Tensor, "*rows"]  # log Σ p²

    def __repr__(self) -> str:
        return short_repr(self, self._asdict())

    @staticmethod
    def of(columns: Float[Tensor, "*rows columns"], *, one: bool) -> HeadStatistics:
        """Return the record of ``k + 4`` columns; with ``one``, the log-probabilities of one class are ``(...)``."""
        log_probs, *others = columns.tensor_split([-4, -3, -2, -1], -1)
        return HeadStatistics(log_probs.squeeze(-1) if one else log_probs, *(column.squeeze(-1) for column in others))


class LossStats(NamedTuple):
    """The :class:`HeadStatistics` of the softmax that a loss sees, and whether its prediction is right.

    ``log_probs`` are those of the target's class, ``(...)``, whatever the label smoothing and the class weights, and 0
    in an ignored row. For a target that is a distribution they are empty, ``(..., 0)``. The other statistics of a row
    do not depend on its target or weight.
    """

    log_probs: Float[Tensor, "*rows_k"]
    entropy: Float[Tensor, "*rows"]
    lse: Float[Tensor, "*rows"]
    mean_logit: Float[Tensor, "*rows"]
    collision: Float[Tensor, "*rows"]
    predicted: Int[Tensor, "*rows"]  # the most probable class
    correct: Bool[Tensor, "*rows"]  # whether it is the target's (most probable) class; False in an ignored row

    def __repr__(self) -> str:
        return short_repr(self, self._asdict())
