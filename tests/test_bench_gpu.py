"""The benchmark of CUDA devices, on the CPU: what it says of whoever is wrong, fails, or takes too long."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

ROOT = Path(__file__).parents[1]
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def in_the_repository(monkeypatch: pytest.MonkeyPatch) -> None:
    """The benchmarks are not installed."""
    monkeypatch.chdir(ROOT)
    monkeypatch.syspath_prepend(str(ROOT))


@pytest.fixture
def plant(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Peers of the cross-entropy in the place of the libraries."""

    def planted(**losses: Callable[..., Tensor]) -> None:
        from bench.gpu import peers

        by_case = {"cross-entropy": losses, "forward-kl": {}, "js": {}}
        monkeypatch.setattr(peers, "LOSSES", by_case)

    return planted


def right(e: Tensor, w: Tensor, target: Tensor) -> Tensor:
    """In float64; the gradients alone are rounded."""
    return torch.nn.functional.cross_entropy(e.double() @ w.double().T, target)


def fails(message: str, kind: type[Exception] = RuntimeError) -> Callable[..., Tensor]:
    def loss(*_: Tensor) -> Tensor:
        raise kind(message)

    return loss


def sleeps(*_: Tensor) -> Tensor:
    time.sleep(30)
    raise AssertionError("nobody ended this")


def pulled(e: Tensor, w: Tensor, target: Tensor, *, of_features: float = 0.0, of_weight: float = 0.0) -> Tensor:
    """The right loss; row 3 of a gradient is off by so much in its first entry."""
    pull = of_features * e[3, 0].double() + of_weight * w[3, 0].double()
    return right(e, w, target) + pull - pull.detach()


def run(tmp_path: Path, *arguments: str) -> tuple[int, dict[str, Any]]:
    from bench.gpu.table import main

    path = tmp_path / "gpu.json"
    code = main(["--together", "--device", "cpu", "--shapes", "tiny", "--rounds", "2", "--out", str(path), *arguments])
    return code, json.loads(path.read_text(encoding="utf-8"))


def among(*names: str) -> list[str]:
    return [part for name in names for part in ("--who", name)]


def by_name(case: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {record["who"]: record for record in case["records"]}


def test_without_a_device_one_line_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    import sys

    from bench.__main__ import main

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["bench", "gpu", "--out", str(tmp_path / "none.json")])
    with pytest.raises(SystemExit) as ended:
        main()
    captured = capsys.readouterr()
    assert ended.value.code == 2
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    assert "no CUDA device" in captured.err
    assert not list(tmp_path.iterdir())


def test_table_and_json_agree_in_every_case(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, report = run(tmp_path, *among("softcurve", "torch eager"))
    assert code == 0
    assert {"commit", "changed", "versions", "python", "device", "state"} <= report["machine"].keys()
    lines = [line.strip("| ").split(" | ") for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    header, rows = lines[0], lines[2:]
    table = {(cells[0], cells[2]): dict(zip(header, cells, strict=False)) for cells in rows}
    records = {(case["case"], record["who"]): record for case in report["cases"] for record in case["records"]}
    assert table.keys() == records.keys()
    assert {name for name, _ in records} == {"cross-entropy", "forward-kl", "js"}
    for key, record in records.items():
        shown = table[key]
        if "s" in record:
            assert len(record["seconds"]) == 2
            assert float(shown["ms"]) == pytest.approx(1e3 * record["s"], abs=5e-4)
            assert float(shown["/ floor"]) == pytest.approx(record["over_floor"], abs=5e-4)
            assert float(shown["ours / it"]) == pytest.approx(record["ratio"], abs=5e-4)
        if "error" in record:
            assert float(shown["loss error"]) == pytest.approx(record["error"]["loss"], rel=0.05)
            for column, gradient in (("dE", "features"), ("dW", "weight")):
                for suffix, kind in (("", "norm"), (" entry", "entry"), (" row", "row")):
                    assert float(shown[column + suffix]) == pytest.approx(record["error"][gradient][kind], rel=0.05)
    for case in report["cases"]:
        figures = by_name(case)
        assert figures["softcurve"]["ratio"] == 1
        assert figures["softcurve"]["error"]["features"]["norm"] < 2**-8
        assert figures["softcurve"]["error"]["weight"]["norm"] < 2**-8
        assert "extra_mb" not in figures["softcurve"]
        assert case["gradients_mb"] == (64 * 32 + 500 * 32) * 2 / 2**20


def test_whoever_is_wrong_shows_it(tmp_path: Path, plant: Callable[..., None]) -> None:
    from functools import partial

    plant(
        right=right,
        loud=lambda *given: 1.01 * right(*given),
        row=partial(pulled, of_features=0.5),
        cls=partial(pulled, of_weight=0.25),
        nan=lambda *given: math.nan * right(*given),
    )
    code, report = run(tmp_path, "--case", "cross-entropy", *among("softcurve", "right", "loud", "row", "cls", "nan"))
    assert code == 0
    errors = {who: record.get("error") for who, record in by_name(report["cases"][0]).items()}
    best = errors["float64, rounded"]
    assert errors["right"]["loss"] < 1e-14
    for gradient in ("features", "weight"):
        # Rounded once from float64, by truth and peer alike.
        assert errors["right"][gradient] == pytest.approx(best[gradient], rel=1e-3)
        assert best[gradient]["row"] < 2**-8
        assert errors["loud"][gradient]["norm"] == pytest.approx(0.01, rel=0.1)
        assert math.isnan(errors["nan"][gradient]["norm"])
        assert math.isnan(errors["nan"][gradient]["entry"])
        assert math.isnan(errors["nan"][gradient]["row"])
    assert errors["loud"]["loss"] == pytest.approx(0.01, rel=1e-9)
    assert math.isnan(errors["nan"]["loss"])
    # A wrong row is seen beside its own norm and beside the largest entry, and in its own gradient alone.
    for who, pull, own, other in (("row", 0.5, "features", "weight"), ("cls", 0.25, "weight", "features")):
        assert errors[who]["loss"] < 1e-14
        assert errors[who][other] == errors["right"][other]
        truth = truth_of_tiny()[own]
        assert errors[who][own]["entry"] == pytest.approx(pull / truth.abs().max().item(), rel=0.01)
        assert errors[who][own]["row"] == pytest.approx(pull / truth[3].norm().item(), rel=0.01)
        assert errors[who][own]["norm"] == pytest.approx(pull / truth.norm().item(), rel=0.01)


def truth_of_tiny() -> dict[str, Tensor]:
    from bench.gpu import inputs
    from bench.gpu.table import TINY

    given = inputs.of_cross_entropy(TINY, CPU, torch.bfloat16).in_float64()
    gradients = torch.autograd.grad(right(*given.wanted, *given.target), given.wanted)
    return dict(zip(("features", "weight"), gradients, strict=True))


def test_whoever_cannot_do_it_has_a_row_that_says_so(
    tmp_path: Path, plant: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    plant(
        full=fails("CUDA out of memory. Tried to allocate 31 GiB.", torch.OutOfMemoryError),
        broken=fails("no | such\nkernel"),
        slow=sleeps,
        right=right,
    )
    names = ("softcurve", "full", "broken", "slow", "right")
    code, report = run(tmp_path, "--case", "cross-entropy", "--limit", "1", *among(*names))
    assert code == 0
    records = by_name(report["cases"][0])
    assert records["full"]["note"] == "out of memory"
    assert records["broken"]["note"] == "fails: RuntimeError: no / such"
    assert records["slow"]["note"] == "> 1 s to prepare"
    assert records["right"]["s"] > 0
    assert "| broken | fails: RuntimeError: no / such |" in capsys.readouterr().out


def test_ours_failing_is_a_row_and_an_exit_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from bench.gpu import peers

    monkeypatch.setattr(peers, "contestants", lambda name: {"softcurve": fails("ours"), "right": right})
    code, report = run(tmp_path, "--case", "cross-entropy")
    assert code == 1
    records = by_name(report["cases"][0])
    assert records["softcurve"]["note"] == "fails: RuntimeError: ours"
    assert records["right"]["over_floor"] > 0
    assert "ratio" not in records["right"]


def test_when_the_time_is_up_nobody_is_prepared(tmp_path: Path) -> None:
    code, report = run(tmp_path, "--case", "js", "--total", "0", *among("softcurve"))
    assert code == 1
    assert by_name(report["cases"][0])["softcurve"]["note"] == "not run: the time was up"


def test_a_case_that_fails_as_a_whole_is_a_row_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from bench.gpu.truth import Truth

    monkeypatch.setattr(Truth, "of", fails("device lost"))
    code, report = run(tmp_path, *among("softcurve"))
    assert code == 1
    assert [case["records"] for case in report["cases"]] == [
        [{"who": "all", "note": "fails: RuntimeError: device lost"}]
    ] * 3


def test_who_ran_once_and_then_fails_is_left_out_of_the_rounds() -> None:
    from bench.gpu.devices import Cpu
    from bench.gpu.figures import _in_rounds

    calls = iter([None, None])
    seconds, notes = _in_rounds({"tired": lambda: next(calls), "right": lambda: None}, Cpu(), 3)
    assert notes.keys() == {"tired"}
    assert len(seconds["right"]) == 3


def test_extra_memory_is_beyond_inputs_and_results(plant: Callable[..., None]) -> None:
    from bench.gpu.devices import Cpu
    from bench.gpu.figures import Effort, figures
    from bench.gpu.limits import Deadline
    from bench.gpu.table import TINY

    class Counting(Cpu):
        """Seven megabytes while it runs; two of them stay."""

        now = 100 * 2**20

        def allocated(self) -> int:
            return self.now

        def with_peak(self, run: Callable[[], tuple[Tensor, ...]]) -> tuple[tuple[Tensor, ...], int]:
            results = run()
            peak = self.now + 7 * 2**20 + sum(result.nbytes for result in results)
            self.now += 2 * 2**20
            return results, peak

    plant(right=right)
    case = figures("cross-entropy", TINY, Counting(), Effort(1, ("softcurve", "right"), 60, Deadline(60)))
    for who in ("softcurve", "right"):
        record = by_name(case)[who]
        assert record["extra_mb"] == pytest.approx(7)
        assert record["kept_mb"] == pytest.approx(2)
        assert record["results_mb"] == pytest.approx(case["gradients_mb"], abs=1e-4)


def test_a_device_is_asked_for_events_and_its_allocators_peak(monkeypatch: pytest.MonkeyPatch) -> None:
    from bench.gpu.devices import Cuda

    done: list[str] = []

    class Event:
        def __init__(self, *, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            done.append("record")

        def synchronize(self) -> None:
            done.append("wait")

        def elapsed_time(self, end: Event) -> float:
            return 250.0

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: done.append("all"))
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: done.append("reset"))
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: 5)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 9)
    meter = Cuda()

    def ran() -> tuple[Tensor, ...]:
        done.append("run")
        return ()

    assert meter.seconds(ran) == 0.25
    assert done == ["all", "record", "run", "record", "wait"]
    done.clear()
    assert meter.with_peak(ran) == ((), 9)
    assert done == ["all", "reset", "run", "all"]
    assert meter.allocated() == 5


@pytest.mark.parametrize("name", ["cross-entropy", "forward-kl", "js"])
def test_the_truth_is_that_of_the_dense_loss(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from bench.gpu import truth
    from bench.gpu.figures import CASES
    from bench.heads import CASES as HEADS
    from bench.heads import Shape

    monkeypatch.setattr(truth, "ENTRIES", 24 * 7)  # tiles of seven classes, and a rest
    given = CASES[name].inputs(Shape(24, 20, 45), CPU, torch.bfloat16)
    found = truth.Truth.of(CASES[name].terms, given)
    exact = given.in_float64()
    loss = HEADS[name].dense(*exact.wanted, *exact.target)
    gradients = torch.autograd.grad(loss, exact.wanted)
    torch.testing.assert_close(found.loss, loss.detach(), rtol=1e-12, atol=0)
    for ours, theirs in zip((found.of_features, found.of_weight), gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-15)


def test_rows_are_of_all_confidences_and_some_are_ignored() -> None:
    from bench.gpu import inputs
    from bench.heads import Shape

    given = inputs.of_cross_entropy(Shape(512, 256, 2000), CPU, torch.bfloat16).in_float64()
    (e, w), (labels,) = given.wanted, given.target
    assert int((labels == inputs.IGNORE_INDEX).sum()) == 32
    kept = labels >= 0
    losses = torch.nn.functional.cross_entropy(e[kept] @ w.T, labels[kept], reduction="none").detach()
    for low, high in ((0, 1e-6), (1e-6, 1e-3), (1e-3, 0.1), (0.1, 3), (3, 30)):
        assert ((losses > low) & (losses <= high)).double().mean() > 0.05
    frequent = labels[kept].bincount(minlength=2000)[:20].sum()
    assert frequent > kept.sum() / 5
