"""How a device is measured: by CUDA's events and torch's allocator, or on the CPU, where nothing but time is."""

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
    """To see that everything runs."""

    def __init__(self) -> None:
        self.device = torch.device("cpu")

    def seconds(self, run: Run) -> float:
        """Of one call."""
        start = time.perf_counter()
        run()
        return time.perf_counter() - start

    def allocated(self) -> int | None:
        """Bytes in tensors, where they are counted."""
        return None

    def with_peak(self, run: Run) -> tuple[Tensors, int | None]:
        """The results, and the most bytes in tensors meanwhile."""
        return run(), None

    def recover(self) -> None:
        """After a failure: what it held is let go."""
        gc.collect()

    def state(self) -> dict[str, str]:
        """Clocks and the like at this moment, as far as they can be read."""
        return {}

    def describe(self) -> dict[str, Any]:
        """What was measured on."""
        return {"device": platform.processor() or platform.machine(), "threads": torch.get_num_threads()}


class Cuda(Cpu):
    """The current device."""

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
    """Versions, of what is installed, and the commit."""
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
    """The first line that it prints; nothing where it cannot be run."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20)
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.strip().partition("\n")[0]
