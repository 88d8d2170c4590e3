"""The benchmarks of a training step and of growth run at small shapes, and the pages show the figures of one run."""

from __future__ import annotations

import contextlib
import io
import json
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch
from bench import growth, head_tables, llama, measure

ROOT = Path(__file__).resolve().parent.parent
PICTURES, PAGE, README = ROOT / "docs" / "pictures", ROOT / "docs" / "benchmarks.md", ROOT / "README.md"


@pytest.fixture
def in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Run in this process what a benchmark runs in a fresh one, whose start takes seconds."""

    def run(code: str) -> str:
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            exec(code, {})
        return printed.getvalue()

    monkeypatch.setattr(measure, "in_fresh_process", run)
    monkeypatch.setattr(head_tables, "in_fresh_process", run)


def test_the_changed_lines_train_the_same_weights():
    tokens, labels = llama.batch(llama.SMALL, 0.5)
    assert int((labels == -100).sum()) == 2 * 12
    trained = []
    for who in llama.LOSSES:
        train = llama.Training(llama.model_of(llama.SMALL, "float32"), who)
        losses = [train(tokens, labels) for _ in range(3)]
        assert losses[2] < losses[0]
        trained.append((losses, torch.cat([parameter.flatten() for parameter in train.model.parameters()])))
    start = torch.cat([parameter.flatten() for parameter in llama.model_of(llama.SMALL, "float32").parameters()])
    (losses, weights), *others = trained
    for other_losses, other_weights in others:
        assert other_losses == pytest.approx(losses, rel=1e-6)
        # AdamW divides by the root of a second moment, so a tiny gradient decides the sign of a step of 1e-4.
        assert (other_weights - weights).norm() < 1e-3 * (weights - start).norm()


@pytest.mark.usefixtures("in_this_process")
def test_the_table_of_a_training_step(capsys):
    records = llama.print_llama(llama.SMALL, 1, (0.5,))
    assert [(record["dtype"], record["who"]) for record in records] == [
        (dtype, who) for dtype in llama.DTYPES for who in llama.LOSSES
    ]
    size = sum(parameter.numel() for parameter in llama.model_of(llama.SMALL, "float32").parameters())
    for record in records:
        assert record["gradients_mb"] == size * (4 if record["dtype"] == "float32" else 2) / 2**20
        assert record["s"] > 0
        assert record["loss"] == pytest.approx(records[0]["loss"], rel=1e-2)
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| float32 | 50% | ")]
    assert len(rows) == 3


@pytest.mark.usefixtures("in_this_process")
def test_growth_is_measured_and_drawn(tmp_path, capsys):
    records = growth.print_growth(1, growth.SMALL_BASE, {"classes": (64, 512)}, chosen=("torch eager",))
    assert [(record["shape"].classes, record["who"]) for record in records] == [
        (classes, who) for classes in (64, 512) for who in ("ours", "three products", "torch eager")
    ]
    assert all(("extra_mb" in record) == (record["who"] != "three products") for record in records)
    growth.write(records, {"date": "today"}, tmp_path)
    assert str(tmp_path / "scaling_classes.svg") in capsys.readouterr().out
    first = (tmp_path / "scaling_classes.svg").read_bytes()
    words = {text.strip() for text in ElementTree.fromstring(first).itertext()}
    assert {"softcurve", "torch, logits", "three products", "seconds", "classes C", "512"} <= words
    growth.redraw(tmp_path)
    assert (tmp_path / "scaling_classes.svg").read_bytes() == first, "equal figures give equal pictures"


@pytest.mark.usefixtures("in_this_process")
def test_a_slow_peer_is_not_measured_at_larger_values(monkeypatch):
    monkeypatch.setattr(growth, "SLOW", 0.0)
    records = growth.print_growth(1, growth.SMALL_BASE, {"rows": (16, 32)}, chosen=("torch eager",))
    measured = [(record["shape"].rows, record["who"]) for record in records]
    assert measured == [(16, "ours"), (16, "three products"), (16, "torch eager"), (32, "ours"), (32, "three products")]


def test_the_page_shows_the_run_that_the_pictures_show(capsys):
    run = json.loads((PICTURES / growth.FIGURES).read_text(encoding="utf-8"))
    growth.print_records(run["scaling"])
    for record in json.loads((PICTURES / "llama.json").read_text(encoding="utf-8"))["llama"]:
        llama.print_llama_row(record)
    page = PAGE.read_text(encoding="utf-8")
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) > 40
    assert not [line for line in lines if line not in page.splitlines()]
    assert run["date"] in page
    for size in growth.GROWING:
        assert f"(pictures/scaling_{size}.svg)" in page
        assert 1000 < (PICTURES / f"scaling_{size}.svg").stat().st_size < 100_000


def test_the_readme_has_the_headline_of_that_run():
    text = README.read_text(encoding="utf-8")
    records = json.loads((PICTURES / "llama.json").read_text(encoding="utf-8"))["llama"]
    figures = {(record["dtype"], record["who"]): record for record in records if record["masked"] == llama.MASKED[0]}
    for dtype in llama.DTYPES:
        stock, lazy = figures[dtype, llama.STOCK], figures[dtype, "lazy_logits"]
        seconds = f"{stock['s']:.2f} → {lazy['s']:.2f} s | {lazy['ratio']:.2f}"
        assert f"| {dtype} | {seconds} | {stock['extra_mb']:,.0f} → {lazy['extra_mb']:,.0f} MB |" in text
