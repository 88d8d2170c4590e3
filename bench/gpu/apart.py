"""Runs each case of the benchmark in its own process, because a failure of the device affects the whole process.

Each case gets a share of the remaining time for its preparation. If its process crashes or hangs, the case is run again
with softcurve only, so that an error in another library affects only the figures of that library.
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

ROUNDS_SHARE, ROUNDS_MOST = 1 / 3, 15.0  # fraction of a case's seconds for the rounds, and its maximum in seconds
ROUNDS_ON_CPU = 2.0  # maximum in seconds on the CPU, where the command itself is tested and no device is measured
GRACE = 45.0  # a process is killed this many seconds after the end of its share
LAST_LINE = 160  # maximum number of characters of an error


def figures_apart(name: str, shape: Shape, seconds: float, options: Sequence[str]) -> Record:
    """Run a case in its own process and return its record, with a ``note`` if the process failed."""
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
    """Return the seconds for the next of the remaining cases."""
    return deadline.left() / cases_left


def time_is_up(name: str, shape: Shape) -> Record:
    """Return the record of a case that was not started."""
    return {"case": name, "shape": shape, "records": [{"who": OURS, "note": TIME_UP}]}


def command(name: str, shape: Shape, seconds: float, out: Path, options: Sequence[str]) -> list[str]:
    """Return the command that runs one case in its own process, with the time limit starting now."""
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
    """Return the exit code, or ``None`` if the process group was killed after ``seconds``."""
    process = subprocess.Popen(arguments, stdout=output, stderr=errors, start_new_session=True)
    try:
        return process.wait(seconds)
    except subprocess.TimeoutExpired:
        return None
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
