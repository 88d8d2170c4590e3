"""The command ``softcurve fit``: fit a head, write it with its record and its report, and print a summary."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch

from softcurve.cli.interrupt import stop_if_interrupted
from softcurve.cli.options import FitOptions, check_suffix, keys_of
from softcurve.cli.printing import (
    TextRows,
    fit_progress,
    print_results,
    print_table,
    score_figures,
    score_rows,
    to_json,
)
from softcurve.cli.report.conclusion import class_figures, coefficient_figures, conclusion_figures, recommend
from softcurve.cli.report.record import FitReport, PathPoint
from softcurve.cli.streams import encoded
from softcurve.files.atomic import replacing_all
from softcurve.fit import DataError
from softcurve.fit.coefficients import short_summary
from softcurve.fit.data.opening import open_source
from softcurve.fit.data.source import Source, block_rows
from softcurve.fit.data.subset import split_source
from softcurve.fit.diagnostics import Diagnostics, baseline_scores, diagnose
from softcurve.fit.fitting import Fit, fit_head, regularisation_path
from softcurve.fit.group import ALONE, Group, require_same
from softcurve.fit.head_spectrum import curvature_spectrum
from softcurve.fit.losses import check_loss
from softcurve.fit.outputs import check_outputs, require_new
from softcurve.fit.saved_head import SavedHead
from softcurve.fit.solver.newton import Step


def fit_command(
    options: FitOptions, group: Group = ALONE, *, progress: bool | None, as_json: bool | None = None,
    on_step: Callable[[Step], None] = lambda step: None,
) -> None:  # fmt: skip
    """Fit, write the head, its record and its report, and print the table or the JSON line. Raises DataError."""
    # The path of the data may differ between machines: the contents of the files are compared when they are opened.
    values = asdict(options) | {"target": "a file" if options.target else None}
    values["intercept"] = values.pop("fit_intercept")
    del values["data"]
    named = {f"--{name.replace('_', '-')}": value for name, value in values.items()}
    require_same(group, named, "start all with the same options")
    with group.agreed():
        outputs = _outputs(options) if group.first else {}
    source = open_source(
        options.data, options.target, keys=keys_of(options), class_count=options.class_count, group=group
    )
    assert source.kind is not None
    check_loss(options.loss, source.kind)
    train, held = split_source(source, options.holdout, options.seed) if options.holdout else (source, None)
    report = _fit(options, train, held, on_step, progress if group.first else False)
    with group.agreed():
        if group.first:
            _write(report, outputs, as_json)


def _outputs(options: FitOptions) -> dict[str, Path]:
    """Return the paths of the outputs by their options, after a check that all can be written."""
    outputs = {
        "--out": options.out,
        "--record": options.record or options.out.with_suffix(".json"),
        "--report": options.report or options.out.with_suffix(".html"),
    }
    for (option, path), suffix in zip(outputs.items(), (".safetensors", ".json", ".html"), strict=True):
        check_suffix(option, path, suffix)
    checkpoint = {} if options.checkpoint is None else {"--checkpoint": options.checkpoint}
    check_outputs(outputs | checkpoint, {"DATA": options.data, "--target": options.target})
    if not options.overwrite:  # a checkpoint that exists is resumed
        require_new(outputs)
    return outputs


def _strengths(path: str | None) -> tuple[float, ...]:
    try:
        Cs = tuple(float(C) for C in path.split(",")) if path else ()
    except ValueError as error:
        raise DataError(f"--path: {path} must be numbers with commas between them, such as 0.01,0.1,1,10") from error
    if not all(C > 0 for C in Cs):
        raise DataError(f"--path: {path} must be positive numbers, the inverse strengths C of the penalty")
    return Cs


def _fit(
    options: FitOptions, train: Source, held: Source | None, on_step: Callable[[Step], None], progress: bool | None
) -> FitReport:
    Cs = _strengths(options.path)
    started = time.perf_counter()
    names = ("loss", "fit_intercept", "tol", "max_iter", "precision")
    common: dict[str, Any] = {name: getattr(options, name) for name in names}
    common["memory_budget"] = None if options.memory is None else options.memory * 2**20
    with fit_progress(options.tol, on_step, show=progress) as callbacks:
        common |= callbacks
        kept: dict[str, Any] = {"checkpoint": options.checkpoint, "checkpoint_every": options.checkpoint_every}
        fit = fit_head(train, C=options.C, **kept, **common)
        seconds = time.perf_counter() - started
        fits = regularisation_path(train, Cs, **common) if Cs else ()
        path = tuple(_path_point(options, C, each, train, held) for C, each in zip(Cs, fits, strict=True))
    bias = fit.bias if options.fit_intercept else None
    assert train.kind is not None
    on_train = _diagnose(options, train, fit)
    rows = _rows_at_once(options, train)
    coefficients = short_summary(
        train, fit, loss=options.loss, C=options.C, intercept=options.fit_intercept, tol=options.tol,
        budget=common["memory_budget"],
    )  # fmt: skip
    baseline = baseline_scores(held or train, on_train.frequencies, options.loss, rows_at_once=rows)
    return FitReport(
        options, fit, seconds, train.width, train.classes, train.kind, train=on_train, baseline=baseline,
        held=None if held is None else _diagnose(options, held, fit),
        spectrum=curvature_spectrum(train, fit.weight, bias, loss=options.loss, seed=options.seed), path=path,
        coefficients=coefficients,
    )  # fmt: skip


def _rows_at_once(options: FitOptions, source: Source) -> int | None:
    return None if options.memory is None else block_rows(source, budget=options.memory * 2**20)


def _diagnose(options: FitOptions, source: Source, fit: Fit, **how: Any) -> Diagnostics:
    return diagnose(source, fit.weight, fit.bias, options.loss, rows_at_once=_rows_at_once(options, source), **how)


def _path_point(options: FitOptions, C: float, fit: Fit, train: Source, held: Source | None) -> PathPoint:
    on_held = None if held is None else _diagnose(options, held, fit, hardest=0)
    return PathPoint.of(C, fit, _diagnose(options, train, fit, hardest=0), on_held)


def _write(report: FitReport, outputs: dict[str, Path], as_json: bool | None) -> None:
    from softcurve.cli.report import render_report

    options, fit = report.options, report.fit
    record = _record(report) | dict(zip(("head", "record", "report"), map(str, outputs.values()), strict=True))
    dtype = getattr(torch, options.dtype)
    head = SavedHead(fit.weight.to(dtype), fit.bias.to(dtype), report.classes, options.loss, options.C)
    if not (head.weight.isfinite().all() and head.bias.isfinite().all()):
        raise DataError(f"--dtype: the head is beyond the range of {options.dtype}; use float64, or scale the features")
    page = encoded(render_report(report))  # may fail, so it comes before anything is written
    with replacing_all(outputs) as files:
        head.write(files["--out"])
        history = [asdict(step) for step in fit.history]
        content = record | class_figures(report) | coefficient_figures(report) | {"history": history}
        files["--record"].write(encoded(to_json(content) + "\n"))
        files["--report"].write(page)
        stop_if_interrupted()
    show = partial(print_table, "softcurve fit", _rows(record, report))
    print_results(record, show, as_json=as_json, written=tuple(outputs.values()))


def _record(report: FitReport) -> dict[str, Any]:
    options, fit, train, held = report.options, report.fit, report.train, report.held
    rows_held = 0 if held is None else held.rows
    # Absent classes are those without a label: a distribution may give a class probability that is never the largest.
    absent = int((train.support == 0).sum()) if report.kind == "labels" else 0
    return {
        "command": "fit", "data": options.data, "rows": train.rows + rows_held, "rows_train": train.rows,
        "rows_held_out": rows_held, "features": report.features, "classes": len(report.classes),
        "classes_without_training_rows": absent, "targets": report.kind,
        **{name: getattr(options, name) for name in ("loss", "C", "fit_intercept", "seed", "precision", "dtype")},
        **{name: getattr(fit, name) for name in ("iterations", "products", "converged", "separated")},
        "ended": fit.reason, "objective": fit.objective, "gradient_max": fit.gradient_max, "tol": options.tol,
        "train_loss_nats": train.loss, "train_accuracy": train.accuracy,
        **({} if held is None else score_figures("held_out_", held)),
        "calibration_error": report.judged.calibration.error, "path": [asdict(point) for point in report.path],
        **conclusion_figures(report),
        "seconds": report.seconds,
    }  # fmt: skip


def _rows(record: dict[str, Any], report: FitReport) -> TextRows:
    converged = "yes" if record["converged"] else "NO"
    return [
        ("samples", f"{record['rows']} ({record['rows_train']} training, {record['rows_held_out']} held out)"),
        *((name, str(record[name])) for name in ("features", "classes", "targets")),
        ("loss", f"{record['loss']}, C = {record['C']:g}"),
        ("Newton steps", f"{record['iterations']} ({record['products']} Hessian–vector products)"),
        ("converged", f"{converged} (gradient maximum {record['gradient_max']:.1e}, tolerance {record['tol']:.1e})"),
        *(("warning", warning) for warning in _warnings(record)),
        ("training loss", f"{record['train_loss_nats']:.6f} nats, accuracy {record['train_accuracy']:.4f}"),
        *(score_rows("held-out ", "held_out_", record) if record["rows_held_out"] else ()),
        *_comparisons(report),
        ("calibration error", f"{record['calibration_error']:.4f}"),
        ("recommended C", str(recommend(report))),
        ("seconds", f"{record['seconds']:.2f}"),
    ]


def _comparisons(report: FitReport) -> TextRows:
    """Return the rows of a table with what the scores are compared with."""
    rows, baseline = [], report.baseline
    if (intervals := report.intervals) is not None:
        (low_loss, high_loss), (low, high) = intervals.loss, intervals.accuracy
        ends = f"loss {low_loss:.4f} to {high_loss:.4f} nats, accuracy {low:.4f} to {high:.4f}"
        rows.append((f"{intervals.level:.0%} bootstrap", ends))
    return [*rows, ("majority baseline", f"loss {baseline.loss:.4f} nats, accuracy {baseline.accuracy:.4f}")]


def _warnings(record: dict[str, Any]) -> list[str]:
    warnings = [] if record["converged"] else [record["ended"]]
    if late := [f"{point['C']:g}" for point in record["path"] if not point["converged"]]:
        warnings.append(f"on the path, C = {', '.join(late)} did not converge; raise --max-iter or --tol")
    if record["separated"]:
        warnings.append("the classes are separable: without a penalty the loss has no minimum; give a finite --C")
    if absent := record["classes_without_training_rows"]:
        classes = "1 class has" if absent == 1 else f"{absent} classes have"
        warnings.append(f"{classes} no training sample; the probability tends to zero")
    return warnings
