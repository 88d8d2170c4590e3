"""The kernels of :mod:`softcurve.head.curvature_kernels` with what every column passes through in Triton.

A column costs two launches: one that reads its change of the logits beside what the columns share, and one that
replaces the change by the product. Diagonals and coefficients, wanted once, stay with the parents.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from softcurve.head.curvature_kernels import CurvatureBlock, DenseCurvature, ListCurvature
from softcurve.head.fused import FusedBlocks, FusedList, kernels, with_strides
from softcurve.head.kernel import Block
from softcurve.losses.rows import GAUSS_NEWTON, HESSIAN


@dataclass
class FusedListCurvature(FusedList, ListCurvature):
    """Sweeps leave logits; :meth:`prepare` makes exponentials of them."""

    def prepare(self, block: CurvatureBlock, fresh: bool, again: bool = False) -> None:  # noqa: D102
        lists, loss = kernels("lists"), self.loss
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

    def gather(self, block: CurvatureBlock, number: int) -> None:  # noqa: D102
        assert block.v is not None
        loss = self.loss
        present, at, _ = self._places(block.classes)
        own = torch.where(present, self._mapped(block, at), 0.0)
        others = kernels("lists").gather(block.z, block.raw, block.v, loss.softcap, loss.temperature)
        place = self._top_place(block)
        inside = (place >= 0) & (place < block.z.shape[-1])
        top = torch.where(inside, self._mapped(block, place.clamp(0, block.z.shape[-1] - 1)), 0.0)
        found: tuple[Tensor, ...] = (own, others.double().unsqueeze(-1), top)
        if number in self.sums:
            found = tuple(before + here for before, here in zip(self.sums[number], found, strict=True))
        self.sums[number] = found

    def multiply(self, block: CurvatureBlock, number: int) -> None:  # noqa: D102
        assert block.v is not None
        lists, loss = kernels("lists"), self.loss
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


@dataclass
class FusedDenseCurvature(FusedBlocks, DenseCurvature):
    """Sweeps leave logits; :meth:`prepare` makes probabilities of them."""

    def sweep(self, number: int, block: Block) -> None:  # noqa: D102
        if number == 0:
            super().sweep(number, block)
            return
        found = self._gather_sums(block)
        if not self.loss.is_cross_entropy:
            curve = found.curve - found.score if self.matrix == GAUSS_NEWTON else found.curve
            self.total += curve if self.needs_q(self.loss.divergence, self.matrix) else 1.0

    def prepare(self, block: CurvatureBlock, fresh: bool, again: bool = False) -> None:  # noqa: D102
        forms = kernels("dense_curvature")
        self.places = self._places()
        forms.prepare(
            self.description,
            self._tile(block),
            with_strides({"raw_out": block.raw, "q_out": block.q, "out": block.residual}),
            self._table(),
            self.places,
            block.classes.start,
            forms.HESSIAN if self.matrix == HESSIAN else forms.GAUSS_NEWTON,
        )

    def gather(self, block: CurvatureBlock, number: int) -> None:  # noqa: D102
        loss = self.loss
        found = kernels("dense_curvature").gather(
            self._column(block), self.places, block.classes.start, loss.softcap, loss.temperature
        )
        sums: tuple[Tensor, ...] = tuple(found.double().unsqueeze(-1))
        if number in self.sums:
            sums = tuple(before + here for before, here in zip(self.sums[number], sums, strict=True))
        self.sums[number] = sums

    def multiply(self, block: CurvatureBlock, number: int) -> None:  # noqa: D102
        others, moment, top = self.sums[number]  # Σ_{k≠top} p v, Σ q v, v_top
        complement = self.model.softmax.complement(slice(None))
        mean = others + (1 - complement) * top
        if block.q is None:
            moment = self.coefficient * mean
        rows = [mean, top * complement - others, moment - self.total * mean, self.coefficient]
        loss, residual = self.loss, block.residual
        kernels("dense_curvature").multiply(
            self._column(block), residual, rows, self.places, block.classes.start, loss.softcap, loss.temperature
        )

    @staticmethod
    def _column(block: CurvatureBlock) -> dict[str, Any]:
        return with_strides({"p": block.z, "q": block.q, "raw": block.raw, "v": block.v})
