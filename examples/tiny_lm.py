"""A language model, trained and distilled
=======================================

Train a small language model with tied embeddings, and distil it into a smaller one, without storing logits.

The text is included in every Python installation: the topics of ``help()`` and the docstrings and comments of the
standard library. A byte-level BPE tokenizer with a vocabulary of 16,384 is trained on it, so the head takes most of
the time and memory of a model of this size. A teacher is trained by
``linear_cross_entropy(features, embedding.weight, tokens, shift=1)``. Four students then start from the same weights
and use the same batches. The first is trained on the next tokens, like the teacher. The second and third are trained on
the teacher's distributions by forward and by reverse KL, where the teacher is given by its features and head. The
fourth is trained on cached lists of the teacher's most probable tokens. Finally, each loss is compared with its dense
counterpart.

A list contains the total probability of all unlisted tokens, but not how it is distributed among them. After this short
training, the teacher assigns half of its probability to unlisted tokens. The fourth student therefore reaches about the
same accuracy as the others but a higher cross-entropy.

Run it from the root of the repository::

    python examples/tiny_lm.py [--steps 120] [--width 96] [--vocab 16384] [--seed 0] [--out build/tiny_lm]

The example prints tables, followed by one line of JSON. The output folder contains the JSON, the figure and the lists.

.. image:: /pictures/tiny_lm.png
   :alt: Training and distillation curves, and memory and time of the losses
"""

# sphinx_gallery_thumbnail_path = "pictures/tiny_lm.png"

from __future__ import annotations

import argparse
import json
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from tiny_lm import text as texts
from tiny_lm.measuring import HOW, memories, speed
from tiny_lm.model import Shape, TinyLM
from tiny_lm.objectives import OBJECTIVES
from tiny_lm.picture import draw
from tiny_lm.training import (
    Curve,
    Schedule,
    Targets,
    cache_top_k,
    cached,
    divergence,
    header,
    next_tokens,
    score,
    taught_by,
    train,
)

from softcurve.files.atomic import replacing

HEAD_WIDTH, TEACHER_LAYERS, STUDENT_LAYERS = 32, 4, 2
TEACHER_STEPS, RATE = 2, 4e-3  # the teacher, which is twice as wide, uses half of the students' learning rate
QUICK = 32  # number of validation windows that are evaluated during training
EVERY = 4  # the divergences use every fourth validation window
TIMED = 6  # number of steps that are timed
UNITS = ("tokens_per_second", "megabytes")

OPTIONS = (
    ("steps", 120, 2, "training steps of each student; the teacher takes twice as many"),
    ("width", 96, HEAD_WIDTH, f"width of the students, a multiple of {HEAD_WIDTH}; the teacher is twice as wide"),
    ("vocab", 16384, 257, "size of the vocabulary"),
    ("context", 128, 2, "tokens per window"),
    ("batch", 8, 1, "windows per step"),
    ("top-k", 32, 1, "tokens in each of the teacher's lists"),
    ("seed", 0, 0, "random seed for initial weights and batches"),
)


def arguments() -> argparse.Namespace:
    """Parse and check the command line before any computation."""
    parser = argparse.ArgumentParser(description="Train a small language model and distil it into a smaller one.")
    for name, default, _, meaning in OPTIONS:
        parser.add_argument(f"--{name}", type=int, default=default, help=f"{meaning} ({default})")
    parser.add_argument("--out", type=Path, default=Path("build/tiny_lm"), help="output folder")
    chosen = parser.parse_args()
    for name, _, least, _ in OPTIONS:
        if (value := getattr(chosen, name.replace("-", "_"))) < least:
            parser.error(f"argument --{name}: must be at least {least}, got {value}")
    if chosen.width % HEAD_WIDTH:
        parser.error(f"argument --width: must be a multiple of {HEAD_WIDTH}, got {chosen.width}")
    if chosen.top_k > chosen.vocab:
        parser.error(f"argument --top-k: must be at most the vocabulary of {chosen.vocab}, got {chosen.top_k}")
    if chosen.seed >= 2**63:
        parser.error(f"argument --seed: must be below 2^63, got {chosen.seed}")
    try:
        chosen.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser.error(f"argument --out: the folder {chosen.out} cannot be made ({error.strerror}); give another")
    return chosen


class Course:
    """The training of the teacher and the students from one seed."""

    def __init__(self, text: texts.Text, chosen: argparse.Namespace) -> None:
        self.text, self.chosen = text, chosen
        self.schedule = Schedule(chosen.steps, chosen.batch, chosen.seed, RATE)
        self.teachers = replace(self.schedule, steps=TEACHER_STEPS * chosen.steps, rate=RATE / 2)
        self.curves: dict[str, Curve] = {}

    def model(self, width: int, layers: int) -> TinyLM:
        """Return a model with the same initial weights at each call."""
        torch.manual_seed(self.chosen.seed)
        shape = Shape(self.chosen.vocab, width, layers, HEAD_WIDTH)
        return TinyLM(shape, self.text.log_frequencies())

    def teacher(self) -> TinyLM:
        """Return the untrained teacher."""
        return self.model(2 * self.chosen.width, TEACHER_LAYERS)

    def student(self) -> TinyLM:
        """Return an untrained student."""
        return self.model(self.chosen.width, STUDENT_LAYERS)

    def train(self, name: str, model: TinyLM, targets: Targets) -> TinyLM:
        """Train a model for its whole schedule; the teacher uses the loss of the plain student and more steps."""
        loss, schedule = OBJECTIVES[name if name in OBJECTIVES else "plain"].streamed, self.schedule
        if name == "teacher":
            schedule = self.teachers
        quick = self.text.validation[:: max(1, len(self.text.validation) // QUICK)]
        self.curves[name] = train(name, model, loss, targets, self.text, schedule, quick)
        return model


def judged(models: dict[str, TinyLM], text: texts.Text) -> dict[str, dict[str, float]]:
    """Evaluate each model on the validation windows, and its divergence from the teacher in both directions."""
    found, some = {}, text.validation[::EVERY]
    for name, model in models.items():
        found[name] = asdict(score(model, text, text.validation))
        for direction in ("forward", "reverse") if name != "teacher" else ():
            found[name][f"{direction}_kl"] = divergence(model, models["teacher"], some, direction)
    return found


def measured(course: Course, targets: dict[str, Targets]) -> dict[str, dict[str, Any]]:
    """Measure the time and memory of each loss for a student, tile by tile and dense."""
    chosen = course.chosen
    sizes = chosen.batch, chosen.context, chosen.width, 2 * chosen.width, chosen.vocab, chosen.top_k
    found, megabytes = {}, memories(list(OBJECTIVES), *sizes)
    for name, objective in OBJECTIVES.items():
        pace = speed(course.student(), objective, targets[name], course.text.train, course.schedule, TIMED)
        found[name] = {
            "tokens_per_second": {"streamed": pace.streamed, "dense": pace.dense},
            "megabytes": megabytes[name],
            "largest_relative_deviation": pace.deviation,
        }
    return found


def write(out: Path, report: dict[str, Any]) -> None:
    """Write the record and the figure; each is renamed into place when it is complete."""
    with replacing(out / "tiny_lm.json") as file:
        file.write(json.dumps(report, allow_nan=False, indent=1).encode())
    figure = draw(report, {name: label(name) for name in report["curves"]})
    with replacing(out / "tiny_lm.png") as file:
        figure.savefig(file, format="png", dpi=110)


def show_scores(scores: dict[str, dict[str, float]]) -> None:
    """Print one line per model."""
    print(f"\n{'Validation':26s}{'nats/token':>11s}{'bits/byte':>11s}{'acc.':>8s}{'entropy':>9s}", end="")
    print(f"{'KL(teacher‖·)':>15s}{'KL(·‖teacher)':>15s}")
    for name, of in scores.items():
        print(f"{label(name):26s}{of['nats_per_token']:11.4f}{of['bits_per_byte']:11.4f}", end="")
        print(f"{of['accuracy']:8.1%}{of['entropy']:9.3f}", end="")
        print("".join(f"{of[f'{way}_kl']:15.4f}" for way in ("forward", "reverse") if f"{way}_kl" in of))


def show_costs(costs: dict[str, dict[str, Any]]) -> None:
    """Print one line per loss."""
    print(f"\n{'':20s}{'training step, tokens/s':>26s}{'loss and gradients, MB':>26s}{'losses':>12s}")
    print(f"{'Student and loss':20s}" + 2 * f"{'streamed':>16s}{'dense':>10s}" + f"{'differ by':>12s}")
    for name, of in costs.items():
        print(f"{OBJECTIVES[name].label:20s}", end="")
        for unit in UNITS:
            for how, width in zip(HOW, (16, 10), strict=True):
                value = of[unit][how]
                print(f"{'–' if value is None else format(value, ',.0f'):>{width}s}", end="")
        print(f"{of['largest_relative_deviation']:12.1e}")


def label(name: str) -> str:
    """Return the name of a model in the table and the legend."""
    return f"student, {OBJECTIVES[name].label}" if name in OBJECTIVES else name


def main() -> None:
    """Train the teacher, distil the students, evaluate and measure, and write the figure and the report."""
    chosen, start = arguments(), time.perf_counter()
    text = texts.load(chosen.vocab, chosen.context)
    course = Course(text, chosen)
    print(f"{text.documents} documents; {text.train.numel():,} tokens to train on,", end=" ")
    print(f"{text.validation.numel():,} to validate, {text.bytes_per_token:.2f} bytes each")
    print(f"teacher {course.teacher().size():,} parameters, student {course.student().size():,}\n\n{header()}")

    teacher = course.train("teacher", course.teacher(), next_tokens).requires_grad_(requires_grad=False)
    lists, clock = chosen.out / "teacher_top_k.safetensors", time.perf_counter()
    cache_top_k(lists, teacher, text, course.schedule, chosen.top_k)
    caching = time.perf_counter() - clock
    print(f"{'lists':12s}{lists.stat().st_size / 1e6:.0f} MB on disk in {caching:.1f} s", flush=True)
    with safe_open(lists, "pt") as file:
        targets = {"plain": next_tokens, "forward": taught_by(teacher), "reverse": taught_by(teacher)}
        targets["top_k"] = cached(file)
        students = {name: course.train(name, course.student(), targets[name]) for name in OBJECTIVES}
        scores = judged({"teacher": teacher, **students}, text)
        show_scores(scores)
        costs = measured(course, targets)
    show_costs(costs)
    report = {
        **vars(chosen),
        "out": str(chosen.out),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "seconds": round(time.perf_counter() - start, 1),
        "documents": text.documents,
        "train_tokens": text.train.numel(),
        "validation_tokens": text.validation.numel(),
        "bytes_per_token": text.bytes_per_token,
        "parameters": {"teacher": teacher.size(), "student": course.student().size()},
        "lists": {"bytes": lists.stat().st_size, "seconds": caching},
        "curves": {name: asdict(curve) for name, curve in course.curves.items()},
        "scores": scores,
        "costs": costs,
    }
    write(chosen.out, report)
    print(f"\nThe picture is at {chosen.out / 'tiny_lm.png'}")
    print(json.dumps(report, allow_nan=False))


if __name__ == "__main__":
    main()
