"""The command ``softcurve spectrum``: eigenvalues, trace and spectral density of a model's curvature."""

from __future__ import annotations

import io
import math
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from rich.progress import Progress, TaskID, TextColumn, TimeElapsedColumn
from torch import nn

from softcurve.cli.interrupt import stop_if_interrupted
from softcurve.cli.options import SpectrumOptions, check_suffix, keys_of
from softcurve.cli.printing import TextRows, print_results, print_table, progress_bar
from softcurve.cli.user_model import call_function, describe, first_line, line_in
from softcurve.curvature import GGN, EmpiricalFisher, Estimate, Fisher, Hessian
from softcurve.curvature.algorithms.eigenpairs import Eigenpairs
from softcurve.curvature.algorithms.spectral_density import SpectralDensity
from softcurve.curvature.network import length_of
from softcurve.files.atomic import replacing
from softcurve.files.errors import out_of_memory, refuse_pickle
from softcurve.fit import DataError
from softcurve.fit.data.opening import open_source_for
from softcurve.fit.data.source import RowBlock, gather
from softcurve.fit.losses import check_loss, refuse_zeros
from softcurve.fit.outputs import check_outputs
from softcurve.fit.saved_head import SavedHead
from softcurve.typing import FitLoss

Network = GGN | Hessian | Fisher | EmpiricalFisher
MATRICES: dict[str, type[Network]] = {
    "ggn": GGN, "hessian": Hessian, "fisher": Fisher, "empirical-fisher": EmpiricalFisher,
}  # fmt: skip
LOADING = "build the model there in a function that returns (features, head, data); pass that as FILE.py:function"
SIZES = {"rows": "samples", "classes": "classes", "parameters": "parameters"}
MOST_SHOWN = 20  # eigenvalues
QUANTILES = (0.5, 0.9, 0.99)
LOBPCG_PRODUCTS = 100  # the largest number for each eigenvalue, before Lanczos is tried
BASES_BYTES = 1 << 30  # memory for the Lanczos bases of the probes that share their products


class SpectrumProblem(NamedTuple):
    """A model and its data; ``rows`` is their number if it is known, ``file`` defines a user's model."""

    features: nn.Module
    head: nn.Linear
    data: Iterable[Any]
    loss: FitLoss
    rows: int | None = None
    file: str | None = None


class Spectrum(NamedTuple):
    """The results for the matrix of order ``size``."""

    size: int
    trace: Estimate
    top: Eigenpairs
    density: SpectralDensity | None
    passes: int
    seconds: float


def spectrum_command(options: SpectrumOptions, *, progress: bool | None, as_json: bool | None = None) -> None:
    """Compute the spectrum, draw it on request, and print the tables or the JSON line. Raises DataError."""
    _check(options)
    problem = _saved_head(options) if options.model.lower().endswith(".safetensors") else _user_model(options)
    try:
        spectrum = _compute(options, problem, progress)
    except Exception as error:
        if out_of_memory(error) is not None:
            raise
        line = line_in(problem.file, error)
        # Any other error that does not come from the user's code is a defect of this program.
        if not line and not isinstance(error, TypeError | ValueError | RuntimeError):
            raise
        raise DataError(f"model: {options.model}: {describe(error) if line else first_line(error)}{line}") from error
    if options.out is not None and spectrum.density is not None:
        _draw(options.out, f"{MATRICES[options.matrix].__name__} of {problem.loss}", spectrum.density, spectrum.top)
    record = _record(options, problem, spectrum)

    def show() -> None:
        print_table("softcurve spectrum", _rows(record, spectrum.trace))
        _print_eigenvalues(record)

    print_results(record, show, as_json=as_json, written=() if options.out is None else (options.out,))


def _check(options: SpectrumOptions) -> None:
    if options.seed >= 2**63:
        raise DataError(f"--seed must be below 2**63; got {options.seed}")
    if not 0 <= options.tol <= 1:
        raise DataError(f"--tol must be a number between 0 and 1; got {options.tol}")
    if options.out is None:
        return
    check_suffix("--out", options.out, ".png", ".svg", ".pdf")
    if options.probes == 0:
        raise DataError(f"--out: without probes there is no density to draw in {options.out}; give --probes 1 or more")
    model = options.model.rpartition(":")[0] or options.model
    inputs = {"MODEL": model, "DATA": options.data, "--target": options.target}
    check_outputs({"--out": options.out}, inputs, overwrite=options.overwrite)
    import matplotlib.figure  # noqa: F401


def _saved_head(options: SpectrumOptions) -> SpectrumProblem:
    if options.data is None:
        raise DataError(
            f"data: {options.model} is a head without samples; give them as the second argument, a file or the word "
            "digits"
        )
    saved = SavedHead.load(options.model)
    dtype = _dtype(options) or saved.weight.dtype
    source = open_source_for(options.data, saved.classes, saved.weight.shape[1], options.target, keys=keys_of(options))
    features, target = gather(source, options.data, dtype)
    # As predict scores: the reverse KL of a label is infinite, its cross-entropy is not.
    loss = options.loss or cast("FitLoss", "cross_entropy" if source.kind == "labels" else saved.loss)
    check_loss(loss, "labels" if source.kind == "labels" else "distributions")
    refuse_zeros(loss, RowBlock(0, features, target))
    if loss != "cross_entropy" and source.kind == "labels":
        target = nn.functional.one_hot(target, len(saved.classes)).to(dtype)
    batch = min(options.batch_size or source.rows, source.rows)
    data = list(zip(features.split(batch), target.split(batch), strict=True))
    return SpectrumProblem(nn.Identity(), saved.to_linear().to(dtype), data, loss, rows=source.rows)


def _user_model(options: SpectrumOptions) -> SpectrumProblem:
    refuse_pickle("model", Path(options.model), LOADING)
    excluded = {
        "data": options.data, "--target": options.target, "--batch-size": options.batch_size,
        "--features-key": options.features_key, "--target-key": options.target_key,
    }  # fmt: skip
    for argument, value in excluded.items():
        if value is not None:
            raise DataError(f"{argument}: {options.model} brings data of its own; leave {value} out")
    (features, head, data), file = call_function(options.model, options.seed)
    if dtype := _dtype(options):
        features, head = features.to(dtype), head.to(dtype)
    return SpectrumProblem(features, head, data, options.loss or "cross_entropy", file=file)


def _dtype(options: SpectrumOptions) -> torch.dtype | None:
    return None if options.dtype is None else getattr(torch, options.dtype)


@dataclass(eq=False)
class CountedBatches:
    """The batches of a model with their inputs in ``dtype``, if it is given; every pass over them is counted."""

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
            if self.dtype is not None and isinstance(batch, tuple | list) and batch:
                x, *rest = batch
                x = {key: self._cast(value) for key, value in x.items()} if isinstance(x, Mapping) else self._cast(x)
                batch = (x, *rest)
            yield batch  # the operator raises the error of a batch that is none
            self.progress.advance(self.task)

    def _cast(self, value: Any) -> Any:
        return value.to(self.dtype) if isinstance(value, torch.Tensor) and value.is_floating_point() else value


def _compute(options: SpectrumOptions, problem: SpectrumProblem, show: bool | None) -> Spectrum:
    start, seed = time.perf_counter(), options.seed
    with progress_bar(show, TextColumn("pass {task.fields[passes]} over the data"), TimeElapsedColumn()) as progress:
        task = progress.add_task("trace", total=length_of(problem.data), passes=0)
        data = CountedBatches(problem.data, _dtype(options), progress, task)
        # Only a user's data can differ between two passes.
        how: dict[str, Any] = {"loss": problem.loss, "check_deterministic": problem.file is not None}
        operator = MATRICES[options.matrix](problem.features, problem.head, data, seed=seed, **how)
        # The trace comes first, because its products are the cheapest that reveal a NaN or an infinity.
        trace = operator.trace(products=options.products, seed=seed)
        _require_finite("trace", torch.tensor(trace.value))
        progress.update(task, description="eigenvalues")
        top = _largest(operator, options)
        _require_finite("eigenvalues", top.values, top.residuals)
        size, probes, density = operator.shape[0], options.probes, None
        if probes:
            progress.update(task, description="density")
            steps = min(options.steps, size)
            at_once = max(1, min(BASES_BYTES // (steps * size * operator.dtype.itemsize), probes))
            density = operator.spectral_density(probes=probes, steps=steps, seed=seed, columns_at_once=at_once)
            _require_finite("density", density.nodes, density.weights)
    return Spectrum(size, trace, top, density, data.passes, time.perf_counter() - start)


def _largest(operator: Network, options: SpectrumOptions) -> Eigenpairs:
    """Return the largest eigenvalues, by LOBPCG if it converges, because Lanczos may miss copies of an eigenvalue."""
    k, tol, seed, method = min(options.top, operator.shape[0]), options.tol, options.seed, options.method
    if method != "auto":
        return operator.eigsh(k, tol=tol, seed=seed, method=method)
    try:
        return operator.eigsh(k, tol=tol, seed=seed, method="lobpcg", max_products=LOBPCG_PRODUCTS * (k + 5))
    except RuntimeError:
        return operator.eigsh(k, tol=tol, seed=seed, method="lanczos")


def _require_finite(name: str, *tensors: torch.Tensor) -> None:
    if not all(bool(tensor.isfinite().all()) for tensor in tensors):
        raise DataError(f"{name}: the result is NaN or infinite; check the model's outputs, or scale the features")


def _draw(out: Path, title: str, density: SpectralDensity, top: Eigenpairs) -> None:
    axes = density.plot()
    figure = axes.get_figure(root=True)
    assert figure is not None
    values = top.values.tolist()
    mark = axes.get_xaxis_transform()  # heights are shares of the axis
    label = "largest eigenvalue" if len(values) == 1 else f"{len(values)} largest eigenvalues"
    axes.vlines(values, 0.0, 0.06, transform=mark, color="tab:red", linewidth=1.2, label=label)
    low, high = axes.get_xlim()
    # With few Lanczos steps the density ends below the largest eigenvalue.
    axes.set_xlim(low, max(high, values[0] + 0.02 * (values[0] - low)))
    axes.set_title(title, fontsize=9)
    axes.legend(frameon=False, fontsize=9)
    picture = io.BytesIO()  # in memory first: the encoders do not report why a file cannot be written
    figure.savefig(picture, format=out.suffix[1:].lower(), dpi=150)
    stop_if_interrupted()
    with replacing(out, "--out") as file:
        file.write(picture.getbuffer())


def _record(options: SpectrumOptions, problem: SpectrumProblem, spectrum: Spectrum) -> dict[str, Any]:
    trace, top, density = spectrum.trace, spectrum.top, spectrum.density
    scale = 1 / trace.value if trace.value > 0 else math.nan
    share = float(top.values.double().sum()) * scale
    return {
        "command": "spectrum", "model": options.model, "data": options.data, "rows": problem.rows,
        "classes": problem.head.out_features, "parameters": spectrum.size, "matrix": options.matrix,
        "loss": problem.loss, "dtype": str(top.values.dtype).removeprefix("torch."), "seed": options.seed,
        "eigenvalues": top.values.tolist(), "residuals": top.residuals.tolist(),
        **{f"eigenvalues_{name}": getattr(top, name) for name in ("method", "products")}, "share_of_trace": share,
        "share_of_trace_standard_error": share * trace.standard_error * scale, "trace": trace.value,
        **{f"trace_{name}": getattr(trace, name) for name in ("standard_error", "method", "products")},
        "density": None if density is None else _density_figures(density),
        "products": top.products + trace.products + (0 if density is None else density.products),
        "passes": spectrum.passes, "seconds": spectrum.seconds,
        "picture": None if options.out is None else str(options.out),
    }  # fmt: skip


def _density_figures(density: SpectralDensity) -> dict[str, Any]:
    nodes, order = density.nodes.flatten().sort()
    shares = density.weights.flatten()[order].cumsum(0)
    places = torch.searchsorted(shares, torch.tensor(QUANTILES).to(shares) * shares[-1])
    return {
        **dict(zip(("probes", "steps"), density.nodes.shape, strict=True)),
        "products": density.products,
        "lowest": float(nodes[0]),
        "highest": float(nodes[-1]),
        "quantiles": {str(q): float(nodes[place]) for q, place in zip(QUANTILES, places.tolist(), strict=True)},
    }


def _rows(record: Mapping[str, Any], trace: Estimate) -> TextRows:
    share = f"{100 * record['share_of_trace']:.2f} %" if record["trace"] > 0 else "none: the trace is not positive"
    if (error := 100 * record["share_of_trace_standard_error"]) > 0:
        share += f" ± {error:.2f} %"
    rows = [
        ("matrix", f"{record['matrix']} of {record['loss']}, {record['dtype']}"),
        *((label, str(record[name])) for name, label in SIZES.items() if record[name] is not None),
        ("trace", str(trace)),
        (f"share of the {len(record['eigenvalues'])} largest", share),
    ]
    if (density := record["density"]) is not None:
        quantiles = ", ".join(f"{float(q):.0%}: {value:.3g}" for q, value in density["quantiles"].items())
        rows += [
            ("eigenvalues", f"{density['lowest']:.3g} to {density['highest']:.3g}"),
            ("quantiles", f"{quantiles} ({density['probes']} probes of {density['steps']} steps)"),
        ]
    products = f"{record['products']} matrix–vector products in {record['passes']} passes over the data"
    rows += [("products", products), ("seconds", f"{record['seconds']:.2f}")]
    return rows


def _print_eigenvalues(record: Mapping[str, Any]) -> None:
    trace = record["trace"]
    rows = [
        (str(rank), f"{value:.8g}", f"{residual:.1e}", f"{100 * value / trace:.2f} %" if trace > 0 else "")
        for rank, (value, residual) in enumerate(zip(record["eigenvalues"], record["residuals"], strict=True), 1)
    ]
    headings = ("", "eigenvalue", "residual norm", "share of trace")
    more = f": {MOST_SHOWN} of {len(rows)} (--json: all)" if len(rows) > MOST_SHOWN else ""
    print_table(f"largest eigenvalues{more}", rows[:MOST_SHOWN], dict.fromkeys(headings, "right"))
