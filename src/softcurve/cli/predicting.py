"""The command ``softcurve predict``: predict and score in one pass over the rows."""

from __future__ import annotations

import math
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch

import softcurve
from softcurve.cli.interrupt import stop_if_interrupted
from softcurve.cli.predictions import Write, check_predictions_path, writing_predictions
from softcurve.cli.printing import Rows, print_record, print_table, score_figures, score_rows
from softcurve.fit import DataError
from softcurve.fit.atomic import check_outputs
from softcurve.fit.data.opening import open_source_for
from softcurve.fit.data.source import Label, Source, rows_within
from softcurve.fit.saved_head import SavedHead
from softcurve.fit.scores import ScoreSums

__all__ = ["predict_command"]

MOST_SHOWN = 10  # classes


def predict_command(head_path: Path, data: str, target: Path | None, out: Path | None) -> None:
    """Predict, write the predictions, and print the table and the JSON line. Raises DataError."""
    if out is not None:
        check_predictions_path(out)
        check_outputs({"--out": out}, {"HEAD": head_path, "DATA": data, "--target": target})
    head = SavedHead.load(head_path)
    source = open_source_for(data, head.classes, head.weight.shape[1], target)
    start = time.perf_counter()
    with nullcontext() if out is None else writing_predictions(out, source.rows, head.classes) as write:
        results = _predict(head, source, data, write)
    record: dict[str, Any] = {
        "command": "predict",
        "head": str(head_path),
        "data": data,
        "rows": source.rows,
        "features": source.width,
        "classes": len(head.classes),
        **results,
        "seconds": time.perf_counter() - start,
        "predictions": None if out is None else str(out),
    }
    print_table("softcurve predict", _rows(record))
    print_record(record)


@torch.no_grad()
def _predict(head: SavedHead, source: Source, data: str, write: Write | None) -> dict[str, Any]:
    """Predict block by block; return the most predicted classes, the mean entropy, and the scores against targets."""
    weight, bias = head.weight.double(), head.bias.double()
    counts, entropy = np.zeros(len(bias), dtype=np.int64), 0.0
    # The reverse KL of a label is infinite, its cross-entropy is not.
    loss = "cross_entropy" if source.kind == "labels" else head.loss
    sums = ScoreSums(loss)
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
    order = np.argsort(-counts, kind="stable")[:MOST_SHOWN]
    entropy /= source.rows
    return {
        "most_predicted": [{"class": head.classes[index], "rows": int(counts[index])} for index in order.tolist()],
        "entropy_nats": entropy,
        "entropy_bits": entropy / math.log(2.0),
        **({"loss": loss} | score_figures("", sums.means()) if sums.rows else {}),
    }


def _rows(record: dict[str, Any]) -> Rows:
    shown = record["most_predicted"]
    more = record["classes"] - len(shown)
    counts = ", ".join(f"{_printable(entry['class'])}: {entry['rows']}" for entry in shown)
    rows = [
        ("rows", str(record["rows"])),
        ("features", str(record["features"])),
        ("predicted", counts + (f", and {more} other classes" if more else "")),
        ("mean entropy", f"{record['entropy_nats']:.6f} nats = {record['entropy_bits']:.6f} bits"),
    ]
    if "loss" in record:
        rows += [("loss used", record["loss"]), *score_rows("", "", record)]
    return rows if record["predictions"] is None else [*rows, ("predictions", record["predictions"])]


def _printable(label: Label) -> str:
    text = str(label)
    return text if text.isprintable() else repr(label)
