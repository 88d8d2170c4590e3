"""The commands ``softcurve fit``, ``predict``, ``spectrum`` and ``explain``: their options, and their exit codes."""

from __future__ import annotations

import atexit
import os
import sys
from pathlib import Path
from typing import Annotated, Literal

from softcurve.cli.interrupt import ended_by_signals, how_to_go_on, remember_interrupts
from softcurve.cli.refusals import refusals
from softcurve.cli.streams import use_standard_streams
from softcurve.extras import needed

BY_BLOCKS = "store DATA as .npy, .safetensors or .parquet, which are read block by block"

try:
    with needed("the command line", "app"):
        import typer
except ImportError as error:
    print(f"softcurve: {error}", file=sys.stderr)
    raise SystemExit(2) from None

__all__ = ["app", "main"]

app = typer.Typer(
    help="Cross-entropy and KL divergence on softmax logits, exact.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

Data = Annotated[
    str,
    typer.Argument(
        metavar="DATA", help="digits; a .npz, .npy, .safetensors or .parquet file; or a directory of such shards."
    ),
]
Target = Annotated[
    Path | None, typer.Option(metavar="FILE.npy", help="Labels (n,) or distributions (n, C), not DATA's.")
]
Seed = Annotated[int, typer.Option(min=0, help="Seed of all that is random.")]
Progress = Annotated[bool | None, typer.Option(help="Show progress on stderr; by default on a terminal only.")]


@app.command()
def fit(
    data: Data = "digits",
    target: Target = None,
    loss: Annotated[
        Literal["cross_entropy", "forward_kl", "reverse_kl", "js"],
        typer.Option(
            metavar="NAME",
            help="cross_entropy, forward_kl: D(target‖model), reverse_kl: D(model‖target), or js (β = ½).",
        ),
    ] = "cross_entropy",
    strength: Annotated[
        float, typer.Option("--C", help="Inverse strength of the penalty ½‖W‖², as in scikit-learn; inf for none.")
    ] = 1.0,
    path: Annotated[
        str | None, typer.Option(metavar="C,C,...", help="Other strengths to fit as well, for the report.")
    ] = None,
    fit_intercept: Annotated[bool, typer.Option("--intercept/--no-intercept", help="Whether there is a bias.")] = True,
    class_count: Annotated[
        int | None,
        typer.Option(metavar="C", min=2, help="Classes of a teacher's lists; by default the largest index and one."),
    ] = None,
    holdout: Annotated[float, typer.Option(help="Share of the rows that is held out; 0 fits all.")] = 0.2,
    seed: Seed = 0,
    max_iter: Annotated[int, typer.Option(min=1, help="Newton steps at most.")] = 100,
    tol: Annotated[
        float, typer.Option(help="Largest entry of the mean objective's gradient at which the fit has converged.")
    ] = 1e-5,
    precision: Annotated[
        Literal["auto", "mixed", "float64"],
        typer.Option(
            metavar="NAME",
            help="mixed: products in float32, the objective and its gradient in float64; float64; or auto.",
        ),
    ] = "auto",
    dtype: Annotated[Literal["float64", "float32"], typer.Option(help="Of the saved head.")] = "float64",
    memory: Annotated[
        int | None,
        typer.Option(metavar="MIB", min=16, help="Beyond the rows; by default 1024, or 256 where they stay in files."),
    ] = None,
    checkpoint: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Where the state is kept; if it is there, the fit goes on from it."),
    ] = None,
    checkpoint_every: Annotated[float, typer.Option(metavar="SECONDS", min=0.0, help="How often.")] = 30.0,
    out: Annotated[Path, typer.Option(metavar="FILE.safetensors", help="Where the head is saved.")] = Path(
        "head.safetensors"
    ),
    record: Annotated[
        Path | None, typer.Option(metavar="FILE.json", help="Where the record goes; by default beside the head.")
    ] = None,
    report: Annotated[
        Path | None, typer.Option(metavar="FILE.html", help="Where the report goes; by default beside the head.")
    ] = None,
    timeout: Annotated[
        float,
        typer.Option(metavar="SECONDS", help="How long a process waits for another, where torchrun starts several."),
    ] = 600.0,
    progress: Progress = None,
) -> None:
    """Fit a linear softmax head to features by second order; save it, with a record and a report."""
    less = f"give a smaller --memory, fewer rows or classes, or {BY_BLOCKS}"
    with ended_by_signals(), refusals(f"fit {data}", less), how_to_go_on(checkpoint) as on_step:
        from softcurve.cli.fitting import FitOptions, fit_command
        from softcurve.cli.processes import processes

        options = FitOptions(
            data, target, loss, strength, path, fit_intercept, class_count, holdout, seed, max_iter, tol, precision,
            dtype, memory, checkpoint, checkpoint_every, out, record, report, timeout,
        )  # fmt: skip
        with processes(timeout, checkpoint) as together:
            fit_command(options, together, progress=progress, on_step=on_step)


@app.command()
def predict(
    head: Annotated[Path, typer.Argument(metavar="HEAD", help="A head that softcurve fit has saved.")],
    data: Data,
    target: Target = None,
    out: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Where predictions go: .npz, .csv, .parquet, or .npy (probabilities alone)."),
    ] = None,
) -> None:
    """Predict probabilities and labels with a saved head, in row order; score them where DATA has targets."""
    with ended_by_signals(), refusals(f"predict {data}", BY_BLOCKS):
        from softcurve.cli.predicting import predict_command

        predict_command(head, data, target, out)


@app.command()
def spectrum(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL",
            help="A head that softcurve fit has saved; or FILE.py:function or package.module:function, "
            "which returns (features, head, data).",
        ),
    ],
    data: Annotated[
        str | None, typer.Argument(metavar="DATA", help="The rows of a saved head, as for softcurve predict.")
    ] = None,
    target: Target = None,
    matrix: Annotated[
        Literal["ggn", "hessian", "fisher", "empirical-fisher"],
        typer.Option(metavar="NAME", help="ggn (Gauss-Newton), hessian, fisher or empirical-fisher."),
    ] = "ggn",
    loss: Annotated[
        Literal["cross_entropy", "forward_kl", "reverse_kl", "js"] | None,
        typer.Option(
            metavar="NAME",
            help="cross_entropy, forward_kl, reverse_kl or js; by default what the head was fitted with, "
            "or cross_entropy.",
        ),
    ] = None,
    top: Annotated[int, typer.Option("-k", "--top", min=1, help="How many of the largest eigenvalues.")] = 10,
    method: Annotated[
        Literal["auto", "lobpcg", "lanczos"],
        typer.Option(
            metavar="NAME",
            help="Of the eigenvalues: lobpcg; lanczos, which may miss repeated ones; "
            "auto, lanczos where lobpcg does not converge.",
        ),
    ] = "auto",
    tol: Annotated[
        float, typer.Option(help="Of the eigenvalues' residuals, relative; 0 is as the dtype allows.")
    ] = 0.0,
    products: Annotated[int, typer.Option(min=4, help="Products with vectors for the trace.")] = 64,
    probes: Annotated[int, typer.Option(min=0, help="Random vectors for the density; 0 leaves it out.")] = 10,
    steps: Annotated[int, typer.Option(min=1, help="Lanczos steps of each probe.")] = 80,
    batch_size: Annotated[
        int | None, typer.Option(min=1, help="Rows a batch of a saved head; by default all at once.")
    ] = None,
    seed: Seed = 0,
    dtype: Annotated[
        Literal["float64", "float32"] | None, typer.Option(help="Of the matrix; by default the model's own.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Where a picture of the density goes: .png, .svg or .pdf.")
    ] = None,
    progress: Progress = None,
) -> None:
    """Largest eigenvalues, trace and spectral density of a model's curvature."""
    less = "give a smaller --batch-size, --products, --probes, --steps or --top"
    with ended_by_signals(), refusals(f"spectrum {model}", less):
        from softcurve.cli.spectrum import SpectrumOptions, spectrum_command

        spectrum_command(
            SpectrumOptions(
                model, data, target, matrix, loss, top, method, tol, products, probes, steps, batch_size, seed, dtype,
                out,
            ),
            progress=progress,
        )  # fmt: skip


@app.command()
def explain(
    out: Annotated[Path, typer.Option(metavar="FILE.html", help="Where the page goes.")] = Path("explain.html"),
    seed: Seed = 0,
) -> None:
    """Walk the chain from features to gradients on digits: figures here, and one HTML page."""
    with ended_by_signals(), refusals(f"explain {out}"):
        from softcurve.cli.explain import write_explanation
        from softcurve.cli.printing import console, print_record

        print_record(write_explanation(out, seed=seed, console=console()))


def main() -> None:
    """Run the command line; the console script starts here."""
    use_standard_streams()
    remember_interrupts()
    if sys.argv[1:2] == ["fit"]:
        _let_one_speak()
    with refusals(), needed("the command line"):  # typer itself imports what it prints with when it prints
        app()


def _let_one_speak() -> None:
    """Of the processes that torchrun starts, the first alone says what all would."""
    if os.environ.get("WORLD_SIZE", "1") != "1" and os.environ.get("RANK", "0") != "0":
        nowhere = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115 (open for as long as anything may be said)
        atexit.register(nowhere.close)
        sys.stdout = sys.stderr = nowhere
