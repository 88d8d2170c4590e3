"""Spectrum of a language model
============================

Compute the curvature of a language model with 1.8 million parameters, before and after training.

The example uses only products with the Gauss-Newton matrix of the mean loss over a thousand next tokens, from a
vocabulary of 16,384. Autograd differentiates the features, and the head is processed tile by tile. Lanczos iteration
finds the leading eigenvalues, stochastic Lanczos quadrature the spectral density, and XTrace the trace. A few
directions account for a large part of the trace. During training they separate from the bulk of the spectrum near zero.

Run it from the root of the repository::

    python examples/tiny_lm_spectrum.py [--steps 60] [--windows 8] [--seed 0] [--out build/tiny_lm_spectrum.png]

The example prints a table, followed by one line of JSON.

.. image:: /pictures/tiny_lm_spectrum.png
   :alt: Number of larger eigenvalues and leading eigenvalues before and after training
"""

# sphinx_gallery_thumbnail_path = "pictures/tiny_lm_spectrum.png"

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from tiny_lm import text as texts
from tiny_lm.model import Shape, TinyLM
from tiny_lm.objectives import OBJECTIVES
from tiny_lm.training import Schedule, header, next_tokens, train
from torch import nn

from softcurve.curvature import GGN, SpectralDensity
from softcurve.files.atomic import replacing

HEAD_WIDTH, LAYERS, RATE, BATCH = 32, 2, 4e-3, 8
TOGETHER = 4  # windows in a batch of the operator
COLOURS = {"before": "#9aa4b0", "after": "#1f62c4"}

OPTIONS = (
    ("steps", 60, 2, "number of training steps"),
    ("windows", 8, 1, "number of validation windows for the matrix"),
    ("width", 96, HEAD_WIDTH, f"width of the model, a multiple of {HEAD_WIDTH}"),
    ("vocab", 16384, 257, "size of the vocabulary"),
    ("context", 128, 2, "tokens per window"),
    ("top", 8, 1, "number of leading eigenvalues"),
    ("probes", 4, 2, "number of random vectors for the density"),
    ("lanczos", 40, 2, "number of Lanczos steps for the density"),
    ("products", 32, 4, "number of products for the trace"),
    ("seed", 0, 0, "random seed"),
)


def arguments() -> argparse.Namespace:
    """Parse and check the command line before any computation."""
    parser = argparse.ArgumentParser(description="The spectrum of a small language model's Gauss-Newton matrix.")
    for name, default, _, meaning in OPTIONS:
        parser.add_argument(f"--{name}", type=int, default=default, help=f"{meaning} ({default})")
    parser.add_argument("--out", type=Path, default=Path("build/tiny_lm_spectrum.png"), help="output file")
    chosen = parser.parse_args()
    for name, _, least, _ in OPTIONS:
        if (value := getattr(chosen, name)) < least:
            parser.error(f"argument --{name}: must be at least {least}, got {value}")
    if chosen.width % HEAD_WIDTH:
        parser.error(f"argument --width: must be a multiple of {HEAD_WIDTH}, got {chosen.width}")
    return chosen


def tied_head(model: TinyLM) -> nn.Linear:
    """Return the head as a module that shares its parameters with the model."""
    weight, bias = model.head
    head = nn.Linear(weight.shape[1], weight.shape[0], device="meta")
    head.weight, head.bias = weight, bias
    return head


def spectrum(
    model: TinyLM, windows: texts.Windows, chosen: argparse.Namespace
) -> tuple[dict[str, Any], SpectralDensity]:
    """Return the leading eigenvalues, trace and density of the Gauss-Newton matrix of the mean loss per token."""
    start = time.perf_counter()
    operator = GGN(model, tied_head(model), [(batch, batch) for batch in windows.split(TOGETHER)], shift=1)
    leading = operator.eigsh(chosen.top, tol=1e-4, seed=chosen.seed)
    trace = operator.trace(products=chosen.products, seed=chosen.seed)
    density = operator.spectral_density(probes=chosen.probes, steps=chosen.lanczos, seed=chosen.seed)
    found = {
        "eigenvalues": leading.values.tolist(),
        "residuals": leading.residuals.tolist(),
        "trace": trace.value,
        "trace_standard_error": trace.standard_error,
        "share_of_trace": leading.values.sum().item() / trace.value,
        "products": leading.products + trace.products + density.products,
        "seconds": round(time.perf_counter() - start, 1),
    }
    return found, density


def draw(found: dict[str, dict[str, Any]], densities: dict[str, SpectralDensity], title: str) -> Figure:
    """Plot the number of eigenvalues above each value (top) and the leading eigenvalues (bottom)."""
    figure = Figure(figsize=(8.5, 6.2), layout="constrained")
    FigureCanvasAgg(figure)
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=(2.4, 1))
    most = max(max(of["eigenvalues"]) for of in found.values())
    grid = torch.logspace(-6, 0, 600, dtype=torch.float64) * most * 1.3
    for name, density in densities.items():
        nodes, weights = density.nodes.flatten(), density.weights.flatten() / len(density.nodes)
        beyond = torch.stack([weights[nodes > x].sum() for x in grid]) * density.n
        above.plot(grid, beyond.clamp(min=0.3), color=COLOURS[name], linewidth=2, label=f"{name} training")
        values = [value for value in found[name]["eigenvalues"] if value > 0]
        below.vlines(values, 0, 1, color=COLOURS[name], linewidth=2)
    above.set(xscale="log", yscale="log", ylabel="number of larger eigenvalues")
    above.set_title(title, loc="left")
    above.legend(frameon=False)
    below.set(yticks=[], xlabel="eigenvalue of the Gauss-Newton matrix (nats per token)")
    below.set_title("Leading eigenvalues", loc="left", fontsize="medium")
    for axes in (above, below):
        axes.grid(color="#e6e9ed")
        axes.spines[["top", "right"]].set_visible(False)
    return figure


def main() -> None:
    """Compute the spectrum before and after training, and write the figure and the report."""
    chosen, start = arguments(), time.perf_counter()
    chosen.out.parent.mkdir(parents=True, exist_ok=True)
    text = texts.load(chosen.vocab, chosen.context)
    torch.manual_seed(chosen.seed)
    model = TinyLM(Shape(chosen.vocab, chosen.width, LAYERS, HEAD_WIDTH), text.log_frequencies())
    windows = text.validation[:: max(1, len(text.validation) // chosen.windows)][: chosen.windows]
    size = f"{model.size():,} parameters, {windows[:, 1:].numel():,} next tokens, vocabulary {chosen.vocab:,}"
    print(f"{size}\n\n{header()}")
    found, densities = {}, {}
    found["before"], densities["before"] = spectrum(model, windows, chosen)
    schedule = Schedule(chosen.steps, BATCH, chosen.seed, RATE)
    curve = train("plain", model, OBJECTIVES["plain"].streamed, next_tokens, text, schedule, windows)
    found["after"], densities["after"] = spectrum(model, windows, chosen)

    print(f"\n{'training':10s}{'trace':>22s}{'largest':>10s}{f'top {chosen.top}':>10s}{'products':>10s}{'s':>8s}")
    for name, of in found.items():
        trace = f"{of['trace']:.2f} ± {of['trace_standard_error']:.2f}"
        print(f"{name:10s}{trace:>22s}{of['eigenvalues'][0]:10.3f}{of['share_of_trace']:10.1%}", end="")
        print(f"{of['products']:10d}{of['seconds']:8.1f}")
    with replacing(chosen.out) as file:
        draw(found, densities, size).savefig(file, format="png", dpi=110)
    report = {
        **vars(chosen),
        "out": str(chosen.out),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "seconds": round(time.perf_counter() - start, 1),
        "parameters": model.size(),
        "rows": windows[:, 1:].numel(),
        "validation": curve.validation,
        **found,
    }
    print(f"\nThe picture is at {chosen.out}")
    print(json.dumps(report, allow_nan=False))


if __name__ == "__main__":
    main()
