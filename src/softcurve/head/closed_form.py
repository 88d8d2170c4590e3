"""Targets that speak of every class, on tiles of whole rows: probabilities, logits, a linear teacher's logits.

Every row can be had from the closed forms of :mod:`softcurve.losses.rows`. On the CPU most rows take the short path of
:mod:`softcurve.head.short` instead; a row whose statistics do not vouch for it is then computed again here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from softcurve.head.kernel import Block, Kernel, Residuals, Statistics
from softcurve.head.short import ShortPath
from softcurve.head.target import DenseTarget
from softcurve.losses import softmax
from softcurve.losses.rows import DenseCrossEntropy, LogitDivergence, RowLoss


@dataclass
class ClosedFormKernel(Kernel):
    """One sweep does all; ``again(rows)`` computes logits and target of some rows anew."""

    again: Callable[[Tensor], Block] = field(kw_only=True)
    scratch: Callable[[int], Tensor] = field(kw_only=True)  # the short path's

    def __post_init__(self) -> None:
        self.target = DenseTarget(self.loss, self.data)
        self.row_loss: RowLoss = (
            DenseCrossEntropy(self.loss.logit_map, self.loss.z_loss)
            if self.loss.is_cross_entropy
            else LogitDivergence(self.loss.logit_map, divergence=self.loss.divergence)
        )
        self.parts: dict[str, list[Tensor]] = {}

    def losses(self) -> Tensor:  # noqa: D102
        return torch.cat(self.parts["rows"])

    def finish(self, number: int) -> None:  # noqa: D102
        if self.data.wants_stats:
            self.statistics = Statistics(*(torch.cat(self.parts[name]) for name in ("lse", "entropy", "top", "label")))

    def reduce_over(self, number: int, group: ProcessGroup) -> None:  # noqa: D102
        raise NotImplementedError("a tile of whole rows has nothing to sum up")

    def prepare_residuals(self) -> None:  # noqa: D102
        pass  # the sweep has left the residuals

    def tangents(self, group: ProcessGroup | None) -> Tensor:  # noqa: D102
        return torch.cat(self.parts["tangents"])

    def residuals(self, block: Block, fresh: bool) -> Residuals:  # noqa: D102
        return Residuals(block.z, block.target_out, block.v, block.target_v_out)

    def accumulate(self, number: int, block: Block) -> None:  # noqa: D102
        if self.data.wants_stats:
            for rows in self.groups(block):
                self._observe(block, rows)
        if block.v is not None:
            for rows in self.groups(block):
                self._product(block, rows, self.data.weight[rows])
            return
        if ShortPath.serves(self.loss, self.data, block):
            self._by_short_path(block)
        else:
            groups = self.groups(block)
            self.parts["rows"] = [self._gradient(block, rows, self.data.weight[rows]) for rows in groups]

    def _by_short_path(self, block: Block) -> None:
        short = ShortPath(self.loss, self.data, self.target.scale_left, self.scratch)
        for rows in self.groups(block):
            short.group(block, rows)
        self.row_factor, values, sure = short.factor, short.values, short.sure
        if not sure.all():
            doubtful = (~sure).nonzero().squeeze(-1)
            self._redo(block, values, doubtful)
            self.row_factor[doubtful] = 1.0
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
            "lse": softmaxed.log_sum_exp
            if self.data.offset is None
            else softmaxed.log_sum_exp + self.data.offset[rows, 0],
            "entropy": softmax.entropy_rows(z),
            "top": z.argmax(-1),
            "label": block.target_of(rows).argmax(-1),
        }
        for name, part in found.items():
            self.parts.setdefault(name, []).append(part)
