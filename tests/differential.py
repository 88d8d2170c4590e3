"""One loss as a frozen, serialisable description, and the tensors that it stands for.

Every number lies on a coarse grid, so that the logits are exact in each dtype and all routes see the same ones: what is
left between two routes is the rounding of the loss itself. A description is a dictionary of plain values, which a
process of a group reads back as JSON.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

import softcurve

FEATURES = 3
CROSS_ENTROPY = "cross_entropy"
LISTS = ("bucket", "renormalize")
FAR_OUTSIDE = 7  # so far above the last class a padding index lies


@dataclass(frozen=True, repr=False)
class Problem:
    """A description of one call, from which ``build`` makes the tensors. The defaults describe the plainest call."""

    loss: str = CROSS_ENTROPY  # or forward, reverse, js
    kind: str = "indices"  # or float, probabilities, logits, bucket, renormalize, teacher
    reduction: str = "mean"
    dtype: str = "float64"  # of features and head
    head_dtype: str | None = None  # of the head, where it has another
    leading: tuple[int, ...] = (4,)
    positions: tuple[int, ...] = ()  # the K more dimensions of the weight
    classes: int = 5
    beta: float = 0.5
    listed: str = "few"  # of a list: few classes, all that are live, or all
    target_dtype: str | None = None
    weight_dtype: str | None = None  # of class and sample weights
    index_dtype: str = "int64"
    confident: bool = False
    bias: str = "none"  # or plain, masked (every third class), last (the second half), one (all but one masked)
    offset: float = 0.0
    target_offset: float = 0.0
    row_masks: bool = False  # logits of −inf, others in each row, where the target has no mass: no head makes these
    anywhere: bool = False  # the target may have mass on masked classes
    target_zeros: bool = False  # the target leaves out classes that the model has
    class_weight: str = "none"  # or some, zero
    sample_weight: str = "none"  # or some, zero
    ignored: str = "none"  # or some, all
    ignore_index: int | None = None
    padding: str = "none"  # what targets of weight 0 hold: nan, zeros, repeated
    dead_features: bool = False  # rows of weight 0 have features that are NaN
    label_smoothing: float = 0.0
    temperature: float = 1.0
    softcap: float | None = None
    z_loss: float = 0.0
    base: float = math.e
    shift: int = 0
    budget: str = "default"  # or least, tiles
    numbers: str = "python"  # or numpy, tensor: what the options are given as
    wanted: str = "all"  # the gradients asked for: all, features, head, target (and the sample weights), none
    strided: bool = False  # no tensor is contiguous
    stats: bool = False
    fault: str | None = None
    seed: int = 0

    def __repr__(self) -> str:
        changed = [f"{f.name}={getattr(self, f.name)!r}" for f in dataclasses.fields(self) if self.changes(f)]
        return f"Problem({', '.join(changed)})"

    def changes(self, f: dataclasses.Field[Any]) -> bool:
        """Return whether a field differs from its default."""
        return bool(getattr(self, f.name) != f.default)

    @property
    def rows(self) -> tuple[int, ...]:
        """The shape of the losses before they are reduced."""
        return (*self.leading, *self.positions)

    @property
    def ignored_index(self) -> int:
        return -100 if self.ignore_index is None else self.ignore_index

    @property
    def wide(self) -> torch.dtype:
        """The dtype in which the loss is computed, at least float32."""
        return torch.float64 if "float64" in (self.dtype, self.head_dtype) else torch.float32

    @property
    def result(self) -> torch.dtype:
        """The dtype of the returned loss: a wider target widens it."""
        of_target = getattr(torch, self.target_dtype or self.dtype)
        return self.wide if self.by_indices else torch.promote_types(self.wide, of_target)

    @property
    def model_dtype(self) -> torch.dtype:
        """The dtype that the logits of these features and this head have."""
        return torch.promote_types(getattr(torch, self.dtype), getattr(torch, self.head_dtype or self.dtype))

    @property
    def by_indices(self) -> bool:
        return self.kind == "indices"

    def number(self, value: Any) -> Any:
        """Return an option as a Python number, a numpy scalar or a 0-d tensor."""
        if value is None or isinstance(value, str) or self.numbers == "python":
            return value
        if self.numbers == "numpy":
            return np.array(value)[()]
        return torch.tensor(value, dtype=torch.float64 if isinstance(value, float) else torch.int64)


def problem_of(described: Mapping[str, Any]) -> Problem:
    """Read a problem from JSON, which turns tuples into lists."""
    tuples = {name: tuple(described[name]) for name in ("leading", "positions")}
    return Problem(**{**described, **tuples})


@dataclass
class Call:
    """The arguments of one call. A fault changes them; the oracle never sees a changed call."""

    problem: Problem
    input: Tensor
    linear_weight: Tensor  # (C, *positions, d)
    linear_bias: Tensor | None
    target: dict[str, Any]  # the tensors of the target, as the routes are given them
    clean: dict[str, Any]  # the same without padding, for the oracle
    weight: Tensor | None
    sample_weight: Any
    options: dict[str, Any] = field(default_factory=dict)
    make_target: Any = None  # set by faults
    logits: Tensor | None = None  # in place of those of the head; by faults not even floating point

    def made_target(self) -> Any:
        """Return the target. Each route makes its own, so that an error of the target's type counts as the route's."""
        return wrapped(self.problem.kind, self.target) if self.make_target is None else self.make_target()

    def exact_logits(self) -> Tensor:
        """Return the logits in float64, ``(*rows, C)``."""
        if self.logits is not None:
            return self.logits
        e, w = self.input.double(), self.linear_weight.double()
        if self.problem.positions:
            z = torch.einsum("nd,cpd->npc", e, w.flatten(1, -2)).reshape(*self.problem.rows, len(w))
        else:
            z = e @ w.T
        return z if self.linear_bias is None else z + self.linear_bias.double().movedim(0, -1)


def wrapped(kind: str, tensors: Mapping[str, Any]) -> Any:
    """Return tensors wrapped in the type of target that they stand for."""
    if kind in ("indices", "float"):
        return tensors["values"]
    if kind in LISTS:
        return softcurve.TopK(tensors["indices"], tensors["values"], tail=kind)
    if kind == "teacher":
        return softcurve.LinearTeacher(tensors["values"], tensors["weight"], tensors["bias"])
    return {"probabilities": softcurve.Probabilities, "logits": softcurve.Logits}[kind](tensors["values"])


# --- numbers -----------------------------------------------------------------------------------------------------------


class _Numbers:
    """A source of random numbers on grids, determined by its seed."""

    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)

    def integers(self, low: int, high: int, *shape: int) -> Tensor:
        """Return integers from ``low`` to ``high``, both included."""
        return torch.randint(low, high + 1, shape, generator=self.generator)

    def grid(self, largest: float, step: float, *shape: int) -> Tensor:
        count = round(largest / step)
        return self.integers(-count, count, *shape).double() * step

    def order(self, *shape: int) -> Tensor:
        return torch.rand(*shape, generator=self.generator).argsort(-1)


def live_classes(p: Problem) -> Tensor:
    """Return which classes the head does not mask, ``(C,)``."""
    at = torch.arange(p.classes)
    return {
        "masked": (at % 3 != 1) | (p.classes == 1),
        "last": at < max(1, p.classes // 2),
        "one": at == p.classes // 2,
    }.get(p.bias, torch.ones(p.classes, dtype=torch.bool))


def build(p: Problem) -> Call:
    """Return the tensors of a problem; they are the same at each call."""
    numbers = _Numbers(p.seed)
    dtype, of_head = getattr(torch, p.dtype), getattr(torch, p.head_dtype or p.dtype)
    scale = 4.0 if p.confident else 1.0
    input = numbers.grid(1, 0.5, *p.leading, FEATURES)
    linear_weight = numbers.grid(2 * scale, 0.25 * scale, p.classes, *p.positions, FEATURES)
    bias = _bias(p, numbers, scale)
    sample_weight = _weights(p.sample_weight, numbers, p, *p.rows)
    weight = _weights(p.class_weight, numbers, p, p.classes)
    clean = _target(p, numbers)
    target = _padded(p, clean, sample_weight)
    if p.positions and p.kind == "float":  # the classes second, as in torch
        target["values"] = target["values"].movedim(-1, 1)
    input = _dead(p, input, sample_weight)
    call = Call(
        p,
        input.to(dtype),
        linear_weight.to(of_head),
        None if bias is None else bias.to(of_head),
        target,
        clean,
        weight,
        sample_weight,
        _options(p),
    )
    if p.row_masks:
        _mask_logits(call, numbers)
    return _strided(call) if p.strided else call


def _mask_logits(call: Call, numbers: _Numbers) -> None:
    """Mask random logits of each row, but not those of the target's class or list."""
    z = call.exact_logits()
    named = call.clean["values" if call.problem.by_indices else "indices"].long()
    named = moved(call.problem, named, 0).clamp(0, z.shape[-1] - 1)
    kept = torch.zeros_like(z, dtype=torch.bool).scatter(
        -1, named.unsqueeze(-1) if named.ndim < z.ndim else named, True
    )
    call.logits = z.masked_fill((numbers.integers(0, 1, *z.shape) == 0) & ~kept, -math.inf)


def _strided(call: Call) -> Call:
    """Return the call with tensors that are not contiguous."""

    def spread(value: Any) -> Any:
        return torch.stack([value, value], -1)[..., 0] if isinstance(value, Tensor) else value

    changed = {name: spread(value) for name, value in vars(call).items()}
    return Call(**{**changed, "target": {name: spread(value) for name, value in call.target.items()}})


def _bias(p: Problem, numbers: _Numbers, scale: float) -> Tensor | None:
    drawn = numbers.grid(2 * scale, 0.25 * scale, p.classes, *p.positions)
    if p.bias == "none" and not p.offset:
        return None
    if p.offset:
        # Half precision holds the offset itself, rounded, and nothing beside it.
        of_head = p.head_dtype or p.dtype
        held = torch.tensor(p.offset).to(getattr(torch, of_head)).double()
        drawn = (torch.zeros_like(drawn) if of_head in ("bfloat16", "float16") else drawn) + held
    masked = ~live_classes(p)
    return drawn.masked_fill(masked.reshape(-1, *[1] * len(p.positions)), -math.inf)


def _weights(kind: str, numbers: _Numbers, p: Problem, *shape: int) -> Tensor | None:
    drawn = numbers.integers(0, 4, *shape).double() / 2
    dtype = getattr(torch, p.weight_dtype or p.dtype)
    return {"none": None, "some": drawn.to(dtype), "zero": torch.zeros(shape, dtype=dtype)}[kind]


def _options(p: Problem) -> dict[str, Any]:
    """Return the options that differ from their defaults, as keyword arguments of the head's losses."""
    given: dict[str, Any] = {} if p.reduction == "mean" else {"reduction": p.reduction}  # mean is the default
    names = ["temperature", "softcap", "base"]
    if p.loss == CROSS_ENTROPY:
        names += ["label_smoothing", "z_loss", "ignore_index", "shift"]
    if p.loss == "js":
        given["beta"] = p.number(p.beta)
    if p.loss in ("forward", "reverse"):
        given["direction"] = p.loss
    for f in dataclasses.fields(p):
        if f.name in names and p.changes(f):
            given[f.name] = p.number(getattr(p, f.name))
    return given


# --- targets -----------------------------------------------------------------------------------------------------------


def _target(p: Problem, numbers: _Numbers) -> dict[str, Any]:
    """Return the tensors of the target as they are where every row counts."""
    live = live_classes(p)
    support = torch.ones_like(live) if p.anywhere else live
    if p.target_zeros:
        left_out = support & (torch.arange(p.classes) % 4 == 2)
        support = support & ~left_out if bool((support & ~left_out).any()) else support
    dtype = getattr(torch, p.target_dtype or p.dtype)
    if p.by_indices:
        return {"values": _indices(p, numbers, support)}
    if p.kind == "teacher":
        features = numbers.grid(1, 0.5, *p.rows, 2)
        weight, bias = numbers.grid(1, 0.25, p.classes, 2), numbers.grid(1, 0.25, p.classes)
        half = dtype in (torch.bfloat16, torch.float16)
        held = torch.tensor(p.target_offset).to(dtype).double()
        bias = (bias * 0 if half and p.target_offset else bias) + held
        bias = bias.masked_fill(~support, -math.inf)
        return {"values": features.to(dtype), "weight": weight.to(dtype), "bias": bias.to(dtype)}
    t = numbers.grid(2, 0.25, *p.rows, p.classes).masked_fill(~support, -math.inf)
    if p.kind == "logits":
        return {"values": (t + p.target_offset).to(dtype)}
    if p.kind in LISTS:
        return _list(p, numbers, t, support, dtype)
    y = torch.softmax(t, -1)
    if p.kind == "float":
        y = y * numbers.integers(0, 4, *p.rows, 1) / 2
    return {"values": y.to(dtype)}


def _indices(p: Problem, numbers: _Numbers, support: Tensor) -> Tensor:
    where = torch.nonzero(support).squeeze(-1)
    values = where[numbers.integers(0, len(where) - 1, *p.rows)]
    if p.ignored != "none":
        left_out = numbers.integers(0, 2, *p.rows) == 0 if p.ignored == "some" else torch.ones(p.rows, dtype=torch.bool)
        values = values.masked_fill(left_out, p.ignored_index)
    return values.to(getattr(torch, p.index_dtype))


def _list(p: Problem, numbers: _Numbers, t: Tensor, support: Tensor, dtype: torch.dtype) -> dict[str, Any]:
    """Return a list of each row: supported classes come first, and a list of few leaves at least one of them out."""
    count = int(support.sum())
    k = {"few": max(1, min(4, count - 1)), "live": count, "all": p.classes}[p.listed]
    order = numbers.order(*p.rows, p.classes) + p.classes * (~support).long()
    indices = order.argsort(-1)[..., :k]
    return {"values": torch.log_softmax(t, -1).gather(-1, indices).to(dtype), "indices": indices}


def _padded(p: Problem, clean: Mapping[str, Any], sample_weight: Tensor | None) -> dict[str, Any]:
    """Return the target with padding, which is neither a class nor a distribution, in rows of weight 0."""
    if p.padding == "none" or sample_weight is None:
        return dict(clean)
    padded, rows = dict(clean), sample_weight == 0
    if p.by_indices:
        fill = {"nan": p.classes + FAR_OUTSIDE, "zeros": 0, "repeated": -1}[p.padding]
        return {"values": clean["values"].masked_fill(rows, fill)}
    fill_value = {"nan": math.nan, "zeros": 0.0, "repeated": -math.inf if p.kind == "logits" else -1.0}[p.padding]
    padded["values"] = clean["values"].masked_fill(rows.unsqueeze(-1), fill_value)
    if p.kind in LISTS:
        fill = {"nan": -1, "zeros": 0, "repeated": p.classes - 1}[p.padding]
        padded["indices"] = clean["indices"].masked_fill(rows.unsqueeze(-1), fill)
    return padded


def moved(p: Problem, tensor: Tensor, fill: float) -> Tensor:
    """Return the tensor with the entry of position ``i + shift`` at ``i``."""
    s = min(p.shift, p.leading[-1]) if p.shift else 0
    return torch.cat([tensor[..., s:], torch.full_like(tensor[..., :s], fill)], -1) if s else tensor


def _dead(p: Problem, input: Tensor, sample_weight: Tensor | None) -> Tensor:
    if not p.dead_features or sample_weight is None:
        return input
    dead = moved(p, sample_weight, 0.0) == 0
    dead = dead.flatten(1).all(-1) if p.positions else dead
    return input.masked_fill(dead.unsqueeze(-1), math.nan)
