"""Every divergence × target kind, each with the dense formula that it must equal: what the suites are parametrised by."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

import softcurve

from . import oracle

Leaves = tuple[Tensor, ...]

# --- target kinds ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Kind:
    """A kind of target: the tensors it is made of, how they are made into one, and what it means."""

    name: str
    leaves: Callable[[tuple[int, ...], int], Leaves]
    target: Callable[..., Any]
    raw: Callable[..., Tensor]  # logits of the target over the classes, or over list and rest
    listed: bool = False  # whether over list and rest


def classes_of(z: Tensor) -> Tensor:
    """A class for each row, all classes in turn."""
    return (torch.arange(math.prod(z.shape[:-1])) * 2 % z.shape[-1]).reshape(z.shape[:-1])


def list_of(z: Tensor) -> Tensor:
    """Two distinct classes for each row, out of order."""
    first = classes_of(z)
    return torch.stack([first, (first + z.shape[-1] - 1) % z.shape[-1]], -1)


def _logits(rows: tuple[int, ...], classes: int) -> Tensor:
    return 1.5 * torch.randn(*rows, classes, dtype=torch.float64)


def _list_leaves(rows: tuple[int, ...], classes: int) -> Leaves:
    z = _logits(rows, classes)
    return (torch.log_softmax(z, -1).gather(-1, list_of(z)),)


def _list_and_rest(z: Tensor, log_probs: Tensor) -> Tensor:
    return torch.cat([log_probs, torch.log(1 - log_probs.exp().sum(-1, keepdim=True))], -1)


def _list_only(z: Tensor, log_probs: Tensor) -> Tensor:
    return torch.full_like(z, -math.inf).scatter(-1, list_of(z), log_probs)


def _teacher_leaves(rows: tuple[int, ...], classes: int) -> Leaves:
    return _logits(rows, 2), _logits((classes,), 2), _logits((), classes)


def _probabilities(rows: tuple[int, ...], classes: int) -> Leaves:
    return (torch.softmax(_logits(rows, classes), -1),)


INDICES = Kind(
    "indices", lambda rows, classes: (), lambda z: classes_of(z), lambda z: torch.eye(z.shape[-1])[classes_of(z)].log()
)
FLOAT = Kind("float", _probabilities, lambda z, y: y, lambda z, y: y.log())
PROBABILITIES = Kind("Probabilities", _probabilities, lambda z, y: softcurve.Probabilities(y), lambda z, y: y.log())
LOGITS = Kind(
    "Logits", lambda rows, classes: (_logits(rows, classes),), lambda z, t: softcurve.Logits(t), lambda z, t: t
)
BUCKET = Kind(
    "bucket", _list_leaves, lambda z, t: softcurve.TopK(list_of(z), t, tail="bucket"), _list_and_rest, listed=True
)
RENORMALIZED = Kind(
    "renormalize", _list_leaves, lambda z, t: softcurve.TopK(list_of(z), t, tail="renormalize"), _list_only
)
TEACHER = Kind(
    "LinearTeacher",
    _teacher_leaves,
    lambda z, *t: softcurve.LinearTeacher(*t),
    lambda z, e, w, b: torch.nn.functional.linear(e, w, b),
)
NONE = Kind("none", lambda rows, classes: (), lambda z: None, lambda z: z)

KINDS = (INDICES, FLOAT, PROBABILITIES, LOGITS, BUCKET, RENORMALIZED, TEACHER)
DISTRIBUTIONS = (PROBABILITIES, LOGITS, BUCKET, RENORMALIZED, TEACHER)

# --- divergences -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """A loss against a kind of target. ``ours`` and ``dense`` take ``(z, leaves, sample_weight, weight, reduction, options)``."""

    name: str
    kind: Kind
    ours: Callable[..., Tensor]
    dense: Callable[..., Tensor]

    def __str__(self) -> str:
        return f"{self.name}-{self.kind.name}"

    @property
    def is_cross_entropy(self) -> bool:
        return self.name == "cross_entropy"


def _given(**tensors: Tensor | None) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in tensors.items() if tensor is not None}


def _our_cross_entropy(kind: Kind, z: Tensor, leaves: Leaves, sample_weight, weight, reduction, **options) -> Tensor:
    target = kind.target(z, *leaves)
    if (ignore_index := options.get("ignore_index")) is not None:
        target = torch.where(_ignored(z, ignore_index), ignore_index, target)
    given = _given(sample_weight=sample_weight, weight=weight)
    return softcurve.cross_entropy(z, target, reduction=reduction, **given, **options)


def _ignored(z: Tensor, ignore_index: int) -> Tensor:
    """Every third row, and those whose class is the one that is ignored."""
    third = (torch.arange(math.prod(z.shape[:-1])) % 3 == 0).reshape(z.shape[:-1])
    return third | (classes_of(z) == ignore_index)


def _dense_cross_entropy(
    kind: Kind, z: Tensor, leaves: Leaves, sample_weight, weight, reduction, ignore_index=None, **options
) -> Tensor:
    raw = kind.raw(z, *leaves)
    # A float tensor is taken as it is; everything else is a softmax.
    y = leaves[0] if kind in (FLOAT, PROBABILITIES) else torch.softmax(raw, -1).to(z.dtype)
    indices = list_of(z) if kind.listed else None
    rows = oracle.cross_entropy_rows(z, y, weight=weight, indices=indices, **options)
    mass = torch.ones_like(rows) if kind is not INDICES or weight is None else weight[classes_of(z)]
    if ignore_index is not None:
        rows, mass = (torch.where(_ignored(z, ignore_index), 0.0, t) for t in (rows, mass))
    return oracle.reduced(rows, reduction, sample_weight, mass)


def _our_divergence(
    loss: Callable[..., Tensor],
    exchanged: bool,
    kind: Kind,
    z: Tensor,
    leaves: Leaves,
    sample_weight,
    _,
    reduction,
    **options,
) -> Tensor:
    sides = (z, kind.target(z, *leaves)) if exchanged else (kind.target(z, *leaves), z)
    return loss(*sides, reduction=reduction, **_given(sample_weight=sample_weight), **options)


def _dense_divergence(
    rows: Callable[[Tensor, Tensor], Tensor],
    kind: Kind,
    z: Tensor,
    leaves: Leaves,
    sample_weight,
    _,
    reduction,
    **options,
) -> Tensor:
    temperature = options.get("temperature", 1.0)
    log_y = torch.log_softmax(kind.raw(z, *leaves) / temperature, -1)
    seen = z / temperature
    log_p = torch.log_softmax(oracle.listed_and_rest(seen, list_of(z)) if kind.listed else seen, -1)
    return oracle.reduced(rows(log_y, log_p), reduction, sample_weight) / math.log(options.get("base", math.e))


def _divergence_cases() -> list[Case]:
    cases = []
    for kind in DISTRIBUTIONS:
        forward, reverse = oracle.kl_rows, lambda log_y, log_p: oracle.kl_rows(log_p, log_y)
        members = [
            ("forward", softcurve.kl_divergence, False, forward),
            ("reverse", softcurve.kl_divergence, True, reverse),
        ]
        for beta in (0.0, 0.3, 0.5, 1.0):
            ours, dense = partial(softcurve.js_divergence, beta=beta), partial(oracle.js_rows, beta=beta)
            members.append((f"js{beta:g}", ours, False, dense))
        swapped = lambda log_y, log_p: oracle.js_rows(log_p, log_y, 0.3)  # noqa: E731
        members.append(("js0.3 exchanged", partial(softcurve.js_divergence, beta=0.3), True, swapped))
        infinite = ("reverse", "js1") if kind is RENORMALIZED else ()
        cases += [
            Case(name, kind, partial(_our_divergence, ours, exchanged, kind), partial(_dense_divergence, dense, kind))
            for name, ours, exchanged, dense in members
            if name not in infinite
        ]
    return cases


CROSS_ENTROPIES = [
    Case("cross_entropy", kind, partial(_our_cross_entropy, kind), partial(_dense_cross_entropy, kind))
    for kind in KINDS
]
DIVERGENCES = _divergence_cases()
ENTROPY = Case(
    "entropy",
    NONE,
    lambda z, leaves, sample_weight, weight, reduction, **options: softcurve.entropy(z, **options),
    lambda z, leaves, sample_weight, weight, reduction, base=math.e: oracle.entropy_rows(z) / math.log(base),
)
CASES = [*CROSS_ENTROPIES, *DIVERGENCES, ENTROPY]


# --- options -----------------------------------------------------------------------------------------------------------

SINGLE = {
    "plain": {},
    "temperature": {"temperature": 0.7},
    "softcap": {"softcap": 2.5},
    "z_loss": {"z_loss": 0.3},
    "label_smoothing": {"label_smoothing": 0.2},
    "weight": {"weight": True},
    "sample_weight": {"sample_weight": True},
    "ignore_index": {"ignore_index": -100},
    "ignore_class": {"ignore_index": 1},
    "bits": {"base": 2.0},
}
SINGLE["everything"] = {name: value for options in SINGLE.values() for name, value in options.items()}


def options_for(case: Case, name: str) -> dict[str, Any] | None:
    """The options that the loss knows of those in the set; ``None`` where none of them is left to try."""
    known = {"base"} if case is ENTROPY else {"base", "temperature", "sample_weight"}
    if case.is_cross_entropy:
        known |= {"softcap", "z_loss", "label_smoothing", "weight"} - ({"weight"} if case.kind is BUCKET else set())
        known |= {"ignore_index"} if case.kind is INDICES else set()
    elif case.kind is BUCKET:
        known -= {"temperature"}
    options = {key: value for key, value in SINGLE[name].items() if key in known}
    return options if options or name == "plain" else None


def reductions_for(case: Case) -> tuple[str, ...]:
    return ("none",) if case is ENTROPY else ("none", "sum", "mean", "batchmean")


@dataclass(frozen=True)
class Problem:
    """A case with options, a reduction and numbers: ``ours(*arguments)`` must equal ``dense(*arguments)``."""

    ours: Callable[..., Tensor]
    dense: Callable[..., Tensor]
    arguments: Leaves  # logits, the target's tensors, and the sample weight where there is one


def problem(case: Case, option: str, reduction: str, rows: tuple[int, ...] = (3,), classes: int = 4) -> Problem:
    """Every floating-point tensor that may require gradients is an argument and does; a class weight may not."""
    options = options_for(case, option)
    assert options is not None
    of_rows, of_classes = options.pop("sample_weight", False), options.pop("weight", False)
    leaves = case.kind.leaves(rows, classes)
    weights = [0.5 + torch.rand(rows, dtype=torch.float64)] if of_rows else []
    weight = 0.5 + torch.rand(classes, dtype=torch.float64) if of_classes else None

    def call(function: Callable[..., Tensor], z: Tensor, *rest: Tensor) -> Tensor:
        sample_weight = rest[-1] if of_rows else None
        return function(z, rest[: len(leaves)], sample_weight, weight, reduction, **options)

    arguments = tuple(t.detach().requires_grad_() for t in (_logits(rows, classes), *leaves, *weights))
    return Problem(partial(call, case.ours), partial(call, case.dense), arguments)
