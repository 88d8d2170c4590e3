"""Arguments that the contract refuses: which calls each applies to, and how it changes one."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from .differential import CROSS_ENTROPY, LISTS, Call, Problem

FLOATS = ("float", "probabilities", "logits")


@dataclass(frozen=True)
class Fault:
    """``applies`` sees a valid problem; ``change`` makes one argument wrong.

    ``head_only``: logits have no such argument. ``either``: the contract leaves open whether it is an error, but not that
    the routes agree.
    """

    applies: Callable[[Problem], bool]
    change: Callable[[Call], None]
    head_only: bool = False
    either: bool = False


def _option(name: str, value: Any) -> Callable[[Call], None]:
    def change(call: Call) -> None:
        call.options[name] = value

    return change


def _attribute(name: str, make: Callable[[Call], Any]) -> Callable[[Call], None]:
    def change(call: Call) -> None:
        setattr(call, name, make(call))

    return change


def _tensors(make: Callable[[Call], dict[str, Any]]) -> Callable[[Call], None]:
    """Replace tensors of the target."""

    def change(call: Call) -> None:
        call.target = call.target | make(call)

    return change


def _replaced(make: Callable[[Call], Any]) -> Callable[[Call], None]:
    """Replace the whole target."""

    def change(call: Call) -> None:
        call.make_target = lambda: make(call)

    return change


def _first(call: Call, name: str, value: float) -> torch.Tensor:
    """Return a tensor of the target whose first entry is replaced."""
    changed = call.target[name].clone(memory_format=torch.contiguous_format)
    changed.view(-1)[0] = value
    return changed


def _spoiled_features(value: float) -> Callable[[Call], None]:
    def change(call: Call) -> None:
        call.input = call.input.clone()
        call.input.view(-1)[0] = value
        call.logits = call.exact_logits().masked_fill(call.exact_logits().isnan(), math.nan)

    return change


def _masked_everywhere(call: Call) -> None:
    call.linear_bias = torch.full(call.linear_weight.shape[:-1], -math.inf, dtype=call.linear_weight.dtype)


def _integers(call: Call) -> None:
    call.input = call.input.long()
    call.logits = torch.zeros(*call.problem.rows, call.problem.classes, dtype=torch.int64)


def _some(p: Problem) -> bool:
    """Return whether there are rows, and each of them counts."""
    plain = p.sample_weight == "none" and p.ignored == "none" and p.class_weight == "none"
    return plain and 0 not in p.rows and not p.shift and not p.dead_features


def _of(*kinds: str) -> Callable[[Problem], bool]:
    return lambda p: p.kind in kinds and _some(p)


def _always(p: Problem) -> bool:
    return True


def _cross_entropy(p: Problem) -> bool:
    return p.loss == CROSS_ENTROPY


def _weights_fit(p: Problem) -> bool:
    return _cross_entropy(p) and p.kind != "bucket"


def _divergence(p: Problem) -> bool:
    return p.loss != CROSS_ENTROPY


def _flat(p: Problem) -> bool:
    return not p.positions


FAULTS: dict[str, Fault] = {
    # --- targets
    "index beyond the classes": Fault(
        _of("indices"), _tensors(lambda c: {"values": _first(c, "values", c.problem.classes)})
    ),
    "negative index": Fault(_of("indices"), _tensors(lambda c: {"values": _first(c, "values", -3)})),
    "bool target": Fault(_of("indices"), _tensors(lambda c: {"values": c.target["values"] > 0})),
    "rows missing": Fault(
        lambda p: p.kind in ("indices", *FLOATS) and bool(p.leading) and p.leading[0] > 1 and not p.shift,
        _tensors(lambda c: {"values": c.target["values"][:-1]}),
    ),
    "classes missing": Fault(
        lambda p: (
            p.kind in FLOATS and p.classes > 1 and _flat(p) and _some(p) and not p.target_zeros and p.bias == "none"
        ),
        _tensors(
            lambda c: {
                "values": torch.softmax(c.target["values"].double(), -1)[..., 1:]
                if c.problem.kind == "logits"
                else torch.full_like(c.target["values"][..., 1:], 1 / (c.problem.classes - 1))
            }
        ),
    ),
    "unnormalised": Fault(_of("probabilities"), _tensors(lambda c: {"values": 2 * c.target["values"]})),
    "negative probability": Fault(_of("probabilities"), _tensors(lambda c: {"values": _first(c, "values", -0.5)})),
    "NaN in the target": Fault(
        _of("float", "probabilities", "logits", "bucket", "renormalize", "teacher"),
        _tensors(lambda c: {"values": _first(c, "values", math.nan)}),
        either=True,
    ),
    "target without a class": Fault(
        _of("logits"), _tensors(lambda c: {"values": torch.full_like(c.target["values"], -math.inf)}), either=True
    ),
    "+inf in the target": Fault(
        _of("logits"), _tensors(lambda c: {"values": _first(c, "values", math.inf)}), either=True
    ),
    "a class listed twice": Fault(
        lambda p: p.kind in LISTS and _some(p) and p.listed == "all" and p.classes > 1,
        _tensors(lambda c: {"indices": torch.zeros_like(c.target["indices"])}),
    ),
    "a listed class beyond": Fault(
        _of(*LISTS), _tensors(lambda c: {"indices": _first(c, "indices", c.problem.classes)})
    ),
    "a list of too much mass": Fault(
        lambda p: p.kind in LISTS and _some(p) and p.listed == "all" and p.classes > 1 and p.bias == "none",
        _tensors(lambda c: {"values": c.target["values"] + 1}),
    ),
    "teacher of other classes": Fault(
        _of("teacher"),
        _tensors(lambda c: {"weight": torch.cat([c.target["weight"]] * 2), "bias": torch.cat([c.target["bias"]] * 2)}),
    ),
    "no target": Fault(_some, _replaced(lambda c: None)),
    "list in place of a tensor": Fault(_some, _replaced(lambda c: [0, 1])),
    "class indices for a divergence": Fault(
        _divergence, _replaced(lambda c: torch.zeros(c.problem.rows, dtype=torch.int64))
    ),
    "plain probabilities for a streamed divergence": Fault(
        lambda p: _divergence(p) and p.kind == "probabilities", _replaced(lambda c: c.target["values"]), head_only=True
    ),
    # --- what does not go with a kind of target
    "reverse of a renormalized list": Fault(
        lambda p: p.kind == "renormalize" and p.loss == "reverse" and not p.dead_features, lambda c: None
    ),
    "class weights and a bucket": Fault(
        lambda p: p.kind == "bucket" and _cross_entropy(p) and not p.positions,
        _attribute("weight", lambda c: torch.ones(c.problem.classes)),
    ),
    "ignore_index of a distribution": Fault(
        lambda p: _cross_entropy(p) and not p.by_indices, _option("ignore_index", 2)
    ),
    "default ignore_index of a distribution": Fault(
        lambda p: _cross_entropy(p) and not p.by_indices, _option("ignore_index", -100), either=True
    ),
    "shift of a distribution": Fault(
        lambda p: not p.by_indices and _cross_entropy(p), _option("shift", 1), head_only=True
    ),
    "shift of a single row": Fault(lambda p: p.by_indices and not p.leading, _option("shift", 1), head_only=True),
    # --- weights
    "negative class weight": Fault(_weights_fit, _attribute("weight", lambda c: -torch.ones(c.problem.classes))),
    "NaN class weight": Fault(_weights_fit, _attribute("weight", lambda c: torch.full((c.problem.classes,), math.nan))),
    "class weights too many": Fault(_weights_fit, _attribute("weight", lambda c: torch.ones(c.problem.classes + 1))),
    "class weights of integers": Fault(
        _weights_fit, _attribute("weight", lambda c: torch.ones(c.problem.classes, dtype=torch.int64))
    ),
    "class weights with gradients": Fault(
        _weights_fit, _attribute("weight", lambda c: torch.ones(c.problem.classes).requires_grad_()), either=True
    ),
    "class weights as a list": Fault(_weights_fit, _attribute("weight", lambda c: [1.0] * c.problem.classes)),
    "sample weights of another shape": Fault(
        lambda p: not p.shift, _attribute("sample_weight", lambda c: torch.ones(*c.problem.rows, 2))
    ),
    "one sample weight for all": Fault(
        lambda p: bool(p.rows) and not p.shift, _attribute("sample_weight", lambda c: torch.tensor(1.0))
    ),
    "NaN sample weight": Fault(_some, _attribute("sample_weight", lambda c: torch.full(c.problem.rows, math.nan))),
    "sample weights as a list": Fault(lambda p: not p.shift, _attribute("sample_weight", lambda c: [1.0])),
    "sample weights of integers": Fault(
        _some, _attribute("sample_weight", lambda c: torch.ones(c.problem.rows, dtype=torch.int64)), either=True
    ),
    "sample weights of bool": Fault(
        _some, _attribute("sample_weight", lambda c: torch.ones(c.problem.rows, dtype=torch.bool)), either=True
    ),
    "complex sample weights": Fault(
        _some, _attribute("sample_weight", lambda c: torch.ones(c.problem.rows, dtype=torch.complex64))
    ),
    "negative sample weights": Fault(
        _some, _attribute("sample_weight", lambda c: -torch.ones(c.problem.rows)), either=True
    ),
    # --- numbers
    "temperature 0": Fault(_always, _option("temperature", 0.0)),
    "temperature NaN": Fault(_always, _option("temperature", math.nan)),
    "temperature text": Fault(_always, _option("temperature", "1")),
    "temperature vector": Fault(_always, _option("temperature", torch.ones(2))),
    "softcap 0": Fault(_cross_entropy, _option("softcap", 0.0)),
    "softcap inf": Fault(_cross_entropy, _option("softcap", math.inf)),
    "smoothing above 1": Fault(_cross_entropy, _option("label_smoothing", 1.5)),
    "smoothing None": Fault(_cross_entropy, _option("label_smoothing", None)),
    "negative z_loss": Fault(_cross_entropy, _option("z_loss", -1.0)),
    "z_loss tensor of NaN": Fault(_cross_entropy, _option("z_loss", torch.tensor(math.nan))),
    "base 1": Fault(_always, _option("base", 1.0)),
    "base text": Fault(_always, _option("base", "e")),
    "beta 2": Fault(lambda p: p.loss == "js", _option("beta", 2.0)),
    "beta text": Fault(lambda p: p.loss == "js", _option("beta", "half")),
    "unknown reduction": Fault(_always, _option("reduction", "median")),
    "reduction None": Fault(_always, _option("reduction", None)),
    "direction": Fault(lambda p: p.loss in ("forward", "reverse"), _option("direction", "both"), head_only=True),
    "fractional ignore_index": Fault(lambda p: p.by_indices, _option("ignore_index", 1.5)),
    "ignore_index bool": Fault(lambda p: p.by_indices, _option("ignore_index", True)),
    "negative shift": Fault(lambda p: p.by_indices, _option("shift", -1), head_only=True),
    "fractional shift": Fault(lambda p: p.by_indices, _option("shift", 0.5), head_only=True),
    "budget 0": Fault(_always, _option("memory_budget", 0), head_only=True),
    "budget of a byte": Fault(_some, _option("memory_budget", 1), head_only=True),
    "fractional budget": Fault(_always, _option("memory_budget", 1e6 + 0.5), head_only=True),
    # --- features and head
    "integer features": Fault(_some, _integers),
    "NaN features": Fault(_some, _spoiled_features(math.nan), either=True),
    "infinite features": Fault(_some, _spoiled_features(math.inf), either=True),
    "every class masked": Fault(_some, _masked_everywhere, either=True),
}


def faults_of(p: Problem) -> list[str]:
    """Return the names of all faults that apply to a problem."""
    return [name for name, fault in FAULTS.items() if fault.applies(p)]
