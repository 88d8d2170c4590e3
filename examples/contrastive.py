"""Contrastive features without labels
===================================

Learn features of digits without labels from two views of each, and measure the memory of the loss.

The data are scikit-learn's embedded digits. A view is a digit that is shifted, scaled a little and made noisy. An
encoder is trained with SimCLR's NT-Xent loss: a view must find the other view of its digit among all views of the batch
but itself. The features are then judged by a linear probe, a softmax regression on few labels, beside the same probe on
pixels and on the features of the untrained encoder.

The loss compares 2N views with 2N views. Measured in processes of their own, its memory is compared with that of the
dense computation, which holds all similarities.

Run it from the root of the repository::

    python examples/contrastive.py [--steps 400] [--batch 512] [--largest 8192] [--seed 0] [--out build/contrastive.png]

The example prints tables, followed by one line of JSON. The figure shows the similarities of some held-out views, the
accuracy of the probes and the memory. The memory is read from /proc, so the example needs Linux.

.. image:: /pictures/contrastive.png
   :alt: Similarities of held-out views, accuracy of the probes, and memory of the loss
"""

# sphinx_gallery_thumbnail_path = "pictures/contrastive.png"

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
import warnings
from pathlib import Path

import torch
from jaxtyping import Float, Int
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from sklearn.datasets import load_digits
from torch import Tensor, nn

import softcurve

SIDE, GREYS, TRAIN, WIDTH = 8, 16, 1400, 64
SCALE, RATE = 1 / 0.2, 2e-3
LABELLED, DRAWS = (20, 50, 100, 200, 500), 5
LEAST_VIEWS, MEASURED_WIDTH = 1024, 64
BLUE, ORANGE, MUTED = "#1f62c4", "#c2500c", "#8b949e"
COLOURS = {"learned features": BLUE, "pixels": ORANGE, "untrained features": MUTED}

Images = Float[Tensor, "n 1 side side"]
Labels = Int[Tensor, " n"]


def load() -> tuple[tuple[Images, Labels], tuple[Images, Labels]]:
    """Return training and held-out digits in random order, with grey levels in [0, 1]."""
    values, classes = load_digits(return_X_y=True)
    order = torch.randperm(len(values))
    x = torch.from_numpy(values / GREYS).float()[order].view(-1, 1, SIDE, SIDE)
    y = torch.from_numpy(classes).long()[order]
    return (x[:TRAIN], y[:TRAIN]), (x[TRAIN:], y[TRAIN:])


def view(x: Images) -> Images:
    """Shift each image by up to a pixel, scale it by up to 15 %, and add noise."""
    matrix = torch.zeros(len(x), 2, 3)
    matrix[:, 0, 0] = matrix[:, 1, 1] = 1 + 0.15 * (2 * torch.rand(len(x)) - 1)
    matrix[:, :, 2] = (2 / SIDE) * (2 * torch.rand(len(x), 2) - 1)
    grid = nn.functional.affine_grid(matrix, list(x.shape), align_corners=False)
    return nn.functional.grid_sample(x, grid, align_corners=False) + 0.15 * torch.randn_like(x)


# --- training --------------------------------------------------------------------------------------------------------


def make_encoder() -> nn.Sequential:
    """Return a small convolutional network."""
    return nn.Sequential(
        nn.Conv2d(1, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, WIDTH, 3, stride=2, padding=1), nn.ReLU(),
        nn.Flatten(), nn.Linear(WIDTH * SIDE * SIDE // 4, WIDTH), nn.ReLU(),
    )  # fmt: skip


def train(encoder: nn.Module, x: Images, steps: int, batch: int) -> list[float]:
    """Train the encoder and a projection, which is dropped afterwards; return the loss of each step, in nats."""
    projection = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.ReLU(), nn.Linear(WIDTH, WIDTH // 2))
    nt_xent = softcurve.nn.ContrastiveLoss(SCALE, learnable_scale=False, symmetric=False)
    each = torch.arange(2 * batch)
    partner, itself = (each + batch) % (2 * batch), each.unsqueeze(-1)
    optimizer = torch.optim.Adam([*encoder.parameters(), *projection.parameters()], RATE)
    losses = []
    for _ in range(steps):
        chosen = x[torch.randperm(len(x))[:batch]]
        views = projection(encoder(torch.cat([view(chosen), view(chosen)])))
        optimizer.zero_grad()
        loss = nt_xent(views, views, partner, exclude=itself)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def probe(features: dict[str, tuple[Tensor, Tensor]], y: Labels, held_out: Labels) -> dict[str, list[float]]:
    """Return the held-out accuracy of a softmax regression on few labels, the mean over several draws of them."""
    found: dict[str, list[float]] = {name: [] for name in features}
    for count in LABELLED:
        draws = [torch.randperm(len(y))[:count] for _ in range(DRAWS)]
        for name, (seen, unseen) in features.items():
            scale = seen.std()
            scores = []
            for rows in draws:
                model = softcurve.SoftmaxRegression(C=1.0).fit(seen[rows] / scale, y[rows])
                scores.append(model.score(unseen / scale, held_out))
            found[name].append(sum(scores) / DRAWS)
    return found


# --- memory ----------------------------------------------------------------------------------------------------------


def dense(views: Tensor) -> Tensor:
    """Return NT-Xent as it is usually written."""
    z = nn.functional.normalize(views, dim=-1)
    similarities = (SCALE * z @ z.T).fill_diagonal_(-torch.inf)
    return nn.functional.cross_entropy(similarities, partners(len(views)))


def streamed(views: Tensor) -> Tensor:
    """Return the same loss without the similarities."""
    itself = torch.arange(len(views)).unsqueeze(-1)
    return softcurve.contrastive_loss(
        views, views, partners(len(views)), scale=SCALE, symmetric=False, exclude=itself, memory_budget=32 << 20
    )


def partners(count: int) -> Labels:
    """Return the index of each view's other view."""
    return (torch.arange(count) + count // 2) % count


def resident(field: str) -> float:
    """Return the resident set of this process (``VmRSS``) or its largest so far (``VmHWM``), in MB."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(f"{field}:"))


def measure(name: str, count: int) -> None:
    """Print loss, seconds and extra memory of a loss with its gradient; a small problem loads the libraries first."""
    torch.set_num_threads(1)
    function = {"dense": dense, "streamed": streamed}[name]
    function(torch.randn(64, MEASURED_WIDTH, requires_grad=True)).backward()
    views = torch.randn(count, MEASURED_WIDTH, generator=torch.Generator().manual_seed(0)).requires_grad_()
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # the largest so far starts again from here
    before, began = resident("VmRSS"), time.perf_counter()
    loss = function(views)
    loss.backward()
    print(json.dumps({"loss": loss.item(), "seconds": time.perf_counter() - began, "mb": resident("VmHWM") - before}))


def measured(largest: int) -> dict[str, dict[int, dict[str, float]]]:
    """Measure both losses for doubling numbers of views, each in a process of its own."""
    counts = [LEAST_VIEWS << i for i in range(20) if LEAST_VIEWS << i <= largest]
    found: dict[str, dict[int, dict[str, float]]] = {"streamed": {}, "dense": {}}
    for name, by_count in found.items():
        for count in counts:
            command = [sys.executable, __file__, "--measure", name, str(count)]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            by_count[count] = json.loads(done.stdout)
    return found


# --- the picture -----------------------------------------------------------------------------------------------------


def similarities(axes: Axes, encoder: nn.Module, x: Images, y: Labels) -> None:
    """Show the cosines between the features of held-out digits, in the order of their labels."""
    some = y[:200].argsort()
    e = nn.functional.normalize(encoder(x[:200][some]).detach(), dim=-1)
    axes.imshow((e @ e.T).numpy(), cmap="Blues", vmin=0, vmax=1)
    edges = torch.bincount(y[:200], minlength=10).cumsum(0)
    axes.set_xticks((edges - torch.bincount(y[:200], minlength=10) / 2).tolist(), [str(k) for k in range(10)])
    axes.set_yticks([])
    axes.set_title("Cosines of 200 held-out digits, by label", loc="left")


def accuracies(axes: Axes, found: dict[str, list[float]]) -> None:
    """Plot the accuracy of the probes by the number of labels."""
    for name, values in found.items():
        axes.plot(LABELLED, [100 * v for v in values], "o-", color=COLOURS[name], label=name)
    axes.set_xscale("log")
    axes.set_xticks(LABELLED, [str(n) for n in LABELLED], minor=False)
    axes.minorticks_off()
    axes.set_title("Accuracy of a linear probe, %", loc="left")
    axes.set_xlabel("labelled digits")
    axes.legend(frameon=False, loc="lower right")


def memory(axes: Axes, found: dict[str, dict[int, dict[str, float]]]) -> None:
    """Plot the extra memory by the number of views."""
    for (name, by_count), colour in zip(found.items(), (BLUE, ORANGE), strict=True):
        axes.plot(list(by_count), [one["mb"] for one in by_count.values()], "o-", color=colour, label=name)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_title("Memory of the loss and its gradient, MB", loc="left")
    axes.set_xlabel("views")
    axes.legend(frameon=False, loc="upper left")


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
    parser = argparse.ArgumentParser(description="Learn features of digits from two views of each.")
    parser.add_argument("--steps", type=int, default=400, help="number of training batches (400)")
    parser.add_argument("--batch", type=int, default=512, help=f"digits in a batch, 2 to {TRAIN} (512)")
    parser.add_argument("--largest", type=int, default=8192, help="largest number of views that is measured (8192)")
    parser.add_argument("--seed", type=int, default=0, help="random seed for the split, weights and views (0)")
    parser.add_argument("--out", type=Path, default=Path("build/contrastive.png"), help="output file")
    parser.add_argument("--measure", nargs=2, metavar=("LOSS", "VIEWS"), help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.steps < 1:
        parser.error(f"argument --steps: must be at least 1, got {chosen.steps}")
    if not 2 <= chosen.batch <= TRAIN:
        parser.error(f"argument --batch: must be from 2 to {TRAIN}, got {chosen.batch}")
    if chosen.largest < LEAST_VIEWS:
        parser.error(f"argument --largest: must be at least {LEAST_VIEWS}, got {chosen.largest}")
    if not 0 <= chosen.seed < 2**63:
        parser.error(f"argument --seed: must be at least 0 and below 2^63, got {chosen.seed}")
    if chosen.out.is_dir():
        parser.error(f"argument --out: {chosen.out} is a folder; give the name of a file in it")
    if chosen.measure is None:
        try:
            chosen.out.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            parser.error(
                f"argument --out: the folder {chosen.out.parent} cannot be made ({error.strerror}); give another"
            )
    return chosen


def show(probes: dict[str, list[float]], found: dict[str, dict[int, dict[str, float]]]) -> None:
    """Print the accuracies and the measurements."""
    print(f"\n{'accuracy, %':20s}" + "".join(f"{n:>8d}" for n in LABELLED) + "  labels")
    for name, values in probes.items():
        print(f"{name:20s}" + "".join(f"{100 * v:8.1f}" for v in values))
    print(f"\n{'':10s}{'memory, MB':>24s}{'seconds':>24s}{'loss, nats':>24s}")
    print(f"{'views':10s}" + 3 * "".join(f"{name:>12s}" for name in found))
    for count in found["dense"]:
        parts = [found[name][count][key] for key in ("mb", "seconds", "loss") for name in found]
        print(f"{count:<10d}" + "".join(f"{v:12.1f}" for v in parts[:2]) + "".join(f"{v:12.4f}" for v in parts[2:]))


def main() -> None:
    """Train the encoder, probe its features, measure the loss, and write the figure and the report."""
    chosen = arguments()
    if chosen.measure is not None:
        measure(chosen.measure[0], int(chosen.measure[1]))
        return
    torch.manual_seed(chosen.seed)
    start = time.perf_counter()
    (x, y), (held_out, labels) = load()
    encoder = make_encoder()

    def features() -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            return encoder(x), encoder(held_out)

    untrained = features()
    losses = train(encoder, x, chosen.steps, chosen.batch)
    seconds = time.perf_counter() - start
    print(f"{chosen.steps} steps in {seconds:.0f} s: the loss falls from {losses[0]:.3f} to {losses[-1]:.3f} nats")
    kinds = {"learned features": features(), "pixels": (x.flatten(1), held_out.flatten(1))}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a fit on few labels may miss a class, and its tolerance
        probes = probe(kinds | {"untrained features": untrained}, y, labels)
    found = measured(chosen.largest)
    show(probes, found)
    figure = Figure(figsize=(13, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    left, middle, right = figure.subplots(1, 3)
    similarities(left, encoder, held_out, labels)
    accuracies(middle, probes)
    memory(right, found)
    save(figure, chosen.out)
    print(f"\nThe picture is at {chosen.out}")
    report = {name: getattr(chosen, name) for name in ("steps", "batch", "largest", "seed")}
    report |= {"out": str(chosen.out), "seconds": round(time.perf_counter() - start, 2)}
    report |= {"loss": [losses[0], losses[-1]], "labelled": LABELLED, "accuracy": probes, "measured": found}
    print(json.dumps(report, allow_nan=False))


if __name__ == "__main__":
    main()
