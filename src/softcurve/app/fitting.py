"""The work of ``softcurve fit``, from options to what is printed and written."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

import softcurve
from softcurve.app.encoding import encoded
from softcurve.app.figures import figure_lines, figures
from softcurve.app.interrupt import stop_if_interrupted
from softcurve.app.printing import as_json, fit_progress, print_record, print_table
from softcurve.app.report.record import FitReport, PathPoint
from softcurve.fit import DataError
from softcurve.fit.atomic import check_outputs, replacing_all
from softcurve.fit.data.opening import open_source
from softcurve.fit.data.source import Source, rows_within
from softcurve.fit.data.subset import split_source
from softcurve.fit.diagnostics import Diagnostics, diagnose
from softcurve.fit.fitting import Fit, fit_head
from softcurve.fit.group import ALONE, Group, require_same
from softcurve.fit.head_spectrum import CurvatureSpectrum, curvature_spectrum
from softcurve.fit.losses import check_loss
from softcurve.fit.path import regularisation_path
from softcurve.fit.saved_head import SavedHead
from softcurve.fit.solver.newton import Step

__all__ = ["FitOptions", "fit_command"]

OPTIONS = {"head": "--out", "record": "--record", "report": "--report"}  # what each output is called


@dataclass(frozen=True)
class FitOptions:
    """The options of ``softcurve fit``."""

    data: str
    target: Path | None
    loss: str
    C: float
    path: str | None
    fit_intercept: bool
    class_count: int | None
    holdout: float
    seed: int
    max_iter: int
    tol: float
    precision: str
    dtype: str
    memory: int | None
    checkpoint: Path | None
    checkpoint_every: float
    out: Path
    record: Path | None
    report: Path | None
    timeout: float


@dataclass(frozen=True, eq=False)
class Work:
    """What came of a fit."""

    train: Source
    held: Source | None
    fit: Fit
    path: tuple[PathPoint, ...]
    seconds: float
    on_train: Diagnostics
    on_held: Diagnostics | None
    spectrum: CurvatureSpectrum | str


def fit_command(
    options: FitOptions,
    together: Group = ALONE,
    *,
    progress: bool | None,
    on_step: Callable[[Step], None] = lambda step: None,
) -> None:
    """Fit, save the head, its record and its report, print the table and the JSON line. Raises DataError.

    Of several processes the first one writes and prints. ``on_step`` is called with every step of a fit.
    """
    _require_same_options(options, together)
    outputs: dict[str, Path] = {}
    with together.agreed():
        if together.first:
            outputs = _outputs(options)
    Cs = _strengths(options.path)
    source = open_source(options.data, options.target, class_count=options.class_count, together=together)
    assert source.kind is not None
    check_loss(options.loss, source.kind)
    train, held = split_source(source, options.holdout, options.seed) if options.holdout else (source, None)
    work = _work(options, train, held, Cs, on_step, progress=progress if together.first else False)
    with together.agreed():
        if together.first:
            _write(options, source, work, outputs)


def _write(options: FitOptions, source: Source, work: Work, outputs: dict[str, Path]) -> None:
    record = _record(options, work) | {name: str(path) for name, path in outputs.items()}
    dtype = getattr(torch, options.dtype)
    head = SavedHead(work.fit.weight.to(dtype), work.fit.bias.to(dtype), source.classes, options.loss, options.C)
    if not (head.weight.isfinite().all() and head.bias.isfinite().all()):
        raise DataError(f"--dtype: the head goes beyond the range of {options.dtype}; take float64, or scale the data")
    page = _report(options, source, work)  # drawn before anything is written
    with replacing_all({OPTIONS[name]: path for name, path in outputs.items()}) as files:
        head.write(files["--out"])
        history = [asdict(step) for step in work.fit.history]
        files["--record"].write(encoded(as_json(record | {"history": history}) + "\n"))
        files["--report"].write(encoded(page))
        stop_if_interrupted()
    print_table("softcurve fit", _lines(record))
    print_record(record)


def _require_same_options(options: FitOptions, together: Group) -> None:
    """Raise DataError where a process was given another option than the first.

    The path of the data may be another on another machine: what the files hold is compared when they are opened.
    """
    given = asdict(options) | {"target": "a file" if options.target else None}
    del given["data"]
    named = {"fit_intercept": "intercept"}
    said = {f"--{named.get(name, name).replace('_', '-')}": value for name, value in given.items()}
    require_same(together, said, "start all with the same options")


def _outputs(options: FitOptions) -> dict[str, Path]:
    """Where the files go, by name; all of them can be written."""
    if options.out.suffix.lower() != ".safetensors":
        raise DataError(f"--out: {options.out} must end in .safetensors")
    outputs = {
        "head": options.out,
        "record": options.record or options.out.with_suffix(".json"),
        "report": options.report or options.out.with_suffix(".html"),
    }
    for (name, path), suffix in zip(outputs.items(), (".safetensors", ".json", ".html"), strict=True):
        if path.suffix.lower() != suffix:
            raise DataError(f"{OPTIONS[name]}: {path} must end in {suffix}")
    written = {OPTIONS[name]: path for name, path in outputs.items()}
    written |= {} if options.checkpoint is None else {"--checkpoint": options.checkpoint}
    check_outputs(written, {"DATA": options.data, "--target": options.target})
    return outputs


def _strengths(path: str | None) -> tuple[float, ...]:
    try:
        Cs = tuple(float(C) for C in path.split(",")) if path else ()
    except ValueError as error:
        raise DataError(f"--path: {path} must be numbers with commas between them, such as 0.01,0.1,1,10") from error
    if not all(C > 0 for C in Cs):
        raise DataError(f"--path: {path} must be positive numbers, the inverse strengths C of the penalty")
    return Cs


def _work(
    options: FitOptions,
    train: Source,
    held: Source | None,
    Cs: Sequence[float],
    on_step: Callable[[Step], None],
    *,
    progress: bool | None,
) -> Work:
    started = time.perf_counter()
    common: dict[str, Any] = {
        "loss": options.loss,
        "fit_intercept": options.fit_intercept,
        "tol": options.tol,
        "max_iter": options.max_iter,
        "precision": options.precision,
        "memory_budget": None if options.memory is None else options.memory * 2**20,
    }
    with fit_progress(options.tol, show=progress) as (show_step, show_product):

        def noted(step: Step) -> None:
            on_step(step)
            show_step(step)

        common |= {"on_step": noted, "on_product": show_product}
        fit = fit_head(
            train, C=options.C, checkpoint=options.checkpoint, checkpoint_every=options.checkpoint_every, **common
        )
        seconds = time.perf_counter() - started
        path = _path(train, held, Cs, options, common)
    return Work(
        train=train,
        held=held,
        fit=fit,
        path=path,
        seconds=seconds,
        on_train=_diagnosed(options, train, fit),
        on_held=None if held is None else _diagnosed(options, held, fit),
        spectrum=curvature_spectrum(
            train, fit.weight, fit.bias if options.fit_intercept else None, loss=options.loss, seed=options.seed
        ),
    )


def _diagnosed(options: FitOptions, source: Source, fit: Fit, **wanted: Any) -> Diagnostics:
    classes, width = fit.weight.shape
    rows = None if options.memory is None else rows_within(classes, width, options.memory * 2**20)
    return diagnose(source, fit.weight, fit.bias, options.loss, rows_at_once=rows, **wanted)


def _path(
    train: Source, held: Source | None, Cs: Sequence[float], options: FitOptions, common: dict[str, Any]
) -> tuple[PathPoint, ...]:
    if not Cs:
        return ()
    points = []
    for C, fit in zip(Cs, regularisation_path(train, Cs, **common), strict=True):
        on_train = _diagnosed(options, train, fit, hardest=0)
        on_held = None if held is None else _diagnosed(options, held, fit, hardest=0)
        points.append(
            PathPoint(
                C=C,
                train_loss=on_train.loss,
                held_loss=None if on_held is None else on_held.loss,
                held_accuracy=None if on_held is None else on_held.accuracy,
                weight_norm=float(fit.weight.norm()),
                converged=fit.converged,
            )
        )
    return tuple(points)


def _record(options: FitOptions, work: Work) -> dict[str, Any]:
    fit, train = work.fit, work.train
    return {
        "command": "fit",
        "data": options.data,
        "rows": work.on_train.rows + (0 if work.on_held is None else work.on_held.rows),
        "rows_train": work.on_train.rows,
        "rows_held_out": 0 if work.on_held is None else work.on_held.rows,
        "features": train.width,
        "classes": len(train.classes),
        # A distribution may have mass where it is not largest.
        "classes_without_training_rows": int((work.on_train.support == 0).sum()) if train.kind == "labels" else 0,
        "targets": train.kind,
        "loss": options.loss,
        "C": options.C,
        "fit_intercept": options.fit_intercept,
        "seed": options.seed,
        "precision": options.precision,
        "dtype": options.dtype,
        "iterations": fit.iterations,
        "products": fit.products,
        "converged": fit.converged,
        "separated": fit.separated,
        "ended": fit.reason,
        "objective": fit.objective,
        "gradient_max": fit.gradient_max,
        "tol": options.tol,
        "train_loss_nats": work.on_train.loss,
        "train_accuracy": work.on_train.accuracy,
        **({} if work.on_held is None else figures("held_out_", work.on_held)),
        "calibration_error": (work.on_held or work.on_train).calibration.error,
        "path": [asdict(point) for point in work.path],
        "seconds": work.seconds,
    }


def _lines(record: dict[str, Any]) -> list[tuple[str, str]]:
    converged = "yes" if record["converged"] else "NO"
    gradient = f"gradient maximum {record['gradient_max']:.1e}, tolerance {record['tol']:.1e}"
    lines = [
        ("rows", f"{record['rows']} ({record['rows_train']} to fit, {record['rows_held_out']} held out)"),
        ("features", str(record["features"])),
        ("classes", str(record["classes"])),
        ("targets", record["targets"]),
        ("loss", f"{record['loss']}, C = {record['C']:g}"),
        ("Newton steps", f"{record['iterations']} ({record['products']} products with the curvature)"),
        ("converged", f"{converged} ({gradient})"),
    ]
    if not record["converged"]:
        lines.append(("warning", record["ended"]))
    if late := [f"{point['C']:g}" for point in record["path"] if not point["converged"]]:
        lines.append(("warning", f"of the path, C = {', '.join(late)} did not converge; raise max_iter or tol"))
    if record["separated"]:
        lines.append(("warning", "the classes can be separated: without a penalty the loss has no minimum; give a --C"))
    if absent := record["classes_without_training_rows"]:
        who = "1 class has" if absent == 1 else f"{absent} classes have"
        lines.append(("warning", f"{who} no training row; the probability tends to zero"))
    lines.append(("train loss", f"{record['train_loss_nats']:.6f} nats, accuracy {record['train_accuracy']:.4f}"))
    if record["rows_held_out"]:
        lines += figure_lines("held-out ", "held_out_", record)
    lines += [
        ("calibration error", f"{record['calibration_error']:.4f}"),
        ("seconds", f"{record['seconds']:.2f}"),
        *((name, record[name]) for name in ("head", "record", "report")),
    ]
    return lines


def _report(options: FitOptions, source: Source, work: Work) -> str:
    from softcurve.app.report import render_report

    fit = work.fit
    assert source.kind is not None
    shown = {
        "intercept": "yes" if options.fit_intercept else "no",
        "precision": options.precision,
        "held out": f"{options.holdout:g} of the rows, seed {options.seed}",
    }
    report = FitReport(
        data=options.data,
        rows=work.on_train.rows,
        features=source.width,
        classes=source.classes,
        kind=source.kind,
        loss=options.loss,
        C=options.C,
        version=softcurve.__version__,
        seconds=work.seconds,
        converged=fit.converged,
        gradient_max=fit.gradient_max,
        history=fit.history,
        train=work.on_train,
        held=work.on_held,
        spectrum=work.spectrum,
        path=work.path,
        options=shown,
        tol=options.tol,
    )
    return render_report(report)
