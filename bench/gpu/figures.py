"""Measurement of one case at one shape: errors and memory of each implementation, and then interleaved times."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from functools import partial
from statistics import median, quantiles
from typing import Any

import torch

from bench import heads
from bench.gpu import inputs, peers, truth
from bench.gpu.devices import Cpu
from bench.gpu.limits import Deadline, TooLong, limited
from bench.gpu.truth import Truth
from bench.heads import Inputs, Run, Shape, Tensors
from bench.measure import median_ratio
from bench.peers import Loss
from bench.tables import Record

DTYPE = torch.bfloat16
ROUNDED = "float64, rounded"
TIME_UP = "not run: the time was up"
# Seconds after which the rounds of a case stop, and the minimum number of rounds.
LONG, FEWEST = 20.0, 5


@dataclass(frozen=True)
class Case:
    """The inputs, exact terms and shapes of a loss in :data:`bench.heads.CASES`."""

    inputs: Callable[[Shape, torch.device, torch.dtype], Inputs]
    terms: truth.Terms
    shapes: tuple[Shape, ...]


SMALLER = (Shape(8192, 4096, 32_000), Shape(2169, 896, 151_936))
CASES: Mapping[str, Case] = {
    "cross-entropy": Case(
        inputs.of_cross_entropy,
        truth.cross_entropy,
        (
            Shape(8192, 4096, 128_256),
            SMALLER[0],
            Shape(4096, 7168, 129_280),
            Shape(8192, 3584, 152_064),
            SMALLER[1],
        ),
    ),
    "forward-kl": Case(inputs.of_divergence, truth.forward_kl, SMALLER),
    "js": Case(inputs.of_divergence, truth.js, SMALLER),
}


@dataclass(frozen=True)
class Effort:
    """The number of rounds, the implementations (all if empty), and the time limits of preparation and rounds."""

    rounds: int
    who: Collection[str]
    limit: float
    deadline: Deadline
    long: float = LONG


def figures(name: str, shape: Shape, meter: Cpu, effort: Effort) -> Record:
    """Return the record of a case, which contains one record for each implementation."""
    torch.compiler.reset()  # previous shapes would count towards the limit on recompilations
    given = CASES[name].inputs(shape, meter.device, DTYPE)
    products = heads.CASES[name].floor(given)
    floor = f"floor, {len(products)} products"
    runs: dict[str, Callable[[], object]] = {floor: partial(heads.multiply, products)}
    heads.multiply(products)  # allocates the workspace of the products before the first measurement
    begun = time.perf_counter()
    records = {floor: {"who": floor}} | _prepared(name, given, meter, effort, runs)
    prepared = time.perf_counter()
    seconds, notes = _in_rounds(runs, meter, effort.rounds, effort.long)
    for who in seconds:
        records[who] |= {"note": notes[who]} if who in notes else _times(who, seconds, floor, notes)
    return {
        "case": name,
        "shape": shape,
        "inputs_mb": _megabytes((*given.wanted, *given.target)),
        "gradients_mb": _megabytes(given.wanted),
        "prepared_s": prepared - begun,
        "rounds_s": time.perf_counter() - prepared,
        "state": meter.state(),
        "records": list(records.values()),
    }


def _prepared(
    name: str, given: Inputs, meter: Cpu, effort: Effort, runs: dict[str, Callable[[], object]]
) -> dict[str, Record]:
    """Return the records of errors and memory, and add the implementations that succeeded to the runs."""
    right = Truth.of(CASES[name].terms, given)
    records: dict[str, Record] = {ROUNDED: {"who": ROUNDED, "error": right.errors(right.rounded(DTYPE))}}
    for who, loss in peers.contestants(name).items():
        if effort.who and who not in effort.who:
            continue
        run = partial(loss_and_gradients, loss, given)
        seconds = min(effort.limit, effort.deadline.left())
        records[who] = {"who": who} | (_tried(run, right, meter, seconds) if seconds > 0 else {"note": TIME_UP})
        if "note" not in records[who]:
            runs[who] = run
    return records


def loss_and_gradients(loss: Loss, given: Inputs) -> Tensors:
    """Compute the loss and both gradients."""
    value = loss(*given.wanted, *given.target)
    of_features, of_weight = torch.autograd.grad(value, given.wanted)
    return value.detach(), of_features, of_weight


def _tried(run: Run, right: Truth, meter: Cpu, limit: float) -> Record:
    """Return memory and errors after two warm-up calls, or a note if the run fails."""
    try:
        before = meter.allocated()
        begun = time.perf_counter()
        with limited(limit):
            run()
            prepared = time.perf_counter() - begun
            run()
        results, peak = meter.with_peak(run)
        record: Record = {"prepared_s": prepared, "results_mb": _megabytes(results), "error": right.errors(results)}
        record["loss_dtype"] = str(results[0].dtype)
        del results
        if before is not None and peak is not None:
            record["extra_mb"] = (peak - before) / 2**20 - record["results_mb"]
            record["kept_mb"] = ((meter.allocated() or 0) - before) / 2**20
        return record
    except TooLong:
        note = f"> {limit:.0f} s to prepare"
    except Exception as error:
        note = peers.reason(error)
    meter.recover()
    return {"note": note}


def _in_rounds(
    runs: Mapping[str, Callable[[], Any]], meter: Cpu, rounds: int, long: float = LONG
) -> tuple[dict[str, list[float]], dict[str, str]]:
    """Return the seconds of all rounds but the first, and a note for each run that failed."""
    seconds: dict[str, list[float]] = {who: [] for who in runs}
    notes: dict[str, str] = {}
    begun = time.perf_counter()
    for turn in range(rounds + 1):
        for who, run in runs.items():
            if who in notes:
                continue
            try:
                seconds[who].append(meter.seconds(run))
            except Exception as error:
                notes[who] = peers.reason(error)
            if who in notes:
                meter.recover()
        if turn >= FEWEST and time.perf_counter() - begun > long:
            break
    return {who: values[1:] for who, values in seconds.items()}, notes


def _times(who: str, seconds: Mapping[str, list[float]], floor: str, notes: Mapping[str, str]) -> Record:
    """Return the median, the relative interquartile range, and the medians of the ratios of all rounds."""
    own = seconds[who]
    low, _, high = quantiles(own, n=4, method="inclusive") if len(own) > 1 else (own[0],) * 3
    record: Record = {"seconds": own, "s": median(own), "spread": (high - low) / median(own)}
    if floor not in notes:
        record["over_floor"] = median_ratio(own, seconds[floor])
    if peers.OURS in seconds and peers.OURS not in notes:
        record["ratio"] = median_ratio(seconds[peers.OURS], own)
    return record


def _megabytes(tensors: Tensors) -> float:
    return sum(tensor.nbytes for tensor in tensors) / 2**20
