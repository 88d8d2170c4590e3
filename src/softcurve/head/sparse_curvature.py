"""The second-order matrix of a tile's rows in the logits, for many columns that share the tile's softmax.

With ``m`` the map before the softmax (the soft cap) and ``B`` the matrix of
:class:`softcurve.losses.softmax.RowCurvature`, a row's matrix is ``m′ B m′``, and the Hessian adds ``diag(m″ ⊙ g′)``.
A target that is a list sees ``z`` through the
coarse logits ``c = (z_listed, o)`` of :mod:`softcurve.head.sparse`: with ``q = e^{z − o}`` its matrix is

    (∂c/∂z)ᵀ M (∂c/∂z) + κ (diag(q) − q qᵀ),

where ``κ`` is the residual of ``o`` for the Hessian. For Gauss-Newton it is what is left of that where the loss is
convex in ``z``; a bucket is one outcome, in whose logit the loss is convex, and leaves nothing.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from softcurve.head.kernel import (
    CurvatureBlock,
    CurvatureKernel,
)
from softcurve.head.sparse import SparseKernel
from softcurve.losses import softmax
from softcurve.losses.rows import (
    FISHER,
    GAUSS_NEWTON,
    HESSIAN,
)
from softcurve.processes import sum_over


@dataclass
class SparseCurvature(SparseKernel, CurvatureKernel):
    """``z`` holds ``e^{z − shift}``, 0 at the listed classes and at one that has more than half of the others' mass.

    The latter's entry ``q (v − q·v)`` is a small difference that float32 does not hold: from ``Σ_{k≠top}`` it is right.
    """

    def prepare_columns(self) -> None:
        """The coarse matrix ``M``, ``κ`` and, for a Hessian, the coarse residual."""
        self.curvature = self.row_loss.curvature(self.matrix, self.coarse, self.target)
        p = self.curvature.p
        spread = self._spread(p)
        if self.loss.smoothing:
            mass = self._smoothing_mass()
            self.curvature = softmax.RowCurvature(p, self.curvature.q + mass * p, self.curvature.total + mass)
        some = self.others > 0
        self.kappa = torch.where(some, spread, 0.0)
        self.inverse = torch.where(some, 1 / torch.where(some, self.others, 1.0), 0.0)
        if self.matrix == HESSIAN:
            self.gradient, _ = self.coarse_gradient(torch.ones_like(self.others).squeeze(-1))
        # Products are left as multiples of κ e^z / Σ e^z, unless that is too small to divide by.
        scale = self.kappa * self.inverse
        self.unit = scale if scale.numel() and bool((scale > 1e-25).all()) else torch.ones_like(scale)
        self.row_factor = self.unit
        self.top = torch.full_like(self.others, -1, dtype=torch.int64)
        self.top_mass, self.rest = torch.zeros_like(self.others), torch.zeros_like(self.others)

    def _spread(self, p: Tensor) -> Tensor:
        """``κ``, ``(rows, 1)``."""
        others = p[:, -1:]
        if self.matrix == HESSIAN:
            gradient, _ = self.coarse_gradient(torch.ones_like(others).squeeze(-1))
            return gradient[:, -1:]
        spread = torch.zeros_like(others)
        if self.matrix == FISHER or (not self.merges_tail and self.loss.divergence.hessian_is_fisher):
            mass = self.data.target
            whole = not self.loss.is_cross_entropy or mass is None
            spread = others if whole or mass is None else mass.double().sum(-1, keepdim=True) * others
        if self.matrix == GAUSS_NEWTON and self.loss.z_loss:
            spread = spread + 2 * self.loss.z_loss * self._lse().clamp(min=0) * others
        return spread + self._smoothing_mass() * others if self.loss.smoothing else spread

    def _lse(self) -> Tensor:
        return softmax.softmax_rows(self.coarse).log_sum_exp.unsqueeze(-1)

    def prepare_block(self, block: CurvatureBlock, fresh: bool, again: bool = False) -> None:  # noqa: D102
        for rows in self.groups(block):
            if fresh:
                self._renew(block, rows)
            elif self.lowered is not None:
                block.z[rows] *= self.lowered[rows].to(block.z.dtype)
            if not again:
                self._find_top(block, rows)
            block.z[rows].index_put_(self._top_in(block, rows), block.z.new_zeros(()))
            if block.residual is not None:
                self._put_residual(block, rows, block.residual[rows])

    def reduce_prepared(self, group: ProcessGroup) -> None:  # noqa: D102
        sum_over([self.top_mass, self.rest], group)

    def no_sums(self) -> tuple[Tensor, ...]:  # noqa: D102
        return torch.zeros_like(self.own), torch.zeros_like(self.others), torch.zeros_like(self.others)

    def _find_top(self, block: CurvatureBlock, rows: slice) -> None:
        """Of a block's rows; ``rest`` is what all other unlisted classes have."""
        z = block.z[rows]
        mass, others = z.amax(-1, keepdim=True), self.others[rows]
        row = (mass > 0.5 * others).squeeze(-1).nonzero().squeeze(-1)
        if z.shape[-1] < self.data.class_count:
            self.rest[rows] += torch.where(mass > 0.5 * others, 0.0, z.sum(-1, keepdim=True).double())
        if len(row):
            confident = z[row]
            column = confident.argmax(-1, keepdim=True)
            self.top[rows][row] = column + block.classes.start
            self.top_mass[rows][row] = mass[row].double()
            self.rest[rows][row] += confident.scatter_(-1, column, 0.0).sum(-1, keepdim=True).double()

    def _top_in(self, block: CurvatureBlock, rows: slice) -> tuple[Tensor, Tensor]:
        """Rows and columns of :attr:`top` in a block."""
        column = self.top[rows].squeeze(-1) - block.classes.start
        row = ((self.top[rows].squeeze(-1) >= 0) & (column >= 0) & (column < block.z.shape[-1])).nonzero().squeeze(-1)
        return row, column[row]

    def _put_top(self, block: CurvatureBlock, rows: slice, out: Tensor, values: Tensor) -> None:
        row, column = self._top_in(block, rows)
        out[row, column] = values[rows].squeeze(-1)[row].to(out.dtype)

    def _put_residual(self, block: CurvatureBlock, rows: slice, out: Tensor) -> None:
        """``m′ g′``, not weighted."""
        _, where, at = self._listed(block.classes, rows)
        listed = self.gradient[rows, :-1]
        torch.mul(block.z[rows], (self.gradient[rows, -1:] * self.inverse[rows]).to(out.dtype), out=out)
        self._put_top(block, rows, out, self.gradient[:, -1:] * self.inverse * self.top_mass)
        if self.loss.smoothing:
            u = self._smooth(block.classes, out)
            listed = listed - u[at].double()
            out.sub_(u)
        self._put(out, where, at, listed)
        slope = self.slope(block, rows)
        if slope is not None:
            out.mul_(slope)

    def accumulate_column(self, block: CurvatureBlock, number: int) -> None:  # noqa: D102
        assert block.v is not None
        present, where, at = self._listed(block.classes)
        own = block.v.gather(-1, at).double()
        if block.raw is not None:
            own = own * self.loss.logit_map.slope(block.raw.gather(-1, at)).double()
        others, top = torch.empty_like(self.others), torch.zeros_like(self.others)
        for rows in self.groups(block):
            slope = self.slope(block, rows)
            changes = block.z[rows] * block.v[rows]
            others[rows] = (changes if slope is None else changes.mul_(slope)).sum(-1, keepdim=True)
            row, column = self._top_in(block, rows)
            change = block.v[rows][row, column].double()
            top[rows][row, 0] = change if slope is None else change * slope[row, column].double()
        if where is not None:
            own = torch.where(present, own, 0.0)
        found: tuple[Tensor, ...] = (own, others, top)
        if number in self.sums:
            found = tuple(before + here for before, here in zip(self.sums[number], found, strict=True))
        self.sums[number] = found

    def multiply_column(self, block: CurvatureBlock, number: int) -> None:  # noqa: D102
        assert block.v is not None
        own, others, top = self.sums[number]
        mean = (others + self.top_mass * top) * self.inverse
        product = self.curvature.product(torch.cat([own, mean], -1))
        # e^z (α + β v) at an unlisted class, in multiples of the unit.
        alpha = (product[:, -1:] - self.kappa * mean) * self.inverse / self.unit
        beta = self.kappa * self.inverse / self.unit
        listed = product[:, :-1] / self.unit
        # q_top (M_o + κ (v_top − q·v)), with v_top − q·v from the others' sums
        apart = (top * self.rest - others) * self.inverse
        at_top = self.top_mass * self.inverse / self.unit * (product[:, -1:] + self.kappa * apart)
        whole = self.unit is self.row_factor and bool((beta == 1).all())
        for rows in self.groups(block):
            v = block.v[rows]
            bent, slope = self.bent(block, rows, v), self.slope(block, rows)
            if slope is not None:
                v.mul_(slope)
            if not whole:
                v.mul_(beta[rows].to(v.dtype))
            v.add_(alpha[rows].to(v.dtype)).mul_(block.z[rows])
            _, where, at = self._listed(block.classes, rows)
            self._put(v, where, at, listed[rows])
            self._put_top(block, rows, v, at_top)
            self._finish(rows, v, slope, bent)

    def diagonal(self, block: CurvatureBlock) -> None:  # noqa: D102
        assert block.v is not None
        entries = self.curvature.diagonal()
        linear = self.kappa * self.inverse / self.unit
        square = (entries[:, -1:] - self.kappa) * self.inverse.square() / self.unit
        listed = entries[:, :-1] / self.unit
        top = self.top_mass * self.inverse
        at_top = top / self.unit * (entries[:, -1:] * top + self.kappa * self.rest * self.inverse)
        for rows in self.groups(block):
            v, z = block.v[rows], block.z[rows]
            torch.mul(z, square[rows].to(v.dtype), out=v)
            v.add_(linear[rows].to(v.dtype)).mul_(z)
            _, where, at = self._listed(block.classes, rows)
            self._put(v, where, at, listed[rows])
            self._put_top(block, rows, v, at_top)
            slope = self.slope(block, rows)
            if slope is not None:
                v.mul_(slope)
            self._finish(rows, v, slope, self.bent(block, rows, None))

    def to_probabilities(self, block: CurvatureBlock) -> None:  # noqa: D102
        p = self.curvature.p
        for rows in self.groups(block):
            block.z[rows] *= (p[rows, -1:] * self.inverse[rows]).to(block.z.dtype)
            _, where, at = self._listed(block.classes, rows)
            self._put(block.z[rows], where, at, p[rows, :-1])
            self._put_top(block, rows, block.z[rows], p[:, -1:] * self.inverse * self.top_mass)

    def sum_of_q(self) -> Tensor:  # noqa: D102
        return self.curvature.total

    def _finish(self, rows: slice, v: Tensor, slope: Tensor | None, bent: Tensor | None) -> None:
        if slope is not None:
            v.mul_(slope)
        if bent is not None:
            v.add_(bent.div_(self.unit[rows].to(v.dtype)))
