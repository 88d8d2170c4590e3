"""The tables of losses on features and a head: time, memory and error of each contestant beside the products alone."""

from __future__ import annotations

import json
from collections.abc import Container, Iterable, Iterator
from functools import partial
from statistics import median

import torch

from bench import heads
from bench.heads import CASES, OURS, Shape
from bench.measure import in_fresh_process, interleaved, median_ratio, relative_error
from bench.tables import Record, cell, print_head, print_row


def print_heads(rows: Iterable[tuple[str, Shape]], repeats: int) -> list[Record]:
    """Print seconds, extra memory and error of each contestant and of the matrix products alone."""
    print("\nlosses on features and a head, (rows, width, classes), gradients with respect to both\n")
    print(
        "The dtype is float32 unless a case names another.\n"
        "A ratio is the median of the ratios of all rounds. Extra memory excludes inputs and results (gradients,\n"
        "HVPs). The error is the largest relative error of the results, on a sixteenth of the rows. The lower bound\n"
        "of an HVP does not include the products of the gradients. A library that does not provide a loss has no row.\n"
    )
    print_head("case", "shape", "who", "s", "ours / it", "extra MB", "results MB", "error")
    records = []
    for name, shape in rows:
        for record in figures(name, shape, repeats):
            print_row(
                name,
                str(shape),
                record["who"],
                record.get("note") or (f"{record['s']:.4f}" if record["s"] >= 0.01 else f"{record['s']:.3g}"),
                cell(record, "ratio", ".2f"),
                cell(record, "extra_mb", ".1f"),
                cell(record, "results_mb", ".1f"),
                cell(record, "error", ".1e"),
            )
            records.append(record)
    return records


def figures(name: str, shape: Shape, repeats: int, chosen: Container[str] | None = None) -> Iterator[Record]:
    """Yield the figures of softcurve, of the products alone, and of the other (or chosen) contestants."""
    torch.compiler.reset()  # previous shapes would count towards the limit on recompilations
    case, contestants = CASES[name], heads.contestants(name)
    if chosen is not None:
        contestants = {who: prepare for who, prepare in contestants.items() if who == OURS or who in chosen}
    given = case.inputs(shape)
    tried = {who: heads.prepared(who, prepare, given) for who, prepare in contestants.items()}
    runs = {who: run for who, run in tried.items() if not isinstance(run, str)}
    products = case.floor(given)
    floor = f"floor, {len(products)} product{'s' if len(products) > 1 else ''}"
    calls = heads.calls_of(shape)
    timed = {who: partial(heads.repeated, run, calls) for who, run in runs.items()}
    timed[floor] = partial(heads.repeated, partial(heads.multiply, products), calls)
    seconds = interleaved(timed, repeats)
    few = case.inputs(shape._replace(rows=max(16, shape.rows // 16)))
    truth = case.run(case.dense, few.in_float64())()
    for who in (OURS, floor, *(peer for peer in contestants if peer != OURS)):
        record: Record = {"case": name, "shape": shape, "who": who}
        if who in seconds:
            record["s"] = median(seconds[who]) / calls
            record["ratio"] = median_ratio(seconds[OURS], seconds[who])
        else:
            record["note"] = tried[who]
        if who in runs:
            record |= _memory(name, who, shape)
            record["error"] = max(map(relative_error, contestants[who](few)(), truth))
        yield record


def print_heads_in_a_budget(rows: Iterable[tuple[str, Shape]]) -> list[Record]:
    """Print the extra memory of each contestant, with a memory budget for softcurve."""
    print(f"\nmemory of losses on features and a head, softcurve with memory_budget = {heads.BUDGET // 2**20} MB\n")
    print_head("case", "shape", "who", "extra MB", "results MB")
    records = []
    for name, shape in rows:
        for who in heads.contestants(name):
            record: Record = {"case": name, "shape": shape, "who": who, **_memory(name, who, shape, heads.BUDGET)}
            extra = record.get("note") or cell(record, "extra_mb", ".1f")
            print_row(name, str(shape), who, extra, cell(record, "results_mb", ".1f"))
            records.append(record)
    return records


def _memory(name: str, who: str, shape: Shape, budget: int | None = None) -> Record:
    call = f"heads.print_memory({name!r}, {who!r}, heads.Shape(*{tuple(shape)}), {budget})"
    found: Record = json.loads(in_fresh_process(f"from bench import heads\n{call}\n").splitlines()[-1])
    return found
