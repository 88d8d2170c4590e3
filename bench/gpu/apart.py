"""Cases of the benchmark each in a process of its own, which a device that fails or hangs does not outlive.

Each case may prepare for its share of the time that is left. One whose process crashes or hangs is run once more with
ours alone, so that a peer's fault costs the peer's figures only.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.gpu.figures import TIME_UP
from bench.gpu.limits import Deadline
from bench.gpu.peers import OURS
from bench.heads import Shape
from bench.tables import Record

ROUNDS_SHARE, ROUNDS_MOST = 1 / 3, 15.0  # of a case's seconds, left for the rounds
ROUNDS_ON_CPU = 2.0  # seconds at most where the command itself is tried, and no device measured
GRACE = 45.0  # seconds beyond its share after which a process is killed
LAST_LINE = 160  # characters


def figures_apart(name: str, shape: Shape, seconds: float, options: Sequence[str]) -> Record:
    """The case's record; its own ``note`` says what happened to its process."""
    begun = time.monotonic()
    record, note = _run(name, shape, seconds, options)
    if record is not None:
        return record
    left = seconds - (time.monotonic() - begun)
    if "--who" not in options and left > 0:
        record, _ = _run(name, shape, left, [*options, "--who", OURS])
        if record is not None:
            record["records"].append({"who": "the others", "note": note})
            return record
    return {"case": name, "shape": shape, "records": [{"who": "all", "note": note}]}


def share_of(deadline: Deadline, cases_left: int) -> float:
    """Seconds for the next of so many cases."""
    return deadline.left() / cases_left


def time_is_up(name: str, shape: Shape) -> Record:
    """A case that was not begun."""
    return {"case": name, "shape": shape, "records": [{"who": OURS, "note": TIME_UP}]}


def command(name: str, shape: Shape, seconds: float, out: Path, options: Sequence[str]) -> list[str]:
    """One case in its own process, whose time runs from now on."""
    rounds = min(ROUNDS_ON_CPU if "cpu" in options else ROUNDS_MOST, ROUNDS_SHARE * seconds)
    own = ["--case", name, "--shapes", ",".join(map(str, shape)), "--out", str(out), "--long", f"{rounds:.1f}"]
    own += ["--total", f"{seconds - rounds:.1f}", "--since", f"{time.monotonic():.1f}"]
    return [sys.executable, "-m", "bench", "gpu", "--together", *own, *options]


def _run(name: str, shape: Shape, seconds: float, options: Sequence[str]) -> tuple[Record | None, str]:
    with tempfile.TemporaryDirectory() as folder:
        out, errors = Path(folder) / "case.json", Path(folder) / "errors"
        with errors.open("w") as stream:
            code = run_limited(command(name, shape, seconds, out, options), seconds + GRACE, stream)
        last = (errors.read_text(errors="replace").strip().splitlines() or [""])[-1][:LAST_LINE].replace("|", "/")
        if out.exists() and code in (0, 1):
            (case,) = json.loads(out.read_text(encoding="utf-8"))["cases"]
            return case | {"shape": shape}, ""
    note = f"no end after {seconds + GRACE:.0f} s" if code is None else f"the process ended with code {code}: {last}"
    return None, note


def run_limited(arguments: Sequence[str], seconds: float, errors: Any, output: Any = subprocess.DEVNULL) -> int | None:
    """The exit code; ``None`` where the process and all that it started had to be killed."""
    process = subprocess.Popen(arguments, stdout=output, stderr=errors, start_new_session=True)
    try:
        return process.wait(seconds)
    except subprocess.TimeoutExpired:
        return None
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
