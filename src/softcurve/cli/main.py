"""The commands ``softcurve fit``, ``predict``, ``spectrum`` and ``explain``, and their exit codes."""

from __future__ import annotations

import atexit
import os
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from inspect import Parameter, Signature, signature
from typing import Annotated, Any

import softcurve
from softcurve.cli.interrupt import ended_by_signals, how_to_go_on, interrupted, remember_interrupts
from softcurve.cli.streams import use_standard_streams
from softcurve.extras import needed
from softcurve.files.errors import out_of_memory, remedy_for

try:
    with needed("the command line", "app"):
        import typer

        from softcurve.cli.options import (
            AsJson,
            ExplainOptions,
            FitOptions,
            PredictOptions,
            Progress,
            SpectrumOptions,
        )
except ImportError as error:
    print(f"softcurve: {error}", file=sys.stderr)
    raise SystemExit(2) from None

Work = Callable[..., None]
BY_BLOCKS = "store DATA as .npy, .safetensors or .parquet, which are read block by block"
# The parameters of the fit that its errors begin with, which are options here.
PARAMETER = re.compile(r"(?:C|class_count|holdout|loss|max_iter|seed|tol)(?= )")
# What a command shows, which changes none of its results.
SHOWN = {"progress": Progress, "as_json": AsJson}

app = typer.Typer(
    help="Fit softmax heads with exact second derivatives, apply them, and analyse their curvature.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # the frames of rich leave half of the width for the texts
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _print_version(asked: bool) -> bool:
    if asked:
        print(f"softcurve {softcurve.__version__}")
        raise typer.Exit
    return asked


@app.callback()
def _options_of_all(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and exit.", is_eager=True, callback=_print_version)
    ] = False,
) -> None:
    pass


def _command(options: Any, *shown: str) -> Callable[[Work], Work]:
    """Register a command whose parameters are the fields of the dataclass ``options``, and some of ``SHOWN``."""
    others = [Parameter(name, Parameter.KEYWORD_ONLY, annotation=SHOWN[name], default=None) for name in shown]
    parameters = [*signature(options, eval_str=True).parameters.values(), *others]

    def register(work: Work) -> Work:
        def run(**values: Any) -> None:
            how = {name: values.pop(name) for name in shown}
            work(options(**values), **how)

        run.__signature__ = Signature(parameters)  # type: ignore[attr-defined]
        app.command(work.__name__, help=work.__doc__)(run)
        return work

    return register


@_command(FitOptions, "progress", "as_json")
def fit(options: FitOptions, progress: bool | None, as_json: bool | None) -> None:
    """Fit a softmax head to features by Newton's method. The head, a JSON record and an HTML report are written."""
    less = f"give a smaller --memory, fewer samples or classes, or {BY_BLOCKS}"
    checkpoint = options.checkpoint
    with ended_by_signals(), refusals(f"fit {options.data}", less), how_to_go_on(checkpoint) as on_step:
        from softcurve.cli.fitting import fit_command
        from softcurve.cli.processes import processes

        with processes(options.timeout, checkpoint) as group:
            fit_command(options, group, progress=progress, as_json=as_json, on_step=on_step)


@_command(PredictOptions, "as_json")
def predict(options: PredictOptions, as_json: bool | None) -> None:
    """Predict labels and probabilities with a saved head. If DATA has targets, the predictions are also scored."""
    with ended_by_signals(), refusals(f"predict {options.data}", BY_BLOCKS):
        from softcurve.cli.predicting import predict_command

        predict_command(options, as_json=as_json)


@_command(SpectrumOptions, "progress", "as_json")
def spectrum(options: SpectrumOptions, progress: bool | None, as_json: bool | None) -> None:
    """Compute eigenvalues, trace and density of a model's curvature. The matrix is never formed."""
    less = "give a smaller --batch-size, --products, --probes, --steps or --top"
    with ended_by_signals(), refusals(f"spectrum {options.model}", less):
        from softcurve.cli.spectrum import spectrum_command

        spectrum_command(options, progress=progress, as_json=as_json)


@_command(ExplainOptions, "as_json")
def explain(options: ExplainOptions, as_json: bool | None) -> None:
    """Write an HTML page that derives the gradients of softmax and KL. It is interactive and checks every formula."""
    with ended_by_signals(), refusals(f"explain {options.out}"):
        from softcurve.cli.explain import explain_command

        explain_command(options, as_json=as_json)


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
        if option := PARAMETER.match(message):
            message = f"--{option[0].replace('_', '-')}{message[option.end() :]}"
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
