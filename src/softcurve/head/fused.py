"""The kernels of :mod:`softcurve.head.lists` and :mod:`softcurve.head.blocks` with their elementwise parts in Triton.

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

import functools
import importlib
import importlib.util
import os
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from softcurve.head import products
from softcurve.head.blocks import BlockKernel
from softcurve.head.kernel import Block, Residuals
from softcurve.head.lists import NO_MASS, ListKernel
from softcurve.losses.divergences import ForwardKL, JensenShannon, ReverseKL
from softcurve.losses.spec import LossSpec


@functools.cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


MEMBERS = {ForwardKL: "FORWARD", ReverseKL: "REVERSE", JensenShannon: "JENSEN_SHANNON"}


def serves(loss: LossSpec, device: torch.device, dtype: torch.dtype) -> bool:
    """Whether tiles of this loss have Triton kernels on this device; on the CPU only in Triton's interpreter.

    float64 stays with ATen: who asks for it wants its digits, not the hardware's single-precision exponentials. So
    does a divergence whose terms are not written in Triton, unless the target is sparse: then the divergence is
    evaluated on the few listed classes alone, which the Triton kernels leave to :mod:`softcurve.losses.rows`.
    """
    if dtype != torch.float32 or not _has_triton():
        return False
    if not (loss.is_cross_entropy or loss.target == "sparse" or type(loss.divergence) in MEMBERS):
        return False
    return device.type == "cuda" or (device.type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1")


def residual_dtype(
    loss: LossSpec, input: Tensor | None, weight: Tensor | None, dtype: torch.dtype
) -> torch.dtype | None:
    """The half precision that residuals are left in for the products with these; ``None``: in the logits' place."""
    if input is None or weight is None or not serves(loss, weight.device, dtype):
        return None
    return products.narrow_residuals(products.shared_half(input, weight))


def kernels(name: str) -> Any:
    """``softcurve.head.triton_…``, imported when first wanted: it takes Triton with it."""
    return importlib.import_module(f"softcurve.head.triton_{name}")


# --- targets that name few classes -----------------------------------------------------------------------------------


@dataclass
class FusedList(ListKernel):
    """``single``: the block that a sweep sees is the whole of its rows here, and what it writes will be used."""

    single: bool = field(kw_only=True, default=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.own_raw = torch.full_like(self.own, torch.nan)  # before the soft cap
        self.v_raw = torch.zeros_like(self.own)
        self.written: Tensor | None = None  # the shift of what a sweep has left in a block's ``out``

    def sweep(self, number: int, block: Block) -> None:  # noqa: D102
        lists, loss = kernels("lists"), self.loss
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

    def merge(self, number: int, group: ProcessGroup) -> None:  # noqa: D102
        super().merge(number, group)
        self.lowered = None  # a tile holds logits, and ``written`` says what stands in its ``out``

    def form(self) -> None:  # noqa: D102
        self.gradient, self.target_gradient = self.coarse_gradient(self.data.weight.double())
        self.beta = self._of_others(self.gradient[:, -1:])
        if self.data.has_direction:
            self._differentiate()

    def residuals(self, block: Block, fresh: bool) -> Residuals:  # noqa: D102
        lists, loss = kernels("lists"), self.loss
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
            self.factor = torch.where(safe, factor, 1.0)
            lists.put(out, places, torch.where(masked, 0.0, listed / self.factor * slope))
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


# --- targets that speak of every class -------------------------------------------------------------------------------


@dataclass
class FusedBlocks(BlockKernel):
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

    def sweep(self, number: int, block: Block) -> None:  # noqa: D102
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
        """As :meth:`softcurve.head.blocks._Softmax.absorb`, of a block that has been looked at."""
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
