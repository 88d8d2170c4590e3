"""Distillation by the Trainer of transformers
===========================================

Distil a small Llama by the Trainer of transformers, from a cache of its teacher's most probable tokens.

A teacher with the architecture of Llama and random initial weights is trained by a stock ``Trainer`` on the text of
``tiny_lm.py``, the documentation and docstrings of the Python standard library. Within ``softcurve.lazy_logits`` its
own forward and loss run without the logits. It then writes the ``k`` most probable next tokens at each position of a
part of the text::

    with torch.no_grad(), softcurve.lazy_logits(teacher), softcurve.TopKWriter(path, classes=vocab) as writer:
        log_probs, indices = teacher(input_ids=batch).logits.log_softmax(-1).topk(k)
        writer.append(softcurve.TopK(indices, log_probs))

Two smaller students start from the same weights and are trained on this part: one on the tokens only, the other by
``DistillationTrainer`` on tokens and lists. A column ``teacher_rows`` of the data set says which rows of the cache
belong to a window. The teacher is not needed any more. After this short training, the two students are about equal on
held-out text; ``offline_distillation.py`` compares students that learn more.

Run it from the root of the repository::

    python examples/trainer_distillation.py [--steps 120] [--seed 0] [--out build/trainer_distillation.png]

The example needs the extra ``integration``. It prints tables, followed by one line of JSON. They compare the cache with
one of all logits, on disk and in the memory of a training step of ``DistillationTrainer``, and of a stock ``Trainer``
with the same loss of dense logits; each is measured in a fresh process.

.. image:: /pictures/trainer_distillation.png
   :alt: Loss of the students, size of the caches, and memory of a step
"""

# sphinx_gallery_thumbnail_path = "pictures/trainer_distillation.png"

from __future__ import annotations

import argparse
import json
import tempfile
import time
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from common.running import BLUE, MUTED, ORANGE, arguments, bars, growth, measure, settings
from common.trainer import BUDGET, HEADER, Rows, Trainer, train, training_arguments
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from tiny_lm import text as texts
from torch import Tensor
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM

import softcurve
from softcurve.files.atomic import replacing
from softcurve.integrations.transformers import DistillationTrainer

NAME = "trainer_distillation"
HEAD_WIDTH, RATE, ALPHA, QUICK, BATCH_OF_LISTS = 32, 4e-3, 0.5, 48, 64
COLOURS = {"teacher": MUTED, "tokens": ORANGE, "tokens and lists": BLUE}
CACHED, DENSE = "cached lists", "all logits"
OPTIONS = (
    ("steps", 120, 2, "training steps of each student"),
    ("teacher-steps", 240, 2, "training steps of the teacher"),
    ("windows", 800, 1, "windows for which the teacher writes lists, and on which the students are trained"),
    ("top-k", 32, 1, "tokens in each list"),
    ("width", 64, HEAD_WIDTH, f"width of the students, a multiple of {HEAD_WIDTH}; the teacher is twice as wide"),
    ("vocab", 8192, 257, "size of the vocabulary"),
    ("context", 64, 2, "tokens per window"),
    ("batch", 16, 1, "windows per step"),
)


def llama(chosen: argparse.Namespace, wider: int = 1, layers: int = 1) -> LlamaForCausalLM:
    """Return a small Llama with tied embeddings and random weights, which are the same at each call."""
    torch.manual_seed(chosen.seed)
    width = wider * chosen.width
    config = LlamaConfig(
        vocab_size=chosen.vocab, hidden_size=width, intermediate_size=3 * width, num_hidden_layers=layers,
        num_attention_heads=width // HEAD_WIDTH, num_key_value_heads=width // HEAD_WIDTH,
        max_position_embeddings=chosen.context, tie_word_embeddings=True, use_cache=False, pad_token_id=None,
        bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def data_set(windows: texts.Windows) -> Rows:
    """Return windows with their labels."""
    return [{"input_ids": ids, "labels": ids} for ids in windows.tolist()]


def with_lists(rows: Rows) -> Rows:
    """Add the row of the cache that holds the list of each window's first token."""
    return [row | {"teacher_rows": number * len(row["labels"])} for number, row in enumerate(rows)]


def without_lists(rows: Rows) -> Rows:
    """Add the number that stands for no list."""
    return [row | {"teacher_rows": -1} for row in rows]


@torch.no_grad()
def write_cache(path: Path, teacher: LlamaForCausalLM, windows: texts.Windows, k: int) -> None:
    """Write the teacher's lists; a row of the cache belongs to a token."""
    teacher.eval()
    with (
        softcurve.lazy_logits(teacher, memory_budget=BUDGET, on_materialize="raise"),
        softcurve.TopKWriter(path, classes=teacher.config.vocab_size, dtype=torch.float16) as writer,
    ):
        for batch in windows.split(BATCH_OF_LISTS):
            log_probs, indices = teacher(input_ids=batch).logits.log_softmax(-1).topk(k)
            writer.append(softcurve.TopK(indices.flatten(0, 1), log_probs.flatten(0, 1)))


# --- memory ----------------------------------------------------------------------------------------------------------


def dense_loss(outputs: Any, labels: Tensor, num_items_in_batch: Any = None, *, cache: Tensor) -> Tensor:
    """Return the loss of ``DistillationTrainer`` from the student's logits and a dense cache of the teacher's."""
    logits = outputs.logits[:, :-1].flatten(0, 1)
    teacher = cache[: len(labels), :-1].float().flatten(0, 1)
    divergence = F.kl_div(logits.log_softmax(-1), teacher.log_softmax(-1), log_target=True, reduction="batchmean")
    return ALPHA * F.cross_entropy(logits, labels[:, 1:].flatten()) + (1 - ALPHA) * divergence


def print_memory(chosen: argparse.Namespace) -> None:
    """Print by how many megabytes a training step, which reads its part of a cache, raises the peak memory."""
    torch.set_num_threads(1)
    student = llama(chosen)
    windows = torch.randint(chosen.vocab, (chosen.batch, chosen.context))
    rows = data_set(windows)
    logits = torch.randn(chosen.batch, chosen.context, chosen.vocab).half()
    with tempfile.TemporaryDirectory() as folder:
        options = training_arguments(chosen, folder)
        if chosen.measured == CACHED:
            lists = Path(folder, "lists")
            with softcurve.TopKWriter(lists, classes=chosen.vocab, dtype=torch.float16) as writer:
                top = logits.float().log_softmax(-1).topk(chosen.top_k)
                writer.append(softcurve.TopK(top.indices.flatten(0, 1), top.values.flatten(0, 1)))
            trainer = DistillationTrainer(student, options, teacher=softcurve.TopK.load(lists), alpha=ALPHA)
            del top
        else:
            trainer = Trainer(student, options, compute_loss_func=partial(dense_loss, cache=logits))
        batch = trainer.data_collator(with_lists(rows) if chosen.measured == CACHED else rows)

        def step(size: int) -> None:
            part = {name: value[:size] for name, value in batch.items()}
            with softcurve.lazy_logits(student, memory_budget=BUDGET) if chosen.measured == CACHED else nullcontext():
                trainer.compute_loss(student, part).backward()

        step(1)  # loads what a step needs
        start = time.perf_counter()
        megabytes = growth(lambda: step(chosen.batch))
        print(json.dumps({"megabytes": megabytes, "seconds": time.perf_counter() - start}))


# --- the picture -----------------------------------------------------------------------------------------------------


def draw(report: dict[str, Any]) -> Figure:
    """Draw the losses, the sizes on disk and the memory of a step."""
    figure = Figure(figsize=(14, 4.4), layout="constrained")
    FigureCanvasAgg(figure)
    left, middle, right = figure.subplots(1, 3, width_ratios=(2, 1, 1))
    for name, history in report["curves"].items():
        losses = [row["nats"] for row in history]
        if name == "teacher":
            left.axhline(losses[-1], color=MUTED, linestyle="--", label="teacher, trained on the whole text")
        else:
            steps = [row["step"] for row in history]
            left.plot(steps, losses, "o-", color=COLOURS[name], markersize=4, label=f"student of {name}")
    left.set_title(f"Cross-entropy of {QUICK} held-out windows, nats per token", loc="left")
    left.set_xlabel("step of the students")
    left.legend(frameon=False)
    disk = report["bytes"]
    bars(middle, {name: disk[name] / 1e6 for name in (CACHED, DENSE)}, "Cache on disk", "MB")
    if report["memory"] is not None:
        sizes = {name: one["megabytes"] for name, one in report["memory"].items()}
        bars(right, sizes, "Extra memory of a training step", "MB")
    for axes in (left, middle, right):
        axes.spines[["top", "right"]].set_visible(False)
    return figure


# --- the command line ------------------------------------------------------------------------------------------------


def show(report: dict[str, Any]) -> None:
    """Print the size of the cache and the memory of a step."""
    print(f"\n{'Teacher':18s}{'on disk, MB':>14s}{'bytes/token':>14s}{'memory of a step, MB':>24s}")
    for name in (CACHED, DENSE):
        size = report["bytes"][name]
        print(f"{name:18s}{size / 1e6:14,.1f}{size / report['cached_tokens']:14,.0f}", end="")
        memory = report["memory"]
        print(f"{'':>24s}" if memory is None else f"{memory[name]['megabytes']:24,.0f}")


def wrong(chosen: argparse.Namespace) -> str:
    """Return what is wrong with the options."""
    if chosen.width % HEAD_WIDTH:
        return f"--width: must be a multiple of {HEAD_WIDTH}, got {chosen.width}"
    if chosen.top_k > min(chosen.vocab, 1024):
        return f"--top-k: must be at most 1024 and the vocabulary of {chosen.vocab}, got {chosen.top_k}"
    return ""


def main() -> None:
    """Train the teacher, write its lists, train the students, measure, and write the figure."""
    chosen = arguments(
        "Distil a small Llama from a cache by the Trainer of transformers.", OPTIONS, f"build/{NAME}.png", wrong
    )
    if chosen.measured is not None:
        print_memory(chosen)
        return
    start = time.perf_counter()
    text = texts.load(chosen.vocab, chosen.context)
    part = text.train[:: max(1, len(text.train) // chosen.windows)][: chosen.windows]
    held_out = data_set(text.validation[:: max(1, len(text.validation) // QUICK)][:QUICK])
    print(f"{text.train.numel():,} tokens for the teacher, {part.numel():,} for the students;", end=" ")
    print(f"read in {time.perf_counter() - start:.0f} s\n")
    print(HEADER)
    teacher, curves = llama(chosen, wider=2, layers=2), {}
    learn = partial(train, rate=RATE, shift=1)
    curves["teacher"] = learn("teacher", teacher, chosen, data_set(text.train), held_out, steps=chosen.teacher_steps)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "lists")
        write_cache(path, teacher, part, chosen.top_k)
        size = sum(file.stat().st_size for file in path.iterdir())
        distilled = partial(DistillationTrainer, teacher=softcurve.TopK.load(path), alpha=ALPHA)
        rows = data_set(part)
        student = partial(learn, steps=chosen.steps)
        curves["tokens"] = student("tokens", llama(chosen), chosen, rows, held_out)
        name = "tokens and lists"
        curves[name] = student(name, llama(chosen), chosen, with_lists(rows), without_lists(held_out), kind=distilled)
    report = settings(chosen) | {
        "cached_tokens": part.numel(),
        "bytes": {CACHED: size, DENSE: part.numel() * chosen.vocab * torch.float16.itemsize},
        "memory": measure((CACHED, DENSE)),
        "curves": curves,
    }
    report["seconds"] = round(time.perf_counter() - start, 1)
    show(report)
    with replacing(chosen.out) as file:
        draw(report).savefig(file, format="png", dpi=110)
    print(f"\nThe picture is at {chosen.out}")
    print(json.dumps(report, allow_nan=False))


if __name__ == "__main__":
    main()
