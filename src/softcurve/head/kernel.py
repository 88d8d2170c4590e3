"""What a kernel does with the logits of one tile of rows; see :mod:`softcurve.head.loop` for who calls it when."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from softcurve.array_types import Float
from softcurve.head.plan import Plan
from softcurve.head.tensors import HeadTensors
from softcurve.losses.rows import FISHER, HESSIAN
from softcurve.losses.spec import LossSpec
from softcurve.processes import max_over, sum_over


@dataclass
class Block:
    """The logits of a tile's rows over some classes. A kernel writes residuals where the logits stood."""

    classes: slice
    z: Tensor
    raw: Tensor | None = None  # room for the logits before their soft cap
    v: Tensor | None = None  # the change of z along a direction
    target: Tensor | None = None  # the target's probabilities or logits; the kernel's own, if a product made them
    target_v: Tensor | None = None
    target_out: Tensor | None = None  # room for the target's residual
    target_v_out: Tensor | None = None  # and for its change
    out: Tensor | None = None  # room for the residuals of z and v in the dtype of the products, if not in their place
    v_out: Tensor | None = None

    def target_of(self, rows: slice) -> Tensor:
        """The target of some rows, in the dtype of the logits."""
        assert self.target is not None
        return self.target[rows].to(self.z.dtype)


class Residuals(NamedTuple):
    """Of the loss in the logits and in the target's, times the rows' weights; and their changes along a direction."""

    z: Tensor
    target: Tensor | None = None
    v: Tensor | None = None
    target_v: Tensor | None = None


def class_factors(class_weight: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """The factors of the classes in the target's own mass and in label smoothing, ``(C,)`` each."""
    if class_weight is None or class_weight.ndim == 1:
        return class_weight, class_weight
    own, share = class_weight.unbind(0)
    return own, share


@dataclass
class RowData:
    """What belongs to the rows of a tile, all classes together."""

    weight: Tensor  # (r,)
    indices: Tensor | None = None  # (r, k), counted from ``first``
    target: Tensor | None = None  # (r, k + 1), of a list
    target_v: Tensor | None = None
    class_weight: Tensor | None = None  # see HeadTensors
    wants_target: bool = False
    wants_gradient: bool = False
    wants_stats: bool = False
    wants_tangents: bool = False
    has_direction: bool = False
    class_count: int = 0  # C, of which the tile's blocks have those from ``first`` to ``first + held``
    first: int = 0
    held: int = 0
    cuts_classes: bool = False  # whether a row's classes come in several blocks, anew for every sweep
    cached: int = 0
    offset: Tensor | None = None  # (r, 1), float64: what was taken off the logits, which a z-loss and the lse see

    @staticmethod
    def of(
        loss: LossSpec, tensors: HeadTensors, rows: slice | Tensor, plan: Plan, reference: Tensor | None, *,
        weight: Tensor | None = None, target_v: Tensor | None = None, **wants: bool,
    ) -> RowData:  # fmt: skip
        """Of the rows of a tile; ``weight`` in place of the rows' own, ``reference`` of the logits before scaling."""
        t, dtype, listed = tensors, tensors.dtype, loss.target == "sparse"
        return RowData(
            weight=t.row_weight[rows].to(dtype) if weight is None else weight,
            indices=None if t.indices is None else t.indices[rows] - loss.first,
            target=t.target[rows] if listed and t.target is not None else None,
            target_v=target_v[rows] if listed and target_v is not None else None,
            class_weight=None if t.class_weight is None else t.class_weight.to(dtype),
            class_count=loss.class_count(len(t.weight)),
            first=loss.first,
            held=len(t.weight),
            cuts_classes=plan.cuts_classes,
            cached=plan.cached,
            offset=None if reference is None else loss.scale * reference.double(),
            **wants,
        )

    def weight_of(self, classes: slice) -> Tensor | None:
        """The class weights of a block."""
        own, _ = class_factors(self.class_weight)
        return None if own is None else own[self.first + classes.start : self.first + classes.stop]

    def share_of(self, classes: slice) -> Tensor | None:
        """The factors of a block's classes in label smoothing, as :meth:`weight_of`."""
        _, share = class_factors(self.class_weight)
        return None if share is None else share[self.first + classes.start : self.first + classes.stop]


@dataclass
class Statistics:
    """Of each row's softmax: what ``return_stats`` returns."""

    lse: Tensor | None = None
    entropy: Tensor | None = None
    predicted: Tensor | None = None
    target: Tensor | None = None  # the most probable class of the target; a list's is known beforehand


@dataclass
class Kernel(ABC):
    """One tile of rows: sweeps over its blocks gather what rows must know; then residuals, block by block, in place."""

    loss: LossSpec
    data: RowData
    sweeps: int = field(default=1, init=False)
    # What the residuals are still to be multiplied by, row by row: cheaper in the products' small operands.
    row_factor: Float[Tensor, "rows 1"] | None = field(default=None, init=False)
    statistics: Statistics = field(default_factory=Statistics, init=False)
    # With respect to a sparse target's distribution, and its change along a direction.
    target_gradient: Tensor | None = field(default=None, init=False)
    target_product: Tensor | None = field(default=None, init=False)

    @abstractmethod
    def accumulate(self, number: int, block: Block) -> None:
        """Look at a block. May overwrite it; with more than one block it is computed anew for the next sweep."""

    @abstractmethod
    def reduce_over(self, number: int, group: ProcessGroup) -> None:
        """The sweep has seen every block here; sum up what it has gathered over the processes of a sharded head."""

    @abstractmethod
    def finish(self, number: int) -> None:
        """The sweep has seen every block."""

    @abstractmethod
    def losses(self) -> Float[Tensor, " rows"]:
        """The loss of each row, not weighted, once every sweep is closed."""

    @abstractmethod
    def prepare_residuals(self) -> None:
        """Make ready for residuals."""

    @abstractmethod
    def residuals(self, block: Block, fresh: bool) -> Residuals:
        """What the products take back to features and weights; ``fresh`` if the block was computed anew."""

    @abstractmethod
    def tangents(self, group: ProcessGroup | None) -> Float[Tensor, " rows"]:
        """The change of each row's loss, not weighted, along the direction, once the residuals are formed."""

    def groups(self, block: Block) -> Iterator[slice]:
        """So many rows at a time as stay in the cache."""
        count, classes = block.z.shape
        step = max(1, self.data.cached // max(1, classes))
        for start in range(0, count, step):
            yield slice(start, start + step)


def first_of_largest(value: Tensor, at: Tensor, group: ProcessGroup, data: RowData) -> Tensor:
    """The class, counted over all processes, of the largest ``value``, of equal ones the first; ``at`` counts here."""
    best = value.clone()
    max_over([best], group)
    # The smallest is minus the largest of minus.
    found = torch.where(value == best, -(at + data.first), -data.class_count)
    max_over([found], group)
    return -found


@dataclass
class CurvatureBlock(Block):
    """A block, and room for what columns share besides ``z``: ``q`` and, for the Hessian, the residual."""

    q: Tensor | None = None
    residual: Tensor | None = None


@dataclass
class CurvatureKernel(Kernel, ABC):
    """After the sweeps :meth:`prepare_columns`; a block is made ready for all columns by one :meth:`prepare_block`.

    A column's change of the logits stands in ``block.v``. It is gathered over every block of a row before any of them
    is multiplied. ``row_factor`` is what all products are still to be multiplied by, row by row.
    """

    matrix: str = field(kw_only=True, default=HESSIAN)  # residuals are formed without it
    merges_tail: bool = field(kw_only=True, default=False)
    sums: dict[int, tuple[Tensor, ...]] = field(default_factory=dict, init=False)

    @abstractmethod
    def prepare_columns(self) -> None:
        """Every sweep is closed."""

    @abstractmethod
    def prepare_block(self, block: CurvatureBlock, fresh: bool, again: bool = False) -> None:
        """Logits become what columns need; ``fresh`` if computed anew since the sweeps, ``again`` if not for once."""

    @abstractmethod
    def reduce_prepared(self, group: ProcessGroup) -> None:
        """Sum over the processes of a sharded head what the first :meth:`prepare_block` of every block has found."""

    @abstractmethod
    def accumulate_column(self, block: CurvatureBlock, number: int) -> None:
        """What a column sums over a row."""

    def reduce_column(self, number: int, group: ProcessGroup) -> None:
        """As :meth:`reduce_prepared`, of what a column has gathered."""
        sums = [part.clone() for part in self.sums.get(number, self.no_sums())]
        sum_over(sums, group)
        self.sums[number] = tuple(sums)

    @abstractmethod
    def no_sums(self) -> tuple[Tensor, ...]:
        """What a column has gathered where it has seen no block."""

    @abstractmethod
    def multiply_column(self, block: CurvatureBlock, number: int) -> None:
        """``v ← matrix · v``, but for ``row_factor``."""

    @abstractmethod
    def diagonal(self, block: CurvatureBlock) -> None:
        """``v ←`` the matrix's diagonal, but for ``row_factor``."""

    @abstractmethod
    def to_probabilities(self, block: CurvatureBlock) -> None:
        """``z`` of a block that is ready becomes ``p``."""

    @abstractmethod
    def sum_of_q(self) -> Tensor:
        """``total`` of :class:`softcurve.losses.softmax.RowCurvature`, ``(rows, 1)``."""

    def coefficients(self) -> tuple[Tensor, Tensor]:
        """``a`` and ``b`` of a matrix ``a diag(p) − b p pᵀ``: with ``q = a p``, ``b = 2a − total``."""
        total = self.sum_of_q()
        surplus = 2 * self.loss.z_loss if self.matrix != FISHER else 0.0
        return total - surplus, total - 2 * surplus
