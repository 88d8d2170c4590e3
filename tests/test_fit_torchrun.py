"""``softcurve fit`` under torchrun and by hand; what ends or hangs ends all, with one message and a state to go on from."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from safetensors.torch import load_file
from typer.testing import CliRunner

from softcurve.cli.main import app
from softcurve.fit.data.opening import open_source
from softcurve.fit.fitting import fit_head

from .fit_process_cases import write_shards
from .spawned import ROOT, start, wait

pytestmark = pytest.mark.slow

TORCHRUN = ("-m", "torch.distributed.run", "--nproc-per-node")
LONG = ("--C", "100", "--tol", "1e-9", "--holdout", "0", "--checkpoint-every", "0")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    write_shards(folder)
    return folder


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=200, check=False,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip


def until_written(checkpoint) -> None:
    end = time.monotonic() + 120
    while not checkpoint.exists():
        assert time.monotonic() < end, "no state was written"
        time.sleep(0.02)


def record_of(folder) -> dict[str, object]:
    record = json.loads((folder / "head.json").read_text())
    for name in ("seconds", "head", "record", "report", "reproduction"):
        record.pop(name)
    for step in record["history"]:
        step.pop("seconds")
    return record


def assert_close(found, expected, place=""):
    if isinstance(expected, dict):
        assert found.keys() == expected.keys()
        for name in expected:
            assert_close(found[name], expected[name], f"{place} {name}")
    elif isinstance(expected, list):
        assert len(found) == len(expected), place
        for number, pair in enumerate(zip(found, expected, strict=True)):
            assert_close(*pair, f"{place} {number}")
    else:
        assert found == (pytest.approx(expected, rel=1e-7) if isinstance(expected, float) else expected), place


def test_torchrun_writes_and_says_what_one_process_does(data, tmp_path):
    heads, said = {}, {}
    for name in ("one", "three"):
        (tmp_path / name).mkdir()
        arguments = (
            "fit",
            str(data / "parquet"),
            "--path",
            "0.1,10",
            "--out",
            str(tmp_path / name / "head.safetensors"),
        )
        if name == "one":
            done = CliRunner().invoke(app, arguments, catch_exceptions=False)
            assert done.exit_code == 0
        else:
            done = run(*TORCHRUN, "3", "-m", "softcurve", *arguments)
            assert done.returncode == 0, done.stderr
        heads[name] = load_file(tmp_path / name / "head.safetensors")
        said[name] = done.stdout
        assert "The hardest samples" in (tmp_path / name / "head.html").read_text()
    assert_close(record_of(tmp_path / "three"), record_of(tmp_path / "one"))
    for name, tensor in heads["one"].items():
        scale = float(tensor.abs().max())
        assert float((heads["three"][name] - tensor).abs().max()) <= 1e-8 * scale
    assert len(said["three"].splitlines()) == len(said["one"].splitlines()) == 1
    assert json.loads(said["three"])["rows"] == 331


def test_a_process_that_is_killed_under_torchrun_ends_the_run_and_another_goes_on(data, tmp_path):
    checkpoint, out = tmp_path / "state", str(tmp_path / "head.safetensors")
    arguments = ("fit", str(data / "npz"), *LONG, "--checkpoint", str(checkpoint), "--out", out)
    running = subprocess.Popen(
        [sys.executable, *TORCHRUN, "2", "-m", "tests.slow_fit", *arguments], cwd=ROOT, text=True, stderr=subprocess.PIPE,
        stdout=subprocess.PIPE, env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    try:
        until_written(checkpoint)
        workers = subprocess.run(["pgrep", "-P", str(running.pid)], capture_output=True, text=True, check=True).stdout
        os.kill(int(workers.split()[1]), signal.SIGKILL)
        _, said = running.communicate(timeout=60)
    finally:
        running.terminate()
    assert running.returncode != 0
    assert said.count("softcurve: process ") == 1, said
    assert f"{checkpoint} has the state of the fit; the same command resumes it" in said
    # The same fit by one process goes on from there.
    source, options = open_source(str(data / "npz")), {"C": 100.0, "tol": 1e-9}
    taken, whole = fit_head(source, checkpoint=checkpoint, **options), fit_head(source, **options)
    assert taken.converged
    assert taken.iterations == whole.iterations
    assert float((taken.weight - whole.weight).abs().max()) <= 1e-8 * float(whole.weight.abs().max())


# Without torchrun nobody else would end the others.
@pytest.mark.parametrize(("sent", "victim", "speaker"), [("STOP", 1, 0), ("KILL", 0, 1)])
def test_a_process_that_ends_or_hangs_ends_the_others(sent, victim, speaker, data, tmp_path):
    checkpoint = tmp_path / "state"
    arguments = ("fit", str(data / "npz"), *LONG, "--checkpoint", str(checkpoint), "--timeout", "3")
    processes = start(2, "-m", "tests.slow_fit", *arguments, "--out", str(tmp_path / "head.safetensors"))
    until_written(checkpoint)
    time.sleep(0.3)
    processes[victim].send_signal(getattr(signal, f"SIG{sent}"))
    assert processes[speaker].wait(timeout=300) == 1
    processes[victim].kill()
    errors = wait(processes).errors
    assert errors[speaker].startswith(f"softcurve: process {victim} (pid {processes[victim].pid} on ")
    assert f"{checkpoint} has the state" in errors[speaker]
    assert len(errors[speaker].splitlines()) == 1, errors[speaker]
    assert errors[victim] == ""
    assert checkpoint.exists()
    assert not (tmp_path / "head.safetensors").exists()


def test_what_one_process_cannot_read_all_refuse_once(data, tmp_path):
    arguments = ("fit", str(data / "bad.npy"), "--target", str(data / "target.npy"))
    ended = wait(start(2, "-m", "softcurve", *arguments, "--out", str(tmp_path / "head.safetensors")))
    assert ended.codes == [2, 2]
    assert "must be finite" in ended.errors[0]
    assert "in row 328, column 2" in ended.errors[0]
    assert len(ended.errors[0].splitlines()) == 1
    assert ended.errors[1] == ""
    assert ended.outputs == ["", ""]


def test_a_process_that_is_killed_before_the_first_step_leaves_no_state(data, tmp_path, monkeypatch):
    first, checkpoint = tmp_path / "first", tmp_path / "state"
    monkeypatch.setenv("FIRST", str(first))
    arguments = ("fit", str(data / "npz"), *LONG, "--checkpoint", str(checkpoint), "--timeout", "60")
    processes = start(2, "-m", "tests.slow_fit", *arguments, "--out", str(tmp_path / "head.safetensors"))
    until_written(first)
    processes[1].kill()
    ended = wait(processes)
    assert ended.codes == [1, -signal.SIGKILL]
    how = f"the same command starts from the beginning, because {checkpoint} was not written yet"
    says = f"softcurve: process 1 .* ended or stopped answering, .*; {how}\n"
    assert re.fullmatch(says, ended.errors[0])
    assert list(tmp_path.iterdir()) == [first]


def test_processes_that_see_other_files_of_one_shape_are_refused(data, tmp_path):
    np.save(data / "other.npy", np.roll(np.load(data / "target.npy"), 1))
    arguments = ("fit", str(data / "npy"), "--out", str(tmp_path / "head.safetensors"), "--target")
    last = ("--target", str(data / "other.npy"))
    ended = wait(start(2, "-m", "softcurve", *arguments, str(data / "target.npy"), last=last))
    assert ended.codes == [2, 2]
    says = "softcurve: data: target .*/target.npy in process 0 and target .*/other.npy in process 1 have other entries"
    assert re.match(says, ended.errors[0])
    assert len(ended.errors[0].splitlines()) == 1
    assert ended.errors[1] == ""
    assert not list(tmp_path.iterdir())


def test_an_interrupt_is_heard_by_all_and_said_once(data, tmp_path):
    checkpoint = tmp_path / "state"
    arguments = ("fit", str(data / "npz"), *LONG, "--checkpoint", str(checkpoint), "--timeout", "60")
    processes = start(2, "-m", "tests.slow_fit", *arguments, "--out", str(tmp_path / "head.safetensors"))
    until_written(checkpoint)
    processes[1].send_signal(signal.SIGTERM)
    ended = wait(processes)
    assert ended.codes == [143, 143]
    assert ended.errors == [
        f"softcurve: interrupted; {checkpoint} has the state of the fit; the same command resumes it\n",
        "",
    ]
