"""A stock ``Trainer`` of transformers whose model makes no logits, in training and in evaluation."""

from __future__ import annotations

import argparse
import logging
import math
import os
import tempfile
import time
import warnings
from typing import Any

import softcurve

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing is downloaded
with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # some of the libraries that transformers imports are deprecated
    import transformers
    from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

    from softcurve.integrations.transformers import token_metrics

logging.getLogger("transformers").setLevel(logging.ERROR)
transformers.utils.logging.disable_progress_bar()

BUDGET = 16 * 2**20  # bytes of the tiles of logits
HEADER = f"{'':18s}{'step':>6s}{'nats':>10s}{'accuracy':>10s}{'s':>8s}"

Rows = list[dict[str, Any]]
History = list[dict[str, float]]


def training_arguments(chosen: argparse.Namespace, folder: str, **options: Any) -> TrainingArguments:
    """Return arguments of a training on the CPU that writes and logs nothing by itself."""
    return TrainingArguments(
        folder, per_device_train_batch_size=chosen.batch, per_device_eval_batch_size=chosen.batch, seed=chosen.seed,
        use_cpu=True, dataloader_pin_memory=False, remove_unused_columns=False, save_strategy="no", report_to=[],
        disable_tqdm=True, logging_strategy="no", **options,
    )  # fmt: skip


class Progress(TrainerCallback):  # type: ignore[misc]
    """Print one line for each evaluation, and keep its step, cross-entropy in nats and accuracy."""

    def __init__(self, name: str) -> None:
        self.name, self.start = name, time.perf_counter()
        self.history: History = []

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: dict[str, float], **others: Any) -> None:
        """Print and keep the metrics."""
        loss, accuracy = math.log(metrics["eval_perplexity"]), metrics["eval_accuracy"]
        self.history.append({"step": state.global_step, "nats": loss, "accuracy": accuracy})
        seconds = time.perf_counter() - self.start
        print(f"{self.name:18s}{state.global_step:6d}{loss:10.4f}{accuracy:10.1%}{seconds:8.0f}", flush=True)


def train(
    name: str, model: Any, chosen: argparse.Namespace, rows: Rows, held_out: Rows, *, steps: int, rate: float,
    shift: int, evaluations: int = 6, kind: Any = Trainer, **options: Any,
) -> History:  # fmt: skip
    """Train a model without logits, and return the metrics of each evaluation on held-out rows."""
    with tempfile.TemporaryDirectory() as folder:
        arguments = training_arguments(
            chosen, folder, max_steps=steps, learning_rate=rate, lr_scheduler_type="cosine", warmup_steps=5,
            eval_strategy="steps", eval_steps=max(1, steps // evaluations), eval_on_start=True,
        )  # fmt: skip
        trainer = kind(
            model, arguments, train_dataset=rows, eval_dataset=held_out, **token_metrics(shift=shift), **options
        )
        trainer.remove_callback(PrinterCallback)
        trainer.add_callback(progress := Progress(name))
        with softcurve.lazy_logits(model, memory_budget=BUDGET, on_materialize="raise"):
            trainer.train()
    return progress.history
