"""How time and extra memory of a cross-entropy on a head grow with the rows, the width and the classes.

The figures of a run are written as JSON, with one picture for each of the three sizes drawn from them.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from bench import head_tables
from bench.heads import Shape
from bench.tables import Record, cell, print_head, print_row, write_json

CASE = "cross-entropy"
BASE = Shape(256, 256, 32_768)
# One size of the base shape takes these values, while the two others stay.
GROWING: Mapping[str, Sequence[int]] = {
    "rows": (64, 256, 1024, 2048),
    "width": (64, 256, 1024),
    "classes": (4096, 16_384, 65_536, 262_144),
}
# Implementations that torch.compile compiles anew for each shape are in the table heads; they would take most of a run.
PEERS = ("torch eager", "torch chunked")
SLOW = 2.0  # seconds of a call, after which a peer is not measured at larger values of the same size
SMALL_BASE, SMALL = Shape(32, 16, 512), {"rows": (16, 64), "width": (8, 32), "classes": (64, 2048)}
FIGURES = "scaling.json"


def print_growth(
    repeats: int,
    base: Shape = BASE,
    growing: Mapping[str, Sequence[int]] = GROWING,
    chosen: Iterable[str] = PEERS,
) -> list[Record]:
    """Measure and print the figures of each shape; every shape is measured once."""
    print("\ncross-entropy of class indices, loss and gradients, float32; extra memory excludes the gradients\n")
    print_head(*HEAD)
    measured: dict[Shape, list[Record]] = {}
    records = []
    for size, values in growing.items():
        left = set(chosen)
        for shape in (base._replace(**{size: value}) for value in values):
            if shape not in measured:
                measured[shape] = [_short(record) for record in head_tables.figures(CASE, shape, repeats, left)]
            of_size = [{"size": size, **record} for record in measured[shape] if "note" not in record]
            left -= {record["who"] for record in of_size if record["s"] > SLOW}
            print_records(of_size)
            records += of_size
    return records


def _short(record: Record) -> Record:
    return {**record, "who": "three products" if record["who"].startswith("floor") else record["who"]}


HEAD = ("grows", "rows, width, classes", "who", "s", "ours / it", "extra MB")


def print_records(records: Iterable[Record]) -> None:
    """Print rows of the table, which docs/benchmarks.md repeats."""
    for record in records:
        shape = ", ".join(f"{value:,}" for value in record["shape"])
        cells = (cell(record, "s", ".3g"), cell(record, "ratio", ".2f"), cell(record, "extra_mb", ".0f"))
        print_row(record["size"], shape, record["who"], *cells)


def write(records: Sequence[Record], machine: Mapping[str, Any], folder: Path) -> None:
    """Write the figures and draw the pictures into a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    write_json({**machine, "scaling": records}, folder / FIGURES)
    redraw(folder)


def redraw(folder: Path) -> None:
    """Draw the pictures from the figures in the folder and print their paths."""
    from bench import pictures

    run = json.loads((folder / FIGURES).read_text(encoding="utf-8"))
    for size in dict.fromkeys(record["size"] for record in run["scaling"]):
        path = folder / f"scaling_{size}.svg"
        pictures.draw([record for record in run["scaling"] if record["size"] == size], size, path)
        print(path)
