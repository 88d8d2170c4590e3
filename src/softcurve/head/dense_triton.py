"""The kernels of :mod:`softcurve.head.sparse` and :mod:`softcurve.head.dense` with their elementwise parts in Triton.

They hold the same statistics under the same names and leave what belongs to rows alone to their parents; what looks at
a whole tile is one launch. Logits stay as they are until residuals are formed, so a tile serves all sweeps, and a soft
cap is taken on the way, with no room of its own.

How often a tile is touched: index and list targets with half-precision products read it once and write the residual,
in half precision, once, ``e^{z − shift}`` with the row's factor left to the products' small operands. Where the
residual takes the logits' place (float32), or needs the row's sum (label smoothing, a direction), or statistics are
wanted, they read it twice. Targets that speak of every class are read once for the softmaxes, once for the row's sums,
once more for the sum of changes along a direction, and then for the residuals of both sides, all in float32.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from softcurve.head.backends import MEMBERS, kernels
from softcurve.head.dense import DenseCurvature, DenseKernel
from softcurve.head.kernel import (
    Block,
    CurvatureBlock,
    Residuals,
)
from softcurve.head.sparse import NO_MASS
from softcurve.losses.rows import (
    GAUSS_NEWTON,
    HESSIAN,
)


@dataclass
class TritonDenseKernel(DenseKernel):
    """The sweeps of its parent, on whole rows too."""

    def __post_init__(self) -> None:
        super().__post_init__()
        dense, loss = kernels("dense"), self.loss
        cross_entropy = loss.is_cross_entropy
        self.by_class_weight = cross_entropy and self.data.class_weight is not None
        self.description = dense.Description(
            family=self._family(dense),
            beta=getattr(loss.divergence, "beta", 0.5),
            softcap=loss.softcap,
            temperature=loss.temperature,
            logarithm=not cross_entropy and loss.target == "probabilities",
            target_scale=1.0 if cross_entropy else self.map.scale_left,
            smoothing=loss.smoothing,
            class_count=self.data.class_count,
            z_loss=loss.z_loss,
        )

    def accumulate(self, number: int, block: Block) -> None:  # noqa: D102
        dense = kernels("dense")
        if number == 0:
            cap, logarithm = self.loss.softcap, self.description.logarithm
            self._absorb(
                self.model.softmax,
                dense.softmax(block.z, cap, self.loss.temperature, 1.0, logarithm=False),
                block.classes.start,
            )
            if self.by_logits:
                assert block.target is not None
                scale = self.description.target_scale
                given = _side_by_side(block.target)
                found = dense.softmax(given, None, 1.0, scale, logarithm=logarithm)
                self._absorb(self.target.softmax, found, block.classes.start)
            return
        if number == 1:
            self._gather_sums(block)
            return
        found = dense.changes(self.description, self._tile(block), self._table()).double().unsqueeze(-1)
        self.model.change += found[0]
        if self.by_logits:
            self.target.change += found[1]

    def residuals(self, block: Block, fresh: bool) -> Residuals:  # noqa: D102
        out = block.z if block.out is None else block.out
        v_out = block.v if block.v_out is None else block.v_out
        rooms = {"out": out, "v_out": v_out, "target_out": block.target_out, "target_v_out": block.target_v_out}
        found = kernels("dense").residuals(
            self.description,
            self._tile(block),
            with_strides(rooms),
            self._table(),
            self._places(),
            block.classes.start,
            wants_tangents=self.data.wants_tangents,
        )
        if found is not None:
            self.tangent += found.double().sum(0).unsqueeze(-1)
        return Residuals(out, block.target_out, v_out, block.target_v_out)

    # --- parts -------------------------------------------------------------------------------------------------------

    def _family(self, dense: Any) -> int:
        if self.loss.is_cross_entropy:
            return int(dense.SOFTMAX if self.by_logits else dense.PROBABILITIES)
        divergence = self.loss.divergence
        if type(divergence) not in MEMBERS:
            raise TypeError(
                f"divergence must be one of {', '.join(member.__name__ for member in MEMBERS)} for the Triton kernels, "
                f"got {type(divergence).__name__}"
            )
        return int(getattr(dense, MEMBERS[type(divergence)]))

    @staticmethod
    def _absorb(running: Any, found: tuple[Tensor, Tensor, Tensor], first: int) -> None:
        """As :meth:`softcurve.head.dense._Softmax.absorb`, of a block that has been looked at."""
        top, rest = (part.double().unsqueeze(-1) for part in found[:2])
        old = running.offset
        higher, new = top > old, torch.maximum(top, old)
        safe = torch.where(new == NO_MASS, 0.0, new)
        now, before = torch.exp(top - safe), torch.exp(old - safe)
        running.rest = rest * now + running.rest * before + torch.where(higher, before, now)
        running.offset = new
        running.top = torch.where(higher, found[2].unsqueeze(-1) + first, running.top)

    def _gather_sums(self, block: Block) -> Any:
        found, label = kernels("dense").sums(
            self.description,
            self._tile(block),
            self._table(),
            self._places(),
            block.classes.start,
            wants_stats=self.data.wants_stats,
        )
        wide = type(found)(*(part.double().unsqueeze(-1) for part in found))
        for side, score, rest, mean in (
            (self.model, wide.score, wide.score_rest, wide.mean_v),
            (self.target, wide.target_score, wide.target_score_rest, wide.target_mean_v),
        ):
            if side is self.model or self.by_logits:
                side.score += score
                side.score_rest += rest
                side.mean_v += mean
        self.values += wide.value
        if not self.loss.is_cross_entropy:
            self.surplus += wide.surplus
        if self.data.wants_stats:
            self.information += wide.information
            better = wide.best > self.best
            self.best = torch.where(better, wide.best, self.best)
            self.label = torch.where(better, label.unsqueeze(-1) + block.classes.start, self.label)
        return wide

    def _tile(self, block: Block) -> dict[str, Any]:
        """What a kernel reads."""
        assert block.target is not None
        read = {"z": block.z, "target": _side_by_side(block.target), "v": block.v, "target_v": block.target_v}
        weight, share = None, None
        if self.by_class_weight:
            factors = (self.data.weight_of(block.classes), self.data.share_of(block.classes))
            weight, share = (None if factor is None else factor.float().contiguous() for factor in factors)
        return {
            **with_strides(read),
            "class_weight": weight,
            "class_share": share,
            "WEIGHED": self.by_class_weight,
            "DIRECTED": block.v is not None,
            "TARGET_DIRECTED": block.target_v is not None,
        }

    def _places(self) -> Tensor:
        """The class that is kept apart on either side, where it has more than one half, else −1."""
        sides = (self.model.softmax, self.target.softmax)
        return torch.stack([torch.where(side.rest < 1, side.top, -1).squeeze(-1) for side in sides])

    def _table(self) -> Tensor:
        """The numbers of each row that the kernels want, float32, in the order they know."""
        model, target = self.model, self.target
        rows: list[Tensor] = []
        for running in (model.softmax, target.softmax):
            offset = torch.where(running.offset == NO_MASS, 0.0, running.offset)
            rows += [offset, torch.log1p(running.rest), 1 / (1 + running.rest)]
        lse = self.log_sum_exp()
        constant = model.softmax.log_sum_exp() - target.softmax.log_sum_exp()
        rows += [constant]
        for side in (model, target):
            # At a class above one half s − p S is minus the sum of all others.
            rows += [side.score, side.score * side.softmax.complement(slice(None)) - side.score_rest]
        rows += [lse, model.mean_v, target.mean_v, model.change, target.change, self.data.weight.unsqueeze(-1)]
        return torch.cat(rows, -1).T.to(torch.float32).contiguous()


def _side_by_side(tensor: Tensor) -> Tensor:
    """Classes next to each other."""
    return tensor if tensor.shape[-1] <= 1 or tensor.stride(-1) == 1 else tensor.contiguous()


def with_strides(tensors: dict[str, Tensor | None]) -> dict[str, Any]:
    """Each with its ``…_stride``."""
    stride = kernels("math").stride
    named: dict[str, Any] = dict(tensors)
    return named | {f"{name}_stride": stride(tensor) for name, tensor in tensors.items()}


@dataclass
class TritonDenseCurvature(TritonDenseKernel, DenseCurvature):
    """Sweeps leave logits; :meth:`prepare_block` makes probabilities of them."""

    def accumulate(self, number: int, block: Block) -> None:  # noqa: D102
        if number == 0:
            super().accumulate(number, block)
            return
        found = self._gather_sums(block)
        if not self.loss.is_cross_entropy:
            curve = found.curve - found.score if self.matrix == GAUSS_NEWTON else found.curve
            self.total += curve if self.needs_q(self.loss.divergence, self.matrix) else 1.0

    def prepare_block(self, block: CurvatureBlock, fresh: bool, again: bool = False) -> None:  # noqa: D102
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

    def accumulate_column(self, block: CurvatureBlock, number: int) -> None:  # noqa: D102
        loss = self.loss
        found = kernels("dense_curvature").gather(
            self._column(block), self.places, block.classes.start, loss.softcap, loss.temperature
        )
        sums: tuple[Tensor, ...] = tuple(found.double().unsqueeze(-1))
        if number in self.sums:
            sums = tuple(before + here for before, here in zip(self.sums[number], sums, strict=True))
        self.sums[number] = sums

    def multiply_column(self, block: CurvatureBlock, number: int) -> None:  # noqa: D102
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
