"""``softcurve predict`` as a user sees it: figures and files, block by block; refusals that leave all as it was."""

from __future__ import annotations

import csv
import json
import os
import re
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import save_file
from typer.testing import CliRunner

from softcurve.cli.main import app
from softcurve.fit.saved_head import SavedHead

from .cli_output import run_both, run_json

ROWS, WIDTH = 61, 4
RNG = np.random.default_rng(1)
FEATURES = RNG.normal(size=(ROWS, WIDTH))
WEIGHT, BIAS = RNG.normal(size=(3, WIDTH)), RNG.normal(size=3)
NAMES = ("[red]two", "three", "één")
INDEX = RNG.integers(0, 3, size=ROWS)
WORDS = np.array(NAMES)[INDEX]
SOFT = RNG.dirichlet(np.full(3, 0.5), size=ROWS)
LISTED = np.array([RNG.permutation(3)[:2] for _ in range(ROWS)])
LIST_LOG_PROBS = np.log(np.take_along_axis(SOFT, LISTED, axis=1))

SHIFTED = FEATURES @ WEIGHT.T + BIAS
LOG_P = SHIFTED - np.log(np.exp(SHIFTED).sum(axis=1, keepdims=True))
P = np.exp(LOG_P)
PREDICTED = P.argmax(axis=1)


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def blocks(monkeypatch):
    """Of seven rows; without it all rows are one block."""
    monkeypatch.setattr("softcurve.fit.data.source.BUDGET", 64 * WIDTH * 7)


def save_head(loss="cross_entropy", classes=NAMES, dtype=torch.float64):
    SavedHead(torch.tensor(WEIGHT, dtype=dtype), torch.tensor(BIAS, dtype=dtype), classes, loss, 1.0).save(
        "h.safetensors"
    )


def predict(*arguments):
    return run_json("predict", "h.safetensors", *arguments)


def contents():
    return {str(path): path.read_bytes() for path in Path().rglob("*") if path.is_file()}


def refused(*arguments):
    """The message of a run that must be refused, and leave every file as it was."""
    before = contents()
    done = CliRunner().invoke(app, ["predict", *(str(argument) for argument in arguments)])
    assert done.exit_code == 2, done.output
    assert isinstance(done.exception, SystemExit)
    assert done.stdout == ""
    assert "Traceback" not in done.stderr
    assert contents() == before
    return done.stderr


def npz(**arrays):
    np.savez("data.npz", features=FEATURES, **arrays)
    return "data.npz"


def npy(**arrays):
    np.save("data.npy", np.asfortranarray(FEATURES))
    return "data.npy"


def safetensors(**arrays):
    save_file(
        {"X": torch.tensor(FEATURES), **{name: torch.tensor(array) for name, array in arrays.items()}},
        "data.safetensors",
    )
    return "data.safetensors"


def parquet(**arrays):
    columns = {"X": FEATURES.tolist()} | {name: array.tolist() for name, array in arrays.items()}
    pq.write_table(pa.table(columns), "data.parquet", row_group_size=20)
    return "data.parquet"


def shards(**arrays):
    os.mkdir("shards")
    for number, rows in enumerate(np.array_split(np.arange(ROWS), 11)):
        np.savez(f"shards/{number}.npz", X=FEATURES[rows], **{name: array[rows] for name, array in arrays.items()})
    return "shards"


WRITERS = [npz, safetensors, parquet, shards]


@pytest.mark.parametrize("write", [*WRITERS, npy])
def test_predictions_in_every_format(blocks, write):
    save_head()
    data = write()
    for suffix in ("npz", "npy", "csv", "parquet"):
        record = predict(data, "--out", f"p.{suffix}")
        assert (record["predictions"], record["rows"], record["features"]) == (f"p.{suffix}", ROWS, WIDTH)
    with np.load("p.npz", allow_pickle=False) as arrays:
        np.testing.assert_allclose(arrays["probabilities"], P, rtol=1e-12)
        assert arrays["probabilities"].dtype == np.float64
        assert arrays["label"].tolist() == [NAMES[index] for index in PREDICTED]
        assert arrays["classes"].tolist() == list(NAMES)
    np.testing.assert_allclose(np.load("p.npy", allow_pickle=False), P, rtol=1e-12)
    with open("p.csv", encoding="utf-8", newline="") as file:
        header, *lines = csv.reader(file)
    assert header == ["label", "p([red]two)", "p(three)", "p(één)"]
    assert [line[0] for line in lines] == [NAMES[index] for index in PREDICTED]
    np.testing.assert_allclose(np.array([line[1:] for line in lines], dtype=float), P, rtol=1e-12)
    table = pq.read_table("p.parquet")
    assert table["label"].to_pylist() == [NAMES[index] for index in PREDICTED]
    np.testing.assert_allclose(np.array(table["probabilities"].to_pylist()), P, rtol=1e-12)
    assert json.loads(table.schema.metadata[b"classes"]) == list(NAMES)


@pytest.mark.parametrize("classes", [(-3, 0, 2**40), (False, True, 7), (2**63, 1, 2**63 + 1)])
def test_classes_that_are_numbers(classes):
    save_head(classes=classes)
    for suffix in ("npz", "csv", "parquet"):
        predict(npz(), "--out", f"p.{suffix}")
    wanted = [classes[index] for index in PREDICTED]
    with np.load("p.npz", allow_pickle=False) as arrays:
        assert arrays["label"].tolist() == wanted
    assert pq.read_table("p.parquet")["label"].to_pylist() == wanted


@pytest.mark.parametrize("write", WRITERS)
def test_labels_are_scored(blocks, write):
    save_head()
    if write is safetensors:  # which has no text
        save_head(classes=(5, 6, 7))
    record, table = run_both("predict", "h.safetensors", write(target=INDEX + 5 if write is safetensors else WORDS))
    loss, entropy = -LOG_P[np.arange(ROWS), INDEX].mean(), -(P * LOG_P).sum(axis=1).mean()
    assert record["accuracy"] == (PREDICTED == INDEX).mean()
    assert record["loss_nats"] == pytest.approx(loss, rel=1e-12)
    assert record["loss_bits"] == pytest.approx(loss / np.log(2), rel=1e-12)
    assert record["entropy_nats"] == pytest.approx(entropy, rel=1e-12)
    assert record["entropy_bits"] == pytest.approx(entropy / np.log(2), rel=1e-12)
    assert record["kl_nats"] is None
    counts = [entry["rows"] for entry in record["most_predicted"]]
    assert counts == sorted(np.bincount(PREDICTED).tolist(), reverse=True)
    assert record["predictions"] is None
    assert write is safetensors or "[red]two: " in table


def kl(y, log_p):
    return np.where(y > 0, y * (np.log(np.where(y > 0, y, 1.0)) - log_p), 0.0).sum(axis=1)


def js(y):
    m = 0.5 * (y + P)
    return 0.5 * (kl(y, np.log(m)) + kl(P, np.log(m)))


LOSSES = {
    "cross_entropy": -(SOFT * LOG_P).sum(axis=1),
    "forward_kl": kl(SOFT, LOG_P),
    "reverse_kl": kl(P, np.log(SOFT)),
    "js": js(SOFT),
}


@pytest.mark.parametrize("write", WRITERS)
@pytest.mark.parametrize("loss", LOSSES)
def test_distributions_are_scored_by_the_loss_of_the_head(blocks, write, loss):
    save_head(loss)
    record, table = run_both("predict", "h.safetensors", write(y=SOFT))
    assert record["loss"] == loss
    assert record["loss_nats"] == pytest.approx(LOSSES[loss].mean(), rel=1e-11)
    assert record["kl_nats"] == pytest.approx(LOSSES["forward_kl"].mean(), rel=1e-11)
    assert record["accuracy"] == (SOFT.argmax(axis=1) == PREDICTED).mean()
    assert "KL(target||model)" in table


@pytest.mark.parametrize("write", WRITERS)
def test_the_lists_of_a_teacher_are_scored(blocks, write):
    save_head("forward_kl")
    record = predict(write(indices=LISTED, log_probs=LIST_LOG_PROBS))
    # Two of three classes are listed, so the bucket is the third: the divergence is that of the whole distribution.
    assert record["loss_nats"] == pytest.approx(LOSSES["forward_kl"].mean(), rel=1e-9)
    assert record["kl_nats"] == record["loss_nats"]
    top = np.take_along_axis(LISTED, LIST_LOG_PROBS.argmax(axis=1)[:, None], axis=1)[:, 0]
    assert record["accuracy"] == (top == PREDICTED).mean()


def test_a_target_file_is_scored_instead(blocks):
    save_head("forward_kl")
    np.save("soft.npy", SOFT.astype(np.float32))
    record = predict(npy(), "--target", "soft.npy")
    assert record["loss_nats"] == pytest.approx(LOSSES["forward_kl"].mean(), rel=1e-5)
    assert predict(shards(y=WORDS), "--target", "soft.npy")["loss"] == "forward_kl"


def test_predictions_need_no_targets():
    save_head()
    record, table = run_both("predict", "h.safetensors", npy())
    assert record["rows"] == ROWS
    assert not {"loss", "accuracy", "kl_nats"} & set(record)
    assert "loss" not in table


def test_a_head_fitted_by_reverse_kl_is_scored_on_labels_by_cross_entropy():
    save_head("reverse_kl")
    assert predict(npz(y=WORDS))["loss"] == "cross_entropy"
    record, table = run_both("predict", "h.safetensors", npz(y=np.eye(3)[INDEX]))
    assert (record["loss"], record["loss_nats"], record["loss_bits"]) == ("reverse_kl", None, None)
    assert record["kl_nats"] > 0
    assert "inf nats" in table


def test_predictions_can_be_targets():
    save_head("forward_kl")
    predict(npy(), "--out", "teacher.npy")
    assert predict("data.npy", "--target", "teacher.npy")["loss_nats"] < 1e-14


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["h.safetensors"], "DATA"),
        (["missing.safetensors", "data.npz"], "head: there is no file missing.safetensors"),
        (["data.npz", "data.npz"], "data.npz is not a head that can be used: it is no safetensors"),
        (["data.safetensors", "data.npz"], "data.safetensors is not a head that can be used"),
        (["h.safetensors", "digits"], "features of digits must have 4 columns, .*; got 64"),
        (["h.safetensors", "data.npz"], "the first, 'four', in row 5: leave the target out"),
        (["h.safetensors", "huge.npy", "--out", "old.csv", "--overwrite"], "logits of huge.npy overflow"),
        (["h.safetensors", "data.npz", "--out", "p.json"], "--out: p.json must end in .npz, .npy, .csv, .parquet"),
        (["h.safetensors", "data.npz", "--out", "none/p.npz"], "--out: there is no folder none"),
        (["h.safetensors", "data.npz", "--out", "data.npz"], "data.npz is also an input"),
        (["h.safetensors", "shards", "--out", "shards/p.npz"], "shards/p.npz would be one of the shards in shards"),
        (["h.safetensors", "shards", "--target", "old.csv"], "target: old.csv must be an .npy file"),
        (["h.safetensors", "empty"], "the directory empty has no files that end in"),
    ],
)
def test_refusals_name_what_is_wrong_and_leave_all_as_it_was(blocks, arguments, message):
    save_head()
    words = WORDS.astype("<U9")
    words[5] = "four"
    npz(target=words)
    safetensors(target=INDEX)
    shards()
    os.mkdir("empty")
    np.save("huge.npy", np.concatenate([FEATURES, np.full((2, WIDTH), 1.7e308)]))
    with open("old.csv", "w") as file:
        file.write("what stood there before\n")
    # rich folds a usage error into a box: undo it.
    assert re.search(message, " ".join(re.sub("[│╭╮╰╯─]", " ", refused(*arguments)).split()))


@pytest.mark.parametrize("suffix", ["npz", "npy", "csv", "parquet"])
def test_damage_that_shows_late_leaves_the_old_predictions(blocks, suffix):
    save_head()
    with open(f"p.{suffix}", "w") as file:
        file.write("what stood there before\n")
    late = FEATURES.copy()
    late[57, 1] = np.nan
    np.save("late.npy", late)
    assert "late.npy must be finite; 1 entry" in refused(
        "h.safetensors", "late.npy", "--out", f"p.{suffix}", "--overwrite"
    )
    soft = SOFT.copy()
    soft[58] *= 2
    np.savez("late.npz", X=FEATURES, y=soft)
    message = refused("h.safetensors", "late.npz", "--out", f"p.{suffix}", "--overwrite")
    assert re.search("array 'y' of late.npz must sum to 1 .* the first, 2, in row 58: divide", message)


def test_a_file_that_shrinks_meanwhile_leaves_the_old_predictions(monkeypatch):
    save_head()
    predict(npy(), "--out", "p.npy")
    before = contents()["p.npy"]
    monkeypatch.setattr("softcurve.fit.data.source.BUDGET", 64 * WIDTH)
    # Every block asks whether it was interrupted: the first that does so cuts the file.
    monkeypatch.setattr("softcurve.cli.predicting.stop_if_interrupted", lambda: os.truncate("data.npy", 200))
    done = CliRunner().invoke(app, ["predict", "h.safetensors", "data.npy", "--out", "p.npy", "--overwrite"])
    assert done.exit_code == 2
    assert "data.npy has changed since it was opened (200 bytes, 2080 before)" in done.stderr
    assert contents()["p.npy"] == before
    assert sorted(os.listdir()) == ["data.npy", "h.safetensors", "p.npy"]


def test_an_interrupt_leaves_the_old_predictions(monkeypatch):
    save_head()
    data = npy()

    def interrupt():
        raise KeyboardInterrupt

    monkeypatch.setattr("softcurve.cli.predicting.stop_if_interrupted", interrupt)
    done = CliRunner().invoke(app, ["predict", "h.safetensors", data, "--out", "p.npy"])
    assert done.exit_code == 130
    assert sorted(os.listdir()) == ["data.npy", "h.safetensors"]


@pytest.mark.skipif(sys.platform != "linux", reason="reads the resident set from /proc")
def test_neither_the_rows_nor_the_probabilities_are_held(run_python, tmp_path):
    """128 MB of features and 128 MB of probabilities, within 32 MB for the head, once as float64, and a few blocks of 2 MB."""
    body = f"""
import os, numpy as np, torch
from bench.measure import extra_peak_of
os.chdir({str(tmp_path)!r})
torch.set_num_threads(1)
from softcurve.cli.options import PredictOptions
from softcurve.cli.predicting import predict_command
from softcurve.fit.saved_head import SavedHead
from pathlib import Path
classes, width = 1000, 2000
SavedHead(torch.zeros(classes, width), torch.zeros(classes), tuple(range(classes)), "cross_entropy", 1.0).save("h.safetensors")
for name, rows in {{"few.npy": 500, "many.npy": 16000}}.items():
    array = np.lib.format.open_memmap(name, "w+", np.float32, (rows, width))
    array[:] = 1.0
    del array
for out in (Path("p.npy"), Path("p.npz")):
    def predict(name):
        predict_command(PredictOptions(Path("h.safetensors"), name, out=out, overwrite=True))
    predict("few.npy")  # libraries are loaded
    print("peak", extra_peak_of(lambda: predict("many.npy")))
    assert out.stat().st_size > 128_000_000
"""
    found = [float(line.split()[1]) for line in run_python(body).stdout.splitlines() if line.startswith("peak")]
    assert len(found) == 2
    assert max(found) < 65
