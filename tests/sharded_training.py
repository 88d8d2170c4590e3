"""Sharded heads beside FSDP2 and tensor-parallel plans, and what they send."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as functional
from bench import scaling
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, SequenceParallel, parallelize_module
from torch.utils.flop_counter import FlopCounterMode

import softcurve
from softcurve.head import curvature, loop
from softcurve.head.products import Direction
from softcurve.head.tensors import HeadTensors, RowLosses
from softcurve.losses.divergences import CrossEntropy
from softcurve.losses.spec import LossSpec

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


def compiled() -> Cases:
    """The passes are opaque to a compiled graph, and so is where the tensors lie."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    torch.manual_seed(0)
    x, weight, y = torch.randn(6, 4, dtype=torch.float64), torch.randn(9, 4, dtype=torch.float64), torch.arange(6)

    def loss(x: Tensor, weight: Tensor) -> Tensor:
        return softcurve.linear_cross_entropy(torch.tanh(x), weight, y)

    found = []
    for function in (loss, torch.compile(loss, fullgraph=True, backend="aot_eager")):
        given = [x.clone().requires_grad_(), distribute_tensor(weight, mesh, [Shard(0)]).requires_grad_()]
        with warnings.catch_warnings():
            # torch's tracer makes one of each autograd.Function, against its own advice.
            warnings.filterwarnings("ignore", ".*should not be instantiated", DeprecationWarning)
            value = function(*given)
        found.append([value.detach(), *(whole(g) for g in torch.autograd.grad(value, given))])
    for name, eager, graph in zip(("value", "features", "weight"), *found, strict=True):
        yield f"compiled {name}", distance(graph, eager), 1e-12


def positions() -> Cases:
    """A head for each position, as torch reads a weight of more dimensions."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    torch.manual_seed(0)
    tensors = [torch.randn(shape, dtype=torch.float64) for shape in ((6, 4), (9, 3, 4), (9, 3))]
    y = torch.randint(9, (6, 3))
    found = []
    for sharded in (False, True):
        x, weight, bias = (t.clone() for t in tensors)
        if sharded:
            weight, bias = (distribute_tensor(t, mesh, [Shard(0)]) for t in (weight, bias))
        given = [t.requires_grad_() for t in (x, weight, bias)]
        value = softcurve.linear_cross_entropy(given[0], given[1], y, linear_bias=given[2], label_smoothing=0.1)
        found.append([value.detach(), *(whole(g) for g in torch.autograd.grad(value, given))])
    for number, (one, many) in enumerate(zip(*found, strict=True)):
        yield f"positions {number}", distance(many, one), 1e-12


# --- what is sent ------------------------------------------------------------------------------------------------------


@contextmanager
def counted() -> Iterator[list[int]]:
    """The bytes of each message that this process hands in: to torch.distributed, and to what redistributes DTensors."""
    sent: list[int] = []

    def counting(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(tensor: Tensor, *rest: Any, **named: Any) -> Any:
            sent.append(tensor.nbytes)
            return function(tensor, *rest, **named)

        return call

    # As they are called in one release of torch or another.
    names = ("all_reduce", "all_gather_single", "all_gather_tensor", "reduce_scatter_single", "reduce_scatter_tensor")
    with ExitStack() as stack:
        for module, name in (
            (dist, "all_reduce"),
            *((functional, name) for name in names if hasattr(functional, name)),
        ):
            stack.enter_context(mock.patch.object(module, name, counting(getattr(module, name))))
        yield sent


def bytes_sent(
    mesh: DeviceMesh, classes: int, rows: int, d: int, target: Callable[..., Any], **options: Any
) -> list[int]:
    torch.manual_seed(1)
    weight = distribute_tensor(torch.randn(classes, d), mesh, [Shard(0)])
    x = torch.randn(rows, d)
    if options.pop("sequence", False):
        x = distribute_tensor(x, mesh, [Shard(0)])
    x.requires_grad_()
    with counted() as sent:
        function = options.pop("function", softcurve.linear_cross_entropy)
        function(x, weight, target(classes), **options).backward()
    return sent


def traffic(mesh: DeviceMesh) -> Cases:
    """The formulas of docs/scaling.md, which for the loss and its feature gradient do not know the number of classes."""
    rows, d = 12, 5

    def teacher(classes: int) -> Any:
        w = distribute_tensor(torch.randn(classes, d), mesh, [Shard(0)])
        return softcurve.LinearTeacher(torch.randn(rows, d), w)

    def listed(classes: int) -> softcurve.TopK:
        values, indices = torch.log_softmax(torch.randn(rows, classes), -1).topk(4)
        return softcurve.TopK(indices, values)

    kinds: dict[str, tuple[Callable[[int], Any], list[int], dict[str, Any]]] = {
        "index": (lambda c: torch.arange(rows) % c, scaling.of_list(rows, 1), {}),
        "sequence": (lambda c: torch.arange(rows) % c, scaling.of_list(rows, 1), {"sequence": True}),
        "list of 4": (listed, scaling.of_list(rows, 4), {}),
        "probabilities": (
            lambda c: torch.softmax(torch.randn(rows, c), -1), scaling.of_distribution(rows, sides=1), {},
        ),
        "teacher": (teacher, scaling.of_distribution(rows, sides=2), {}),
        "forward": (
            teacher, scaling.of_distribution(rows, sides=2), {"function": softcurve.linear_kl_divergence},
        ),
        "js": (teacher, scaling.of_distribution(rows, sides=2), {"function": softcurve.linear_js_divergence}),
    }  # fmt: skip
    for name, (target, statistics, options) in kinds.items():
        for classes in (64, 640):
            step = scaling.Step(rows, d, classes, by_classes=mesh.size(), itemsize=4)
            sent = bytes_sent(mesh, classes, rows, d, target, **dict(options))
            gathered = [step.itemsize * rows * d // mesh.size()] if "sequence" in options else []
            expected = [scaling.ON_THE_CPU, *gathered, *statistics, *scaling.of_gradients(step)]
            yield f"traffic {name} C={classes}: {sent} for {expected}", float(sent != expected), 0.0


def second_order(mesh: DeviceMesh) -> Cases:
    """A Hessian product sends as little."""
    rows, d = 12, 5
    for classes in (64, 640):
        torch.manual_seed(2)
        weight = distribute_tensor(torch.randn(classes, d), mesh, [Shard(0)]).requires_grad_()
        x = torch.randn(rows, d, requires_grad=True)
        loss = softcurve.linear_cross_entropy(x, weight, torch.arange(rows) % classes)
        (gradient,) = torch.autograd.grad(loss, x, create_graph=True)
        with counted() as sent:
            torch.autograd.grad(gradient.square().sum(), (x, weight))
        step = scaling.Step(rows, d, classes, by_classes=mesh.size(), itemsize=4)
        expected = scaling.of_list(rows, 1, directed=True) + scaling.of_gradients(step)
        yield f"Hessian product C={classes}: {sent} for {expected}", float(sent != expected), 0.0


def operations(mesh: DeviceMesh) -> Cases:
    """Matrix products of one process, by torch's own count."""
    rows, d, classes = 12, 5, 64
    step = scaling.Step(rows, d, classes, by_classes=mesh.size())
    own = distribute_tensor(torch.randn(classes, d), mesh, [Shard(0)]).to_local()
    first = min(step.own_classes * mesh.get_local_rank(), classes)
    loss = LossSpec(CrossEntropy(), "sparse", group=mesh.get_group().group_name, first=first, classes=classes)
    x, indices = torch.randn(rows, d), (torch.arange(rows) % classes).unsqueeze(-1)
    tensors = HeadTensors(x, own, *(None,) * 6, indices, torch.ones(rows), None)
    both = (True, True, *(False,) * 6)
    direction = (torch.randn(rows, d), torch.randn(own.shape), *(None,) * 6)

    def counted_in_products(run: Callable[[], object]) -> float:
        with FlopCounterMode(display=False) as counter:
            run()
        return counter.get_total_flops() / (2 * rows * d * len(own))

    for name, expected, run in (
        ("loss", scaling.LOSS, lambda: loop.evaluate(loss, tensors, None)),
        ("gradients", scaling.GRADIENTS, lambda: loop.evaluate(loss, tensors, None, wanted=both)),
        (
            "Hessian product",
            scaling.HESSIAN_PRODUCT,
            lambda: loop.evaluate(loss, tensors, None, wanted=both, directions=direction),
        ),
    ):
        count = counted_in_products(run)
        yield f"operations of {name}: {count} products for {expected}", float(count != expected), 0.0
    for columns in (1, 4):
        along = [Direction(None, torch.randn(own.shape), None) for _ in range(columns)]
        into = [Direction(None, torch.zeros(own.shape), None) for _ in range(columns)]
        given = RowLosses(loss, tensors, False, None)
        count = counted_in_products(lambda: curvature.add_products(given, "gauss_newton", along, into))  # noqa: B023
        expected = scaling.curvature_products(columns)
        yield f"operations of {columns} columns: {count} products for {expected}", float(count != expected), 0.0


def main() -> Cases:
    yield from fsdp()
    yield from tensor_parallel()
    yield from both()
    if dist.get_world_size() == 2:  # A graph is compiled in each process.
        yield from compiled()
    yield from positions()
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    yield from traffic(mesh)
    yield from second_order(mesh)
    yield from operations(mesh)


if __name__ == "__main__":
    begin(main)
