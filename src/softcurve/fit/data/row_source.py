"""The one source of rows, for memory, files and shards: it walks them block by block and checks their entries."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate, pairwise
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from softcurve.array_types import Int64
from softcurve.fit import DataError
from softcurve.fit.data.capacity import require_head, require_rows
from softcurve.fit.data.dataset import Dataset
from softcurve.fit.data.entries import require_finite, rescale, to_top_k
from softcurve.fit.data.identity import MOST, require_same_rows
from softcurve.fit.data.labels import index_labels
from softcurve.fit.data.read_ahead import read_ahead
from softcurve.fit.data.rows import Rows, float_dtype, shards_of
from softcurve.fit.data.source import Block, BlockTarget, Label, Share, TargetKind
from softcurve.fit.together import ALONE, Together

__all__ = ["RowSource", "assemble", "own_span"]

ENTRIES = 65536  # of labels or of lists that are read at a time, where classes are looked for


@dataclass(frozen=True, eq=False)
class RowSource:
    """The rows of a dataset, or a share of them. A block ends where a shard does.

    Labels are held as indices; features, distributions and lists are read in each walk, those of files by a thread,
    one block ahead, so that two blocks are in memory at a time. Distributions come in float64, rescaled to sum to one.
    """

    data: Dataset
    classes: tuple[Label, ...]
    index: Int64[np.ndarray, " rows"] | None  # the labels
    in_memory: bool
    rows: int
    share: Share

    @property
    def kind(self) -> TargetKind | None:
        """What the target is."""
        return self.data.kind

    @property
    def width(self) -> int:
        """The number of features."""
        return self.data.features.shape[1]

    @cached_property
    def dtype(self) -> np.dtype[Any]:
        """The dtype of the features in a block."""
        return float_dtype(self.data.features)

    @property
    def double(self) -> bool:
        """Whether the features of any shard need float64."""
        return self.dtype == np.float64

    @cached_property
    def fingerprint(self) -> str:
        """The digest of the labels, and of all else at a bounded cost: pieces that are spread over all where they take more than 256 MiB.

        It is that of the rows of all processes, which must ask for it at the same time.
        """
        state = hashlib.sha256(repr((self.share.total, self.kind, self.classes)).encode())
        if self.index is not None:
            for piece in self.share.together.in_order(torch.from_numpy(self.index)):
                state.update(piece.numpy().tobytes())
        with self.share.together.agreed():
            for rows in self._stored:
                state.update(rows.digest(MOST))
        return state.hexdigest()

    def blocks(self, at_most: int) -> Iterator[Block]:
        """Yield all rows in order, ``at_most`` a block. Raises DataError that names the file and the place of damage."""
        if at_most < 1:
            raise DataError(f"at_most must be 1 row or more; got {at_most}")
        # What is in memory has been checked when the source was made.
        return self.walk(at_most, check=False) if self.in_memory else read_ahead(self.walk(at_most))

    def walk(self, at_most: int, *, check: bool = True) -> Iterator[Block]:
        """Yield the same blocks without a thread; ``check`` looks for features that are not finite."""
        bounds, first = self.bounds(at_most), self.share.first
        arrays = (rows.read(bounds) for rows in self._stored)
        for (start, stop), features, *targets in zip(pairwise(bounds), *arrays, strict=True):
            features = np.require(features, self.dtype, ["C", "W"])
            if check:
                require_finite(features, self.data.features, start, "drop or fill such rows")
            numbers = torch.arange(start, stop) if first else None
            yield Block(start - first, torch.from_numpy(features), self._target(targets, start, stop), numbers)

    def bounds(self, at_most: int) -> list[int]:
        """Return the numbers of the rows at which blocks begin, and of the row after the last."""
        first, end = self.share.first, self.share.first + self.rows
        edges = accumulate(shard.shape[0] for shard in shards_of(self.data.features))
        edges = [first, *(edge for edge in edges if first < edge < end), end]
        return [*(row for start, stop in pairwise(edges) for row in range(start, stop, at_most)), end]

    @property
    def _stored(self) -> tuple[Rows, ...]:
        """All that is not held as indices."""
        return (self.data.features, *(self.data.targets if self.index is None else ()))

    def _target(self, read: list[NDArray[Any]], start: int, stop: int) -> BlockTarget | None:
        if self.index is not None:
            return torch.from_numpy(self.index[start - self.share.first : stop - self.share.first])
        targets = self.data.targets
        if self.kind == "distributions":
            return torch.from_numpy(rescale(read[0].astype(np.float64, copy=False), targets[0], start))
        if self.kind == "top_k":
            indices, log_probs = np.require(read[0], np.int64, "CW"), np.require(read[1], float_dtype(targets[1]), "CW")
            return to_top_k(indices, log_probs, len(self.classes), targets, start)
        return None


def assemble(
    data: Dataset,
    *,
    classes: tuple[Label, ...] | None = None,
    class_count: int | None = None,
    in_memory: bool = False,
    together: Together = ALONE,
) -> RowSource:
    """Check what can be seen without reading all, read the labels, and make a dataset a source.

    Targets are in terms of ``classes`` where they are given. ``class_count`` is that of a teacher's lists, by default
    the largest index and one. Of several processes, each has a share. Raises DataError.
    """
    kind, rows = data.kind, data.features.shape[0] if data.features.shape else 0
    with together.agreed():
        data.check()
        if class_count is not None and (class_count < 2 or kind == "labels"):
            what = f"got {class_count}" if class_count < 2 else "these targets are labels: leave it out"
            raise DataError(f"class_count must be the number of classes, 2 or more, of a teacher's lists; {what}")
        if kind is not None:
            require_rows(rows, data.features.name)
    require_same_rows(data, together)
    first, end = own_span(rows, together)
    source = RowSource(
        data, classes if kind and classes else (), None, in_memory, end - first, Share(first, rows, together)
    )
    if kind == "labels":
        names, index = index_labels(data.targets[0], source.bounds(ENTRIES), classes, together)
        source, count = replace(source, classes=names, index=index), len(names)
    elif kind is not None:
        with together.agreed():
            count = _class_count(source, class_count if classes is None else len(classes), classes is None)
        count = int(together.largest(count)[0])
    if kind is not None and classes is None:
        with together.agreed():
            origin = data.targets[0].name if class_count is None else "class_count"
            require_head(count, source.width, origin)
        source = replace(source, classes=source.classes or tuple(range(count)))
    if in_memory:
        with together.agreed():
            for _ in source.walk(max(1, (1 << 20) // max(source.width, len(source.classes)))):
                pass
    return source


def own_span(rows: int, together: Together) -> tuple[int, int]:
    """Return from which row to which a process has its share."""
    return rows * together.rank // together.size, rows * (together.rank + 1) // together.size


def _class_count(source: RowSource, count: int | None, fitting: bool) -> int:
    """Return the number of classes of distributions or lists, which is ``count`` where that is given."""
    target = source.data.targets[0]
    if source.kind == "distributions":
        if count is not None and target.shape[1] != count:
            says = "class_count is" if fitting else "the head has"
            raise DataError(
                f"{target.name} has distributions over {target.shape[1]} classes, {says} {count}: give targets over "
                "these classes, in their order"
            )
        return target.shape[1]
    if count is not None:
        return count
    pieces = target.read(source.bounds(max(1, ENTRIES // target.shape[1])))
    return max([1, *(int(piece.max()) for piece in pieces)]) + 1  # a head has two classes or more
