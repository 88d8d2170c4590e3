"""The work of ``softcurve fit`` and ``softcurve predict``, from options to what is printed."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

import softcurve
from softcurve.app.predictions import check_predictions_path, write_predictions
from softcurve.app.printing import fit_progress, print_record, print_table
from softcurve.fit import DataError
from softcurve.fit.atomic import check_writable
from softcurve.fit.evaluation import Scores, check_loss, evaluate
from softcurve.fit.lbfgs import Fit, fit_head
from softcurve.fit.rows import Label, Rows, load_rows, load_rows_for, split
from softcurve.fit.saved_head import SavedHead

__all__ = ["FitOptions", "fit_command", "predict_command"]

SHOWN = 10


@dataclass(frozen=True)
class FitOptions:
    """The options of ``softcurve fit``."""

    data: str
    target: Path | None
    loss: str
    C: float
    holdout: float
    seed: int
    max_iter: int
    tol: float
    dtype: str
    out: Path


def fit_command(options: FitOptions, *, progress: bool | None) -> None:
    """Fit, save the head, print the table and the JSON line. Raises DataError."""
    if options.out.suffix.lower() != ".safetensors":
        raise DataError(f"--out: {options.out} must end in .safetensors")
    _check_out(options.out, options.data, options.target)
    rows = load_rows(options.data, options.target)
    check_loss(options.loss, rows)
    train, held = split(rows, options.holdout, options.seed)
    start = time.perf_counter()
    with fit_progress(options.max_iter, show=progress) as on_iteration:
        fit = fit_head(
            train,
            loss=options.loss,
            C=options.C,
            max_iter=options.max_iter,
            tol=options.tol,
            dtype=torch.float64 if options.dtype == "float64" else torch.float32,
            on_iteration=on_iteration,
        )
    seconds = time.perf_counter() - start
    record = _fit_record(options, rows, train, held, fit) | {"seconds": seconds, "head": str(options.out)}
    SavedHead(fit.weight, fit.bias, rows.classes, options.loss, options.C).save(options.out)
    print_table("softcurve fit", _fit_lines(record))
    print_record(record)


def predict_command(head_path: Path, data: str, target: Path | None, out: Path | None) -> None:
    """Predict, write the predictions, print the table and the JSON line. Raises DataError."""
    if out is not None:
        check_predictions_path(out)
        _check_out(out, data, target, head_path)
    head = SavedHead.load(head_path)
    features, rows = load_rows_for(data, head.classes, head.weight.shape[1], target)
    start = time.perf_counter()
    weight, bias = head.weight.double(), head.bias.double()
    logits = torch.addmm(bias, torch.tensor(features), weight.T)
    if not logits.isfinite().all():
        raise DataError(f"data: the logits of {data} overflow; scale its features as for the fit")
    predicted = logits.argmax(dim=1).numpy()
    seconds = time.perf_counter() - start
    entropy = float(softcurve.entropy(logits).mean())
    record: dict[str, Any] = {
        "command": "predict",
        "head": str(head_path),
        "data": data,
        "rows": len(features),
        "features": features.shape[1],
        "classes": len(head.classes),
        "most_predicted": _most_predicted(predicted, head.classes),
        "entropy_nats": entropy,
        "entropy_bits": entropy / math.log(2.0),
    }
    if rows is not None:
        # The reverse KL of a label is infinite, its cross-entropy is not.
        loss = head.loss if rows.soft else "cross_entropy"
        record |= {"loss": loss} | _figures("", evaluate(weight, bias, rows, loss))
    record |= {"seconds": seconds, "predictions": None if out is None else str(out)}
    if out is not None:
        write_predictions(out, torch.softmax(logits, dim=1).numpy(), predicted, head.classes)
    print_table("softcurve predict", _predict_lines(record))
    print_record(record)


def _check_out(out: Path, *inputs: str | Path | None) -> None:
    check_writable(out, "--out")
    if any(given is not None and Path(given).resolve() == out.resolve() for given in inputs):
        raise DataError(f"--out: {out} is also an input; give another name")


def _fit_record(options: FitOptions, rows: Rows, train: Rows, held: Rows, fit: Fit) -> dict[str, Any]:
    return {
        "command": "fit",
        "data": options.data,
        "rows": len(rows),
        "rows_train": len(train),
        "rows_held_out": len(held),
        "features": rows.features.shape[1],
        "classes": len(rows.classes),
        "classes_without_training_rows": int((_class_mass(train) == 0).sum()),
        "targets": "distributions" if rows.soft else "labels",
        "loss": options.loss,
        "C": options.C,
        "seed": options.seed,
        "dtype": options.dtype,
        "iterations": fit.iterations,
        "evaluations": fit.evaluations,
        "converged": fit.converged,
        "gradient_max": fit.gradient_max,
        "tol": options.tol,
        "train_loss_nats": evaluate(fit.weight, fit.bias, train, options.loss).loss,
        **_figures("held_out_", evaluate(fit.weight, fit.bias, held, options.loss)),
    }


def _class_mass(rows: Rows) -> NDArray[Any]:
    return rows.target.sum(axis=0) if rows.soft else np.bincount(rows.target, minlength=len(rows.classes))


def _figures(side: str, scores: Scores) -> dict[str, Any]:
    return {
        f"{side}loss_nats": scores.loss,
        f"{side}loss_bits": scores.loss / math.log(2.0),
        f"{side}accuracy": scores.accuracy,
        f"{side}kl_nats": scores.kl,
    }


def _fit_lines(record: dict[str, Any]) -> list[tuple[str, str]]:
    converged = "yes" if record["converged"] else "NO"
    gradient = f"gradient maximum {record['gradient_max']:.1e}, tolerance {record['tol']:.1e}"
    lines = [
        ("rows", f"{record['rows']} ({record['rows_train']} to fit, {record['rows_held_out']} held out)"),
        ("features", str(record["features"])),
        ("classes", str(record["classes"])),
        ("targets", record["targets"]),
        ("loss", f"{record['loss']}, C = {record['C']:g}"),
        ("iterations", f"{record['iterations']} ({record['evaluations']} evaluations, {record['dtype']})"),
        ("converged", f"{converged} ({gradient})"),
    ]
    if not record["converged"]:
        lines.append(("warning", "raise --max-iter or --tol, or scale the features to the order of 1"))
    if absent := record["classes_without_training_rows"]:
        lines.append(("warning", f"{absent} classes have no training row; their probability tends to zero"))
    lines += [
        ("train loss", f"{record['train_loss_nats']:.6f} nats"),
        *_figure_lines("held-out ", "held_out_", record),
        ("seconds", f"{record['seconds']:.2f}"),
        ("head", record["head"]),
    ]
    return lines


def _predict_lines(record: dict[str, Any]) -> list[tuple[str, str]]:
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
        lines += _figure_lines("", "", record)
    if record["predictions"] is not None:
        lines.append(("predictions", record["predictions"]))
    return lines


def _figure_lines(label: str, side: str, record: dict[str, Any]) -> list[tuple[str, str]]:
    lines = [
        (f"{label}loss", f"{record[f'{side}loss_nats']:.6f} nats = {record[f'{side}loss_bits']:.6f} bits"),
        (f"{label}accuracy", f"{record[f'{side}accuracy']:.4f}"),
    ]
    if record[f"{side}kl_nats"] is not None:
        lines.append((f"{label}KL(target||model)", f"{record[f'{side}kl_nats']:.6f} nats"))
    return lines


def _most_predicted(predicted: NDArray[np.int64], classes: tuple[Label, ...]) -> list[dict[str, Any]]:
    counts = np.bincount(predicted, minlength=len(classes))
    order = np.argsort(-counts, kind="stable")[:SHOWN]
    return [{"class": classes[index], "rows": int(counts[index])} for index in order.tolist()]


def _shown(label: Label) -> str:
    text = str(label)
    return text if text.isprintable() else repr(label)
