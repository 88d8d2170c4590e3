"""The protocol of rows that are read block by block, as often as wanted, by the solver, the figures and predictions."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, Protocol, runtime_checkable

import torch
from torch import Tensor

from softcurve.array_types import Float, Int, Int64
from softcurve.fit import DataError
from softcurve.fit.data.sparse_features import Features, dense_features
from softcurve.fit.group import ALONE, Group
from softcurve.losses.topk import TopK

# Bytes of what is computed of a block; as many numbers in float64 may be alive for each of its logits, or of its
# features, whichever are wider.
BUDGET, AT_A_TIME = 64_000_000, 8

Label = int | str  # a bool is an int
TargetKind = Literal["labels", "distributions", "top_k"]
BlockTarget = Int[Tensor, " rows"] | Float[Tensor, "rows classes"] | TopK


@dataclass(frozen=True, eq=False)
class RowBlock:
    """Consecutive rows: ``start`` is the first one's number. It may share memory with the source: do not change it.

    ``numbers`` are those of the rows in the source that this one is a part of; else they count on from ``start``.
    """

    start: int
    features: Features  # float32 or float64
    target: BlockTarget | None = None  # class indices (int64), probabilities, or a teacher's list
    numbers: Int64[Tensor, " rows"] | None = None

    def __len__(self) -> int:
        return len(self.features)

    def number(self, row: int) -> int:
        """Return the number in the whole source of the block's ``row``."""
        return self.start + row if self.numbers is None else int(self.numbers[row])


@runtime_checkable
class Source(Protocol):
    """Rows with their targets, in an order that never changes.

    A source whose blocks have sparse features also has ``row_entries``, the mean number of stored entries in a row.
    """

    rows: int
    width: int  # the number d of features
    classes: tuple[Label, ...]  # their names; empty without targets
    kind: TargetKind | None  # what a block's target is; None without targets
    double: bool  # whether features come in float64, not float32
    in_memory: bool  # whether the rows are held in memory anyway, so that walking them costs no reading

    @property
    def fingerprint(self) -> str:
        """A digest that changes when the rows do: a checkpoint belongs to one."""

    def blocks(self, at_most: int) -> Iterator[RowBlock]:
        """Yield all rows in order, ``at_most`` a block; a block of a file is valid until the next one is asked for.

        Raises DataError that names the file and place of damage.
        """


@dataclass(frozen=True)
class Share:
    """Which rows of a larger whole a source has: those of one process among several, one after the other.

    ``first`` is the number of the first of its ``rows`` there, ``total`` how many rows all processes have.
    """

    first: int
    rows: int
    total: int
    group: Group


def share_of(source: Source) -> Share:
    """Return the ``share`` of a source; one that has none is the whole."""
    return getattr(source, "share", None) or Share(0, source.rows, source.rows, ALONE)


def is_sparse(source: Source) -> bool:
    """Whether the features of the blocks are sparse, and not dense."""
    return getattr(source, "row_entries", None) is not None


def row_entries(source: Source) -> int:
    """Return how many features of a row are stored: all, or of sparse rows the mean number of entries, rounded up."""
    entries: int | None = getattr(source, "row_entries", None)
    return source.width if entries is None else entries


def block_rows(source: Source, classes: int | None = None, budget: int | None = None) -> int:
    """Return :func:`rows_within` for the rows of a source, and its classes unless their number is given."""
    return rows_within(len(source.classes) if classes is None else classes, row_entries(source), budget)


def rows_within(classes: int, width: int, budget: int | None = None) -> int:
    """Return how many rows a block may have, so that what is computed of it takes 64 MB, or ``budget`` bytes."""
    return max(1, min(budget or BUDGET, BUDGET) // (8 * AT_A_TIME * max(classes, width)))


def gather(source: Source, name: str, dtype: torch.dtype) -> tuple[Float[Tensor, "rows d"], Tensor]:
    """Return the features of all rows in ``dtype`` with their class indices, or with distributions in ``dtype``.

    Errors call the source ``name``. Raises DataError for features that overflow, and for lists or missing targets.
    """
    if source.kind == "top_k":
        raise DataError(f"data: {name} has a teacher's lists for targets; give labels or distributions here")
    if source.kind is None:
        raise DataError(f"data: {name} has no targets; give them in an .npy file by --target")
    features, targets = torch.empty(source.rows, source.width, dtype=dtype), []
    for block in source.blocks(rows_within(len(source.classes), source.width)):
        assert isinstance(block.target, Tensor)
        features[block.start : block.start + len(block)] = dense_features(block.features)
        targets.append(block.target.clone())
    if not features.isfinite().all():
        raise DataError(f"data: features go beyond the range of {dtype}; scale them, or use float64")
    target = torch.cat(targets)
    return features, target.to(dtype) if target.is_floating_point() else target
