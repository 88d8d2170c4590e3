"""The sampling error of mean scores: standard errors and bootstrap intervals."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from softcurve.array_types import Bool, Float64
from softcurve.fit.data.source import Share

# More rows than these are resampled in groups of consecutive rows. The variance of a mean of independent rows is the
# same, and neither memory nor time grows with the rows.
MOST_GROUPS = 10_000
DRAWS_AT_ONCE = 200_000


class RowGroups:
    """The sums over groups of consecutive rows, of which each is a row as long as there are few.

    ``sums`` has a column for each group: its number of rows, their losses, and how many are predicted correctly.
    """

    def __init__(self, share: Share) -> None:
        self.share = share
        self.sums = torch.zeros(3, min(share.total, MOST_GROUPS), dtype=torch.float64)

    def add(self, start: int, losses: Float64[Tensor, " rows"], correct: Bool[Tensor, " rows"]) -> None:
        """Add rows that begin at number ``start`` of the share; the groups are those of the rows of all processes."""
        numbers = torch.arange(len(losses)) + (self.share.first + start)
        columns = torch.stack([torch.ones_like(losses), losses, correct.double()])
        self.sums.index_add_(1, numbers * self.sums.shape[1] // self.share.total, columns)


def standard_error(groups: Float64[Tensor, "3 groups"]) -> float:
    """Return the standard error of the mean loss, from the deviations of the groups; NaN for a single group."""
    rows, losses, _ = groups
    count = len(rows)
    if count < 2:
        return math.nan
    deviations = losses - rows * (losses.sum() / rows.sum())
    return math.sqrt(count / (count - 1) * float(deviations.square().sum())) / float(rows.sum())


@dataclass(frozen=True)
class BootstrapIntervals:
    """Intervals that contain the central ``level`` of the means over ``resamples`` of the rows, with replacement."""

    level: float
    resamples: int
    seed: int
    loss: tuple[float, float]
    accuracy: tuple[float, float]


def bootstrap_intervals(
    groups: Float64[Tensor, "3 groups"], *, seed: int, level: float = 0.95, resamples: int = 2000
) -> BootstrapIntervals:
    """Return the percentile intervals (Efron 1979) of the mean loss and of the accuracy."""
    generator, sums = np.random.default_rng(seed), groups.numpy()
    count = sums.shape[1]
    drawn: list[NDArray[np.float64]] = []
    for start in range(0, resamples, each := max(1, DRAWS_AT_ONCE // count)):
        chosen = generator.integers(0, count, (min(each, resamples - start), count))
        drawn.append(sums[:, chosen].sum(-1))
    rows, losses, correct = np.concatenate(drawn, 1)
    ends = (1 - level) / 2, (1 + level) / 2
    # The quantile is one of the means: interpolation between two fails if one is infinite.
    low_loss, high_loss = np.quantile(losses / rows, ends, method="inverted_cdf").tolist()
    low, high = np.quantile(correct / rows, ends, method="inverted_cdf").tolist()
    return BootstrapIntervals(level, resamples, seed, (low_loss, high_loss), (low, high))
