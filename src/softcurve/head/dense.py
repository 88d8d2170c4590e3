"""Targets that speak of every class, on tiles of whole rows: probabilities, logits, a linear teacher's logits.

Every row can be had from the closed forms of :mod:`softcurve.objective`. On the CPU most rows take a short path
instead: the same formulas in few passes that write into their own buffers, without the branches that only confident,
nearly equal or masked rows need. A row whose statistics do not vouch for it is computed again by the closed forms.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from softcurve import softmax
from softcurve.divergences import ForwardKL, JensenShannon, ReverseKL
from softcurve.head.kernel import Block, Kernel, Residuals, Statistics
from softcurve.head.target import DenseTarget
from softcurve.objective import DenseCrossEntropy, LogitDivergence, RowLoss

# The short path keeps six digits of a divergence above this, and of a softmax with so much beside its largest class: of
# less, the rounding of a far z − max shows (see softmax.feels_rounding).
LEAST_VALUE = 1e-3
LEAST_REST = 1e-9


@dataclass
class DenseKernel(Kernel):
    """One sweep does all; ``again(rows)`` computes logits and target of some rows anew."""

    again: Callable[[Tensor], Block] = field(kw_only=True)

    def __post_init__(self) -> None:
        self.target = DenseTarget(self.loss, self.data.class_weight, self.data.class_count)
        self.row_loss: RowLoss = (
            DenseCrossEntropy(self.loss.logit_map, self.loss.z_loss)
            if self.loss.family == "cross_entropy"
            else LogitDivergence(self.loss.logit_map, divergence=self.loss.divergence)
        )
        self.parts: dict[str, list[Tensor]] = {}
        self.scratch: list[Tensor] = []

    def rows(self) -> Tensor:  # noqa: D102
        return torch.cat(self.parts["rows"])

    def close(self, number: int) -> None:  # noqa: D102
        if self.data.wants_stats:
            self.statistics = Statistics(*(torch.cat(self.parts[name]) for name in ("lse", "entropy", "top", "label")))

    def tangents(self) -> Tensor:  # noqa: D102
        return torch.cat(self.parts["tangents"])

    def residuals(self, block: Block, fresh: bool) -> Residuals:  # noqa: D102
        return Residuals(block.z, block.target_out, block.v, block.target_v_out)

    def sweep(self, number: int, block: Block) -> None:  # noqa: D102
        if self.data.wants_stats:
            for rows in self.groups(block):
                self._observe(block, rows)
        if block.v is not None:
            for rows in self.groups(block):
                self._product(block, rows, self.data.weight[rows])
            return
        short = self._has_short_path(block)
        doubtful: list[Tensor] = []
        values = block.z.new_empty(len(block.z))
        for rows in self.groups(block):
            if short:
                values[rows], sure = self._short(block, rows)
                if not sure.all():
                    doubtful.append((~sure).nonzero().squeeze(-1) + rows.start)
            else:
                values[rows] = self._gradient(block, rows, self.data.weight[rows])
        if doubtful:
            self._redo(block, values, torch.cat(doubtful))
        self.parts["rows"] = [values]

    # --- by the closed forms -----------------------------------------------------------------------------------------

    def _gradient(self, block: Block, rows: slice, weight: Tensor) -> Tensor:
        """The rows' losses; residuals where they are wanted."""
        z, given = block.z[rows], block.target_of(rows)
        target = self.target.forward(given)
        values = self.row_loss.value(z, target)
        if self.data.wants_gradient:
            wants_target = block.target_out is not None
            in_z, in_target = self.row_loss.gradient(weight.to(z.dtype), z, target, (True, wants_target))
            assert in_z is not None
            if in_target is not None and block.target_out is not None:
                block.target_out[rows] = self.target.gradient(given, in_target)
            z.copy_(in_z)
        return values

    def _redo(self, block: Block, values: Tensor, doubtful: Tensor) -> None:
        """Some rows once more, so many at a time as a cache-sized piece holds."""
        step = max(1, self.data.cached // self.data.class_count)
        for some in doubtful.split(step):
            anew = self.again(some)
            values[some] = self._gradient(anew, slice(None), self.data.weight[some])
            if self.data.wants_gradient:
                block.z[some] = anew.z
                if block.target_out is not None and anew.target_out is not None:
                    block.target_out[some] = anew.target_out

    def _product(self, block: Block, rows: slice, weight: Tensor) -> None:
        z, given, v = block.z[rows], block.target_of(rows), block.v
        assert v is not None
        target = self.target.forward(given)
        target_v = None if block.target_v is None else self.target.direction(given, block.target_v[rows])
        scale, wants_target = weight.to(z.dtype), block.target_out is not None
        in_z, in_target = self.row_loss.gradient(scale, z, target, (True, wants_target))
        change_z, change_target = self.row_loss.hessian_product(scale, z, target, v[rows], target_v)
        if self.data.wants_tangents:
            self.parts.setdefault("tangents", []).append(self._tangents(z, target, v[rows], target_v))
        if block.target_out is not None and block.target_v_out is not None:
            assert in_target is not None
            block.target_v_out[rows] = self.target.product(
                given, in_target, change_target, None if block.target_v is None else block.target_v[rows]
            )
            block.target_out[rows] = self.target.gradient(given, in_target)
        assert in_z is not None
        if change_z is None:
            v[rows].zero_()
        else:
            v[rows].copy_(change_z)
        z.copy_(in_z)

    def _tangents(self, z: Tensor, target: Tensor, v: Tensor, target_v: Tensor | None) -> Tensor:
        ones = z.new_ones(len(z))
        in_z, in_target = self.row_loss.gradient(ones, z, target, (True, target_v is not None))
        assert in_z is not None
        total = (in_z * v).sum(-1)
        return total if in_target is None or target_v is None else total + (in_target * target_v).sum(-1)

    def _observe(self, block: Block, rows: slice) -> None:
        z = self.loss.logit_map.value(block.z[rows])
        softmaxed = softmax.softmax_rows(z)
        found = {
            "lse": softmaxed.log_sum_exp,
            "entropy": softmax.entropy_rows(z),
            "top": z.argmax(-1),
            "label": block.target_of(rows).argmax(-1),
        }
        for name, part in found.items():
            self.parts.setdefault(name, []).append(part)

    # --- the short path ----------------------------------------------------------------------------------------------

    def _has_short_path(self, block: Block) -> bool:
        if block.z.device.type != "cpu" or self.loss.softcap is not None or self.loss.z_loss:
            return False
        if self.loss.family == "cross_entropy":
            return (
                not self.loss.smoothing
                and self.data.class_weight is None
                and not (self.loss.target == "probabilities" and block.target_out is not None)
            )
        mixed = self.loss.family != "js" or 0.01 <= self.loss.beta <= 0.99
        return mixed and self.loss.target != "probabilities"

    def _buffers(self, like: Tensor, count: int) -> list[Tensor]:
        while len(self.scratch) < count:
            self.scratch.append(torch.empty_like(like, memory_format=torch.contiguous_format))
        return [buffer[: len(like)] for buffer in self.scratch[:count]]

    def _short(self, block: Block, rows: slice) -> tuple[Tensor, Tensor]:
        """Losses, and which of them are sure; residuals in place."""
        z, given = block.z[rows], block.target_of(rows)
        if self.loss.family == "cross_entropy" and self.loss.target == "probabilities":
            return self._short_probabilities(z, given, rows)
        p, y, ratio, mixture = self._buffers(z, 4)
        z.sub_(z.amax(-1, keepdim=True))
        torch.exp(z, out=p)
        model_rest = self._rest(p)
        torch.sub(given, given.amax(-1, keepdim=True), out=mixture)
        scale = self.target.scale_left
        if scale != 1:
            mixture.mul_(scale)
        torch.exp(mixture, out=y)
        target_rest = self._rest(y)
        torch.sub(z, mixture, out=ratio).sub_(torch.log1p(model_rest) - torch.log1p(target_rest))
        p.mul_(1 / (1 + model_rest))
        y.mul_(1 / (1 + target_rest))
        out = block.target_out[rows] if self.data.wants_gradient and block.target_out is not None else None
        weight = self.data.weight[rows].to(z.dtype).unsqueeze(-1)
        divergence = self.loss.divergence if self.loss.family != "cross_entropy" else None
        if divergence is None:
            log_p = z.sub_(torch.log1p(model_rest))
            values = self._pulled(y, log_p.neg_(), out).squeeze(-1)  # −log p
            if self.data.wants_gradient:
                torch.sub(p, y, out=z)
            least = 0.0
        elif isinstance(divergence, ForwardKL):
            values = self._pulled(y, ratio.neg_(), out).squeeze(-1)
            if self.data.wants_gradient:
                torch.sub(p, y, out=z)
            least = LEAST_VALUE
        elif isinstance(divergence, ReverseKL):
            values = self._pulled(p, ratio, z if self.data.wants_gradient else None).squeeze(-1)
            if out is not None:
                torch.sub(y, p, out=out)
            least = LEAST_VALUE
        else:
            assert isinstance(divergence, JensenShannon)
            beta = divergence.beta
            # log m/p = log((1−β) + β e^{−r}) and log m/y = log(β + (1−β) e^r): no difference of two logarithms.
            torch.neg(ratio.clamp_(-80.0, 80.0), out=z).exp_()
            torch.mul(z, beta, out=ratio).add_(1 - beta).log_().neg_()
            z.reciprocal_().mul_(1 - beta).add_(beta).log_().neg_()
            to_target = self._pulled(y, z, out, beta)
            to_model = self._pulled(p, ratio, z if self.data.wants_gradient else None, 1 - beta)
            values = (to_target + to_model).squeeze(-1)
            least = LEAST_VALUE * beta * (1 - beta)
        sure = (values > least) & values.isfinite()
        sure &= ((model_rest > LEAST_REST) & (target_rest > LEAST_REST)).squeeze(-1)
        if self.data.wants_gradient:
            self._settle(z, p, model_rest)
            z.mul_(weight)
            if out is not None:
                self._settle(out, y, target_rest)
                out.mul_(weight * self.target.scale_left)
        return values, sure

    @staticmethod
    def _pulled(p: Tensor, s: Tensor, out: Tensor | None, factor: float = 1.0) -> Tensor:
        """``factor Σ p s``; and ``out = factor p (s − Σ p s)``. ``s`` is overwritten."""
        s.mul_(p)
        total = s.sum(-1, keepdim=True)
        if out is not None:
            torch.addcmul(s, p, -total, out=out)
            if factor != 1:
                out.mul_(factor)
        return factor * total

    @staticmethod
    def _rest(exponentials: Tensor) -> Tensor:
        """``Σ e^{z − max}`` but for the largest class, an exact 1 that the fractional part of a confident row drops."""
        rest = exponentials.sum(-1, keepdim=True).sub_(1)
        confident = (rest.squeeze(-1) < 1).nonzero().squeeze(-1)
        if confident.numel():
            rest[confident] = torch.frac(exponentials[confident]).sum(-1, keepdim=True)
        return rest

    @staticmethod
    def _settle(gradient: Tensor, p: Tensor, rest: Tensor) -> None:
        """A class above one half takes up what its row misses of its sum of 0, as in ``softmax.dense_residual``."""
        confident = (rest.squeeze(-1) < 1).nonzero().squeeze(-1)
        if confident.numel():
            top = p[confident].argmax(-1)
            gradient[confident, top] -= gradient[confident].sum(-1)

    def _short_probabilities(self, z: Tensor, y: Tensor, rows: slice) -> tuple[Tensor, Tensor]:
        (p,) = self._buffers(z, 1)
        y = y.to(z.dtype)
        z.sub_(z.amax(-1, keepdim=True))
        torch.exp(z, out=p)
        rest = self._rest(p)
        mass = y.sum(-1, keepdim=True)
        values = (mass * torch.log1p(rest) - z.mul_(y).sum(-1, keepdim=True)).squeeze(-1)
        sure = values.isfinite() & (rest > LEAST_REST).squeeze(-1)
        if self.data.wants_gradient:
            weight = self.data.weight[rows].to(z.dtype).unsqueeze(-1)
            p.mul_(mass / (1 + rest))
            torch.sub(p, y, out=z)
            self._settle(z, p, rest)
            z.mul_(weight)
        return values, sure
