"""``softcurve fit`` as a user sees it: figures, files, refusals; and the command line as a process."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from sklearn.dummy import DummyClassifier
from sklearn.metrics import confusion_matrix, log_loss, precision_recall_fscore_support
from typer.testing import CliRunner

from softcurve import SoftmaxRegression
from softcurve.cli.fitting import fit_command
from softcurve.cli.main import app
from softcurve.cli.options import FitOptions
from softcurve.fit import DataError
from softcurve.fit.group import Group
from softcurve.fit.saved_head import SavedHead

from .cli_output import refuse_constant, run_both, run_json, run_tables
from .gathered import load_rows, make_rows, split

FEATURES = np.random.default_rng(1).normal(size=(60, 4))
WORDS = np.array(["één", "[red]two", "three"])[np.abs(FEATURES[:, :3]).argmax(axis=1)]
SOFT = np.random.default_rng(2).dirichlet(np.full(3, 0.5), size=60)


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def without_pages(monkeypatch):
    """For fits whose report nobody reads, and which takes longer than they do."""
    monkeypatch.setattr("softcurve.cli.report.render_report", lambda report: "<!DOCTYPE html>")


@pytest.fixture
def words():
    np.savez("words.npz", features=FEATURES, target=WORDS)
    return "words.npz"


@pytest.fixture
def soft():
    save_file({"features": torch.tensor(FEATURES), "target": torch.tensor(SOFT)}, "soft.safetensors")
    return "soft.safetensors"


def refused(*arguments):
    """The message of a run that must be refused, and leave the folder as it was."""
    before = {name: os.stat(name).st_mtime_ns for name in os.listdir()}
    done = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert done.exit_code == 2, done.output
    assert isinstance(done.exception, SystemExit)
    assert done.stdout == ""
    assert "Traceback" not in done.stderr
    assert {name: os.stat(name).st_mtime_ns for name in os.listdir()} == before
    return done.stderr


def log_softmax(logits):
    shifted = logits - logits.max(axis=1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))


def test_digits_are_the_default_and_the_figures_are_those_of_the_saved_head():
    record, table = run_both("fit")
    tensors = load_file("head.safetensors")
    train, held = split(load_rows("digits"), 0.2, seed=0)
    log_p = log_softmax(held.features @ tensors["weight"].numpy().T + tensors["bias"].numpy())
    loss = -log_p[np.arange(len(held)), held.target].mean()
    assert record["converged"] is True
    assert record["gradient_max"] <= 1e-5
    assert record["held_out_accuracy"] == (log_p.argmax(axis=1) == held.target).mean()
    assert record["held_out_accuracy"] > 0.95
    assert record["held_out_loss_nats"] == pytest.approx(loss, rel=1e-12)
    assert record["held_out_loss_bits"] == pytest.approx(loss / np.log(2), rel=1e-12)
    assert record["held_out_kl_nats"] is None
    assert (record["rows"], record["rows_train"], record["rows_held_out"]) == (1797, len(train), len(held))
    assert (record["features"], record["classes"], record["head"]) == (64, 10, "head.safetensors")
    assert f"{loss:.6f} nats = {loss / np.log(2):.6f} bits" in table
    dummy = DummyClassifier(strategy="prior").fit(train.features, train.target)
    baseline = record["majority_baseline"]
    assert baseline["accuracy"] == dummy.score(held.features, held.target)
    assert baseline["loss_nats"] == pytest.approx(log_loss(held.target, dummy.predict_proba(held.features)), rel=1e-12)
    assert f"loss {baseline['loss_nats']:.4f} nats, accuracy {baseline['accuracy']:.4f}" in table
    low, high = record["held_out_intervals"]["loss_nats"]
    assert low < loss < high
    assert f"loss {low:.4f} to {high:.4f} nats" in table
    written = json.loads(Path("head.json").read_text())
    predicted = log_p.argmax(axis=1)
    assert written["confusion_matrix"] == confusion_matrix(held.target, predicted).tolist()
    columns = precision_recall_fscore_support(held.target, predicted)
    for name, column in zip(("precision", "recall"), columns, strict=False):
        assert [each[name] for each in written["by_class"]] == pytest.approx(column.tolist(), rel=1e-12)


def test_few_coefficients_have_standard_errors():
    features, target = np.random.default_rng(0).normal(size=(80, 2)), np.arange(80) % 3
    np.savez("few.npz", features=features, target=target)
    run_json("fit", "few.npz", "--holdout", 0, "--C", 2)
    written = json.loads(Path("head.json").read_text())["coefficients"]
    model = SoftmaxRegression(C=2.0, tol=1e-6).fit(features, target)
    expected = model.summary(features, target).records()
    assert [row["feature"] for row in written] == ["x0", "x1", "(intercept)"] * 3
    for name in ("coefficient", "standard_error", "z", "p_value", "low", "high"):
        np.testing.assert_allclose([row[name] for row in written], [row[name] for row in expected], 1e-3, 1e-4)
    assert "standard error" in Path("head.html").read_text()


@pytest.mark.usefixtures("without_pages")
def test_the_command_in_the_record_repeats_the_fit(words):
    options = ("--C", 0.5, "--no-intercept", "--seed", 3, "--path", "0.1,10", "--tol", 1e-7, "--dtype", "float32")
    record = run_json("fit", words, *options, "--out", "my head.safetensors", "--overwrite")
    command = record["reproduction"]["command"]
    assert command.startswith("softcurve fit words.npz ")
    assert "'my head.safetensors'" in command
    first = Path("my head.safetensors").read_bytes()
    again = run_json(*shlex.split(command)[1:])
    assert Path("my head.safetensors").read_bytes() == first
    assert again | {"seconds": record["seconds"]} == record
    assert record["reproduction"]["versions"]["torch"] == torch.__version__


@pytest.mark.parametrize("loss", ["cross_entropy", "forward_kl", "reverse_kl"])
def test_distributions_with_every_loss(soft, loss):
    record, table = run_both("fit", soft, "--loss", loss, "--out", "h.safetensors", "--seed", 7, "--holdout", 0.25)
    _, held = split(make_rows(FEATURES, SOFT), 0.25, seed=7)
    tensors = load_file("h.safetensors")
    log_p = log_softmax(held.features @ tensors["weight"].numpy().T + tensors["bias"].numpy())
    log_y = np.log(held.target)
    forward = (held.target * (log_y - log_p)).sum(axis=1).mean()
    expected = {
        "cross_entropy": -(held.target * log_p).sum(axis=1).mean(),
        "forward_kl": forward,
        "reverse_kl": (np.exp(log_p) * (log_p - log_y)).sum(axis=1).mean(),
    }[loss]
    confidence, right = np.exp(log_p).max(axis=1), held.target[np.arange(len(held)), log_p.argmax(axis=1)]
    bins = np.ceil(15 * confidence).astype(int)
    error = sum(abs((right - confidence)[bins == place].sum()) for place in set(bins)) / len(held)
    assert record["calibration_error"] == pytest.approx(error, rel=1e-9)
    assert re.search(rf"calibration error\W+{error:.4f}", table)
    page = Path("h.html").read_text(encoding="utf-8")
    assert f"here {100 * error:.2f}&nbsp;%" in page
    assert "The targets are distributions" in page
    assert record["targets"] == "distributions"
    assert record["loss"] == SavedHead.load("h.safetensors").loss == loss
    assert record["held_out_loss_nats"] == pytest.approx(expected, rel=1e-12)
    assert record["held_out_kl_nats"] == pytest.approx(forward, rel=1e-12)
    assert "KL(target||model)" in table


@pytest.mark.usefixtures("without_pages")
def test_the_same_seed_gives_the_same_head_and_another_one_another(words):
    run_json("fit", words, "--out", "a.safetensors")
    run_json("fit", words, "--out", "b.safetensors")
    run_json("fit", words, "--out", "c.safetensors", "--seed", 1)
    first, second, third = (load_file(f"{name}.safetensors")["weight"] for name in "abc")
    assert torch.equal(first, second)
    assert not torch.equal(first, third)


@pytest.mark.usefixtures("without_pages")
def test_options_reach_the_fit(words):
    record = run_json("fit", words, "--C", 0.01, "--dtype", "float32", "--tol", 1e-3, "--max-iter", 50)
    head = SavedHead.load("head.safetensors")
    assert (record["C"], record["dtype"], record["tol"]) == (0.01, "float32", 1e-3)
    assert head.weight.dtype == torch.float32
    assert head.C == 0.01
    assert head.classes == ("[red]two", "three", "één")


@pytest.mark.usefixtures("without_pages")
def test_too_few_iterations_are_said(words):
    record, table = run_both("fit", words, "--max-iter", 1)
    assert record["converged"] is False
    assert record["iterations"] == 1
    assert re.search(r"converged +│ NO", table)
    assert "raise max_iter" in " ".join(table.split())


def test_the_record_and_the_report_stand_beside_the_head(words):
    record = run_json("fit", words, "--out", "h.safetensors", "--path", "0.1,10")
    kept = json.loads(Path("h.json").read_text(), parse_constant=refuse_constant)
    assert {key: kept[key] for key in record} == record
    assert [step["iteration"] for step in kept["history"]] == list(range(record["iterations"] + 1))
    assert kept["history"][-1]["gradient_max"] == record["gradient_max"]
    assert [point["C"] for point in record["path"]] == [0.1, 10.0]
    assert record["path"][0]["weight_norm"] < record["path"][1]["weight_norm"]
    page = Path("h.html").read_text()
    assert "[red]two" in page
    assert "converge" in page


@pytest.mark.usefixtures("without_pages")
def test_no_row_is_held_out_where_none_shall_be(words):
    record, table = run_both("fit", words, "--holdout", 0)
    assert (record["rows_train"], record["rows_held_out"]) == (60, 0)
    assert "held-out" not in table


@pytest.mark.usefixtures("without_pages")
def test_shards_are_one_set_of_rows(words):
    Path("shards").mkdir()
    for index, rows in enumerate((slice(0, 25), slice(25, 26), slice(26, 60))):
        np.savez(f"shards/part-{index}.npz", features=FEATURES[rows], target=WORDS[rows])
    whole = run_json("fit", words, "--holdout", 0, "--tol", 1e-10)
    parts = run_json("fit", "shards", "--holdout", 0, "--tol", 1e-10, "--out", "parts.safetensors")
    assert parts["objective"] == pytest.approx(whole["objective"], rel=1e-12)
    first, second = (load_file(name)["weight"] for name in ("head.safetensors", "parts.safetensors"))
    torch.testing.assert_close(first, second, rtol=0, atol=1e-7)


@pytest.mark.usefixtures("without_pages")
def test_lists_of_all_classes_are_the_distributions_themselves(soft):
    order = np.argsort(-SOFT, axis=1)
    lists = {"indices": order, "log_probs": np.log(np.take_along_axis(SOFT, order, 1))}
    np.savez("lists.npz", features=FEATURES, **lists)
    run_json("fit", soft, "--tol", 1e-9)
    record = run_json("fit", "lists.npz", "--tol", 1e-9, "--out", "lists.safetensors")
    assert record["targets"] == "top_k"
    first, second = (load_file(name)["weight"] for name in ("head.safetensors", "lists.safetensors"))
    torch.testing.assert_close(first, second, rtol=0, atol=1e-5)


@pytest.mark.usefixtures("without_pages")
def test_a_fit_goes_on_from_its_checkpoint(words):
    run_json("fit", words, "--tol", 1e-8)
    cut = run_json("fit", words, "--max-iter", 2, "--tol", 1e-8, "--checkpoint", "state", "--out", "cut.safetensors")
    assert not cut["converged"]
    rest = run_json("fit", words, "--tol", 1e-8, "--checkpoint", "state", "--out", "rest.safetensors")
    assert rest["converged"]
    assert rest["iterations"] > cut["iterations"]
    assert torch.equal(load_file("head.safetensors")["weight"], load_file("rest.safetensors")["weight"])
    before = Path("state").read_bytes()
    assert "of another run" in refused("fit", words, "--C", 2, "--checkpoint", "state", "--overwrite")
    Path("state").write_bytes(before[:-9])
    assert "checkpoint: state is damaged" in refused("fit", words, "--checkpoint", "state", "--overwrite")


@pytest.mark.usefixtures("without_pages")
def test_a_class_that_is_only_held_out_is_said():
    _, held = split(make_rows(FEATURES, np.arange(60) % 2), 0.2, seed=0)
    only = int(np.flatnonzero((held.features[0] == FEATURES).all(axis=1))[0])
    target = np.arange(60) % 2
    target[only] = 9
    np.savez("rare.npz", X=FEATURES, y=target)
    record, table = run_both("fit", "rare.npz", "--max-iter", 50)
    assert record["classes"] == 3
    assert record["classes_without_training_rows"] == 1
    assert "1 class has no training sample" in table


@pytest.mark.usefixtures("without_pages")
def test_progress_is_shown_where_it_is_asked_for(words):
    done = CliRunner().invoke(app, ["fit", words, "--progress"])
    assert done.exit_code == 0
    assert "objective" in done.stderr
    assert json.loads(done.stdout)["converged"]


@pytest.mark.usefixtures("without_pages")
def test_predictions_can_be_the_targets_of_another_fit(words):
    run_json("fit", words)
    run_json("predict", "head.safetensors", words, "--out", "teacher.npy")
    options = ("--target", "teacher.npy", "--loss", "reverse_kl", "--C", 1e6, "--out", "student.safetensors")
    record = run_json("fit", words, *options)
    assert record["targets"] == "distributions"
    assert record["held_out_loss_nats"] < 1e-5


def save_good_head():
    SavedHead(torch.ones(3, 4), torch.zeros(3), ("a", "b", "c"), "cross_entropy", 1.0).save("good.safetensors")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["fit", "missing.npz"], "data: there is no file missing.npz"),
        (["fit", "data.tsv"], "suffix '.tsv'; it must be the word digits or a file that ends in"),
        (["fit", "words.npz", "--loss", "reverse_kl"], "infinite for labels.*use forward_kl"),
        (["fit", "words.npz", "--loss", "hinge"], "'hinge'"),
        (["fit", "words.npz", "--holdout", "1"], "holdout 1 of 60 rows must leave rows on both sides"),
        (["fit", "words.npz", "--holdout", "nan"], "holdout nan"),
        (["fit", "words.npz", "--C", "-1"], "C must be a positive number; got -1.0"),
        (["fit", "words.npz", "--C", "nan"], "C must be a positive number; got nan"),
        (["fit", "words.npz", "--tol", "0"], "tol must be a positive number"),
        (["fit", "words.npz", "--max-iter", "0"], "--max-iter"),
        (["fit", "words.npz", "--seed", "-1"], "--seed"),
        (["fit", "words.npz", "--dtype", "float16"], "'float16'"),
        (["fit", "words.npz", "--out", "head.pt"], "--out: head.pt must end in .safetensors"),
        (["fit", "missing.npz", "--out", "none/head.safetensors"], "--out: there is no folder none"),
        (
            ["fit", "soft.safetensors", "--out", "soft.safetensors"],
            "--out: soft.safetensors is also an input",
        ),
        (["fit", "words.npz", "--target", "words.npz"], "target: words.npz must be an .npy file"),
        (["fit", "words.npz", "--path", "1,two"], "--path: 1,two must be numbers with commas"),
        (["fit", "words.npz", "--report", "page.txt"], "--report: page.txt must end in .html"),
        (["fit", "words.npz", "--checkpoint", "head.json"], "--checkpoint: head.json is also an output"),
        (["fit", "words.npz", "--checkpoint", "none/state"], "there is no folder none"),
        (["fit", "words.npz", "--what"], "--what"),
        (["what"], "what"),
    ],
)
def test_refusals_name_what_is_wrong(words, soft, arguments, message):
    save_good_head()
    # rich folds a usage error into a box: undo it.
    assert re.search(message, " ".join(re.sub("[│╭╮╰╯─]", " ", refused(*arguments)).split()))


def test_an_existing_head_outlives_a_fit_that_fails(words):
    save_good_head()
    np.savez("far.npz", X=FEATURES * 1e200, y=WORDS)
    assert "scale the features" in refused("fit", "far.npz", "--out", "good.safetensors", "--overwrite")
    assert SavedHead.load("good.safetensors").classes == ("a", "b", "c")


def test_an_interrupt_ends_with_130_and_leaves_nothing(words, monkeypatch):
    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("softcurve.cli.fitting.fit_head", interrupt)
    for options in ([], ["--checkpoint", "state"]):
        done = CliRunner().invoke(app, ["fit", words, *options])
        assert done.exit_code == 130
        assert re.fullmatch("softcurve: interrupted; the same command starts from the beginning[^\n]*\n", done.stderr)
        assert os.listdir() == [words]
    Path("state").write_text("of another run, for all that is known before a step")
    done = CliRunner().invoke(app, ["fit", words, "--checkpoint", "state"])
    assert (
        done.stderr == "softcurve: interrupted; state was not read yet and is unchanged; run the same command again\n"
    )


@pytest.mark.parametrize(
    ("arguments", "module", "package"),
    [
        (["fit"], "sklearn.datasets", "scikit-learn"),
        (["fit", "table.parquet"], "pyarrow.parquet", "pyarrow"),
        (["predict", "good.safetensors", "words.npz", "--out", "p.parquet"], "pyarrow.parquet", "pyarrow"),
    ],
)
def test_a_missing_package_is_named_with_its_remedy(words, arguments, module, package, monkeypatch):
    Path("table.parquet").touch()
    save_good_head()
    monkeypatch.setitem(sys.modules, module, None)
    message = refused(*arguments)
    assert f"needs {package}, " in message
    assert "pip install -e '.[fit]'" in message


def test_explain_prints_its_record_or_its_page(monkeypatch):
    record = {"page": "page.html", "ratio": float("inf"), "checks": []}
    monkeypatch.setattr(
        "softcurve.cli.explain.write_explanation", lambda out, *, seed, lang: record | {"seed": seed, "lang": lang}
    )
    shown = run_json("explain", "--out", "page.html", "--seed", 3, "--lang", "zh")
    assert shown == record | {"seed": 3, "lang": "zh", "ratio": None}
    assert run_tables("explain", "--out", "page.html").splitlines()[-1] == "page.html"


class Unlike(Group):
    """A process beside another one that has other values."""

    def __init__(self, **others):
        super().__init__()
        self.others = others

    def values(self, value):
        return [value, value | self.others]


def test_an_option_that_another_process_was_not_given_is_named():
    options = FitOptions()
    names = [each.name for each in fields(FitOptions) if each.name != "data"]
    for option in (f"--{name.replace('_', '-').replace('fit-intercept', 'intercept')}" for name in names):
        says = f"^{option} must be the same in all processes; process 0 has .*, and process 1 has other: start all with"
        with pytest.raises(DataError, match=says):
            fit_command(options, Unlike(**{option: "other"}), progress=False)


@pytest.mark.parametrize(
    ("sent", "code", "checkpoint"), [(signal.SIGINT, 130, False), (signal.SIGTERM, 143, True)], ids=["INT", "TERM"]
)
def test_an_interrupted_process_says_how_to_go_on_and_leaves_no_half_of_a_file(sent, code, checkpoint):
    np.savez("wide.npz", X=np.random.default_rng(0).normal(size=(20000, 300)), y=np.arange(20000) % 200)
    options = ["--tol", "1e-300", "--C", "1e9", "--max-iter", "1000000", "--progress"]
    options += ["--checkpoint", "state", "--checkpoint-every", "0"] if checkpoint else []
    process = subprocess.Popen(
        [sys.executable, "-m", "softcurve", "fit", "wide.npz", *options],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env=os.environ | {"FORCE_COLOR": "1", "TTY_COMPATIBLE": "1"},
    )  # fmt: skip
    assert process.stderr is not None
    shown = process.stderr.read(1)  # the progress has begun, and with it the fit
    until = time.monotonic() + 60
    while checkpoint and not os.path.exists("state") and time.monotonic() < until:
        time.sleep(0.05)
    time.sleep(0.3)
    process.send_signal(sent)
    process.send_signal(sent)  # as of a terminal and of a program that passes it on
    out, rest = process.communicate(timeout=60)
    assert process.returncode == code
    assert "Traceback" not in shown + rest
    assert out == ""
    assert sorted(os.listdir()) == [*(["state"] if checkpoint else []), "wide.npz"]
    how = "the same command starts from the beginning; --checkpoint FILE saves the state of a fit"
    how = "state has the state of the fit; the same command resumes it" if checkpoint else how
    assert rest.splitlines()[-1].endswith(f"softcurve: interrupted; {how}")  # after what clears the progress bar


@pytest.mark.parametrize("options", [("--C", "inf"), ("--path", "0.1,inf"), ("--C", "inf", "--path", "0.1,1")])
def test_a_head_without_penalty_is_saved_drawn_and_read_again(words, options):
    record = run_json("fit", words, "--holdout", 0, *options)
    assert Path(record["report"]).exists()
    assert run_json("predict", "head.safetensors", words)["rows"] == 60


@pytest.mark.parametrize(("data", "name"), [("words.npz", "words.npz"), ("shards", "shards/state.npz")])
def test_a_checkpoint_takes_no_place_of_the_data(words, data, name):
    Path("shards").mkdir()
    np.savez("shards/a.npz", features=FEATURES, target=WORDS)
    before = Path("words.npz").read_bytes()
    done = CliRunner().invoke(app, ["fit", data, "--checkpoint", name])
    assert done.exit_code == 2
    assert "--checkpoint: " + name in done.stderr
    assert Path("words.npz").read_bytes() == before
    assert os.listdir("shards") == ["a.npz"]
