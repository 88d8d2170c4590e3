"""Measurement on a device: CUDA events and torch's allocator, or only the time on the CPU."""

from __future__ import annotations

import contextlib
import gc
import platform
import subprocess
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from bench.heads import Run, Tensors

PACKAGES = ("softcurve", "torch", "triton", "liger-kernel", "cut-cross-entropy", "quack-kernels")
STATE = ("clocks.sm", "clocks.mem", "clocks.max.sm", "power.draw", "power.limit", "temperature.gpu", "driver_version")


class Cpu:
    """The CPU, for testing the benchmark."""

    def __init__(self) -> None:
        self.device = torch.device("cpu")

    def seconds(self, run: Run) -> float:
        """Measure the seconds of one call."""
        start = time.perf_counter()
        run()
        return time.perf_counter() - start

    def allocated(self) -> int | None:
        """Return the bytes allocated for tensors, or None if the device does not count them."""
        return None

    def with_peak(self, run: Run) -> tuple[Tensors, int | None]:
        """Return the results and the peak of allocated bytes."""
        return run(), None

    def recover(self) -> None:
        """Free the memory of a failed run."""
        gc.collect()

    def state(self) -> dict[str, str]:
        """Return the current clocks, power and temperature, as far as they are available."""
        return {}

    def describe(self) -> dict[str, Any]:
        """Return a description of the device."""
        return {"device": platform.processor() or platform.machine(), "threads": torch.get_num_threads()}


class Cuda(Cpu):
    """The current CUDA device."""

    def __init__(self) -> None:
        self.device = torch.device("cuda", torch.cuda.current_device())
        self.start, self.end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def seconds(self, run: Run) -> float:  # noqa: D102
        torch.cuda.synchronize()
        self.start.record()
        run()
        self.end.record()
        self.end.synchronize()
        return float(self.start.elapsed_time(self.end)) / 1e3

    def allocated(self) -> int:  # noqa: D102
        gc.collect()
        torch.cuda.synchronize()
        return torch.cuda.memory_allocated()

    def with_peak(self, run: Run) -> tuple[Tensors, int]:  # noqa: D102
        self.allocated()
        torch.cuda.reset_peak_memory_stats()
        results = run()
        torch.cuda.synchronize()
        return results, torch.cuda.max_memory_allocated()

    def recover(self) -> None:  # noqa: D102
        gc.collect()
        with contextlib.suppress(RuntimeError):  # the device itself may have failed
            torch.cuda.empty_cache()

    def state(self) -> dict[str, str]:  # noqa: D102
        index = str(torch.cuda.get_device_properties(self.device).uuid)
        command = ["nvidia-smi", f"--id=GPU-{index}", f"--query-gpu={','.join(STATE)}", "--format=csv,noheader"]
        values = _output(command)
        return dict(zip(STATE, values.split(", "), strict=False)) if values else {}

    def describe(self) -> dict[str, Any]:  # noqa: D102
        properties = torch.cuda.get_device_properties(self.device)
        return {
            "device": properties.name,
            "capability": f"{properties.major}.{properties.minor}",
            "multiprocessors": properties.multi_processor_count,
            "memory_mb": properties.total_memory / 2**20,
            "cuda": torch.version.cuda,
            "bf16_reduced_precision_reduction": torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction,
        }


DEVICES: dict[str, Callable[[], Cpu]] = {"cuda": Cuda, "cpu": Cpu}


def software() -> dict[str, Any]:
    """Return the versions of the installed packages and the commit."""
    versions = {}
    for package in PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[package] = metadata.version(package)
    here = Path(__file__).parent
    return {
        "python": platform.python_version(),
        "versions": versions,
        "commit": _output(["git", "-C", str(here), "rev-parse", "HEAD"]) or None,
        "changed": bool(_output(["git", "-C", str(here), "status", "--porcelain", "--untracked-files=no"])),
    }


def _output(command: list[str]) -> str:
    """Return the first line that a command prints, or an empty string if it fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20)
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.strip().partition("\n")[0]
