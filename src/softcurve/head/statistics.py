"""Statistics of each row's softmax, of which the loss of a row is a combination with given coefficients.

The target ``(n, k + 4)`` holds the coefficients ``a`` of the log-probabilities of the ``k`` listed classes, and of the
entropy ``H``, the log-sum-exp, the mean logit ``μ = p·z`` and the collision ``log Σ p²``. The statistics are thus the
gradient of the loss with respect to the target, their derivatives are its gradients, and their second derivatives its
Hessian products. With ``δ = z − max z``, ``D = z − μ``, ``P = Σ p²`` and ``A, B, C`` numbers of a row

    ∂L/∂z = p (A + B D + C p) + a,    A = −Σa + l + m − 2c,  B = m − h,  C = 2c/P,

where ``h, l, m, c`` are the coefficients of the four. Along a direction, ``u = ż − p·ż`` and ``K = Σ p D ż``,

    ġ = p (u (A + B + B D + 2 C p) + Ȧ − B K + Ḃ D + Ċ p) + ȧ.

No term cancels: the class of the largest logit has its own formulas, from sums over all others.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from softcurve.head import backends
from softcurve.head.aten.sparse import or_zero
from softcurve.head.aten.statistics import Coefficients, Needs, RowSums, StatisticsResiduals, StatisticsTile
from softcurve.head.kernel import Block, Kernel, Residuals
from softcurve.head.tensors import STATISTICS
from softcurve.processes import max_over, sum_over


@dataclass
class StatisticsKernel(Kernel):
    """The statistics of each row in float64; what reads or writes whole tiles is in :mod:`.aten.statistics`.

    ``scratch(i)`` is a buffer for a group of rows, the same for every tile.
    """

    scratch: Callable[[int], Tensor] | None = field(kw_only=True, default=None)

    def __post_init__(self) -> None:
        assert self.data.indices is not None
        assert self.data.target is not None
        self.indices, weight = self.data.indices, self.data.weight
        self.tiles = backends.tile_functions(self.loss, weight.device, weight.dtype)
        self.sums = RowSums.none(weight)
        self.loaded_top = self.sums.top  # what ``z`` of a whole row is relative to
        self.masks, self.needs = False, self._needs(self.data.target)
        zeros = self.sums.rest.expand_as(self.indices)
        # NaN until a block has the class: one that is in no block must not look like a logit.
        self.listed, self.v_listed = zeros + math.nan, zeros

    def _needs(self, target: Tensor) -> Needs:
        """Return what must be summed: for the statistics all, and for gradients what has a coefficient."""
        if self.data.wants_target or self.data.has_direction or target.device.type != "cpu":
            return Needs(moment=True, square=True, exponentials=False)
        entropy, _, mean, collision = (target[:, -STATISTICS:] != 0).any(0).tolist()
        whole = not self.data.cuts_classes and self.loss.processes is None
        return Needs(entropy or mean, collision, exponentials=whole and not (entropy or mean))

    # --- the sweep ---------------------------------------------------------------------------------------------------

    def accumulate(self, number: int, block: Block) -> None:  # noqa: D102
        tile = self._tile(block)
        raw = tile.listed.update(math.nan, tile.z)
        sums, self.masks = self.tiles.statistics(tile, self.needs, masks=self.masks)
        sums = sums._replace(place=sums.place + block.classes.start)
        if self.needs.exponentials:  # what is in the tile may be 0
            listed = self.loss.logit_map.value(raw) * self._row_scale()
        else:  # δ as the tile has it, so that it is exactly 0 for the top
            listed = torch.where(raw == -math.inf, raw, tile.listed.take(tile.z) + or_zero(sums.top))
        self.listed = torch.where(raw.isnan(), self.listed, listed)
        if tile.v is not None:
            self.v_listed = tile.listed.update(self.v_listed, tile.v)
        self.loaded_top = sums.top
        self.sums = self.sums.merged(sums)

    def reduce_over(self, number: int, group: ProcessGroup) -> None:
        """Merge the sums of all processes, of which one keeps its top apart and one has a listed logit."""
        sums, top = self.sums, self.sums.top.clone()
        max_over([top], group)
        leads = (sums.top == top) & (top != -math.inf)
        place = -torch.where(leads, sums.place + self.data.first, math.inf)
        max_over([place], group)  # the first of equal ones
        own = leads & (sums.place + self.data.first == -place)
        parts = [torch.where(own, apart, whole) for apart, whole in zip(sums, sums.below(top), strict=True)]
        merged = RowSums(*parts)._replace(top_change=torch.where(own, sums.top_change, 0.0))
        here = (self.indices >= 0) & (self.indices < self.data.held)
        self.listed, self.v_listed = (torch.where(here, part, 0.0) for part in (self.listed, self.v_listed))
        sum_over([*merged[2:], self.listed, self.v_listed], group)
        self.sums = merged._replace(top=top, place=-place - self.data.first)

    def finish(self, number: int) -> None:
        """Compute the statistics and, along a direction, their changes."""
        sums = self.sums
        self.shift = or_zero(sums.top)
        rest = torch.where(sums.top == -math.inf, math.nan, sums.rest)  # a row without a class has no softmax
        self.log_mass, self.inverse = torch.log1p(rest), 1 / (1 + rest)
        self.below = -sums.moment * self.inverse  # max z − μ
        listed = self.listed - self.shift
        self.at_top = self.indices == sums.place
        # The log-probability of a class that is masked or excluded is −inf, a constant.
        self.constant = torch.cat([listed == -math.inf, torch.zeros_like(rest.expand(-1, STATISTICS)).bool()], -1)
        offset = self.shift if self.data.offset is None else self.shift + self.data.offset * self._row_scale()
        self.statistics_of_row = torch.cat(
            [
                listed - self.log_mass,
                self.log_mass + self.below,
                offset + self.log_mass,
                offset - self.below,
                torch.log1p(sums.square) - 2 * self.log_mass,
            ],
            -1,
        )
        if self.data.has_direction:
            self._differentiate()

    def _differentiate(self) -> None:
        """Compute ``p·ż``, the change of the top beside it, ``K`` and the changes of the statistics."""
        sums, inverse = self.sums, self.inverse
        self.mean_change = (sums.change + sums.top_change) * inverse
        # ż − p·ż of the top; Σ p² (ż − p·ż) / P, of which the last term is the top's
        self.top_u = (sums.top_change * sums.rest - sums.change) * inverse
        self.of_square = (sums.square_change - self.mean_change * sums.square + self.top_u) / (1 + sums.square)
        self.of_mean = (sums.moment_change - self.mean_change * sums.moment) * inverse
        u = torch.where(self.at_top, self.top_u, self.v_listed - self.mean_change)
        others = [-self.of_mean, self.mean_change, self.mean_change + self.of_mean, 2 * self.of_square]
        self.changes = torch.where(self.constant, 0.0, torch.cat([u, *others], -1))

    # --- the rows ----------------------------------------------------------------------------------------------------

    def losses(self) -> Tensor:  # noqa: D102
        return _combined(self._given(self.data.target), self.statistics_of_row)

    def tangents(self, group: ProcessGroup | None) -> Tensor:  # noqa: D102
        given, change = self._given(self.data.target), self._given(self.data.target_v)
        return _combined(given, self.changes) + _combined(change, self.statistics_of_row)

    def prepare_residuals(self) -> None:
        """Form the numbers of each row, times its weight and the factor of its logits."""
        weight = self.data.weight.double().unsqueeze(-1)
        self.target_gradient = weight * self.statistics_of_row
        factor = weight * self._row_scale()
        combination = _Combination(self, factor * self._given(self.data.target))
        first, listed, top = combination.first()
        rows = StatisticsResiduals(self.shift, self.sums.place.long(), first, listed, top)
        if self.data.has_direction:
            self.target_product = weight * self.changes
            change = factor * self._given(self.data.target_v)
            rows = combination.along(change, rows)
        self.rows = rows

    def residuals(self, block: Block, fresh: bool) -> Residuals:  # noqa: D102
        whole = self.loss.processes is None
        shift = self.shift if fresh else None if whole else self.shift - or_zero(self.loaded_top)
        rows = self.rows._replace(place=self.rows.place - block.classes.start)
        tile, needs, masks = self._tile(block), self.needs, self.masks
        return self.tiles.residual(tile, rows, shift, needs, fresh=fresh, masks=masks)  # type: ignore[no-any-return]

    def _given(self, target: Tensor | None) -> Tensor:
        """Return the coefficients, or their changes, in float64, and 0 of what is constant."""
        if target is None:
            return torch.zeros_like(self.statistics_of_row)
        return torch.where(self.constant, 0.0, target.double())

    def _row_scale(self) -> Tensor | float:
        scale = self.data.row_scale
        return 1.0 if scale is None else scale.double()

    def _tile(self, block: Block) -> StatisticsTile:
        scale = self.data.row_scale
        return StatisticsTile(
            block.z, block.raw, block.v, None if scale is None else scale.to(block.z.dtype),
            self.indices - block.classes.start, block.z.shape[1] == self.data.class_count, self.loss.logit_map,
            self.data.cached, self.scratch,
        )  # fmt: skip


class _Combination:
    """The coefficients of the statistics of each row, and the numbers of the residuals that follow from them."""

    def __init__(self, kernel: StatisticsKernel, coefficients: Tensor) -> None:
        self.kernel, self.sums = kernel, kernel.sums
        self.listed, self.others = _divided(coefficients)
        # p of the top, 1 / P, and p / P − 1 of the top
        self.p = kernel.inverse
        self.over_square = (1 + self.sums.rest).square() / (1 + self.sums.square)
        self.surplus = (self.sums.rest - self.sums.square) / (1 + self.sums.square)
        entropy, lse, mean, collision = self.others
        self.b, self.c = mean - entropy, 2 * collision * self.over_square
        self.constant = lse + mean - self.listed.sum(-1, keepdim=True)  # A + 2 c

    def first(self) -> tuple[Coefficients, Tensor, Tensor]:
        """Return the numbers of ``g``, what is added at listed classes, and the entry of the top."""
        collision = self.others[3]
        a = self.constant - 2 * collision + self.b * self.kernel.below
        numbers = Coefficients(self.p * a, self.p * self.b, self.p.square() * self.c)
        _, lse, mean, _ = self.others
        own = lse + mean + self.b * self.kernel.below + 2 * collision * self.surplus
        return numbers, self.listed, self.p * own + self._at_top(self.listed)

    def along(self, change: Tensor, rows: StatisticsResiduals) -> StatisticsResiduals:
        """Add the numbers of ``ġ`` along the changes of the coefficients and of the logits."""
        k, p, (listed_v, others_v) = self.kernel, self.p, _divided(change)
        collision, (entropy_v, lse_v, mean_v, collision_v) = self.others[3], others_v
        b_v = mean_v - entropy_v
        c_v = 2 * collision_v * self.over_square - 4 * collision * self.over_square * k.of_square
        slope = self.constant - 2 * collision + self.b + self.b * k.below
        constant_v = lse_v + mean_v - self.b * k.of_mean + b_v * k.below
        rest = constant_v - listed_v.sum(-1, keepdim=True) - 2 * collision_v
        along = Coefficients(p * slope, p * self.b, 2 * p.square() * self.c)
        still = Coefficients(p * rest, p * b_v, p.square() * c_v)
        still = Coefficients(*(s - k.mean_change * a for s, a in zip(still, along, strict=True)))
        # Of the top: A + B + B D + 2 C p without cancellation, and what does not depend on u.
        own = self.constant + 2 * collision + self.b + self.b * k.below + 4 * collision * self.surplus
        fixed = constant_v + 2 * collision_v * self.surplus - 4 * collision * (1 + self.surplus) * k.of_square
        top = p * (k.top_u * own + fixed) + self._at_top(listed_v)
        return rows._replace(along=along, still=still, listed_v=listed_v, top_v=top)

    def _at_top(self, listed: Tensor) -> Tensor:
        """Return ``a − p Σa`` at the top, where ``a`` adds up the coefficients of its place in the list."""
        here = torch.where(self.kernel.at_top, listed, 0.0).sum(-1, keepdim=True)
        elsewhere = torch.where(self.kernel.at_top, 0.0, listed).sum(-1, keepdim=True)
        return here * self.sums.rest * self.p - elsewhere * self.p


def _divided(coefficients: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Return the coefficients of listed classes, and of the entropy, log-sum-exp, mean and collision."""
    listed, others = coefficients[:, :-STATISTICS], coefficients[:, -STATISTICS:]
    return listed, others.split(1, -1)


def _combined(coefficients: Tensor, statistics: Tensor) -> Tensor:
    """Return ``Σ a s`` of each row, where an infinite statistic of coefficient 0 has no part."""
    return torch.where(coefficients == 0, 0.0, coefficients * statistics).sum(-1)
