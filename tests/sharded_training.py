"""Sharded heads beside FSDP2 and tensor-parallel plans, and what they send."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, SequenceParallel, parallelize_module
from torch.utils._python_dispatch import TorchDispatchMode

import softcurve

from .process_cases import Cases, begin, distance
from .sharded_heads import whole


class Model(nn.Module):
    """Features behind a norm, and a head that meets its loss in ``forward``, where FSDP has its parameters whole."""

    def __init__(self, d: int = 4, classes: int = 7) -> None:
        super().__init__()
        self.features, self.norm = nn.Linear(3, d), nn.LayerNorm(d)
        self.head = softcurve.nn.LinearCrossEntropyLoss(d, classes, bias=True)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.head(self.norm(torch.tanh(self.features(x))), y)


def made() -> tuple[Model, Tensor, Tensor]:
    torch.manual_seed(0)
    model = Model().double()
    for parameter in model.parameters():
        nn.init.normal_(parameter)
    return model, torch.randn(8, 5, 3, dtype=torch.float64), torch.randint(7, (8, 5))


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: whole(p.grad) for name, p in model.named_parameters() if p.grad is not None}


def same(what: str, model: nn.Module, expected: dict[str, Tensor]) -> Cases:
    found = gradients(model)
    yield f"{what}: every gradient", float(found.keys() != expected.keys()), 0.0
    for name, gradient in expected.items():
        yield f"{what}: {name}", distance(found[name], gradient), 1e-10


def fsdp() -> Cases:
    """FSDP2 alone: each process has rows of its own, and a plain head inside ``forward``."""
    rank, count = dist.get_rank(), dist.get_world_size()
    alone, x, y = made()
    x, y = x[: 2 * count], y[: 2 * count]
    alone(x, y).backward()
    model, _, _ = made()
    mesh = init_device_mesh("cpu", (count,))
    for part in (model.head, model):
        fully_shard(part, mesh=mesh)
    model(x[2 * rank : 2 * rank + 2], y[2 * rank : 2 * rank + 2]).backward()
    yield from same("FSDP2", model, gradients(alone))


def tensor_parallel() -> Cases:
    """A head that a plan has sharded, behind replicated features and behind a sequence-parallel norm."""
    alone, x, y = made()
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    alone(x, y).backward()
    for sequence in (False, True):
        model, _, _ = made()
        plan: dict[str, Any] = {"head.linear": ColwiseParallel()}
        if sequence:
            plan["norm"] = SequenceParallel(use_local_output=False)
        parallelize_module(model, mesh, plan)
        h = torch.tanh(model.features(x))
        if sequence:
            h = DTensor.from_local(h, mesh, [Replicate()]).redistribute(mesh, [Shard(1)])
        value = model.head(model.norm(h), y)
        yield f"plan, sequence={sequence}: a DTensor", float(isinstance(value, DTensor) != sequence), 0.0
        value.backward()
        yield from same(f"plan, sequence={sequence}", model, gradients(alone))


def both() -> Cases:
    """FSDP2 over rows and the head's classes over the other dimension of the mesh."""
    if dist.get_world_size() != 4:
        return
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("rows", "classes"))
    alone, x, y = made()
    alone(x, y).backward()
    model, _, _ = made()
    for name in ("weight", "bias"):
        part = distribute_tensor(getattr(model.head.linear, name).detach(), mesh["classes"], [Shard(0)])
        setattr(model.head.linear, name, nn.Parameter(part))
    for part in (model.head, model):
        fully_shard(part, mesh=mesh["rows"])
    half = slice(4 * mesh["rows"].get_local_rank(), 4 * mesh["rows"].get_local_rank() + 4)
    model(x[half], y[half]).backward()
    yield from same("FSDP2 and sharded classes", model, gradients(alone))


# --- what is sent ------------------------------------------------------------------------------------------------------


class Functional(TorchDispatchMode):
    """The collectives by which DTensors are redistributed."""

    def __init__(self, sent: list[int]) -> None:
        super().__init__()
        self.sent = sent

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "_c10d_functional" and not func.__name__.startswith(("wait", "_wrap")):
            self.sent.append(args[0].nbytes)
        return func(*args, **(kwargs or {}))


@contextmanager
def counted() -> Iterator[list[int]]:
    """The bytes of each message that this process hands in."""
    sent: list[int] = []
    reduce = dist.all_reduce

    def counting(tensor: Tensor, *rest: Any, **named: Any) -> Any:
        sent.append(tensor.nbytes)
        return reduce(tensor, *rest, **named)

    with mock.patch.object(dist, "all_reduce", counting), Functional(sent):
        yield sent


def bytes_sent(
    mesh: DeviceMesh, classes: int, rows: int, d: int, target: Callable[..., Any], **options: Any
) -> list[int]:
    torch.manual_seed(1)
    weight = distribute_tensor(torch.randn(classes, d), mesh, [Shard(0)])
    x = torch.randn(rows, d, requires_grad=True)
    with counted() as sent:
        function = options.pop("function", softcurve.linear_cross_entropy)
        function(x, weight, target(classes), **options).backward()
    return sent


def sums(rows: int, *columns: int) -> list[int]:
    return [8 * rows * count for count in columns]


def traffic() -> Cases:
    """docs/scaling.md: bytes of the loss and its feature gradient, the same for any number of classes."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    rows, d = 12, 5
    gradient = [4 * rows * d]  # beside it a plain ``input`` is compared, which no mode that looks on lets happen

    def teacher(classes: int) -> Any:
        w = distribute_tensor(torch.randn(classes, d), mesh, [Shard(0)])
        return softcurve.LinearTeacher(torch.randn(rows, d), w)

    kinds: dict[str, tuple[Callable[..., Any], list[int], dict[str, Any]]] = {
        # the largest; listed logit and the others' sum
        "index": (lambda c: torch.arange(rows) % c, sums(rows, 1, 2), {}),
        "list of 4": (
            lambda c: softcurve.TopK(*(t[:, :4] for t in _listed(rows, c))), sums(rows, 1, 5), {},
        ),
        # the largest; Σ e^z and who has the largest; value, surplus, information, S, S without the largest, p·v
        "probabilities": (lambda c: torch.softmax(torch.randn(rows, c), -1), sums(rows, 1, 2, 6), {}),
        "teacher": (teacher, sums(rows, 2, 4, 9), {}),
        "forward": (teacher, sums(rows, 2, 4, 9), {"function": softcurve.linear_kl_divergence}),
        "js": (teacher, sums(rows, 2, 4, 9), {"function": softcurve.linear_js_divergence}),
    }  # fmt: skip
    for name, (target, expected, options) in kinds.items():
        for classes in (64, 640):
            sent = bytes_sent(mesh, classes, rows, d, target, **dict(options))
            yield f"traffic {name} C={classes}: {sent}", float(sent != expected + gradient), 0.0


def _listed(rows: int, classes: int) -> tuple[Tensor, Tensor]:
    values, indices = torch.log_softmax(torch.randn(rows, classes), -1).topk(4)
    return indices, values


def main() -> Cases:
    yield from fsdp()
    yield from tensor_parallel()
    yield from both()
    yield from traffic()


if __name__ == "__main__":
    begin(main)
