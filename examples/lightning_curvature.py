"""Curvature while Lightning trains
================================

Watch the curvature of a network while Lightning trains it, and see it stop at the limit of the step size.

Gradient descent with step size η is stable on a quadratic function only if no eigenvalue of its Hessian exceeds 2/η.
Cohen et al. (Gradient Descent on Neural Networks Typically Occurs at the Edge of Stability, 2021) observed that the
largest eigenvalue of a network's loss first grows, and then stays near this limit. A callback shows it::

    callback = CurvatureCallback([(x, y)], every=10, head="head", matrix="hessian", label_smoothing=0.1)
    lightning.Trainer(callbacks=[callback]).fit(module, loader)

A small network is trained on scikit-learn's digits with the whole training set in each step, for two step sizes. The
labels are smoothed: with hard labels, the Hessian vanishes as the network becomes certain of them. Every few steps the
callback measures the largest eigenvalue and the trace of the Hessian, and a second one, on 350 of the digits, the
gradient noise scale: the number of digits in a batch whose gradient is as large as its noise. They leave the training
as it is: the weights at the end are bit for bit those of a training without it, which the example checks.

Run it from the root of the repository::

    python examples/lightning_curvature.py [--steps 240] [--every 10] [--seed 0] [--out build/lightning_curvature.png]

The example needs the extra ``integration``. It prints a table, followed by one line of JSON.

.. image:: /pictures/lightning_curvature.png
   :alt: Largest eigenvalue, trace, gradient noise and loss over the steps of two trainings
"""

# sphinx_gallery_thumbnail_path = "pictures/lightning_curvature.png"

from __future__ import annotations

import argparse
import json
import logging
import math
import statistics
import time
import warnings
from typing import Any

import torch
from common.running import BLUE, MUTED, ORANGE, arguments, settings
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from softcurve.files.atomic import replacing

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # some of the libraries that Lightning imports are deprecated
    import lightning

    from softcurve.integrations.lightning import CurvatureCallback

PIXELS, GREYS, CLASSES, HIDDEN, TRAIN = 64, 16, 10, 64, 1400
SMOOTHING, NOISY = 0.1, 350
RATES = (0.8, 0.5)
NAME = "lightning_curvature"
COLOURS = dict(zip(RATES, (ORANGE, BLUE), strict=True))
OPTIONS = (
    ("steps", 240, 2, "number of training steps"),
    ("every", 10, 1, "number of steps between two measurements"),
)

Digits = tuple[Tensor, Tensor]
History = list[tuple[int, dict[str, float]]]


def load() -> tuple[Digits, Digits]:
    """Return training and held-out digits in random order, with standardised grey levels."""
    values, classes = load_digits(return_X_y=True)
    order = torch.randperm(len(values))
    x, y = torch.from_numpy(values / GREYS).float()[order], torch.from_numpy(classes).long()[order]
    x = (x - x[:TRAIN].mean()) / x[:TRAIN].std()
    return (x[:TRAIN], y[:TRAIN]), (x[TRAIN:], y[TRAIN:])


class Network(lightning.LightningModule):  # type: ignore[misc]
    """A network with two hidden layers, trained by gradient descent."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate
        self.body = nn.Sequential(nn.Linear(PIXELS, HIDDEN), nn.Tanh(), nn.Linear(HIDDEN, HIDDEN), nn.Tanh())
        self.head = nn.Linear(HIDDEN, CLASSES)
        self.losses: list[float] = []

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits."""
        logits: Tensor = self.head(self.body(x))
        return logits

    def training_step(self, batch: Digits, _: int) -> Tensor:
        """Return the loss of a batch."""
        x, y = batch
        loss = F.cross_entropy(self(x), y, label_smoothing=SMOOTHING)
        self.losses.append(loss.item())
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return gradient descent without momentum."""
        return torch.optim.SGD(self.parameters(), self.rate)


def train(rate: float, digits: Digits, steps: int, seed: int, *callbacks: CurvatureCallback) -> Network:
    """Train a network from the initial weights of a seed."""
    torch.manual_seed(seed)
    network = Network(rate)
    trainer = lightning.Trainer(
        accelerator="cpu", max_steps=steps, callbacks=[*callbacks], logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, log_every_n_steps=1,
    )  # fmt: skip
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*does not have many workers")  # the digits are in memory
        warnings.filterwarnings("ignore", ".*isinstance.treespec, LeafSpec")  # a deprecated name in Lightning
        trainer.fit(network, DataLoader([digits], batch_size=None))
    return network


def callbacks_of(digits: Digits, every: int, seed: int) -> tuple[CurvatureCallback, CurvatureCallback]:
    """Return the callbacks for the Hessian and for the gradient noise, which takes a backward pass for each digit."""
    x, y = digits
    options: dict[str, Any] = {"every": every, "head": "head", "label_smoothing": SMOOTHING, "seed": seed}
    return (
        CurvatureCallback([digits], matrix="hessian", figures=("top_eigenvalue", "trace"), **options),
        CurvatureCallback([(x[:NOISY], y[:NOISY])], figures=("gradient_noise",), **options),
    )


def same_weights(a: nn.Module, b: nn.Module) -> bool:
    """Return whether two networks agree bit for bit."""
    return all(torch.equal(u, v) for u, v in zip(a.parameters(), b.parameters(), strict=True))


# --- the picture -----------------------------------------------------------------------------------------------------


def curve(axes: Axes, rate: float, history: History, name: str, error: str | None = None) -> None:
    """Plot a figure over the steps, with two standard errors if they are known."""
    steps = [step for step, _ in history]
    values = torch.tensor([row[f"curvature/{name}"] for _, row in history])
    axes.plot(steps, values, ".-", markersize=4, color=COLOURS[rate], linewidth=1.4, label=f"step size {rate}")
    if error is not None:
        width = 2 * torch.tensor([row[f"curvature/{error}"] for _, row in history])
        axes.fill_between(steps, values - width, values + width, color=COLOURS[rate], alpha=0.2, linewidth=0)


def draw(networks: dict[float, Network], hessians: dict[float, History], noises: dict[float, History]) -> Figure:
    """Draw the largest eigenvalue, the trace, the gradient noise and the loss over the steps."""
    figure = Figure(figsize=(12, 7), layout="constrained")
    FigureCanvasAgg(figure)
    (top, trace), (noise, loss) = figure.subplots(2, 2, sharex=True)
    for rate, network in networks.items():
        curve(top, rate, hessians[rate], "top_eigenvalue")
        top.axhline(2 / rate, color=COLOURS[rate], linestyle="--", linewidth=1)
        top.annotate(f"2/{rate}", (1, 2 / rate), (4, 0), xycoords=("axes fraction", "data"),
                     textcoords="offset points", color=COLOURS[rate], va="center")  # fmt: skip
        curve(trace, rate, hessians[rate], "trace", "trace_error")
        curve(noise, rate, noises[rate], "gradient_noise_scale")
        unknown = [step for step, row in noises[rate] if math.isinf(row["curvature/gradient_noise_scale"])]
        height = 0.97 if rate == RATES[0] else 0.92  # of the axes
        noise.plot(unknown, [height] * len(unknown), "^", color=COLOURS[rate], transform=noise.get_xaxis_transform())
        loss.plot(network.losses, color=COLOURS[rate], linewidth=1.2)
    top.set_ylim(bottom=0)
    top.legend(frameon=False, loc="lower right")
    for axes, title in (
        (top, "Largest eigenvalue of the Hessian, and the limit of the step size"),
        (trace, "Trace of the Hessian ± 2 standard errors"),
        (noise, f"Gradient noise scale, digits (▲: too large for {NOISY} digits)"),
        (loss, "Training loss, nats"),
    ):
        axes.set_title(title, loc="left")
        axes.grid(color="#e6e9ed")
        axes.spines[["top", "right"]].set_visible(False)
    for axes in (noise, loss):
        axes.set_yscale("log")
        axes.set_xlabel("step", color=MUTED)
    return figure


# --- the command line ------------------------------------------------------------------------------------------------


def summary(network: Network, hessian: History, noise: History, held_out: Digits) -> dict[str, Any]:
    """Return what the table shows of a training; None for a noise scale that is too large to be measured."""
    x, y = held_out
    with torch.no_grad():
        accuracy = (network(x).argmax(-1) == y).float().mean().item()
    tops = [row["curvature/top_eigenvalue"] for _, row in hessian]
    scales = [row["curvature/gradient_noise_scale"] for _, row in noise]
    return {
        "limit": 2 / network.rate,
        "top_eigenvalue": [tops[0], statistics.median(tops[len(tops) // 2 :])],
        "trace": [row["curvature/trace"] for _, row in (hessian[0], hessian[-1])],
        "trace_error": [row["curvature/trace_error"] for _, row in (hessian[0], hessian[-1])],
        "noise_scale": [scale if math.isfinite(scale) else None for scale in (scales[0], scales[-1])],
        "loss": network.losses[-1],
        "accuracy": accuracy,
    }


def show(report: dict[str, Any]) -> None:
    """Print a line for each step size."""
    print(f"{'':10s}{'':>6s}{'largest eigenvalue':>22s}{'trace':>18s}{'noise scale':>18s}")
    columns = "".join(f"{name:>11s}{after:>{width}s}" for name, after, width in (
        ("first", "last half", 11), ("first", "last", 7), ("first", "last", 7)))  # fmt: skip
    print(f"{'step size':10s}{'2/η':>6s}{columns}{'loss':>8s}{'held out':>10s}")
    for rate in RATES:
        row = report[str(rate)]
        first, half = row["top_eigenvalue"]
        print(f"{rate:<10.1f}{row['limit']:6.2f}{first:11.2f}{half:11.2f}", end="")
        for start, end in (row["trace"], row["noise_scale"]):
            print("".join(f"{'-' if v is None else f'{v:,.0f}':>{w}s}" for v, w in ((start, 11), (end, 7))), end="")
        print(f"{row['loss']:8.4f}{row['accuracy']:10.1%}")
    print(f"Without the callbacks the weights are {'the same' if report['same_weights'] else 'different'}.")


def wrong(chosen: argparse.Namespace) -> str:
    """Return what is wrong with the options."""
    return f"--every: must be at most --steps, got {chosen.every}" if chosen.every > chosen.steps else ""


def main() -> None:
    """Train with each step size, compare with a training that is not measured, and write the figure."""
    chosen = arguments(
        "Draw the curvature of a network while Lightning trains it.", OPTIONS, f"build/{NAME}.png", wrong
    )
    start = time.perf_counter()
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    torch.set_num_threads(1)  # the tensors are too small for a second thread to pay off
    torch.manual_seed(chosen.seed)
    digits, held_out = load()
    networks: dict[float, Network] = {}
    hessians, noises, report = {}, {}, settings(chosen)
    for rate in RATES:
        hessian, noise = callbacks_of(digits, chosen.every, chosen.seed)
        networks[rate] = train(rate, digits, chosen.steps, chosen.seed, hessian, noise)
        hessians[rate], noises[rate] = hessian.history, noise.history
        report[str(rate)] = summary(networks[rate], hessian.history, noise.history, held_out)
    report["same_weights"] = same_weights(networks[rate], train(rate, digits, chosen.steps, chosen.seed))
    report["seconds"] = round(time.perf_counter() - start, 1)
    show(report)
    with replacing(chosen.out) as file:
        draw(networks, hessians, noises).savefig(file, format="png", dpi=110)
    print(f"\nThe picture is at {chosen.out}")
    print(json.dumps(report, allow_nan=False))


if __name__ == "__main__":
    main()
