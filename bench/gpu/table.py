"""Losses on features and a head on a CUDA device: one command, a table for people and a JSON file of all figures."""

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
Loss and both gradients, bfloat16. Times are medians of rounds in which everybody takes a turn, by events on the device;
the spread is the distance of the quartiles beside the median; the ratios are medians of the rounds' own. The floor is
the matrix products of the same shapes into buffers that are there. Extra memory is beyond inputs and results, what is
kept between calls included, by torch's allocator. Errors are against float64: of the loss; of the gradients in features
(dE) and weight (dW) by norm, the worst entry beside the largest of all, and the worst row's norm beside its own. What
rounding alone costs stands at "{ROUNDED}"."""


def main(arguments: Sequence[str]) -> int:
    """0; 1 where ours could not be measured; 2 where there is no such device."""
    options = _options(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        print("python -m bench gpu: no CUDA device; --device cpu runs the same on the CPU, tiny", file=sys.stderr)
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
    rounds = f"20 by default; a case that has taken --long is left with {FEWEST} or more"
    parser.add_argument("--case", action="append", choices=tuple(CASES), help="all by default; may be repeated")
    parser.add_argument("--shapes", nargs="+", type=_shape, metavar="N,d,C", help="or tiny; each case's own by default")
    who = "as in the table; all by default; may be repeated"
    parser.add_argument("--who", action="append", choices=tuple(everybody), metavar="NAME", help=who)
    parser.add_argument("--rounds", type=int, default=20, help=rounds)
    long = f"{LONG:g} by default"
    parser.add_argument("--long", type=float, default=LONG, metavar="SECONDS", help=long)
    parser.add_argument("--limit", type=float, default=60.0, metavar="SECONDS", help="to prepare a contestant")
    parser.add_argument("--total", type=float, default=420.0, metavar="SECONDS", help="after which nobody is prepared")
    since = "the reading of the system's monotonic clock from which the total counts; now by default"
    parser.add_argument("--since", type=float, metavar="SECONDS", help=since)
    together = "all cases in this process; otherwise each has its own, and its share of the total"
    parser.add_argument("--together", action="store_true", help=together)
    parser.add_argument("--device", choices=tuple(DEVICES), default="cuda", help="cpu: to see that everything runs")
    parser.add_argument("--out", type=Path, default=Path("gpu.json"), metavar="PATH", help="gpu.json by default")
    options = parser.parse_args(arguments)
    if options.rounds < 1:
        parser.error("--rounds must be 1 at least")
    if options.device == "cpu" and not options.shapes:
        options.shapes = [TINY]
    return options


def _passed_on(options: argparse.Namespace) -> list[str]:
    """What the process of one case is told as well."""
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
    """A case that fails as a whole is a note too."""
    try:
        return figures(name, shape, meter, effort)
    except Exception as error:
        note = reason(error)
    return {"case": name, "shape": shape, "records": [{"who": "all", "note": note}]}


def _ours_is_there(case: Record) -> bool:
    """Or was not asked for."""
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
    """Of a contestant's row, from its name on."""
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
