"""Run everything that needs a GPU: the tests of the head on the device, and the benchmark.

``python -m bench.gpu.check`` needs torch, triton and pytest, and ``PYTHONPATH=src`` if softcurve is not installed. It
continues after failures and ends with a short table. It writes ``check.json`` with all figures, ``gpu.json`` with those
of the benchmark, ``tests.log`` and ``bench.log`` to the folder ``--out`` (by default ``$OUT``, or ``build/gpu``). The
environment variable SOFTCURVE_TEST_DEVICE passes the device to the tests.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import sys
import tempfile
import threading
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import torch

from bench.gpu import apart
from bench.gpu.devices import DEVICES, software
from bench.gpu.jobs import Job, Outcome, run_job
from bench.gpu.limits import Deadline
from bench.gpu.peers import OURS
from bench.tables import Record, cell, print_head, print_row, write_json

ROOT = Path(__file__).parents[2]
SECONDS_OF_TESTS, SECONDS_OF_BENCH = 240.0, 300.0
GRACE = 30.0  # seconds that the benchmark may exceed its total
# Each test file and its number of concurrent processes. Files that are most likely to hang or crash are first.
FILES = {
    "kernels": ("tests/interpreted_head.py", 4),
    "exactness": ("tests/test_exactness.py", 4),
    "exactness of a head": ("tests/test_head_exactness.py", 2),
    "memory": ("tests/test_head_memory.py", 1),
    "conformance": ("tests/test_conformance.py", 4),
    "head": ("tests/test_head_conformance.py", 2),
    "transforms": ("tests/test_transforms.py", 4),
    "transforms of a head": ("tests/test_head_transforms.py", 4),
    "bad input": ("tests/test_bad_input.py", 1),
}
# The selection of the exactness tests for Triton's interpreter, which is slow.
INTERPRETED = "(test_confident_row and head and -9-) or (test_offset and float32 and 10000) or minus_infinity"
PYTEST = (
    "-q",
    "--tb=short",
    "--show-capture=no",
    *("-p", "no:cacheprovider"),
    *("-W", "default"),
    *("-o", "minversion=8.0"),
)
SHOWN = 20  # maximum number of printed failures


def main(arguments: Sequence[str] | None = None) -> int:
    """Return 0 if all tests passed and softcurve was measured in all cases, 1 if not, and 2 without the device."""
    options = _options(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        print("bench.gpu.check: no CUDA device; --device cpu runs the command on the CPU", file=sys.stderr)
        return 2
    options.out = options.out.resolve()
    options.out.mkdir(parents=True, exist_ok=True)
    _prepare_environment(options.device)
    report = Report(options.out / "check.json", options.device)
    print(f"{report.figures['machine']['device']}, {report.figures['machine']['versions']}", flush=True)
    if importlib.util.find_spec("pytest") is None:
        report.add_note("pytest is not installed, so no test was run: install it with pip install pytest")
    elif options.tests > 0:
        _run_tests(options, report)
    if options.bench > 0:
        _run_bench(options, report)
    report.print_tables()
    return 0 if report.all_well() else 1


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu.check", description=__doc__)
    folder = Path(os.environ.get("OUT") or ROOT / "build" / "gpu")
    device = os.environ.get("SOFTCURVE_TEST_DEVICE", "cuda")
    parser.add_argument("--device", choices=tuple(DEVICES), default=device, help="cpu tests the command itself")
    parser.add_argument("--out", type=Path, default=folder, metavar="FOLDER", help="[default: $OUT, or build/gpu]")
    seconds = "seconds for all tests [default: %(default)g]; 0 skips them"
    parser.add_argument("--tests", type=float, default=SECONDS_OF_TESTS, metavar="SECONDS", help=seconds)
    seconds = "the benchmark's --total [default: %(default)g]; 0 skips it"
    parser.add_argument("--bench", type=float, default=SECONDS_OF_BENCH, metavar="SECONDS", help=seconds)
    together = "number of concurrent test processes [default: half of the cores, at most 6]"
    parser.add_argument(
        "--processes", type=int, default=max(1, min(6, (os.cpu_count() or 1) // 2)), metavar="N", help=together
    )
    parser.add_argument("--job", action="append", choices=tuple(FILES), help="may be repeated [default: all]")
    parser.add_argument("--every", action="store_true", help="run every test instead of a pairwise selection")
    parser.add_argument("--at-most", type=int, metavar="N", help="maximum number of tests per function")
    return parser.parse_args(arguments)


def _prepare_environment(device: str) -> None:
    """Set the environment of all processes that are started."""
    paths = [str(ROOT / "src"), str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    os.environ |= {
        "PYTHONPATH": os.pathsep.join(paths),
        "PYTHONUNBUFFERED": "1",
        "OMP_NUM_THREADS": "1",
        "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
        "SOFTCURVE_TEST_DEVICE": device,
    }
    os.chdir(ROOT)


# --- the two parts ---------------------------------------------------------------------------------------------------


def jobs_of(options: argparse.Namespace) -> list[Job]:
    """Return the jobs; the kernels are included only on CUDA or with Triton's interpreter."""
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    has_kernels = importlib.util.find_spec("triton") is not None and (options.device == "cuda" or interpreted)
    jobs = []
    for name in options.job or FILES:
        file, shares = FILES[name]
        # The memory test would count the interpreter's arrays.
        if (name == "kernels" and not has_kernels) or (name == "memory" and interpreted):
            continue
        few = () if options.device == "cuda" else ("-m", "not slow")
        if interpreted and name.startswith("exactness"):
            few = (*few, "-k", INTERPRETED)
        shares = min(shares, options.processes)
        jobs += [Job(name, (file, *few), (n, shares)) for n in range(shares)]
    # The first share of every file starts before the second shares.
    return sorted(jobs, key=lambda job: job.share[0])


def _run_tests(options: argparse.Namespace, report: Report) -> None:
    if options.device == "cuda" and importlib.util.find_spec("triton") is None:
        report.add_note("triton is not installed, so no kernel was run: install it with pip install triton")
    passed_on = [*PYTEST, *(["--every"] if options.every else [])]
    passed_on += ["--at-most", str(options.at_most)] if options.at_most else []
    deadline, log = Deadline(options.tests), options.out / "tests.log"
    log.write_text("")
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(options.processes) as pool:
        running = {}
        for n, job in enumerate(jobs_of(options)):
            part = Path(folder) / f"{n}.log"
            part.touch()
            running[pool.submit(run_job, job, passed_on, ROOT, part, deadline)] = (job, part)
        try:
            for future in as_completed(running):
                job, part = running[future]
                report.add_tests(job, _outcome_of(future))
                with log.open("a", encoding="utf-8") as whole:
                    whole.write(part.read_text(encoding="utf-8", errors="replace"))
        except KeyboardInterrupt:
            deadline.end = 0.0  # the threads that watch the processes kill them
            raise


def _outcome_of(future: Future[Outcome]) -> Outcome:
    """Return the outcome of a job, with a note if the job itself failed."""
    try:
        return future.result()
    except Exception as error:
        return Outcome(notes=[f"could not be run: {type(error).__name__}: {error}"])


def _run_bench(options: argparse.Namespace, report: Report) -> None:
    out = options.out / "gpu.json"
    out.unlink(missing_ok=True)
    command = [sys.executable, "-m", "bench", "gpu", "--device", options.device, "--total", f"{options.bench:g}"]
    print(f"the benchmark runs for {options.bench:.0f} s ...", flush=True)
    with (options.out / "bench.log").open("w", encoding="utf-8") as log:
        code = apart.run_limited([*command, "--out", str(out)], options.bench + GRACE, log, log)
    if code not in (0, 1):
        what = "was killed after its time limit" if code is None else f"ended with code {code}"
        report.add_note(f"the benchmark {what}; see bench.log")
    if out.exists():
        report.add_bench(json.loads(out.read_text(encoding="utf-8")))


# --- the report ------------------------------------------------------------------------------------------------------


class Report:
    """Collects all figures, writes them to a file after each job, and prints the tables at the end."""

    def __init__(self, path: Path, device: str) -> None:
        self.path, self.lock = path, threading.Lock()
        self.outcomes: dict[str, list[Outcome]] = {}
        machine = DEVICES[device]().describe() | software()
        self.figures: dict[str, Any] = {"machine": machine, "notes": [], "tests": {}, "bench": None}

    def add_note(self, note: str) -> None:
        """Add and print a note about a problem."""
        print(note, flush=True)
        self.figures["notes"].append(note)
        self._write()

    def add_tests(self, job: Job, outcome: Outcome) -> None:
        """Add the outcome of a job and print a progress line."""
        self.outcomes.setdefault(job.name, []).append(outcome)
        counts = dict(outcome.counts())
        print(f"{job}: {counts} in {outcome.seconds:.0f} s {'; '.join(outcome.notes)}", flush=True)
        record = {"counts": counts, "seconds": outcome.seconds, "notes": outcome.notes, "tests": outcome.tests}
        self.figures["tests"][str(job)] = record
        self._write()

    def add_bench(self, figures: dict[str, Any]) -> None:
        """Add the report of the benchmark."""
        self.figures["bench"] = figures
        self._write()

    def all_well(self) -> bool:
        """Return whether all tests passed, every case was measured, and there are no notes."""
        tested = all(
            all(outcome.complete for outcome in outcomes) and any(outcome.counts()["passed"] for outcome in outcomes)
            for outcomes in self.outcomes.values()
        )
        bench = self.figures["bench"]
        measured = bench is None or (bool(bench["cases"]) and all(map(ours_measured, bench["cases"])))
        nothing = not self.outcomes and bench is None
        return not self.figures["notes"] and tested and measured and not nothing

    def print_tables(self) -> None:
        """Print the tests by file, the failures, and the figures of softcurve in each case of the benchmark."""
        if self.outcomes:
            print()
            columns = ("passed", "failed", "crashed", "hung", "skipped", "not reached")
            print_head("tests", *columns, "s", "notes")
            for name, outcomes in self.outcomes.items():
                counts: Counter[str] = sum((outcome.counts() for outcome in outcomes), Counter())
                notes = "; ".join(dict.fromkeys(note for outcome in outcomes for note in outcome.notes))
                seconds = max(outcome.seconds for outcome in outcomes)
                print_row(name, *(str(counts[column]) for column in columns), f"{seconds:.0f}", notes)
            self._print_failures()
        if self.figures["bench"]:
            _print_bench(self.figures["bench"]["cases"])
        print(f"\nAll figures: {self.path}")

    def _print_failures(self) -> None:
        failures = {n: t for group in self.outcomes.values() for o in group for n, t in o.failures().items()}
        for name, test in list(failures.items())[:SHOWN]:
            print(f"{test['outcome']}: {name}: {' '.join(test['message'].split())[:200]}")
        if len(failures) > SHOWN:
            print(f"... and {len(failures) - SHOWN} more, in {self.path}")

    def _write(self) -> None:
        with self.lock:
            write_json(self.figures, self.path)


def ours_measured(case: Record) -> bool:
    """Return whether a case of the benchmark contains a time of softcurve."""
    return any(record["who"] == OURS and "s" in record for record in case["records"])


def _print_bench(cases: Sequence[Record]) -> None:
    print()
    print_head("case", "shape", "ours ms", "/ floor", "extra MB", "loss error", "dE", "dW", "the others, ms")
    for case in cases:
        ours = next((record for record in case["records"] if record["who"] in (OURS, "all")), {})
        error = ours.get("error", {})
        others = [r for r in case["records"] if "ratio" in r and not r["who"].startswith((OURS, "floor"))]
        times = ", ".join(f"{record['who']} {1e3 * record['s']:.1f}" for record in others)
        print_row(
            case["case"],
            "×".join(map(str, case["shape"])),
            ours.get("note") or (f"{1e3 * ours['s']:.2f}" if "s" in ours else ""),
            cell(ours, "over_floor", ".2f"),
            cell(ours, "extra_mb", ".0f"),
            cell(error, "loss", ".1e"),
            cell(error.get("features", {}), "norm", ".1e"),
            cell(error.get("weight", {}), "norm", ".1e"),
            times,
        )


if __name__ == "__main__":
    sys.exit(main())
