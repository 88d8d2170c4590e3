"""Confidence of a Laplace posterior
=================================

Compare a network's confidence on rotated digits with and without a Laplace posterior of its head.

The data are scikit-learn's embedded digits. A small network is trained on digits that are rotated by up to 15 degrees.
Its head then gets a Laplace posterior with MacKay's evidence procedure, which repeats three steps: find the mode of the
head under the prior; approximate the posterior by a normal distribution whose precision is the Kronecker-factored
Gauss-Newton matrix; choose the prior precision with the largest evidence. On held-out digits that are rotated further,
the plain softmax is overconfident. Averaging over the posterior, by the probit approximation or by samples, reduces the
overconfidence. It also reduces the confidence on upright digits, as the table shows.

Run it from the root of the repository::

    python examples/laplace_digits.py [--steps 300] [--seed 0] [--out build/laplace_digits.png]

The example prints tables, followed by one line of JSON. The figure shows a rotated digit, confidence and accuracy by
angle, a reliability diagram, and the evidence.

.. image:: /pictures/laplace_digits.png
   :alt: A rotated digit, confidence and accuracy by angle, a reliability diagram, and the evidence
"""

# sphinx_gallery_thumbnail_path = "pictures/laplace_digits.png"

from __future__ import annotations

import argparse
import json
import math
import os
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float, Int
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from sklearn.datasets import load_digits
from torch import Tensor, nn

import softcurve
from softcurve.curvature.laplace import LastLayerLaplace

PIXELS, SIDE, GREYS, CLASSES, HIDDEN = 64, 8, 16, 10, 64
TRAIN, BATCH, RATE, ROUNDS, BINS = 1400, 128, 5e-3, 4, 10
SEEN = (-15.0, -7.5, 0.0, 7.5, 15.0)  # degrees
TURNED = tuple(range(0, 91, 10))
CORRECTIONS = ("none", "probit", "mc")
BLUE, ORANGE, MUTED = "#1f62c4", "#c2500c", "#8b949e"
COLOURS = dict(zip(CORRECTIONS, (ORANGE, BLUE, "#6f42c1"), strict=True))
NAMES = dict(zip(CORRECTIONS, ("plain softmax", "probit", "256 samples"), strict=True))

Images = Float[Tensor, "n pixels"]
Labels = Int[Tensor, " n"]


@dataclass(frozen=True)
class Scores:
    """Scores of predicted probabilities."""

    accuracy: float
    confidence: float  # the mean of the largest probability
    loss: float  # the mean of −log p, in nats
    calibration_error: float  # the expected calibration error, over bins of confidence


def turned(x: Images, degrees: float) -> Images:
    """Rotate each image about its centre, with bilinear interpolation and a white background."""
    angle = math.radians(degrees)
    matrix = torch.tensor([[math.cos(angle), -math.sin(angle), 0], [math.sin(angle), math.cos(angle), 0]])
    shape = (len(x), 1, SIDE, SIDE)
    grid = nn.functional.affine_grid(matrix.expand(len(x), 2, 3), list(shape), align_corners=False)
    return nn.functional.grid_sample(x.view(shape), grid, align_corners=False).view(len(x), PIXELS)


def load() -> tuple[tuple[Images, Labels], tuple[Images, Labels]]:
    """Return training and held-out digits in random order, with grey levels in [0, 1]."""
    values, classes = load_digits(return_X_y=True)
    order = torch.randperm(len(values))
    x, y = torch.from_numpy(values / GREYS).float()[order], torch.from_numpy(classes).long()[order]
    return (x[:TRAIN], y[:TRAIN]), (x[TRAIN:], y[TRAIN:])


# --- the model -------------------------------------------------------------------------------------------------------


def train(x: Images, y: Labels, steps: int) -> tuple[nn.Sequential, nn.Linear]:
    """Train the features and the head with Adam."""
    features = nn.Sequential(nn.Linear(PIXELS, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, HIDDEN), nn.ReLU())
    head = nn.Linear(HIDDEN, CLASSES)
    optimizer = torch.optim.Adam([*features.parameters(), *head.parameters()], RATE)
    for _ in range(steps):
        rows = torch.randint(len(x), (BATCH,))
        optimizer.zero_grad()
        loss = softcurve.linear_cross_entropy(features(x[rows]), head.weight, y[rows], linear_bias=head.bias)
        assert isinstance(loss, Tensor)
        loss.backward()
        optimizer.step()
    return features, head


def find_mode(head: nn.Linear, e: Tensor, y: Labels, weight: Tensor, precision: float) -> None:
    """Minimise ``Σ weight ℓ + precision/2 ‖[W | b]‖²``, whose minimum is the posterior mode, by L-BFGS."""
    optimizer = torch.optim.LBFGS(head.parameters(), max_iter=300, history_size=30, line_search_fn="strong_wolfe")

    def closure() -> float:
        optimizer.zero_grad()
        loss = softcurve.linear_cross_entropy(
            e, head.weight, y, linear_bias=head.bias, sample_weight=weight, reduction="sum"
        )
        assert isinstance(loss, Tensor)
        loss = loss + precision / 2 * sum(parameter.square().sum() for parameter in head.parameters())
        (loss / len(e)).backward()
        return loss.item() / len(e)

    optimizer.step(closure)


def score(p: Tensor, y: Labels) -> Scores:
    """Score predicted probabilities against labels."""
    confidence, predicted = p.max(-1)
    correct = (predicted == y).float()
    gaps = torch.zeros(BINS).index_add_(0, binned(confidence), confidence - correct)
    loss = -p.gather(1, y.unsqueeze(1)).log().mean()
    error = gaps.abs().sum() / len(p)
    return Scores(*(value.item() for value in (correct.mean(), confidence.mean(), loss, error)))


def binned(confidence: Tensor) -> Tensor:
    """Return the bin index of each confidence."""
    return (confidence * BINS).long().clamp(max=BINS - 1)


# --- the picture -----------------------------------------------------------------------------------------------------


def strip(axes: Axes, laplace: LastLayerLaplace, x: Images, label: int) -> None:
    """Show one digit at every angle with its predictions."""
    views = torch.cat([turned(x, angle) for angle in TURNED])
    axes.imshow(
        nn.functional.pad(views.unflatten(-1, (SIDE, SIDE)), (1, 1)).transpose(0, 1).flatten(1).numpy(),
        cmap="gray_r", vmin=0, vmax=1,
    )  # fmt: skip
    plain, corrected = (laplace.predict_proba(views, correction=name) for name in ("none", "probit"))
    for place, angle in enumerate(TURNED):
        middle = (SIDE + 2) * (place + 0.5) - 0.5
        axes.text(middle, -1.0, f"{angle}°", color=MUTED, ha="center", va="bottom", fontsize=9)
        for below, (p, colour) in enumerate(((plain, ORANGE), (corrected, BLUE))):
            said = f"“{p[place].argmax().item()}”  {100 * p[place].max().item():.0f} %"
            axes.text(middle, SIDE + 0.4 + 1.7 * below, said, color=colour, ha="center", va="top", fontsize=10)
    axes.set_title(
        f"Predictions for a rotated held-out {label}: plain softmax (above) and probit (below)",
        loc="left",
    )
    axes.set_xlim(-0.5, (SIDE + 2) * len(TURNED) - 0.5)
    axes.set_ylim(SIDE + 3.6, -2.6)
    axes.axis("off")


def by_angle(axes: Axes, scores: dict[str, list[Scores]]) -> None:
    """Plot the mean confidence and the accuracy for each angle."""
    axes.axvspan(0, max(SEEN), color=MUTED, alpha=0.15, linewidth=0)
    axes.text(1, 3, "as in training", color=MUTED, fontsize=8, rotation=90)
    for name, found in scores.items():
        dashes = "--" if name == "mc" else "-"
        axes.plot(TURNED, [100 * s.confidence for s in found], dashes, color=COLOURS[name], label=NAMES[name])
    axes.plot(TURNED, [100 * s.accuracy for s in scores["none"]], color="black", linewidth=2.2, label="accuracy")
    axes.set_title("Mean confidence and accuracy", loc="left")
    axes.set_xlabel("rotation of the held-out digits, degrees")
    axes.set_ylabel("mean over digits, %")
    axes.set_ylim(0, 102)
    axes.legend(frameon=False, loc="lower left", bbox_to_anchor=(0.12, 0))


def reliability(axes: Axes, pooled: dict[str, Tensor], y: Labels) -> None:
    """Plot the accuracy by confidence over all angles; the area of a dot is its fraction of the digits."""
    axes.plot([0, 100], [0, 100], color=MUTED, linewidth=0.8)
    for name in ("none", "probit"):
        confidence, predicted = pooled[name].max(-1)
        bins, correct = binned(confidence), (predicted == y).float()
        count = torch.bincount(bins, minlength=BINS)
        kept = count > 0
        middle, right = (
            100 * (torch.zeros(BINS).index_add_(0, bins, part) / count)[kept] for part in (confidence, correct)
        )
        axes.plot(middle, right, color=COLOURS[name], label=NAMES[name])
        axes.scatter(middle, right, s=400 * count[kept] / len(y), color=COLOURS[name], alpha=0.6)
    axes.set_title("Reliability, all angles from 0° to 90°", loc="left")
    axes.set_xlabel("confidence, %")
    axes.set_ylabel("accuracy, %")
    axes.set_xlim(0, 104)
    axes.set_ylim(0, 104)
    axes.legend(frameon=False, loc="upper left")


def evidence(axes: Axes, posteriors: dict[str, LastLayerLaplace]) -> None:
    """Plot the log evidence over the prior precision and mark its maximum."""
    precisions = torch.logspace(-2, 2.3, 44, dtype=torch.float64)
    for (name, laplace), colour in zip(posteriors.items(), (BLUE, MUTED), strict=True):
        axes.plot(precisions, laplace.log_marginal_likelihood(precisions), color=colour, label=name)
        axes.plot(laplace.prior_precision, laplace.log_marginal_likelihood(), "o", color=colour)
    axes.set_xscale("log")
    axes.set_title("Log evidence, nats", loc="left")
    axes.set_xlabel("prior precision")
    axes.legend(frameon=False)


def save(figure: Figure, out: Path) -> None:
    """Write to a temporary file and rename it, so that an incomplete figure is never visible."""
    part = out.with_name(f".{out.name}.{os.getpid()}.part")
    try:
        figure.savefig(part, format="png", dpi=110)
        part.replace(out)
    finally:
        part.unlink(missing_ok=True)


# --- the command line ------------------------------------------------------------------------------------------------


def arguments() -> argparse.Namespace:
    """Parse and check the command line before any computation."""
    parser = argparse.ArgumentParser(description="Compare confidence on rotated digits with and without Laplace.")
    parser.add_argument("--steps", type=int, default=300, help="number of training batches (300)")
    parser.add_argument("--seed", type=int, default=0, help="random seed for the split, weights and batches (0)")
    parser.add_argument("--out", type=Path, default=Path("build/laplace_digits.png"), help="output file")
    chosen = parser.parse_args()
    if chosen.steps < 1:
        parser.error(f"argument --steps: must be at least 1, got {chosen.steps}")
    if not 0 <= chosen.seed < 2**63:
        parser.error(f"argument --seed: must be at least 0 and below 2^63, got {chosen.seed}")
    if chosen.out.is_dir():
        parser.error(f"argument --out: {chosen.out} is a folder; give the name of a file in it")
    try:
        chosen.out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser.error(f"argument --out: the folder {chosen.out.parent} cannot be made ({error.strerror}); give another")
    return chosen


def show(scores: dict[str, list[Scores]], whole: dict[str, Scores]) -> None:
    """Print the scores for each angle and for all angles."""
    print(f"\n{'':10s}{'':10s}{'confidence, %':>27s}{'loss, nats':>30s}")
    print(f"{'rotation':10s}{'accuracy':>10s}" + 2 * "".join(f"{name:>9s}" for name in CORRECTIONS))
    lines = [(f"{angle}°", [scores[name][i] for name in CORRECTIONS]) for i, angle in enumerate(TURNED)]
    for name, found in [*lines, ("all", [whole[name] for name in CORRECTIONS])]:
        sure, loss = ([100 * s.confidence for s in found], [s.loss for s in found])
        numbers = "".join(f"{v:9.1f}" for v in sure) + "".join(f"{v:9.3f}" for v in loss)
        print(f"{name:10s}{100 * found[0].accuracy:8.1f} %{numbers}")
    errors = ", ".join(f"{name} {100 * whole[name].calibration_error:.1f} %" for name in CORRECTIONS)
    print(f"Expected calibration error over all angles: {errors}")


def draw(
    posteriors: dict[str, LastLayerLaplace],
    digit: tuple[Images, int],
    scores: dict[str, list[Scores]],
    pooled: dict[str, Tensor],
    y: Labels,
) -> Figure:
    """Draw a rotated digit at the top and the curves at the bottom."""
    figure = Figure(figsize=(12, 6.2), layout="constrained")
    FigureCanvasAgg(figure)
    above, below = figure.subfigures(2, 1, height_ratios=(0.5, 1), squeeze=False).flat
    strip(above.subplots(), posteriors["kronecker"], *digit)
    left, middle, right = below.subplots(1, 3)
    by_angle(left, scores)
    reliability(middle, pooled, y)
    evidence(right, posteriors)
    return figure


def typical(p: dict[str, list[Tensor]], y: Labels) -> int:
    """Return the index of the digit that is shown.

    It is recognised upright but not at the largest angle; among these, its confidences are closest to the means.
    """
    plain = p["none"]
    told = (plain[0].argmax(-1) == y) & (plain[-1].argmax(-1) != y)
    sure = torch.stack([part.amax(-1) for name in ("none", "probit") for part in p[name]])
    distance = (sure - sure.mean(1, keepdim=True)).square().sum(0)
    return int(torch.where(told, distance, math.inf).argmin())


def main() -> None:
    """Train the network, compute the posterior, score rotated digits, and write the figure and the report."""
    chosen = arguments()
    torch.set_num_threads(1)  # the tensors are too small for a second thread to pay off
    torch.manual_seed(chosen.seed)
    start = time.perf_counter()
    (x, y), (held_out, labels) = load()
    # Every training digit occurs in several rotations, whose weights sum to one.
    views, repeated = torch.cat([turned(x, angle) for angle in SEEN]), y.repeat(len(SEEN))
    weight = torch.full((len(views),), 1 / len(SEEN))
    features, head = train(views, repeated, chosen.steps)
    features.requires_grad_(requires_grad=False)
    e = features(views)

    print(f"{'round':8s}{'prior precision':>16s}{'log evidence':>16s}")
    posteriors, precision, history = {}, 1.0, []
    began = time.perf_counter()
    for number in range(ROUNDS):
        find_mode(head, e, repeated, weight, precision)
        for structure in ("kronecker", "diagonal") if number == ROUNDS - 1 else ("kronecker",):
            laplace = LastLayerLaplace(head, [(views, repeated, weight)], features=features, structure=structure)
            posteriors[structure] = laplace.optimize_prior_precision()
        precision = posteriors["kronecker"].prior_precision
        history.append((precision, posteriors["kronecker"].log_marginal_likelihood().item()))
        print(f"{number:5d}   {precision:16.3f}{history[-1][1]:16.2f}")
    seconds = time.perf_counter() - began

    laplace = posteriors["kronecker"]
    p = {name: [laplace.predict_proba(turned(held_out, a), correction=name) for a in TURNED] for name in CORRECTIONS}
    scores = {name: [score(part, labels) for part in parts] for name, parts in p.items()}
    pooled, together = {name: torch.cat(parts) for name, parts in p.items()}, labels.repeat(len(TURNED))
    whole = {name: score(part, together) for name, part in pooled.items()}
    show(scores, whole)
    shown = typical(p, labels)
    digit = held_out[shown : shown + 1], int(labels[shown])
    save(draw(posteriors, digit, scores, pooled, together), chosen.out)
    print(f"\nThe picture is at {chosen.out}")
    report = {
        **vars(chosen),
        "out": str(chosen.out),
        "seconds": round(time.perf_counter() - start, 2),
        "laplace_seconds": round(seconds, 2),
        "rounds": [dict(zip(("prior_precision", "log_evidence"), each, strict=True)) for each in history],
        "diagonal": {
            "prior_precision": posteriors["diagonal"].prior_precision,
            "log_evidence": posteriors["diagonal"].log_marginal_likelihood().item(),
        },
        "upright": {name: vars(found[0]) for name, found in scores.items()},
        "all": {name: vars(found) for name, found in whole.items()},
    }
    print(json.dumps(report, allow_nan=False))


if __name__ == "__main__":
    main()
