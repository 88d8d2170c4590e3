"""Measurement of time by interleaved runs, of peak memory in fresh processes, and of errors against float64."""

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


_clock = time.perf_counter


def use_processor_time() -> None:
    """Let :func:`interleaved` measure the processor time of this process, which other processes disturb less.

    This is meaningful with one thread only, because the time of all threads is added.
    """
    global _clock
    _clock = time.process_time


def interleaved(runs: Mapping[str, Callable[[], object]], repeats: int) -> dict[str, list[float]]:
    """Measure the seconds of each run in every round; interleaving exposes all runs to the same machine load."""
    for run in runs.values():
        run()
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(repeats):
        for name, run in runs.items():
            start = _clock()
            run()
            seconds[name].append(_clock() - start)
    return seconds


def median_ratio(ours: Sequence[float], theirs: Sequence[float]) -> float:
    """Return the median of the ratios of all rounds, which is insensitive to speed changes between rounds."""
    return statistics.median(a / b for a, b in zip(ours, theirs, strict=True))


def relative_error(result: Tensor, truth: Tensor) -> float:
    """Return ``‖result − truth‖ / ‖truth‖``, computed in the dtype of ``truth``."""
    truth = truth.detach()
    return float((result.detach().to(truth.dtype) - truth).norm() / truth.norm())


def extra_peak_of(function: Callable[[], object]) -> float:
    """Return the peak increase of the resident set in megabytes during ``function``; use a fresh process."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # free memory that is still resident could be reused unnoticed
    Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark
    before = _status("VmRSS")
    function()
    return (_status("VmHWM") - before) / 1024


class ProcessFailure(RuntimeError):
    """A measuring process ended with ``code`` (a negative signal number if it was killed) and wrote ``errors``."""

    def __init__(self, code: int, errors: str) -> None:
        super().__init__(f"the measuring process failed with code {code}:\n{errors}")
        self.code, self.errors = code, errors


def in_fresh_process(code: str) -> str:
    """Run ``code`` in a new Python process with the same import path and return its output.

    Raises:
        ProcessFailure: If the process does not end with code 0.
    """
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    if done.returncode:
        raise ProcessFailure(done.returncode, done.stderr)
    return done.stdout


def _status(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1])
    raise RuntimeError(f"/proc/self/status has no {field}")
