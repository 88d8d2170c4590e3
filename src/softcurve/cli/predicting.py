"""The work of ``softcurve predict``, from options to what is printed: one walk over the rows."""

from __future__ import annotations

import math
import time
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

import softcurve
from softcurve.array_types import Int64
from softcurve.cli.figures import figure_lines, figures
from softcurve.cli.interrupt import stop_if_interrupted
from softcurve.cli.predictions import Write, check_predictions_path, writing_predictions
from softcurve.cli.printing import print_record, print_table
from softcurve.fit import DataError
from softcurve.fit.atomic import check_outputs
from softcurve.fit.data.opening import open_source_for
from softcurve.fit.data.source import Label, Source, rows_within
from softcurve.fit.saved_head import SavedHead
from softcurve.fit.scores import Scores, ScoreSums

__all__ = ["predict_command"]

SHOWN = 10


def predict_command(head_path: Path, data: str, target: Path | None, out: Path | None) -> None:
    """Predict, write the predictions, print the table and the JSON line. Raises DataError."""
    if out is not None:
        check_predictions_path(out)
        check_outputs({"--out": out}, {"HEAD": head_path, "DATA": data, "--target": target})
    head = SavedHead.load(head_path)
    source = open_source_for(data, head.classes, head.weight.shape[1], target)
    # The reverse KL of a label is infinite, its cross-entropy is not.
    loss = "cross_entropy" if source.kind == "labels" else head.loss
    start = time.perf_counter()
    with nullcontext() if out is None else writing_predictions(out, source.rows, head.classes) as write:
        found = _predict(head, source, loss, data, write)
    seconds = time.perf_counter() - start
    record: dict[str, Any] = {
        "command": "predict",
        "head": str(head_path),
        "data": data,
        "rows": source.rows,
        "features": source.width,
        "classes": len(head.classes),
        "most_predicted": _most_predicted(found.counts, head.classes),
        "entropy_nats": found.entropy,
        "entropy_bits": found.entropy / math.log(2.0),
    }
    if found.scores is not None:
        record |= {"loss": loss} | figures("", found.scores)
    record |= {"seconds": seconds, "predictions": None if out is None else str(out)}
    print_table("softcurve predict", _lines(record))
    print_record(record)


@dataclass(frozen=True, eq=False)
class _Predicted:
    """What all rows together show: how often each class is predicted, the mean entropy, the scores against targets."""

    counts: Int64[np.ndarray, " classes"]
    entropy: float
    scores: Scores | None


@torch.no_grad()
def _predict(head: SavedHead, source: Source, loss: str, data: str, write: Write | None) -> _Predicted:
    weight, bias = head.weight.double(), head.bias.double()
    counts = np.zeros(len(bias), dtype=np.int64)
    entropy, sums = 0.0, ScoreSums(loss)
    for block in source.blocks(rows_within(*weight.shape)):
        stop_if_interrupted()
        logits = torch.addmm(bias, block.features.double(), weight.T)
        if not logits.isfinite().all():
            raise DataError(f"data: the logits of {data} overflow; scale its features as for the fit")
        predicted = logits.argmax(dim=1).numpy()
        counts += np.bincount(predicted, minlength=len(counts))
        entropy += softcurve.entropy(logits).sum().item()
        if block.target is not None:
            sums.add(logits, block.target)
        if write is not None:
            write(torch.softmax(logits, dim=1).numpy(), predicted)
    return _Predicted(counts, entropy / source.rows, sums.means() if sums.rows else None)


def _lines(record: dict[str, Any]) -> list[tuple[str, str]]:
    shown = record["most_predicted"]
    more = record["classes"] - len(shown)
    counts = ", ".join(f"{_shown(entry['class'])}: {entry['rows']}" for entry in shown)
    lines = [
        ("rows", str(record["rows"])),
        ("features", str(record["features"])),
        ("predicted", counts + (f", and {more} other classes" if more else "")),
        ("mean entropy", f"{record['entropy_nats']:.6f} nats = {record['entropy_bits']:.6f} bits"),
    ]
    if "loss" in record:
        lines.append(("loss used", record["loss"]))
        lines += figure_lines("", "", record)
    if record["predictions"] is not None:
        lines.append(("predictions", record["predictions"]))
    return lines


def _most_predicted(counts: Int64[np.ndarray, " classes"], classes: tuple[Label, ...]) -> list[dict[str, Any]]:
    order = np.argsort(-counts, kind="stable")[:SHOWN]
    return [{"class": classes[index], "rows": int(counts[index])} for index in order.tolist()]


def _shown(label: Label) -> str:
    text = str(label)
    return text if text.isprintable() else repr(label)
