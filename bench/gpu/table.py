"""Benchmark the losses on features and a head on a CUDA device; print a table and write all figures to a JSON file."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from bench.gpu import apart
from bench.gpu.devices import DEVICES, Cpu, software
from bench.gpu.figures import CASES, FEWEST, LONG, ROUNDED, Effort, figures
from bench.gpu.limits import Deadline
from bench.gpu.peers import OURS, contestants, reason
from bench.heads import Shape
from bench.tables import Record, cell, print_head, print_row, write_json

TINY = Shape(64, 32, 500)
COLUMNS = (
    *("case", "shape", "who", "ms", "spread", "/ floor", "ours / it", "extra MB"),
    *("loss error", "dE", "dE entry", "dE row", "dW", "dW entry", "dW row"),
)
ABOUT = f"""
Loss and both gradients in bfloat16. Times are medians over interleaved rounds, measured with CUDA events. The spread is
the interquartile range divided by the median. Ratios are medians of the ratios of all rounds. The floor is the time of
matrix products of the same shapes into preallocated buffers. Extra memory is measured by torch's allocator; it excludes
inputs and results and includes memory that is kept between calls. Errors are relative to float64. For the gradients
with respect to features (dE) and weight (dW) they are: the error in norm, the worst entry relative to the largest
entry, and the worst error of a row relative to its norm. "{ROUNDED}" is the error of rounding the exact result."""


def main(arguments: Sequence[str]) -> int:
    """Return 0 if softcurve was measured in all cases, 1 if not, and 2 without the device."""
    options = _options(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        print("python -m bench gpu: no CUDA device; --device cpu runs small shapes on the CPU", file=sys.stderr)
        return 2
    meter = DEVICES[options.device]()
    report: dict[str, Any] = {"machine": meter.describe() | software() | {"state": meter.state()}}
    report |= {"rounds": options.rounds, "limit": options.limit, "total": options.total, "cases": []}
    deadline = Deadline(options.total, options.since)
    effort = Effort(options.rounds, options.who or (), options.limit, deadline, options.long)
    print(f"{report['machine']['device']}, torch {torch.__version__}, {report['machine']['versions']}")
    print(f"{ABOUT}\n", flush=True)
    print_head(*COLUMNS)
    rows = list(_rows(options))
    for n, (name, shape) in enumerate(rows):
        if options.together:
            record = _attempted(name, shape, meter, effort)
        elif deadline.left() > 0:
            seconds = apart.share_of(deadline, len(rows) - n)
            record = apart.figures_apart(name, shape, seconds, _passed_on(options))
        else:
            record = apart.time_is_up(name, shape)
        report["cases"].append(record)
        write_json(report, options.out)
        _print_case(record)
    return 0 if all(map(_ours_is_there, report["cases"])) else 1


def _options(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench gpu", description=__doc__)
    everybody = dict.fromkeys(who for name in CASES for who in contestants(name))
    rounds = f"number of rounds [default: 20]; a case stops after --long seconds and at least {FEWEST} rounds"
    parser.add_argument("--case", action="append", choices=tuple(CASES), help="may be repeated [default: all]")
    shapes = "shapes, or tiny [default: the shapes of each case]"
    parser.add_argument("--shapes", nargs="+", type=_shape, metavar="N,d,C", help=shapes)
    who = "implementation as named in the table; may be repeated [default: all]"
    parser.add_argument("--who", action="append", choices=tuple(everybody), metavar="NAME", help=who)
    parser.add_argument("--rounds", type=int, default=20, help=rounds)
    long = f"maximum seconds of the rounds of a case [default: {LONG:g}]"
    parser.add_argument("--long", type=float, default=LONG, metavar="SECONDS", help=long)
    limit = "maximum seconds to prepare an implementation"
    parser.add_argument("--limit", type=float, default=60.0, metavar="SECONDS", help=limit)
    total = "seconds after which no further implementation is prepared"
    parser.add_argument("--total", type=float, default=420.0, metavar="SECONDS", help=total)
    since = "reading of the system's monotonic clock at which the total starts [default: now]"
    parser.add_argument("--since", type=float, metavar="SECONDS", help=since)
    together = "run all cases in this process instead of one process per case"
    parser.add_argument("--together", action="store_true", help=together)
    parser.add_argument("--device", choices=tuple(DEVICES), default="cuda", help="cpu tests the benchmark itself")
    parser.add_argument("--out", type=Path, default=Path("gpu.json"), metavar="PATH", help="[default: gpu.json]")
    options = parser.parse_args(arguments)
    if options.rounds < 1:
        parser.error("--rounds must be at least 1")
    if options.device == "cpu" and not options.shapes:
        options.shapes = [TINY]
    return options


def _passed_on(options: argparse.Namespace) -> list[str]:
    """Return the options that are passed to the process of a case."""
    told = ["--rounds", str(options.rounds), "--limit", str(options.limit), "--device", options.device]
    return [*told, *(part for who in options.who or () for part in ("--who", who))]


def _shape(text: str) -> Shape:
    if text == "tiny":
        return TINY
    rows, width, classes = map(int, text.split(","))
    return Shape(rows, width, classes)


def _rows(options: argparse.Namespace) -> Iterator[tuple[str, Shape]]:
    for name in options.case or CASES:
        for shape in options.shapes or CASES[name].shapes:
            yield name, shape


def _attempted(name: str, shape: Shape, meter: Cpu, effort: Effort) -> Record:
    """Measure a case, or return a record with a note if it fails as a whole."""
    try:
        return figures(name, shape, meter, effort)
    except Exception as error:
        note = reason(error)
    return {"case": name, "shape": shape, "records": [{"who": "all", "note": note}]}


def _ours_is_there(case: Record) -> bool:
    """Return whether softcurve was measured or not selected."""
    failed = {record["who"] for record in case["records"] if "note" in record}
    return not failed & {OURS, "all"}


def _print_case(case: Record) -> None:
    for record in case["records"]:
        print_row(case["case"], str(case["shape"]), *cells(record))
    if "inputs_mb" in case:
        sizes = f"inputs {case['inputs_mb']:.1f} MB, gradients {case['gradients_mb']:.1f} MB"
        took = f"{case['prepared_s']:.0f} s of preparation, {case['rounds_s']:.0f} s of rounds"
        print(f"{case['case']} {case['shape']}: {sizes}; {took} {case['state'] or ''}", file=sys.stderr, flush=True)


def cells(record: Record) -> Iterator[str]:
    """Yield the cells of a row, starting with the name of the implementation."""
    yield record["who"]
    yield record.get("note") or (f"{1e3 * record['s']:.3f}" if "s" in record else "")
    yield cell(record, "spread", ".1%")
    yield cell(record, "over_floor", ".3f")
    yield cell(record, "ratio", ".3f")
    yield cell(record, "extra_mb", ".1f")
    error = record.get("error", {})
    yield cell(error, "loss", ".1e")
    for gradient in ("features", "weight"):
        for kind in ("norm", "entry", "row"):
            yield cell(error.get(gradient, {}), kind, ".1e")
