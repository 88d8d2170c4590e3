"""Targets that cover every class: probabilities, logits, or the logits of a linear teacher.

Sweep 0 gathers the softmax of both sides, sweep 1 what the formulas of :mod:`softcurve.losses.divergences` sum over a
row, and for a Hessian product sweep 2 the sum of the changes. Then every block can form its residuals

    g = s − p S,     ġ = c ⊙ u + x ⊙ u_y − p Σ(c ⊙ u + x ⊙ u_y) − p ⊙ u S,     u = v − p·v,

and for second order ``q`` of :class:`softcurve.losses.softmax.RowCurvature`, whose product needs two sums a column.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from softcurve.head import backends
from softcurve.head.aten.dense_terms import DenseSums, DenseTile
from softcurve.head.kernel import Block, CurvatureKernel, Residuals, Statistics, first_of_largest
from softcurve.losses.divergences import Divergence
from softcurve.losses.rows import FISHER, HESSIAN
from softcurve.processes import max_over, sum_over


class SideStatistics:
    """The statistics of one softmax, float64, ``(rows, 1)`` each.

    The class of the largest logit is kept apart, so that nothing cancels where it has more than half of the mass.
    """

    def __init__(self, weight: Tensor) -> None:
        zeros = torch.zeros((len(weight), 1), dtype=torch.float64, device=weight.device)
        self.offset = torch.full_like(zeros, -math.inf)  # the largest logit
        self.rest = zeros  # Σ e^{z − offset} over all other classes
        self.top = torch.full_like(zeros, -1, dtype=torch.int64)  # its class; known if rest < 1
        self.change = zeros.clone()  # Σ c ⊙ u + x ⊙ u_y of the loss seen from its logits

    def absorb(self, offset: Tensor, rest: Tensor, top: Tensor) -> None:
        """Merge the softmax of further classes."""
        offset, rest = offset.double(), rest.double()
        higher, new = offset > self.offset, torch.maximum(offset, self.offset)
        safe = torch.where(new == -math.inf, 0.0, new)
        now, before = torch.exp(offset - safe), torch.exp(self.offset - safe)
        self.rest = rest * now + self.rest * before + torch.where(higher, before, now)  # the lower top joins the rest
        self.offset = new
        self.top = torch.where(higher, top, self.top)

    @staticmethod
    def merge(sides: Sequence[SideStatistics], group: ProcessGroup) -> None:
        """Merge the softmaxes of all processes. The top is that of one of them, and −1 elsewhere."""
        offsets = [side.offset.clone() for side in sides]
        max_over(offsets, group)
        rests, leaders = [], []
        for side, offset in zip(sides, offsets, strict=True):
            leads = (side.offset == offset) & (offset != -math.inf)
            scale = torch.exp(side.offset - torch.where(offset == -math.inf, 0.0, offset))
            rests.append(side.rest * scale + torch.where(leads, 0.0, scale))
            leaders.append(leads.double())
            # Of several equal ones none is above one half, and which is kept apart does not matter.
            side.top, side.offset = torch.where(leads, side.top, -1), offset
        sum_over([*rests, *leaders], group)
        for side, rest, count in zip(sides, rests, leaders, strict=True):
            side.rest = rest + (count - 1).clamp(min=0)

    @property
    def log_sum_exp(self) -> Tensor:
        """The log-sum-exp of each row."""
        return self.offset + torch.log1p(self.rest)

    @property
    def complement(self) -> Tensor:
        """``1 − p`` of the most probable class."""
        return self.rest / (1 + self.rest)

    def mean_and_top(self, mean_rest: Tensor, top_v: Tensor) -> tuple[Tensor, Tensor]:
        """Return ``p·v`` and the top's ``v − p·v``, from ``Σ p v`` over all other classes and the top's ``v``."""
        return mean_rest + top_v / (1 + self.rest), top_v * self.complement - mean_rest

    def numbers(self, score: Tensor, score_rest: Tensor, mean_rest: Tensor, top_v: Tensor) -> list[Tensor]:
        """Return the numbers that tile functions use, in the order of the constants of :mod:`.aten.dense_terms`."""
        offset = torch.where(self.offset == -math.inf, 0.0, self.offset)
        softmax = [offset, torch.log1p(self.rest), 1 / (1 + self.rest)]
        mean_and_top = self.mean_and_top(mean_rest, top_v)
        return [*softmax, score, score * self.complement - score_rest, *mean_and_top, self.change]


@dataclass
class DenseKernel(CurvatureKernel):
    """The float64 statistics of each row; what reads or writes whole tiles is a function of ``tiles``."""

    def __post_init__(self) -> None:
        weight = self.data.weight
        self.tiles = backends.tile_functions(self.loss, weight.device, weight.dtype)
        self.sweeps = 3 if self.data.has_direction else 2
        self.model, self.target = SideStatistics(weight), SideStatistics(weight)
        by_logits = self.loss.target != "probabilities" or not self.loss.is_cross_entropy
        self.sides = [self.model, self.target] if by_logits else [self.model]
        zeros = self.model.rest.new_zeros(len(DenseSums._fields), len(weight), 1)
        self.totals = DenseSums(*zeros)._replace(best=self.model.offset)
        self.tangent = self.model.rest
        self.label = self.predicted = self.model.top
        self.numbers: Tensor | None = None  # what tile functions take from the statistics; see DenseTile
        self.top: Tensor | None = None

    # --- sweeps ------------------------------------------------------------------------------------------------------

    def accumulate(self, number: int, block: Block) -> None:  # noqa: D102
        tile, first = self._tile(block), block.classes.start
        if number == 0:
            for side, statistics in enumerate(self.sides):
                offset, rest, place = self.tiles.softmax(tile, side, wants_place=self.data.wants_stats)
                statistics.absorb(offset, rest, place + first)
        elif number == 1:
            self._add_sums(tile, first)
        else:
            model, target = self.tiles.changes(tile)
            self.model.change = self.model.change + model
            self.target.change = self.target.change + target

    def _add_sums(self, tile: DenseTile, first: int) -> None:
        wants_stats = self.data.wants_stats
        wants_loss = not self.matrix and not self.data.has_direction
        sums, label = self.tiles.sums(tile, wants_loss=wants_loss, wants_stats=wants_stats, wants_curve=self.has_q)
        best = self.totals.best
        self.totals = DenseSums(*(total + part for total, part in zip(self.totals, sums, strict=True)))
        if wants_stats:
            better = sums.best > best
            self.totals = self.totals._replace(best=torch.where(better, sums.best.double(), best))
            self.label = torch.where(better, label + first, self.label)

    def reduce_over(self, number: int, group: ProcessGroup) -> None:  # noqa: D102
        wants_stats = self.data.wants_stats
        if number == 0:
            if wants_stats:
                self.predicted = first_of_largest(self.model.offset, self.model.top, group, self.data)
            SideStatistics.merge(self.sides, group)
        elif number == 1:
            of_side = ["score", "score_rest", *["mean_v", "top_v"] * self.data.has_direction]
            names = ["value", "surplus", *["entropy", "square"] * wants_stats, *["curve"] * bool(self.matrix), *of_side]
            names += [f"target_{name}" for name in of_side] * (len(self.sides) > 1)
            sum_over([getattr(self.totals, name) for name in names], group)
            if wants_stats:
                self.label = first_of_largest(self.totals.best, self.label, group, self.data)
        else:
            sum_over([side.change for side in self.sides], group)

    def finish(self, number: int) -> None:
        """Complete the statistics of a sweep, and compute what tile functions take from them."""
        if number == 0:
            for side in self.sides:  # a row without a class has no softmax
                side.rest = torch.where(side.offset == -math.inf, math.nan, side.rest)
            if self.loss.processes is None:
                self.predicted = self.model.top
        elif number == 1 and self.data.wants_stats:
            found = Statistics(self._log_sum_exp(), self.totals.entropy, self._collision(), None, self.predicted)
            columns = (None if column is None else column.squeeze(-1) for column in found._replace(target=self.label))
            self.statistics = Statistics(*columns)
        model, target, t = self.model, self.target, self.totals
        log_ratio = model.log_sum_exp - target.log_sum_exp
        weight = self.data.weight.unsqueeze(-1).double()
        numbers = model.numbers(t.score, t.score_rest, t.mean_v, t.top_v)
        numbers += target.numbers(t.target_score, t.target_score_rest, t.target_mean_v, t.target_top_v)
        surplus = torch.zeros_like(weight) if self.data.share_surplus is None else self.data.share_surplus
        numbers += [log_ratio, self._log_sum_exp(), weight, surplus]
        self.numbers = torch.stack(numbers).to(self.data.weight.dtype)
        self.top = torch.stack([torch.where(side.rest < 1, side.top, -1).squeeze(-1) for side in (model, target)])

    def losses(self) -> Tensor:  # noqa: D102
        values = self.totals.value
        if not self.loss.is_cross_entropy:
            # The rounding of both log-sum-exps leaves Σ p − Σ y = σ, which shifts every log-ratio: σ²/2 of the value.
            share = self.loss.divergence.curvature_at_agreement
            values = (values - share * self.totals.surplus.square() / 2).clamp(min=0)
        if self.loss.z_loss:
            values = values + self.loss.z_loss * self._log_sum_exp().square()
        return values.squeeze(-1)

    def _collision(self) -> Tensor:
        """Return ``log Σ p²``, with a class of more than half of the mass apart."""
        rest, square = self.model.rest, self.totals.square
        beside_top = torch.log1p(square * (1 + rest).square()) - 2 * torch.log1p(rest)
        return torch.where(rest < 1, beside_top, torch.log(square))

    def _log_sum_exp(self) -> Tensor:
        """Return the model's log-sum-exp, including what was taken off its logits."""
        lse, offset = self.model.log_sum_exp, self.data.offset
        return lse if offset is None else lse + offset

    # --- residuals ---------------------------------------------------------------------------------------------------

    def residuals(self, block: Block, fresh: bool) -> Residuals:  # noqa: D102
        tile = self._tile(block)
        tangents = self.tiles.residuals(tile, wants_tangents=self.data.wants_tangents)
        if tangents is not None:
            self.tangent = self.tangent + tangents
        assert tile.out is not None
        return Residuals(tile.out, tile.target_out, tile.v_out, tile.target_v_out)

    def tangents(self, group: ProcessGroup | None) -> Tensor:  # noqa: D102
        sum_over([self.tangent], group)
        return self.tangent.squeeze(-1)

    def _tile(self, block: Block, *, along_column: bool = False) -> DenseTile:
        """Bundle the tensors of a block; ``along_column`` if its ``v`` is the change along a column."""
        assert block.target is not None
        data, loss = self.data, self.loss
        own, share = data.factors_of(block.classes) if loss.is_cross_entropy else (None, None)
        whole_rows = not data.cuts_classes and loss.processes is None
        v = block.v if along_column or data.has_direction else None
        return DenseTile(
            loss, data.class_count, data.cached, wants_target=data.wants_target or data.wants_tangents,
            knows_scores=data.has_direction or bool(self.matrix) or not whole_rows,
            z=block.z, target=block.target, v=v, target_v=block.target_v,
            out=block.z if block.out is None else block.out, v_out=v if block.v_out is None else block.v_out,
            target_out=block.target_out, target_v_out=block.target_v_out,
            seen=None if data.cuts_classes else block.raw, raw=block.raw, q=block.q, residual=block.residual,
            class_weight=own, class_share=share, masks_share=data.share_surplus is not None,
            top=None if self.top is None else self.top - block.classes.start, numbers=self.numbers,
        )  # fmt: skip

    # --- second order ------------------------------------------------------------------------------------------------

    @staticmethod
    def needs_q(divergence: Divergence, matrix: str) -> bool:
        """Return whether ``q`` is no multiple of ``p``."""
        if divergence.hessian_is_fisher or matrix == FISHER:
            return False
        return matrix == HESSIAN or not divergence.gauss_newton_is_fisher

    @property
    def has_q(self) -> bool:
        """Whether the matrix, if there is one, has a ``q`` that is no multiple of ``p``."""
        return bool(self.matrix) and self.needs_q(self.loss.divergence, self.matrix)

    def prepare_columns(self) -> None:
        """Form ``Σ q``, and the factor of ``p`` that ``q`` is otherwise."""
        score = self.totals.score
        mass = -score if self.loss.is_cross_entropy else torch.ones_like(score)
        # Σ q is Σ c − S of a Hessian with q = c − p S, and of a Gauss-Newton matrix with q = c − s.
        self.factor, self.total = mass, self.totals.curve - score if self.has_q else mass
        if self.loss.z_loss and self.matrix != FISHER:
            lse = self._log_sum_exp()
            lse = lse if self.matrix == HESSIAN else lse.clamp(min=0)
            self.factor = mass + 2 * self.loss.z_loss * lse
            self.total = mass + 2 * self.loss.z_loss * (lse + 1)
        self.sums = defaultdict(lambda: (torch.zeros_like(self.total),) * 3)

    def prepare_block(self, block: Block, fresh: bool, again: bool = False) -> None:
        """Replace ``z`` by ``p``, and write ``q`` and the residual into the block's buffers."""
        self.tiles.prepare(self._tile(block), self.matrix)

    def accumulate_column(self, block: Block, number: int) -> None:  # noqa: D102
        sums = self.tiles.accumulate_column(self._tile(block, along_column=True)).double()
        self.sums[number] = tuple(a + b for a, b in zip(self.sums[number], sums, strict=True))

    def multiply_column(self, block: Block, number: int) -> None:  # noqa: D102
        mean_rest, moment, top_v = self.sums[number]
        mean, top_u = self.model.mean_and_top(mean_rest, top_v)
        moment = self.factor * mean if block.q is None else moment
        numbers = torch.stack([mean, top_u, moment - self.total * mean, self.factor])
        self.tiles.multiply_column(self._tile(block, along_column=True), numbers)

    def diagonal(self, block: Block) -> None:  # noqa: D102
        tile = self._tile(block, along_column=True)
        self.tiles.diagonal(tile, self.factor, self.total, self.model.complement)
