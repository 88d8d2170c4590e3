"""The work of ``softcurve fit``, from options to what is printed."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from softcurve.app.figures import figure_lines, figures
from softcurve.app.printing import fit_progress, print_record, print_table
from softcurve.fit import DataError
from softcurve.fit.atomic import check_output
from softcurve.fit.evaluation import check_loss, evaluate
from softcurve.fit.lbfgs import Fit, fit_head
from softcurve.fit.rows import Rows, load_rows, split
from softcurve.fit.saved_head import SavedHead

__all__ = ["FitOptions", "fit_command"]


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
    check_output(options.out, options.data, options.target)
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
        **figures("held_out_", evaluate(fit.weight, fit.bias, held, options.loss)),
    }


def _class_mass(rows: Rows) -> NDArray[Any]:
    return rows.target.sum(axis=0) if rows.soft else np.bincount(rows.target, minlength=len(rows.classes))


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
        *figure_lines("held-out ", "held_out_", record),
        ("seconds", f"{record['seconds']:.2f}"),
        ("head", record["head"]),
    ]
    return lines
