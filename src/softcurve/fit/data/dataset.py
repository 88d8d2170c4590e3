"""Arrays that are read by ranges of rows, and datasets: features with the targets of the same rows."""

from __future__ import annotations

import hashlib
import math
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.sparse import csr_array
from torch import Tensor

from softcurve.fit import DataError
from softcurve.fit.data.source import TargetKind

PIECE, LEAST = 2**20, 2**12  # bytes that are hashed at a time, and of each shard
FEATURES, TARGET, LISTS = ("features", "X"), ("target", "y"), ("indices", "log_probs")
# Rows stay sparse if they have at least so many places, of which at most one in so many is stored.
SPARSE_SIZE, SPARSE_SHARE = 2**18, 10
OTHER_TARGET = ("labels",)  # where no array is named target or y


@dataclass(frozen=True)
class Keys:
    """The names of the arrays with the features and with the target; None for those that are recognised by default."""

    features: str | None = None
    target: str | None = None

    def require_none(self, place: str) -> None:
        """Raise DataError for a name where there is one array without a name; ``place`` says where."""
        for option, name in (("--features-key", self.features), ("--target-key", self.target)):
            if name is not None:
                raise DataError(f"{option}: {place} has no arrays with names to choose from; leave {name!r} out")


DEFAULT_KEYS = Keys()
# The kinds of dtypes that a target's arrays may have, and what they are.
DTYPES = {
    "distributions": [("iufb", "probabilities")],
    "top_k": [("iu", "numbers of classes"), ("f", "log-probabilities")],
}


@runtime_checkable
class Rows(Protocol):
    """An array of shape ``(n,)`` or ``(n, …)``, of which only some rows are in memory at a time."""

    name: str  # in errors
    shape: tuple[int, ...]
    dtype: np.dtype[Any]  # holds every entry

    def read(self, bounds: Sequence[int]) -> Iterator[Any]:
        """Yield the rows from each bound to the next. Raises DataError that names what is damaged or has changed."""

    def digest(self, most: int) -> bytes:
        """Hash all entries or, where they take more than ``most`` bytes, pieces of them that are spread over all."""
        return digest_rows(self, most)


class ArrayRows(Rows):
    """The rows of a numpy array; what is read shares its memory."""

    def __init__(self, array: NDArray[Any], name: str) -> None:
        self.array, self.name, self.shape, self.dtype = array, name, array.shape, array.dtype

    def read(self, bounds: Sequence[int]) -> Iterator[NDArray[Any]]:
        """Yield views of the array."""
        return (self.array[start:stop] for start, stop in pairwise(bounds))


class SparseRows:
    """The rows of a scipy matrix, held in CSR form with one entry for each place."""

    def __init__(self, matrix: Any, name: str) -> None:
        matrix = csr_array(matrix)
        if not matrix.has_canonical_format:  # entries at the same place add up
            matrix = matrix.copy()
            matrix.sum_duplicates()
        self.matrix, self.name, self.dtype = matrix, name, np.dtype(matrix.dtype)
        self.shape = tuple(int(length) for length in matrix.shape)

    def read(self, bounds: Sequence[int]) -> Iterator[csr_array]:
        """Yield the rows as sparse matrices."""
        return (self.matrix[start:stop] for start, stop in pairwise(bounds))

    def digest(self, most: int) -> bytes:
        """Hash the stored entries and their places."""
        arrays = (self.matrix.indptr, self.matrix.indices, self.matrix.data)
        return str(self.shape).encode() + b"".join(digest_rows(ArrayRows(each, ""), most // 3) for each in arrays)


class Shards:
    """The rows of several arrays, one after the other; the bounds of what is read must include the ends of shards."""

    def __init__(self, shards: Sequence[Rows], name: str) -> None:
        self.shards, self.name = tuple(shards), name
        self.edges = list(accumulate((shard.shape[0] for shard in shards), initial=0))
        self.shape, self.dtype = (self.edges[-1], *shards[0].shape[1:]), shards[0].dtype

    def read(self, bounds: Sequence[int]) -> Iterator[Any]:
        """Yield the rows; only one shard is open at a time."""
        for shard, (first, end) in zip(self.shards, pairwise(self.edges), strict=True):
            inside = bounds[bisect_left(bounds, first) : bisect_right(bounds, end)]
            if len(inside) > 1:
                yield from shard.read([bound - first for bound in inside])

    def digest(self, most: int) -> bytes:
        """Hash the shards."""
        return b"".join(digest for _, digest in digests(self, most))


def shards_of(rows: Rows) -> tuple[Rows, ...]:
    """Return the shards, or the rows themselves where they are one array."""
    return rows.shards if isinstance(rows, Shards) else (rows,)


def locate(rows: Rows, row: int) -> tuple[str, int]:
    """Return the name of the array that has a row, and the number of the row in it."""
    edges = rows.edges if isinstance(rows, Shards) else [0]
    number = bisect_right(edges, row) - 1
    return shards_of(rows)[number].name, row - edges[number]


def sparse_row_entries(features: Rows) -> int | None:
    """Return the mean number of stored entries in a row, rounded up, if it pays to leave the rows sparse, else None.

    Narrow rows are made dense block by block: the dense products are faster there, and the features can be turned to
    the axes of their covariance, which takes fewer of them.
    """
    rows, width = features.shape
    shards = shards_of(features)
    if not all(isinstance(shard, SparseRows) for shard in shards) or rows * width < SPARSE_SIZE:
        return None
    entries = sum(shard.matrix.nnz for shard in shards if isinstance(shard, SparseRows))
    return -(-entries // rows) if entries * SPARSE_SHARE <= rows * width else None


def float_dtype(rows: Rows) -> np.dtype[Any]:
    """Return float32 where it holds every number of the rows' dtypes, otherwise float64."""
    return np.dtype(np.float32 if all(np.can_cast(each.dtype, np.float32) for each in shards_of(rows)) else np.float64)


def tensor_array(tensor: Tensor) -> NDArray[Any]:
    """Return a CPU tensor as an array, in float32 where numpy lacks its dtype."""
    lacking = tensor.dtype == torch.bfloat16 or (tensor.is_floating_point() and tensor.dtype.itemsize == 1)
    return np.asarray(tensor.float() if lacking else tensor)


def digests(rows: Rows, most: int) -> list[tuple[str, bytes]]:
    """Return the name and the digest of each shard, of which so large a part of ``most`` bytes is hashed as it has."""
    of_row = most / max(rows.shape[0], 1)
    return [(shard.name, shard.digest(max(int(of_row * shard.shape[0]), LEAST))) for shard in shards_of(rows)]


def digest_rows(rows: Rows, most: int) -> bytes:
    """Hash shape, dtype and entries: all rows or, where they take more than ``most`` bytes, some of them."""
    state = hashlib.sha256(f"{rows.shape} {rows.dtype.str}".encode())
    if not rows.dtype.hasobject:  # the bytes of objects are addresses
        of_row = max(rows.dtype.itemsize * math.prod(rows.shape[1:]), 1)
        for start, count in places(rows.shape[0], max(most // of_row, 1), max(PIECE // of_row, 1)):
            for piece in rows.read([start, start + count]):
                state.update(piece.tobytes())
    return state.digest()


def places(length: int, most: int, piece: int) -> Iterator[tuple[int, int]]:
    """Yield ``(start, count)`` of pieces that cover a length, or about ``most`` of it with the first and the last."""
    if length <= most:
        yield from ((start, min(piece, length - start)) for start in range(0, length, piece))
    else:
        piece = max(min(piece, most // 2), 1)
        pieces = max(most // piece, 2)
        yield from (((length - piece) * number // (pieces - 1), piece) for number in range(pieces))


@dataclass(frozen=True, eq=False)
class Dataset:
    """Rows with a target of one array, of two (a teacher's indices and log-probabilities), or without a target."""

    features: Rows
    targets: tuple[Rows, ...] = ()
    absent: str = "none is given"  # why there is no target

    @property
    def kind(self) -> TargetKind | None:
        """The kind of the target, by its number of arrays and dimensions."""
        if len(self.targets) != 1:
            return "top_k" if self.targets else None
        return "labels" if len(self.targets[0].shape) == 1 else "distributions"

    @property
    def described(self) -> str:
        """The features and the target in words, without the number of rows."""
        sizes = [size for rows in self.targets for size in rows.shape[1:]]
        described = {
            None: f"no targets ({self.absent})",
            "labels": "labels",
            "distributions": "distributions over {} classes",
            "top_k": "a teacher's lists of {}",
        }
        return f"{self.features.shape[1]} features with {described[self.kind].format(*sizes)}"

    @property
    def in_memory(self) -> bool:
        """Whether nothing is read from files."""
        arrays = (shard for rows in (self.features, *self.targets) for shard in shards_of(rows))
        return all(isinstance(rows, ArrayRows | SparseRows) for rows in arrays)

    def check(self) -> None:
        """Raise DataError for arrays whose shapes or dtypes cannot be those of features and targets."""
        name, shape = self.features.name, self.features.shape
        dtypes = [("iufb", "real numbers"), *DTYPES.get(self.kind or "", ())]
        for rows, (kinds, what) in zip((self.features, *self.targets), dtypes, strict=False):
            if rows.dtype.kind not in kinds:
                raise DataError(f"{rows.name} must be {what}; got dtype {rows.dtype}: convert them")
        if len(shape) != 2:
            remedy = "reshape to (n, 1)" if len(shape) == 1 else "flatten every row"
            raise DataError(f"{name} must have shape (n, d); got {shape}: {remedy}")
        if 0 in shape:
            raise DataError(f"{name} is empty, of shape {shape}; give at least one row and one column")
        for target in self.targets:
            if target.shape[:1] != shape[:1]:
                has = f"{target.shape[0]} rows" if target.shape else "a single value"
                raise DataError(f"{name} has {shape[0]} rows but {target.name} has {has}; give one target a row")
        names, shapes = [target.name for target in self.targets], [target.shape for target in self.targets]
        if self.kind == "top_k" and (shapes[0] != shapes[1] or len(shapes[0]) != 2 or 0 in shapes[0]):
            raise DataError(
                f"{names[0]} and {names[1]} must have one shape (n, k); got {shapes[0]} and {shapes[1]}: give each "
                "listed class its log-probability"
            )
        if self.kind == "distributions" and (len(shapes[0]) != 2 or shapes[0][1] < 2):
            raise DataError(
                f"{names[0]} must be labels of shape (n,) or distributions of shape (n, C) with C of 2 or more; got "
                f"{shapes[0]}: reshape it"
            )


def join(datasets: Sequence[Dataset], name: str) -> Dataset:
    """Concatenate datasets. Raises DataError for one with other features, or another target, than the first."""
    for dataset in datasets:
        dataset.check()
        if dataset.described != datasets[0].described:
            raise DataError(
                f"{dataset.features.name} has {dataset.described}, and {datasets[0].features.name} has "
                f"{datasets[0].described}; all shards need the same features and the same kind of target"
            )
    targets = zip(*(dataset.targets for dataset in datasets), strict=True)
    features = Shards([dataset.features for dataset in datasets], name)
    return Dataset(features, tuple(Shards(shards, shards[0].name) for shards in targets), datasets[0].absent)


def named_dataset(
    path: Path, what: str, names: Sequence[str], rows: Callable[[str], Rows], with_target: bool,
    features: Rows | None = None, keys: Keys = DEFAULT_KEYS,
) -> Dataset:  # fmt: skip
    """Choose among arrays, tensors or columns (``what``) of these names; ``rows`` opens one by its name.

    ``keys`` replaces the names that features and target have by default. Raises DataError where there are no features,
    where several names are of the features or of the target, or where a key is none of the names.
    """

    def only(wanted: tuple[str, ...], option: str, key: str | None) -> str | None:
        if key is not None:
            return require_key(option, key, path, what, names)
        present = [name for name in wanted if name in names]
        if len(present) > 1:
            raise DataError(f"data: {path} has both {present[0]!r} and {present[1]!r}; keep one {what} of them")
        return present[0] if present else None

    if features is None:
        if (name := only(FEATURES, "--features-key", keys.features)) is None:
            wanted = " or ".join(FEATURES)
            raise DataError(
                f"data: {path} has no {what} named {wanted}; it has {describe_names(names)}: choose one by "
                "--features-key"
            )
        features = rows(name)
    target = only(target_names(names), "--target-key", keys.target) if with_target else None
    if not with_target:
        return Dataset(features, absent="another is given")
    lists = [name for name in LISTS if name in names and keys.target is None]
    if len(lists) == len(LISTS):
        if target is not None:
            raise DataError(f"data: {path} has both {target!r} and {' and '.join(LISTS)}; keep one kind of target")
        return Dataset(features, tuple(map(rows, LISTS)))
    if target is not None:
        return Dataset(features, (rows(target),))
    missing = "".join(f", and {name} without {LISTS[1 - LISTS.index(name)]}" for name in lists)
    wanted = f"{', '.join(TARGET)} or {OTHER_TARGET[0]}"
    return Dataset(features, absent=f"no {what} named {wanted}{missing}, and no --target-key")


def require_key(option: str, key: str | None, path: Path, what: str, names: Sequence[str]) -> str | None:
    """Return the key. Raises DataError unless it is one of the names of the arrays, tensors or columns (``what``)."""
    if key is not None and key not in names:
        raise DataError(
            f"{option}: {path} has no {what} named {key!r}; it has {describe_names(names)}: give one of these"
        )
    return key


def target_names(names: Sequence[str]) -> tuple[str, ...]:
    """Return what the target may be called in a file that holds these names."""
    return OTHER_TARGET if set(TARGET).isdisjoint(names) else TARGET


def describe_names(names: Sequence[str]) -> str:
    """List some names in words."""
    shown = ", ".join(map(repr, names[:10])) + (f" and {len(names) - 10} more" if len(names) > 10 else "")
    return shown or "none at all"
