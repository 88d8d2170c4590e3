"""A fast path for targets that cover every class, on tiles of whole rows on the CPU: few passes over a tile.

The formulas are those of :mod:`softcurve.losses.divergences` without the branches that only masked, nearly equal or
extremely confident rows need. Rows whose statistics do not guarantee four digits are computed again by
:class:`softcurve.head.dense.DenseKernel`. With ``e = e^{z − max z}`` and ``S = Σ e``, so ``p = e / S``, a residual is
left as a multiple of ``e``, and ``1 / S`` goes with the row's weight into ``row_factor``.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from softcurve.array_types import Indices
from softcurve.head.aten.dense import rest_of
from softcurve.head.aten.dense_terms import masses
from softcurve.head.aten.exponentials import exponentials_into
from softcurve.head.dense import DenseKernel
from softcurve.head.kernel import Block, Kernel, Residuals, RowData, class_factors, row_groups
from softcurve.losses.divergences import JensenShannon, ReverseKL
from softcurve.losses.fast_forms import compares, jensen_shannon, pull
from softcurve.losses.spec import LossSpec

# At least four digits are kept of a divergence above this (as many as the rounding of a matrix product leaves in its
# logits), and six of a softmax with so much beside its largest class: of less, the rounding of a far z − max shows.
LEAST_VALUE = 2e-2
LEAST_REST = 1e-9
# In place of −inf: the exponential is 0, and 0 times a difference of logits is 0.
FAR = -1e30


@dataclass
class FastRows(Kernel):
    """Losses and residuals of whole rows in one sweep.

    ``again(rows)`` returns a block with the logits and the target of some rows, computed anew; ``scratch(i)`` is a
    buffer for a group of rows, the same for every tile. ``masks_target`` says that some classes have no mass in the
    target of any row, so that the other rows must not be computed again for them.
    """

    again: Callable[[Tensor], Block] = field(kw_only=True)
    scratch: Callable[[int], Tensor] = field(kw_only=True)
    masks_target: bool = field(kw_only=True, default=False)

    def __post_init__(self) -> None:
        weight = self.data.weight
        self.values, self.factor = torch.empty_like(weight), weight.unsqueeze(-1).clone()
        self.row_factor = self.factor
        self.rest, self.target_rest = torch.empty_like(self.factor), torch.ones_like(self.factor)
        self.target_scale = 1.0 if self.loss.target == "teacher" else self.loss.target_scale

    @staticmethod
    def serves(loss: LossSpec, data: RowData) -> bool:
        """Return whether the fast path knows the loss, whose target covers every class, and all that is wanted."""
        if data.weight.device.type != "cpu" or loss.processes is not None:
            return False
        if data.cuts_classes or data.has_direction or data.wants_stats or loss.softcap is not None or loss.z_loss:
            return False
        if loss.is_cross_entropy:
            plain = not loss.smoothing and data.class_weight is None and loss.target != "probabilities"
            return plain or not data.wants_target
        return compares(loss.divergence) and loss.target != "probabilities"

    def accumulate(self, number: int, block: Block) -> None:
        """Form losses, ∂L/∂z and ∂L/∂target of all rows, and again those of the rows that are not sure."""
        assert block.target is not None
        by_logits = self.data.wants_target or not self.loss.is_cross_entropy
        for rows in row_groups(block.z, self.data.cached):
            z, target = block.z[rows], block.target[rows].to(block.z.dtype)
            e = self._buffer(0, z)
            if by_logits:
                out = block.target_out[rows] if self.data.wants_gradient and block.target_out is not None else None
                confident = self._compare_with_logits(z, e, target, out, rows)
            else:
                self.rest[rows], confident = _exponentials(z, e)
                self._compare_with_probabilities(z, e, self.rest[rows], self._masses(target, rows), rows)
            if self.data.wants_gradient:
                _balance(z, e, confident)
        if by_logits:
            self._complete_numbers()
        self._compute_again(block, (~self._is_sure()).nonzero().squeeze(-1))

    def _is_sure(self) -> Tensor:
        least = 0.0 if self.loss.is_cross_entropy else LEAST_VALUE * self.loss.divergence.curvature_at_agreement
        sure = (self.values > least) & self.values.isfinite()
        return sure & ((self.rest > LEAST_REST) & (self.target_rest > LEAST_REST)).squeeze(-1)

    def _compute_again(self, block: Block, doubtful: Tensor) -> None:
        """Overwrite some rows by what the exact formulas give, so many at a time as stay in the cache."""
        data = self.data
        for rows in doubtful.split(max(1, data.cached // data.class_count)) if len(doubtful) else ():
            offset = None if data.offset is None else data.offset[rows]
            exact = DenseKernel(self.loss, replace(data, weight=data.weight[rows], offset=offset))
            anew = self.again(rows)
            for number in range(exact.sweeps):
                exact.accumulate(number, anew)
                exact.finish(number)
            self.values[rows] = exact.losses().to(self.values.dtype)
            if data.wants_gradient:
                exact.residuals(anew, fresh=False)
                block.z[rows], self.factor[rows] = anew.z, 1.0
                if block.target_out is not None and anew.target_out is not None:
                    block.target_out[rows] = anew.target_out

    def losses(self) -> Tensor:  # noqa: D102
        return self.values

    def residuals(self, block: Block, fresh: bool) -> Residuals:  # noqa: D102
        return Residuals(block.z, block.target_out)

    def _buffer(self, number: int, like: Tensor) -> Tensor:
        return self.scratch(number)[: like.numel()].view(like.shape)

    def _masses(self, target: Tensor, rows: slice) -> Tensor:
        """Return a cross-entropy's target, any mass on each class."""
        y, (weight, share) = target, class_factors(self.data.class_weight)
        if self.loss.target != "probabilities":
            logits = target if self.loss.target == "teacher" else self._buffer(2, target).copy_(target)
            y = self._buffer(1, target)
            self.target_rest[rows], _ = _exponentials(logits, y)
            y.div_(1 + self.target_rest[rows])
        return masses(y, self.loss, self.data.class_count, weight, share)[1]

    def _compare_with_probabilities(self, z: Tensor, e: Tensor, rest: Tensor, y: Tensor, rows: slice) -> None:
        """``mass·log S − y·z``; residual ``mass·p − y``, left with the opposite sign, which takes one pass."""
        mass = y.sum(-1, keepdim=True)
        self.values[rows] = (mass * torch.log1p(rest) - z.mul_(y).sum(-1, keepdim=True)).squeeze(-1)
        if self.data.wants_gradient:
            torch.addcmul(y, e, mass / (1 + rest), value=-1, out=z)
            self.factor[rows].neg_()

    def _compare_with_logits(self, z: Tensor, e: Tensor, given: Tensor, out: Tensor | None, rows: slice) -> Indices:
        """Compare two softmaxes, whose numbers :meth:`_complete_numbers` completes; return the model's confident rows.

        The target's residual is written into ``out``.
        """
        divergence = None if self.loss.is_cross_entropy else self.loss.divergence
        reverse = isinstance(divergence, ReverseKL)
        # Of the reverse KL's target only the sum is needed, and a buffer less is in the cache.
        y, t = e if reverse and out is None else self._buffer(1, z), given
        if self.loss.target != "teacher":  # the caller's tensor must not be overwritten
            t = torch.mul(given, self.target_scale, out=self._buffer(2, z))
        self.target_rest[rows], target_confident = _exponentials(t, y)
        self.rest[rows], confident = _exponentials(z, e)
        unsure = self._replace_masks(z, e, t, y) if self.masks_target else None
        total, target_total = 1 + self.rest[rows], 1 + self.target_rest[rows]
        z_out = z if self.data.wants_gradient else None
        if isinstance(divergence, JensenShannon):
            constant = torch.log1p(self.rest[rows]) - torch.log1p(self.target_rest[rows])
            value = jensen_shannon(
                divergence.beta, torch.sub(t, z, out=z), constant, e, y, z_out, out, totals=(total, target_total),
                mixture=self._buffer(2, z),
            )  # fmt: skip
        elif reverse:
            value = pull(z.sub_(t), e, total, z_out)
            if out is not None:
                torch.sub(y, e * (target_total / total), out=out)
        else:  # a cross-entropy, s = −log p, or the forward KL, s = log y/p
            s = z.neg_() if divergence is None else torch.sub(t, z, out=z)
            value = pull(s, y, target_total, out)
            if z_out is not None:
                torch.addcmul(e, y, total / target_total, value=-1, out=z_out)
        value = value if unsure is None else torch.where(unsure, math.nan, value)
        self.values[rows] = value.squeeze(-1)
        if out is not None:
            factor = -divergence.beta if isinstance(divergence, JensenShannon) else 1.0
            out.mul_(self.data.weight[rows].unsqueeze(-1) * (factor * self.target_scale) / target_total)
            _balance(out, y, target_confident)
        return confident

    def _complete_numbers(self) -> None:
        """Add the logarithms of both sums to the values, and form the factors, once for all groups of rows."""
        log_rest, target_log_rest = torch.log1p(self.rest).squeeze(-1), torch.log1p(self.target_rest).squeeze(-1)
        self.factor.div_(1 + self.rest)
        if self.loss.is_cross_entropy:
            self.values += log_rest
        elif isinstance(self.loss.divergence, JensenShannon):
            self.factor *= self.loss.divergence.beta - 1
        elif isinstance(self.loss.divergence, ReverseKL):
            self.values += target_log_rest - log_rest
        else:
            self.values += log_rest - target_log_rest

    def _replace_masks(self, z: Tensor, e: Tensor, t: Tensor, y: Tensor) -> Tensor | None:
        """Replace −inf by a finite logit; return the rows, ``(rows, 1)``, where a mass meets a class without one."""
        least, meets = torch.finfo(z.dtype).min, None
        if isinstance(self.loss.divergence, ReverseKL):
            meets = (t < least) & (e > 0)
        elif not isinstance(self.loss.divergence, JensenShannon):  # which is finite
            meets = (z < least) & (y > 0)
        z.clamp_(min=FAR)
        t.clamp_(min=FAR)
        return None if meets is None else meets.any(-1, keepdim=True)


def _exponentials(z: Tensor, out: Tensor) -> tuple[Tensor, Indices]:
    """``z ← z − max``, ``out = e^z``; return ``Σ e^z − 1`` and the rows in which a class has more than one half.

    The 1 of the largest class is left out exactly.
    """
    z.sub_(z.amax(-1, keepdim=True))
    rest = exponentials_into(out, z).sum(-1, keepdim=True).sub_(1)
    confident = (rest.squeeze(-1) < 1).nonzero().squeeze(-1)
    if len(confident):  # whose other classes need all of their digits
        exact = torch.exp(z[confident])
        out[confident], rest[confident] = exact, rest_of(exact)
    return rest, confident


def _balance(gradient: Tensor, e: Tensor, confident: Indices) -> None:
    """Let a class above one half take up what its row misses of its sum of 0, as in ``softmax.dense_residual``."""
    if len(confident):
        top = e[confident].argmax(-1)
        gradient[confident, top] -= gradient[confident].sum(-1)
