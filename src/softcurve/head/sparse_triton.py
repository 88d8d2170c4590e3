"""Sparse targets with the elementwise work of a tile in Triton."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from softcurve.head.backends import kernels
from softcurve.head.kernel import (
    Block,
    CurvatureBlock,
    Residuals,
)
from softcurve.head.sparse import NO_MASS, SparseKernel
from softcurve.head.sparse_curvature import SparseCurvature


@dataclass
class TritonSparseKernel(SparseKernel):
    """``single``: the block that a sweep sees is the whole of its rows here, and what it writes will be used."""

    single: bool = field(kw_only=True, default=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.own_raw = torch.full_like(self.own, torch.nan)  # before the soft cap
        self.v_raw = torch.zeros_like(self.own)
        self.written: Tensor | None = None  # the shift of what a sweep has left in a block's ``out``

    def accumulate(self, number: int, block: Block) -> None:  # noqa: D102
        lists, loss = kernels("sparse"), self.loss
        z, v, cap = block.z, block.v, loss.softcap
        present, at, places = self._places(block.classes)
        own = z.gather(-1, at).double()
        slope = loss.logit_map.slope(own)
        self.own_raw = torch.where(present, own, self.own_raw)
        own = loss.logit_map.value(own)
        self.own = torch.where(present, own, self.own)
        if v is not None:
            self.v_raw = torch.where(present, v.gather(-1, at).double(), self.v_raw)
            self.v_own = torch.where(present, self.v_raw * slope, self.v_own)
        lists.put(z, places, None)
        if self._at_once(block):
            shift, others = lists.exponentials(z, block.out, cap, loss.temperature)
            shift, others = shift.double().unsqueeze(-1), others.double().unsqueeze(-1)
            self._absorb(shift, others)
            self.written = shift
            return
        sums, best = lists.statistics(
            z,
            v,
            cap,
            loss.temperature,
            wants_stats=self.data.wants_stats,
            uniform_each=self._uniform_each(),
            class_weight=self._class_weight(block.classes),
        )
        shift, others = sums.shift.double().unsqueeze(-1), sums.total.double().unsqueeze(-1)
        risen, added = self._absorb(shift, others)
        if v is not None:
            self.v_others += sums.change.double().unsqueeze(-1) * added
        if self.data.wants_stats:
            assert best is not None
            self.moment += added * (sums.moment.double().unsqueeze(-1) + risen * others)
            self._observe_best(sums.shift.double(), best + block.classes.start, own, present)
        if loss.smoothing:
            self._absorb_uniform(block, sums, own, present, at)

    def reduce_over(self, number: int, group: ProcessGroup) -> None:  # noqa: D102
        super().reduce_over(number, group)
        self.lowered = None  # a tile holds logits, and ``written`` says what stands in its ``out``

    def prepare_residuals(self) -> None:  # noqa: D102
        self.gradient, self.target_gradient = self.coarse_gradient(self.data.weight.double())
        self.beta = self._of_others(self.gradient[:, -1:])
        if self.data.has_direction:
            self._differentiate()

    def residuals(self, block: Block, fresh: bool) -> Residuals:  # noqa: D102
        lists, loss = kernels("sparse"), self.loss
        z, v = block.z, block.v
        out = z if block.out is None else block.out
        v_out = v if block.v_out is None else block.v_out
        _, at, places = self._places(block.classes)
        slope = loss.logit_map.slope(self.own_raw) if loss.softcap is not None else 1.0
        masked = self.own_raw == -torch.inf
        listed = self.gradient[:, :-1]
        if self.written is not None and not fresh:
            # In multiples of β e^{shift here − shift}, unless that is too small to divide by.
            factor = self.beta * torch.exp(self.written - self.shift)
            safe = (factor.abs() > 1e-25) & ((listed / factor).abs() < 1e25).all(-1, keepdim=True)
            lists.rescale(out, torch.where(safe, 1.0, factor))
            self.row_factor = torch.where(safe, factor, 1.0)
            lists.put(out, places, torch.where(masked, 0.0, listed / self.row_factor * slope))
            return Residuals(out)
        if fresh:
            lists.put(z, places, None)
        lists.residual(
            z,
            v,
            out,
            v_out,
            (self.shift, self.alpha if v is not None else self.beta, self.beta, self.data.weight),
            loss.softcap,
            loss.temperature,
            uniform_each=self._uniform_each(),
            class_weight=self._class_weight(block.classes),
        )
        if loss.smoothing:
            listed = listed - self.data.weight.double().unsqueeze(-1) * self._uniform_at(block, at)
        if v is not None:
            assert v_out is not None
            product = self.product[:, :-1] * slope
            if loss.softcap is not None:
                bend = -2 / loss.softcap * torch.tanh(self.own_raw / loss.softcap)
                product = torch.where(masked, 0.0, product + bend * self.v_raw * slope * listed)
            lists.put(v_out, places, product)
        lists.put(out, places, listed if loss.softcap is None else torch.where(masked, 0.0, listed * slope))
        return Residuals(out, None, v_out, None)

    # --- parts -------------------------------------------------------------------------------------------------------

    def _places(self, classes: slice) -> tuple[Tensor, Tensor, Tensor]:
        """Which listed classes lie in a block, their places clamped to it, and as they are."""
        indices = self.data.indices
        assert indices is not None
        width = classes.stop - classes.start
        places = indices - classes.start
        return (places >= 0) & (places < width), places.clamp(0, max(width - 1, 0)), places

    def _at_once(self, block: Block) -> bool:
        """Whether the sweep may leave the residuals, but for a factor of each row and the listed classes."""
        plain = not (self.data.wants_stats or self.loss.smoothing) and block.v is None
        return plain and self.single and self.data.wants_gradient and block.out is not None

    def _absorb(self, shift: Tensor, others: Tensor) -> tuple[Tensor, Tensor]:
        """Take in a block's sum: how far its shift is above the one of all so far, and what sums are multiplied by."""
        merged, some = torch.maximum(self.shift, shift), shift != NO_MASS
        risen = torch.where(some, shift - merged, 0.0)
        added = torch.where(some, torch.exp(risen), 0.0)
        self._shift_to(merged)
        self.others += others * added
        return risen, added

    def _uniform_each(self) -> float:
        """``ε / C``, ``C`` counting every class there is."""
        return self.loss.smoothing / self.data.class_count if self.loss.smoothing else 0.0

    def _class_weight(self, classes: slice) -> Tensor | None:
        weight = self.data.weight_of(classes)
        return None if weight is None or not self.loss.smoothing else weight.float()

    def _uniform_at(self, block: Block, at: Tensor) -> Tensor:
        """``u`` of the listed classes."""
        weight = self._class_weight(block.classes)
        each = torch.full_like(self.own, self._uniform_each())
        return each if weight is None else each * weight[at].double()

    def _absorb_uniform(self, block: Block, sums: Any, own: Tensor, present: Tensor, at: Tensor) -> None:
        """``u·(z − shift)`` over every class, the listed ones included; infinite where a class of weight is masked."""
        u = torch.where(present, self._uniform_at(block, at), 0.0)
        shift = torch.where(self.shift == NO_MASS, 0.0, self.shift)
        # The kernel has seen the listed classes as masked ones.
        masked = sums.masked.double() > (u != 0).sum(-1)
        mass = sums.uniform_mass.double()
        here = sums.uniform.double() + mass * (sums.base.double() - shift.squeeze(-1))
        here = here + torch.where(u == 0, 0.0, u * (own - shift)).sum(-1)
        here = torch.where(masked, NO_MASS, here)
        self.uniform += here
        weight = self._class_weight(block.classes)
        width = block.classes.stop - block.classes.start
        each = self._uniform_each()
        self.uniform_mass = self.uniform_mass + (each * width if weight is None else each * weight.double().sum())
        if block.v is not None:
            self.v_uniform = self.v_uniform + sums.uniform_change.double()
            if self.loss.softcap is not None:  # the slope of a masked class is 0
                self.v_uniform = self.v_uniform + torch.where(u == 0, 0.0, u * self.v_own).sum(-1)

    def _observe_best(self, best: Tensor, at: Tensor, own: Tensor, present: Tensor) -> None:
        """The first class of the largest logit so far, unlisted or listed."""
        indices = self.data.indices
        assert indices is not None
        listed = torch.where(present, own, NO_MASS)
        top = listed.amax(-1, keepdim=True)
        first = torch.where(present & (listed == top), indices, torch.iinfo(torch.int64).max).amin(-1)
        for value, place in ((best, at), (top.squeeze(-1), first)):
            better = (value > self.best) | ((value == self.best) & (place < self.predicted) & (value > NO_MASS))
            self.best = torch.where(better, value, self.best)
            self.predicted = torch.where(better, place, self.predicted)


@dataclass
class TritonSparseCurvature(TritonSparseKernel, SparseCurvature):
    """Sweeps leave logits; :meth:`prepare_block` makes exponentials of them."""

    def prepare_block(self, block: CurvatureBlock, fresh: bool, again: bool = False) -> None:  # noqa: D102
        lists, loss = kernels("sparse"), self.loss
        _, _, places = self._places(block.classes)
        if fresh:
            lists.put(block.z, places, None)
        mass, rest, place = lists.prepare(block.z, block.raw, self.shift, loss.softcap, loss.temperature)
        if block.raw is not None:  # the listed classes stand there as masked ones
            lists.put(block.raw, places, self.own_raw)
        if not again:
            mass, rest = mass.double().unsqueeze(-1), rest.double().unsqueeze(-1)
            above = mass > 0.5 * self.others
            self.top = torch.where(above, place.unsqueeze(-1) + block.classes.start, self.top)
            self.top_mass = torch.where(above, mass, self.top_mass)
            self.rest += rest + torch.where(above, 0.0, mass)
        lists.put(block.z, self._top_place(block), torch.zeros_like(self.others))
        if block.residual is not None:
            self._leave_residual(block)

    def accumulate_column(self, block: CurvatureBlock, number: int) -> None:  # noqa: D102
        assert block.v is not None
        loss = self.loss
        present, at, _ = self._places(block.classes)
        own = torch.where(present, self._mapped(block, at), 0.0)
        others = kernels("sparse").gather(block.z, block.raw, block.v, loss.softcap, loss.temperature)
        place = self._top_place(block)
        inside = (place >= 0) & (place < block.z.shape[-1])
        top = torch.where(inside, self._mapped(block, place.clamp(0, block.z.shape[-1] - 1)), 0.0)
        found: tuple[Tensor, ...] = (own, others.double().unsqueeze(-1), top)
        if number in self.sums:
            found = tuple(before + here for before, here in zip(self.sums[number], found, strict=True))
        self.sums[number] = found

    def multiply_column(self, block: CurvatureBlock, number: int) -> None:  # noqa: D102
        assert block.v is not None
        lists, loss = kernels("sparse"), self.loss
        own, others, top = self.sums[number]
        mean = (others + self.top_mass * top) * self.inverse
        product = self.curvature.product(torch.cat([own, mean], -1))
        # e^z (α + β v) at an unlisted class, in multiples of the unit.
        alpha = (product[:, -1:] - self.kappa * mean) * self.inverse / self.unit
        beta = self.kappa * self.inverse / self.unit
        # q_top (M_o + κ (v_top − q·v)), with v_top − q·v from the others' sums
        apart = (top * self.rest - others) * self.inverse
        at_top = self.top_mass * self.inverse / self.unit * (product[:, -1:] + self.kappa * apart)
        residual = block.residual
        rows = (alpha, beta, 1 / self.unit)
        lists.multiply(block.z, block.raw, residual, block.v, rows, loss.softcap, loss.temperature)
        _, at, places = self._places(block.classes)
        place = self._top_place(block)
        listed = product[:, :-1] / self.unit
        if block.raw is not None:
            clamped = place.clamp(0, block.z.shape[-1] - 1)
            listed = listed * loss.logit_map.slope(block.raw.gather(-1, at).double())
            at_top = at_top * loss.logit_map.slope(block.raw.gather(-1, clamped).double())
        # Their exponentials are left out, so what stands there is what a cap's second derivative adds.
        lists.put(block.v, places, listed, add=True)
        lists.put(block.v, place, at_top, add=True)

    def _mapped(self, block: CurvatureBlock, at: Tensor) -> Tensor:
        """``m′ v`` of some classes, float64."""
        assert block.v is not None
        own = block.v.gather(-1, at).double()
        return own if block.raw is None else own * self.loss.logit_map.slope(block.raw.gather(-1, at).double())

    def _top_place(self, block: Block) -> Tensor:
        return torch.where(self.top < 0, -1, self.top - block.classes.start)

    def _leave_residual(self, block: CurvatureBlock) -> None:
        """``m′ g′``, not weighted, beside the exponentials."""
        assert block.residual is not None
        if block.z.device.type == "cpu":
            for rows in self.groups(block):
                self._put_residual(block, rows, block.residual[rows])
            return
        self._put_residual(block, slice(None), block.residual)
