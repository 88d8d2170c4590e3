"""Targets that speak of every class, where a tile holds only part of a row.

Sweep 0 gathers the log-sum-exps, sweep 1 what DESIGN's formulas sum over a row, and for a Hessian product sweep 2 the
sum of the changes; then every block can form its residuals

    g = s − p S,     ġ = c ⊙ u + x ⊙ u_y − p Σ(c ⊙ u + x ⊙ u_y) − p ⊙ u S.

The cross-entropy is the member ``φ = −y log p`` with ``s = −y``, ``c = 0``, ``x = −y``; seen from the target's logits,
``s = c = −y log p``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from softcurve.head.kernel import (
    Block,
    CurvatureBlock,
    CurvatureKernel,
    Kernel,
    Residuals,
    Statistics,
    first_of_largest,
)
from softcurve.head.target import DenseTarget
from softcurve.losses.divergences import Divergence, Pair
from softcurve.losses.rows import (
    FISHER,
    HESSIAN,
    divergence_second_order,
)
from softcurve.processes import max_over, sum_over


class _Softmax:
    """The running softmax of rows whose classes come in blocks."""

    def __init__(self, rows: int, device: torch.device) -> None:
        self.offset = torch.full((rows, 1), -math.inf, dtype=torch.float64, device=device)
        self.rest = torch.zeros_like(self.offset)  # Σ e^{z − offset} but for one class of the largest logit
        self.top = torch.zeros((rows, 1), dtype=torch.int64, device=device)

    def absorb(self, rows: slice, z: Tensor, first: int) -> None:
        """Take in the logits of a block that starts at class ``first``."""
        top, at = z.max(-1, keepdim=True)
        finite = torch.where(top == -math.inf, 0.0, top)
        rest = (z - finite).exp_().scatter_(-1, at, 0.0).sum(-1, keepdim=True).double()
        rest = torch.where(top < math.inf, rest, math.nan)  # also of one class alone, and where a maximum loses NaN
        top = top.double()
        old = self.offset[rows]
        higher = top > old
        new = torch.maximum(top, old)
        safe = torch.where(new == -math.inf, 0.0, new)
        here, before = torch.exp(top - safe), torch.exp(old - safe)
        # The lower of the two tops joins the rest.
        lower = torch.where(higher, before, here)
        self.rest[rows] = rest * here + self.rest[rows] * before + lower
        self.offset[rows] = new
        self.top[rows] = torch.where(higher, at + first, self.top[rows])

    @staticmethod
    def merge(sides: Sequence[_Softmax], group: ProcessGroup) -> None:
        """Over the processes. The class kept apart is that of one of them, and elsewhere -1."""
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

    def log_sum_exp(self, rows: slice | None = None) -> Tensor:
        """``(r, 1)``, float64."""
        rows = slice(None) if rows is None else rows
        return self.offset[rows] + torch.log1p(self.rest[rows])

    def log_probabilities(self, rows: slice, z: Tensor) -> Tensor:
        """Of a block."""
        offset = torch.where(self.offset[rows] == -math.inf, 0.0, self.offset[rows])
        return (z - offset.to(z.dtype)) - torch.log1p(self.rest[rows]).to(z.dtype)

    def is_top(self, rows: slice, classes: slice) -> Tensor:
        """The place of the kept-apart class of confident rows in a block, as ``(row, column)`` indices."""
        top = self.top[rows].squeeze(-1) - classes.start
        here = (top >= 0) & (top < classes.stop - classes.start) & (self.rest[rows].squeeze(-1) < 1)
        row = here.nonzero().squeeze(-1)
        return torch.stack([row, top[row]])

    def complement(self, rows: slice) -> Tensor:
        """``1 − p_top``."""
        return self.rest[rows] / (1 + self.rest[rows])


class _Terms(NamedTuple):
    """One block of one side, elementwise: its score, curve and cross term."""

    p: Tensor
    score: Tensor
    curve: Tensor
    cross: Tensor


class _Side:
    """What one side's rows sum up to."""

    def __init__(self, rows: int, device: torch.device) -> None:
        self.softmax = _Softmax(rows, device)
        zeros = torch.zeros((rows, 1), dtype=torch.float64, device=device)
        self.score, self.score_rest, self.mean_v, self.change = (zeros.clone() for _ in range(4))

    def gather(self, rows: slice, classes: slice, terms: _Terms, v: Tensor | None) -> None:
        """Sweep 1."""
        total = terms.score.sum(-1, keepdim=True).double()
        self.score[rows] += total
        row, column = self.softmax.is_top(rows, classes)
        without = terms.score.clone()
        without[row, column] = 0.0
        self.score_rest[rows] += without.sum(-1, keepdim=True).double()
        if v is not None:
            self.mean_v[rows] += (terms.p * torch.where(terms.p == 0, 0.0, v)).sum(-1, keepdim=True).double()

    def sums(self) -> list[Tensor]:
        """Of sweep 1."""
        return [self.score, self.score_rest, self.mean_v]

    def centred(self, rows: slice, v: Tensor | None, like: Tensor) -> Tensor:
        """``u = v − p·v``."""
        return torch.zeros_like(like) if v is None else v - self.mean_v[rows].to(v.dtype)

    def changes(self, terms: _Terms, u: Tensor, u_other: Tensor) -> Tensor:
        """``c ⊙ u + x ⊙ u_y``."""
        return terms.curve * u + terms.cross * u_other

    def gradient(self, rows: slice, classes: slice, terms: _Terms) -> Tensor:
        """``s − p S``; of a class above one half as minus the sum of all others."""
        dtype = terms.p.dtype
        gradient = terms.score - terms.p * self.score[rows].to(dtype)
        row, column = self.softmax.is_top(rows, classes)
        own = self.score[rows] * self.softmax.complement(rows) - self.score_rest[rows]
        gradient[row, column] = own.squeeze(-1)[row].to(dtype)
        return gradient

    def product(self, rows: slice, terms: _Terms, change: Tensor, u: Tensor) -> Tensor:
        """The change of :meth:`gradient`."""
        total, score = self.change[rows].to(u.dtype), self.score[rows].to(u.dtype)
        return change - terms.p * total - terms.p * u * score


@dataclass
class DenseKernel(Kernel):
    """Three sweeps at most, whatever the loss."""

    def __post_init__(self) -> None:
        rows, device = len(self.data.weight), self.data.weight.device
        self.sweeps = 3 if self.data.has_direction else 2
        self.map = DenseTarget(self.loss, self.data)
        self.model, self.target = _Side(rows, device), _Side(rows, device)
        self.by_logits = self.loss.target != "probabilities" or not self.loss.is_cross_entropy
        zeros = torch.zeros((rows, 1), dtype=torch.float64, device=device)
        self.values, self.information, self.tangent = zeros.clone(), zeros.clone(), zeros.clone()
        self.surplus = zeros.clone()  # Σ (p − y)
        self.best = torch.full((rows, 1), -math.inf, dtype=torch.float64, device=device)
        self.label = torch.zeros((rows, 1), dtype=torch.int64, device=device)
        self.predicted: Tensor | None = None  # the largest class of all processes

    def log_sum_exp(self, rows: slice | None = None) -> Tensor:
        """The model's, ``(r, 1)``, with what was taken off its logits."""
        lse, offset = self.model.softmax.log_sum_exp(rows), self.data.offset
        return lse if offset is None else lse + offset[slice(None) if rows is None else rows]

    def losses(self) -> Tensor:  # noqa: D102
        values = self.values
        if not self.loss.is_cross_entropy:
            # The rounding of both log-sum-exps leaves Σ p − Σ y = σ, which shifts every log-ratio: σ²/2 of the value.
            share = self.loss.divergence.curvature_at_agreement
            values = (values - share * self.surplus.square() / 2).clamp(min=0)
        if self.loss.z_loss:
            values = values + self.loss.z_loss * self.log_sum_exp().square()
        return values.squeeze(-1)

    def tangents(self, group: ProcessGroup | None) -> Tensor:  # noqa: D102
        if group is not None:
            sum_over([self.tangent], group)
        return self.tangent.squeeze(-1)

    def reduce_over(self, number: int, group: ProcessGroup) -> None:  # noqa: D102
        sides = [self.model, self.target] if self.by_logits else [self.model]
        if number == 0:
            if self.data.wants_stats:
                self.predicted = first_of_largest(self.model.softmax.offset, self.model.softmax.top, group, self.data)
            _Softmax.merge([side.softmax for side in sides], group)
        elif number == 1:
            sum_over([self.values, self.surplus, self.information, *(s for side in sides for s in side.sums())], group)
            if self.data.wants_stats:
                self.label = first_of_largest(self.best, self.label, group, self.data)
        else:
            sum_over([self.model.change, self.target.change], group)

    def prepare_residuals(self) -> None:  # noqa: D102
        pass  # the sweeps have all of it

    def finish(self, number: int) -> None:  # noqa: D102
        if number == 0:  # a row without a class has no softmax
            for side in (self.model, self.target) if self.by_logits else (self.model,):
                masked = side.softmax.offset == -math.inf
                side.softmax.rest = torch.where(masked, math.nan, side.softmax.rest)
        if number == 1 and self.data.wants_stats:
            predicted = self.model.softmax.top if self.predicted is None else self.predicted
            columns = self.log_sum_exp(), self.information, predicted, self.label
            self.statistics = Statistics(*(column.squeeze(-1) for column in columns))

    def accumulate(self, number: int, block: Block) -> None:  # noqa: D102
        for rows in self.groups(block):
            if number == 0 or self.data.cuts_classes:
                self.map_logits(block, rows)
            z, given = block.z[rows], block.target_of(rows)
            if number == 0:
                self.model.softmax.absorb(rows, z, block.classes.start)
                if self.by_logits:
                    self.target.softmax.absorb(rows, self._target_logits(given), block.classes.start)
                continue
            pair, model, target = self._terms(rows, block, z, given)
            v, target_v = self._directions(block, rows, given)
            if number == 1:
                self._gather(rows, block.classes, z, given, pair, model, target, v, target_v)
            else:
                u, u_y = self.model.centred(rows, v, z), self._target_centred(rows, target_v, z)
                for side, terms, own, other in ((self.model, model, u, u_y), (self.target, target, u_y, u)):
                    side.change[rows] += side.changes(terms, own, other).sum(-1, keepdim=True).double()

    def residuals(self, block: Block, fresh: bool) -> Residuals:  # noqa: D102
        for rows in self.groups(block):
            if fresh:
                self.map_logits(block, rows)
            self._residual(block, rows)
        return Residuals(block.z, block.target_out, block.v, block.target_v_out)

    # --- one group of rows -------------------------------------------------------------------------------------------

    def _target_logits(self, given: Tensor) -> Tensor:
        return given if self.loss.is_cross_entropy else self.map.forward(given)

    def _directions(self, block: Block, rows: slice, given: Tensor) -> tuple[Tensor | None, Tensor | None]:
        v = None if block.v is None else block.v[rows]
        if block.target_v is None:
            return v, None
        target_v = block.target_v[rows]
        return v, target_v if self.loss.is_cross_entropy else self.map.direction(given, target_v)

    def _target_centred(self, rows: slice, v: Tensor | None, like: Tensor) -> Tensor:
        if v is not None and not self.by_logits:
            return v  # of probabilities themselves
        return self.target.centred(rows, v, like)

    def _terms(self, rows: slice, block: Block, z: Tensor, given: Tensor) -> tuple[Pair, _Terms, _Terms]:
        log_p = self.model.softmax.log_probabilities(rows, z)
        p = log_p.exp()
        if self.loss.is_cross_entropy:
            return self._cross_entropy_terms(rows, block.classes, p, log_p, given)
        logits = self._target_logits(given)
        log_y = self.target.softmax.log_probabilities(rows, logits)
        y = log_y.exp()
        both_masked = (log_p == -math.inf) & (log_y == -math.inf)
        # The difference of the logits is exact where they nearly agree, as that of two log-probabilities is not; where
        # the offsets of the rows differ it is rounded at the size of the offsets.
        constant = self.model.softmax.log_sum_exp(rows) - self.target.softmax.log_sum_exp(rows)
        offsets_agree = (self.model.softmax.offset[rows] - self.target.softmax.offset[rows]).abs() < 1
        ratio = torch.where(offsets_agree, (z - logits) - constant.to(z.dtype), log_p - log_y)
        ratio = torch.where(both_masked, 0.0, ratio)
        near = torch.where(ratio.abs() < 0.5, y * torch.expm1(ratio.clamp(-0.5, 0.5)), p - y)
        pair = Pair(p, y, ratio, near)
        return pair, _of(self.loss.divergence, pair), _of(self.loss.divergence.exchanged(), pair.exchanged())

    def _cross_entropy_terms(
        self, rows: slice, classes: slice, p: Tensor, log_p: Tensor, given: Tensor
    ) -> tuple[Pair, _Terms, _Terms]:
        weight, uniform = self.data.weight_of(classes), self.map.uniform(classes)
        y0 = self.target.softmax.log_probabilities(rows, given).exp() if self.by_logits else given
        own = y0 if self.loss.smoothing == 0 else (1 - self.loss.smoothing) * y0
        own = own if weight is None else own * weight
        y = own if uniform is None else own + uniform
        information = torch.where(own == 0, 0.0, own * -log_p)
        model = _Terms(p, -y, torch.zeros_like(p), -own)
        if self.by_logits:
            return Pair(p, y, log_p, own), model, _Terms(y0, information, information, -own)
        # Probabilities as they are: ∂L/∂y = −w log p, with no softmax around.
        factor = (
            torch.full_like(p, 1 - self.loss.smoothing)
            if weight is None
            else ((1 - self.loss.smoothing) * weight).expand_as(p)
        )
        zero = torch.zeros_like(p)
        model = model._replace(cross=-factor)
        masked = (log_p == -math.inf) & (given == 0)
        return Pair(p, y, log_p, own), model, _Terms(zero, torch.where(masked, 0.0, factor * -log_p), zero, -factor)

    def _gather(
        self,
        rows: slice,
        classes: slice,
        z: Tensor,
        given: Tensor,
        pair: Pair,
        model: _Terms,
        target: _Terms,
        v: Tensor | None,
        target_v: Tensor | None,
    ) -> None:
        self.model.gather(rows, classes, model, v)
        if self.by_logits:
            self.target.gather(rows, classes, target, target_v)
        if self.loss.is_cross_entropy:
            value = torch.where(pair.y == 0, 0.0, pair.y * -pair.log_ratio).sum(-1)
        else:
            value = self.loss.divergence.value(pair)
            self.surplus[rows] += pair.difference.sum(-1, keepdim=True).double()
        self.values[rows] += value.double().unsqueeze(-1)
        if self.data.wants_stats:
            finite = torch.where(model.p == 0, 0.0, self.model.softmax.log_probabilities(rows, z))
            self.information[rows] -= (model.p * finite).sum(-1, keepdim=True).double()
            best, at = given.max(-1, keepdim=True)
            better = best.double() > self.best[rows]
            self.best[rows] = torch.where(better, best.double(), self.best[rows])
            self.label[rows] = torch.where(better, at + classes.start, self.label[rows])

    def _residual(self, block: Block, rows: slice) -> None:
        z, given = block.z[rows], block.target_of(rows)
        _, model, target = self._terms(rows, block, z, given)
        v, target_v = self._directions(block, rows, given)
        weight = self.data.weight[rows].to(z.dtype).unsqueeze(-1)
        gradient = self.model.gradient(rows, block.classes, model)
        in_target = self.target.gradient(rows, block.classes, target) if self.by_logits else target.score
        lse = self.log_sum_exp(rows).to(z.dtype)
        if self.loss.z_loss:
            gradient = gradient + 2 * self.loss.z_loss * lse * model.p
        masked = z == -math.inf
        gradient = torch.where(masked, 0.0, gradient)
        if block.v is not None:
            u, u_y = self.model.centred(rows, v, z), self._target_centred(rows, target_v, z)
            product = self.model.product(rows, model, self.model.changes(model, u, u_y), u)
            if self.loss.z_loss:
                product = product + 2 * self.loss.z_loss * model.p * (lse * u + self.model.mean_v[rows].to(z.dtype))
            change = self.target.changes(target, u_y, u)
            in_target_v = self.target.product(rows, target, change, u_y) if self.by_logits else change
            if self.data.wants_tangents:
                self._add_tangents(rows, gradient, v, in_target, target_v)
            mapped_v = block.v[rows].clone() if block.raw is not None else None
            block.v[rows].copy_(weight * torch.where(masked, 0.0, product))
            if block.target_v_out is not None and block.target_v is not None:
                if not self.loss.is_cross_entropy:
                    in_target_v = self.map.product(given, in_target, in_target_v, block.target_v[rows])
                block.target_v_out[rows] = weight * in_target_v
        else:
            mapped_v = None
        z.copy_(weight * gradient)
        if block.target_out is not None:
            if not self.loss.is_cross_entropy:
                in_target = self.map.gradient(given, in_target)
            block.target_out[rows] = weight * in_target
        self.unmap_residuals(block, rows, mapped_v)

    def _add_tangents(
        self, rows: slice, gradient: Tensor, v: Tensor | None, in_target: Tensor, target_v: Tensor | None
    ) -> None:
        if v is not None:
            self.tangent[rows] += (gradient * v).sum(-1, keepdim=True).double()
        if target_v is not None:
            self.tangent[rows] += (in_target * target_v).sum(-1, keepdim=True).double()


def _of(divergence: Divergence, pair: Pair) -> _Terms:
    return _Terms(pair.p, divergence.score(pair), divergence.curve(pair), divergence.cross(pair))


@dataclass
class DenseCurvature(DenseKernel, CurvatureKernel):
    """``z`` holds ``p``; ``q`` is a multiple of it, or has a buffer of its own."""

    @staticmethod
    def needs_q(divergence: Divergence, matrix: str) -> bool:
        """Whether ``q`` is no multiple of ``p``."""
        if divergence.hessian_is_fisher or matrix == FISHER:
            return False
        return matrix == HESSIAN or not divergence.gauss_newton_is_fisher

    def __post_init__(self) -> None:
        super().__post_init__()
        self.total = torch.zeros_like(self.values)  # Σ q

    def accumulate(self, number: int, block: Block) -> None:
        """Sweep 1: the sums of score and curve."""
        if number == 0:
            super().accumulate(0, block)
            return
        for rows in self.groups(block):
            if self.data.cuts_classes:
                self.map_logits(block, rows)
            pair, model, _ = self._terms(rows, block, block.z[rows], block.target_of(rows))
            self.model.gather(rows, block.classes, model, None)
            if not self.loss.is_cross_entropy:
                q = divergence_second_order(self.loss.divergence, self.matrix, pair, pair.p.new_zeros(1))
                self.total[rows] += q.sum(-1, keepdim=True).double()

    def reduce_over(self, number: int, group: ProcessGroup) -> None:  # noqa: D102
        super().reduce_over(number, group)
        if number == 1 and not self.loss.is_cross_entropy:
            sum_over([self.total], group)

    def reduce_prepared(self, group: ProcessGroup) -> None:
        """Nothing: the sweeps know what is kept apart."""

    def no_sums(self) -> tuple[Tensor, ...]:  # noqa: D102
        return tuple(torch.zeros_like(self.total) for _ in range(3))

    def prepare_columns(self) -> None:
        """``q`` as a multiple of ``p``, and its sum."""
        self.coefficient = torch.ones_like(self.total)
        if self.loss.is_cross_entropy:
            self.coefficient = -self.model.score
            self.total = self.coefficient
            if self.loss.z_loss and self.matrix != FISHER:
                lse = self.log_sum_exp()
                lse = lse if self.matrix == HESSIAN else lse.clamp(min=0)
                self.coefficient = self.coefficient + 2 * self.loss.z_loss * lse
                self.total = self.total + 2 * self.loss.z_loss * (lse + 1)
        elif not self.needs_q(self.loss.divergence, self.matrix):
            self.total = self.coefficient
        elif self.matrix == HESSIAN:
            self.total = self.total - self.model.score

    def prepare_block(self, block: CurvatureBlock, fresh: bool, again: bool = False) -> None:  # noqa: D102
        for rows in self.groups(block):
            if fresh:
                self.map_logits(block, rows)
            z = block.z[rows]
            pair, model, _ = self._terms(rows, block, z, block.target_of(rows))
            if block.residual is not None:
                gradient = self.model.gradient(rows, block.classes, model)
                if self.loss.z_loss:
                    lse = self.log_sum_exp(rows).to(z.dtype)
                    gradient = gradient + 2 * self.loss.z_loss * lse * model.p
                gradient = torch.where(z == -torch.inf, 0.0, gradient)
                slope = self.slope(block, rows)
                block.residual[rows] = gradient if slope is None else gradient * slope
            if block.q is not None:
                score = self.model.score[rows].to(z.dtype)
                q = divergence_second_order(self.loss.divergence, self.matrix, pair, score)
                block.q[rows] = torch.where(pair.p == 0, 0.0, q)
            z.copy_(pair.p)

    def accumulate_column(self, block: CurvatureBlock, number: int) -> None:  # noqa: D102
        assert block.v is not None
        mean, moment, top = (torch.zeros_like(self.total) for _ in range(3))
        for rows in self.groups(block):
            p, v, slope = block.z[rows], block.v[rows], self.slope(block, rows)
            v = v if slope is None else v * slope
            row, column = self.model.softmax.is_top(rows, block.classes)
            along = p * v
            along[row, column] = 0.0
            mean[rows] = along.sum(-1, keepdim=True)
            top[rows][row, 0] = v[row, column].double()
            if block.q is not None:
                moment[rows] = torch.mul(block.q[rows], v, out=along).sum(-1, keepdim=True)
        found: tuple[Tensor, ...] = (mean, moment, top)
        if number in self.sums:
            found = tuple(before + here for before, here in zip(self.sums[number], found, strict=True))
        self.sums[number] = found

    def multiply_column(self, block: CurvatureBlock, number: int) -> None:  # noqa: D102
        assert block.v is not None
        others, moment, top = self.sums[number]  # Σ_{k≠top} p v, Σ q v, v_top
        complement = self.model.softmax.complement(slice(None))
        mean = others + (1 - complement) * top
        if block.q is None:
            moment = self.coefficient * mean
        rest = moment - self.total * mean
        apart = top * complement - others  # v_top − p·v
        for rows in self.groups(block):
            p, v, dtype = block.z[rows], block.v[rows], block.v.dtype
            bent, slope = self.bent(block, rows, v), self.slope(block, rows)
            if slope is not None:
                v.mul_(slope)
            v.sub_(mean[rows].to(dtype))
            row, column = self.model.softmax.is_top(rows, block.classes)
            v[row, column] = apart[rows].squeeze(-1)[row].to(dtype)
            if block.q is None:
                # p ⊙ (coefficient (v − mean) − rest)
                v.mul_(self.coefficient[rows].to(dtype)).sub_(rest[rows].to(dtype)).mul_(p)
            else:
                v.mul_(block.q[rows]).addcmul_(p, rest[rows].to(dtype), value=-1)
            self._finish(v, slope, bent)

    def diagonal(self, block: CurvatureBlock) -> None:  # noqa: D102
        assert block.v is not None
        for rows in self.groups(block):
            p, v, dtype = block.z[rows], block.v[rows], block.v.dtype
            q = self.coefficient[rows].to(dtype) * p if block.q is None else block.q[rows]
            # q (1 − p) − p (q − total p), with 1 − p of a class above one half as the sum of all others.
            rest = 1 - p
            row, column = self.model.softmax.is_top(rows, block.classes)
            rest[row, column] = self.model.softmax.complement(rows)[row, 0].to(dtype)
            torch.mul(q, rest, out=v)
            v.sub_((q - self.total[rows].to(dtype) * p).mul_(p))
            slope = self.slope(block, rows)
            if slope is not None:
                v.mul_(slope)
            self._finish(v, slope, self.bent(block, rows, None))

    def to_probabilities(self, block: CurvatureBlock) -> None:  # noqa: D102
        pass  # it is there

    def sum_of_q(self) -> Tensor:  # noqa: D102
        return self.total

    @staticmethod
    def _finish(v: Tensor, slope: Tensor | None, bent: Tensor | None) -> None:
        if slope is not None:
            v.mul_(slope)
        if bent is not None:
            v.add_(bent)
