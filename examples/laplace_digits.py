"""How sure a network is of digits that turn away from what it was trained on, before and after Laplace.

The data are scikit-learn's embedded digits. A small network is trained on digits that are turned by up to 15 degrees.
Then its head alone is treated as MacKay did: the head's mode under a prior, a normal posterior around it whose
precision is the Gauss-Newton matrix by Kronecker factors, the prior precision of the largest evidence, and again.
On held-out digits that are turned further and further, the plain softmax stays sure of what it gets wrong; averaged
over the posterior, by the probit approximation or by samples, it is less so. It is also less sure than it might be of
upright digits: the price is in the table.

    python examples/laplace_digits.py [--steps 300] [--seed 0] [--out build/laplace_digits.png]

Prints tables for people and then one line of JSON; the picture has a turning digit, confidence and accuracy by angle,
a reliability diagram and the evidence.
"""

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
    """Of probabilities beside labels."""

    accuracy: float
    confidence: float  # the mean of the largest probability
    loss: float  # the mean of −log p, in nats
    calibration_error: float  # the mean distance of confidence and accuracy over bins of confidence


def turned(x: Images, degrees: float) -> Images:
    """Each image turned about its centre, bilinear, white outside."""
    angle = math.radians(degrees)
    matrix = torch.tensor([[math.cos(angle), -math.sin(angle), 0], [math.sin(angle), math.cos(angle), 0]])
    shape = (len(x), 1, SIDE, SIDE)
    grid = nn.functional.affine_grid(matrix.expand(len(x), 2, 3), list(shape), align_corners=False)
    return nn.functional.grid_sample(x.view(shape), grid, align_corners=False).view(len(x), PIXELS)


def load() -> tuple[tuple[Images, Labels], tuple[Images, Labels]]:
    """Grey levels in [0, 1] and classes, in random order: training digits, held-out digits."""
    values, classes = load_digits(return_X_y=True)
    order = torch.randperm(len(values))
    x, y = torch.from_numpy(values / GREYS).float()[order], torch.from_numpy(classes).long()[order]
    return (x[:TRAIN], y[:TRAIN]), (x[TRAIN:], y[TRAIN:])


# --- the model -------------------------------------------------------------------------------------------------------


def train(x: Images, y: Labels, steps: int) -> tuple[nn.Sequential, nn.Linear]:
    """Features and head, by Adam."""
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
    """The mode of the head's posterior: the minimum of ``Σ weight ℓ + precision/2 ‖[W | b]‖²``, by L-BFGS."""
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
    """What is measured of probabilities."""
    confidence, predicted = p.max(-1)
    correct = (predicted == y).float()
    gaps = torch.zeros(BINS).index_add_(0, binned(confidence), confidence - correct)
    loss = -p.gather(1, y.unsqueeze(1)).log().mean()
    error = gaps.abs().sum() / len(p)
    return Scores(*(value.item() for value in (correct.mean(), confidence.mean(), loss, error)))


def binned(confidence: Tensor) -> Tensor:
    """The number of the bin of each confidence."""
    return (confidence * BINS).long().clamp(max=BINS - 1)


# --- the picture -----------------------------------------------------------------------------------------------------


def strip(axes: Axes, laplace: LastLayerLaplace, x: Images, label: int) -> None:
    """One digit as it turns, with what is said of it."""
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
        f"A held-out {label} turning: what it is taken for, by the plain softmax above and by the probit below",
        loc="left",
    )
    axes.set_xlim(-0.5, (SIDE + 2) * len(TURNED) - 0.5)
    axes.set_ylim(SIDE + 3.6, -2.6)
    axes.axis("off")


def by_angle(axes: Axes, scores: dict[str, list[Scores]]) -> None:
    """The mean confidence beside the accuracy."""
    axes.axvspan(0, max(SEEN), color=MUTED, alpha=0.15, linewidth=0)
    axes.text(1, 3, "as in training", color=MUTED, fontsize=8, rotation=90)
    for name, found in scores.items():
        dashes = "--" if name == "mc" else "-"
        axes.plot(TURNED, [100 * s.confidence for s in found], dashes, color=COLOURS[name], label=NAMES[name])
    axes.plot(TURNED, [100 * s.accuracy for s in scores["none"]], color="black", linewidth=2.2, label="accuracy")
    axes.set_title("Mean confidence and accuracy", loc="left")
    axes.set_xlabel("degrees that held-out digits are turned")
    axes.set_ylabel("mean over digits, %")
    axes.set_ylim(0, 102)
    axes.legend(frameon=False, loc="lower left", bbox_to_anchor=(0.12, 0))


def reliability(axes: Axes, pooled: dict[str, Tensor], y: Labels) -> None:
    """Accuracy by confidence, all angles together; the areas of the dots are the shares of digits."""
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
    axes.set_title("Reliability, 0° to 90° together", loc="left")
    axes.set_xlabel("confidence, %")
    axes.set_ylabel("accuracy, %")
    axes.set_xlim(0, 104)
    axes.set_ylim(0, 104)
    axes.legend(frameon=False, loc="upper left")


def evidence(axes: Axes, posteriors: dict[str, LastLayerLaplace]) -> None:
    """Over the prior precision, with its maximum."""
    precisions = torch.logspace(-2, 2.3, 44, dtype=torch.float64)
    for (name, laplace), colour in zip(posteriors.items(), (BLUE, MUTED), strict=True):
        axes.plot(precisions, laplace.log_marginal_likelihood(precisions), color=colour, label=name)
        axes.plot(laplace.prior_precision, laplace.log_marginal_likelihood(), "o", color=colour)
    axes.set_xscale("log")
    axes.set_title("Log evidence, nats", loc="left")
    axes.set_xlabel("prior precision")
    axes.legend(frameon=False)


def save(figure: Figure, out: Path) -> None:
    """Write beside the place and rename: a picture is whole or not there."""
    part = out.with_name(f".{out.name}.{os.getpid()}.part")
    try:
        figure.savefig(part, format="png", dpi=110)
        part.replace(out)
    finally:
        part.unlink(missing_ok=True)


# --- the command line ------------------------------------------------------------------------------------------------


def arguments() -> argparse.Namespace:
    """Parse the command line; what cannot work is said before any work is done."""
    parser = argparse.ArgumentParser(description="Confidence of a network of digits before and after Laplace.")
    parser.add_argument("--steps", type=int, default=300, help="batches that the network is trained on (300)")
    parser.add_argument("--seed", type=int, default=0, help="of the split, initial weights and batches (0)")
    parser.add_argument("--out", type=Path, default=Path("build/laplace_digits.png"), help="where the picture goes")
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
    """By angle, then all together."""
    print(f"\n{'':10s}{'':10s}{'confidence, %':>27s}{'loss, nats':>30s}")
    print(f"{'turned by':10s}{'accuracy':>10s}" + 2 * "".join(f"{name:>9s}" for name in CORRECTIONS))
    lines = [(f"{angle}°", [scores[name][i] for name in CORRECTIONS]) for i, angle in enumerate(TURNED)]
    for name, found in [*lines, ("all", [whole[name] for name in CORRECTIONS])]:
        sure, loss = ([100 * s.confidence for s in found], [s.loss for s in found])
        numbers = "".join(f"{v:9.1f}" for v in sure) + "".join(f"{v:9.3f}" for v in loss)
        print(f"{name:10s}{100 * found[0].accuracy:8.1f} %{numbers}")
    errors = ", ".join(f"{name} {100 * whole[name].calibration_error:.1f} %" for name in CORRECTIONS)
    print(f"Expected calibration error of all: {errors}")


def draw(
    posteriors: dict[str, LastLayerLaplace],
    digit: tuple[Images, int],
    scores: dict[str, list[Scores]],
    pooled: dict[str, Tensor],
    y: Labels,
) -> Figure:
    """A digit above, curves below."""
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
    """Of the digits known when upright and mistaken in the end, that whose confidences are nearest to the means."""
    plain = p["none"]
    told = (plain[0].argmax(-1) == y) & (plain[-1].argmax(-1) != y)
    sure = torch.stack([part.amax(-1) for name in ("none", "probit") for part in p[name]])
    distance = (sure - sure.mean(1, keepdim=True)).square().sum(0)
    return int(torch.where(told, distance, math.inf).argmin())


def main() -> None:
    """Train, find the posterior, turn digits, draw, report."""
    chosen = arguments()
    torch.set_num_threads(1)  # the tensors are small: a second thread would wait more than it works
    torch.manual_seed(chosen.seed)
    start = time.perf_counter()
    (x, y), (held_out, labels) = load()
    # Every training digit in some views, which together count as one row.
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
