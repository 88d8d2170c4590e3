"""The source of rows in memory, files and shards, which reads them block by block and checks their entries."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from functools import cached_property
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.sparse import csr_array, issparse
from torch import Tensor

from softcurve.array_types import Int64
from softcurve.fit import DataError
from softcurve.fit.data.dataset import (
    ArrayRows,
    Dataset,
    Rows,
    SparseRows,
    digests,
    float_dtype,
    shards_of,
    sparse_row_entries,
    tensor_array,
)
from softcurve.fit.data.entries import index_labels, require_finite, require_finite_entries, rescale, to_top_k
from softcurve.fit.data.files.arrays import memmap_rows
from softcurve.fit.data.source import BlockTarget, Label, RowBlock, Share, block_rows
from softcurve.fit.data.sparse_features import Features, SparseFeatures
from softcurve.fit.group import ALONE, Group
from softcurve.losses.topk import TopK

T = TypeVar("T")
END = object()

ENTRIES = 65536  # of labels or of lists, which are read at a time to find the classes
# The parameters, their gradient, and the vectors of conjugate gradients (iterate, residual, direction, product).
ARRAYS_OF_A_HEAD = 6
NAME = 44  # bytes of an integer in a tuple: the name of a class that has no other
MOST = 2**28  # bytes that are hashed of each array, which takes half a second at 500 MB/s


class RowSource:
    """A share of the rows of a dataset. A block ends where a shard does.

    Labels are held as their ``index`` among the classes. Features, distributions and lists are read in each walk, those
    of files by a thread, one block ahead, so that two blocks are in memory at a time. Distributions come in float64,
    rescaled to sum to one. Sparse features stay sparse where that pays (:func:`sparse_row_entries`).
    """

    def __init__(
        self, data: Dataset, classes: tuple[Label, ...], index: Int64[np.ndarray, " rows"] | None, share: Share
    ) -> None:
        self.data, self.classes, self.index, self.in_memory = data, classes, index, data.in_memory
        self.share, self.rows = share, share.rows
        self.kind, self.width = data.kind, data.features.shape[1]
        self.dtype: np.dtype[Any] = float_dtype(data.features)
        self.double: bool = self.dtype == np.float64
        self.row_entries = sparse_row_entries(data.features)
        self._stored: tuple[Rows, ...] = (data.features, *(data.targets if index is None else ()))

    @cached_property
    def fingerprint(self) -> str:
        """The digest of the classes and of 256 MiB of each array; all processes must ask for it at the same time."""
        state = hashlib.sha256(repr((self.share.total, self.kind, self.classes)).encode())
        with self.share.group.agreed():
            for rows in (self.data.features, *self.data.targets):
                state.update(rows.digest(MOST))
        return state.hexdigest()

    def blocks(self, at_most: int) -> Iterator[RowBlock]:
        """Yield all rows in order, ``at_most`` a block. Raises DataError that names the file and place of damage."""
        if at_most < 1:
            raise DataError(f"at_most must be 1 row or more; got {at_most}")
        # What is in memory has been checked when the source was made.
        return self.walk(at_most, check=False) if self.in_memory else read_ahead(self.walk(at_most))

    def walk(self, at_most: int, *, check: bool = True) -> Iterator[RowBlock]:
        """Yield the same blocks without a thread; ``check`` refuses features that are not finite."""
        first, bounds = self.share.first, _bounds(self.data, self.share, at_most)
        arrays = (rows.read(bounds) for rows in self._stored)
        for (start, stop), features, *targets in zip(pairwise(bounds), *arrays, strict=True):
            numbers = torch.arange(start, stop) if first else None
            target = self._target(targets, start, stop)
            yield RowBlock(start - first, self._features(features, start, check=check), target, numbers)

    def _features(self, read: Any, start: int, *, check: bool) -> Features:
        remedy = "drop or fill such rows"
        if isinstance(read, csr_array):
            read = read.astype(self.dtype, copy=False)
            if check:
                require_finite_entries(read, self.data.features, start, remedy)
            if self.row_entries is not None:
                return SparseFeatures(read)
            return torch.from_numpy(read.toarray())
        read = np.require(read, self.dtype, ["C", "W"])
        if check:
            require_finite(read, self.data.features, start, remedy)
        return torch.from_numpy(read)

    def _target(self, read: list[NDArray[Any]], start: int, stop: int) -> BlockTarget | None:
        if self.index is not None:
            return torch.from_numpy(self.index[start - self.share.first : stop - self.share.first])
        targets = self.data.targets
        if self.kind == "distributions":
            return torch.from_numpy(rescale(read[0], targets[0], start))
        if self.kind == "top_k":
            return to_top_k(read, len(self.classes), targets, start)
        return None


def to_source(
    features: Any, target: Any = None, *, classes: tuple[Label, ...] | None = None, class_count: int | None = None,
    features_name: str = "features", target_name: str = "target",
) -> RowSource:  # fmt: skip
    """Make arrays a source, checked: features (n, d); a target of labels (n,), distributions (n, C), or a ``TopK``.

    The classes are the sorted distinct labels, as in scikit-learn, or 0…C-1, unless they are given. Float32 and float64
    arrays in C order are shared, not copied. A ``numpy.memmap``, or a view of one, is read block by block; a tensor on
    another device, or of a dtype that numpy lacks, is converted whole. Raises DataError, which uses the names.
    """
    targets: tuple[Rows, ...] = ()
    if isinstance(target, TopK):
        if target.tail != "bucket":
            raise DataError(f"{target_name} must be a TopK with tail 'bucket'; got {target.tail!r}")
        lists = {"indices": target.indices, "log_probs": target.log_probs}
        targets = tuple(_rows(tensor, f"{target_name}.{part}") for part, tensor in lists.items())
    elif target is not None:
        targets = (_rows(target, target_name),)
    return assemble(Dataset(_rows(features, features_name), targets), classes=classes, class_count=class_count)


def _rows(array: Any, name: str) -> Rows:
    if issparse(array):
        return SparseRows(array, name)
    if isinstance(array, Tensor):
        if array.layout != torch.strided:
            raise DataError(f"{name} must be a dense tensor; got layout {array.layout}: convert it to scipy's CSR")
        return ArrayRows(tensor_array(array.detach().cpu()), name)
    try:
        array = np.asanyarray(array)
    except ValueError as error:
        raise DataError(f"{name} must be an array; {error}: give every row the same length") from error
    return memmap_rows(array, name) or ArrayRows(np.asarray(array), name)


def assemble(
    data: Dataset, *, classes: tuple[Label, ...] | None = None, class_count: int | None = None, group: Group = ALONE
) -> RowSource:
    """Check what can be seen without reading all, read the labels, and make a dataset a source.

    Targets are in terms of ``classes`` where they are given. ``class_count`` is that of a teacher's lists, by default
    the largest index and one. Of several processes, each has a share. Raises DataError.
    """
    kind = data.kind
    with group.agreed():
        data.check()
        if class_count is not None and (class_count < 2 or kind == "labels"):
            what = f"got {class_count}" if class_count < 2 else "these targets are labels: leave it out"
            raise DataError(f"class_count must be the number of classes, 2 or more, of a teacher's lists; {what}")
        if kind is not None:
            # The header of a sparse file may say any number; 8 bytes are the index of a label, or of a held-out row.
            what = f"{data.features.name} has {data.features.shape[0]} rows; an integer for each"
            _require_memory(8 * data.features.shape[0], what, "correct its shape, or give fewer rows")
    require_same_rows(data, group)
    rows, width = data.features.shape
    share, index, count = own_share(rows, group), None, 0
    if kind == "labels":
        names, index = index_labels(data.targets[0], _bounds(data, share, ENTRIES), classes, group)
        count = len(names)
    elif kind is not None:
        with group.agreed():
            count = _class_count(data, share, class_count, classes)
        count = int(group.largest(count)[0])
    if kind is not None and classes is None:
        origin = data.targets[0].name if class_count is None else "class_count"
        what = f"{origin} makes {count} classes; with {width} features a fit to them"
        with group.agreed():
            remedy = "correct the largest class or the shape, or give fewer classes"
            _require_memory(count * (ARRAYS_OF_A_HEAD * 8 * (width + 1) + NAME), what, remedy)
        classes = names if kind == "labels" else tuple(range(count))
    source = RowSource(data, classes if kind and classes else (), index, share)
    if source.in_memory:
        with group.agreed():
            for _ in source.walk(block_rows(source)):
                pass
    return source


def read_ahead(iterator: Iterator[T]) -> Iterator[T]:
    """Yield what ``iterator`` yields or raises; a thread, which ends with this generator, is one item ahead."""
    ahead: Future[Any] | None = None
    try:
        with ThreadPoolExecutor(1, thread_name_prefix="read-ahead") as thread:
            ahead = thread.submit(next, iterator, END)
            while (item := ahead.result()) is not END:
                ahead = thread.submit(next, iterator, END)
                yield item
                del item  # or it would live on while the next is waited for
    finally:
        del ahead  # an error that it holds refers to this frame: no cycle
        getattr(iterator, "close", lambda: None)()


def own_share(rows: int, group: Group) -> Share:
    """Return the share of the rows that this process has."""
    first, end = (rows * rank // group.size for rank in (group.rank, group.rank + 1))
    return Share(first, end - first, rows, group)


def _bounds(data: Dataset, share: Share, at_most: int) -> list[int]:
    """Return the numbers of the rows of a share at which blocks begin, and of the row after its last."""
    first, end = share.first, share.first + share.rows
    shards = accumulate(shard.shape[0] for shard in shards_of(data.features))
    edges = [first, *(edge for edge in shards if first < edge < end), end]
    return [*(row for start, stop in pairwise(edges) for row in range(start, stop, at_most)), end]


def _class_count(data: Dataset, share: Share, class_count: int | None, classes: tuple[Label, ...] | None) -> int:
    """Return the number of classes of distributions or lists, that of a given number or of given classes if any."""
    count, target = class_count if classes is None else len(classes), data.targets[0]
    if data.kind == "distributions":
        if count not in (None, target.shape[1]):
            says = "class_count is" if classes is None else "the head has"
            raise DataError(
                f"{target.name} has distributions over {target.shape[1]} classes, {says} {count}: give targets over "
                "these classes, in their order"
            )
        return target.shape[1]
    if count is not None:
        return count
    pieces = target.read(_bounds(data, share, max(1, ENTRIES // target.shape[1])))
    return max([1, *(int(piece.max()) for piece in pieces)]) + 1  # a head has two classes or more


def require_same_rows(data: Dataset, group: Group) -> None:
    """Raise DataError in all processes if one of them sees other rows than the first, as in other files."""
    if group.size == 1:
        return
    with group.agreed():
        arrays = [entry for rows in (data.features, *data.targets) for entry in digests(rows, MOST)]
    by_rank = group.values((f"{data.features.shape[0]} rows of {data.described}", arrays))
    first_shape, first_arrays = by_rank[0]
    with group.agreed():
        for other, (shape, arrays) in enumerate(by_rank):
            pairs = zip(first_arrays, arrays, strict=False)
            unlike = next(((name, other_name) for (name, a), (other_name, b) in pairs if a != b), None)
            if shape != first_shape:
                what = f"process 0 has {first_shape}, and process {other} has {shape}"
            elif unlike is not None:
                what = f"{unlike[0]} in process 0 and {unlike[1]} in process {other} have other entries"
            elif len(arrays) != len(first_arrays):
                what = "the processes have other numbers of files"
            else:
                continue
            raise DataError(f"data: {what}; give all of them the same files")


def available_memory() -> int | None:
    """Return the bytes that this process may use at most, where the system says so."""
    limits = []
    with suppress(AttributeError, ValueError, OSError):
        limits.append(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    with suppress(ImportError, OSError):
        import resource

        limits.append(resource.getrlimit(resource.RLIMIT_AS)[0])
    with suppress(ValueError, OSError):
        limits.append(int(Path("/sys/fs/cgroup/memory.max").read_text()))  # "max" where there is none
    return min((limit for limit in limits if limit >= 0), default=None)  # -1 where there is none


def _require_memory(needed: int, what: str, remedy: str) -> None:
    """Raise DataError if ``what`` needs more bytes than the memory has."""
    memory = available_memory()
    if memory is not None and needed > memory:
        needs, has = (f"{count / 2**30:.3g} GiB" for count in (needed, memory))
        raise DataError(f"{what} takes {needs} or more, and there are {has} of memory: {remedy}")
