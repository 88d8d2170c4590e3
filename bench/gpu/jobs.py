"""Runs test files in processes; if a process crashes or hangs, the next one runs the remaining tests.

A process records the start and end of each test with :mod:`bench.gpu.recorder`, which identifies the test that failed.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench.gpu.limits import Deadline
from bench.gpu.recorder import DEVICE_LOST
from bench.tables import Record

POLL = 0.1
STALLED = 90.0  # maximum seconds of one test, and of the start of a process
MOST_PROCESSES = 12  # maximum number of processes of one job
ENDED = (0, 1, 5)  # pytest's exit codes if all tests passed, some failed, or none were selected
STOPPED = ("crashed", "hung")
UNREACHED = "not reached"


@dataclass(frozen=True)
class Job:
    """The arguments of pytest, and the share of the selected tests, that consecutive processes run."""

    name: str
    arguments: tuple[str, ...]
    share: tuple[int, int] = (0, 1)
    environment: Mapping[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        own, shares = self.share
        return self.name if shares == 1 else f"{self.name} {own + 1}/{shares}"


@dataclass
class Outcome:
    """The outcome of each test by name, notes about processes, and the elapsed seconds."""

    tests: dict[str, Record] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    seconds: float = 0.0

    def counts(self) -> Counter[str]:
        """Count the tests by outcome."""
        return Counter(test["outcome"] for test in self.tests.values())

    def failures(self) -> dict[str, Record]:
        """Return the tests that failed, crashed or hung."""
        return {name: test for name, test in self.tests.items() if test["outcome"] in ("failed", *STOPPED)}

    @property
    def complete(self) -> bool:
        """Whether every test passed or was skipped."""
        return not self.notes and not {*self.counts()} - {"passed", "skipped"}


def run_job(job: Job, options: Sequence[str], root: Path, log: Path, deadline: Deadline) -> Outcome:
    """Start processes until every test has run, the time limit is reached, or a process makes no progress."""
    outcome, begun = Outcome(), time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(MOST_PROCESSES):
            if deadline.left() <= 0:
                break
            before = len(finished(outcome))
            code = _run_process(job, options, root, Path(folder), log, deadline, outcome)
            if code in ENDED or deadline.left() <= 0:
                break
            if len(finished(outcome)) == before:
                outcome.notes.append(f"a process ended with code {code} before any test: {_last_line(log)}")
                break
    if deadline.left() <= 0 and (not outcome.tests or outcome.counts()[UNREACHED]):
        outcome.notes.append("the time was up")
    outcome.seconds = time.monotonic() - begun
    return outcome


def finished(outcome: Outcome) -> list[str]:
    """Return the tests that have already run."""
    return [name for name, test in outcome.tests.items() if test["outcome"] != UNREACHED]


def _run_process(
    job: Job, options: Sequence[str], root: Path, folder: Path, log: Path, deadline: Deadline, outcome: Outcome
) -> int | None:
    """Run one process, add its records to the outcome, and return its exit code or ``None`` if it was killed."""
    record, done = folder / "record", folder / "done"
    record.write_text("")
    done.write_text("\n".join(finished(outcome)))
    own, shares = job.share
    command = [sys.executable, "-m", "pytest", "-p", "bench.gpu.recorder", "--record", str(record), "--done", str(done)]
    command += ["--share", f"{own}/{shares}", *options, *job.arguments]
    with log.open("a", encoding="utf-8") as stream:
        stream.write(f"\n===== {job}: {' '.join(command[1:])}\n")
        stream.flush()
        process = subprocess.Popen(
            command,
            cwd=root,
            env=os.environ | job.environment,
            stdout=stream,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        code, why = _watched(process, record, deadline)
    _read(record, outcome, code, why)
    return code


def _watched(process: subprocess.Popen[Any], record: Path, deadline: Deadline) -> tuple[int | None, str]:
    """Wait for a process, and kill its process group if it stalls or the time limit is reached."""
    size, since, why = 0, time.monotonic(), ""
    try:
        while process.poll() is None and not why:
            time.sleep(POLL)
            if (now := record.stat().st_size) != size:
                size, since = now, time.monotonic()
            if time.monotonic() - since > STALLED:
                why = f"no end after {STALLED:.0f} s"
            elif deadline.left() <= 0:
                why = "the time was up"
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    return (None if why else process.returncode), why


def _read(record: Path, outcome: Outcome, code: int | None, why: str) -> None:
    """Add the lines that a process recorded to the outcome; the last line may be incomplete."""
    running = None
    for text in record.read_text(encoding="utf-8").splitlines():
        try:
            line = json.loads(text)
        except json.JSONDecodeError:
            break
        if line["event"] == "collected":
            for test in line["tests"]:
                outcome.tests.setdefault(test, {"outcome": UNREACHED, "message": ""})
        elif line["event"] == "start":
            running = line["test"]
        elif line["event"] == "end":
            running = None
            outcome.tests[line["test"]] = {name: line[name] for name in ("outcome", "seconds", "message")}
    if code == DEVICE_LOST:
        return  # the failed test contains the message, and another process follows
    if running is not None and why != "the time was up":
        what = f"the process ended with code {code}" if code is not None else why
        outcome.tests[running] = {"outcome": "hung" if code is None else "crashed", "message": what}


def _last_line(log: Path) -> str:
    lines = [line for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    return lines[-1][:200] if lines else ""
