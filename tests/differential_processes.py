"""The head with its classes over the processes of one group, on a list of problems that the parent has drawn.

``python -m tests.differential_processes folder`` reads ``folder/problems.json`` and writes, for each problem, what is
wrong. An error must come in all processes, so they agree on that before any message that follows from a value.
"""

from __future__ import annotations

import dataclasses
import datetime
import json
import os
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from .differential import Call, Problem, problem_of
from .differential_routes import (
    Outcome,
    budget_option,
    cotangent_of,
    disagreements,
    head_route,
    least_budget,
    leaves_of,
    on_head,
    outcome,
)
from .spawned import start, wait

PATIENCE = datetime.timedelta(seconds=60)  # before a process that waits for another one fails


def whole(tensor: Any) -> Any:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def rows_lie_apart(p: Problem) -> bool:
    """Return whether ``input`` is sharded on rows over the same processes, as it is in every third problem."""
    return p.seed % 3 == 1 and bool(p.leading) and not p.positions


def _placed(call: Call, mesh: DeviceMesh) -> dict[str, Tensor]:
    """Return features and head as leaves, the head sharded on classes."""
    apart = ("linear_weight", "linear_bias", *(("input",) if rows_lie_apart(call.problem) else ()))
    placed = {}
    for name, leaf in leaves_of(call).items():
        placed[name] = leaf
        if name in apart:
            placed[name] = distribute_tensor(leaf.detach(), mesh, [Shard(0)]).requires_grad_(leaf.requires_grad)
    return placed


def _share_teacher(call: Call, mesh: DeviceMesh) -> None:
    """Shard a teacher's classes as the student's."""
    if call.problem.kind == "teacher":
        for name in ("weight", "bias"):
            call.target[name] = distribute_tensor(call.target[name], mesh, [Shard(0)])


def sharded_route(mesh: DeviceMesh) -> Any:
    def route(call: Call) -> Outcome:
        more = budget_option(call, least_budget(call))
        _share_teacher(call, mesh)
        leaves = _placed(call, mesh)

        def make() -> tuple[Any, Mapping[str, Tensor]]:
            value = on_head(call, leaves, more)
            if isinstance(value, tuple):
                return (whole(value[0]), value[1]), leaves
            return whole(value), leaves

        found = outcome(make, cotangent_of(call.problem))
        if not _agreed(found.error):
            return Outcome(error="Disagreement", message=f"only one process says {found.error}: {found.message}")
        found.gradients = {name: whole(gradient) for name, gradient in found.gradients.items()}
        if found.stats is not None:
            found.stats = type(found.stats)(*map(whole, found.stats))
        return found

    return route


def _agreed(error: str | None) -> bool:
    """Return whether all processes have an error, or none has."""
    count = torch.tensor([float(error is not None)])
    dist.all_reduce(count)
    return count.item() in (0.0, float(dist.get_world_size()))


def run(drawn: Sequence[Problem], count: int = 2) -> list[tuple[Problem, list[str]]]:
    """Return the problems on which a sharded head is wrong in some process."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder)
        (path / "problems.json").write_text(json.dumps([dataclasses.asdict(p) for p in drawn]))
        ended = wait(start(count, "-m", "tests.differential_processes", folder), timeout=900)
        assert not any(ended.codes), "\n".join(f"{rank}: {text[-3000:]}" for rank, text in enumerate(ended.errors))
        found = [json.loads((path / f"{rank}.json").read_text()) for rank in range(count)]
    assert all(len(of_rank) == len(drawn) for of_rank in found)
    merged = [sorted({line for lines in of_problem for line in lines}) for of_problem in zip(*found, strict=True)]
    return [(p, lines) for p, lines in zip(drawn, merged, strict=True) if lines]


def main() -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=PATIENCE)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    folder = Path(sys.argv[1])
    routes = {"head": head_route, "sharded": sharded_route(mesh)}
    drawn = json.loads((folder / "problems.json").read_text())
    found = [disagreements(problem_of(described), routes) for described in drawn]
    (folder / f"{os.environ['RANK']}.json").write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
