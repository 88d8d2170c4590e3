"""Many cases in one set of gloo processes, which take seconds to start: ``run(module, count)``.

The processes run ``python -m tests.<module>``, whose ``main(group)`` yields ``(case, error, bound)`` of each comparison.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.distributed as dist

ROOT = Path(__file__).resolve().parent.parent
Cases = Iterator[tuple[str, float, float]]


def run(module: str, count: int, *arguments: str, timeout: float = 600) -> dict[str, tuple[float, float]]:
    """The error and the bound of every case, the worst of all processes; a process that fails is an error here."""
    with tempfile.TemporaryDirectory() as folder:
        started = [
            subprocess.Popen(
                [sys.executable, "-W", "error", "-m", f"tests.{module}", *arguments],
                cwd=ROOT,
                env=os.environ
                | {"RANK": str(rank), "WORLD_SIZE": str(count), "MEETING": folder, "OMP_NUM_THREADS": "1"},
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
            for rank in range(count)
        ]
        try:
            said = [process.communicate(timeout=timeout)[0] for process in started]
        finally:
            for process in started:
                process.kill()
        ends = [
            f"process {rank} of {count} ended with {process.returncode}:\n{text[-3000:]}"
            for rank, (process, text) in enumerate(zip(started, said, strict=True))
            if process.returncode
        ]
        assert not ends, "\n".join(ends)
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
    rank, count, folder = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), Path(os.environ["MEETING"])
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=count)
    found = list(main())
    (folder / f"{rank}.json").write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


def distance(got: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest difference, relative to the largest entry; infinite for other shapes, zero where NaN meets NaN."""
    if got.shape != expected.shape:
        return float("inf")
    if not expected.numel():
        return 0.0
    both_nan = got.isnan() & expected.isnan()
    both_same = both_nan | (got == expected)
    apart = torch.where(both_same, 0.0, got.double() - expected.double()).abs().max()
    return float(apart / max(1e-3, float(expected.double().abs().nan_to_num(0, 0, 0).max())))
