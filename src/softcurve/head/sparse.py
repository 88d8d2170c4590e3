"""Targets that name few classes: an index, or a list of classes with all others as one outcome.

With ``o = log Σ_{unlisted} e^z`` the loss is a loss of the ``k + 1`` coarse logits ``c = (z_listed, o)``, which
:mod:`softcurve.losses.rows` has in closed form. It is computed there in float64, which costs nothing beside ``C``
classes and leaves the rounding of the tile's one sum. With ``q = e^{z − o}``, the softmax over the unlisted classes,

    ∂L/∂z = G_o q,   its change along ż:  Ġ_o q + G_o q (ż − ȯ),   ȯ = q·ż,

at unlisted classes and ``G_k``, ``Ġ_k`` at listed ones. Label smoothing adds ``U lse − u·z`` with ``u = ε w / C``.

A matrix of second order is ``m′ B m′``, where ``m`` is the map before the softmax (the soft cap), and the Hessian adds
``diag(m″ ⊙ g′)``. With ``M`` the matrix of the coarse loss,

    B = (∂c/∂z)ᵀ M (∂c/∂z) + κ (diag(q) − q qᵀ),

where ``κ`` is the gradient with respect to ``o`` for the Hessian. For Gauss-Newton ``κ`` is what is left of that where
the loss is convex in ``z``; a bucket is one outcome, in whose logit the loss is convex, and leaves nothing.
"""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from softcurve.head import backends
from softcurve.head.aten.sparse import Places, SparseResiduals, SparseSums, SparseTile, or_zero
from softcurve.head.kernel import Block, CurvatureKernel, Residuals, Statistics, first_of_largest
from softcurve.losses import rows, softmax
from softcurve.losses.rows import FISHER, GAUSS_NEWTON, HESSIAN
from softcurve.losses.spec import LogitMap
from softcurve.processes import max_over, sum_over

NO_MASS = -math.inf
IDENTITY = LogitMap()


class Swept(NamedTuple):
    """What the sweep has left of a block that is not computed again."""

    exponentials: Any  # as the backend's functions take them; relative to the shift
    shift: Tensor  # (rows, 1)
    total: Tensor  # Σ e^{z − shift} of the unlisted classes
    top: Tensor | None  # the largest of them, for a matrix of second order


@dataclass
class SparseKernel(CurvatureKernel):
    """The statistics of each row in float64; the functions of ``tiles`` do what reads or writes whole tiles.

    One sweep gathers the listed logits and ``o``. For second order a block then holds ``e^{z − shift}``, but 0 at the
    classes kept apart: the listed, and one with more than half of the unlisted mass, whose entry ``q (v − q·v)`` is a
    small difference that float32 resolves only as ``Σ_{k≠top}``.
    """

    def __post_init__(self) -> None:
        assert self.data.indices is not None
        self.indices, weight = self.data.indices, self.data.weight
        self.tiles = backends.tile_functions(self.loss, weight.device, weight.dtype)
        zeros = torch.zeros((len(weight), 1), dtype=torch.float64, device=weight.device)
        self.unlisted = SparseSums.of(zeros + NO_MASS, zeros)
        # The listed logits and their changes, before and after the soft cap, and u of label smoothing there. NaN until
        # a block has the class: one that is in no block must not look like a logit.
        self.raw = self.listed = self._without_fillers((zeros + math.nan).expand_as(self.indices))
        self.v_raw = self.v_listed = self.share = zeros.expand_as(self.indices)
        self.swept: dict[int, Swept] = {}  # by the first classes of the blocks
        if self.data.wants_stats:
            self.best = torch.full_like(zeros, NO_MASS)
            self.predicted = torch.zeros_like(self.indices[:, :1])

    # --- the sweep ---------------------------------------------------------------------------------------------------

    def accumulate(self, number: int, block: Block) -> None:  # noqa: D102
        tile, logit_map = self._tile(block), self.loss.logit_map
        places = tile.listed
        self.raw = places.update(self.raw, tile.z)
        self.listed = logit_map.value(self.raw)
        if tile.v is not None:
            self.v_raw = places.update(self.v_raw, tile.v)
            self.v_listed = self.v_raw if logit_map.is_identity else self.v_raw * logit_map.slope(self.raw)
        stays, wants_stats = not self.data.cuts_classes, self.data.wants_stats
        if stays and self.swept and not wants_stats:
            tile = tile._replace(near=self.unlisted.shift)
        sums, column, exponentials = self.tiles.statistics(
            tile, wants_stats=wants_stats, leaves_residual=self.data.wants_gradient and stays
        )
        if stays and exponentials is not None:
            top = tile.z.amax(-1, keepdim=True) if self.matrix else None
            self.swept[block.classes.start] = Swept(exponentials, sums.shift, sums.total, top)
        if wants_stats:
            listed = self.listed if places.inside is None else torch.where(places.inside, self.listed, NO_MASS)
            top = listed.amax(-1, keepdim=True)
            first = torch.where(listed == top, self.indices, torch.iinfo(torch.int64).max).amin(-1, keepdim=True)
            self._observe(sums.shift, column + block.classes.start)
            self._observe(top, first)
        if tile.share is not None:
            factor, share = self._share_factor(), self._unless_excluded(tile.listed_share())
            self.share = places.update(self.share, tile.share.expand_as(tile.z))
            mass = tile.share.double().sum()
            if self.data.excluded is not None:
                excluded = self._places(block, self.data.excluded)
                mass = mass - excluded.take(tile.share.expand_as(tile.z)).sum(-1, keepdim=True)
            sums = sums._replace(
                uniform=factor * (sums.uniform + _inner(self.listed - or_zero(sums.shift), share)),
                mass=factor * mass,
                uniform_change=factor * (sums.uniform_change + _inner(self.v_listed, share)),
            )
        shift = torch.maximum(self.unlisted.shift, sums.shift)
        self.unlisted = self.unlisted.shifted(shift).plus(sums.shifted(shift))

    def _observe(self, value: Tensor, at: Tensor) -> None:
        """Keep the first class of the largest logit so far."""
        better = (value > self.best) | ((value == self.best) & (at < self.predicted) & (value > NO_MASS))
        self.best = torch.where(better, value, self.best)
        self.predicted = torch.where(better, at, self.predicted)

    def reduce_over(self, number: int, group: ProcessGroup) -> None:
        """Reduce the largest shift, then the sums, of which a listed logit has one term."""
        shift = self.unlisted.shift.clone()
        max_over([shift], group)
        if self.data.wants_stats:
            self.predicted = first_of_largest(self.best, self.predicted, group, self.data)
        self.unlisted = self.unlisted.shifted(shift)
        here = (self.indices >= 0) & (self.indices < self.data.held)
        self.listed, self.v_listed = (torch.where(here, part, 0.0) for part in (self.listed, self.v_listed))
        sums = [self.listed, self.unlisted.total]
        sums += [self.v_listed, self.unlisted.change] * self.data.has_direction
        sums += [self.unlisted.uniform] * bool(self.loss.smoothing)
        sums += [self.unlisted.moment, self.unlisted.square] * self.data.wants_stats
        sums += [self.unlisted.uniform_change] * (self.data.has_direction and bool(self.loss.smoothing))
        sum_over(sums, group)
        self.listed = self._without_fillers(self.listed)

    def finish(self, number: int) -> None:
        """Form the coarse logits and their loss."""
        if self.loss.smoothing and self.loss.group is None:
            # A list of all classes has a common offset too, which u·z and U lse would each round in their own way.
            shift, top = self.unlisted.shift, self.listed.amax(-1, keepdim=True)
            self.unlisted = self.unlisted.shifted(torch.where((shift == NO_MASS) & top.isfinite(), top, shift))
        self.shift, self.others = or_zero(self.unlisted.shift), self.unlisted.total
        self.row_loss, self.target = self._coarse_loss()
        # Relative to the shift, so that a common offset of the logits costs no digits; the z-loss wants them whole.
        whole = self.shift if self.data.offset is None else self.shift + self.data.offset
        offset = whole if self.loss.z_loss else torch.zeros_like(self.shift)
        others = torch.where(self.others > 0, torch.log(self.others), self.others + NO_MASS)
        self.coarse = torch.cat([self.listed - self.shift, others], -1) + offset
        self.lse = softmax.softmax_rows(self.coarse).log_sum_exp - offset.squeeze(-1)
        if self.data.wants_stats:
            self.statistics = self._statistics(whole)

    def _statistics(self, offset: Tensor) -> Statistics:
        """Return those of the coarse row, with those of the unlisted classes among themselves."""
        some = self.others > 0
        within = torch.where(some, torch.log(self.others) - self.unlisted.moment / self.others, 0.0)
        share = torch.softmax(self.coarse, -1)[:, -1:]
        entropy = softmax.entropy_rows(self.coarse) + (share * within).squeeze(-1)
        among = torch.where(some, torch.log(self.unlisted.square) - 2 * torch.log(self.others), 0.0)
        collision = softmax.collision_rows(self.coarse, torch.cat([torch.zeros_like(self.listed), among], -1))
        log_prob = softmax.softmax_rows(self.coarse).log_probabilities[:, 0] if self.indices.shape[1] else None
        lse = self.lse + offset.squeeze(-1)
        return Statistics(lse, entropy, collision, log_prob, self.predicted.squeeze(-1))

    def _without_fillers(self, listed: Tensor) -> Tensor:
        """Return the logits of the entries of a list, −inf for those that name no class."""
        return listed if self.data.fillers is None else torch.where(self.data.fillers, NO_MASS, listed)

    # --- the rows ----------------------------------------------------------------------------------------------------

    def _coarse_loss(self) -> tuple[rows.RowLoss, Tensor]:
        loss, target = self.loss, self.data.target
        if target is None:
            return rows.IndexCrossEntropy(IDENTITY, loss.z_loss), torch.zeros_like(self.indices[:, 0])
        if loss.is_cross_entropy:
            return rows.DenseCrossEntropy(IDENTITY, loss.z_loss), target.double()
        return rows.LogitDivergence(IDENTITY, divergence=loss.divergence), target.double()

    def losses(self) -> Tensor:  # noqa: D102
        rows = self.row_loss.value(self.coarse, self.target)
        if self.loss.smoothing:
            rows = rows + (self._smoothing_mass() * self.lse.unsqueeze(-1) - self.unlisted.uniform).squeeze(-1)
        return rows

    def _coarse_gradient(self, weight: Tensor, wants_target: bool) -> tuple[Tensor, Tensor | None]:
        """Return ``weight`` times the gradients with respect to the coarse logits, without ``−u·z``, and the target."""
        gradient, target = self.row_loss.gradient(weight, self.coarse, self.target, (True, wants_target))
        assert gradient is not None
        if self.loss.smoothing:
            gradient = gradient + weight.unsqueeze(-1) * self._smoothing_mass() * torch.softmax(self.coarse, -1)
        return gradient, target

    def _smoothing_mass(self) -> Tensor | float:
        """Return ``U = Σ u``, a number or ``(rows, 1)``."""
        return self.loss.smoothing * self.data.share_mass

    def _share_factor(self) -> Tensor | float:
        """Return the factor of ``u`` in rows that exclude classes, ``(rows, 1)``: the others have their share."""
        return 1.0 if self.data.share_surplus is None else 1 + self.data.share_surplus

    def _unless_excluded(self, share: Tensor) -> Tensor:
        """Return ``u`` of the listed classes, with 0 where a row excludes one, whose logit is −inf."""
        return share if self.data.share_surplus is None else torch.where(self.raw == NO_MASS, 0.0, share)

    def tangents(self, group: ProcessGroup | None) -> Tensor:  # noqa: D102
        gradient, target = self._coarse_gradient(torch.ones_like(self.lse), self.data.target_v is not None)
        total = _inner(gradient, self.direction)
        if target is not None and self.data.target_v is not None:
            total = total + _inner(target, self.data.target_v.double())
        return (total - self.unlisted.uniform_change).squeeze(-1)

    # --- the residual ------------------------------------------------------------------------------------------------

    def prepare_residuals(self) -> None:
        """Form the coarse gradient, its change along the direction, and from both the numbers of each row."""
        weight, logit_map = self.data.weight.double(), self.loss.logit_map
        gradient, self.target_gradient = self._coarse_gradient(weight, self.data.wants_target)
        beta = self._per_exponential(gradient[:, -1:])
        listed, listed_v, alpha = gradient[:, :-1], torch.zeros_like(gradient[:, :-1]), torch.zeros_like(beta)
        if self.loss.smoothing:
            listed = listed - weight.unsqueeze(-1) * self._share_factor() * self._unless_excluded(self.share)
        slope = logit_map.slope(self.raw)
        if self.data.has_direction:
            product, alpha = self._differentiate(weight, gradient)
            if self.loss.softcap is not None:
                product = product * slope + logit_map.bend_ratio(self.raw) * self.v_raw * slope * listed
            listed_v = self._unless_masked(product)
        # Leave β to the products' small operands, unless it is too small to divide by.
        others = (torch.cat([listed, listed_v, alpha], -1) / beta).abs()
        safe = (beta.abs() > 1e-25) & (others < 1e25).all(-1, keepdim=True)
        factor = self.row_factor = torch.where(safe, beta, 1.0)
        weight, listed, beta = weight / factor.squeeze(-1), listed / factor, beta / factor
        listed_v, alpha = listed_v / factor, alpha / factor
        listed = self._unless_masked(listed * slope)
        weight = weight.unsqueeze(-1) * self._share_factor()
        self.rows = SparseResiduals(self.shift, alpha, beta, weight, listed, listed_v)

    def residuals(self, block: Block, fresh: bool) -> Residuals:  # noqa: D102
        tile, swept, rows = self._tile(block), None if fresh else self.swept.get(block.classes.start), self.rows
        if swept is not None and len(self.swept) > 1:
            raised = self._raised_factor(swept)
            rows = rows._replace(alpha=rows.alpha * raised, beta=rows.beta * raised)
        found: Residuals = self.tiles.residual(tile, rows, None if swept is None else swept.exponentials)
        self._clear_excluded(block, found.z)
        return found

    def _clear_excluded(self, block: Block, residual: Tensor) -> None:
        """Set the residual of excluded classes to 0, where the smoothing has left ``u``."""
        if self.data.share_surplus is not None and self.data.excluded is not None:
            places = self._places(block, self.data.excluded)
            self.tiles.put(residual, places, residual.new_zeros(places.columns.shape))

    def _differentiate(self, weight: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor]:
        """Return the changes of the coarse gradient at the listed classes, and ``α``."""
        change = torch.where(self.others > 0, self.unlisted.change / self.others, 0.0)
        self.direction = torch.cat([self.v_listed, change], -1)
        target_v = None if self.data.target_v is None else self.data.target_v.double()
        product, self.target_product = self.row_loss.hessian_product(
            weight, self.coarse, self.target, self.direction, target_v
        )
        assert product is not None
        if self.loss.smoothing:
            mass = weight.unsqueeze(-1) * self._smoothing_mass()
            product = product + mass * softmax.jacobian_product(self.coarse, self.direction)
        return product[:, :-1], self._per_exponential(product[:, -1:] - gradient[:, -1:] * change)

    def _per_exponential(self, whole: Tensor) -> Tensor:
        """Return a gradient with respect to ``o`` as a multiple of the exponentials that form the residuals."""
        each = torch.where(self.others > 0, whole / self.others, 0.0)
        # Of one block, whose exponentials then need no factor; several have one each.
        return each * self._raised_factor(*self.swept.values()) if len(self.swept) == 1 else each

    def _raised_factor(self, swept: Swept) -> Tensor:
        """Return ``e^{shift of a block − shift}``: other blocks, or other processes, may have raised it."""
        return torch.where(swept.shift == NO_MASS, 1.0, torch.exp(swept.shift - self.shift))

    def _unless_masked(self, listed: Tensor) -> Tensor:
        """Return the entries of listed classes, with 0 where a soft cap's slope is 0."""
        return listed if self.loss.softcap is None else torch.where(self.raw == NO_MASS, 0.0, listed)

    # --- second order ------------------------------------------------------------------------------------------------

    def prepare_columns(self) -> None:
        """Form the coarse matrix ``M``, ``κ`` and the coarse gradient."""
        self.curvature = self.row_loss.curvature(self.matrix, self.coarse, self.target)
        p = self.curvature.p
        if self.loss.smoothing:
            mass = self._smoothing_mass()
            self.curvature = softmax.RowCurvature(p, self.curvature.q + mass * p, self.curvature.total + mass)
        self.total = self.curvature.total
        self.gradient, _ = self._coarse_gradient(torch.ones_like(self.lse), wants_target=False)
        some = self.others > 0
        self.kappa = torch.where(some, self._spread(p[:, -1:]), 0.0)
        self.inverse = torch.where(some, 1 / torch.where(some, self.others, 1.0), 0.0)
        # Products are left as multiples of κ e^z / Σ e^z, unless that is too small to divide by.
        scale = self.kappa * self.inverse
        self.row_factor = self.unit = torch.where(scale > 1e-25, scale, 1.0)
        self.top = torch.full_like(self.others, -1, dtype=torch.int64)  # see the class
        self.top_mass, self.rest = torch.zeros_like(self.others), torch.zeros_like(self.others)
        self.sums = defaultdict(lambda: (torch.zeros_like(self.coarse), torch.zeros_like(self.others)))
        self.products: dict[int, tuple[Tensor, Tensor, Tensor]] = {}  # of each column, what all blocks share

    def _spread(self, p: Tensor) -> Tensor:
        """Return ``κ``; ``p`` is the probability of all unlisted classes."""
        if self.matrix == HESSIAN:
            return self.gradient[:, -1:]
        spread = torch.zeros_like(p)
        if self.matrix == FISHER or (not self.merges_tail and self.loss.divergence.hessian_is_fisher):
            mass = self.data.target if self.loss.is_cross_entropy else None
            spread = p if mass is None else mass.double().sum(-1, keepdim=True) * p
        if self.matrix == GAUSS_NEWTON and self.loss.z_loss:
            lse = softmax.softmax_rows(self.coarse).log_sum_exp.unsqueeze(-1)
            spread = spread + 2 * self.loss.z_loss * lse.clamp(min=0) * p
        return spread + self._smoothing_mass() * p if self.loss.smoothing else spread

    def prepare_block(self, block: Block, fresh: bool, again: bool = False) -> None:  # noqa: D102
        tile, swept = self._tile(block), None if fresh else self.swept.get(block.classes.start)
        scale = known = None
        if swept is not None:
            scale = self._raised_factor(swept)
            known = None if swept.top is None else (swept.top * scale, swept.total * scale)
        dominant = self.tiles.prepare(tile, self.shift, scale, None if again else self.others, known)
        if dominant is not None:
            mass, column, rest = dominant
            self.top = torch.where(column < 0, self.top, column + block.classes.start)
            self.top_mass, self.rest = self.top_mass + mass, self.rest + rest
        self.tiles.put(block.z, self._places(block, self.top), torch.zeros_like(self.others))
        if block.raw is not None:  # where the listed classes stand as masked ones
            self.tiles.put(block.raw, tile.listed, self.raw)
        if block.residual is not None:
            self._form_residual(block, block.residual)

    def residual(self, block: Block) -> Tensor | None:  # noqa: D102
        if self.matrix != HESSIAN or block.residual is not None or block.v is None:
            return block.residual
        self._form_residual(block, block.v)
        return block.v

    def _form_residual(self, block: Block, out: Tensor) -> None:
        factor, share = self.gradient[:, -1:] * self.inverse, self._share_factor()
        self.tiles.form_residual(self._tile(block), out, factor / share)
        if self.data.share_surplus is not None:
            self.tiles.rescale(out, share)
        self._add_apart(block, out, torch.cat([self.gradient[:, :-1], factor * self.top_mass], -1))
        self._clear_excluded(block, out)

    def reduce_prepared(self, group: ProcessGroup) -> None:  # noqa: D102
        sum_over([self.top_mass, self.rest], group)

    def accumulate_column(self, block: Block, number: int) -> None:
        """Add ``m′ v`` at the classes kept apart, and ``Σ e m′ v`` of all others."""
        assert block.v is not None
        apart = self._apart(block).take(block.v) * self._apart_slope(block)
        others = self.tiles.accumulate_column(self._tile(block, along_column=True))
        before_apart, before_others = self.sums[number]
        self.sums[number] = (before_apart + apart, before_others + others)

    def reduce_column(self, number: int, group: ProcessGroup | None) -> None:
        """Form the factors and summands of each row that multiply a column, and its entries at the classes apart."""
        super().reduce_column(number, group)
        apart, others = self.sums[number]
        listed, top = apart[:, :-1], apart[:, -1:]
        mean = (others + self.top_mass * top) * self.inverse
        product = self.curvature.product(torch.cat([listed, mean], -1))
        # e^z (α + β v) at an unlisted class, in multiples of the unit.
        alpha = (product[:, -1:] - self.kappa * mean) * self.inverse / self.unit
        beta = self.kappa * self.inverse / self.unit
        # q_top (M_o + κ (v_top − q·v)), with v_top − q·v from the others' sums
        centred = (top * self.rest - others) * self.inverse
        at_top = self.top_mass * self.inverse * (product[:, -1:] + self.kappa * centred)
        self.products[number] = (alpha, beta, torch.cat([product[:, :-1], at_top], -1) / self.unit)

    def multiply_column(self, block: Block, number: int) -> None:  # noqa: D102
        assert block.v is not None
        alpha, beta, values = self.products[number]
        self.tiles.multiply_column(self._tile(block, along_column=True), alpha, beta, 1 / self.unit)
        self._add_apart(block, block.v, values)

    def diagonal(self, block: Block) -> None:  # noqa: D102
        assert block.v is not None
        entries = self.curvature.diagonal()
        linear = self.kappa * self.inverse / self.unit
        square = (entries[:, -1:] - self.kappa) * self.inverse.square() / self.unit
        top = self.top_mass * self.inverse
        at_top = top * (entries[:, -1:] * top + self.kappa * self.rest * self.inverse)
        values = torch.cat([entries[:, :-1], at_top], -1) / self.unit
        self.tiles.diagonal(self._tile(block, along_column=True), square, linear, 1 / self.unit)
        self._add_apart(block, block.v, values * self._apart_slope(block))

    def to_probabilities(self, block: Block) -> None:  # noqa: D102
        p, others = self.curvature.p[:, :-1], self.curvature.p[:, -1:] * self.inverse
        self.tiles.rescale(block.z, others)
        self.tiles.put(block.z, self._apart(block), torch.cat([p, others * self.top_mass], -1), add=True)

    def _apart(self, block: Block) -> Places:
        """Return the places of the classes kept apart: the listed, and the one of more than half of the others."""
        return self._places(block, torch.cat([self.indices, self.top], -1))

    def _apart_slope(self, block: Block) -> Tensor | float:
        """Return ``m′`` at the classes kept apart."""
        return 1.0 if block.raw is None else self.loss.logit_map.slope(self._apart(block).take(block.raw))

    def _add_apart(self, block: Block, tile: Tensor, values: Tensor) -> None:
        """Add ``m′ values`` at the classes kept apart to what a soft cap's second derivative gives them, else 0."""
        self.tiles.put(tile, self._apart(block), values * self._apart_slope(block), add=True)

    # --- tiles -------------------------------------------------------------------------------------------------------

    def _places(self, block: Block, classes: Tensor) -> Places:
        """Return where some classes of each row stand in a block."""
        if block.z.shape[-1] == self.data.class_count and classes is self.indices and self.data.fillers is None:
            return Places(classes - block.classes.start, None)
        return Places.of(classes, block.classes)

    def _tile(self, block: Block, *, along_column: bool = False) -> SparseTile:
        """Bundle the tensors of a block; ``along_column`` if its ``v`` is the change along a column."""
        share, listed = None, self._places(block, self.indices)
        if self.loss.smoothing:
            each, (_, factors) = self.loss.smoothing / self.data.class_count, self.data.factors_of(block.classes)
            share = block.z.new_full(block.z.shape[1:], each) if factors is None else factors * each
        v = block.v if along_column or self.data.has_direction else None
        return SparseTile(
            block.z, block.raw, v, block.out, block.v_out, block.residual, listed, share, self.loss.logit_map,
            self.data.cached, masks_share=self.data.share_surplus is not None,
            whole=not self.data.cuts_classes and block.z.shape[-1] == self.data.held,
        )  # fmt: skip


def _inner(a: Tensor, b: Tensor) -> Tensor:
    """Return ``Σ a b`` of each row, where an infinite ``a`` times 0 is 0."""
    return torch.where(b == 0, 0.0, a * b).sum(-1, keepdim=True)
