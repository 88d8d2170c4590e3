"""Every way to compute one loss of given logits: functions, modules, a head whole or in tiles, a head of sharded classes.

The tiles are the smallest there are, which cut 200 classes in two.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard
from torch.nn import functional as F

import softcurve
from softcurve import nn

from .cases import least_of

LOSSES = ("cross_entropy", "forward", "reverse", "js")
BETA = 0.3


@dataclass(frozen=True)
class Route:
    """``route(loss, z, target, bias=None, **options)``: the loss of the logits ``z + bias``, shapes ``(..., C)``, ``(C,)``.

    A head has the features ``I`` and the weight ``zᵀ``, so that its logits are exact and ``z`` receives its gradient.
    """

    name: str

    def __call__(self, loss: str, z: Tensor, target: Any, bias: Tensor | None = None, **options: Any) -> Tensor:
        if self.name in ("logits", "module"):
            options = {name: value for name, value in options.items() if name != "memory_budget"}
            return self._on_logits(loss, z if bias is None else z + bias, target, options)
        x, weight = head_of(z)
        if self.name == "head module":
            return _module_of_head(loss, x, weight, bias, target, options)
        if self.name == "sharded":
            weight, bias = (None if t is None else _sharded(t) for t in (weight, bias))
        options = options | {"linear_bias": bias}
        if self.name == "tiles":
            options["memory_budget"] = _least_budget(loss, x, weight, target, options)
        value = _head_function(loss)(x, weight, target, **options)
        return value.full_tensor() if isinstance(value, DTensor) else value

    def __str__(self) -> str:
        return self.name

    def _on_logits(self, loss: str, z: Tensor, target: Any, options: dict[str, Any]) -> Tensor:
        of_call = {name: options.pop(name) for name in ("sample_weight",) if name in options}
        if loss == "cross_entropy":
            if self.name == "module":
                return nn.CrossEntropyLoss(**options)(z, target, **of_call)
            return softcurve.cross_entropy(z, target, **options, **of_call)
        sides = (z, target) if loss == "reverse" else (target, z)
        if loss == "js":
            options = {"beta": BETA} | options
        if self.name == "module":
            return (nn.JSDivergenceLoss if loss == "js" else nn.KLDivergenceLoss)(**options)(*sides, **of_call)
        return (softcurve.js_divergence if loss == "js" else softcurve.kl_divergence)(*sides, **options, **of_call)


ROUTES = tuple(map(Route, ("logits", "module", "head", "tiles", "head module", "sharded")))
FUNCTIONS = tuple(route for route in ROUTES if "module" not in route.name)
HEADS = ROUTES[2:]
PLAIN = ROUTES[:-1]  # those that need no group of processes


def head_of(z: Tensor) -> tuple[Tensor, Tensor]:
    """Features and weight of a head whose logits are ``z``."""
    rows = math.prod(z.shape[:-1])
    width = max(rows, 1)
    weight = z.reshape(rows, z.shape[-1]) if rows else F.pad(z.reshape(0, z.shape[-1]), (0, 0, 0, 1))
    return torch.eye(rows, width, dtype=z.dtype).reshape(*z.shape[:-1], width), weight.mT


def _head_function(loss: str) -> Callable[..., Tensor]:
    if loss == "cross_entropy":
        return softcurve.linear_cross_entropy
    if loss == "js":
        return lambda *arguments, **options: softcurve.linear_js_divergence(*arguments, **({"beta": BETA} | options))
    return lambda *arguments, **options: softcurve.linear_kl_divergence(*arguments, direction=loss, **options)


def _module_of_head(
    loss: str, x: Tensor, weight: Tensor, bias: Tensor | None, target: Any, options: dict[str, Any]
) -> Tensor:
    made = {
        "cross_entropy": nn.LinearCrossEntropyLoss, "js": nn.LinearJSDivergenceLoss,
    }.get(loss, nn.LinearKLDivergenceLoss)  # fmt: skip
    fixed = {"js": {"beta": BETA}, "cross_entropy": {}}.get(loss, {"direction": loss})
    of_call = {name: options[name] for name in ("sample_weight",) if name in options}
    fixed |= {name: value for name, value in options.items() if name not in of_call}
    module = made(x.shape[-1], len(weight), bias=bias is not None, **fixed)
    given = {"linear.weight": weight} | ({} if bias is None else {"linear.bias": bias})
    return torch.func.functional_call(module, given, (x, target), of_call)


def _least_budget(loss: str, x: Tensor, weight: Tensor, target: Any, options: dict[str, Any]) -> int | None:
    """The least that works, which cuts classes; the default where the call is refused for another reason, or has no rows."""
    try:
        _head_function(loss)(x, weight, target, **options, memory_budget=1)
    except ValueError as refused:
        return least_of(str(refused)) if "memory_budget" in str(refused) else None
    except TypeError:
        return None
    return None


def _sharded(tensor: Tensor) -> DTensor:
    """On a mesh of this process alone: the passes are those of many."""
    return DTensor.from_local(tensor, init_device_mesh("cpu", (1,)), [Shard(0)])


@contextmanager
def one_process_group() -> Any:
    """A group of this process, for the sharded route."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()
