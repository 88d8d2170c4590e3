"""How things are measured: turns taken in one process, peak memory in a fresh one, errors against float64."""

from __future__ import annotations

import ctypes
import gc
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


def interleaved(runs: Mapping[str, Callable[[], object]], repeats: int) -> dict[str, list[float]]:
    """Seconds of each in every round, the runs taking turns, so that a slow minute of the machine meets all of them."""
    for run in runs.values():
        run()
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(repeats):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - start)
    return seconds


def median_ratio(ours: Sequence[float], theirs: Sequence[float]) -> float:
    """The median of the rounds' own ratios, which a change of the machine's speed between rounds leaves alone."""
    return statistics.median(a / b for a, b in zip(ours, theirs, strict=True))


def relative_error(result: Tensor, truth: Tensor) -> float:
    """``‖result − truth‖ / ‖truth‖``, in the truth's dtype."""
    truth = truth.detach()
    return float((result.detach().to(truth.dtype) - truth).norm() / truth.norm())


def extra_peak_of(function: Callable[[], object]) -> float:
    """Megabytes by which the resident set rises at its highest while ``function`` runs. For a process of its own."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # what is free but still resident could be taken without a rise
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts again from here
    before = _status("VmRSS")
    function()
    return (_status("VmHWM") - before) / 1024


class ProcessFailure(RuntimeError):
    """A measuring process ended with ``code`` (of a signal, its number below zero), having written ``errors``."""

    def __init__(self, code: int, errors: str) -> None:
        super().__init__(f"the measuring process failed with code {code}:\n{errors}")
        self.code, self.errors = code, errors


def in_fresh_process(code: str) -> str:
    """What ``code`` prints in a Python of its own, with this process's import path. Raises ProcessFailure."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    if done.returncode:
        raise ProcessFailure(done.returncode, done.stderr)
    return done.stdout


def _status(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1])
    raise RuntimeError(f"/proc/self/status has no {field}")
