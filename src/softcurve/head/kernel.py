"""The interface of the kernels that :mod:`softcurve.head.loop` and :mod:`softcurve.head.curvature` apply to a tile."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from softcurve.array_types import Float
from softcurve.losses.rows import FISHER
from softcurve.losses.spec import LogitMap, LossSpec
from softcurve.losses.topk import NOT_LISTED
from softcurve.processes import max_over, sum_over


@dataclass
class Block:
    """The logits of a tile's rows over some classes. A kernel overwrites the logits with residuals."""

    classes: slice
    z: Tensor
    raw: Tensor | None = None  # buffer for the logits before their soft cap
    v: Tensor | None = None  # the change of z along a direction, or along a column
    target: Tensor | None = None  # the target's probabilities or logits; the kernel's own, if a product made them
    target_v: Tensor | None = None
    target_raw: Tensor | None = None  # what takes residuals through a teacher's own soft cap; see Tile
    target_bend: Tensor | None = None
    target_out: Tensor | None = None  # buffers for the target's residual and its change
    target_v_out: Tensor | None = None
    labels: Tensor | None = None  # soft labels beside a divergence, as the caller gave them
    out: Tensor | None = None  # buffers for the residuals of z and v in half precision, if not in their place
    v_out: Tensor | None = None
    q: Tensor | None = None  # second order: buffers for what columns share besides z
    residual: Tensor | None = None


class Residuals(NamedTuple):
    """The gradients with respect to the logits and the target, times the rows' weights, and their changes."""

    z: Tensor
    target: Tensor | None = None
    v: Tensor | None = None
    target_v: Tensor | None = None


def class_factors(class_weight: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """Return the factors of the classes in the target's own mass and in label smoothing, ``(C,)`` each."""
    if class_weight is None or class_weight.ndim == 1:
        return class_weight, class_weight
    own, share, *_ = class_weight.unbind(0)
    return own, share


def fillers_of(indices: Tensor) -> Tensor | None:
    """Return which entries of lists are no class; ``None`` where a look shows that all are."""
    fillers = indices == NOT_LISTED
    return None if fillers.device.type == "cpu" and not fillers.any() else fillers


def smoothing_of_rows(class_weight: Tensor | None, excluded: Tensor | None) -> tuple[Tensor | None, Tensor | float]:
    """Return what rows that exclude classes change in label smoothing: a surplus and the mass, ``(rows, 1)``.

    A row that excludes ``n`` of ``C`` unmasked classes smooths the others by ``u = (1 + surplus) ε w / C`` with the
    surplus ``n / (C − n)``, which is ``None`` if no row excludes any. The mass is ``Σ u / ε``, 1 without class weights.
    """
    _, share = class_factors(class_weight)
    mass = 1.0 if share is None else share.double().mean()
    if excluded is None or class_weight is None or class_weight.ndim == 1:
        return None, mass
    at, there = excluded.clamp(min=0), excluded >= 0
    share, uniform = class_weight[1].double(), class_weight[2].double()
    lost = torch.where(there, uniform[at], 0.0).sum(-1, keepdim=True)
    surplus = lost / (1 - lost)
    return surplus, (1 + surplus) * (mass - torch.where(there, share[at], 0.0).sum(-1, keepdim=True) / len(share))


@dataclass
class RowData:
    """The data of the rows of a tile, which do not depend on the block of classes."""

    weight: Tensor  # (r,)
    indices: Tensor | None = None  # (r, k), counted from ``first``
    fillers: Tensor | None = None  # (r, k): which of them are no class; None if all are
    target: Tensor | None = None  # (r, k + 1), of a list
    target_v: Tensor | None = None
    class_weight: Tensor | None = None  # see HeadTensors
    excluded: Tensor | None = None  # (r, m), counted from ``first``
    share_surplus: Tensor | None = None  # see smoothing_of_rows
    share_mass: Tensor | float = 1.0
    wants_target: bool = False
    wants_gradient: bool = False
    wants_stats: bool = False
    wants_tangents: bool = False
    has_direction: bool = False
    class_count: int = 0  # C, of which the tile's blocks have those from ``first`` to ``first + held``
    first: int = 0
    held: int = 0
    cuts_classes: bool = False  # whether a row's classes come in several blocks, computed anew for every sweep
    cached: int = 0
    row_scale: Tensor | None = None  # (r, 1)
    offset: Tensor | None = None  # (r, 1), float64: what was taken off the logits, which a z-loss and the lse see

    def factors_of(self, classes: slice) -> tuple[Tensor | None, Tensor | None]:
        """Return :func:`class_factors` of the classes of a block."""
        here = slice(self.first + classes.start, self.first + classes.stop)
        own, share = class_factors(self.class_weight)
        return None if own is None else own[here], None if share is None else share[here]


class Statistics(NamedTuple):
    """What a pass finds of each row's softmax for ``return_stats``; see :class:`softcurve.LossStats`."""

    lse: Tensor | None = None
    entropy: Tensor | None = None
    collision: Tensor | None = None
    log_prob: Tensor | None = None  # of the one class that the target names
    predicted: Tensor | None = None
    target: Tensor | None = None  # the most probable class of the target; a list's is known beforehand

    @staticmethod
    def dtypes(dtype: torch.dtype) -> tuple[torch.dtype, ...]:
        """Return the dtypes of the fields in a computation of ``dtype``."""
        return (dtype,) * 4 + (torch.int64,) * 2


@dataclass
class Kernel(ABC):
    """One tile of rows: sweeps over its blocks gather what rows must know; then residuals, block by block, in place."""

    loss: LossSpec
    data: RowData
    sweeps: int = field(default=1, init=False)
    # What the residuals and their changes are still to be multiplied by: cheaper in the products' small operands.
    row_factor: Float[Tensor, "rows 1"] | None = field(default=None, init=False)
    statistics: Statistics = field(default=Statistics(), init=False)
    # The gradient with respect to a sparse target's distribution, and its change along a direction.
    target_gradient: Tensor | None = field(default=None, init=False)
    target_product: Tensor | None = field(default=None, init=False)

    @abstractmethod
    def accumulate(self, number: int, block: Block) -> None:
        """Gather sweep ``number`` from a block, which may be overwritten if it is not the row's only one."""

    def reduce_over(self, number: int, group: ProcessGroup) -> None:
        """Sum what a sweep has gathered over the processes of a sharded head."""
        raise NotImplementedError(f"{type(self).__name__} serves no sharded heads")

    def finish(self, number: int) -> None:  # noqa: B027
        """Compute what follows from a sweep that has seen every block; by default nothing."""

    @abstractmethod
    def losses(self) -> Float[Tensor, " rows"]:
        """Return the loss of each row, not weighted, after the last sweep."""

    def prepare_residuals(self) -> None:  # noqa: B027
        """Compute what the residuals of all blocks share; by default nothing."""

    @abstractmethod
    def residuals(self, block: Block, fresh: bool) -> Residuals:
        """Return what the products take back to features and weights; ``fresh`` if the block was computed anew."""

    def tangents(self, group: ProcessGroup | None) -> Float[Tensor, " rows"]:
        """Return the change of each row's loss, not weighted, along the direction, once the residuals are formed."""
        raise NotImplementedError(f"{type(self).__name__} serves no directions")


def row_groups(tile: Tensor, cached: int) -> Iterator[slice]:
    """Return groups of rows that are small enough to stay in the cache, ``cached`` entries each."""
    step = max(1, cached // max(1, tile.shape[1]))
    return (slice(start, start + step) for start in range(0, len(tile), step))


def cap_logits(
    map: LogitMap, z: Tensor, v: Tensor | None, raw: Tensor | None, bend: Tensor | None, cached: int
) -> None:
    """Map logits and their change by a soft cap, in place.

    Kept for :func:`back_through_cap`, where there are buffers, are the logits ``t`` and ``(m″/m′) ṫ``.
    """
    for rows in row_groups(z, cached):
        t = z[rows]
        if raw is not None:
            raw[rows] = t
        if v is not None and bend is not None:
            torch.mul(map.bend_ratio(t), v[rows], out=bend[rows])
        if v is not None:
            v[rows] *= map.slope(t)
        z[rows] = map.value(t)


def back_through_cap(
    map: LogitMap, raw: Tensor, bend: Tensor | None, gradient: Tensor, v: Tensor | None, cached: int
) -> None:
    """Replace a gradient ``g`` of the capped logits by ``m′ g``, and its change by ``m′ ġ + m″ ṫ g``."""
    for rows in row_groups(gradient, cached):
        slope = map.slope(raw[rows])
        if v is not None and bend is not None:
            v[rows] = (v[rows] + bend[rows] * gradient[rows]).mul_(slope)
        gradient[rows] *= slope


def largest(z: Tensor) -> Tensor:
    """Return the largest entry of each row, ``(rows, 1)``; −inf if there is none, as on a process without a class."""
    return z.amax(-1, keepdim=True) if z.shape[1] else z.new_full((len(z), 1), -math.inf)


def first_of_largest(value: Tensor, at: Tensor, group: ProcessGroup, data: RowData) -> Tensor:
    """Return the class of the largest ``value`` over all processes, the first of equal ones; ``at`` is local."""
    best = value.clone()
    max_over([best], group)
    # The smallest is minus the largest of minus.
    found = torch.where(value == best, -(at + data.first), -data.class_count)
    max_over([found], group)
    return -found


@dataclass
class CurvatureKernel(Kernel, ABC):
    """A kernel that multiplies many columns by the rows' second-order matrix.

    After the sweeps come :meth:`prepare_columns` and one :meth:`prepare_block` a block. A column's change of the logits
    stands in ``block.v``; it is gathered over every block of a row before any of them is multiplied. ``row_factor`` is
    what all products are still to be multiplied by, row by row.
    """

    matrix: str = field(kw_only=True, default="")  # empty: residuals are formed, and no matrix
    merges_tail: bool = field(kw_only=True, default=False)
    # Set by prepare_columns: the total Σ q of softmax.RowCurvature, and the sums of each column over a row.
    total: Float[Tensor, "rows 1"] = field(init=False)
    sums: defaultdict[int, tuple[Tensor, ...]] = field(init=False)

    @abstractmethod
    def prepare_columns(self) -> None:
        """Compute what all columns share, after the last sweep."""

    @abstractmethod
    def prepare_block(self, block: Block, fresh: bool, again: bool = False) -> None:
        """Replace logits by what columns need; ``fresh`` if computed since the sweeps, ``again`` if ready before."""

    def reduce_prepared(self, group: ProcessGroup) -> None:
        """Sum what the first :meth:`prepare_block` of every block has found over the processes; by default nothing."""

    @abstractmethod
    def accumulate_column(self, block: Block, number: int) -> None:
        """Add a block's terms to the sums of a column over each row."""

    def reduce_column(self, number: int, group: ProcessGroup | None) -> None:
        """Sum what a column has gathered over the processes of a sharded head."""
        sums = [part.clone() for part in self.sums[number]]
        sum_over(sums, group)
        self.sums[number] = tuple(sums)

    @abstractmethod
    def multiply_column(self, block: Block, number: int) -> None:
        """``v ← matrix · v``, but for ``row_factor``."""

    def residual(self, block: Block) -> Tensor | None:
        """Return ``∂L/∂z`` for a Hessian, else ``None``; it may replace ``v``, whose product has been taken back."""
        return block.residual

    @abstractmethod
    def diagonal(self, block: Block) -> None:
        """``v ←`` the matrix's diagonal, but for ``row_factor``."""

    def to_probabilities(self, block: Block) -> None:
        """Replace ``z`` of a prepared block by ``p``; by default it is ``p`` already."""

    def coefficients(self) -> tuple[Tensor, Tensor]:
        """Return ``a`` and ``b`` of a matrix ``a diag(p) − b p pᵀ``: with ``q = a p``, ``b = 2a − total``."""
        surplus = 2 * self.loss.z_loss if self.matrix != FISHER else 0.0
        return self.total - surplus, self.total - 2 * surplus
