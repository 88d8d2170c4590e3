"""docs/scaling.md says what bench/scaling.py computes; the processes of sharded_training.py hold that to counts."""

from __future__ import annotations

from pathlib import Path

from bench import scaling

DOCS = Path(__file__).resolve().parent.parent / "docs" / "scaling.md"


def test_the_page_has_the_table_that_is_printed(capsys):
    scaling.print_scaling()
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert len(lines) == 2 + len(scaling.MESHES)
    page = DOCS.read_text().splitlines()
    assert all(line in page for line in lines)


def test_the_rates_are_those_that_the_page_names():
    machine, step = scaling.Machine(), scaling.MILLION
    assert (machine.operations, machine.near, machine.far, machine.latency) == (700e12, 450e9, 50e9, 20e-6)
    assert (step.rows, step.width, step.classes) == (4_194_304, 8192, 1_048_576)


def test_a_step_by_hand():
    step = scaling.Step(rows=100, width=10, classes=1000, by_rows=3, by_classes=7, tile=16)
    assert (step.own_rows, step.own_classes, step.tiles) == (34, 143, 3)
    assert step.product == 2 * 34 * 10 * 143
    assert scaling.of_gradients(step) == [4 * 34 * 10, 2 * 143 * 10]
    assert scaling.on_the_wire(700, 7) == 1200
    found = scaling.predicted(step, scaling.Machine(operations=1e9, near=1e6, far=1e3, node=8, latency=0.5))
    assert found["products"] == 3 * step.product / 1e9
    # Two messages for each of three tiles, of 8 and 16 bytes a row.
    assert abs(found["statistics"] - (2 * 24 * 34 * 6 / 7 / 1e6 + 6 * 0.5)) < 1e-12
    assert abs(found["weight"] - (2 * 2860 * 2 / 3 / 1e3 + 0.5)) < 1e-12
