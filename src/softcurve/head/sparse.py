"""Targets that name few classes: an index, or a list with all other classes as one outcome.

With ``o = log Σ_{unlisted} e^z`` the loss is a loss of the ``k + 1`` logits ``c = (z_listed, o)``, which
:mod:`softcurve.losses.rows` has in closed form. It is computed there in float64, which costs nothing beside ``C``
classes and leaves the rounding of the tile's one sum. With ``q = e^{z − o}``, the softmax over the unlisted,

    ∂L/∂z = G_o q,   its change along ż:  Ġ_o q + G_o q (ż − ȯ),   ȯ = q·ż,

at unlisted classes and ``G_k``, ``Ġ_k`` at listed ones. Label smoothing adds ``U lse − u·z`` with ``u = ε w / C``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from softcurve.head.kernel import Block, Kernel, Residuals, Statistics, first_of_largest
from softcurve.losses import softmax
from softcurve.losses.rows import DenseCrossEntropy, IndexCrossEntropy, LogitDivergence, RowLoss
from softcurve.losses.spec import LogitMap
from softcurve.processes import max_over, sum_over

# Where a row's largest logit lies between these, e^z itself is summed: one pass less, and no rounding of z − max.
DIRECT = (0.0, 30.0)
NO_MASS = -math.inf


@dataclass
class SparseKernel(Kernel):
    """Sweep 0: the listed logits and ``o``. Then the residual is a multiple of ``e^z``, but for the listed classes."""

    def __post_init__(self) -> None:
        indices = self.data.indices
        assert indices is not None
        rows, self.count = indices.shape
        zeros = torch.zeros((rows, 1), dtype=torch.float64, device=indices.device)
        self.shift = torch.full_like(zeros, NO_MASS)
        self.others, self.v_others = zeros, zeros.clone()  # Σ_{unlisted} e^{z − shift}, and the same sum with ż
        # NaN until a block has it: a class that is in none must not look like one.
        self.own, self.v_own = (zeros + math.nan).expand_as(indices), zeros.expand_as(indices)
        self.uniform, self.v_uniform = zeros.squeeze(-1).clone(), zeros.squeeze(-1).clone()  # u·(z − shift), u·ż
        self.uniform_mass: Tensor | float = 0.0
        self.lowered: Tensor | None = None  # e^{shift here − shift of all processes}, to multiply what a tile holds
        if self.data.wants_stats:
            self.moment = zeros.clone()  # Σ_{unlisted} e^{z − shift} (z − shift)
            self.best = torch.full_like(zeros.squeeze(-1), NO_MASS)
            self.predicted = torch.zeros_like(indices[:, 0])

    # --- the sweep ---------------------------------------------------------------------------------------------------

    def accumulate(self, number: int, block: Block) -> None:
        """Few operations look at the whole tile; what reads and writes each entry goes group by group."""
        z, v = block.z, block.v
        for rows in self.groups(block):
            self.map_logits(block, rows)
        present, where, at = self._listed(block.classes)
        own = z.gather(-1, at).double()
        self.own = own if where is None else torch.where(present, own, self.own)
        if v is not None:
            own_v = v.gather(-1, at).double()
            self.v_own = own_v if where is None else torch.where(present, own_v, self.v_own)
        uniform, mass, base = self._gather_uniform(block)
        if self.data.wants_stats:
            self._observe(z, block.classes.start)
        self._put(z, where, at, NO_MASS)
        # Of the unlisted: beside a listed class far above them they would be too small for float32.
        top = z.amax(-1, keepdim=True)
        direct = z.device.type == "cpu" and bool(DIRECT[0] <= top.amin()) and bool(top.amax() <= DIRECT[1])
        shift = torch.zeros_like(top) if direct else torch.where(top == -math.inf, 0.0, top)
        others, moment = torch.empty_like(top), torch.zeros_like(self.shift)
        for rows in self.groups(block):
            logits = z[rows] - shift[rows] if self.data.wants_stats else None
            mass_here = z[rows] if direct else z[rows].sub_(shift[rows])
            torch.sum(mass_here.exp_(), -1, keepdim=True, out=others[rows])
            if logits is not None:
                information = torch.where(z[rows] == 0, 0.0, z[rows] * logits)
                moment[rows] = information.sum(-1, keepdim=True).double()
        # A block without mass leaves the shift to others, which may lie anywhere.
        some = top != -math.inf
        merged = torch.maximum(self.shift, torch.where(some, shift, NO_MASS).double())
        risen = torch.where(some, shift.double() - merged, 0.0)
        added = torch.where(some, torch.exp(risen), 0.0)
        self._shift_to(merged)
        if v is not None:
            for rows in self.groups(block):
                change = (z[rows] * v[rows]).sum(-1, keepdim=True)
                self.v_others[rows] += change * added[rows]
        if self.data.wants_stats:
            self.moment += added * (moment + risen * others)
        self.others += others.double() * added
        if self.loss.smoothing:
            self.uniform += uniform + mass * (base.double() - _or_zero(self.shift)).squeeze(-1)
            self.uniform_mass = self.uniform_mass + mass

    def _shift_to(self, shift: Tensor) -> None:
        """Sums so far, relative to a ``shift`` that is no smaller."""
        some = self.shift != NO_MASS
        lowered = torch.where(some, self.shift - shift, 0.0)
        kept = torch.where(some, torch.exp(lowered), 0.0)
        if self.data.wants_stats:
            self.moment = kept * (self.moment + lowered * self.others)
        self.others, self.v_others = self.others * kept, self.v_others * kept
        if self.loss.smoothing:
            self.uniform += self.uniform_mass * (_or_zero(self.shift) - _or_zero(shift)).squeeze(-1)
        self.shift = shift

    def reduce_over(self, number: int, group: ProcessGroup) -> None:
        """The largest shift, then the sums, of which a listed logit has one term."""
        shift = self.shift.clone()
        max_over([shift], group)
        if self.data.wants_stats:
            self.predicted = first_of_largest(self.best, self.predicted, group, self.data)
        if not self.data.cuts_classes:
            self.lowered = torch.where(self.shift == NO_MASS, 0.0, torch.exp(self.shift - shift))
        self._shift_to(shift)
        indices = self.data.indices
        assert indices is not None
        here = (indices >= 0) & (indices < self.data.held)
        self.own, self.v_own = (torch.where(here, own, 0.0) for own in (self.own, self.v_own))
        sums = [self.own, self.others]
        if self.data.has_direction:
            sums += [self.v_own, self.v_others]
        if self.loss.smoothing:
            sums += [self.uniform, self.v_uniform] if self.data.has_direction else [self.uniform]
        if self.data.wants_stats:
            sums.append(self.moment)
        sum_over(sums, group)

    def _gather_uniform(self, block: Block) -> tuple[Tensor, Tensor | float, Tensor]:
        """``u·(z − base)`` of label smoothing in a block, ``Σ u`` and the base; ``u·ż`` on the way."""
        if not self.loss.smoothing:
            return self.uniform, 0.0, self.shift
        top = block.z.amax(-1, keepdim=True)
        base = torch.where(top == -math.inf, 0.0, top)
        u = self._smooth(block.classes, block.z)
        masks = bool((u == 0).any())  # a class of weight 0 has no part, also where it is masked

        def inner(z: Tensor) -> Tensor:
            return (torch.where(u == 0, 0.0, z) if masks else z) @ u

        for rows in self.groups(block):
            if block.v is not None:
                self.v_uniform[rows] += inner(block.v[rows]).double()
        parts = [inner(block.z[rows] - base[rows]).double() for rows in self.groups(block)]
        return torch.cat(parts), u.double().sum(), base

    def _listed(self, classes: slice, rows: slice | None = None) -> tuple[Tensor, Tensor | None, Tensor]:
        """Which listed classes lie in a block, where (``None``: all do), and their places in it."""
        indices = self.data.indices
        assert indices is not None
        rows = slice(None) if rows is None else rows
        places = indices[rows] - classes.start
        width = classes.stop - classes.start
        if width == self.data.class_count:
            return torch.ones_like(places, dtype=torch.bool), None, places
        present = (places >= 0) & (places < width)
        return present, present.nonzero(), places.clamp(0, width - 1)

    @staticmethod
    def _put(z: Tensor, where: Tensor | None, at: Tensor, values: Tensor | float) -> None:
        """``z[row, at] = values`` at the listed classes of this block."""
        if where is None:
            z.scatter_(-1, at, values if isinstance(values, float) else values.to(z.dtype))
            return
        row, slot = where.unbind(-1)
        z[row, at[row, slot]] = values if isinstance(values, float) else values[row, slot].to(z.dtype)

    def _smooth(self, classes: slice, z: Tensor) -> Tensor:
        """``u = ε w / C`` of a block."""
        each, weight = self.loss.smoothing / self.data.class_count, self.data.weight_of(classes)
        return z.new_full((z.shape[-1],), each) if weight is None else weight.to(z.dtype) * each

    def _smoothing_mass(self) -> Tensor | float:
        """``U = Σ u``."""
        weight = self.data.class_weight
        return self.loss.smoothing if weight is None else self.loss.smoothing * weight.double().mean()

    def _observe(self, z: Tensor, first: int) -> None:
        """The largest class so far."""
        best, at = z.max(-1)
        better = best.double() > self.best
        self.best = torch.where(better, best.double(), self.best)
        self.predicted = torch.where(better, at + first, self.predicted)

    # --- the rows ----------------------------------------------------------------------------------------------------

    def finish(self, number: int) -> None:
        """The loss of the coarse rows."""
        if self.loss.smoothing and self.loss.group is None:
            # A list of all classes has a common offset too, which u·z and U lse would each round in their own way.
            top = self.own.amax(-1, keepdim=True)
            self._shift_to(torch.where((self.shift == NO_MASS) & top.isfinite(), top, self.shift))
        self.shift = _or_zero(self.shift)
        self.row_loss, self.target = self._coarse_loss()
        # Relative to the shift, so that a common offset of the logits costs no digits; the z-loss wants them whole.
        whole = self.shift if self.data.offset is None else self.shift + self.data.offset
        offset = whole if self.loss.z_loss else torch.zeros_like(self.shift)
        others = torch.where(self.others > 0, torch.log(self.others), self.others + NO_MASS)
        self.coarse = torch.cat([self.own - self.shift, others], -1) + offset
        others = others + offset
        self.lse = softmax.softmax_rows(self.coarse).log_sum_exp - offset.squeeze(-1)
        if self.data.wants_stats:
            # The entropy of the coarse row, and of the unlisted classes among themselves.
            within = torch.where(self.others > 0, torch.log(self.others) - self.moment / self.others, 0.0)
            share = torch.softmax(self.coarse, -1)[:, -1:]
            entropy = softmax.entropy_rows(self.coarse) + (share * within).squeeze(-1)
            self.statistics = Statistics(self.lse + whole.squeeze(-1), entropy, self.predicted)

    def _coarse_loss(self) -> tuple[RowLoss, Tensor]:
        target = self.data.target
        if target is None:
            assert self.data.indices is not None
            return IndexCrossEntropy(LogitMap(), self.loss.z_loss), torch.zeros_like(self.data.indices[:, 0])
        if self.loss.is_cross_entropy:
            return DenseCrossEntropy(LogitMap(), self.loss.z_loss), target.double()
        return LogitDivergence(LogitMap(), divergence=self.loss.divergence), target.double()

    def losses(self) -> Tensor:  # noqa: D102
        rows = self.row_loss.value(self.coarse, self.target)
        if self.loss.smoothing:
            rows = rows + self._smoothing_mass() * self.lse - self.uniform
        return rows

    def coarse_gradient(self, weight: Tensor) -> tuple[Tensor, Tensor | None]:
        """In the coarse logits and in the target, times the rows' ``weight``."""
        wants_target = self.data.wants_target
        gradient, target = self.row_loss.gradient(weight, self.coarse, self.target, (True, wants_target))
        assert gradient is not None
        if self.loss.smoothing:
            gradient = gradient + (weight * self._smoothing_mass()).unsqueeze(-1) * torch.softmax(self.coarse, -1)
        return gradient, target

    # --- the residual ------------------------------------------------------------------------------------------------

    def prepare_residuals(self) -> None:
        """The gradient of the coarse rows."""
        self.gradient, self.target_gradient = self.coarse_gradient(self.data.weight.double())
        self.beta = self._of_others(self.gradient[:, -1:])
        self.folded = False
        if self.data.has_direction:
            self._differentiate()
        elif self.beta.device.type == "cpu":
            self._fold()

    def residuals(self, block: Block, fresh: bool) -> Residuals:  # noqa: D102
        if self.folded and not fresh and block.raw is None and not self.loss.smoothing:
            _, where, at = self._listed(block.classes)
            self._put(block.z, where, at, self.gradient[:, :-1] / self.beta)
            return Residuals(block.z)
        for rows in self.groups(block):
            if fresh:
                self._renew(block, rows)
            self._residual(block, rows)
        return Residuals(block.z, None, block.v, None)

    def _of_others(self, whole: Tensor) -> Tensor:
        """A gradient in ``o``, as a multiple of what a tile holds."""
        each = torch.where(self.others > 0, whole / self.others, 0.0)
        return each if self.lowered is None else each * self.lowered

    def _fold(self) -> None:
        """Leave ``G_o / Σ e^z`` to the products' small operands, unless it is too small to divide by."""
        listed = self.gradient[:, :-1] / self.beta
        self.folded = bool((listed.abs() < 1e30).all()) and bool((self.beta.abs() > 1e-25).all())
        if self.folded:
            self.row_factor = self.beta

    def _differentiate(self) -> None:
        """The change of the coarse gradient."""
        weight = self.data.weight.double()
        change = torch.where(self.others > 0, self.v_others / self.others, 0.0)
        self.direction = torch.cat([self.v_own, change], -1)
        target_v = None if self.data.target_v is None else self.data.target_v.double()
        product, self.target_product = self.row_loss.hessian_product(
            weight, self.coarse, self.target, self.direction, target_v
        )
        assert product is not None
        if self.loss.smoothing:
            mass = (weight * self._smoothing_mass()).unsqueeze(-1)
            product = product + mass * softmax.jacobian_product(self.coarse, self.direction)
        self.product = product
        others_change = product[:, -1:] - self.gradient[:, -1:] * change
        self.alpha = self._of_others(others_change)

    def tangents(self, group: ProcessGroup | None) -> Tensor:  # noqa: D102
        gradient, target = self.row_loss.gradient(
            torch.ones_like(self.lse), self.coarse, self.target, (True, self.data.target_v is not None)
        )
        assert gradient is not None
        total = _inner(gradient, self.direction)
        if target is not None and self.data.target_v is not None:
            total = total + _inner(target, self.data.target_v.double())
        if self.loss.smoothing:
            mean = _inner(torch.softmax(self.coarse, -1), self.direction)
            total = total + self._smoothing_mass() * mean - self.v_uniform
        return total

    def _renew(self, block: Block, rows: slice) -> None:
        """``z ← e^{z − shift}`` with 0 at the listed, of a block computed anew."""
        self.map_logits(block, rows)
        z = block.z[rows]
        z.sub_(self.shift[rows].to(z.dtype)).exp_()
        _, where, at = self._listed(block.classes, rows)
        self._put(z, where, at, 0.0)

    def _residual(self, block: Block, rows: slice) -> None:
        z, v = block.z[rows], None if block.v is None else block.v[rows]
        _, where, at = self._listed(block.classes, rows)
        listed = self.gradient[rows, :-1]
        weight = self.data.weight[rows].to(z.dtype)
        mapped_v = v.clone() if v is not None and block.raw is not None else None
        if v is not None:
            v.mul_(self.beta[rows].to(z.dtype)).add_(self.alpha[rows].to(z.dtype)).mul_(z)
            self._put(v, where, at, self.product[rows, :-1])
        if not self.folded:
            z.mul_(self.beta[rows].to(z.dtype))
        if self.loss.smoothing:
            u = self._smooth(block.classes, z)
            listed = listed - self.data.weight[rows].double().unsqueeze(-1) * u[at].double()
            z.addr_(weight / self.beta[rows, 0].to(z.dtype) if self.folded else weight, u, alpha=-1)
        self._put(z, where, at, listed / self.beta[rows] if self.folded else listed)
        self.unmap_residuals(block, rows, mapped_v)


def _or_zero(shift: Tensor) -> Tensor:
    """What sums are relative to: 0 as long as there is no class with mass."""
    return torch.where(shift == NO_MASS, 0.0, shift)


def _inner(a: Tensor, b: Tensor) -> Tensor:
    """``Σ a b`` of each row, where an infinite gradient that meets no change counts as nothing."""
    return torch.where(b == 0, 0.0, a * b).sum(-1)
