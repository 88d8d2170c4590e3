"""Distillation from a cache of lists
==================================

Distil a language model from a cache: the teacher writes its most probable tokens once, and students read them.

A teacher is trained on the text of ``tiny_lm.py``, the documentation and docstrings of the Python standard library. For
a part of the text it then writes the ``k`` most probable next tokens at each position. ``softcurve.linear_topk`` finds
them without the logits, and ``softcurve.TopKWriter`` writes them to safetensors files::

    with softcurve.TopKWriter(directory, classes=vocab, dtype=torch.float16) as writer:
        for tokens in batches:
            writer.append(softcurve.linear_topk(teacher(tokens), weight, k, linear_bias=bias))

The teacher is not needed any more. Three smaller students start from the same weights and use the same batches of that
part of the text. The first learns from its tokens only, the second from the lists only, by
``softcurve.linear_kl_divergence``, and the third from both::

    cache = softcurve.TopK.load(directory)
    for rows in batches:
        x, labels, lists = student(tokens[rows]), tokens[rows], cache[rows]
        loss = softcurve.linear_distillation(x, weight, labels, lists, linear_bias=bias, alpha=0.5, shift=1)

A list contains the total probability of all unlisted tokens, but not how it is distributed among them. After this short
training, that is about half of the probability. The second student therefore predicts the next token more accurately
than the first but has a higher cross-entropy. The third learns the unlisted tokens from the text, and it is better than
the first in both.

Run it from the root of the repository::

    python examples/offline_distillation.py [--steps 150] [--windows 800] [--seed 0] [--out build/offline.png]

The example prints tables, followed by one line of JSON. They compare the cache with one of all logits in float16, the
memory of computing the lists without and with the logits, and the losses of the students on held-out text.

.. image:: /pictures/offline_distillation.png
   :alt: Held-out losses of the students, size of the cache, and memory of computing the lists
"""

# sphinx_gallery_thumbnail_path = "pictures/offline_distillation.png"

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from tiny_lm import text as texts
from tiny_lm.model import Shape, TinyLM
from tiny_lm.objectives import Bias, Features, Loss, Weight
from tiny_lm.training import Curve, Schedule, Targets, header, score, train
from torch import Tensor
from torch.nn import functional as F

import softcurve
from softcurve.files.atomic import replacing

HEAD_WIDTH, TEACHER_LAYERS, STUDENT_LAYERS, WIDER = 32, 3, 1, 2
RATE = 4e-3  # the teacher, which is wider, uses half of it
ALPHA = 0.5  # share of the tokens in the loss of the third student
QUICK = 48  # number of validation windows that are evaluated during training
BATCH_OF_LISTS = 128  # windows whose lists are computed and written at once
BUDGET = 16 * 2**20  # bytes; within the default of 128 MiB all logits of such a batch would fit into one tile
STREAMED, DENSE = "streamed", "dense"
BLUE, ORANGE, GREEN, MUTED = "#1f62c4", "#c2500c", "#2a8a4a", "#8b949e"

OPTIONS = (
    ("steps", 150, 2, "training steps of each student"),
    ("teacher-steps", 300, 2, "training steps of the teacher"),
    ("windows", 800, 1, "windows for which the teacher writes lists, and on which the students are trained"),
    ("top-k", 32, 1, "tokens in each list"),
    ("width", 64, HEAD_WIDTH, f"width of the students, a multiple of {HEAD_WIDTH}; the teacher is twice as wide"),
    ("vocab", 4096, 257, "size of the vocabulary"),
    ("context", 64, 2, "tokens per window"),
    ("batch", 16, 1, "windows per step"),
    ("seed", 0, 0, "random seed for initial weights and batches"),
)


# --- the lists -------------------------------------------------------------------------------------------------------

Lists = Callable[[Features, Weight, Bias, int], softcurve.TopK]


def streamed(features: Features, weight: Weight, bias: Bias, k: int) -> softcurve.TopK:
    """Return the ``k`` most probable tokens at each position and their log-probabilities, without the logits."""
    return softcurve.linear_topk(features, weight, k, linear_bias=bias, memory_budget=BUDGET)


def dense(features: Features, weight: Weight, bias: Bias, k: int) -> softcurve.TopK:
    """Return the same from the logits."""
    logits = F.linear(features, weight, bias)
    top = logits.topk(k)
    return softcurve.TopK(top.indices, top.values - logits.logsumexp(-1, keepdim=True))


WAYS: dict[str, Lists] = {STREAMED: streamed, DENSE: dense}


@torch.no_grad()
def write_cache(directory: Path, teacher: TinyLM, windows: texts.Windows, k: int) -> None:
    """Write the teacher's lists of all windows; a row of the cache belongs to a window."""
    weight, bias = teacher.head
    with softcurve.TopKWriter(directory, classes=len(weight), dtype=torch.float16) as writer:
        for tokens in windows.split(BATCH_OF_LISTS):
            writer.append(streamed(teacher(tokens), weight, bias, k))


# --- the students ----------------------------------------------------------------------------------------------------


def of_tokens(x: Features, weight: Weight, bias: Bias, target: tuple[Tensor, softcurve.TopK]) -> Tensor:
    """Return the cross-entropy of the next tokens."""
    tokens, _ = target
    return softcurve.linear_cross_entropy(x, weight, tokens, linear_bias=bias, shift=1, memory_budget=BUDGET)


def of_lists(x: Features, weight: Weight, bias: Bias, target: tuple[Tensor, softcurve.TopK]) -> Tensor:
    """Return the divergence from the teacher's lists."""
    _, lists = target
    return softcurve.linear_kl_divergence(x, weight, lists, linear_bias=bias, memory_budget=BUDGET)


def of_both(x: Features, weight: Weight, bias: Bias, target: tuple[Tensor, softcurve.TopK]) -> Tensor:
    """Return the mean of both losses, computed from one product of the features and the head."""
    tokens, lists = target
    return softcurve.linear_distillation(
        x, weight, tokens, lists, alpha=ALPHA, linear_bias=bias, shift=1, memory_budget=BUDGET
    )


STUDENTS: dict[str, Loss] = {"tokens": of_tokens, "lists": of_lists, "both": of_both}
COLOURS = {"teacher": MUTED, "tokens": ORANGE, "lists": GREEN, "both": BLUE}


class Course:
    """The training of the teacher and of the students from one seed."""

    def __init__(self, text: texts.Text, chosen: argparse.Namespace) -> None:
        self.text, self.chosen = text, chosen
        self.part = replace(text, train=text.train[:: max(1, len(text.train) // chosen.windows)][: chosen.windows])
        self.schedule = Schedule(chosen.steps, chosen.batch, chosen.seed, RATE)
        self.quick = text.validation[:: max(1, len(text.validation) // QUICK)]
        self.curves: dict[str, Curve] = {}

    def model(self, width: int, layers: int) -> TinyLM:
        """Return a model with the same initial weights at each call."""
        torch.manual_seed(self.chosen.seed)
        return TinyLM(Shape(self.chosen.vocab, width, layers, HEAD_WIDTH), self.text.log_frequencies())

    def teacher(self) -> TinyLM:
        """Train the teacher on the whole text."""
        teacher = self.model(WIDER * self.chosen.width, TEACHER_LAYERS)
        schedule = replace(self.schedule, steps=self.chosen.teacher_steps, rate=RATE / 2)

        def targets(_step: int, tokens: texts.Windows) -> Any:
            return tokens, None

        self.curves["teacher"] = train("teacher", teacher, of_tokens, targets, self.text, schedule, self.quick)
        return teacher.requires_grad_(requires_grad=False)

    def student(self, name: str, cache: softcurve.TopKCache) -> TinyLM:
        """Train a student on the part of the text for which there are lists."""
        student = self.model(self.chosen.width, STUDENT_LAYERS)
        targets = self.targets(cache)
        self.curves[name] = train(name, student, STUDENTS[name], targets, self.part, self.schedule, self.quick)
        return student

    def targets(self, cache: softcurve.TopKCache) -> Targets:
        """Return the targets of each step: the tokens of its windows, and their lists, which are read when needed."""
        rows = list(self.schedule.batches(torch.arange(len(self.part.train))))
        return lambda step, tokens: (tokens, cache[rows[step]])


# --- memory ----------------------------------------------------------------------------------------------------------


def print_memory(way: str, width: int, vocab: int, tokens: int, k: int) -> None:
    """Print by how many megabytes one batch of lists, computed and written, increases the peak memory."""
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    weight, bias = torch.randn(vocab, width, generator=generator), torch.randn(vocab, generator=generator)
    features = torch.randn(tokens, width, generator=generator) / width**0.5

    def once(directory: Path, rows: int) -> None:
        with softcurve.TopKWriter(directory, classes=vocab, dtype=torch.float16) as writer:
            writer.append(WAYS[way](features[:rows], weight, bias, k))

    with tempfile.TemporaryDirectory() as directory:
        once(Path(directory, "small"), 2)  # loads what a call needs
        before = size_of_process("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark
        start = time.perf_counter()
        once(Path(directory, "whole"), tokens)
        seconds = time.perf_counter() - start
        print(json.dumps({"megabytes": size_of_process("VmHWM") - before, "seconds": seconds}))


def size_of_process(field: str) -> float:
    """Return the resident set of this process or its high-water mark, in megabytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:")) / 1024


def memory(width: int, vocab: int, tokens: int, k: int) -> dict[str, dict[str, float]] | None:
    """Measure each way in a fresh process; None where the system does not report a peak that can be reset."""
    if not Path("/proc/self/clear_refs").exists():
        return None
    command, sizes = [sys.executable, str(Path(__file__).resolve()), "--memory-of"], (width, vocab, tokens, k)
    done = {
        name: subprocess.run([*command, name, *map(str, sizes)], capture_output=True, text=True, check=True)
        for name in WAYS
    }
    return {name: json.loads(process.stdout) for name, process in done.items()}


# --- the picture -----------------------------------------------------------------------------------------------------


def losses(axes: Axes, curves: dict[str, Curve]) -> None:
    """Plot the cross-entropy of the students over their steps, and that of the teacher at its end."""
    for name in STUDENTS:
        label = f"student of {name}" if name != "both" else "student of tokens and lists"
        axes.plot(curves[name].steps, curves[name].validation, "o-", color=COLOURS[name], label=label, markersize=4)
    axes.axhline(
        curves["teacher"].validation[-1], color=MUTED, linestyle="--", label="teacher, trained on the whole text"
    )
    axes.set_title(f"Cross-entropy of {QUICK} held-out windows, nats per token", loc="left")
    axes.set_xlabel("step of the students")
    axes.legend(frameon=False)


def bars(axes: Axes, sizes: dict[str, float], title: str, unit: str) -> None:
    """Draw one labelled bar per name."""
    drawn = axes.bar(list(sizes), list(sizes.values()), color=(BLUE, ORANGE), width=0.6)
    axes.bar_label(drawn, [f"{size:,.0f} {unit}" for size in sizes.values()], padding=2)
    axes.margins(y=0.1)
    axes.set_title(title, loc="left")


def draw(report: dict[str, Any], curves: dict[str, Curve]) -> Figure:
    """Draw the losses, the sizes on disk and the memory."""
    figure = Figure(figsize=(14, 4.4), layout="constrained")
    FigureCanvasAgg(figure)
    left, middle, right = figure.subplots(1, 3, width_ratios=(2, 1, 1))
    losses(left, curves)
    disk = report["bytes"]
    bars(
        middle,
        {f"lists of {report['top_k']}": disk["lists"] / 1e6, "all logits": disk["logits"] / 1e6},
        "On disk",
        "MB",
    )
    if report["memory"] is not None:
        megabytes = {name: one["megabytes"] for name, one in report["memory"].items()}
        bars(right, megabytes, "Extra memory of computing the lists", "MB")
    return figure


# --- the command line ------------------------------------------------------------------------------------------------


def arguments() -> argparse.Namespace:
    """Parse and check the command line before any computation."""
    parser = argparse.ArgumentParser(description="Distil a small language model from cached top-k lists.")
    for name, default, _, meaning in OPTIONS:
        parser.add_argument(f"--{name}", type=int, default=default, help=f"{meaning} ({default})")
    parser.add_argument("--out", type=Path, default=Path("build/offline.png"), help="output file")
    parser.add_argument("--memory-of", nargs=5, help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    for name, _, least, _ in OPTIONS:
        if (value := getattr(chosen, name.replace("-", "_"))) < least:
            parser.error(f"argument --{name}: must be at least {least}, got {value}")
    if chosen.width % HEAD_WIDTH:
        parser.error(f"argument --width: must be a multiple of {HEAD_WIDTH}, got {chosen.width}")
    if chosen.top_k > min(chosen.vocab, 1024):
        parser.error(f"argument --top-k: must be at most 1024 and the vocabulary of {chosen.vocab}, got {chosen.top_k}")
    if chosen.seed >= 2**63:
        parser.error(f"argument --seed: must be below 2^63, got {chosen.seed}")
    if chosen.out.is_dir():
        parser.error(f"argument --out: {chosen.out} is a folder; give the name of a file in it")
    if chosen.memory_of is None:
        try:
            chosen.out.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            parser.error(
                f"argument --out: the folder {chosen.out.parent} cannot be made ({error.strerror}); give another"
            )
    return chosen


def show(report: dict[str, Any]) -> None:
    """Print the size of the cache, the memory and the scores."""
    disk = report["bytes"]
    print(f"\n{'On disk':26s}{'MB':>10s}{'bytes/token':>14s}")
    for name, label in (("lists", f"lists of {report['top_k']} tokens"), ("logits", "all logits in float16")):
        print(f"{label:26s}{disk[name] / 1e6:10,.1f}{disk[name] / report['cached_tokens']:14,.0f}")
    if report["memory"] is not None:
        title = f"Lists of {report['tokens_at_once']:,} tokens"
        print(f"\n{title:26s}{'memory, MB':>10s}{'seconds':>14s}")
        for name, one in report["memory"].items():
            print(f"{name:26s}{one['megabytes']:10.0f}{one['seconds']:14.2f}")
    print(f"\n{'Held-out text':26s}{'nats/token':>10s}{'bits/byte':>14s}{'accuracy':>10s}{'entropy':>10s}")
    for name, one in report["scores"].items():
        label = name if name == "teacher" else f"student of {name}"
        print(f"{label:26s}{one['nats_per_token']:10.4f}{one['bits_per_byte']:14.4f}", end="")
        print(f"{one['accuracy']:10.1%}{one['entropy']:10.3f}")


def main() -> None:
    """Train the teacher, write its lists, train the students from them, measure, and write the picture."""
    chosen, start = arguments(), time.perf_counter()
    if chosen.memory_of is not None:
        print_memory(chosen.memory_of[0], *map(int, chosen.memory_of[1:]))
        return
    torch.set_num_threads(1)  # the tensors are too small for a second thread to pay off
    text = texts.load(chosen.vocab, chosen.context)
    course = Course(text, chosen)
    windows = course.part.train
    print(f"{text.train.numel():,} tokens for the teacher, {windows.numel():,} for the students,", end=" ")
    print(f"{text.validation.numel():,} held out; read in {time.perf_counter() - start:.0f} s\n\n{header()}")
    teacher = course.teacher()
    models = {"teacher": teacher}
    with tempfile.TemporaryDirectory() as folder:
        directory, clock = Path(folder, "lists"), time.perf_counter()
        write_cache(directory, teacher, windows, chosen.top_k)
        writing, size = time.perf_counter() - clock, sum(file.stat().st_size for file in directory.iterdir())
        cache = softcurve.TopK.load(directory)
        listed = cache[:].log_probs.float().exp().sum(-1).mean().item()
        print(f"{'lists':12s}written in {writing:.1f} s; they hold {listed:.0%} of the probability", flush=True)
        for name in STUDENTS:
            models[name] = course.student(name, cache)
    at_once = min(BATCH_OF_LISTS, len(windows)) * chosen.context
    report: dict[str, Any] = {
        **{name: value for name, value in vars(chosen).items() if name != "memory_of"},
        "out": str(chosen.out),
        "parameters": {name: model.size() for name, model in models.items()},
        "cached_tokens": windows.numel(),
        "bytes": {"lists": size, "logits": windows.numel() * cache.classes * torch.float16.itemsize},
        "listed_probability": listed,
        "writing_seconds": round(writing, 2),
        "tokens_at_once": at_once,
        "memory": memory(WIDER * chosen.width, chosen.vocab, at_once, chosen.top_k),
        "scores": {name: asdict(score(model, text, text.validation)) for name, model in models.items()},
        "curves": {name: asdict(curve) for name, curve in course.curves.items()},
    }
    report["seconds"] = round(time.perf_counter() - start, 1)
    show(report)
    with replacing(chosen.out) as file:
        draw(report, course.curves).savefig(file, format="png", dpi=110)
    print(f"\nThe picture is at {chosen.out}")
    print(json.dumps(report, allow_nan=False))


if __name__ == "__main__":
    main()
