"""The commands ``softcurve fit``, ``predict``, ``spectrum`` and ``explain``, and their exit codes."""

from __future__ import annotations

import atexit
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from inspect import Parameter, Signature, signature
from pathlib import Path
from typing import Annotated, Any

from softcurve.cli.interrupt import ended_by_signals, how_to_go_on, interrupted, remember_interrupts
from softcurve.cli.streams import use_standard_streams
from softcurve.extras import needed
from softcurve.files.errors import out_of_memory, remedy_for

try:
    with needed("the command line", "app"):
        import typer

        from softcurve.cli.options import Data, FitOptions, Language, Progress, Seed, SpectrumOptions, Target, option
except ImportError as error:
    print(f"softcurve: {error}", file=sys.stderr)
    raise SystemExit(2) from None

Work = Callable[[Any, bool | None], None]
BY_BLOCKS = "store DATA as .npy, .safetensors or .parquet, which are read block by block"

app = typer.Typer(
    help="Fit softmax heads with exact second derivatives, apply them, and analyse their curvature.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def _command(options: Any) -> Callable[[Work], Work]:
    """Register a command whose parameters are the fields of the dataclass ``options``, and ``--progress``."""
    progress_option = Parameter("progress", Parameter.KEYWORD_ONLY, annotation=Progress, default=None)
    parameters = [*signature(options, eval_str=True).parameters.values(), progress_option]

    def register(work: Work) -> Work:
        def run(progress: bool | None, **values: Any) -> None:
            work(options(**values), progress)

        run.__signature__ = Signature(parameters)  # type: ignore[attr-defined]
        app.command(work.__name__, help=work.__doc__)(run)
        return work

    return register


@_command(FitOptions)
def fit(options: FitOptions, progress: bool | None) -> None:
    """Fit a linear softmax head to features by Newton's method; write the head, a JSON record and an HTML report."""
    less = f"give a smaller --memory, fewer rows or classes, or {BY_BLOCKS}"
    checkpoint = options.checkpoint
    with ended_by_signals(), refusals(f"fit {options.data}", less), how_to_go_on(checkpoint) as on_step:
        from softcurve.cli.fitting import fit_command
        from softcurve.cli.processes import processes

        with processes(options.timeout, checkpoint) as group:
            fit_command(options, group, progress=progress, on_step=on_step)


@app.command()
def predict(
    head: Annotated[Path, typer.Argument(metavar="HEAD", help="A head saved by softcurve fit.")],
    data: Data,
    target: Target = None,
    out: Annotated[
        Path | None,
        option("FILE", "Output file of the predictions: .npz, .csv, .parquet, or .npy (probabilities)."),
    ] = None,
) -> None:
    """Predict labels and probabilities with a saved head, in the order of the rows; score them if DATA has targets."""
    with ended_by_signals(), refusals(f"predict {data}", BY_BLOCKS):
        from softcurve.cli.predicting import predict_command

        predict_command(head, data, target, out)


@_command(SpectrumOptions)
def spectrum(options: SpectrumOptions, progress: bool | None) -> None:
    """Compute the largest eigenvalues, the trace and the spectral density of a model's curvature."""
    less = "give a smaller --batch-size, --products, --probes, --steps or --top"
    with ended_by_signals(), refusals(f"spectrum {options.model}", less):
        from softcurve.cli.spectrum import spectrum_command

        spectrum_command(options, progress=progress)


@app.command()
def explain(
    out: Annotated[Path, option("FILE", "Output file of the page, .html.")] = Path("explain.html"),
    seed: Seed = 0,
    lang: Annotated[Language, option("LANG", "Language of the page: en (English) or zh (Chinese).")] = "en",
) -> None:
    """Write an interactive HTML page that derives and checks every gradient of softmax + cross-entropy/KL."""
    with ended_by_signals(), refusals(f"explain {out}"):
        from softcurve.cli.explain import write_explanation
        from softcurve.cli.printing import console, print_record

        print_record(write_explanation(out, seed=seed, lang=lang, console=console()))


@contextmanager
def refusals(work: str = "softcurve", less_memory: str = "free some memory") -> Iterator[None]:
    """End the command at an error that its user can correct; any other error is a defect and is raised.

    If memory runs out, the message names the ``work`` and the remedy ``less_memory``.
    """
    try:
        with needed("this command"):
            yield
    except BrokenPipeError:
        raise
    except Exception as error:
        if interrupted():  # during an import, for example, an interrupt becomes an ImportError
            raise KeyboardInterrupt(interrupted()) from error
        if (missing := out_of_memory(error)) is not None:
            message = f"{work}: {missing}; {less_memory}"
        elif isinstance(error, OSError) and error.strerror:
            message = f"{error.filename or work}: {error.strerror}; {remedy_for(error)}"
        elif isinstance(error, ImportError | ValueError | OSError):
            message = str(error)
        else:
            raise
        print("softcurve:", message.replace("\n", " "), file=sys.stderr, flush=True)
        raise SystemExit(2) from error


def main() -> None:
    """Run the command line; the console script starts here."""
    use_standard_streams()
    remember_interrupts()
    several = os.environ.get("WORLD_SIZE", "1") != "1" and os.environ.get("RANK", "0") != "0"
    if sys.argv[1:2] == ["fit"] and several:  # only the first process of torchrun prints what all of them would
        nowhere = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115 (open until the interpreter ends)
        atexit.register(nowhere.close)
        sys.stdout = sys.stderr = nowhere
    with refusals(), needed("the command line"):  # typer imports the modules that it prints with when it prints
        app()
