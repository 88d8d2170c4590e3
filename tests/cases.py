"""Each loss × kind of target × options, on logits or on a linear head, with the dense computation that it must equal.

The dense side is plain torch and ``oracle``.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import softcurve
from softcurve.head.aten.sparse import Places, SparseTile
from softcurve.losses.spec import LogitMap

from . import oracle

Leaves = tuple[Tensor, ...]
Rows = tuple[int, ...]
LISTED = 5  # classes in a top-k list, where there are as many

# --- target kinds ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Kind:
    """A kind of target. ``indices`` are the class of each row, or the listed classes of each row; ``leaves`` its floats."""

    name: str
    leaves: Callable[[Rows, int, Tensor], Leaves]
    target: Callable[..., Any]  # (indices, *leaves): what the head is given
    raw: Callable[..., Tensor]  # (z, indices, *leaves): log y, up to a constant
    listed: bool = False
    bucket: bool = False
    has_fillers: bool = False
    tiles: int = 3  # five eighths of so many times the logits cut them in two or more

    @property
    def entries(self) -> slice:
        """The entries of a list that are no fillers."""
        return slice(None, None, 2) if self.has_fillers else slice(None)

    def indices(self, rows: Rows, classes: int) -> Tensor:
        if self.listed:
            return torch.rand(*rows, classes).topk(min(LISTED, classes)).indices
        return torch.randint(classes, rows)


def _logits(*shape: int) -> Tensor:
    return 1.5 * torch.randn(shape, dtype=torch.float64)


def _mass_of_any_size(rows: Rows, classes: int, _: Tensor) -> Leaves:
    return ((0.5 + torch.rand(*rows, 1, dtype=torch.float64)) * torch.softmax(_logits(*rows, classes), -1),)


def _probabilities(rows: Rows, classes: int, _: Tensor) -> Leaves:
    return (torch.softmax(_logits(*rows, classes), -1),)


def _log_probs(rows: Rows, classes: int, indices: Tensor) -> Leaves:
    return (torch.log_softmax(_logits(*rows, classes), -1).gather(-1, indices),)


def _teacher(rows: Rows, classes: int, _: Tensor) -> Leaves:
    return _logits(*rows, 3), _logits(classes, 3) / 2, _logits(classes) / 2


def _one_hot(z: Tensor, indices: Tensor) -> Tensor:
    return torch.zeros_like(z).scatter(-1, indices.unsqueeze(-1), 1.0)


def _list_only(z: Tensor, indices: Tensor, log_probs: Tensor) -> Tensor:
    return torch.full_like(z, -math.inf).scatter(-1, indices, log_probs)


def _even_tail(z: Tensor, indices: Tensor, log_probs: Tensor) -> Tensor:
    """What the list leaves over, spread evenly over all other classes."""
    others = z.shape[-1] - indices.shape[-1]
    if not others:
        return _list_only(z, indices, log_probs)
    tail = torch.log((1 - log_probs.exp().sum(-1, keepdim=True)) / others)
    return tail.expand(z.shape).scatter(-1, indices, log_probs)


def _with_fillers(indices: Tensor, log_probs: Tensor) -> softcurve.TopK:
    """Every other entry a filler: the first names the class of another entry, the second one that is not listed."""
    column = torch.arange(indices.shape[-1], device=indices.device)
    filler, indices = column % 2 == 1, torch.where(column == 1, indices.roll(1, -1), indices).int()
    return softcurve.TopK(indices, torch.where(filler, -math.inf, log_probs))


INDICES = Kind("indices", lambda *_: (), lambda i: i, lambda z, i: _one_hot(z, i).log(), tiles=2)
FLOAT = Kind("float", _mass_of_any_size, lambda _, y: y, lambda z, _, y: y.log())
PROBABILITIES = Kind("Probabilities", _probabilities, lambda _, y: softcurve.Probabilities(y), lambda z, _, y: y.log())
LOGITS = Kind(
    "Logits", lambda rows, classes, _: (_logits(*rows, classes),), lambda _, t: softcurve.Logits(t), lambda z, _, t: t
)
BUCKET = Kind("bucket", _log_probs, lambda i, t: softcurve.TopK(i, t), _even_tail, listed=True, bucket=True)
FILLERS = Kind("fillers", _log_probs, _with_fillers, _even_tail, listed=True, bucket=True, has_fillers=True)
RENORMALIZED = Kind(
    "renormalize",
    _log_probs,
    lambda i, t: softcurve.TopK(i, t, tail="renormalize"),
    _list_only,
    listed=True,
)
TEACHER = Kind(
    "LinearTeacher",
    _teacher,
    lambda _, *t: softcurve.LinearTeacher(*t),
    lambda z, _, e, w, b: F.linear(e, w, b),
    tiles=4,
)
BIASLESS_TEACHER = Kind(
    "LinearTeacher without bias",
    lambda rows, classes, i: _teacher(rows, classes, i)[:2],
    lambda _, *t: softcurve.LinearTeacher(*t),
    lambda z, _, e, w: F.linear(e, w),
    tiles=4,
)


def _chosen(classes: int) -> Tensor:
    """The classes of a larger teacher that are those of the model; some are chosen twice."""
    return (2 * torch.arange(classes) + 1) % (classes + 3)


OTHER_TEACHER = Kind(
    "LinearTeacher of other classes",
    lambda rows, classes, _: (torch.randn(*rows, 3, dtype=torch.float64), *_teacher(rows, classes + 3, _)[1:]),
    lambda _, e, w, b: softcurve.LinearTeacher(e, w, b, softcap=2.0, scale=0.6, classes=_chosen(len(w) - 3)),
    lambda z, _, e, w, b: (2 * torch.tanh(0.6 * F.linear(e, w, b) / 2))[..., _chosen(z.shape[-1])],
    tiles=6,
)

# --- losses ------------------------------------------------------------------------------------------------------------

LOGIT_ROUTE, HEAD_ROUTE = "logits", "head"


@dataclass(frozen=True)
class Case:
    """A loss against a kind of target. ``rows(log_y, log_p)`` is the divergence; ``None`` is cross-entropy.

    ``function`` is the public function on logits; ``options`` are those that select the divergence.
    """

    name: str
    kind: Kind
    function: str
    rows: Callable[[Tensor, Tensor], Tensor] | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    model_first: bool = False  # D(model, target), which only the functions on logits can compute for every divergence

    def __str__(self) -> str:
        return f"{self.name}-{self.kind.name}"

    @property
    def is_cross_entropy(self) -> bool:
        return self.rows is None

    def knows(self, option: str, route: str = HEAD_ROUTE) -> bool:
        """Whether the option makes sense here; where it does not, it is an error (test_bad_input.py)."""
        bucket, indices, head = self.kind.bucket, self.kind is INDICES, route == HEAD_ROUTE
        return {
            "bias": head,
            "weight": self.is_cross_entropy and not bucket,
            "label_smoothing": self.is_cross_entropy,
            "z_loss": self.is_cross_entropy,
            "softcap": self.is_cross_entropy or head,
            "ignore_index": indices,
            "shift": indices and head,
        }.get(option, True)

    # The functions are looked up when they are called.
    def on_head(self, x: Tensor, linear_weight: Tensor, target: Any, **options: Any) -> Any:
        direction = {"direction": "reverse"} if self.model_first else {}
        return getattr(softcurve, f"linear_{self.function}")(
            x, linear_weight, target, **direction, **self.options, **options
        )

    def on_logits(self, z: Tensor, target: Any, **options: Any) -> Any:
        sides = (z, target) if self.model_first or self.is_cross_entropy else (target, z)
        return getattr(softcurve, self.function)(*sides, **self.options, **options)


def _exchanged(rows: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda log_y, log_p: rows(log_p, log_y)


def _js(name: str, kind: Kind, beta: float, *, model_first: bool = False) -> Case:
    rows = partial(oracle.js_rows, beta=beta)
    rows = _exchanged(rows) if model_first else rows
    return Case(name, kind, "js_divergence", rows, {"beta": beta}, model_first)


def _cases() -> list[Case]:
    kinds = (
        *(INDICES, FLOAT, PROBABILITIES, LOGITS, BUCKET, FILLERS, RENORMALIZED, TEACHER, BIASLESS_TEACHER),
        OTHER_TEACHER,
    )
    cases = [Case("cross_entropy", kind, "cross_entropy") for kind in kinds]
    for kind in kinds[2:]:
        cases.append(Case("forward", kind, "kl_divergence", oracle.kl_rows))
        if kind is not RENORMALIZED:  # infinite
            cases.append(Case("reverse", kind, "kl_divergence", _exchanged(oracle.kl_rows), model_first=True))
        cases.append(_js("js0.3", kind, 0.3))
    return cases


CASES = _cases()
EXCHANGED = [_js("js0.3 exchanged", kind, 0.3, model_first=True) for kind in (LOGITS, BUCKET, RENORMALIZED, TEACHER)]
CASES_OF = {LOGIT_ROUTE: [case for case in CASES if case.kind is not BIASLESS_TEACHER] + EXCHANGED, HEAD_ROUTE: CASES}
BY_NAME = {str(case): case for case in [*CASES, *EXCHANGED]}

# --- problems ----------------------------------------------------------------------------------------------------------

# What each option is when it is on.
OPTIONS: dict[str, Any] = {
    "bias": True,
    "weight": True,
    "sample_weight": True,
    "label_smoothing": 0.2,
    "ignore_index": -100,
    "temperature": 0.7,
    "softcap": 2.5,
    "z_loss": 0.3,
    "shift": 2,
    "base": 2.0,
}
REDUCTIONS = ("none", "sum", "mean", "batchmean")


def everything(case: Case, *without: str) -> dict[str, Any]:
    """All the options that the loss knows; :func:`problem` leaves out those of a head where there is none."""
    return {name: value for name, value in OPTIONS.items() if case.knows(name) and name not in without}


class Stats(NamedTuple):
    """What ``return_stats`` must hold; all but the last two are differentiable."""

    log_probs: Tensor
    entropy: Tensor
    lse: Tensor
    mean_logit: Tensor
    collision: Tensor
    predicted: Tensor
    correct: Tensor


@dataclass(frozen=True)
class Problem:
    """A case with options, a reduction and numbers: ``ours(*arguments)`` must equal ``dense(*arguments)``."""

    case: Case
    options: Mapping[str, Any]  # as the function takes them, tensors apart
    indices: Tensor
    weight: Tensor | None  # of the classes: a constant, as in torch
    names: tuple[str, ...]
    arguments: Leaves = field(repr=False)  # every one requires gradients

    # --- ours

    def ours(self, *arguments: Tensor, **more: Any) -> Any:
        """The loss, or ``(loss, stats)``."""
        named, leaves = self._named(arguments)
        given = {name: named[name] for name in ("linear_bias", "sample_weight") if name in named}
        if self.weight is not None:
            given["weight"] = self.weight
        target = self.case.kind.target(self.indices, *leaves)
        if "logits" in named:
            return self.case.on_logits(named["logits"], target, **given, **self.options, **more)
        return self.case.on_head(named["input"], named["linear_weight"], target, **given, **self.options, **more)

    @cached_property
    def least_budget(self) -> int:
        """The least budget that works, as the error of one that does not says."""
        with pytest.raises(ValueError, match="memory_budget") as refused:
            self.ours(*self.arguments, memory_budget=1)
        return least_of(str(refused.value))

    def budget(self, name: str) -> int | None:
        """``whole``: the default, which holds all of these logits. ``tiles``: a few times their size, which cuts them."""
        entries = math.prod(self.arguments[0].shape[:-1]) * len(self.arguments[1])
        tiles = 5 * self.case.kind.tiles * entries
        return {
            "whole": lambda: None,
            "tiles": lambda: max(tiles, self.least_budget),
            "least": lambda: self.least_budget,
        }[name]()

    # --- dense

    def dense(self, *arguments: Tensor) -> Tensor:
        named, leaves = self._named(arguments)
        z, indices, sample_weight = self._logits(named), self.indices, named.get("sample_weight")
        if s := self.options.get("shift", 0):
            z, indices = z[..., :-s, :], indices[..., s:]
            sample_weight = None if sample_weight is None else sample_weight[..., s:]
        kept = self._kept(indices)
        indices = indices if self.case.kind.listed else torch.where(kept, indices, 0)
        rows = torch.where(kept, self._dense_rows(z, indices, leaves), 0.0)
        counts_class = self.weight is not None and self.case.kind is INDICES
        mass = torch.where(kept, self.weight[indices] if counts_class else torch.ones_like(rows), 0.0)
        leading = arguments[0].shape[:-1]
        value = oracle.reduced(rows, self.options["reduction"], sample_weight, mass, leading[0] if leading else 1)
        return F.pad(value, (0, s)) if s and self.options["reduction"] == "none" else value

    def _dense_rows(self, z: Tensor, indices: Tensor, leaves: Leaves) -> Tensor:
        kind, options = self.case.kind, self.options
        if kind.listed:
            indices, leaves = indices[..., kind.entries], tuple(leaf[..., kind.entries] for leaf in leaves)
        raw = kind.raw(z, indices, *leaves)
        temperature, softcap = options.get("temperature", 1.0), options.get("softcap")
        coarse = kind.bucket and indices.shape[-1] < z.shape[-1]

        def outcomes(logits: Tensor) -> Tensor:
            return oracle.listed_and_rest(logits, indices) if coarse else logits

        if self.case.rows is None:
            y = leaves[0] if kind in (FLOAT, PROBABILITIES) else torch.softmax(outcomes(raw), -1)
            known = ("label_smoothing", "temperature", "softcap", "z_loss", "base")
            return oracle.cross_entropy_rows(
                z,
                y,
                weight=self.weight,
                indices=indices if coarse else None,
                **{name: options[name] for name in known if name in options},
            )
        seen = oracle.seen_by_softmax(z, temperature, softcap)
        log_p = torch.log_softmax(outcomes(seen), -1)
        log_y = torch.log_softmax(outcomes(raw / temperature), -1)
        return self.case.rows(log_y, log_p) / math.log(options.get("base", math.e))

    def dense_stats(self) -> Stats:
        named, leaves = self._named(self.arguments)
        z = self._logits(named)
        seen = oracle.seen_by_softmax(z, self.options.get("temperature", 1.0), self.options.get("softcap"))
        kind, s = self.case.kind, self.options.get("shift", 0)
        if kind.listed:
            (log_probs,), listed = (leaf[..., kind.entries] for leaf in leaves), self.indices[..., kind.entries]
            best = listed.gather(-1, log_probs.argmax(-1, keepdim=True)).squeeze(-1)
        else:
            best = self.indices if kind is INDICES else kind.raw(z, self.indices, *leaves).argmax(-1)
        meant = torch.where(self._kept(self.indices), best, -1)
        if s:
            meant = torch.cat([meant[..., s:], torch.full_like(meant[..., :s], -1)], -1)
        log_p = torch.log_softmax(seen, -1)
        listed = torch.where(meant < 0, 0.0, log_p.gather(-1, meant.clamp(min=0).unsqueeze(-1)).squeeze(-1))
        mean, collision = oracle.product(log_p.exp(), seen).sum(-1), log_p.exp().square().sum(-1).log()
        return Stats(
            listed if kind is INDICES else seen[..., :0], oracle.entropy_rows(seen), torch.logsumexp(seen, -1), mean,
            collision, seen.argmax(-1), seen.argmax(-1) == meant,
        )  # fmt: skip

    def _kept(self, indices: Tensor) -> Tensor:
        rows = indices[..., 0] if self.case.kind.listed else indices
        if self.case.kind is not INDICES:
            return torch.ones(rows.shape, dtype=torch.bool)
        return rows != self.options.get("ignore_index", -100)

    def _logits(self, named: Mapping[str, Tensor]) -> Tensor:
        if "logits" in named:
            return named["logits"]
        return F.linear(named["input"], named["linear_weight"], named.get("linear_bias"))

    def _named(self, arguments: Sequence[Tensor]) -> tuple[dict[str, Tensor], Leaves]:
        named = dict(zip(self.names, arguments, strict=True))
        return named, tuple(named[name] for name in self.names if name.startswith("target"))


def problem(
    case: Case,
    options: Mapping[str, Any] | None = None,
    reduction: str = "mean",
    rows: Rows = (4,),
    features: int = 3,
    classes: int = 6,
    route: str = HEAD_ROUTE,
) -> Problem:
    """Random numbers: logits of a few units; every third row ignored where rows are; a row whose weight is 0."""
    options = {name: value for name, value in (options or {}).items() if case.knows(name, route)}
    biased, of_rows, of_classes = (options.pop(name, False) for name in ("bias", "sample_weight", "weight"))
    indices = case.kind.indices(rows, classes) if math.prod(rows) else torch.zeros(rows, dtype=torch.int64)
    if case.kind.listed and not math.prod(rows):
        indices = torch.zeros(*rows, min(LISTED, classes), dtype=torch.int64)
    if "ignore_index" in options and math.prod(rows) > 2:
        indices.view(-1)[::3] = options["ignore_index"]
    made = {"logits": _logits(*rows, classes)} if route == LOGIT_ROUTE else {
        "input": torch.randn(*rows, features, dtype=torch.float64),
        "linear_weight": _logits(classes, features) / math.sqrt(features),
    }  # fmt: skip
    if biased:
        made["linear_bias"] = _logits(classes) / 2
    for n, leaf in enumerate(case.kind.leaves(rows, classes, indices)):
        made[f"target {n}"] = leaf
    if of_rows:
        made["sample_weight"] = 0.5 + torch.rand(rows, dtype=torch.float64)
        made["sample_weight"].view(-1)[1:2] = 0.0
    weight = 0.5 + torch.rand(classes, dtype=torch.float64) if of_classes else None
    if weight is not None and classes > 2:
        weight[2] = 0.0
    arguments = tuple(tensor.requires_grad_() for tensor in made.values())
    return Problem(case, options | {"reduction": reduction}, indices, weight, tuple(made), arguments)


def least_of(message: str) -> int:
    """The bytes of "at least … bytes"."""
    found = re.search(r"at least (\d+) bytes", message)
    assert found, message
    return int(found[1])


# --- comparisons -------------------------------------------------------------------------------------------------------


def derivatives(value: Tensor, arguments: Leaves) -> list[Tensor]:
    """The gradient in every argument, and that of its product with a fixed direction: a Hessian product."""
    first = torch.autograd.grad(value.sin().sum(), arguments, create_graph=True, materialize_grads=True)
    return [*first, *torch.autograd.grad(along(first), arguments, materialize_grads=True)]


def along(tensors: Sequence[Tensor]) -> Tensor:
    """The product with a fixed direction."""
    return sum(((t * d).sum() for t, d in zip(tensors, directions(tensors), strict=True)), start=torch.zeros(()))


def directions(tensors: Sequence[Tensor]) -> Leaves:
    return tuple(torch.arange(t.numel(), dtype=t.dtype).add(0.3).cos().reshape(t.shape) for t in tensors)


def assert_same(got: Tensor, expected: Tensor, what: str = "", bound: float = 1e-10) -> None:
    """Of one shape and dtype, and within ``bound`` of the largest entry; a zero of 1e-17 is one."""
    assert (got.shape, got.dtype) == (expected.shape, expected.dtype), what
    if not expected.numel():
        return
    error = (got - expected).abs().max().item()
    assert error <= bound * max(expected.abs().max().item(), 1e-3), f"{what}: {error}"


def tile_of(z: Tensor, out: Tensor | None = None, softcap: float | None = None) -> SparseTile:
    """Logits of which no class is listed."""
    nowhere = Places(torch.zeros(len(z), 1, dtype=torch.int64), torch.zeros(len(z), 1, dtype=torch.bool))
    tensors = dict.fromkeys(("raw", "v", "v_out", "residual", "share"))
    return SparseTile(z=z, out=out, listed=nowhere, logit_map=LogitMap(softcap=softcap), cached=0, **tensors)
