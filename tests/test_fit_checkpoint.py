"""A fit that is interrupted goes on from its checkpoint to where it would have ended; a bad checkpoint is left alone."""

from __future__ import annotations

import json
import math
import os
import random
import signal
import subprocess
import sys
import time
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from softcurve.fit import DataError, fitting
from softcurve.fit.checkpoint import digest_of_all
from softcurve.fit.data.row_source import RowSource, to_source
from softcurve.fit.fitting import fit_head
from softcurve.fit.solver import curvature, newton, preconditioner
from softcurve.fit.solver.preconditioner import ClassBlocks

pytestmark = pytest.mark.usefixtures("without_shape_checks")

RNG = np.random.default_rng(0)
SOFT = RNG.dirichlet(np.full(4, 0.3), 150)
X = RNG.normal(size=(150, 6)) + 2.0 * np.eye(6)[SOFT.argmax(1)]
OPTIONS = {"C": 100.0, "tol": 1e-9, "checkpoint_every": 0.0}


class Interrupted(Exception):
    pass


def fit(path, target=SOFT, rows=X, **options):
    return fit_head(to_source(rows, target), checkpoint=path, **OPTIONS | options)


def stop_at(number):
    def on_step(step):
        if step.iteration == number:
            raise Interrupted

    return on_step


def timeless(history):
    return [replace(step, seconds=0.0) for step in history]


@pytest.fixture
def early_blocks(monkeypatch):
    """Let fits of small problems use the blocks of the classes, and return the list of those that are computed."""
    monkeypatch.setattr(preconditioner, "REUSED", 1e9)
    monkeypatch.setattr(newton, "IN_VAIN", 1e9)
    computed, compute = [], ClassBlocks.__init__

    def noted(self, *arguments):
        compute(self, *arguments)
        computed.append(self.count)

    monkeypatch.setattr(ClassBlocks, "__init__", noted)
    return computed


@pytest.mark.parametrize("precision", ["rounded", "mixed", "float64"])
@pytest.mark.parametrize("target", [SOFT, SOFT.argmax(1)], ids=["distributions", "labels"])
def test_a_fit_goes_on_from_every_step(tmp_path, target, precision, monkeypatch, early_blocks):
    if precision == "rounded":  # products in bfloat16, on any processor
        monkeypatch.setattr(curvature, "rounding_pays", lambda rows, size, classes: True)
        precision = "mixed"
    whole = fit(None, target, precision=precision)
    assert whole.converged
    assert whole.iterations >= 5
    assert 0 < len(early_blocks) < whole.iterations - 1  # some of them serve several steps
    for number in range(whole.iterations + 1):
        path = tmp_path / f"{number}.safetensors"
        with pytest.raises(Interrupted):
            fit(path, target, precision=precision, on_step=stop_at(number))
        steps = []
        resumed = fit(path, target, precision=precision, on_step=steps.append)
        torch.testing.assert_close(resumed.weight, whole.weight, atol=1e-8, rtol=0)
        torch.testing.assert_close(resumed.bias, whole.bias, atol=1e-8, rtol=0)
        assert [step.iteration for step in resumed.history] == list(range(whole.iterations + 1))
        assert timeless(resumed.history)[: number + 1] == timeless(whole.history)[: number + 1]
        assert [step.iteration for step in steps] == list(range(number, whole.iterations + 1))
        seconds = [step.seconds for step in resumed.history]
        assert seconds == sorted(seconds)
    assert not list(tmp_path.glob(".*"))  # nothing half-written is left


def test_a_fit_interrupted_at_every_step_ends_where_it_would_have(tmp_path):
    whole, path = fit(None), tmp_path / "state"
    for number in range(whole.iterations):
        with pytest.raises(Interrupted):
            fit(path, on_step=stop_at(number))
    torch.testing.assert_close(fit(path).weight, whole.weight, atol=1e-8, rtol=0)


def interrupted_fit(monkeypatch, owner, name, numbers, path, **options):
    """A fit in which a function is interrupted at calls with these numbers; how often it was called."""
    calls, whole = [], getattr(owner, name)

    def called(*arguments, **given):
        calls.append(len(calls))
        if calls[-1] in numbers:
            raise KeyboardInterrupt
        return whole(*arguments, **given)

    with monkeypatch.context() as patch:
        patch.setattr(owner, name, called)
        with pytest.raises(KeyboardInterrupt) if numbers else nullcontext():
            fit(path, **options)
    return len(calls)


def test_a_fit_interrupted_in_any_walk_over_the_rows_goes_on(tmp_path, monkeypatch):
    # In the mean and the covariance, before and in the first point, in steps, in backtracking.
    options = {"checkpoint_every": 1e6, "precision": "float64"}
    whole = fit(None, **options)
    count = interrupted_fit(monkeypatch, RowSource, "blocks", (), None, **options)
    assert count > 20
    written = []
    for number in range(count):
        path = tmp_path / str(number)
        interrupted_fit(monkeypatch, RowSource, "blocks", (number,), path, **options)
        written.append(path.exists())
        torch.testing.assert_close(fit(path, **options).weight, whole.weight, atol=1e-8, rtol=0)
    assert not written[0]
    assert written[-1]


def test_an_interrupt_while_the_state_is_written_leaves_one_that_is_whole(tmp_path, monkeypatch):
    path, whole = tmp_path / "state", fit(None)
    for interrupts in ((3,), (3, 4)):  # the second one while the first one's state is written
        path.unlink(missing_ok=True)
        interrupted_fit(monkeypatch, os, "fsync", interrupts, path)
        assert [found.name for found in tmp_path.iterdir()] == [path.name]
        resumed = fit(path)
        assert resumed.iterations == whole.iterations
        torch.testing.assert_close(resumed.weight, whole.weight, atol=1e-8, rtol=0)


def test_a_checkpoint_does_not_depend_on_the_axes(tmp_path, monkeypatch):
    # Eigenvectors have any sign, and of equal eigenvalues any turn: another machine's are not this one's.
    path, whole = tmp_path / "state", fit(None)
    with pytest.raises(Interrupted):
        fit(path, on_step=stop_at(4))
    find = fitting.find_coordinates

    def turned(*arguments, **options):
        found = find(*arguments, **options)
        return replace(found, basis=-found.basis.flip(1))

    monkeypatch.setattr(fitting, "find_coordinates", turned)
    resumed = fit(path)
    assert resumed.iterations == whole.iterations
    np.testing.assert_allclose([s.objective for s in resumed.history], [s.objective for s in whole.history], rtol=1e-9)
    torch.testing.assert_close(resumed.weight, whole.weight, atol=1e-8, rtol=0)


def test_a_finished_fit_takes_no_step_and_a_tighter_one_goes_on(tmp_path):
    path = tmp_path / "state"
    loose = fit(path, tol=1e-3)
    again = fit(path, tol=1e-3)
    assert timeless(again.history) == timeless(loose.history)
    tight = fit(path)
    assert tight.converged
    assert tight.history[: loose.iterations + 1] == loose.history
    torch.testing.assert_close(tight.weight, fit(None).weight, atol=1e-7, rtol=0)
    few = fit(tmp_path / "few", max_iter=2)
    assert not few.converged
    assert fit(tmp_path / "few").converged


def test_the_state_is_written_when_it_is_time_and_at_the_end(tmp_path):
    path, seen = tmp_path / "state", []
    fit(path, checkpoint_every=1e6, on_step=lambda step: seen.append(path.exists()))
    assert not any(seen)
    assert path.exists()
    seen.clear()
    fit(tmp_path / "other", on_step=lambda step: seen.append((tmp_path / "other").exists()))
    assert all(seen)


KILLED = """
import sys, time
from pathlib import Path
import numpy as np, torch
from softcurve.fit.fitting import fit_head
from softcurve.fit.data.row_source import to_source
torch.set_num_threads(1)
data = np.load(sys.argv[1], allow_pickle=False)
fit_head(to_source(data["X"], data["y"]), C=100.0, tol=1e-9, checkpoint=Path(sys.argv[2]), checkpoint_every=0.0,
         on_step=lambda step: time.sleep(0.15))
"""


# Once in every run of the tests; KILLS=20 make test ARGS="-k killed" does it at twenty moments.
@pytest.mark.parametrize("time_of_it", range(int(os.environ.get("KILLS", "1"))))
def test_a_killed_process_is_gone_on_from(tmp_path, time_of_it):
    random_rows = np.random.default_rng(5)
    y = random_rows.integers(0, 30, 1500)
    rows = (random_rows.normal(size=(1500, 40)) + random_rows.normal(size=(30, 40))[y]).astype(np.float32)
    np.savez(tmp_path / "data.npz", X=rows, y=y)
    path = tmp_path / "state"
    process = subprocess.Popen([sys.executable, "-c", KILLED, tmp_path / "data.npz", path])
    until = time.monotonic() + 120
    while not path.exists() and process.poll() is None and time.monotonic() < until:
        time.sleep(0.01)
    time.sleep(random.Random().uniform(0.0, 0.8))  # another moment in each run
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL, "it must be killed before it ends"
    with safe_open(path, framework="pt") as file:
        done = len(json.loads(file.metadata()["state"])["history"])
    whole = fit(None, y, rows)
    assert 1 <= done <= whole.iterations
    resumed = fit(path, y, rows)
    assert resumed.converged
    torch.testing.assert_close(resumed.weight, whole.weight, atol=1e-6, rtol=0)
    torch.testing.assert_close(resumed.bias, whole.bias, atol=1e-6, rtol=0)


# --- checkpoints that cannot be gone on from ------------------------------------------------------------------------


@pytest.fixture
def written(tmp_path, early_blocks):
    path = tmp_path / "state"
    fit(path, max_iter=3)
    return path


def refused(path, message, **options):
    before = path.read_bytes()
    with pytest.raises(DataError, match=message) as caught:
        fit(path, **options)
    assert str(path) in str(caught.value)
    assert path.read_bytes() == before
    assert [found.name for found in path.parent.iterdir()] == [path.name]


OTHER_ROWS = X.copy()
OTHER_ROWS[101, 4] += 1.0
OTHER_SOFT = SOFT[:, [1, 0, 2, 3]]


@pytest.mark.parametrize(
    ("options", "differs"),
    [
        ({"rows": OTHER_ROWS}, "digest of the rows to fit"),
        ({"target": OTHER_SOFT}, "digest of the rows to fit"),
        ({"target": SOFT.argmax(1)}, "digest of the rows to fit"),
        ({"C": 99.0}, "C"),
        ({"loss": "js"}, "loss"),
        ({"fit_intercept": False}, "fit_intercept"),
        ({"precision": "mixed"}, "precision"),
        ({"sample_weight": torch.arange(150, dtype=torch.float64)}, "digest of the weights"),
    ],
    ids=["rows", "distributions", "labels", "C", "loss", "intercept", "precision", "weights"],
)
def test_a_checkpoint_of_another_run_is_named(written, options, differs):
    refused(written, f"is of another run: its {differs} is", **options)


def test_other_rows_are_named_where_the_digest_has_missed_what_differs(written, monkeypatch):
    # As it may where the rows are many: what is stored of them is then read in some places alone.
    monkeypatch.setattr(RowSource, "fingerprint", "")
    written.unlink()
    fit(written, max_iter=3)
    refused(written, "is of other rows: the objective is", rows=OTHER_ROWS)
    assert fit(written).converged


@pytest.mark.parametrize("share", [0.0, 0.05, 0.5, 0.99])
def test_a_truncated_checkpoint_is_named(written, share):
    whole = written.read_bytes()
    written.write_bytes(whole[: int(share * len(whole))])
    refused(written, "is damaged: it is no safetensors file")


def test_a_flipped_bit_is_named_wherever_it_is(written):
    whole = written.read_bytes()
    random_places = np.random.default_rng(0)
    header = 8 + int.from_bytes(whole[:8], "little")
    places = [*random_places.integers(0, header, 30), *random_places.integers(header, len(whole), 90)]
    for place, bit in zip(places, random_places.integers(0, 8, len(places)), strict=True):
        flipped = bytearray(whole)
        flipped[place] ^= 1 << bit
        written.write_bytes(flipped)
        refused(written, "is damaged|is of another run: its format")


@pytest.mark.parametrize("content", [b"", b"\x00" * 500, b"PK\x03\x04 not this", b"\xff" * 64])
def test_a_file_of_another_kind_is_named(written, content):
    written.write_bytes(content)
    refused(written, "is damaged: it is no safetensors file")


def rewritten(path, change):
    with safe_open(path, framework="pt") as file:
        tensors, metadata = {name: file.get_tensor(name) for name in file.keys()}, file.metadata()  # noqa: SIM118
    del metadata["digest"]
    change(tensors, metadata)
    save_file(tensors, path, metadata | {"digest": digest_of_all(tensors, metadata)})


def of_state(**changes):
    """A change of the state, and of its last step under the names that a step has."""

    def change(tensors, metadata):
        state = json.loads(metadata["state"])
        for name, value in changes.items():
            (state if name in state else state["history"][-1])[name] = value
        metadata["state"] = json.dumps(state)

    return change


def without_history(tensors, metadata):
    state = json.loads(metadata["state"])
    del state["history"]
    metadata["state"] = json.dumps(state)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensors, metadata: metadata.update(format="other"), "is of another run: its format is 'other'"),
        (lambda tensors, metadata: metadata.update(format_version="99"), "its format_version is '99'"),
        (lambda tensors, metadata: metadata.clear(), "its format is None"),
        (lambda tensors, metadata: metadata.update(state="{"), "'state' cannot be read"),
        (lambda tensors, metadata: metadata.update(state="[]"), "'state' cannot be read"),
        (lambda tensors, metadata: metadata.pop("state"), "'state' cannot be read"),
        (without_history, "'state' cannot be read"),
        (lambda tensors, metadata: metadata.update(state="[" * 100_000), "'state' cannot be read"),
        (of_state(history=[]), "'state' cannot be read"),
        (of_state(damping=math.inf), "'state' cannot be read"),
        (of_state(damping=-1.0), "'state' cannot be read"),
        (of_state(model_error=math.nan), "'state' cannot be read"),
        (of_state(double=1), "'state' cannot be read"),
        (of_state(objective=math.nan), "'state' cannot be read"),
        (of_state(gradient_max=-math.inf), "'state' cannot be read"),
        (of_state(products=10**400), "'state' cannot be read"),
        (of_state(seconds=10**400), "'state' cannot be read"),
        (of_state(iteration=math.inf), "'state' cannot be read"),
        (of_state(iteration=7), "'state' cannot be read"),
        (lambda tensors, metadata: tensors["weight"][1].fill_(torch.nan), "'weight' has entries that are not finite"),
        (lambda tensors, metadata: tensors["parameters"][1].fill_(torch.nan), "'parameters' has entries that are not"),
        (lambda tensors, metadata: tensors["bias"][1].fill_(torch.inf), "'bias' has entries that are not finite"),
        (
            lambda tensors, metadata: tensors["blocks_bias"][1].fill_(torch.nan),
            "'blocks_bias' has entries that are not",
        ),
        (lambda tensors, metadata: tensors.pop("blocks_bias"), "'blocks_bias' must be float64 of shape"),
        (of_state(more_products=-1), "'state' cannot be read"),
        (
            lambda tensors, metadata: tensors.update(weight=torch.zeros(2, 2)),
            "'weight' must be float64 of shape \\(4, 6\\)",
        ),
        (
            lambda tensors, metadata: tensors.update(bias=tensors["bias"].float()),
            "'bias' must be float64 of shape \\(4,\\)",
        ),
        (lambda tensors, metadata: tensors.update(other=tensors.pop("weight")), "must be float64 of shape"),
    ],
)
def test_a_damaged_checkpoint_is_named(written, change, message):
    rewritten(written, change)
    refused(written, message)


def test_places_that_cannot_be_written_are_named_before_the_fit(tmp_path):
    steps = []
    with pytest.raises(DataError, match="checkpoint: there is no folder"):
        fit(tmp_path / "none" / "state", on_step=steps.append)
    with pytest.raises(DataError, match=r"checkpoint: .* is a folder"):
        fit(tmp_path, on_step=steps.append)
    assert not steps


def test_a_checkpoint_holds_no_code(written):
    assert isinstance(written, Path)
    with safe_open(written, framework="pt") as file:
        assert sorted(file.keys()) == ["bias", "blocks_bias", "blocks_weight", "parameters", "weight"]
        assert json.loads(file.metadata()["state"])["history"][0]["iteration"] == 0
