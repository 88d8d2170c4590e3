"""The curvature of a head whose classes, or whose rows, lie over the processes, beside that of one process.

The settings are pairwise over the counts of processes together: each count runs its own share of them.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

import softcurve
from softcurve import curvature
from softcurve.curvature import Direction, HeadCurvature

from .pairwise import pairwise
from .process_cases import Cases, begin, distance
from .sharded_heads import whole

LOSSES: dict[str, dict[str, Any]] = {
    "cross_entropy": {"label_smoothing": 0.1, "z_loss": 0.2, "temperature": 0.7},
    "softcap": {"softcap": 2.0, "weight": torch.linspace(0.5, 1.5, 7, dtype=torch.float64)},
    "forward_kl": {"loss": "forward_kl"},
    "reverse_kl": {"loss": "reverse_kl", "softcap": 2.0},
    "js": {"loss": "js", "beta": 0.3},
}
COUNTS = (2, 3, 4)
N, D, C = 9, 3, 7


def has_target(name: str, loss: str, other: str, kind: str) -> bool:
    """Whether a loss takes a kind of target."""
    if (name, other) != ("loss", "kind"):
        return True
    return not ((kind == "index" and "loss" in LOSSES[loss]) or (kind == "list" and "weight" in LOSSES[loss]))


def is_one_matrix(name: str, target: str, other: str, operator: str) -> bool:
    """Whether an operator is compared for a target: no empirical Fisher of a divergence."""
    return (name, other, target, operator) != ("target", "operator", "soft", "EmpiricalFisher")


HEADS = pairwise(
    {"loss": list(LOSSES), "kind": ("index", "dense", "logits", "list", "teacher"), "count": COUNTS}, has_target
)
OPTIONS: dict[str, dict[str, Any]] = {
    "index": {"label_smoothing": 0.1},
    "soft": {"loss": "reverse_kl"},
    "sum": {"reduction": "sum", "z_loss": 0.1},
}
NETWORKS = pairwise(
    {
        "target": list(OPTIONS),
        "operator": ("Hessian", "GGN", "Fisher", "EmpiricalFisher"),
        "over_classes": (True, False),
        "count": COUNTS,
    },
    is_one_matrix,
)


def made(seed: int) -> dict[str, Tensor]:
    torch.manual_seed(seed)
    shapes = {"e": (N, D), "w": (C, D), "b": (C,), "te": (N, 2), "tw": (C, 2), "tb": (C,), "logits": (N, C)}
    tensors = {name: torch.randn(shape, dtype=torch.float64) for name, shape in shapes.items()}
    tensors["b"][5] = 30.0 if seed % 2 else 0.5  # confident rows
    return tensors


def targets(t: dict[str, Tensor], mesh: DeviceMesh | None) -> dict[str, Any]:
    def over(tensor: Tensor) -> Tensor:
        return tensor if mesh is None else distribute_tensor(tensor, mesh, [Replicate()] * (mesh.ndim - 1) + [Shard(0)])

    listed = torch.log_softmax(t["logits"], -1).topk(3)
    label = t["logits"].argmax(-1)
    label[2] = -100
    return {
        "index": label,
        "dense": torch.softmax(t["logits"], -1),
        "logits": softcurve.Logits(t["logits"]),
        "list": softcurve.TopK(listed.indices, listed.values),
        "teacher": softcurve.LinearTeacher(t["te"], over(t["tw"]), over(t["tb"])),
    }


def of_head(mesh: DeviceMesh, *, rows: bool) -> Cases:
    first = [Shard(0)] if rows else [Replicate()]
    placed = [*first[: mesh.ndim - 1], Shard(0)]
    for setting in HEADS:
        if setting["count"] != dist.get_world_size():
            continue
        name, kind = setting["loss"], setting["kind"]
        options, t = LOSSES[name], made(list(LOSSES).index(name))
        w, b = (distribute_tensor(t[k], mesh, [Replicate()] * (mesh.ndim - 1) + [Shard(0)]) for k in ("w", "b"))
        e = distribute_tensor(t["e"], mesh, [Shard(0)] + [Replicate()] * (mesh.ndim - 1)) if rows else t["e"]
        sample = torch.linspace(0, 1, N, dtype=torch.float64)
        one = HeadCurvature(t["e"], t["w"], targets(t, None)[kind], linear_bias=t["b"], sample_weight=sample, **options)
        many = HeadCurvature(e, w, targets(t, mesh)[kind], linear_bias=b, sample_weight=sample, **options)
        yield from of_operators(f"{placed} {name} {kind}", one, many)


def of_operators(what: str, one: HeadCurvature, many: HeadCurvature) -> Cases:
    torch.manual_seed(9)
    columns = [
        Direction(*(torch.randn(shape, dtype=torch.float64) for shape in ((N, D), (C, D), (C,)))) for _ in range(2)
    ]
    columns.append(Direction(None, columns[0].weight, None))
    for method in ("hvp", "ggnvp"):
        for j, (got, expected) in enumerate(
            zip(getattr(many, method)(columns), getattr(one, method)(columns), strict=True)
        ):
            for part, a, b in zip(("input", "weight", "bias"), got, expected, strict=True):
                yield f"{what} {method} {j} {part}", distance(whole(a), b), 1e-10
    for matrix in ("hessian", "gauss_newton", "fisher"):
        for part, a, b in zip(
            ("weight", "bias"), many.diagonal(matrix=matrix)[1:], one.diagonal(matrix=matrix)[1:], strict=True
        ):
            yield f"{what} diagonal of {matrix}, {part}", distance(whole(a), b), 1e-10
        yield f"{what} trace of {matrix}", abs(many.trace(matrix=matrix) / one.trace(matrix=matrix) - 1), 1e-9
    for kind in ("grand", "el2n"):
        yield f"{what} {kind}", distance(whole(many.gradient_norms(kind)), one.gradient_norms(kind)), 1e-10
    yield f"{what} bound", abs(many.largest_eigenvalue_bound() / one.largest_eigenvalue_bound() - 1), 1e-10
    a, b = many.kfac(form="dense"), one.kfac(form="dense")
    yield f"{what} moment", distance(a.features, b.features), 1e-10
    got, expected = (factors.product(columns[0].weight, columns[0].bias) for factors in (a, b))
    yield f"{what} Kronecker product", distance(got[0], expected[0]), 1e-10


def networks() -> Cases:
    """Rows over the processes, or the head's classes: a flat vector is the same in all."""
    rank, count = dist.get_rank(), dist.get_world_size()
    mesh = init_device_mesh("cpu", (count,))
    t = made(3)
    torch.manual_seed(4)
    features = nn.Sequential(nn.Linear(4, D), nn.Tanh()).double()
    x = torch.randn(N, 4, dtype=torch.float64)
    head = nn.Linear(D, C).double()
    label = t["logits"].argmax(-1)
    soft = torch.softmax(t["logits"], -1)
    share = slice(N * rank // (count + 1), N * (rank + 1) // (count + 1))
    share = slice(share.start, N) if rank == count - 1 else share  # the last has more
    sharded = nn.Linear(D, C).double()
    for name in ("weight", "bias"):
        whole_part = getattr(head, name).detach()
        setattr(sharded, name, nn.Parameter(distribute_tensor(whole_part, mesh, [Shard(0)])))
    for setting in NETWORKS:
        if setting["count"] != count:
            continue
        name, over_classes, options = setting["target"], setting["over_classes"], OPTIONS[setting["target"]]
        operator, target = getattr(curvature, setting["operator"]), soft if name == "soft" else label
        one_data = [(x[:5], target[:5]), (x[5:], target[5:])]
        one = operator(features, head, one_data, **options)
        if over_classes:
            many = operator(features, sharded, one_data, **options)
        else:
            many = operator(features, head, [(x[share], target[share])], process_group=dist.group.WORLD, **options)
        torch.manual_seed(5)
        v = torch.randn(one.shape[0], 3, dtype=torch.float64)
        yield f"{setting}", distance(many @ v, one @ v), 1e-10
        if operator is curvature.GGN:
            a, b = many.kfac(), one.kfac()
            yield f"features of kfac {setting}", distance(a.features, b.features), 1e-10
            w = torch.randn(C, D, dtype=torch.float64)
            bias = torch.randn(C, dtype=torch.float64)
            solved = (f.solve(w, bias, damping=0.1)[0] for f in (a, b))
            yield f"kfac {setting}", distance(*solved), 1e-8
    sampled = curvature.Fisher(features, sharded, [(x, label)], samples=4, seed=2)
    alone = curvature.Fisher(features, head, [(x, label)], samples=4, seed=2)
    v = torch.randn(alone.shape[0], generator=torch.Generator().manual_seed(6), dtype=torch.float64)
    yield "classes drawn over the processes", distance(sampled @ v, alone @ v), 1e-10
    half = [(x[:4], label[:4])]
    for what, model, group in (("classes", sharded, None), ("rows", head, dist.group.WORLD)):
        data = [(x, label)] if group is None else [(x[share], label[share])]
        test = half if group is None or rank == 0 else [(x[:0], label[:0])]
        got = curvature.influence(features, model, data, test, damping=0.1, process_group=group)
        expected = curvature.influence(features, head, [(x, label)], half, damping=0.1)
        wanted = expected.values if group is None else expected.values[share]
        yield f"influence, {what}", distance(got.values, wanted), 1e-5
        yield f"divisor of influence, {what}", abs(got.divisor - expected.divisor), 1e-12
        noise = curvature.gradient_noise(features, model, data, process_group=group)
        alone = curvature.gradient_noise(features, head, [(x, label)])
        yield f"variance of gradients, {what}", abs(noise.variance / alone.variance - 1), 1e-10
        yield f"gradient, {what}", abs(noise.squared_norm - alone.squared_norm) / alone.variance, 1e-10
    # One process has all of the data, the others not even an empty batch.
    all_of_it = [(x, label)] if rank == count - 1 else []
    for name, options in (("plain", {}), ("soft cap", {"softcap": 2.0})):
        one = curvature.GGN(features, head, [(x, label)], **options)
        many = curvature.GGN(features, head, all_of_it, process_group=dist.group.WORLD, **options)
        v = torch.randn(one.shape[0], 2, dtype=torch.float64, generator=torch.Generator().manual_seed(7))
        yield f"no batch, {name}", distance(many @ v, one @ v), 1e-10
        w, bias = torch.ones(C, D, dtype=torch.float64), torch.ones(C, dtype=torch.float64)
        got, expected = (each.kfac().product(w, bias)[0] for each in (many, one))
        yield f"no batch, kfac, {name}", distance(got, expected), 1e-10
    got = curvature.influence(features, head, all_of_it, all_of_it, damping=0.1, process_group=dist.group.WORLD)
    expected = curvature.influence(features, head, [(x, label)], [(x, label)], damping=0.1)
    wanted = expected.values if all_of_it else expected.values[:0]
    yield "no batch, influence", distance(got.values, wanted), 1e-5
    noise = curvature.gradient_noise(features, head, all_of_it, process_group=dist.group.WORLD)
    yield "no batch, variance of gradients", abs(noise.variance / alone.variance - 1), 1e-10
    # Processes whose kinds of target differ.
    most = torch.log_softmax(t["logits"], -1).topk(2)
    listed = softcurve.TopK(most.indices, most.values)
    dense = (x, soft)
    data = [(x, listed)] if rank == 0 else [dense] if rank == 1 else []
    many = curvature.GGN(features, head, data, process_group=dist.group.WORLD, loss="js")
    one = curvature.GGN(features, head, [(x, listed), dense], loss="js")
    yield "two kinds", distance(many.kfac().product(w, bias)[0], one.kfac().product(w, bias)[0]), 1e-10
    one = curvature.LastLayerLaplace(head, [(x, label)], features=features)
    many = curvature.LastLayerLaplace(
        head, [(x[share], label[share])], features=features, process_group=dist.group.WORLD
    )
    none = curvature.LastLayerLaplace(head, all_of_it, features=features, process_group=dist.group.WORLD)
    yield "no batch, evidence", distance(none.log_marginal_likelihood(), one.log_marginal_likelihood()), 1e-10
    yield "evidence", distance(many.log_marginal_likelihood(), one.log_marginal_likelihood()), 1e-10


def main() -> Cases:
    count = dist.get_world_size()
    mesh = init_device_mesh("cpu", (count,))
    if count < 4:
        yield from of_head(mesh, rows=count == 2)
    else:
        yield from of_head(init_device_mesh("cpu", (2, 2)), rows=True)
    yield from networks()


if __name__ == "__main__":
    begin(main)
