"""The curvature of a model in ``DistributedDataParallel`` or FSDP2: that of the module inside it, or an error."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from softcurve import curvature

from .process_cases import Cases, begin, distance
from .sharded_training import gradients

CLASSES, ROWS = 7, 9
OPERATORS = (curvature.Hessian, curvature.GGN, curvature.Fisher, curvature.EmpiricalFisher)


def made() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, CLASSES)).double()


def refused(make: Callable[[], Any], *words: str) -> float:
    """Return 0 if an error of softcurve's says all words."""
    try:
        make()
    except (TypeError, ValueError) as error:
        return float(not all(word in str(error) for word in words))
    return 1.0


def step(model: nn.Module, x: Tensor, y: Tensor) -> dict[str, Tensor]:
    """Return the gradients of a training step, which the wrapper synchronises."""
    nn.functional.cross_entropy(model(x), y).backward()
    of_step = {name: gradient.clone() for name, gradient in gradients(model).items()}
    model.zero_grad()
    return of_step


def uses(features: nn.Module, head: nn.Linear, data: list[Any]) -> dict[str, Callable[[], Any]]:
    """Return each public function of a network's curvature."""
    group = {"process_group": dist.group.WORLD}
    calls: dict[str, Callable[[], Any]] = {
        kind.__name__: lambda kind=kind: kind(features, head, data, **group)  # type: ignore[misc]
        for kind in OPERATORS
    }
    calls["influence"] = lambda: curvature.influence(features, head, data, data, damping=0.1, **group)
    calls["gradient_noise"] = lambda: curvature.gradient_noise(features, head, data, **group)
    calls["LastLayerLaplace"] = lambda: curvature.LastLayerLaplace(head, data, features=features, **group)
    return calls


def ddp(x: Tensor, y: Tensor) -> Cases:
    rank = dist.get_rank()
    share = slice(0, 5) if rank == 0 else slice(5, ROWS)
    wrapped, alone = DistributedDataParallel(made()), made()
    before = step(wrapped, x[share], y[share])
    yield "DDP, split: an error", refused(lambda: curvature.split_head(wrapped, "module.2"), "model.module"), 0.0
    body = DistributedDataParallel(nn.Sequential(nn.Linear(4, 3)).double())
    for name, call in uses(body, alone[2], [(x[share], y[share])]).items():
        yield f"DDP, features of {name}: an error", refused(call, "DistributedDataParallel", "the module inside"), 0.0

    features, head = curvature.split_head(wrapped.module, "2")
    of_one = curvature.split_head(alone, "2")
    v = torch.randn(sum(p.numel() for p in alone.parameters()), 2, dtype=torch.float64)
    for kind in OPERATORS[:2] + OPERATORS[3:]:
        many = kind(features, head, [(x[share], y[share])], process_group=dist.group.WORLD)
        yield f"DDP, {kind.__name__}", distance(many @ v, kind(*of_one, [(x, y)]) @ v), 1e-10
    for name, gradient in step(wrapped, x[share], y[share]).items():
        yield f"DDP, the next step: {name}", distance(gradient, before[name]), 0.0


def fsdp(x: Tensor, y: Tensor) -> Cases:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for what, places in {"root": (None,), "body": (0,), "head": (2,), "all": (0, 2, None)}.items():
        model = made()
        for place in places:
            fully_shard(model if place is None else model[place], mesh=mesh)
        before = step(model, x, y)
        if what != "body":
            words = ("FSDP", "before it is sharded")
            yield f"FSDP2, {what}, split: an error", refused(lambda m=model: curvature.split_head(m, "2"), *words), 0.0
        body, head = model[:2], model[2]
        if what in ("body", "all"):
            for name, call in uses(body, head, [(x, y)]).items():
                word = "DTensor" if (what, name) == ("all", "LastLayerLaplace") else "FSDP"  # the head comes first
                yield f"FSDP2, {what}, {name}: an error", refused(call, word), 0.0
        for name, gradient in step(model, x, y).items():
            yield f"FSDP2, {what}, the next step: {name}", distance(gradient, before[name]), 0.0
        if what == "head":
            # Its weight lies over the processes as the classes of a sharded head do, which all see the same rows.
            of_one = made()
            v = torch.randn(sum(p.numel() for p in of_one.parameters()), 2, dtype=torch.float64)
            expected = curvature.GGN(of_one[:2], of_one[2], [(x, y)]) @ v
            yield "FSDP2, head, GGN", distance(curvature.GGN(body, head, [(x, y)]) @ v, expected), 1e-10
            some = [(x[: ROWS - dist.get_rank()], y[: ROWS - dist.get_rank()])]
            other = refused(lambda: curvature.GGN(body, head, some) @ v, "must be the same on every process")  # noqa: B023
            yield "FSDP2, head, other rows: an error", other, 0.0


def main() -> Cases:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(ROWS, 4, dtype=torch.float64, generator=generator)
    y = torch.randint(CLASSES, (ROWS,), generator=generator)
    torch.manual_seed(2)
    yield from ddp(x, y)
    yield from fsdp(x, y)


if __name__ == "__main__":
    begin(main)
