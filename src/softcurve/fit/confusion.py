"""Which classes are taken for which, counted block by block."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from softcurve.array_types import Int64
from softcurve.fit.group import Group

__all__ = ["ConfusedPair", "Confusion"]

DENSE_CLASSES = 200  # up to here the whole matrix is held
PENDING = 1 << 16  # confused rows that are gathered before they are merged into the counts


@dataclass(frozen=True)
class ConfusedPair:
    """``count`` rows of the class ``label`` were predicted as ``predicted``, both by their numbers."""

    label: int
    predicted: int
    count: int


class Confusion:
    """Counts of (label, predicted): a matrix for few classes, beyond that the confused pairs that do occur.

    The pairs are counted exactly: they are never more than the rows that are predicted wrongly.
    """

    def __init__(self, classes: int) -> None:
        self.classes = classes
        self.support = torch.zeros(classes, dtype=torch.int64)
        self.predicted = torch.zeros(classes, dtype=torch.int64)
        self.correct = torch.zeros(classes, dtype=torch.int64)
        self.matrix = torch.zeros(classes, classes, dtype=torch.int64) if classes <= DENSE_CLASSES else None
        self._codes, self._counts = torch.zeros(2, 0, dtype=torch.int64)  # label · C + predicted, sorted
        self._pending: list[Tensor] = []
        self._gathered = 0

    def add(self, label: Int64[Tensor, " rows"], predicted: Int64[Tensor, " rows"]) -> None:
        """Count some rows."""
        wrong = label != predicted
        self.support += torch.bincount(label, minlength=self.classes)
        self.predicted += torch.bincount(predicted, minlength=self.classes)
        self.correct += torch.bincount(label[~wrong], minlength=self.classes)
        codes = label * self.classes + predicted
        if self.matrix is not None:
            self.matrix += torch.bincount(codes, minlength=self.classes**2).view(self.classes, -1)
            return
        self._pending.append(codes[wrong])
        self._gathered += len(self._pending[-1])
        # As many as are held already, so that each code is merged a logarithmic number of times.
        if self._gathered >= max(PENDING, len(self._codes)):
            self._merge()

    def _merge(self) -> None:
        codes = torch.cat([self._codes, *self._pending])
        counts = torch.cat([self._counts, torch.ones(self._gathered, dtype=torch.int64)])
        self._codes, places = codes.unique(return_inverse=True)
        self._counts = torch.zeros_like(self._codes).index_add_(0, places, counts)
        self._pending, self._gathered = [], 0

    def add_others(self, together: Group) -> None:
        """Count the rows of all processes, which do the same."""
        counts = (self.support, self.predicted, self.correct)
        with together.summed(*counts if self.matrix is None else (*counts, self.matrix)):
            pass
        if self.matrix is None and together.size > 1:
            self._merge()
            codes, counted = (torch.cat(together.gathered(each)) for each in (self._codes, self._counts))
            self._codes, places = codes.unique(return_inverse=True)
            self._counts = torch.zeros_like(self._codes).index_add_(0, places, counted)

    def most_confused(self, at_most: int) -> tuple[ConfusedPair, ...]:
        """The pairs of different classes that occur most often; of equals the first in order of the classes."""
        if self.matrix is None:
            self._merge()
            codes, counts = self._codes, self._counts
        else:
            off_diagonal = self.matrix - self.matrix.diagonal().diag()
            codes = off_diagonal.flatten().nonzero().squeeze(1)
            counts = off_diagonal.flatten()[codes]
        order = counts.argsort(descending=True, stable=True)[:at_most]
        found = zip(codes[order].tolist(), counts[order].tolist(), strict=True)
        return tuple(ConfusedPair(code // self.classes, code % self.classes, count) for code, count in found)
