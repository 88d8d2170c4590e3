"""The work of ``softcurve spectrum``, from options to what is printed and drawn."""

from __future__ import annotations

import io
import math
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text
from torch import nn

from softcurve.app.interrupt import stop_if_interrupted
from softcurve.app.printing import console, print_record, print_table
from softcurve.app.user_model import call_function, first_line, place_in, said
from softcurve.curvature import GGN, EmpiricalFisher, Estimate, Fisher, Hessian
from softcurve.curvature.algorithms.eigenpairs import Eigenpairs
from softcurve.curvature.algorithms.spectral_density import SpectralDensity
from softcurve.curvature.network import length_of
from softcurve.curvature.operator import SymmetricOperator
from softcurve.fit import DataError
from softcurve.fit.atomic import check_outputs, replacing
from softcurve.fit.data.opening import open_source_for
from softcurve.fit.data.rows import gather
from softcurve.fit.data.source import Block
from softcurve.fit.losses import Loss, check_loss, refuse_zeros
from softcurve.fit.saved_head import SavedHead
from softcurve.fit.system_errors import out_of_memory

__all__ = ["SpectrumOptions", "spectrum_command"]

MATRICES: dict[str, type[GGN | Hessian | Fisher | EmpiricalFisher]] = {
    "ggn": GGN,
    "hessian": Hessian,
    "fisher": Fisher,
    "empirical-fisher": EmpiricalFisher,
}
DTYPES = {"float64": torch.float64, "float32": torch.float32}
PICTURES = (".png", ".svg", ".pdf")
QUANTILES = (0.5, 0.9, 0.99)
LOBPCG_PRODUCTS = 100  # an eigenvalue, beyond which Lanczos is tried
BASES_BYTES = 1 << 30  # of the probes that take their Lanczos steps together


@dataclass(frozen=True)
class SpectrumOptions:
    """The options of ``softcurve spectrum``; None where the model decides."""

    model: str
    data: str | None
    target: Path | None
    matrix: str
    loss: Loss | None
    top: int
    method: Literal["auto", "lobpcg", "lanczos"]
    tol: float
    products: int
    probes: int
    steps: int
    batch_size: int | None
    seed: int
    dtype: str | None
    out: Path | None


@dataclass(frozen=True, eq=False)
class Problem:
    """A model over its data; ``rows`` where they are known, ``file`` where the model is somebody's code."""

    features: nn.Module
    head: nn.Linear
    data: Iterable[Any]  # of somebody's code; the operator checks each batch
    loss: Loss
    rows: int | None = None
    file: str | None = None


@dataclass(frozen=True, eq=False)
class Findings:
    """What was computed of the matrix."""

    size: int
    trace: Estimate
    top: Eigenpairs
    density: SpectralDensity | None
    passes: int
    seconds: float


def spectrum_command(options: SpectrumOptions, *, progress: bool | None) -> None:
    """Compute the spectrum, draw it where that is asked for, print the tables and the JSON line. Raises DataError."""
    _check(options)
    problem = _saved(options) if options.model.lower().endswith(".safetensors") else _made(options)
    try:
        findings = _findings(options, problem, progress)
    except Exception as error:
        if out_of_memory(error) is not None:
            raise
        place = place_in(problem.file, error)
        # Whatever else comes from beyond the model's own code is a fault of this program: let it be seen.
        if not place and not isinstance(error, TypeError | ValueError | RuntimeError):
            raise
        raise DataError(f"model: {options.model}: {said(error) if place else first_line(error)}{place}") from error
    if options.out is not None and findings.density is not None:
        _draw(options.out, f"{MATRICES[options.matrix].__name__} of {problem.loss}", findings.density, findings.top)
    record = _record(options, problem, findings)
    print_table("softcurve spectrum", _lines(record, findings.trace))
    _print_eigenvalues(record)
    print_record(record)


def _check(options: SpectrumOptions) -> None:
    if options.seed >= 2**63:
        raise DataError(f"--seed must be below 2**63; got {options.seed}")
    if not 0 <= options.tol <= 1:
        raise DataError(f"--tol must be a number between 0 and 1; got {options.tol}")
    if options.out is None:
        return
    if options.out.suffix.lower() not in PICTURES:
        raise DataError(f"--out: {options.out} must end in {', '.join(PICTURES)}")
    if options.probes == 0:
        raise DataError(f"--out: without probes there is no density to draw in {options.out}; give --probes 1 or more")
    model = options.model.rpartition(":")[0] or options.model
    check_outputs({"--out": options.out}, {"MODEL": model, "DATA": options.data, "--target": options.target})
    import matplotlib.figure  # noqa: F401


# --- the model ---------------------------------------------------------------------------------------------------


def _saved(options: SpectrumOptions) -> Problem:
    if options.data is None:
        raise DataError(
            f"data: {options.model} is a head without rows; give them as the second argument, a file or the word digits"
        )
    saved = SavedHead.load(options.model)
    rows = gather(open_source_for(options.data, saved.classes, saved.weight.shape[1], options.target), options.data)
    # As predict scores: the reverse KL of a label is infinite, its cross-entropy is not.
    loss = options.loss or cast("Loss", saved.loss if rows.soft else "cross_entropy")
    check_loss(loss, "distributions" if rows.soft else "labels")
    dtype = DTYPES[options.dtype] if options.dtype else saved.weight.dtype
    features, target = rows.tensors(dtype)
    refuse_zeros(loss, Block(0, features, target))
    if loss != "cross_entropy" and not rows.soft:
        target = nn.functional.one_hot(target, len(saved.classes)).to(dtype)
    batch = min(options.batch_size or len(rows), len(rows))
    data = list(zip(features.split(batch), target.split(batch), strict=True))
    return Problem(nn.Identity(), saved.to_linear().to(dtype), data, loss, rows=len(rows))


def _made(options: SpectrumOptions) -> Problem:
    for argument, given in {
        "data": options.data,
        "--target": options.target,
        "--batch-size": options.batch_size,
    }.items():
        if given is not None:
            raise DataError(f"{argument}: {options.model} brings data of its own; leave {given} out")
    features, head, data, file = call_function(options.model, options.seed)
    if options.dtype:
        features, head = features.to(DTYPES[options.dtype]), head.to(DTYPES[options.dtype])
    return Problem(features, head, data, options.loss or "cross_entropy", file=file)


# --- the matrix --------------------------------------------------------------------------------------------------


@dataclass(eq=False)
class Walked:
    """The batches of a model, counted on the way, with inputs in the dtype that is asked for."""

    data: Iterable[Any]
    dtype: torch.dtype | None
    progress: Progress
    task: TaskID
    passes: int = 0

    def __iter__(self) -> Iterator[Any]:
        self.passes += 1
        self.progress.update(self.task, completed=0, passes=self.passes)
        for batch in self.data:
            stop_if_interrupted()
            yield batch if self.dtype is None else _in_dtype(batch, self.dtype)
            self.progress.advance(self.task)


def _in_dtype(batch: Any, dtype: torch.dtype) -> Any:
    if not isinstance(batch, tuple | list) or not batch:
        return batch  # the operator says what a batch must be
    x, *rest = batch
    if isinstance(x, Mapping):
        return ({key: _floating_to(value, dtype) for key, value in x.items()}, *rest)
    return (_floating_to(x, dtype), *rest)


def _floating_to(value: Any, dtype: torch.dtype) -> Any:
    return value.to(dtype) if isinstance(value, torch.Tensor) and value.is_floating_point() else value


def _findings(options: SpectrumOptions, problem: Problem, show: bool | None) -> Findings:
    start = time.perf_counter()
    dtype = DTYPES[options.dtype] if options.dtype else None
    with _progress(show) as progress:
        task = progress.add_task("trace", total=length_of(problem.data), passes=0)
        data = Walked(problem.data, dtype, progress, task)
        make = MATRICES[options.matrix]
        operator = make(
            problem.features,
            problem.head,
            data,
            loss=problem.loss,
            seed=options.seed,
            check_deterministic=problem.file is not None,  # the rows of a saved head are at hand
        )
        n = operator.shape[0]
        # First of all the trace: its products are the cheapest that show that something is wrong.
        trace = operator.trace(products=options.products, seed=options.seed)
        _refuse_not_finite("trace", torch.tensor(trace.value))
        progress.update(task, description="eigenvalues")
        top = _top(operator, min(options.top, n), options)
        _refuse_not_finite("eigenvalues", top.values, top.residuals)
        density = None
        if options.probes:
            progress.update(task, description="density")
            steps = min(options.steps, n)
            together = BASES_BYTES // (steps * n * operator.dtype.itemsize)
            density = operator.spectral_density(
                probes=options.probes,
                steps=steps,
                seed=options.seed,
                columns_at_once=max(1, min(together, options.probes)),
            )
            _refuse_not_finite("density", density.nodes, density.weights)
    return Findings(n, trace, top, density, data.passes, time.perf_counter() - start)


def _top(operator: SymmetricOperator, k: int, options: SpectrumOptions) -> Eigenpairs:
    """The largest eigenvalues.

    LOBPCG first, because Lanczos may miss copies of an eigenvalue; it breaks down where the rank is below ``k``.
    """
    tol, seed, method = options.tol, options.seed, options.method
    if method != "auto":
        return operator.eigsh(k, tol=tol, seed=seed, method=method)
    try:
        most = LOBPCG_PRODUCTS * (k + 5)
        return operator.eigsh(k, tol=tol, seed=seed, method="lobpcg", max_products=most)
    except RuntimeError:
        return operator.eigsh(k, tol=tol, seed=seed, method="lanczos")


def _refuse_not_finite(name: str, *figures: torch.Tensor) -> None:
    if not all(bool(figure.isfinite().all()) for figure in figures):
        raise DataError(f"{name}: NaN or infinity came out; look for where it comes from, or scale the features")


@contextmanager
def _progress(show: bool | None) -> Iterator[Progress]:
    """A bar over the batches of a pass on stderr; ``show=None`` shows it on a terminal alone."""
    stderr = Console(stderr=True)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("pass {task.fields[passes]} over the data"),
        TimeElapsedColumn(),
    )
    disable = not (stderr.is_terminal if show is None else show)
    with Progress(*columns, console=stderr, transient=stderr.is_terminal, disable=disable) as progress:
        yield progress


# --- what is shown -----------------------------------------------------------------------------------------------


def _draw(out: Path, title: str, density: SpectralDensity, top: Eigenpairs) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    axes = density.plot(ax=figure.subplots())
    values = top.values.tolist()
    mark = axes.get_xaxis_transform()  # heights are shares of the axis
    label = "largest eigenvalue" if len(values) == 1 else f"{len(values)} largest eigenvalues"
    axes.vlines(values, 0.0, 0.06, transform=mark, color="tab:red", linewidth=1.2, label=label)
    low, high = axes.get_xlim()
    # Few Lanczos steps stay short of the largest eigenvalue.
    axes.set_xlim(low, max(high, values[0] + 0.02 * (values[0] - low)))
    axes.set_title(title, fontsize=9)
    axes.legend(frameon=False, fontsize=9)
    picture = io.BytesIO()  # by way of memory: the encoders do not say why a file could not be written
    figure.savefig(picture, format=out.suffix[1:].lower(), dpi=150)
    stop_if_interrupted()
    with replacing(out, "--out") as file:
        file.write(picture.getbuffer())


def _record(options: SpectrumOptions, problem: Problem, findings: Findings) -> dict[str, Any]:
    trace, top, density = findings.trace, findings.top, findings.density
    carried = float(top.values.double().sum())
    share = carried / trace.value if trace.value > 0 else math.nan
    record: dict[str, Any] = {
        "command": "spectrum",
        "model": options.model,
        "data": options.data,
        "rows": problem.rows,
        "classes": problem.head.out_features,
        "parameters": findings.size,
        "matrix": options.matrix,
        "loss": problem.loss,
        "dtype": str(top.values.dtype).removeprefix("torch."),
        "seed": options.seed,
        "eigenvalues": top.values.tolist(),
        "residuals": top.residuals.tolist(),
        "eigenvalues_method": top.method,
        "eigenvalues_products": top.products,
        "share_of_trace": share,
        "share_of_trace_standard_error": share * trace.standard_error / trace.value if trace.value > 0 else math.nan,
        "trace": trace.value,
        "trace_standard_error": trace.standard_error,
        "trace_method": trace.method,
        "trace_products": trace.products,
        "density": None if density is None else _density_figures(density),
    }
    products = top.products + trace.products + (0 if density is None else density.products)
    return record | {
        "products": products,
        "passes": findings.passes,
        "seconds": findings.seconds,
        "picture": None if options.out is None else str(options.out),
    }


def _density_figures(density: SpectralDensity) -> dict[str, Any]:
    nodes, order = density.nodes.flatten().sort()
    shares = density.weights.flatten()[order].cumsum(0)
    places = torch.searchsorted(shares, torch.tensor(QUANTILES).to(shares) * shares[-1])
    probes, steps = density.nodes.shape
    return {
        "probes": probes,
        "steps": steps,
        "products": density.products,
        "lowest": float(nodes[0]),
        "highest": float(nodes[-1]),
        "quantiles": {str(q): float(nodes[place]) for q, place in zip(QUANTILES, places.tolist(), strict=True)},
    }


def _lines(record: Mapping[str, Any], trace: Estimate) -> list[tuple[str, str]]:
    lines = [("matrix", f"{record['matrix']} of {record['loss']}, {record['dtype']}")]
    if record["rows"] is not None:
        lines.append(("rows", str(record["rows"])))
    lines += [
        ("classes", str(record["classes"])),
        ("parameters", str(record["parameters"])),
        ("trace", str(trace)),
        (f"share of the {len(record['eigenvalues'])} largest", _share(record)),
    ]
    if (density := record["density"]) is not None:
        quantiles = ", ".join(f"{float(q):.0%}: {value:.3g}" for q, value in density["quantiles"].items())
        lines += [
            ("eigenvalues", f"{density['lowest']:.3g} to {density['highest']:.3g}"),
            ("quantiles", f"{quantiles} ({density['probes']} probes of {density['steps']} steps)"),
        ]
    lines += [
        ("products", f"{record['products']} in {record['passes']} passes over the data"),
        ("seconds", f"{record['seconds']:.2f}"),
    ]
    if record["picture"] is not None:
        lines.append(("picture", record["picture"]))
    return lines


def _share(record: Mapping[str, Any]) -> str:
    if record["trace"] <= 0:
        return "none: the trace is not positive"
    error = 100 * record["share_of_trace_standard_error"]
    return f"{100 * record['share_of_trace']:.2f} %" + (f" ± {error:.2f} %" if error > 0 else "")


def _print_eigenvalues(record: Mapping[str, Any]) -> None:
    table = Table(title=Text("largest eigenvalues"), title_justify="left")
    for name in ("", "eigenvalue", "residual norm", "of the trace"):
        table.add_column(name, justify="right", no_wrap=True)
    trace = record["trace"]
    for number, (value, residual) in enumerate(zip(record["eigenvalues"], record["residuals"], strict=True), 1):
        share = f"{100 * value / trace:.2f} %" if trace > 0 else ""
        table.add_row(str(number), f"{value:.8g}", f"{residual:.1e}", share)
    console().print(table)
