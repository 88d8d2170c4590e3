"""Which classes are predicted for which labels, counted block by block."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from softcurve.array_types import Int64
from softcurve.fit.group import Group

__all__ = ["ConfusedPair", "Confusion"]

DENSE_CLASSES = 200  # up to here there is a confusion matrix
PENDING = 1 << 16  # rows that are collected before they are merged into the counts


@dataclass(frozen=True)
class ConfusedPair:
    """``count`` rows of the class ``label`` were predicted as ``predicted``, both given by their numbers."""

    label: int
    predicted: int
    count: int


class Confusion:
    """Exact counts of the pairs (label, predicted) that occur, of which there are never more than rows."""

    def __init__(self, classes: int) -> None:
        self.classes = classes
        self._pairs, self._counts = torch.zeros(2, 0, dtype=torch.int64)  # label · C + predicted, sorted
        self._pending: list[Tensor] = []

    def add(self, label: Int64[Tensor, " rows"], predicted: Int64[Tensor, " rows"]) -> None:
        """Count the rows of a block."""
        self._pending.append(label * self.classes + predicted)
        # Waiting for as many as there are counts merges each pair a logarithmic number of times.
        if sum(map(len, self._pending)) >= max(PENDING, len(self._pairs)):
            self._merge_pending()

    def add_processes(self, group: Group) -> None:
        """Add the counts of all other processes."""
        self._merge_pending()
        self._merge(torch.cat(group.gathered(self._pairs)), torch.cat(group.gathered(self._counts)))

    @property
    def support(self) -> Int64[Tensor, " classes"]:
        """The number of rows of each label."""
        return self._sums(self._pairs // self.classes, self._counts)

    @property
    def predicted(self) -> Int64[Tensor, " classes"]:
        """The number of rows for which each class is predicted."""
        return self._sums(self._pairs % self.classes, self._counts)

    @property
    def correct(self) -> Int64[Tensor, " classes"]:
        """The number of rows of each label for which it is predicted."""
        return self._sums(self._pairs // self.classes, torch.where(self._wrong(), 0, self._counts))

    @property
    def matrix(self) -> Int64[Tensor, "classes classes"] | None:
        """The confusion matrix, if there are few classes."""
        if self.classes > DENSE_CLASSES:
            return None
        matrix = torch.zeros(self.classes**2, dtype=torch.int64)
        return matrix.index_add_(0, self._pairs, self._counts).view(self.classes, -1)

    def most_confused(self, at_most: int) -> tuple[ConfusedPair, ...]:
        """Return the pairs of different classes that occur most often; of equals, the first in order of the classes."""
        pairs, counts = self._pairs[self._wrong()], self._counts[self._wrong()]
        order = counts.argsort(descending=True, stable=True)[:at_most]
        most = zip(pairs[order].tolist(), counts[order].tolist(), strict=True)
        return tuple(ConfusedPair(pair // self.classes, pair % self.classes, count) for pair, count in most)

    def _merge_pending(self) -> None:
        pending = torch.cat([self._pairs[:0], *self._pending])
        self._merge(torch.cat([self._pairs, pending]), torch.cat([self._counts, torch.ones_like(pending)]))
        self._pending = []

    def _merge(self, pairs: Int64[Tensor, " pairs"], counts: Int64[Tensor, " pairs"]) -> None:
        self._pairs, places = pairs.unique(return_inverse=True)
        self._counts = torch.zeros_like(self._pairs).index_add_(0, places, counts)

    def _wrong(self) -> Tensor:
        return torch.ne(self._pairs // self.classes, self._pairs % self.classes)

    def _sums(self, classes: Int64[Tensor, " pairs"], counts: Int64[Tensor, " pairs"]) -> Int64[Tensor, " classes"]:
        return torch.zeros(self.classes, dtype=torch.int64).index_add_(0, classes, counts)
