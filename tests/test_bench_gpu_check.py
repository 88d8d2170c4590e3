"""The command that checks a GPU, on the CPU: what it says of tests that fail, crash, hang, or lose the device."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]

TROUBLE = """
import os, sys, time
from pathlib import Path
import pytest

HERE = Path(__file__).parent

def test_first(): assert 1
def test_wrong(): assert 1 == 2, "one is not two"
def test_crash(): os.abort()
def test_after_the_crash(): pass
def test_hang(): time.sleep(60)
def test_device(): assert not (HERE / "lost").touch()
def test_lost(): raise RuntimeError("CUDA error: device-side assert triggered")
def test_after_the_loss(): pass
def test_left_out(): pytest.skip("not here")
"""


@pytest.fixture(autouse=True)
def in_the_repository(monkeypatch: pytest.MonkeyPatch) -> None:
    """The benchmarks are not installed."""
    monkeypatch.chdir(ROOT)
    monkeypatch.syspath_prepend(str(ROOT))


def test_a_test_that_crashes_or_hangs_or_loses_the_device_costs_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from bench.gpu import jobs
    from bench.gpu.limits import Deadline

    (tmp_path / "test_trouble.py").write_text(TROUBLE)
    # In the processes: a device that is lost once test_lost has run.
    (tmp_path / "device.py").write_text(
        "from bench.gpu import recorder\n"
        "lost = recorder.Recorder.pytest_runtest_logfinish\n"
        "def logfinish(self, nodeid):\n"
        "    recorder.device_lost = lambda: 'test_lost' in nodeid\n"
        "    lost(self, nodeid)\n"
        "recorder.Recorder.pytest_runtest_logfinish = logfinish\n"
    )
    monkeypatch.setattr(jobs, "STALLED", 6.0)
    paths = os.pathsep.join([str(ROOT), str(tmp_path), os.environ.get("PYTHONPATH", "")])
    monkeypatch.setenv("PYTHONPATH", paths)
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")
    job = jobs.Job("trouble", ("-p", "device", "-p", "no:cacheprovider", "test_trouble.py"))
    outcome = jobs.run_job(job, ("-c", os.devnull, "-q"), tmp_path, tmp_path / "log", Deadline(300))
    found = {name.partition("::")[2]: test for name, test in outcome.tests.items()}
    assert {name: test["outcome"] for name, test in found.items()} == {
        "test_first": "passed",
        "test_wrong": "failed",
        "test_crash": "crashed",
        "test_after_the_crash": "passed",
        "test_hang": "hung",
        "test_device": "passed",
        "test_lost": "failed",
        "test_after_the_loss": "passed",
        "test_left_out": "skipped",
    }
    assert "one is not two" in found["test_wrong"]["message"]
    assert "device-side assert" in found["test_lost"]["message"]
    assert "code -6" in found["test_crash"]["message"]
    assert "6 s" in found["test_hang"]["message"]
    assert outcome.notes == []
    assert not outcome.complete


def test_what_cannot_start_or_has_no_time_is_a_note(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from bench.gpu import jobs
    from bench.gpu.limits import Deadline

    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]))
    (tmp_path / "test_broken.py").write_text("import nothing_of_this_name\n")
    job = jobs.Job("broken", ("test_broken.py",))
    options = ("-c", os.devnull, "-q", "-p", "no:cacheprovider")
    outcome = jobs.run_job(job, options, tmp_path, tmp_path / "log", Deadline(60))
    assert outcome.notes[0].startswith("a process ended with code 2 before any test")
    assert jobs.run_job(job, options, tmp_path, tmp_path / "log", Deadline(0)).notes == ["the time was up"]


def test_pairs_of_three_parameters_and_values_of_two_are_covered() -> None:
    from itertools import combinations, product

    from bench.gpu.recorder import covering

    def settings(*sizes: int) -> list[list[tuple[str, str]]]:
        return [[(f"p{n}", str(v)) for n, v in enumerate(values)] for values in product(*map(range, sizes))]

    two, three = settings(5, 9), settings(4, 5, 6)
    assert len(covering(two)) == 9
    assert {value for n in covering(two) for value in two[n]} == {value for setting in two for value in setting}
    chosen = covering(three)
    assert {pair for n in chosen for pair in combinations(three[n], 2)} == {
        pair for setting in three for pair in combinations(setting, 2)
    }
    assert len(chosen) < 40
    assert covering([[], []]) == [0, 1]


def check(tmp_path: Path, *arguments: str) -> tuple[subprocess.CompletedProcess[str], dict[str, Any]]:
    command = [sys.executable, "-m", "bench.gpu.check", "--out", str(tmp_path), *arguments]
    environment = os.environ | {"TORCH_COMPILE_DISABLE": "1"}  # What is asserted is softcurve's own.
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600, check=False)
    report = tmp_path / "check.json"
    return done, json.loads(report.read_text(encoding="utf-8")) if report.exists() else {}


@pytest.mark.slow
def test_the_whole_command(tmp_path: Path) -> None:
    """One test of each function of a file, and the benchmark of a tiny shape, each case in its own process."""
    few = ("--device", "cpu", "--processes", "1", "--at-most", "1", "--job", "bad input", "--bench", "120")
    done, report = check(tmp_path, *few)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    assert "| bad input | 4 | 0 | 0 | 0 | 0 | 0 |" in done.stdout
    assert lines[-1] == f"All figures: {tmp_path / 'check.json'}"
    (tests,) = report["tests"].values()
    assert tests["counts"] == {"passed": 4}
    assert [case["case"] for case in report["bench"]["cases"]] == ["cross-entropy", "forward-kl", "js"]
    for name in ("tests.log", "bench.log", "gpu.json"):
        assert (tmp_path / name).stat().st_size > 0


def test_without_pytest_or_device_a_sentence_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    import importlib.util

    import torch
    from bench.gpu import check as command

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert command.main(["--out", str(tmp_path / "none")]) == 2
    assert "no CUDA device" in capsys.readouterr().err
    assert not (tmp_path / "none").exists()
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "pytest" else find(name))
    with monkeypatch.context() as patch:
        patch.setattr(os, "environ", dict(os.environ))
        assert command.main(["--device", "cpu", "--bench", "0", "--out", str(tmp_path)]) == 1
    assert "pytest is not installed, so no test was run: install it with pip install pytest" in capsys.readouterr().out


def test_a_case_whose_process_dies_is_run_again_with_ours_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    from bench.gpu import apart
    from bench.gpu.table import TINY

    commands: list[list[str]] = []

    def command(name: str, shape: Any, seconds: float, out: Path, options: Any) -> list[str]:
        commands.append(list(options))
        if "--who" in options:
            case = json.dumps({"cases": [{"case": name, "records": [{"who": "softcurve", "s": 1.0}]}]})
            return [sys.executable, "-c", f"open({str(out)!r}, 'w').write({case!r})"]
        return [sys.executable, "-c", "import os, sys; print('an | illegal access', file=sys.stderr); os.abort()"]

    monkeypatch.setattr(apart, "command", command)
    record = apart.figures_apart("js", TINY, 30.0, ["--device", "cpu"])
    assert commands == [["--device", "cpu"], ["--device", "cpu", "--who", "softcurve"]]
    assert [r["who"] for r in record["records"]] == ["softcurve", "the others"]
    assert record["records"][1]["note"] == "the process ended with code -6: an / illegal access"
    record = apart.figures_apart("js", TINY, 0.0, ["--device", "cpu"])
    assert record["records"] == [{"who": "all", "note": "the process ended with code -6: an / illegal access"}]


def test_a_case_that_hangs_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    from bench.gpu import apart
    from bench.gpu.table import TINY

    monkeypatch.setattr(apart, "GRACE", 0.5)
    monkeypatch.setattr(apart, "command", lambda *_: [sys.executable, "-c", "import time; time.sleep(60)"])
    record = apart.figures_apart("js", TINY, 0.5, [])
    assert record["records"] == [{"who": "all", "note": "no end after 1 s"}]
