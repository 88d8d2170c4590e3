"""Print tables: ``python -m bench``, or ``logits heads log_probs curvature exactness llama fits gpu scaling``.

``fits``, ``gpu`` and ``scaling`` run only if they are named. The fits take hours, because the slowest solvers have a
limit of ten minutes each. ``gpu`` measures on a CUDA device and has its own options (``python -m bench gpu --help``).
``scaling`` first prints how the cost of a step depends on the number of processes, as the cost model in docs/scaling.md
predicts it. It then measures how time and memory grow with rows, width and classes, which takes some minutes, and
writes figures and pictures into docs/pictures; with ``--redraw`` it only draws the figures that are there.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

from bench import curvature, exactness, fits, growth, head_tables, heads, llama, logits, measure, peers, scaling, tables
from bench.gpu import table as gpu
from bench.heads import CASES, Shape
from bench.measure import in_fresh_process, interleaved, median_ratio, relative_error
from bench.problems import PROBLEMS
from bench.tables import Record, cell, print_head, print_row


def main() -> None:
    """Print the selected tables."""
    if sys.argv[1:2] == ["gpu"]:
        sys.exit(gpu.main(sys.argv[2:]))
    options = _options()
    if options.processor_time:
        measure.use_processor_time()
    machine = tables.machine() | {"seconds": "processor time" if options.processor_time else "elapsed time"}
    print(", ".join(f"{name} {value}" for name, value in machine.items()))
    printed: dict[str, list[Record]] = {}
    if options.table in ("all", "logits"):
        printed["logits"] = print_logits(options.rows, options.classes, options.repeats)
        printed["logits of other shapes"] = print_other_logits(options.repeats)
    for table in ("heads", "log_probs"):
        if options.table in ("all", table):
            chosen = options.case or CASES
            names = [name for name in chosen if (name in heads.LOG_PROBS) == (table == "log_probs")]
            rows = [(name, shape) for name in names for shape in options.shape or CASES[name].shapes]
            printed[table] = head_tables.print_heads(rows, options.repeats)
            budgeted = [name for name in names if name in heads.BUDGETED]
            rows = [(name, shape) for name in budgeted for shape in options.shape or heads.BUDGETED[name]]
            printed[f"{table} in a budget"] = head_tables.print_heads_in_a_budget(rows)
    if options.table in ("all", "curvature"):
        printed["curvature"] = print_curvature(options.shape, min(options.repeats, 5))
        printed["curvature in a budget"] = print_curvature_in_a_budget(options.shape)
    if options.table in ("all", "exactness"):
        printed["exactness"] = print_exactness()
    if options.table in ("all", "llama"):
        printed["llama"] = llama.print_llama(llama.SMALL if options.quick else llama.SIZE, options.repeats)
    if options.table == "fits":
        printed["fits"] = fits.print_fits(
            options.problem or tuple(PROBLEMS),
            options.dtype or fits.DTYPES,
            options.who or fits.CONTESTANTS,
            repeats=options.repeats,
            limit=options.limit,
            small=options.quick,
        )
    if options.table == "scaling":
        scaling.print_scaling()
        if not options.redraw:
            sizes = (growth.SMALL_BASE, growth.SMALL) if options.quick else (growth.BASE, growth.GROWING)
            printed["scaling"] = growth.print_growth(options.repeats, *sizes)
            growth.write(printed["scaling"], machine, options.pictures)
        else:
            growth.redraw(options.pictures)
    if options.json:
        print(f"\n{tables.write_json(machine | printed, options.json)}")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    choices = ("all", "logits", "heads", "log_probs", "curvature", "exactness", "llama", "fits", "gpu", "scaling")
    parser.add_argument(
        "table", nargs="?", choices=choices, default="all", help="all but fits, gpu and scaling by default"
    )
    rounds = f"number of rounds, each of which runs every contestant once [default: 9, or {fits.REPEATS} for fits]"
    parser.add_argument("--repeats", type=int, help=rounds)
    parser.add_argument("--rows", type=int, default=4096, help="rows of the dense logits")
    parser.add_argument("--classes", type=int, default=10_000, help="classes of the dense logits")
    parser.add_argument("--case", action="append", choices=tuple(CASES), help="case of the head; may be repeated")
    seconds = "measure processor time, on a machine that other processes use; with OMP_NUM_THREADS=1"
    parser.add_argument("--processor-time", action="store_true", help=seconds)
    shape = "shape of the head; may be repeated"
    parser.add_argument("--shape", action="append", type=_shape, metavar="N,d,C", help=shape)
    parser.add_argument("--problem", action="append", choices=tuple(PROBLEMS), help="problem to fit; may be repeated")
    parser.add_argument("--dtype", action="append", choices=fits.DTYPES, help="dtype of the fits; may be repeated")
    parser.add_argument("--who", action="append", choices=fits.CONTESTANTS, help="solver of the fits; may be repeated")
    limit = "time limit of a fit, after which it is killed"
    parser.add_argument("--limit", type=float, default=fits.LIMIT, metavar="SECONDS", help=limit)
    parser.add_argument("--quick", action="store_true", help="use small shapes and three rounds, to test the benchmark")
    pictures = "folder of the figures and pictures of scaling [default: docs/pictures, or build/pictures with --quick]"
    parser.add_argument("--pictures", type=Path, metavar="FOLDER", help=pictures)
    parser.add_argument(
        "--redraw", action="store_true", help="draw the figures in that folder again, and measure nothing"
    )
    parser.add_argument("--json", type=Path, metavar="PATH", help="write all figures to PATH and print them at the end")
    options = parser.parse_args()
    if options.table == "gpu":
        parser.error("gpu must be the first argument and has its own options: python -m bench gpu --help")
    if options.pictures is None:
        options.pictures = Path("build/pictures" if options.quick else "docs/pictures")
    if options.repeats is None:
        options.repeats = 3 if options.quick else fits.REPEATS if options.table == "fits" else 9
    if options.quick:
        options.rows, options.classes = 64, 1000
        options.shape = [Shape(options.rows, 16, options.classes)]
    return options


def _shape(text: str) -> Shape:
    rows, width, classes = map(int, text.split(","))
    return Shape(rows, width, classes)


# --- curvature --------------------------------------------------------------------------------------------------------


def print_curvature(shapes: Sequence[Shape] | None, repeats: int) -> list[Record]:
    """Print the table of second-order products and of the closed forms of a head."""
    print("\nsecond-order matrices of two layers and a head, (rows, width, classes) float32\n")
    print_head("what", "shape", "columns", "who", "s", "ours / it", "extra MB", "vector MB")
    records: list[Record] = []
    for shape in shapes or [curvature.SHAPE]:
        shape = curvature.Shape(*shape)
        for matrix, columns in (("Gauss-Newton", 1), ("Gauss-Newton", 10), ("Hessian", 1)):
            records += _product_figures(matrix, columns, shape, repeats)
        records += _head_figures(shape, repeats)
    if shapes is None:
        records += _eigenvalue_figures(min(repeats, 3))
    return records


def _eigenvalue_figures(repeats: int) -> Iterator[Record]:
    shape = curvature.Shape(math.prod(curvature.TOKENS), curvature.WIDTH, curvature.VOCABULARY)
    seconds = interleaved(curvature.eigenvalue_runs(), repeats)
    for name in seconds:
        record: Record = {"what": f"eigsh({curvature.EIGENVALUES}), transformer", "shape": shape, "columns": ""}
        record |= {"who": name, "s": median(seconds[name])}
        if name != curvature.OURS:
            record["ratio"] = median_ratio(seconds[curvature.OURS], seconds[name])
        _print_curvature_row(record)
        yield record


def _product_figures(matrix: str, columns: int, shape: curvature.Shape, repeats: int) -> Iterator[Record]:
    who = {curvature.OURS: f"{columns} column(s)", curvature.PEER: ""}
    products = (1 + 4 * columns) if matrix == "Gauss-Newton" else (1 + 6 * columns)
    runs: dict[str, Any] = {f"floor, {products} products": curvature.floor(shape, products)}
    notes = {}
    for name in who:
        try:
            runs[name] = curvature.prepared(matrix, name, columns, shape)
        except Exception as error:
            notes[name] = peers.reason(error)
    if columns > 1:
        runs["softcurve, 1 column"] = curvature.prepared(matrix, curvature.OURS, 1, shape)
    seconds = interleaved(runs, repeats)
    for name in (curvature.OURS, *(run for run in runs if run not in who), curvature.PEER):
        record: Record = {"what": f"{matrix} product", "shape": shape, "columns": columns, "who": name}
        if name in seconds:
            record["s"] = median(seconds[name])
            record["ratio"] = median_ratio(seconds[curvature.OURS], seconds[name])
        if name in who:
            record |= {"note": notes[name]} if name in notes else curvature.memory(matrix, name, columns, shape)
        _print_curvature_row(record)
        yield record


def _head_figures(shape: curvature.Shape, repeats: int) -> Iterator[Record]:
    seconds = interleaved(curvature.head_runs(shape), repeats)
    for name in seconds:
        record: Record = {"what": "head alone", "shape": shape, "columns": "", "who": name, "s": median(seconds[name])}
        if name != "loss + gradients":
            record["who"] = f"{name}, relative to loss + gradients"
            record["ratio"] = median_ratio(seconds[name], seconds["loss + gradients"])
        _print_curvature_row(record)
        yield record


def _print_curvature_row(record: Record) -> None:
    print_row(
        record["what"],
        str(record["shape"]),
        str(record["columns"]),
        record["who"],
        record.get("note") or f"{record['s']:.3f}",
        cell(record, "ratio", ".2f"),
        cell(record, "extra_mb", ".0f"),
        cell(record, "vector_mb", ".0f"),
    )


def print_curvature_in_a_budget(shapes: Sequence[Shape] | None) -> list[Record]:
    """Print the extra memory of products for increasing numbers of classes, with a memory budget."""
    print(f"\nmemory of a product with memory_budget = {curvature.BUDGET // 2**20} MB\n")
    print_head("matrix", "shape", "who", "extra MB", "vector MB", "extra MB without the result")
    records: list[Record] = []
    for matrix in curvature.MATRICES:
        for shape in shapes or curvature.GROWING:
            shape = curvature.Shape(*shape)
            record: Record = {"matrix": matrix, "shape": shape, "who": curvature.OURS}
            record |= curvature.memory(matrix, curvature.OURS, 1, shape, curvature.BUDGET)
            record["beyond_mb"] = record["extra_mb"] - record["vector_mb"]
            cells = (cell(record, column, ".0f") for column in ("extra_mb", "vector_mb", "beyond_mb"))
            print_row(matrix, str(shape), curvature.OURS, *cells)
            records.append(record)
    return records


# --- dense logits -----------------------------------------------------------------------------------------------------


def print_logits(rows: int, classes: int, repeats: int) -> list[Record]:
    """Print seconds, extra memory and error of the loss and gradient (or HVP) of each case."""
    print(f"\nforward and backward, ({rows}, {classes}) float32; extra memory includes the gradient\n")
    print_head("loss", "ours s", "torch s", "ratio", "ours MB", "torch MB", "ours error", "torch error")
    records: list[Record] = []
    for index, case in enumerate(logits.CASES):
        z, target = logits.inputs((rows, classes), case.soft)
        runs = {
            "ours": partial(logits.step, case.ours, z, target, case.order),
            "torchs": partial(logits.step, case.torchs, z, target, case.order),
        }
        seconds = interleaved(runs, repeats)
        s = {side: median(values) for side, values in seconds.items()}
        ratio = median_ratio(seconds["ours"], seconds["torchs"])
        mb = {side: _extra_memory(index, side, rows, classes) for side in runs}
        errors = _errors(case, rows // 16, classes)
        print_row(
            case.name,
            *(f"{s['ours']:.3f}", f"{s['torchs']:.3f}", f"{ratio:.2f}", f"{mb['ours']:.0f}", f"{mb['torchs']:.0f}"),
            *(f"{errors['ours']:.1e}", f"{errors['torchs']:.1e}"),
        )
        records.append({"loss": case.name, "s": s, "ratio": ratio, "extra_mb": mb, "error": errors})
    return records


def print_other_logits(repeats: int) -> list[Record]:
    """Print milliseconds of the loss and gradient of each case at small shapes and in torch's layout."""
    print("\nforward and backward, float32; (N, C), and (N, C, H, W) with dim=1\n")
    print_head("loss", "shape", "ours ms", "torch ms", "ratio")
    records: list[Record] = []
    for shape in logits.SHAPES:
        for case in (case for case in logits.CASES if case.order == 1):
            z, target = logits.inputs(shape, case.soft)
            number = max(1, 2**18 // z.numel())
            runs = {
                "ours": partial(logits.steps, number, case.ours, z, target),
                "torchs": partial(logits.steps, number, case.torchs, z, target),
            }
            seconds = interleaved(runs, repeats)
            ms = {side: 1e3 * median(values) / number for side, values in seconds.items()}
            ratio = median_ratio(seconds["ours"], seconds["torchs"])
            print_row(case.name, str(shape), f"{ms['ours']:.3f}", f"{ms['torchs']:.3f}", f"{ratio:.2f}")
            records.append({"loss": case.name, "shape": shape, "ms": ms, "ratio": ratio})
    return records


def _extra_memory(index: int, side: str, rows: int, classes: int) -> float:
    code = (
        "from bench import logits, measure\n"
        f"case = logits.CASES[{index}]\n"
        "logits.step(case.ours, *logits.inputs((4, 50), case.soft), case.order)\n"
        "logits.step(case.torchs, *logits.inputs((4, 50), case.soft), case.order)\n"
        f"z, target = logits.inputs(({rows}, {classes}), case.soft)\n"
        f"print(measure.extra_peak_of(lambda: logits.step(case.{side}, z, target, case.order)))\n"
    )
    return float(in_fresh_process(code))


def _errors(case: logits.Case, rows: int, classes: int) -> dict[str, float]:
    """Return ``‖g − g64‖ / ‖g64‖`` of the gradient (or HVP), where g64 is torch's result in float64."""
    z, target = logits.inputs((rows, classes), case.soft)
    wide = z.detach().double().requires_grad_()
    truth = logits.step(case.torchs, wide, target.double() if case.soft else target, case.order)
    losses = {"ours": case.ours, "torchs": case.torchs}
    return {side: relative_error(logits.step(loss, z, target, case.order), truth) for side, loss in losses.items()}


# --- exactness --------------------------------------------------------------------------------------------------------


def print_exactness() -> list[Record]:
    """Print relative errors in cases in which the textbook formula cancels."""
    print("\nrelative errors in float32 where the textbook formula cancels\n")
    print_head("what", "truth", "ours", "torch", "ours' error", "torch's error")
    records: list[Record] = []
    for what, truth, ours, torchs in exactness.confident_rows() + exactness.nearly_equal():
        errors = {"ours": abs(ours / truth - 1), "torchs": abs(torchs / truth - 1)}
        print_row(what, f"{truth:.7e}", f"{ours:.7e}", f"{torchs:.7e}", *(f"{e:.1e}" for e in errors.values()))
        records.append({"what": what, "truth": truth, "ours": ours, "torchs": torchs, "error": errors})
    return records


if __name__ == "__main__":
    main()
