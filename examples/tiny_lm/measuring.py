"""Comparison of each loss with its dense counterpart: time of a training step, and memory in a fresh process."""

from __future__ import annotations

import copy
import math
import multiprocessing
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor

import softcurve as sc
from tiny_lm.model import TinyLM
from tiny_lm.objectives import OBJECTIVES, Objective, Target
from tiny_lm.text import Windows
from tiny_lm.training import Learner, Schedule, Targets

HOW = ("streamed", "dense")


@dataclass(frozen=True)
class Speed:
    """Median tokens per second, and the largest relative deviation between the losses of the two runs."""

    streamed: float
    dense: float
    deviation: float


def speed(
    model: TinyLM, objective: Objective, targets: Targets, windows: Windows, schedule: Schedule, steps: int
) -> Speed:
    """Train two copies of a model on the same batches in turns, so that variations of the machine affect both."""
    learners = {how: Learner(copy.deepcopy(model), schedule) for how in HOW}
    seconds: dict[str, list[float]] = {how: [] for how in HOW}
    losses: dict[str, list[float]] = {how: [] for how in HOW}
    tokens = torch.empty(0)
    for step, tokens in enumerate(islice(schedule.batches(windows), steps + 1)):
        for how, learner in learners.items():
            start = time.perf_counter()
            losses[how].append(learner.step(getattr(objective, how), tokens, targets(step, tokens)))
            seconds[how].append(time.perf_counter() - start)
    # The first step, which creates the optimizer's state, is not counted.
    rates = {how: tokens.numel() / statistics.median(seconds[how][1:]) for how in HOW}
    deviation = max(abs(a - b) / abs(b) for a, b in zip(losses["streamed"], losses["dense"], strict=True))
    return Speed(**rates, deviation=deviation)


def memories(names: Sequence[str], *sizes: int) -> dict[str, dict[str, float | None]]:
    """Return the megabytes of each loss and its gradients, measured in fresh processes; None on Windows.

    ``sizes`` are the numbers of windows, context, width, the teacher's width, vocabulary and k.
    """
    cases = [(name, how, *sizes) for name in names for how in HOW]
    if sys.platform == "win32":
        found: list[float | None] = [None] * len(cases)
    else:
        processes = multiprocessing.get_context("forkserver")
        processes.set_forkserver_preload(["softcurve"])  # loaded once for all processes
        with processes.Pool(1, maxtasksperchild=1) as pool:
            found = pool.starmap(_grown, cases, chunksize=1)
    megabytes = iter(found)
    return {name: {how: next(megabytes) for how in HOW} for name in names}


def _grown(name: str, how: str, *sizes: int) -> float:
    """Measure the memory in this process. A first, small call loads everything that a call needs."""
    loss, k = getattr(OBJECTIVES[name], how), sizes[-1]
    loss(*_inputs(name, 1, 8, 8, 8, 2 * k, k)).backward()
    inputs = _inputs(name, *sizes)
    if Path("/proc/self/clear_refs").exists():
        Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark
    before = _peak()
    loss(*inputs).backward()
    return _peak() - before


def _inputs(
    name: str, batch: int, context: int, width: int, teacher_width: int, vocab: int, k: int
) -> tuple[Tensor, Tensor, Tensor, Target]:
    """Return random features, a random head and a random target."""
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(batch, context, width, generator=generator).requires_grad_()
    weight = (0.1 * torch.randn(vocab, width, generator=generator)).requires_grad_()
    bias = torch.randn(vocab, generator=generator).requires_grad_()
    if name == "plain":
        return features, weight, bias, torch.randint(vocab, (batch, context), generator=generator)
    if name == "top_k":
        distinct = torch.randint(vocab, (batch, context, 1), generator=generator) + torch.arange(k)
        return features, weight, bias, sc.TopK(distinct % vocab, torch.full(distinct.shape, -math.log(2 * k)))
    teachers_features = torch.randn(batch, context, teacher_width, generator=generator)
    teachers_weight = 0.1 * torch.randn(vocab, teacher_width, generator=generator)
    return features, weight, bias, sc.LinearTeacher(teachers_features, teachers_weight)


def _peak() -> float:
    """Return the high-water mark of this process in megabytes; on Linux ru_maxrss would include the parent's."""
    if (status := Path("/proc/self/status")).exists():
        return next(int(line.split()[1]) for line in status.read_text().splitlines() if line.startswith("VmHWM")) / 1024
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 1024)
