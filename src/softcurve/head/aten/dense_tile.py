"""What the tile functions of dense targets are given, and what they return, in ATen and in Triton alike."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from torch import Tensor

from softcurve.losses.spec import LossSpec

MODEL, TARGET = range(2)

# Rows of ``DenseTile.numbers``: eight of the model's softmax, the same eight of the target's, and three of the loss.
# With S the sum of the scores and u = v − p·v, the entries of a class with more than half of the mass (the "top") are
# differences that cancel, so the residual and u at the top are sums over the other classes instead.
OFFSET, LOG_REST, UNIT, SCORE, TOP_RESIDUAL, MEAN_V, TOP_U, CHANGE = range(8)
SIDE_NUMBERS = 8
LOG_RATIO, LSE, WEIGHT = range(2 * SIDE_NUMBERS, 2 * SIDE_NUMBERS + 3)


class DenseTile(NamedTuple):
    """The tensors of a block, ``(rows, classes)`` each, and what its elementwise work depends on."""

    loss: LossSpec
    class_count: int  # C, of which the block holds some
    cached: int  # entries that stay in the cache
    wants_target: bool  # whether the derivatives with respect to the target are wanted
    knows_scores: bool  # whether sums and numbers have scores; if not, ATen sums them up over whole rows in residuals
    z: Tensor
    target: Tensor  # probabilities or logits, as the caller gave them
    v: Tensor | None = None  # the changes of z and target along a direction
    target_v: Tensor | None = None
    out: Tensor | None = None  # for residuals: ``z`` and ``v`` themselves, or buffers in half precision
    v_out: Tensor | None = None
    target_out: Tensor | None = None
    target_v_out: Tensor | None = None
    seen: Tensor | None = None  # where ATen keeps what the softmax sees, if there is a soft cap and no cut of classes
    raw: Tensor | None = None  # second order: buffers for the logits before their soft cap, q, and the residual
    q: Tensor | None = None
    residual: Tensor | None = None
    class_weight: Tensor | None = None  # (classes,): the factors of the target's mass, and of label smoothing
    class_share: Tensor | None = None
    top: Tensor | None = None  # (2, rows): each softmax's class above one half as a column; elsewhere if there is none
    numbers: Tensor | None = None  # (19, rows, 1), in the dtype of ``z``

    @property
    def is_by_logits(self) -> bool:
        """Whether a softmax makes the target, so that its derivatives pass through one."""
        return self.loss.target != "probabilities" or not self.loss.is_cross_entropy

    @property
    def takes_logarithm(self) -> bool:
        """Whether the target's logits are the logarithm of what the caller gave."""
        return self.is_by_logits and self.loss.target == "probabilities"

    @property
    def target_scale(self) -> float:
        """The factor of the target's logits, where no matrix product has applied it."""
        return 1.0 if self.loss.target == "teacher" else self.loss.target_scale

    def number(self, which: int, side: int = MODEL) -> Tensor:
        """One number of each row, ``(rows, 1)``; ``side`` for those that each softmax has."""
        assert self.numbers is not None
        return self.numbers[which + SIDE_NUMBERS * side]

    def row_groups(self) -> Iterator[tuple[slice, DenseTile]]:
        """Yield groups of rows that are small enough to stay in the cache, with the target in the dtype of ``z``."""
        rows, classes = self.z.shape
        step = max(1, self.cached // max(1, classes))
        parts = {name: value for name, value in self._asdict().items() if name in _BY_ROWS and value is not None}
        for start in range(0, rows, step):
            group = slice(start, start + step)
            part = self._replace(**{name: value[group] for name, value in parts.items()})
            yield (
                group,
                part._replace(
                    target=part.target.to(self.z.dtype),
                    top=None if self.top is None else self.top[:, group],
                    numbers=None if self.numbers is None else self.numbers[:, group],
                ),
            )

    def top_entries(self, side: int) -> tuple[Tensor, Tensor]:
        """Row and column of each class above one half in the tile, as indices."""
        assert self.top is not None
        column = self.top[side]
        row = ((column >= 0) & (column < self.z.shape[1])).nonzero().squeeze(-1)
        return row, column[row]


_BY_ROWS = frozenset(
    ("z", "target", "v", "target_v", "out", "v_out", "target_out", "target_v_out", "seen", "raw", "q", "residual")
)


class DenseSums(NamedTuple):
    """What :func:`sums` adds up over a block's classes, ``(rows, 1)`` each; 0 where it is not wanted."""

    score: Tensor  # S, and the same sum without the top
    score_rest: Tensor
    target_score: Tensor
    target_score_rest: Tensor
    value: Tensor
    surplus: Tensor  # Σ (p − y)
    curve: Tensor
    mean_v: Tensor  # Σ p v without the top, and v at the top
    top_v: Tensor
    target_mean_v: Tensor
    target_top_v: Tensor
    entropy: Tensor
    best: Tensor  # the target's largest entry
