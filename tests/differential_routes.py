"""The routes to one loss, the outcome of each, and how outcomes are compared with the truth and with each other."""

from __future__ import annotations

import dataclasses
import math
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

import softcurve

from .differential import CROSS_ENTROPY, Call, Problem, build, moved
from .differential_faults import FAULTS
from .differential_oracle import Truth, truth

# Relative to the size of the terms: of the computation, by its dtype.
RELATIVE = {torch.float64: 1e-10, torch.float32: 2.5e-6}
FLOOR = {torch.float64: 1e-14, torch.float32: 1e-10}
MODEL_OPTIONS = ("shift", "memory_budget", "direction", "return_stats")  # no logits route has them


@dataclass
class Outcome:
    """What a route returns: the type and text of an error, or a value and gradients."""

    error: str | None = None
    message: str = ""
    value: Tensor | None = None
    gradients: dict[str, Tensor] = field(default_factory=dict)
    stats: Any = None


Route = Callable[[Call], Outcome]


def outcome(make: Callable[[], tuple[Any, Mapping[str, Tensor]]], cotangent: Tensor) -> Outcome:
    """Return the value that ``make`` returns and its gradients with respect to the leaves that it names."""
    try:
        value, leaves = make()
        value, stats = value if isinstance(value, tuple) else (value, None)
        seed = cotangent.to(value.dtype) if value.ndim else torch.ones_like(value)
        if value.shape != seed.shape:
            return Outcome(value=value.detach(), stats=stats)
        named = {name: leaf for name, leaf in leaves.items() if leaf.requires_grad}
        found = torch.autograd.grad(value, list(named.values()), seed, materialize_grads=True) if named else ()
    except softcurve.checks.InvalidEntriesError as error:  # a ValueError to users
        return Outcome(error="ValueError", message=str(error))
    except Exception as error:  # whatever comes is what is compared
        return Outcome(error=type(error).__name__, message=str(error))
    return Outcome(value=value.detach(), gradients=dict(zip(named, found, strict=True)), stats=stats)


def cotangent_of(p: Problem) -> Tensor:
    """Return the factors 1, 2, 3, 1, … by which losses that are not reduced are summed."""
    count = math.prod(p.rows)
    return (1 + torch.arange(count, dtype=torch.float64) % 3).reshape(p.rows)


# --- on logits ---------------------------------------------------------------------------------------------------------


def exact_in(p: Problem, logits: Tensor) -> Tensor:
    """Return logits in the model's dtype where that holds them exactly, otherwise in float32."""
    narrow = logits.to(p.model_dtype)
    same = (narrow.double() == logits) | logits.isnan()
    return narrow if bool(same.all()) else logits.to(p.wide)


def _logits_of(call: Call) -> Tensor:
    z = call.exact_logits()
    z = exact_in(call.problem, z) if z.is_floating_point() else z
    return z.detach().requires_grad_(z.is_floating_point() and call.problem.wanted not in ("none", "target"))


def row_leaves(call: Call) -> dict[str, Tensor]:
    """Return the tensors of the target and the sample weights as leaves, where their gradients are wanted."""
    if call.problem.wanted != "target":
        return {}
    named = {f"target {name}": tensor for name, tensor in call.target.items()}
    if call.problem.padding == "none" and not call.problem.dead_features:  # else they have no derivative
        named["sample_weight"] = call.sample_weight
    found = {}
    for name, tensor in named.items():
        if isinstance(tensor, Tensor) and tensor.is_floating_point():
            found[name] = tensor.detach().requires_grad_()
    call.target |= {name.removeprefix("target "): leaf for name, leaf in found.items() if name != "sample_weight"}
    call.sample_weight = found.get("sample_weight", call.sample_weight)
    return found


def _row_arguments(call: Call, target: Any) -> tuple[Any, Any]:
    """Return target and sample weight, moved by hand where the head's loss is given ``shift``."""
    p = call.problem
    if not p.shift:
        return target, call.sample_weight
    sample_weight = call.sample_weight
    if isinstance(sample_weight, Tensor):
        sample_weight = moved(p, sample_weight, 0.0)
    return moved(p, target, p.ignored_index), sample_weight


def _on_logits(call: Call, loss: Callable[..., Any]) -> tuple[Any, Mapping[str, Tensor]]:
    p = call.problem
    leaf = _logits_of(call)
    leaves = {"logits": leaf} | row_leaves(call)
    z, options = leaf, {name: value for name, value in call.options.items() if name not in MODEL_OPTIONS}
    target, sample_weight = _row_arguments(call, call.made_target())
    if p.positions and p.kind == "float" and isinstance(target, Tensor) and target.ndim == len(p.rows) + 1:
        target = target.movedim(1, -1)
    if p.loss == CROSS_ENTROPY:
        return loss(z, target, weight=call.weight, sample_weight=sample_weight, **options), leaves
    cap = options.pop("softcap", None)
    if cap is not None and z.is_floating_point():  # of the model alone, which is one of two distributions here
        above = z > -math.inf  # and no NaN
        capped = float(cap) * torch.tanh(torch.where(above, z, 0.0).double() / float(cap))
        z = torch.where(above, capped, z.double()).to(p.wide)
    z = z if bool((z < 0).any()) else softcurve.Logits(z)  # lest a plain tensor be taken for probabilities
    first, second = (z, target) if p.loss == "reverse" else (target, z)
    return loss(first, second, sample_weight=sample_weight, **options), leaves


def logits_route(call: Call) -> Outcome:
    functions = {CROSS_ENTROPY: softcurve.cross_entropy, "js": softcurve.js_divergence}
    function = functions.get(call.problem.loss, softcurve.kl_divergence)
    return outcome(lambda: _on_logits(call, function), cotangent_of(call.problem))


def logits_module(call: Call) -> Outcome:
    """Pass the options to the constructor and the tensors of the rows to the call."""
    modules = {CROSS_ENTROPY: softcurve.nn.CrossEntropyLoss, "js": softcurve.nn.JSDivergenceLoss}
    module = modules.get(call.problem.loss, softcurve.nn.KLDivergenceLoss)

    def loss(first: Any, second: Any, *, sample_weight: Any, weight: Any = None, **options: Any) -> Any:
        given = {} if weight is None else {"weight": weight}
        return module(**given, **options)(first, second, sample_weight=sample_weight)

    return outcome(lambda: _on_logits(call, loss), cotangent_of(call.problem))


# --- on a head ---------------------------------------------------------------------------------------------------------


def head_loss(p: Problem) -> Callable[..., Any]:
    named = {CROSS_ENTROPY: softcurve.linear_cross_entropy, "js": softcurve.linear_js_divergence}
    return named.get(p.loss, softcurve.linear_kl_divergence)


def leaves_of(call: Call) -> dict[str, Tensor]:
    """Return features and head as leaves; those whose gradient is wanted require it."""
    wanted = {"all": ("input", "linear_weight", "linear_bias"), "features": ("input",), "none": (), "target": ()}
    names = wanted.get(call.problem.wanted, ("linear_weight", "linear_bias"))
    given = {name: getattr(call, name) for name in ("input", "linear_weight", "linear_bias")}
    return {
        name: tensor.detach().clone().requires_grad_(name in names and tensor.is_floating_point())
        for name, tensor in given.items()
        if tensor is not None
    }


def budget_option(call: Call, least: int | None) -> dict[str, Any]:
    p = call.problem
    if p.budget == "default" or least is None or "memory_budget" in call.options:
        return {}
    return {"memory_budget": p.number(least if p.budget == "least" else 3 * least)}


def least_budget(call: Call) -> int | None:
    """Return the least budget, which the error of a smaller one names; ``None`` where there is another error."""
    if call.problem.budget == "default":
        return None
    try:
        on_head(call, leaves_of(call), {"memory_budget": 1})
    except ValueError as error:
        found = re.search(r"at least (\d+) bytes", str(error))
        return int(found[1]) if found else None
    except Exception:  # the routes will show it
        return None
    return None


def on_head(call: Call, leaves: Mapping[str, Tensor], more: Mapping[str, Any]) -> Any:
    given = dict(call.options) | more
    if call.problem.loss == CROSS_ENTROPY and call.weight is not None:
        given["weight"] = call.weight
    if call.problem.stats:
        given["return_stats"] = True
    return head_loss(call.problem)(
        leaves["input"], leaves["linear_weight"], call.made_target(), linear_bias=leaves.get("linear_bias"),
        sample_weight=call.sample_weight, **given,
    )  # fmt: skip


def head_route(call: Call) -> Outcome:
    leaves, more = leaves_of(call), budget_option(call, least_budget(call))
    leaves |= row_leaves(call)
    return outcome(lambda: (on_head(call, leaves, more), leaves), cotangent_of(call.problem))


def head_module(call: Call) -> Outcome:
    p, leaves = call.problem, leaves_of(call)
    modules = {CROSS_ENTROPY: softcurve.nn.LinearCrossEntropyLoss, "js": softcurve.nn.LinearJSDivergenceLoss}
    module = modules.get(p.loss, softcurve.nn.LinearKLDivergenceLoss)
    given = dict(call.options) | budget_option(call, least_budget(call))
    if p.loss == CROSS_ENTROPY and call.weight is not None:
        given["weight"] = call.weight
    if p.positions:
        given["out_features"] = p.positions

    def make() -> tuple[Any, Mapping[str, Tensor]]:
        head = module(
            call.input.shape[-1], p.classes, bias=call.linear_bias is not None, dtype=call.linear_weight.dtype, **given
        )
        leaves.update(row_leaves(call))
        own = {"linear_weight": head.linear.weight, "linear_bias": head.linear.bias}
        for name, parameter in own.items():
            if parameter is not None:
                with torch.no_grad():
                    parameter.copy_(leaves[name].reshape(parameter.shape))
                parameter.requires_grad_(leaves[name].requires_grad)
                leaves[name] = parameter
        return head(leaves["input"], call.made_target(), sample_weight=call.sample_weight), leaves

    found = outcome(make, cotangent_of(p))
    for name, gradient in found.gradients.items():
        if name.startswith("linear"):
            found.gradients[name] = gradient.reshape(getattr(call, name).shape)
    return found


ROUTES: dict[str, Route] = {
    "logits": logits_route,
    "logits module": logits_module,
    "head": head_route,
    "head module": head_module,
}

# --- comparisons -------------------------------------------------------------------------------------------------------


def prepared(p: Problem) -> Call:
    """Return the call of a problem, with its fault."""
    call = build(p)
    if p.fault is not None:
        FAULTS[p.fault].change(call)
    return call


def routes_of(p: Problem, routes: Mapping[str, Route]) -> dict[str, Route]:
    """Return the routes that have the arguments of the problem."""
    if p.row_masks:
        return {name: route for name, route in routes.items() if "logits" in name}
    if p.fault is None or not FAULTS[p.fault].head_only:
        return dict(routes)
    return {name: route for name, route in routes.items() if "logits" not in name}


def disagreements(p: Problem, routes: Mapping[str, Route] = ROUTES) -> list[str]:
    """Return what is wrong with each route; the list is empty where all agree with the contract."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = {name: route(prepared(p)) for name, route in routes_of(p, routes).items()}
    if p.fault is not None:
        return _errors_apart(found, either=FAULTS[p.fault].either)
    call = build(p)
    expected = truth(call, cotangent_of(p))
    wrong = [problem for name, got in found.items() for problem in _wrong(name, p, got, expected)]
    return wrong or _gradients_apart(found, p, expected)


def _gradients_apart(found: Mapping[str, Outcome], p: Problem, expected: Truth) -> list[str]:
    """Compare gradients in target and sample weights, for which there is no closed form here, with the first route's."""
    first, *others = found
    wrong = []
    for other in others:
        for leaf, gradient in found[other].gradients.items():
            if leaf in expected.gradients or expected.value.isinf().any():
                continue
            wanted = found[first].gradients[leaf].double()
            size = wanted.abs().amax().expand_as(wanted) if wanted.numel() else wanted
            apart = _apart(gradient, wanted, 4 * size, p.wide, gradient.dtype)
            wrong += [f"{other}: gradient of {leaf} {apart} of {first}"] if apart else []
    return wrong


def _errors_apart(found: Mapping[str, Outcome], *, either: bool) -> list[str]:
    """Require that all routes refuse the call by an error of the same type that has a message."""
    kinds = {name: got.error or "no error" for name, got in found.items()}
    allowed = {"TypeError", "ValueError"} | ({"no error"} if either else set())
    if len(set(kinds.values())) == 1 and set(kinds.values()) <= allowed:
        silent = [name for name, got in found.items() if got.error and not got.message.strip()]
        return [f"{name}: error without a message" for name in silent]
    return [f"{name}: {kind} {found[name].message[:70]}" for name, kind in kinds.items()]


def _wrong(name: str, p: Problem, got: Outcome, expected: Truth) -> list[str]:
    if got.error is not None:
        return [f"{name}: {got.error}: {got.message[:160]}"]
    assert got.value is not None
    wrong = []
    if got.value.dtype != p.result:
        wrong.append(f"{name}: dtype {got.value.dtype}, not {p.result}")
    apart = _apart(got.value, expected.value, expected.size, p.wide, p.result)
    if apart:
        wrong.append(f"{name}: value {apart}")
    for leaf, gradient in got.gradients.items():
        wanted = expected.gradients.get(leaf)
        if wanted is None or not wanted.isfinite().all():  # of another kind, or of an infinite reverse divergence
            continue
        size = expected.sizes[leaf] * max(1.0, math.prod(p.rows) ** 0.5 / 10)  # of a long sum
        apart = _apart(gradient, wanted, size, p.wide, gradient.dtype)
        if apart:
            wrong.append(f"{name}: gradient of {leaf} {apart}")
    if got.stats is not None:
        wrong += _wrong_stats(name, p, got.stats, expected)
    return wrong


def _wrong_stats(name: str, p: Problem, stats: Any, expected: Truth) -> list[str]:
    wrong = []
    for column, wanted in (("lse", expected.lse), ("entropy", expected.entropy)):
        got = getattr(stats, column)
        if got.dtype not in (p.wide, p.result):
            wrong.append(f"{name}: {column} dtype {got.dtype}, not {p.wide}")
        if not p.dead_features:
            size = 4 * (1 + wanted.abs()) * (4 if p.confident else 1)  # of lse − Σ p z
            apart = _apart(got, wanted, size, p.wide, p.wide)
            wrong += [f"{name}: {column} {apart}"] if apart else []
    return wrong


def _apart(got: Tensor, wanted: Tensor, size: Tensor, computed: torch.dtype, kept: torch.dtype) -> str:
    """Return how a result differs by more than rounding in the dtypes of computation and result, or an empty string."""
    if got.shape != wanted.shape:
        return f"of shape {tuple(got.shape)}, not {tuple(wanted.shape)}"
    exact, narrower = got.double(), kept.itemsize < computed.itemsize
    wanted = torch.where(wanted.abs() > torch.finfo(kept).max, wanted.sign() * math.inf, wanted)
    rounding = torch.finfo(kept).eps * wanted.abs() if narrower else torch.zeros_like(wanted)
    tiny = torch.finfo(kept).smallest_normal * torch.finfo(kept).eps
    bound = RELATIVE[computed] * size + rounding + FLOOR[computed] + tiny
    same = (exact == wanted) | (exact.isnan() & wanted.isnan())
    error = torch.where(same, 0.0, (exact - wanted).abs())
    beyond = ~(same | (error <= bound))
    if not beyond.any():
        return ""
    worst = int(torch.where(beyond, (error / bound).nan_to_num(math.inf), 0.0).argmax()) if wanted.ndim else 0
    got_at, wanted_at = exact.flatten()[worst].item(), wanted.flatten()[worst].item()
    return f"{got_at:.9g}, not {wanted_at:.9g} (error {error.flatten()[worst]:.2g}, bound {bound.flatten()[worst]:.2g})"


def summary(wrong: Sequence[str]) -> str:
    """Return what is wrong without the numbers, by which failures are grouped."""
    return "; ".join(sorted({re.sub(r"[-+]?\d[\d.e+-]*|nan|inf", "#", line)[:70] for line in wrong}))


def simplest(p: Problem, routes: Mapping[str, Route] = ROUTES) -> Problem:
    """Return the problem with every option reset that the failure does not need."""
    kind = summary(disagreements(p, routes))
    small = {"leading": ((1,), (2,)), "classes": (1, 2, 3)}
    settled = False
    while not settled:
        settled = True
        for f in dataclasses.fields(p):
            for value in (*small.get(f.name, ()), f.default):
                simpler = dataclasses.replace(p, **{f.name: value})
                if simpler == p or (f.name == "fault"):
                    break
                if sensible(simpler) and summary(disagreements(simpler, routes)) == kind:
                    p, settled = simpler, False
                    break
    return p


def sensible(p: Problem) -> bool:
    """Return whether the loss accepts the kind of target, and the fault applies."""
    known = p.loss == CROSS_ENTROPY or p.kind not in ("indices", "float")
    shaped = not p.positions or (len(p.leading) == 1 and p.kind in ("indices", "float"))
    return known and shaped and (p.fault is None or FAULTS[p.fault].applies(p))
