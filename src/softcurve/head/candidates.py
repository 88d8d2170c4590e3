"""The largest logits of each row, collected from blocks of classes that are seen once, in float32 on the CPU.

A logit that is larger than a bound of its row becomes a candidate, which is one integer: the bits of the logit above
its class, such that a smaller integer is a larger logit or, of equal ones, a lower class. A list that is full keeps its
``k`` first, of which the last is the new bound: a later class of an equal logit does not belong to the ``k`` largest.
Lists are shortened by a partition, which takes a fraction of the time of a sort, and sorted once at the end.
numpy sorts integers several times as fast as torch sorts numbers with their places.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from softcurve.array_types import Float, Int

NO_CLASS = np.iinfo(np.int64).max  # behind every logit, a masked one included
# Chunks with a logit above the bound are looked at one by one if less than one of so many has any.
RARE = 8
MAGNITUDE = np.int32(2**31 - 1)


def serves(z: Tensor) -> bool:
    """Return whether the logits of a tile can be collected as integers."""
    return z.dtype == torch.float32 and z.device.type == "cpu"


class Candidates:
    """The candidates of some rows; lists have space for ``room`` of them beside the ``k`` largest so far.

    Every logit is above a ``bound (rows, 1)`` of NaN, which is that of a row of which nothing is known.
    """

    def __init__(self, rows: int, k: int, room: int, bound: Tensor | None = None) -> None:
        self.k = k
        self.keys = np.full((rows, k + max(room, 1)), NO_CLASS)
        self.counts = np.zeros(rows, np.int64)
        self.mask = np.empty(0, np.bool_)
        self.bound = np.full((rows, 1), np.nan, np.float32) if bound is None else bound.numpy()

    def raise_bound(self, rows: slice, bound: Tensor) -> None:
        """Set the bounds of some rows, ``(rows, 1)``, to a number that at least ``k`` of their logits reach."""
        self.bound[rows] = just_below(bound).numpy()

    def add(self, z: Tensor, maxima: Tensor, size: int, rows: slice, first: int) -> None:
        """Add the logits ``z`` of some rows and of classes from ``first`` on, which follow those of earlier calls.

        ``maxima`` are :func:`softcurve.head.maxima.maxima_of_chunks` of ``size`` columns.
        """
        self._add(z.numpy(), maxima.numpy(), size, rows, first)

    def _add(self, z: NDArray[np.float32], maxima: NDArray[np.float32], size: int, rows: slice, first: int) -> None:
        width, room = z.shape[1], self.keys.shape[1]
        at = self._above(z, maxima, size, self.bound[rows])
        start = np.arange(len(z) + 1) * width
        of_row = np.diff(np.searchsorted(at, start))
        if (self.counts[rows] + of_row).max(initial=0) > room:
            if (self.counts[rows] > self.k).any():
                self._shorten(rows)
                self._add(z, maxima, size, rows, first)
            else:  # more classes than the lists have space for
                half = width // 2
                self._add(z[:, :half], z[:, :half], 1, rows, first)
                self._add(z[:, half:], z[:, half:], 1, rows, first + half)
            return
        keys = _encoded(z.ravel()[at], at + np.repeat(first - start[:-1], of_row))
        # The next place in the list of each row, counted from the first of all of its new candidates.
        place = np.arange(len(self.keys))[rows] * room + self.counts[rows] - np.cumsum(of_row) + of_row
        self.keys.ravel()[np.repeat(place, of_row) + np.arange(len(at))] = keys
        self.counts[rows] += of_row

    def _above(
        self, z: NDArray[np.float32], maxima: NDArray[np.float32], size: int, bound: NDArray[np.float32]
    ) -> NDArray[np.int64]:
        """Return the places, ``row * width + column``, of the logits above the bounds, row by row."""
        width, chunks = z.shape[1], z.shape[1] // size
        if size > 1 and width == size * chunks:  # and there are no columns behind the chunks
            at = np.flatnonzero(self._is_above(maxima, bound))
            if RARE * len(at) < maxima.size:  # else it is faster to compare all entries
                row = at // chunks
                places = (row * (width - chunks) + at)[:, None] + np.arange(size) * chunks
                above = np.flatnonzero(self._is_above(z.ravel()[places], bound[row]))
                found: NDArray[np.int64] = places.ravel()[above]
                return found
        return np.flatnonzero(self._is_above(z, bound))

    def _is_above(self, z: NDArray[np.float32], bound: NDArray[np.float32]) -> NDArray[np.bool_]:
        """Compare numbers with bounds, in the same memory every time: fresh memory takes longer than the comparison."""
        if self.mask.size < z.size:
            self.mask = np.empty(z.size, np.bool_)
        with np.errstate(invalid="ignore"):
            above = np.less_equal(z, bound, out=self.mask[: z.size].reshape(z.shape))
        np.logical_not(above, out=above)  # so that everything is above a bound of NaN
        return above

    def _shorten(self, rows: slice) -> None:
        """Keep the ``k`` largest of each of some rows, and raise the bounds of those that have as many."""
        k, counts = self.k, self.counts[rows]
        keys = self.keys[rows, : max(k, counts.max(initial=0))]
        keys.partition(k - 1, axis=-1)
        full = counts >= k
        self.bound[rows][full] = _decoded(keys[full, k - 1 : k])[0]
        keys[:, k:] = NO_CLASS
        np.minimum(counts, k, out=counts)

    def complete(self) -> Tensor:
        """Return the rows, ``(rows,)``, of which ``k`` classes were above the bound."""
        return torch.from_numpy(self.counts >= self.k)

    def largest(self, count: int) -> tuple[Float[Tensor, "rows k"], Int[Tensor, "rows k"]]:
        """Return the ``count ≤ k`` largest logits of each row in falling order, of equal ones the lower class first."""
        self._shorten(slice(0, len(self.keys)))
        keys = self.keys[:, :count]
        keys.sort(axis=-1)
        values, classes = _decoded(keys)
        return torch.from_numpy(values), torch.from_numpy(classes)


def just_below(bound: Tensor) -> Tensor:
    """Return the next smaller number, so that equal ones are above it; NaN in place of −inf."""
    return torch.where(bound.isfinite(), bound.nextafter(bound.new_tensor(-torch.inf)), torch.nan)


def _encoded(values: NDArray[np.float32], classes: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return the integers of logits; the bits of a negative one are in reverse order, and −0 is 0."""
    bits = (values + np.float32(0.0)).view(np.int32)
    bits ^= (bits >> 31) & MAGNITUDE
    keys: NDArray[np.int64] = (~bits).astype(np.int64)
    keys <<= 32
    keys |= classes
    return keys


def _decoded(keys: NDArray[np.int64]) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Return the logits and the classes of integers."""
    bits = ~(keys >> 32).astype(np.int32)
    bits ^= (bits >> 31) & MAGNITUDE
    return bits.view(np.float32), keys & 0xFFFFFFFF
