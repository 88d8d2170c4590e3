"""Many cases in one set of gloo processes, which take seconds to start.

The processes run ``python -m tests.<module> folder``, whose ``main`` yields ``(case, error, bound)`` of each comparison.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from .spawned import start, wait

Cases = Iterator[tuple[str, float, float]]


def run(module: str, count: int) -> dict[str, tuple[float, float]]:
    """The error and the bound of every case, the worst of all processes; a process that fails is an error here."""
    with tempfile.TemporaryDirectory() as folder:
        ended = wait(start(count, "-m", f"tests.{module}", folder), timeout=900)
        assert not any(ended.codes), "\n".join(f"{rank}: {text[-3000:]}" for rank, text in enumerate(ended.errors))
        found: dict[str, tuple[float, float]] = {}
        for rank in range(count):
            for case, error, bound in json.loads((Path(folder) / f"{rank}.json").read_text()):
                worst = found.get(case, (0.0, bound))[0]
                found[case] = (error if error != error else max(worst, error), bound)
        return found


def wrong(found: dict[str, tuple[float, float]]) -> list[str]:
    """The cases beyond their bounds; NaN is beyond any."""
    return [f"{case}: {error:.2e} > {bound:.0e}" for case, (error, bound) in found.items() if not error <= bound]


def begin(main: Callable[[], Cases]) -> None:
    """What a module of cases does as a process."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    found = list(main())
    (Path(sys.argv[1]) / f"{os.environ['RANK']}.json").write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


def distance(got: Tensor, expected: Tensor) -> float:
    """The largest difference, relative to the largest entry; infinite for other shapes, zero where NaN meets NaN."""
    if got.shape != expected.shape:
        return float("inf")
    if not expected.numel():
        return 0.0
    both_same = (got.isnan() & expected.isnan()) | (got == expected)
    apart = torch.where(both_same, 0.0, got.double() - expected.double()).abs().max()
    return float(apart / max(1e-3, float(expected.double().abs().nan_to_num(0, 0, 0).max())))
