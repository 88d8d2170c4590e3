"""Training and evaluation of a tiny model, and the teacher's top-k lists on disk."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import safetensors
import safetensors.torch
import torch
from torch import Tensor

import softcurve as sc
from softcurve.files.atomic import replacing
from tiny_lm.model import TinyLM
from tiny_lm.objectives import Loss, Target
from tiny_lm.text import Text, Windows

Targets = Callable[[int, Windows], Target]

TOGETHER = 2048  # number of tokens that are evaluated at once
EMBEDDING_SCALE = 5.0  # factor of the learning rate
LOOKS = 10  # number of evaluations during training


@dataclass(frozen=True)
class Schedule:
    """Steps of AdamW with ``batch`` windows each, a linear warm-up over a tenth of them, and a cosine decay."""

    steps: int
    batch: int
    seed: int
    rate: float
    weight_decay: float = 0.1
    largest_gradient: float = 1.0

    def rate_at(self, step: int) -> float:
        """Return the learning rate of a step, counted from 0."""
        warmup = max(1, self.steps // 10)
        if step < warmup:
            return self.rate * (step + 1) / warmup
        return self.rate * (0.55 + 0.45 * math.cos(math.pi * (step - warmup) / max(1, self.steps - warmup)))

    def batches(self, windows: Windows) -> Iterator[Windows]:
        """Yield one batch per step; each epoch uses all windows in a new random order."""
        generator, order = torch.Generator().manual_seed(self.seed), torch.empty(0, dtype=torch.int64)
        for _ in range(self.steps):
            while len(order) < self.batch:
                order = torch.cat([order, torch.randperm(len(windows), generator=generator)])
            yield windows[order[: self.batch]]
            order = order[self.batch :]


@dataclass
class Curve:
    """The training loss of each step, and the validation cross-entropy of some steps, in nats per token."""

    minimised: list[float] = field(default_factory=list)
    steps: list[int] = field(default_factory=list)
    validation: list[float] = field(default_factory=list)
    seconds: float = 0.0

    def look(self, step: int, found: Score) -> None:
        """Append the validation score after a step."""
        self.steps.append(step)
        self.validation.append(found.nats_per_token)


@dataclass(frozen=True)
class Score:
    """Scores on validation windows: the cross-entropy in two units, the accuracy and the entropy of the model."""

    nats_per_token: float
    bits_per_byte: float
    accuracy: float
    entropy: float


class Learner:
    """A model and its optimizer, with weight decay on matrices only and a larger learning rate for the embedding.

    Most rows of the embedding occur in few batches, which makes their steps under Adam's normalisation smaller.
    """

    def __init__(self, model: TinyLM, schedule: Schedule) -> None:
        self.model, self.schedule, self.taken = model, schedule, 0
        embedding, others = model.embedding.weight, list(model.parameters())
        groups = [
            {"params": [embedding], "scale": EMBEDDING_SCALE, "weight_decay": schedule.weight_decay},
            {
                "params": [p for p in others if p.ndim == 2 and p is not embedding],
                "scale": 1.0,
                "weight_decay": schedule.weight_decay,
            },
            {"params": [p for p in others if p.ndim < 2], "scale": 1.0, "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), fused=True)

    def step(self, loss: Loss, tokens: Windows, target: Target) -> float:
        """Take one step and return the loss before it."""
        for group in self.optimizer.param_groups:
            group["lr"] = group["scale"] * self.schedule.rate_at(self.taken)
        self.taken += 1
        value = loss(self.model(tokens), *self.model.head, target)
        self.optimizer.zero_grad()
        value.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.schedule.largest_gradient)
        self.optimizer.step()
        return value.item()


def train(
    name: str, model: TinyLM, loss: Loss, targets: Targets, text: Text, schedule: Schedule, quick: Windows
) -> Curve:
    """Train for all steps of a schedule, and print and record the score on the windows ``quick`` at times."""
    curve, learner = Curve(), Learner(model, schedule)
    curve.look(0, score(model, text, quick))
    for step, tokens in enumerate(schedule.batches(text.train)):
        start = time.perf_counter()
        curve.minimised.append(learner.step(loss, tokens, targets(step, tokens)))
        curve.seconds += time.perf_counter() - start
        if (step + 1) * LOOKS // schedule.steps > step * LOOKS // schedule.steps:
            now = score(model, text, quick)
            curve.look(step + 1, now)
            recent = curve.minimised[-max(1, schedule.steps // LOOKS) :]
            rate = (step + 1) * tokens.numel() / curve.seconds
            print(f"{name:12s}{step + 1:6d}{sum(recent) / len(recent):14.3f}{now.nats_per_token:14.3f}", end="")
            print(f"{now.bits_per_byte:12.3f}{rate:12,.0f}", flush=True)
    return curve


def header() -> str:
    """Return the header of the lines that :func:`train` prints."""
    return f"{'':12s}{'step':>6s}{'minimised':>14s}{'validation':>14s}{'bits/byte':>12s}{'tokens/s':>12s}"


def next_tokens(_step: int, tokens: Windows) -> Tensor:
    """Return the target of plain training: the tokens themselves, which the loss shifts."""
    return tokens


def taught_by(teacher: TinyLM) -> Targets:
    """Return the target of distillation: the teacher's features of the same tokens, and its tied weight."""

    @torch.no_grad()
    def target(_step: int, tokens: Windows) -> sc.LinearTeacher:
        return sc.LinearTeacher(teacher(tokens), *teacher.head)

    return target


# --- the teacher's lists on disk -------------------------------------------------------------------------------------


@torch.no_grad()
def cache_top_k(path: Path, teacher: TinyLM, text: Text, schedule: Schedule, k: int) -> None:
    """Write the ``k`` most probable tokens at each position of each batch, of shape ``(steps, batch, context, k)``.

    Only the logits of one window are held at a time.
    """
    shape = schedule.steps, schedule.batch, text.train.shape[1], k
    indices, log_probs = torch.empty(shape, dtype=torch.int32), torch.empty(shape)
    for step, tokens in enumerate(schedule.batches(text.train)):
        for window, features in enumerate(teacher(tokens)):
            logits = torch.nn.functional.linear(features, *teacher.head)
            top = logits.topk(k)
            indices[step, window] = top.indices
            log_probs[step, window] = top.values - logits.logsumexp(-1, keepdim=True)
    with replacing(path) as file:
        file.write(safetensors.torch.save({"indices": indices, "log_probs": log_probs}))


def cached(file: safetensors.safe_open) -> Targets:
    """Return the target of distillation from cached lists, with the total probability of the unlisted tokens."""
    indices, log_probs = file.get_slice("indices"), file.get_slice("log_probs")
    return lambda step, _tokens: sc.TopK(indices[step].long(), log_probs[step], tail="bucket")


# --- evaluation ------------------------------------------------------------------------------------------------------


def _batches(windows: Windows) -> Sequence[Windows]:
    batches: Sequence[Windows] = windows.split(max(1, TOGETHER // windows.shape[1]))
    return batches


@torch.no_grad()
def score(model: TinyLM, text: Text, windows: Windows) -> Score:
    """Score a model; the loss and its statistics come from the same pass."""
    nats, right, entropy = 0.0, 0, 0.0
    for tokens in _batches(windows):
        weight, bias = model.head
        loss, stats = sc.linear_cross_entropy(
            model(tokens), weight, tokens, linear_bias=bias, shift=1, reduction="sum", return_stats=True
        )
        nats += loss.item()
        right += int(stats.correct.sum())
        entropy += stats.entropy[:, :-1].sum().item()  # the last position of a window predicts nothing
    predicted = windows[:, 1:].numel()
    bits_per_byte = nats / math.log(2) / text.bytes_predicted(windows)
    return Score(nats / predicted, bits_per_byte, right / predicted, entropy / predicted)


@torch.no_grad()
def divergence(student: TinyLM, teacher: TinyLM, windows: Windows, direction: str) -> float:
    """Return ``D(teacher‖student)`` (``"forward"``) or ``D(student‖teacher)``, in nats per token."""
    nats, targets = 0.0, taught_by(teacher)
    for tokens in _batches(windows):
        weight, bias = student.head
        nats += sc.linear_kl_divergence(
            student(tokens), weight, targets(0, tokens), linear_bias=bias, direction=direction, reduction="sum"
        ).item()
    return nats / windows.numel()
