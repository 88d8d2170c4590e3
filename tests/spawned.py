"""Processes that start together, as torchrun's do, without torchrun: each with its number in the environment.

On Linux they are forks of one process for each worker of pytest (``fork_server.py``), since a new interpreter spends
seconds on the import of torch. On other systems they are interpreters of their own.
"""

from __future__ import annotations

import atexit
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
STRICT = ("-W", "error")


@dataclass(frozen=True)
class Ended:
    """Exit codes, standard outputs and standard errors, by the numbers of the processes."""

    codes: list[int]
    outputs: list[str]
    errors: list[str]


class Forked:
    """A fork of the server, with the methods of ``subprocess.Popen`` that the tests use."""

    def __init__(
        self, program: Sequence[str], environment: dict[str, str], folder: Path = ROOT, ignored: Sequence[str] = ()
    ) -> None:
        self.returncode: int | None = None
        self._files = [tempfile.TemporaryFile("w+", encoding="utf-8") for _ in range(2)]  # noqa: SIM115
        request = {"program": [*program], "environment": environment, "folder": str(folder), "ignored": [*ignored]}
        self.pid: int = _ask(request, [file.fileno() for file in self._files])

    def poll(self) -> int | None:
        if self.returncode is None:
            self.returncode = _ask({"wait": self.pid})
        return self.returncode

    def wait(self, timeout: float) -> int:
        end = time.monotonic() + timeout
        while self.poll() is None:
            if time.monotonic() > end:
                raise subprocess.TimeoutExpired(["a fork"], timeout)
            time.sleep(0.02)
        assert self.returncode is not None
        return self.returncode

    def communicate(self, timeout: float) -> tuple[str, str]:
        self.wait(timeout)
        said = []
        for file in self._files:
            with file:
                file.seek(0)
                said.append(file.read())
        return said[0], said[1]

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


Process = Forked | subprocess.Popen[str]


@cache
def _server() -> socket.socket:
    """Start the server, which ends when this process does, since its socket is closed then."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with theirs:
        number = theirs.fileno()
        command = [sys.executable, *STRICT, "-m", "tests.fork_server", str(number)]
        # Where pandas is installed, scikit-learn imports pyarrow, whose allocator must not start a thread.
        environment = os.environ | {"OMP_NUM_THREADS": "1", "JE_ARROW_MALLOC_CONF": "background_thread:false"}
        server = subprocess.Popen(command, cwd=ROOT, env=environment, pass_fds=[number], stdin=subprocess.DEVNULL)

    def end() -> None:
        ours.close()
        server.wait()

    atexit.register(end)
    return ours


def _ask(request: dict[str, Any], files: Sequence[int] = ()) -> Any:
    socket.send_fds(_server(), [json.dumps(request).encode()], [*files])
    answer = _server().recv(1 << 10)
    assert answer, "the server of forks has ended"
    return json.loads(answer)


def started(program: Sequence[str], environment: dict[str, str]) -> Process:
    if sys.platform == "linux":
        return Forked(program, environment)
    return subprocess.Popen(
        [sys.executable, *STRICT, *program], cwd=ROOT, env=environment, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


def run_program(
    *program: str, timeout: float, ignored: Sequence[str] = (), folder: Path = ROOT
) -> subprocess.CompletedProcess[str]:
    """Run a program, which is named as on Python's command line, with warnings as errors save the ignored ones."""
    if sys.platform == "linux":
        forked = Forked(program, os.environ | {"OMP_NUM_THREADS": "1"}, folder, ignored)
        output, errors = forked.communicate(timeout)
        assert forked.returncode is not None
        return subprocess.CompletedProcess(program, forked.returncode, output, errors)
    command = [
        sys.executable,
        *STRICT,
        *(word for message in ignored for word in ("-W", f"ignore:{message}")),
        *program,
    ]
    return subprocess.run(
        command, cwd=folder, capture_output=True, text=True, encoding="utf-8", timeout=timeout, check=False
    )


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def start(size: int, *arguments: str, last: Sequence[str] = ()) -> list[Process]:
    """``python arguments``, ``size`` times; the last process has some more arguments."""
    common = os.environ | {
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(size), "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    return [
        started([*arguments, *(last if rank == size - 1 else ())], common | {"RANK": str(rank)}) for rank in range(size)
    ]


def wait(processes: Sequence[Process], timeout: float = 200) -> Ended:
    """Until all have ended; those that have not in time are killed, and the test fails."""
    try:
        said = [process.communicate(timeout=timeout) for process in processes]
    finally:
        for process in processes:
            process.kill()
    codes = [process.wait(timeout) for process in processes]
    return Ended(codes, [out for out, _ in said], [error for _, error in said])
