"""Contrastive losses and excluded classes with embeddings and classes over processes, beside one process."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

import softcurve

from .cases import along
from .process_cases import Cases, begin, distance

Loss = Callable[..., Tensor]


def whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def derivatives(value: Tensor, leaves: tuple[Tensor, ...]) -> list[Tensor]:
    """The gradients and a Hessian product."""
    first = [whole(g) for g in torch.autograd.grad(whole(value), leaves, create_graph=True)]
    return [*first, *(whole(g) for g in torch.autograd.grad(along(first), leaves))]


def compare(name: str, got: list[Tensor], expected: list[Tensor]) -> Cases:
    for i, (a, b) in enumerate(zip(got, expected, strict=True)):
        yield f"{name}: {i}", distance(a.detach(), b.detach()), 1e-10


def losses(count: int) -> dict[str, Loss]:
    """Of two batches of ``count`` embeddings and a scale."""
    each = torch.arange(count)
    column, shifted = each.unsqueeze(-1), (each + 1) % count
    away = torch.where(((each + 2) % count).unsqueeze(-1) == column, -1, ((each + 2) % count).unsqueeze(-1))
    lists = softcurve.TopK(
        torch.stack([shifted, each], -1), torch.full((count, 2), 0.5, dtype=torch.float64).log(), tail="renormalize"
    )
    loss = softcurve.contrastive_loss
    return {
        "pairs": lambda a, b, s: loss(a, b, scale=s),
        "pairs in tiles": lambda a, b, s: loss(a, b, scale=s, memory_budget=6000),
        "pairs that exclude": lambda a, b, s: loss(a, b, scale=s, exclude=away, normalize=False),
        "indices": lambda a, b, s: loss(a, b, shifted, scale=s, symmetric=False, exclude=column),
        "lists": lambda a, b, s: loss(a, b, lists, scale=s, symmetric=False),
        "both directions": lambda a, b, s: loss(a, b, (shifted, (each - 1) % count), scale=s),
    }


def leaves_of(count: int) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(count)
    a, b = (torch.randn(count, 4, generator=generator, dtype=torch.float64) for _ in range(2))
    return a, b, torch.tensor(3.0, dtype=torch.float64)


def fresh(leaves: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(t.detach().clone().requires_grad_() for t in leaves)


def of_dtensors(mesh: DeviceMesh) -> Cases:
    """Rows spread evenly and not, one side replicated; each process has its part of the gradients."""
    size = mesh.size()
    for count, places in (
        (3 * size, (Shard(0), Shard(0))),
        (2 * size + 1, (Shard(0), Shard(0))),
        (7, (Shard(0), Replicate())),
    ):
        for name, loss in losses(count).items():
            a, b, s = fresh(leaves_of(count))
            expected = [loss(a, b, s), *derivatives(loss(a, b, s), (a, b, s))]
            spread = [
                distribute_tensor(t.detach(), mesh, [p]).requires_grad_() for t, p in zip((a, b), places, strict=True)
            ]
            given = (*spread, *fresh((s,)))
            value = loss(*given)
            first = torch.autograd.grad(whole(loss(*given)), given)
            assert all(
                isinstance(g, DTensor) and g.placements == t.placements for g, t in zip(first[:2], spread, strict=True)
            )
            yield from compare(f"DTensor {count} {name}", [whole(value), *derivatives(value, given)], expected)


def of_a_process_group(mesh: DeviceMesh) -> Cases:
    """Plain tensors: each process has some rows, their targets, and the gradients of these rows."""
    rank, size = dist.get_rank(), dist.get_world_size()
    own, count = slice(3 * rank, 3 * rank + 3), 3 * size
    each = torch.arange(count)
    shifted, column = (each + 1) % count, each.unsqueeze(-1)
    lists = softcurve.TopK(
        torch.stack([shifted, each], -1), torch.full((count, 2), 0.5, dtype=torch.float64).log(), tail="renormalize"
    )
    mine = softcurve.TopK(lists.indices[own], lists.log_probs[own], tail="renormalize")
    settings: dict[str, tuple[tuple[Any, ...], tuple[Any, ...], dict[str, Any], Any]] = {
        "pairs": ((), (), {}, None),
        "indices": ((shifted,), (shifted[own],), {"symmetric": False}, column),
        "lists": ((lists,), (mine,), {"symmetric": False}, None),
    }
    for name, (target, own_target, options, exclude) in settings.items():
        leaves = fresh(leaves_of(count))
        more = {} if exclude is None else {"exclude": exclude}
        own_more = {} if exclude is None else {"exclude": exclude[own]}
        a, b, s = leaves
        for reduction in ("mean", "none"):
            options |= {"reduction": reduction}
            value = softcurve.contrastive_loss(a, b, *target, scale=s, **options, **more)
            local = fresh((a[own], b[own], s))
            got = softcurve.contrastive_loss(
                *local[:2], *own_target, scale=local[2], process_group=dist.group.WORLD, **options, **own_more
            )  # fmt: skip
            if reduction == "none":
                yield from compare(f"group {name} none", [got], [value[own]])
                continue
            expected = [part[own] if part.ndim else part for part in derivatives(value, leaves)[:3]]
            first = torch.autograd.grad(got, local)
            yield from compare(f"group {name}", [got, *first], [value, *expected])
    module = softcurve.nn.ContrastiveLoss(process_group=dist.group.WORLD).double()
    a, b, _ = leaves_of(count)
    yield from compare("module", [module(a[own], b[own])], [softcurve.nn.ContrastiveLoss().double()(a, b)])
    try:
        softcurve.contrastive_loss(a[: rank + 1], b[: rank + 1], process_group=dist.group.WORLD)
    except ValueError as error:
        yield "uneven rows", float("as many rows on every process" not in str(error)), 0.5


def of_a_head(mesh: DeviceMesh) -> Cases:
    """Excluded classes are those of all processes, for each form of target, with smoothing and without."""
    generator = torch.Generator().manual_seed(0)
    x, w, t = (torch.randn(s, generator=generator, dtype=torch.float64) for s in ((5, 3), (11, 3), (5, 11)))
    exclude = torch.tensor([[10, 0], [4, -1], [-1, -1], [5, 6], [0, 5]])
    indices = torch.tensor([[1, 2], [3, 8], [0, 9], [7, 1], [2, 10]])
    lists = softcurve.TopK(indices, torch.log_softmax(t, -1).gather(-1, indices))
    targets = {
        "indices": indices[:, 0],
        "logits": softcurve.Logits(t),
        "list": lists,
        "teacher": softcurve.LinearTeacher(x, w),
    }
    for name, target in targets.items():
        for options in ({}, {"label_smoothing": 0.2}, {"memory_budget": 16_000}):
            found = []
            for weight in (distribute_tensor(w, mesh, [Shard(0)]), w):
                given = (x.clone().requires_grad_(), weight.detach().requires_grad_())
                each = target
                if name == "teacher":
                    each = softcurve.LinearTeacher(x, weight.detach())
                value = softcurve.linear_cross_entropy(*given, each, exclude=exclude, **options)
                found.append([whole(value), *derivatives(value, given)])
            yield from compare(f"head {name} {options}", *found)


def main() -> Cases:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    yield from of_dtensors(mesh)
    yield from of_a_process_group(mesh)
    yield from of_a_head(mesh)


if __name__ == "__main__":
    begin(main)
