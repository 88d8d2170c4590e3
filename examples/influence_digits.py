"""Wrong labels by their influence
===============================

Find wrong labels among the digits by their influence on the loss of clean digits.

The data are scikit-learn's embedded digits. Many training digits are mislabelled: 1 as 7, 3 as 8 and 4 as 9. A head on
fixed random features is fitted to its minimum under weight decay. It also fits the wrong labels, so a high loss of a
digit is weak evidence that its label is wrong. One linear system with the Gauss-Newton matrix gives the influence of
every training digit on the loss of a few clean digits, and the most harmful digits are examined first. Finally, the
head is fitted again without some of the digits to compare the predicted with the actual change of the loss.

Run it from the root of the repository::

    python examples/influence_digits.py [--rows 1000] [--refits 30] [--seed 0] [--out build/influence_digits.png]

The example prints tables, followed by one line of JSON. The figure shows the most harmful digits, the recall of wrong
labels, and the predicted and actual changes of the loss.

.. image:: /pictures/influence_digits.png
   :alt: The most harmful digits, the recall of wrong labels, and predicted beside actual changes of the loss
"""

# sphinx_gallery_thumbnail_path = "pictures/influence_digits.png"

from __future__ import annotations

import argparse
import json
import math
import os
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Bool, Float, Int
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from sklearn.datasets import load_digits
from torch import Tensor, nn

import softcurve
from softcurve.curvature.influence import Influence, influence

PIXELS, SIDE, GREYS, CLASSES = 64, 8, 16, 10
FEATURES, DECAY = 256, 0.1
MISTAKEN, WRONG, VALIDATION = {1: 7, 3: 8, 4: 9}, 0.4, 300  # true → wrong label; probability; number of clean digits
SHOWN = (5, 8)
BLUE, ORANGE, MUTED = "#1f62c4", "#c2500c", "#8b949e"


@dataclass(frozen=True)
class Digits:
    """Images with grey levels in [0, 1]; the training digits have a given and a true label."""

    train: Float[Tensor, "n pixels"]
    given: Int[Tensor, " n"]
    true: Int[Tensor, " n"]
    validation: Float[Tensor, "m pixels"]
    labels: Int[Tensor, " m"]

    @property
    def wrong(self) -> Bool[Tensor, " n"]:
        """Whether each label was replaced by a wrong one."""
        return self.given != self.true


def load(rows: int) -> Digits:
    """Load the digits in random order and replace some of the training labels."""
    values, classes = load_digits(return_X_y=True)
    order = torch.randperm(len(values))[: rows + VALIDATION]
    x, y = torch.from_numpy(values / GREYS)[order], torch.from_numpy(classes).long()[order]
    taken_for = torch.tensor([MISTAKEN.get(label, label) for label in range(CLASSES)])
    given = torch.where(torch.rand(rows) < WRONG, taken_for[y[:rows]], y[:rows])
    return Digits(x[:rows], given, y[:rows], x[rows:], y[rows:])


# --- the model -------------------------------------------------------------------------------------------------------


def random_features(x: Float[Tensor, "n pixels"]) -> nn.Sequential:
    """Return features ``tanh(W x + b)`` with random ``W`` and ``b``, standardised on ``x``."""
    linear = nn.Linear(PIXELS, FEATURES)
    nn.init.normal_(linear.weight, std=0.5)
    nn.init.uniform_(linear.bias, -1, 1)
    scaled = nn.BatchNorm1d(FEATURES, affine=False, momentum=None)
    features = nn.Sequential(linear, nn.Tanh(), scaled).double().requires_grad_(requires_grad=False)
    features(x)
    return features.eval()


def fit(head: nn.Linear, e: Tensor, target: Tensor, weight: Tensor) -> None:
    """Minimise ``Σ weight ℓ + DECAY/2 ‖[W | b]‖²`` by L-BFGS, starting from the current head."""
    optimizer = torch.optim.LBFGS(
        head.parameters(), max_iter=500, history_size=50, tolerance_grad=1e-7, tolerance_change=1e-14,
        line_search_fn="strong_wolfe",
    )  # fmt: skip

    def closure() -> float:
        optimizer.zero_grad()
        loss = softcurve.linear_cross_entropy(
            e, head.weight, target, linear_bias=head.bias, sample_weight=weight, reduction="sum"
        )
        assert isinstance(loss, Tensor)
        loss = loss + DECAY / 2 * sum(parameter.square().sum() for parameter in head.parameters())
        loss.backward()
        return loss.item()

    optimizer.step(closure)


@torch.no_grad()
def measure(head: nn.Linear, e: Tensor, labels: Tensor) -> tuple[float, float]:
    """Return the mean loss and the accuracy."""
    loss, stats = softcurve.linear_cross_entropy(e, head.weight, labels, linear_bias=head.bias, return_stats=True)
    return loss.item(), stats.correct.double().mean().item()


def without_row(head: nn.Linear, e: Tensor, target: Tensor, row: int) -> nn.Linear:
    """Fit the head again without one training digit; the others keep their weight ``1/n``."""
    other = nn.Linear(FEATURES, CLASSES, dtype=torch.float64)
    other.load_state_dict(head.state_dict())
    weight = torch.full((len(e),), 1 / len(e), dtype=torch.float64)
    weight[row] = 0
    fit(other, e, target, weight)
    return other


def recall(order: Tensor, wrong: Tensor) -> Tensor:
    """Return the recall of wrong labels among the first digits of an order."""
    return wrong[order].cumsum(0).double() / wrong.sum()


# --- the picture -----------------------------------------------------------------------------------------------------


def gallery(axes: Axes, digits: Digits, rows: Tensor) -> None:
    """Show digits, black on white, with their given labels; wrong labels are coloured and corrected."""
    down, across = SHOWN
    tile, height = SIDE + 2, SIDE + 6  # includes space for the label below each digit
    canvas = torch.zeros(down * height, across * tile)
    for place, row in enumerate(rows.tolist()):
        top, left = place // across * height, place % across * tile + 1
        canvas[top : top + SIDE, left : left + SIDE] = digits.train[row].reshape(SIDE, SIDE)
        given, true = digits.given[row].item(), digits.true[row].item()
        text, colour = (f"“{given}” is {true}", ORANGE) if given != true else (f"“{given}”", MUTED)
        middle, below = left + SIDE / 2 - 0.5, top + SIDE + 0.2
        axes.text(middle, below, text, color=colour, ha="center", va="top", fontsize=9)
    axes.imshow(canvas.numpy(), cmap="gray_r", vmin=0, vmax=1)
    axes.axis("off")
    found = int(digits.wrong[rows].sum())
    axes.set_title(f"The {len(rows)} most harmful training digits: {found} have a wrong label", loc="left")


def recalls(axes: Axes, orders: dict[str, Tensor], wrong: Tensor) -> None:
    """Plot the recall of wrong labels among the first digits of each order."""
    rows = torch.arange(1, len(wrong) + 1) / len(wrong)
    for (name, order), colour in zip(orders.items(), (BLUE, ORANGE), strict=True):
        axes.plot(100 * rows, 100 * recall(order, wrong), color=colour, label=name)
    share = 100 * wrong.double().mean().item()
    axes.plot([0, share, 100], [0, 100, 100], color=MUTED, linewidth=0.8, linestyle=":", label="perfect order")
    axes.plot([0, 100], [0, 100], color=MUTED, linewidth=0.8, linestyle="--", label="random order")
    axes.set_title("Recall of wrong labels", loc="left")
    axes.set_xlabel("examined training digits, %")
    axes.set_ylabel("wrong labels found, %")
    axes.set_xlim(0, 60)
    axes.legend(frameon=False, loc="lower right")


def predictions(axes: Axes, predicted: Tensor, actual: Tensor, wrong: Tensor) -> None:
    """Plot the predicted and the actual change of the validation loss when a digit is left out."""
    bound = 1.1 * max(predicted.abs().max().item(), actual.abs().max().item())
    axes.axline((0, 0), slope=1, color=MUTED, linewidth=0.8)
    for chosen, colour, name in ((~wrong, BLUE, "right label"), (wrong, ORANGE, "wrong label")):
        axes.scatter(1e3 * predicted[chosen], 1e3 * actual[chosen], s=16, color=colour, label=name, alpha=0.8)
    axes.set_xlim(-1e3 * bound, 1e3 * bound)
    axes.set_ylim(-1e3 * bound, 1e3 * bound)
    axes.set_title("Validation loss without one digit", loc="left")
    axes.set_xlabel("predicted change, 10⁻³ nats")
    axes.set_ylabel("actual change, 10⁻³ nats")
    axes.legend(frameon=False, loc="upper left")


def draw(digits: Digits, found: Influence, orders: dict[str, Tensor], rows: Tensor, actual: Tensor) -> Figure:
    """Draw the digits on the left and the curves on the right."""
    figure = Figure(figsize=(12, 6.6), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subfigures(1, 2, width_ratios=(1.75, 1), squeeze=False).flat
    gallery(left.subplots(), digits, found.most_harmful(SHOWN[0] * SHOWN[1]))
    above, below = right.subplots(2, 1)
    recalls(above, orders, digits.wrong)
    predictions(below, found.of_removal[rows], actual, digits.wrong[rows])
    return figure


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
    parser = argparse.ArgumentParser(description="Find wrong labels among the digits by their influence.")
    parser.add_argument("--rows", type=int, default=1000, help="number of training digits, 100 to 1400 (1000)")
    parser.add_argument("--refits", type=int, default=30, help="number of fits that leave out one digit (30)")
    parser.add_argument("--seed", type=int, default=0, help="random seed for digits, wrong labels and features (0)")
    parser.add_argument("--out", type=Path, default=Path("build/influence_digits.png"), help="output file")
    chosen = parser.parse_args()
    if not 100 <= chosen.rows <= 1400:
        parser.error(f"argument --rows: must be from 100 to 1400, got {chosen.rows}")
    if not 2 <= chosen.refits <= chosen.rows:
        parser.error(f"argument --refits: must be from 2 to the number of rows, got {chosen.refits}")
    if not 0 <= chosen.seed < 2**63:
        parser.error(f"argument --seed: must be at least 0 and below 2^63, got {chosen.seed}")
    if chosen.out.is_dir():
        parser.error(f"argument --out: {chosen.out} is a folder; give the name of a file in it")
    try:
        chosen.out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser.error(f"argument --out: the folder {chosen.out.parent} cannot be made ({error.strerror}); give another")
    return chosen


def main() -> None:
    """Fit the head, compute the influence, refit without some digits, and write the figure and the report."""
    chosen = arguments()
    torch.set_num_threads(1)  # the tensors are too small for a second thread to pay off
    torch.manual_seed(chosen.seed)
    start = time.perf_counter()
    digits, head = load(chosen.rows), nn.Linear(FEATURES, CLASSES, dtype=torch.float64)
    features = random_features(digits.train)
    e, e_validation = features(digits.train), features(digits.validation)
    n, wrong = len(e), digits.wrong
    equal = torch.full((n,), 1 / n, dtype=torch.float64)
    fit(head, e, digits.given, equal)
    before = measure(head, e_validation, digits.labels)
    print(f"{n} training digits, {int(wrong.sum())} with a wrong label; {VALIDATION} clean ones for validation")

    began = time.perf_counter()
    train, validation = [(digits.train, digits.given)], [(digits.validation, digits.labels)]
    found = influence(features, head, train, validation, damping=DECAY)
    seconds = time.perf_counter() - began
    print(f"Influence of {n} digits: {found.products} products with the Gauss-Newton matrix, {seconds:.2f} s\n")

    with torch.no_grad():
        losses = softcurve.linear_cross_entropy(e, head.weight, digits.given, linear_bias=head.bias, reduction="none")
    assert isinstance(losses, Tensor)
    orders = {"most harmful first": found.most_harmful(n), "highest own loss first": losses.argsort(descending=True)}
    print(f"{'recall of wrong labels among the first':44s}{'5 %':>7s}{'10 %':>7s}{'15 %':>7s}{'20 %':>7s}")
    recalled = {}
    for name, order in orders.items():
        curve = recall(order, wrong)
        recalled[name] = {share: curve[math.ceil(share * n / 100) - 1].item() for share in (5, 10, 15, 20)}
        print(f"{name:44s}" + "".join(f"{100 * value:5.0f} %" for value in recalled[name].values()))

    kept = torch.ones(n, dtype=torch.bool)
    kept[found.most_harmful(int(wrong.sum()))] = False
    cleaned = nn.Linear(FEATURES, CLASSES, dtype=torch.float64)
    fit(cleaned, e, digits.given, kept / kept.sum().double())
    after = measure(cleaned, e_validation, digits.labels)
    print(f"\n{'validation':30s}{'loss, nats':>12s}{'accuracy':>12s}")
    print(f"{'all training digits':30s}{before[0]:12.4f}{100 * before[1]:10.1f} %")
    print(f"{f'without the {int((~kept).sum())} most harmful':30s}{after[0]:12.4f}{100 * after[1]:10.1f} %")

    # One half are the most harmful and most helpful digits, the other half are random.
    extreme = torch.cat([found.most_harmful(chosen.refits // 4), found.most_helpful(chosen.refits // 4)])
    others = torch.tensor([row for row in torch.randperm(n).tolist() if row not in set(extreme.tolist())])
    rows = torch.cat([extreme, others[: chosen.refits - len(extreme)]])
    fits = (without_row(head, e, digits.given, row) for row in rows.tolist())
    actual = torch.tensor([measure(other, e_validation, digits.labels)[0] - before[0] for other in fits]).double()
    correlation = torch.corrcoef(torch.stack([found.of_removal[rows], actual]))[0, 1].item()
    print(f"\nLeaving out each of {len(rows)} digits: predicted and actual change correlate with {correlation:.4f}")
    save(draw(digits, found, orders, rows, actual), chosen.out)
    print(f"The picture is at {chosen.out}")
    report = {
        **vars(chosen),
        "out": str(chosen.out),
        "seconds": round(time.perf_counter() - start, 2),
        "influence_seconds": round(seconds, 3),
        "products": found.products,
        "wrong": int(wrong.sum()),
        "recall": {name: {f"{share} %": value for share, value in found.items()} for name, found in recalled.items()},
        "before": dict(zip(("loss", "accuracy"), before, strict=True)),
        "after": dict(zip(("loss", "accuracy"), after, strict=True)),
        "correlation": correlation,
    }
    print(json.dumps(report, allow_nan=False))


if __name__ == "__main__":
    main()
