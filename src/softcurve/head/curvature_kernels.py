"""The second-order matrix of a tile's rows in the logits, for many columns that share the tile's softmax.

With ``m`` the map before the softmax (the soft cap) and ``B`` the matrix of
:class:`softcurve.losses.softmax.RowCurvature`, a row's matrix is ``m′ B m′``, and the Hessian adds ``diag(m″ ⊙ g′)``.
A target that is a list sees ``z`` through the
coarse logits ``c = (z_listed, o)`` of :mod:`softcurve.head.lists`: with ``q = e^{z − o}`` its matrix is

    (∂c/∂z)ᵀ M (∂c/∂z) + κ (diag(q) − q qᵀ),

where ``κ`` is the residual of ``o`` for the Hessian. For Gauss-Newton it is what is left of that where the loss is
convex in ``z``; a bucket is one outcome, in whose logit the loss is convex, and leaves nothing.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from softcurve.head.blocks import BlockKernel
from softcurve.head.kernel import Block, Kernel
from softcurve.head.lists import ListKernel
from softcurve.losses import softmax
from softcurve.losses.divergences import Divergence
from softcurve.losses.rows import FISHER, GAUSS_NEWTON, HESSIAN, divergence_second_order
from softcurve.processes import sum_over


@dataclass
class CurvatureBlock(Block):
    """A block, and room for what columns share besides ``z``: ``q`` and, for the Hessian, the residual."""

    q: Tensor | None = None
    residual: Tensor | None = None


@dataclass
class CurvatureKernel(Kernel, ABC):
    """After the sweeps :meth:`settle`; a block is made ready for all columns by one :meth:`prepare`.

    A column's change of the logits stands in ``block.v``. It is gathered over every block of a row before any of them
    is multiplied. ``factor`` is what all products are still to be multiplied by, row by row.
    """

    matrix: str = field(kw_only=True)
    coarsens: bool = field(kw_only=True, default=False)
    sums: dict[int, tuple[Tensor, ...]] = field(default_factory=dict, init=False)

    @abstractmethod
    def settle(self) -> None:
        """Every sweep is closed."""

    @abstractmethod
    def prepare(self, block: CurvatureBlock, fresh: bool, again: bool = False) -> None:
        """Logits become what columns need; ``fresh`` if computed anew since the sweeps, ``again`` if not for once."""

    @abstractmethod
    def merge_prepared(self, group: ProcessGroup) -> None:
        """Sum up what the first :meth:`prepare` of every block has gathered over the processes of a sharded head."""

    @abstractmethod
    def gather(self, block: CurvatureBlock, number: int) -> None:
        """What a column sums over a row."""

    def merge_column(self, number: int, group: ProcessGroup) -> None:
        """As :meth:`merge_prepared`, of what a column has gathered."""
        sums = [part.clone() for part in self.sums.get(number, self.no_sums())]
        sum_over(sums, group)
        self.sums[number] = tuple(sums)

    @abstractmethod
    def no_sums(self) -> tuple[Tensor, ...]:
        """What a column has gathered where it has seen no block."""

    @abstractmethod
    def multiply(self, block: CurvatureBlock, number: int) -> None:
        """``v ← matrix · v``, but for ``factor``."""

    @abstractmethod
    def diagonal(self, block: CurvatureBlock) -> None:
        """``v ←`` the matrix's diagonal, but for ``factor``."""

    @abstractmethod
    def normalize(self, block: CurvatureBlock) -> None:
        """``z`` of a block that is ready becomes ``p``."""

    @abstractmethod
    def sum_of_q(self) -> Tensor:
        """``total`` of :class:`softcurve.losses.softmax.RowCurvature`, ``(rows, 1)``."""

    def coefficients(self) -> tuple[Tensor, Tensor]:
        """``a`` and ``b`` of a matrix ``a diag(p) − b p pᵀ``: with ``q = a p``, ``b = 2a − total``."""
        total = self.sum_of_q()
        surplus = 2 * self.loss.z_loss if self.matrix != FISHER else 0.0
        return total - surplus, total - 2 * surplus

    def slope(self, block: CurvatureBlock, rows: slice) -> Tensor | None:
        """``m′``, where the map is not the identity."""
        return None if block.raw is None else self.loss.logit_map.slope(block.raw[rows])

    def bent(self, block: CurvatureBlock, rows: slice, v: Tensor | None) -> Tensor | None:
        """``m″ g′ v`` of a Hessian, from the residual ``g = m′ g′`` and ``m″/m′ = −(2/κ) tanh(z/κ)``."""
        if block.raw is None or block.residual is None or self.loss.softcap is None:
            return None
        bend = torch.tanh(block.raw[rows] / self.loss.softcap).mul_(-2 / self.loss.softcap).mul_(block.residual[rows])
        return bend if v is None else bend.mul_(v)


# --- lists -----------------------------------------------------------------------------------------------------------


@dataclass
class ListCurvature(ListKernel, CurvatureKernel):
    """``z`` holds ``e^{z − shift}``, 0 at the listed classes and at one that has more than half of the others' mass.

    The latter's entry ``q (v − q·v)`` is a small difference that float32 does not hold: from ``Σ_{k≠top}`` it is right.
    """

    def settle(self) -> None:
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
        self.factor = self.unit
        self.top = torch.full_like(self.others, -1, dtype=torch.int64)
        self.top_mass, self.rest = torch.zeros_like(self.others), torch.zeros_like(self.others)

    def _spread(self, p: Tensor) -> Tensor:
        """``κ``, ``(rows, 1)``."""
        others = p[:, -1:]
        if self.matrix == HESSIAN:
            gradient, _ = self.coarse_gradient(torch.ones_like(others).squeeze(-1))
            return gradient[:, -1:]
        spread = torch.zeros_like(others)
        if self.matrix == FISHER or (not self.coarsens and self.loss.divergence.hessian_is_fisher):
            mass = self.data.target
            whole = not self.loss.is_cross_entropy or mass is None
            spread = others if whole or mass is None else mass.double().sum(-1, keepdim=True) * others
        if self.matrix == GAUSS_NEWTON and self.loss.z_loss:
            spread = spread + 2 * self.loss.z_loss * self._lse().clamp(min=0) * others
        return spread + self._smoothing_mass() * others if self.loss.smoothing else spread

    def _lse(self) -> Tensor:
        return softmax.softmax_rows(self.coarse).log_sum_exp.unsqueeze(-1)

    def prepare(self, block: CurvatureBlock, fresh: bool, again: bool = False) -> None:  # noqa: D102
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

    def merge_prepared(self, group: ProcessGroup) -> None:  # noqa: D102
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

    def gather(self, block: CurvatureBlock, number: int) -> None:  # noqa: D102
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

    def multiply(self, block: CurvatureBlock, number: int) -> None:  # noqa: D102
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
        whole = self.unit is self.factor and bool((beta == 1).all())
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

    def normalize(self, block: CurvatureBlock) -> None:  # noqa: D102
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


# --- targets that speak of every class -------------------------------------------------------------------------------


@dataclass
class DenseCurvature(BlockKernel, CurvatureKernel):
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

    def sweep(self, number: int, block: Block) -> None:
        """Sweep 1: the sums of score and curve."""
        if number == 0:
            super().sweep(0, block)
            return
        for rows in self.groups(block):
            if self.data.cuts_classes:
                self.map_logits(block, rows)
            pair, model, _ = self._terms(rows, block, block.z[rows], block.target_of(rows))
            self.model.gather(rows, block.classes, model, None)
            if not self.loss.is_cross_entropy:
                q = divergence_second_order(self.loss.divergence, self.matrix, pair, pair.p.new_zeros(1))
                self.total[rows] += q.sum(-1, keepdim=True).double()

    def merge(self, number: int, group: ProcessGroup) -> None:  # noqa: D102
        super().merge(number, group)
        if number == 1 and not self.loss.is_cross_entropy:
            sum_over([self.total], group)

    def merge_prepared(self, group: ProcessGroup) -> None:
        """Nothing: the sweeps know what is kept apart."""

    def no_sums(self) -> tuple[Tensor, ...]:  # noqa: D102
        return tuple(torch.zeros_like(self.total) for _ in range(3))

    def settle(self) -> None:
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

    def prepare(self, block: CurvatureBlock, fresh: bool, again: bool = False) -> None:  # noqa: D102
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

    def gather(self, block: CurvatureBlock, number: int) -> None:  # noqa: D102
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

    def multiply(self, block: CurvatureBlock, number: int) -> None:  # noqa: D102
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

    def normalize(self, block: CurvatureBlock) -> None:  # noqa: D102
        pass  # it is there

    def sum_of_q(self) -> Tensor:  # noqa: D102
        return self.total

    @staticmethod
    def _finish(v: Tensor, slope: Tensor | None, bent: Tensor | None) -> None:
        if slope is not None:
            v.mul_(slope)
        if bent is not None:
            v.add_(bent)
