"""Processes that start together, as torchrun's do, without torchrun: each with its number in the environment."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Ended:
    """Exit codes, standard outputs and standard errors, by the numbers of the processes."""

    codes: list[int]
    outputs: list[str]
    errors: list[str]


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def start(
    size: int, *arguments: str, errors: Sequence[str] = ("-W", "error"), last: Sequence[str] = ()
) -> list[subprocess.Popen[str]]:
    """``python arguments``, ``size`` times; the last process has some more arguments."""
    common = os.environ | {
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(size), "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    return [
        subprocess.Popen(
            [sys.executable, *errors, *arguments, *(last if rank == size - 1 else ())], cwd=ROOT, env=common | {"RANK": str(rank)}, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )
        for rank in range(size)
    ]  # fmt: skip


def wait(processes: Sequence[subprocess.Popen[str]], timeout: float = 200) -> Ended:
    """Until all have ended; those that have not in time are killed, and the test fails."""
    try:
        said = [process.communicate(timeout=timeout) for process in processes]
    finally:
        for process in processes:
            process.kill()
    return Ended([process.returncode for process in processes], [out for out, _ in said], [error for _, error in said])
