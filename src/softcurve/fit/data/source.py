"""Rows that are walked block by block, as often as wanted: what the solver, the figures and the predictions read."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, Protocol, runtime_checkable

from torch import Tensor

from softcurve.array_types import Float, Int, Int64
from softcurve.fit.group import ALONE
from softcurve.fit.group import Group as Together
from softcurve.losses.targets import TopK

__all__ = ["Block", "Label", "Share", "Source", "TargetKind", "rows_within", "share_of"]

# Bytes of what is computed of a block; as many numbers in float64 may be alive for each of its logits, or of its
# features, whichever are wider.
BUDGET, AT_A_TIME = 64_000_000, 8


Label = int | str  # a bool is an int
TargetKind = Literal["labels", "distributions", "top_k"]
BlockTarget = Int[Tensor, " rows"] | Float[Tensor, "rows classes"] | TopK


@dataclass(frozen=True, eq=False)
class Block:
    """Consecutive rows: ``start`` is the first one's number. Valid until the next block is asked for.

    ``numbers`` are those that people know the rows by, where the source is a part of another; else they count on.
    """

    start: int
    features: Float[Tensor, "rows d"]  # float32 or float64
    target: BlockTarget | None = None  # class indices (int64), probabilities, or a teacher's list
    numbers: Int64[Tensor, " rows"] | None = None

    def __len__(self) -> int:
        return len(self.features)

    def number(self, row: int) -> int:
        """The number that people know the block's ``row`` by."""
        return self.start + row if self.numbers is None else int(self.numbers[row])


@runtime_checkable
class Source(Protocol):
    """Rows with their targets, in an order that never changes."""

    @property
    def rows(self) -> int:
        """How many there are."""

    @property
    def width(self) -> int:
        """The number d of features."""

    @property
    def classes(self) -> tuple[Label, ...]:
        """What the classes are called; empty without targets."""

    @property
    def kind(self) -> TargetKind | None:
        """What a block's target is; ``None`` without targets."""

    @property
    def double(self) -> bool:
        """Whether features come in float64, not float32."""

    @property
    def in_memory(self) -> bool:
        """Whether the rows are held in memory anyway, so that walking them costs no reading."""

    @property
    def fingerprint(self) -> str:
        """A digest that changes when the rows do: a checkpoint belongs to one."""

    def blocks(self, at_most: int) -> Iterator[Block]:
        """All rows in order, ``at_most`` a block. Raises DataError that names the file and place of damage."""


@dataclass(frozen=True)
class Share:
    """Which rows of a larger whole a source has: those of one process among several, one after the other.

    ``first`` is the number of its first row there, ``total`` how many rows all processes have together.
    """

    first: int
    total: int
    together: Together


def share_of(source: Source) -> Share:
    """What a source says in ``share``; one that has none is the whole."""
    return getattr(source, "share", None) or Share(0, source.rows, ALONE)


def rows_within(classes: int, width: int, budget: int | None = None) -> int:
    """How many rows a block may have, so that what is computed of it takes 64 MB, or ``budget`` bytes."""
    return max(1, min(budget or BUDGET, BUDGET) // (8 * AT_A_TIME * max(classes, width)))
