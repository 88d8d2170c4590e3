"""The losses against a target that speaks of every class, in few passes over a tile of whole rows on the CPU.

The formulas are those of :mod:`softcurve.losses.divergences` without the branches that only masked, nearly equal or
extremely confident rows need; rows whose statistics do not vouch for four digits are named, to be computed again. With
``E = e^{z − max z}`` and ``S = ΣE``, so ``p = E / S``, a residual is left as a multiple of ``E`` and ``1 / S`` goes
with the row's weight into ``factor``, for the products' small operands.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from softcurve.head.kernel import Block, RowData
from softcurve.losses.divergences import ForwardKL, JensenShannon, ReverseKL
from softcurve.losses.spec import LossSpec

# At least four digits are kept of a divergence above this (as many as the rounding of a matrix product leaves in its
# logits), and six of a softmax with so much beside its largest class: of less, the rounding of a far z − max shows (see
# softmax.feels_rounding).
LEAST_VALUE = 1e-2
LEAST_REST = 1e-9


@dataclass
class ShortPath:
    """Row group by row group; then ``values``, which of them are ``sure``, and ``factor``, for the whole tile.

    ``scratch(i)`` is room for a row group, the same for every tile; ``target_scale`` what is still to multiply the
    target's logits.
    """

    loss: LossSpec
    data: RowData
    target_scale: float
    scratch: Callable[[int], Tensor]

    def __post_init__(self) -> None:
        weight = self.data.weight
        self.values, self.factor = torch.empty_like(weight), weight.unsqueeze(-1).clone()
        self.rest, self.target_rest = torch.empty_like(self.factor), torch.ones_like(self.factor)
        self.least = 0.0 if self.loss.is_cross_entropy else LEAST_VALUE * self.loss.divergence.curvature_at_agreement

    @staticmethod
    def serves(loss: LossSpec, data: RowData, block: Block) -> bool:
        """Whether there is a short path."""
        if block.z.device.type != "cpu" or block.v is not None or loss.softcap is not None or loss.z_loss:
            return False
        if loss.is_cross_entropy:
            plain = not loss.smoothing and data.class_weight is None
            return plain and not (loss.target == "probabilities" and block.target_out is not None)
        divergence = loss.divergence
        known = isinstance(divergence, ForwardKL | ReverseKL)
        known |= isinstance(divergence, JensenShannon) and 0.01 <= divergence.beta <= 0.99
        return known and loss.target != "probabilities"

    @property
    def sure(self) -> Tensor:
        """Rows that need not be computed again."""
        sure = (self.values > self.least) & self.values.isfinite()
        return sure & ((self.rest > LEAST_REST) & (self.target_rest > LEAST_REST)).squeeze(-1)

    def group(self, block: Block, rows: slice) -> None:
        """Losses of some rows; residuals in place."""
        z, given = block.z[rows], block.target_of(rows)
        e = self._room(0, z)
        rest = _exponentials(z, e)
        self.rest[rows] = rest
        if self.loss.target == "probabilities":
            self._against_probabilities(z, e, rest, given, rows)
        else:
            out = block.target_out[rows] if self.data.wants_gradient and block.target_out is not None else None
            self._against_logits(z, e, rest, given, out, rows)
        if self.data.wants_gradient:
            _settle(z, e, rest)

    def _room(self, number: int, like: Tensor) -> Tensor:
        return self.scratch(number)[: like.numel()].view(like.shape)

    def _against_probabilities(self, z: Tensor, e: Tensor, rest: Tensor, y: Tensor, rows: slice) -> None:
        """``mass·log S − y·z``; residual ``mass·p − y``."""
        mass = y.sum(-1, keepdim=True)
        self.values[rows] = (mass * torch.log1p(rest) - z.mul_(y).sum(-1, keepdim=True)).squeeze(-1)
        if self.data.wants_gradient:
            torch.sub(e.mul_(mass / (1 + rest)), y, out=z)

    def _against_logits(
        self, z: Tensor, e: Tensor, rest: Tensor, given: Tensor, out: Tensor | None, rows: slice
    ) -> None:
        y, t = self._room(1, z), given
        if self.loss.target != "teacher":  # not ours to overwrite
            t = self._room(2, z).copy_(given)
            if self.target_scale != 1:
                t.mul_(self.target_scale)
        target_rest = _exponentials(t, y)
        self.target_rest[rows] = target_rest
        log_rest, target_log_rest = torch.log1p(rest), torch.log1p(target_rest)
        total, target_total = 1 + rest, 1 + target_rest
        weight = self.data.weight[rows].unsqueeze(-1)
        wants_gradient = self.data.wants_gradient
        self.factor[rows] = weight / total
        divergence = None if self.loss.is_cross_entropy else self.loss.divergence
        out_factor = weight * self.target_scale / target_total
        if divergence is None or isinstance(divergence, ForwardKL):
            # s = −log p or log y/p
            s = torch.sub(log_rest, z, out=z) if divergence is None else torch.sub(t, z, out=z)
            if divergence is not None:
                s.add_(log_rest - target_log_rest)
            value = _pull(s, y, target_total, out, out_factor)
            if wants_gradient:
                torch.sub(e, y.mul_(total / target_total) if out is None else y * (total / target_total), out=z)
        elif isinstance(divergence, ReverseKL):
            s = self._room(2, z)
            torch.sub(z, t, out=s).sub_(log_rest - target_log_rest)
            value = _pull(s, e, total, z if wants_gradient else None)
            if out is not None:
                torch.sub(y, e * (target_total / total), out=out).mul_(out_factor)
        else:
            if not isinstance(divergence, JensenShannon):
                raise TypeError(f"the short path knows no {type(divergence).__name__}; use the divergence on logits")
            value = self._jensen_shannon(divergence.beta, z, e, y, (total, target_total), out, -out_factor)
            self.factor[rows] *= divergence.beta - 1
        self.values[rows] = value.squeeze(-1)
        if out is not None:
            _settle(out, y, target_rest)

    def _jensen_shannon(
        self,
        beta: float,
        z: Tensor,
        e: Tensor,
        y: Tensor,
        totals: tuple[Tensor, Tensor],
        out: Tensor | None,
        out_factor: Tensor,
    ) -> Tensor:
        """By ``log m/p = log1p(β (y/p − 1))`` and ``log m/y = log1p((1−β) (p/y − 1))``, not as a difference."""
        total, target_total = totals
        model_side = self._room(2, z)
        # Clamped, for a class without mass on either side: 0 times a finite logarithm.
        torch.div(y, e, out=z).mul_(total / target_total).clamp_(1e-35, 1e35)
        torch.sub(z, 1, out=model_side).mul_(beta).log1p_()
        z.reciprocal_().sub_(1).mul_(1 - beta).log1p_()
        to_target = _pull(z, y, target_total, out, out_factor * beta)
        to_model = _pull(model_side, e, total, z if self.data.wants_gradient else None)
        return -(beta * to_target + (1 - beta) * to_model)


def _exponentials(z: Tensor, out: Tensor) -> Tensor:
    """``z ← z − max``, ``out = e^z``; ``Σ e^z − 1``, where the 1 of the largest class is left out exactly."""
    z.sub_(z.amax(-1, keepdim=True))
    torch.exp(z, out=out)
    rest = out.sum(-1, keepdim=True).sub_(1)
    confident = _confident(rest)
    if confident is not None:
        rest[confident] = torch.frac(out[confident]).sum(-1, keepdim=True)
    return rest


def _confident(rest: Tensor) -> Tensor | None:
    """The rows whose largest class has more than one half."""
    confident = (rest.squeeze(-1) < 1).nonzero().squeeze(-1)
    return confident if confident.numel() else None


def _pull(s: Tensor, e: Tensor, total: Tensor, out: Tensor | None, factor: Tensor | None = None) -> Tensor:
    """``Σ p s`` of ``p = e / total``; ``out = factor · e (s − Σ p s)``. ``s`` is overwritten."""
    s.mul_(e)
    mean = s.sum(-1, keepdim=True).div_(total)
    if out is not None:
        torch.addcmul(s, e, -mean, out=out)
        if factor is not None:
            out.mul_(factor)
    return mean


def _settle(gradient: Tensor, e: Tensor, rest: Tensor) -> None:
    """A class above one half takes up what its row misses of its sum of 0, as in ``softmax.dense_residual``."""
    confident = _confident(rest)
    if confident is not None:
        top = e[confident].argmax(-1)
        gradient[confident, top] -= gradient[confident].sum(-1)
