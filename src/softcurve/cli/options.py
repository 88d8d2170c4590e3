"""The options of ``softcurve fit`` and ``softcurve spectrum``, which are the parameters of these commands."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from softcurve.fit import DataError
from softcurve.typing import FitLoss


def option(
    metavar: str | None, help: str, *flags: str, least: int | float | None = None, default: str | None = None
) -> Any:
    """Return an option named like its parameter or by ``flags``; ``default`` describes a default of None."""
    return typer.Option(*flags, metavar=metavar, help=help, min=least, show_default=default or True)


def check_suffix(option: str, path: Path, *suffixes: str) -> None:
    """Raise DataError unless the path of an output ends in one of the suffixes."""
    if path.suffix.lower() not in suffixes:
        raise DataError(f"{option}: {path} must end in {', '.join(suffixes)}")


FORMATS = "The word digits; a .npz, .npy, .safetensors or .parquet file; or a directory of such files."
LOSSES = "cross_entropy, forward_kl: D(target‖model), reverse_kl: D(model‖target), or js (β = ½)."
MODEL = (
    "A head saved by softcurve fit; or FILE.py:function or package.module:function, a function that returns "
    "(features, head, data)."
)
OF_HEAD = "the loss of the saved head, or cross_entropy"
HEAD_DATA = "The rows for a saved head, as for softcurve predict."
PRECISIONS = "float64; mixed: Hessian–vector products in float32, objective and gradient in float64; or auto."
PENALTY = "Inverse strength of the penalty ½‖W‖² as in scikit-learn; inf: none."
MEMORY = "1024; 256 if they stay in files"
CHECKPOINT = "File for the state of the fit; if it exists, the fit resumes from it."
CLASS_COUNT = "Number of classes for top-k targets."
TARGET = "An .npy file of labels (n,) or distributions (n, C) instead of DATA's."
METHODS = "lobpcg; lanczos, which may miss repeated eigenvalues; auto: lobpcg, or lanczos if it does not converge."

Data = Annotated[str, typer.Argument(metavar="DATA", help=FORMATS)]
Target = Annotated[Path | None, option("FILE", TARGET)]
Seed = Annotated[int, option("N", "Seed of all random numbers.", least=0)]
Progress = Annotated[bool | None, option(None, "Show progress on stderr.", default="only on a terminal")]
Dtype = Literal["float64", "float32"]
Language = Literal["en", "zh"]
Matrix = Literal["ggn", "hessian", "fisher", "empirical-fisher"]


@dataclass(frozen=True)
class FitOptions:
    """The options of ``softcurve fit``."""

    data: Data = "digits"
    target: Target = None
    loss: Annotated[FitLoss, option("NAME", LOSSES)] = "cross_entropy"
    C: Annotated[float, option("X", PENALTY, "--C")] = 1.0
    path: Annotated[str | None, option("C,C,...", "Further values of C to fit, for the report.")] = None
    fit_intercept: Annotated[bool, option(None, "Whether the head has a bias.", "--intercept/--no-intercept")] = True
    class_count: Annotated[int | None, option("N", CLASS_COUNT, least=2, default="largest index + 1")] = None
    holdout: Annotated[float, option("X", "Fraction of the rows to hold out; 0: train on all rows.")] = 0.2
    seed: Seed = 0
    max_iter: Annotated[int, option("N", "Maximum number of Newton steps.", least=1)] = 100
    tol: Annotated[float, option("X", "Tolerance on the largest entry of the mean objective's gradient.")] = 1e-5
    precision: Annotated[Literal["auto", "mixed", "float64"], option("NAME", PRECISIONS)] = "auto"
    dtype: Annotated[Dtype, option("NAME", "Dtype of the saved head: float64 or float32.")] = "float64"
    memory: Annotated[int | None, option("MIB", "Memory budget beyond the rows.", least=16, default=MEMORY)] = None
    checkpoint: Annotated[Path | None, option("FILE", CHECKPOINT)] = None
    checkpoint_every: Annotated[float, option("S", "Seconds between two writes of the checkpoint.", least=0.0)] = 30.0
    out: Annotated[Path, option("FILE", "Output file of the head, .safetensors.")] = Path("head.safetensors")
    record: Annotated[Path | None, option("FILE", "Output file of the JSON record.", default="beside the head")] = None
    report: Annotated[Path | None, option("FILE", "Output file of the HTML report.", default="beside the head")] = None
    timeout: Annotated[float, option("S", "Seconds that one process of torchrun waits for another.")] = 600.0


@dataclass(frozen=True)
class SpectrumOptions:
    """The options of ``softcurve spectrum``; None lets the model decide."""

    model: Annotated[str, typer.Argument(metavar="MODEL", help=MODEL)]
    data: Annotated[str | None, typer.Argument(metavar="DATA", help=HEAD_DATA)] = None
    target: Target = None
    matrix: Annotated[Matrix, option("NAME", "ggn (Gauss–Newton), hessian, fisher or empirical-fisher.")] = "ggn"
    loss: Annotated[FitLoss | None, option("NAME", LOSSES, default=OF_HEAD)] = None
    top: Annotated[int, option("N", "Number of largest eigenvalues to compute.", "-k", "--top", least=1)] = 10
    method: Annotated[Literal["auto", "lobpcg", "lanczos"], option("NAME", METHODS)] = "auto"
    tol: Annotated[float, option("X", "Relative tolerance on the eigenvalues' residuals; 0: that of the dtype.")] = 0.0
    products: Annotated[int, option("N", "Number of matrix–vector products for the trace.", least=4)] = 64
    probes: Annotated[int, option("N", "Number of random vectors for the spectral density; 0: none.", least=0)] = 10
    steps: Annotated[int, option("N", "Number of Lanczos steps for each random vector.", least=1)] = 80
    batch_size: Annotated[int | None, option("N", "Batch size for a saved head.", least=1, default="all rows")] = None
    seed: Seed = 0
    dtype: Annotated[Dtype | None, option("NAME", "float64 or float32.", default="that of the model")] = None
    out: Annotated[Path | None, option("FILE", "Output file of a chart of the density: .png, .svg or .pdf.")] = None
