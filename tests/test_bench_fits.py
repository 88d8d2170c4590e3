"""The benchmark of fits: it runs from end to end, and judges and limits what it runs."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def in_the_repository(monkeypatch: pytest.MonkeyPatch) -> None:
    """The benchmarks are not installed; the processes that they start find them in the working directory."""
    monkeypatch.chdir(ROOT)
    monkeypatch.syspath_prepend(str(ROOT))


@pytest.mark.slow
def test_prints_a_table_and_then_its_figures_as_json(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    from bench.__main__ import main

    path = tmp_path / "fits.json"
    arguments = "fits --quick --repeats 1 --problem soft-labels --dtype float64 --who softcurve --who lbfgs --limit 60"
    monkeypatch.setattr(sys, "argv", ["bench", *arguments.split(), "--json", str(path)])
    main()
    printed = capsys.readouterr().out.splitlines()
    figures = json.loads(printed[-1])
    assert figures == json.loads(path.read_text(encoding="utf-8"))
    ours, theirs = figures["fits"]
    assert sum(line.startswith("| soft-labels | float64 | ") for line in printed) == 2
    for record, who in ((ours, "softcurve"), (theirs, "lbfgs")):
        assert record["who"] == who
        assert record["shape"] == [300, 12, 5]
        assert record["runs"] == 1
        assert 0 < record["s"] < 60
        assert record["gradient"] <= 1e-6
        assert record["iterations"] > 0
    assert theirs["ratio"] == ours["s"] / theirs["s"]
    # Scikit-learn's weighted copies of a row and our distributions are the same problem.
    assert ours["objective"] == pytest.approx(theirs["objective"], abs=1e-8)
    assert min(ours["above_best"], theirs["above_best"]) == 0


@pytest.mark.slow
def test_a_fit_beyond_the_limit_is_ended() -> None:
    from bench import fits

    (record,) = fits.figures("digits", "float64", ["lbfgs"], repeats=2, limit=1e-3, small=True)
    assert record["note"] == "> 0.001 s"
    assert "s" not in record


def test_a_hessian_that_is_too_large_is_not_tried() -> None:
    from bench import fits
    from bench.problems import PROBLEMS

    reasons = {name: fits._unfit("newton-cholesky", problem.shape, "float64") for name, problem in PROBLEMS.items()}
    refused = {"rare-classes", "masked-words", "text-words", "text-bigrams"}
    assert {name for name, reason in reasons.items() if reason} == refused
    assert reasons["rare-classes"] == "skipped: a Hessian matrix of 533 GB"


def test_sparse_rows_of_text_are_judged_as_their_dense_copy() -> None:
    from bench.problems import PROBLEMS, Shape, judge

    rows, labels = PROBLEMS["text-bigrams"].make(Shape(120, 40, 4))
    assert rows.shape[1] == 40
    assert np.bincount(labels).tolist() == [30] * 4
    weight, bias = np.random.default_rng(0).normal(size=(4, 40)), np.arange(4.0)
    assert judge(rows, labels, 0.1, weight, bias) == pytest.approx(judge(rows.toarray(), labels, 0.1, weight, bias))


@pytest.mark.parametrize("name", ["dense-text", "masked-words"])
def test_reduced_text_has_rows_of_norm_one_and_classes_of_equal_size(name: str) -> None:
    from bench.problems import PROBLEMS, Shape

    rows, labels = PROBLEMS[name].make(Shape(120, 7, 4))
    assert rows.shape == (120, 7)
    assert np.bincount(labels).tolist() == [30] * 4
    norms = np.linalg.norm(rows, axis=1)
    assert (norms == pytest.approx(1.0)) or set(norms.round(12)) == {0.0, 1.0}
    assert np.linalg.matrix_rank(rows) == 7


@pytest.mark.parametrize("kind", ["labels", "distributions"])
def test_the_judge_takes_the_gradient_of_its_objective(kind: str) -> None:
    from bench.problems import judge

    rng = np.random.default_rng(0)
    rows, weight, bias = rng.normal(size=(7, 3)), rng.normal(size=(4, 3)), rng.normal(size=4)
    target = rng.integers(4, size=7) if kind == "labels" else rng.dirichlet(np.ones(4), size=7)

    def objective(head: np.ndarray) -> float:
        return judge(rows, target, 0.3, head[:, :3], head[:, 3])["objective"]

    head = np.column_stack([weight, bias])
    steps = 1e-5 * np.eye(head.size).reshape(-1, *head.shape)
    differences = [(objective(head + step) - objective(head - step)) / 2e-5 for step in steps]
    assert judge(rows, target, 0.3, weight, bias)["gradient"] == pytest.approx(np.abs(differences).max(), rel=1e-8)
    logits = rows @ weight.T + bias
    p = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    y = np.eye(4)[target] if kind == "labels" else target
    truth = -(y * np.log(p)).sum() / 7 + 0.15 * (weight**2).sum()
    assert objective(head) == pytest.approx(truth, rel=1e-13)


def fitted(gradient_at: Callable[[float], float], iterations_at: Callable[[float], int]) -> Callable[[float], Any]:
    def fit(tol: float) -> dict[str, Any]:
        return {"seconds": tol, "gradient": gradient_at(tol), "iterations": iterations_at(tol)}

    return fit


def test_the_tolerance_falls_until_the_gradient_is_wanted() -> None:
    from bench import fits

    record = fits._first_within(fitted(lambda tol: 5 * tol, lambda tol: round(1 / tol)))
    assert record["tol"] == pytest.approx(1e-6 / 9)
    assert record["seconds"] == [record["tol"]]
    assert "note" not in record


def test_a_solver_that_stays_away_from_the_minimum_is_said_to() -> None:
    from bench import fits

    asked: list[float] = []

    def iterations(tol: float) -> int:
        asked.append(tol)
        return 8

    assert fits._first_within(fitted(lambda tol: 2e-6, iterations))["note"] == "not reached (gradient 2.0e-06)"
    assert len(asked) == 2
    slow = fitted(lambda tol: 2e-6 + tol, lambda tol: round(1 / tol))
    record = fits._first_within(lambda tol: slow(tol) if tol > 1e-7 else {"note": "> 600 s"})
    assert record["note"] == "not reached (gradient 2.1e-06); at 3.7e-08 > 600 s"
