"""The options of the commands, which are the parameters of the commands' functions."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from softcurve.fit import DataError

if TYPE_CHECKING:
    from softcurve.fit.data.dataset import Keys


def option(
    metavar: str | None, help: str, *flags: str, least: int | float | None = None, default: str | None = None
) -> Any:
    """Return an option named like its parameter or by ``flags``; ``default`` describes a default of None."""
    if default is not None:
        help = f"{help}  [default: {default}]"
    return typer.Option(*flags, metavar=metavar, help=help, min=least, show_default=default is None)


def check_suffix(option: str, path: Path, *suffixes: str) -> None:
    """Raise DataError unless the path of an output ends in one of the suffixes."""
    if path.suffix.lower() not in suffixes:
        raise DataError(f"{option}: {path} must end in {', '.join(suffixes)}")


FORMATS = (
    "The word digits; an .npz, .npy, .safetensors, .parquet, .csv or .svmlight file; or a directory of files of one of "
    "these formats."
)
LOSSES = "cross_entropy, forward_kl: D(target‖model), reverse_kl: D(model‖target), or js (β = ½)."
MODEL = (
    "A head saved by softcurve fit; or FILE.py:function or package.module:function, which names a function that "
    "returns (features, head, data)."
)
HEAD_DATA = "The samples for a saved head, as for softcurve predict."
PRECISIONS = "Precision of Hessian–vector products: float64, mixed (float32 or bfloat16), or auto."
PENALTY = "Inverse strength of the penalty ½‖W‖²; inf for none."
MEMORY = "1024, or 256 for files"
TARGET = "An .npy file of labels (n,) or distributions (n, C) that replaces the target in DATA."
KEYS = "Name of the {} array in DATA."
TOLERANCE = "Largest entry of the gradient at which the fit stops."
METHODS = "Eigensolver: lobpcg; lanczos, which may miss repeated eigenvalues; or auto."

Data = Annotated[str, typer.Argument(metavar="DATA", help=FORMATS)]
Target = Annotated[Path | None, option("FILE", TARGET)]
FeaturesKey = Annotated[str | None, option("NAME", KEYS.format("features"), default="features or X")]
TargetKey = Annotated[str | None, option("NAME", KEYS.format("target"), default="target, y or labels")]
Seed = Annotated[int, option("N", "Random seed.", least=0)]
Overwrite = Annotated[bool, option(None, "Replace output files that exist.", "--overwrite")]
Progress = Annotated[bool | None, option(None, "Show progress.", default="on a terminal")]
AsJson = Annotated[
    bool | None,
    option(None, "Print JSON.", "--json/--no-json", default="unless on a terminal"),
]
FitLoss = Literal["cross_entropy", "forward_kl", "reverse_kl", "js"]  # softcurve.typing, which has it too, loads torch
Dtype = Literal["float64", "float32"]
Language = Literal["en", "zh"]
Matrix = Literal["ggn", "hessian", "fisher", "empirical-fisher"]


@dataclass(frozen=True)
class FitOptions:
    """The options of ``softcurve fit``."""

    data: Data = "digits"
    target: Target = None
    features_key: FeaturesKey = None
    target_key: TargetKey = None
    loss: Annotated[FitLoss, option("NAME", LOSSES)] = "cross_entropy"
    C: Annotated[float, option("X", PENALTY, "--C")] = 1.0
    path: Annotated[str | None, option("C,C,...", "Also fit these values of C, and recommend one.")] = None
    fit_intercept: Annotated[bool, option(None, "Fit a bias.", "--intercept/--no-intercept")] = True
    class_count: Annotated[
        int | None, option("N", "Number of classes for top-k targets.", least=2, default="largest index + 1")
    ] = None
    holdout: Annotated[float, option("X", "Fraction of samples held out.")] = 0.2
    seed: Seed = 0
    max_iter: Annotated[int, option("N", "Limit on Newton steps.", least=1)] = 100
    tol: Annotated[float, option("X", TOLERANCE)] = 1e-5
    precision: Annotated[Literal["auto", "mixed", "float64"], option("NAME", PRECISIONS)] = "auto"
    dtype: Annotated[Dtype, option("NAME", "Dtype of the saved head: float64 or float32.")] = "float64"
    memory: Annotated[int | None, option("MIB", "Memory of the fit beside the data.", least=16, default=MEMORY)] = None
    checkpoint: Annotated[Path | None, option("FILE", "File of the state of the fit, to resume it.")] = None
    checkpoint_every: Annotated[float, option("SECONDS", "Time between two checkpoints.")] = 30.0
    out: Annotated[Path, option("FILE", "Output file of the head, .safetensors.")] = Path("head.safetensors")
    record: Annotated[Path | None, option("FILE", "JSON record of the fit.", default="as --out")] = None
    report: Annotated[Path | None, option("FILE", "HTML report of the fit.", default="as --out")] = None
    overwrite: Overwrite = False
    timeout: Annotated[float, option("SECONDS", "Longest wait for a process.")] = 600.0


@dataclass(frozen=True)
class PredictOptions:
    """The options of ``softcurve predict``."""

    head: Annotated[Path, typer.Argument(metavar="HEAD", help="A head saved by softcurve fit.")]
    data: Data
    target: Target = None
    features_key: FeaturesKey = None
    target_key: TargetKey = None
    out: Annotated[
        Path | None, option("FILE", "Output file of the predictions: .npz, .csv, .parquet, or .npy (probabilities).")
    ] = None
    overwrite: Overwrite = False


@dataclass(frozen=True)
class SpectrumOptions:
    """The options of ``softcurve spectrum``; None lets the model decide."""

    model: Annotated[str, typer.Argument(metavar="MODEL", help=MODEL)]
    data: Annotated[str | None, typer.Argument(metavar="DATA", help=HEAD_DATA)] = None
    target: Target = None
    features_key: FeaturesKey = None
    target_key: TargetKey = None
    matrix: Annotated[Matrix, option("NAME", "Matrix: ggn (Gauss-Newton), hessian, fisher or empirical-fisher.")] = (
        "ggn"
    )
    loss: Annotated[FitLoss | None, option("NAME", LOSSES, default="the head's, or cross_entropy")] = None
    top: Annotated[int, option("N", "Number of largest eigenvalues to compute.", "-k", "--top", least=1)] = 10
    method: Annotated[Literal["auto", "lobpcg", "lanczos"], option("NAME", METHODS)] = "auto"
    tol: Annotated[float, option("X", "Relative tolerance of residuals; 0 for the accuracy of the dtype.")] = 0.0
    products: Annotated[int, option("N", "Number of matrix–vector products for the trace.", least=4)] = 64
    probes: Annotated[int, option("N", "Number of random vectors for the density; 0 for none.", least=0)] = 10
    steps: Annotated[int, option("N", "Number of Lanczos steps for each random vector.", least=1)] = 80
    batch_size: Annotated[int | None, option("N", "Batch size for a saved head.", least=1, default="all")] = None
    seed: Seed = 0
    dtype: Annotated[Dtype | None, option("NAME", "float64 or float32.", default="that of the model")] = None
    out: Annotated[Path | None, option("FILE", "Output file of a chart of the density: .png, .svg or .pdf.")] = None
    overwrite: Overwrite = False


@dataclass(frozen=True)
class ExplainOptions:
    """The options of ``softcurve explain``."""

    out: Annotated[Path, option("FILE", "Output file of the page, .html.")] = Path("explain.html")
    seed: Seed = 0
    lang: Annotated[Language, option("LANG", "Language of the page: en (English) or zh (Chinese).")] = "en"
    overwrite: Overwrite = False


def keys_of(options: FitOptions | PredictOptions | SpectrumOptions) -> Keys:
    """Return the names of the arrays in the data."""
    from softcurve.fit.data.dataset import Keys  # loads more than a help text needs

    return Keys(options.features_key, options.target_key)
