"""Unmade logits under DDP, FSDP2 and with sharded classes: the gradients are those of the logits that a head makes."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

import softcurve

from .process_cases import Cases, begin, distance
from .sharded_heads import whole
from .sharded_training import gradients

CLASSES, STEPS = 9, 2


class Model(nn.Module):
    """A model that returns its loss where it gets labels, and always its logits."""

    def __init__(self) -> None:
        super().__init__()
        self.features, self.unused = nn.Linear(3, 4), nn.Linear(2, 2)
        self.head = nn.Linear(4, CLASSES, bias=False)

    def forward(self, x: Tensor, y: Tensor | None = None) -> dict[str, Tensor]:
        logits = torch.tanh(self.head(torch.tanh(self.features(x))) / 2) * 2
        return {"logits": logits} if y is None else {"loss": F.cross_entropy(logits, y), "logits": logits}

    def get_output_embeddings(self) -> nn.Module:
        return self.head


def made(*, uses_all: bool = True) -> Model:
    torch.manual_seed(0)
    model = Model().double()
    if uses_all:
        model.unused.requires_grad_(False)
    return model


def batch(step: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(10 * step + dist.get_rank())
    return torch.randn(5, 3, dtype=torch.float64, generator=generator), torch.arange(5) + step


def loss_of(model: nn.Module, x: Tensor, y: Tensor, inside: bool) -> Tensor:
    if inside:
        return model(x, y)["loss"]
    logits = model(x)["logits"]
    log_probs = F.log_softmax(logits, -1)
    return F.cross_entropy(logits, y) - log_probs.gather(-1, y[:, None]).mean()


def train(model: nn.Module, inside: bool) -> list[dict[str, Tensor]]:
    """Return the gradients of each of a few steps, which also change the model."""
    every = []
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for step in range(STEPS):
        loss_of(model, *batch(step), inside).backward()
        every.append({name: gradient.clone() for name, gradient in gradients(model).items()})
        optimizer.step()
        optimizer.zero_grad()
    return every


def same(what: str, make: Callable[[], nn.Module], inside: bool, made_times: int = 0) -> Cases:
    expected = train(make(), inside)
    model = make()
    with softcurve.lazy_logits(model) as lazy:
        got = train(model, inside)
    yield f"{what}: logits made", float(abs(lazy.materialized - made_times)), 0.0
    for step, (ours, theirs) in enumerate(zip(got, expected, strict=True)):
        yield f"{what}: names, step {step}", float(ours.keys() != theirs.keys()), 0.0
        for name in theirs:
            yield f"{what}: {name}, step {step}", distance(ours[name], theirs[name]), 1e-12


def ddp() -> Cases:
    options: list[dict[str, Any]] = [{}, {"find_unused_parameters": True}, {"static_graph": True}]
    for each in options:
        for inside in (True, False):
            uses_all = "find_unused_parameters" not in each

            def make(each: Any = each, uses_all: bool = uses_all) -> nn.Module:
                return DistributedDataParallel(made(uses_all=uses_all), **each)

            # A static graph needs the backward of what DDP puts behind the outputs in its first step.
            times = 1 if "static_graph" in each and not inside else 0
            yield from same(f"DDP {each}, loss inside={inside}", make, inside, times)


def fsdp() -> Cases:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))

    def root() -> nn.Module:
        model = made()
        fully_shard(model.features, mesh=mesh)
        return fully_shard(model, mesh=mesh)

    def head_kept() -> nn.Module:
        model = made()
        fully_shard(model.head, mesh=mesh, reshard_after_forward=False)
        return fully_shard(model, mesh=mesh)

    for inside in (True, False):
        yield from same(f"FSDP2, root, loss inside={inside}", root, inside)
        yield from same(f"FSDP2, head whole, loss inside={inside}", head_kept, inside)
    model = made()
    fully_shard(model.head, mesh=mesh)
    fully_shard(model, mesh=mesh)
    with softcurve.lazy_logits(model):
        try:
            model(*batch(0))
            message = ""
        except RuntimeError as error:
            message = str(error)
    yield "FSDP2, head freed: an error", float("shard it with reshard_after_forward=False" not in message), 0.0


def sharded_classes() -> Cases:
    """A weight that lies over the processes, where the loss meets the head's output."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    torch.manual_seed(0)
    x, y = torch.randn(5, 3, dtype=torch.float64), torch.arange(5)
    for name, use in {
        "cross-entropy": lambda z: F.cross_entropy(z / 2, y),
        "log-probabilities": lambda z: F.log_softmax(z, -1).gather(-1, y[:, None]).mean(),
        "chosen logits": lambda z: (z.gather(-1, y[:, None]).squeeze(-1) - z.logsumexp(-1)).mean(),
    }.items():
        alone, model = made(), made()
        use(alone.head(torch.tanh(alone.features(x)))).backward()
        part = distribute_tensor(model.head.weight.detach(), mesh, [Shard(0)])
        model.head.weight = nn.Parameter(part)
        with softcurve.lazy_logits(model) as lazy:
            e = torch.tanh(model.features(x))
            whole(use(model.head(DTensor.from_local(e, mesh, [Replicate()])))).backward()
        yield f"sharded classes, {name}: logits made", float(lazy.materialized), 0.0
        expected, got = gradients(alone), gradients(model)
        for parameter in expected:
            yield f"sharded classes, {name}: {parameter}", distance(got[parameter], expected[parameter]), 1e-12


def main() -> Cases:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*FSDP2-wrapped module", UserWarning)
        yield from ddp()
        yield from fsdp()
        yield from sharded_classes()


if __name__ == "__main__":
    begin(main)
