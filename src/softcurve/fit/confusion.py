"""Which classes are predicted for which labels, counted block by block."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from scipy.sparse import csr_array
from torch import Tensor

from softcurve.array_types import Int64
from softcurve.fit.group import Group

__all__ = ["ConfusedPair", "Confusion"]

DENSE_CLASSES = 200  # up to here there is a confusion matrix


@dataclass(frozen=True)
class ConfusedPair:
    """``count`` rows of the class ``label`` were predicted as ``predicted``, both given by their numbers."""

    label: int
    predicted: int
    count: int


class Confusion:
    """Exact counts of the pairs (label, predicted), as a sparse matrix: there are never more pairs than rows."""

    def __init__(self, classes: int) -> None:
        self._counts = csr_array((classes, classes), dtype=np.int64)

    def add(self, label: Int64[Tensor, " rows"], predicted: Int64[Tensor, " rows"]) -> None:
        """Count the rows of a block."""
        ones, pairs = np.ones(len(label), np.int64), (label.numpy(), predicted.numpy())
        self._counts = self._counts + csr_array((ones, pairs), shape=self._counts.shape)

    def add_processes(self, group: Group) -> None:
        """Add the counts of all other processes."""
        first, *others = group.values(self._counts)
        self._counts = sum(others, first)

    @property
    def support(self) -> Int64[Tensor, " classes"]:
        """The number of rows of each label."""
        return torch.as_tensor(self._counts.sum(1))

    @property
    def predicted(self) -> Int64[Tensor, " classes"]:
        """The number of rows for which each class is predicted."""
        return torch.as_tensor(self._counts.sum(0))

    @property
    def correct(self) -> Int64[Tensor, " classes"]:
        """The number of rows of each label for which it is predicted."""
        return torch.as_tensor(self._counts.diagonal())

    @property
    def matrix(self) -> Int64[Tensor, "classes classes"] | None:
        """The confusion matrix, if there are few classes."""
        return torch.as_tensor(self._counts.toarray()) if self._counts.shape[0] <= DENSE_CLASSES else None

    def most_confused(self, at_most: int) -> tuple[ConfusedPair, ...]:
        """Return the pairs of different classes that occur most often; of equals, the first in order of the classes."""
        counts = self._counts.tocoo()
        wrong = np.flatnonzero(counts.row != counts.col)
        order = wrong[np.lexsort((counts.col[wrong], counts.row[wrong], -counts.data[wrong]))][:at_most]
        return tuple(ConfusedPair(int(counts.row[i]), int(counts.col[i]), int(counts.data[i])) for i in order)
