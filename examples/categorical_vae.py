"""A variational autoencoder with categorical latents
==================================================

Train a variational autoencoder with categorical latents whose two ELBO terms are computed by softcurve.

The data are scikit-learn's embedded digits: 64 pixels with 17 grey levels. An encoder computes q(z|x) for 16 latent
variables of 8 categories each, straight-through Gumbel-softmax samples z, and a decoder ends in a linear head and a
softmax over grey levels. −ELBO = cross_entropy(levels) + Σ KL(q‖prior) ≥ −log p(x) is a valid bound because a sampled z
is one-hot, like the samples of the prior.

The example then checks with autograd which distribution the KL term changes. With a fixed prior, KL(q‖prior) has a
gradient only with respect to q, and q converges to the prior. With a learned prior both receive a gradient and converge
to each other. H(q, prior) = KL(q‖prior) + H(q) has the same gradient with respect to the prior but a different one with
respect to q, because H(q) depends on q. For a uniform prior its gradient with respect to q is zero.

Run it from the root of the repository::

    python examples/categorical_vae.py [--epochs 80] [--seed 0] [--learned-prior] [--out build/categorical_vae.png]

The example prints tables, followed by one line of JSON. The figure shows training curves, reconstructions and samples.

.. image:: /pictures/categorical_vae.png
   :alt: Training curves of both terms of the ELBO, reconstructions and samples of digits
"""

# sphinx_gallery_thumbnail_path = "pictures/categorical_vae.png"

from __future__ import annotations

import argparse
import json
import math
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, Int
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn

import softcurve
from softcurve import reference

PIXELS, SIDE, LEVELS = 64, 8, 17
LATENTS, CATEGORIES, HIDDEN, PIXEL_FEATURES = 16, 8, 256, 16
BATCH, RATE = 128, 5e-3
DESCENT_STEPS, DESCENT_RATE = 100, 0.2
BIT_PER_PIXEL = PIXELS * math.log(2)  # in nats per digit
Q_COLOUR, PRIOR_COLOUR, MUTED = "#1f62c4", "#c2500c", "#59636e"

Levels = Int[Tensor, "n pixels"]
QLogits = Float[Tensor, "n latents categories"]
PriorLogits = Float[Tensor, "latents categories"]
Gradients = tuple[QLogits, PriorLogits | None]
Descent = dict[str, list[float]]

LOSSES = ("KL(q‖prior), prior fixed", "KL(q‖prior), prior learned", "H(q, prior), prior learned")
FORMULAS = (
    "∂KL/∂q = q ⊙ (log(q⊘prior) − KL)",
    "∂KL/∂prior = Σ (prior − q)",
    "∂KL/∂prior = ∂H(q, prior)/∂prior",
    "∂KL/∂q = ∂H(q, prior)/∂q − ∂H(q)/∂q",
)


@dataclass(frozen=True)
class Digits:
    """Grey levels 0…16 in a fixed split; ``examples`` contains one held-out digit of each class."""

    train: Levels
    held_out: Levels
    examples: Levels


@dataclass(frozen=True)
class Terms:
    """The two terms of −ELBO, in nats per digit."""

    reconstruction: float
    kl: float

    def elbo(self) -> float:
        """Return the ELBO, which is negative, in nats per digit."""
        return -(self.reconstruction + self.kl)

    def record(self) -> dict[str, float]:
        """Return the fields of the JSON line, including −ELBO in bits per pixel."""
        return {**vars(self), "elbo": self.elbo(), "bits_per_pixel": -self.elbo() / BIT_PER_PIXEL}


@dataclass(frozen=True)
class Epoch:
    """The terms on the held-out digits and on equally many training digits; epoch 0 is the untrained model."""

    train: Terms
    held_out: Terms


# --- the model -------------------------------------------------------------------------------------------------------


class CategoricalVAE(nn.Module):
    """The encoder q(z|x), the logits of the prior, and the decoder p(x|z) with one linear head for all pixels."""

    def __init__(self, *, learned_prior: bool) -> None:
        super().__init__()
        latent, pixel = (LATENTS, CATEGORIES), (PIXELS, PIXEL_FEATURES)
        self.encoder = nn.Sequential(
            nn.Linear(PIXELS, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, math.prod(latent)), nn.Unflatten(-1, latent)
        )
        self.decoder = nn.Sequential(
            nn.Sequential(nn.Flatten(-2), nn.Linear(math.prod(latent), HIDDEN), nn.ReLU()),
            nn.Sequential(nn.Linear(HIDDEN, math.prod(pixel)), nn.Unflatten(-1, pixel), nn.ReLU()),
            nn.Linear(PIXEL_FEATURES, LEVELS),
        )
        self.prior = nn.Parameter(torch.zeros(LATENTS, CATEGORIES), requires_grad=learned_prior)

    def posterior(self, x: Levels) -> QLogits:
        """Return the logits of q(z|x)."""
        q: Tensor = self.encoder(2 * x / (LEVELS - 1) - 1)
        return q

    def forward(self, x: Levels, temperature: float = 1.0) -> tuple[Float[Tensor, " n"], Float[Tensor, " n"]]:
        """Return the reconstruction loss, from one sample of z, and the KL of each digit.

        The temperature affects only the gradients, not the values.
        """
        q = self.posterior(x)
        z = nn.functional.gumbel_softmax(q, temperature, hard=True)
        reconstruction = softcurve.cross_entropy(self.decoder(z), x, reduction="none").sum(-1)
        kl = softcurve.kl_divergence(q, self.prior.expand_as(q), reduction="none").sum(-1)
        return reconstruction, kl

    @torch.no_grad()
    def images(self, z: Int[Tensor, "n latents"]) -> Float[Tensor, "n pixels"]:
        """Return the mean grey level of each pixel given z."""
        logits: Tensor = self.decoder(nn.functional.one_hot(z, CATEGORIES).float())
        return logits.softmax(-1) @ torch.arange(float(LEVELS))


def load_split() -> Digits:
    """Hold out one fifth of the digits, independently of the seed."""
    levels, classes = load_digits(return_X_y=True)
    train, held_out, _, of_held_out = train_test_split(
        levels.astype(np.int64), classes, test_size=360, random_state=0, stratify=classes
    )
    examples = held_out[[int((of_held_out == digit).argmax()) for digit in range(10)]]
    return Digits(*map(torch.from_numpy, (train, held_out, examples)))


def train(model: CategoricalVAE, digits: Digits, epochs: int) -> Iterator[Epoch]:
    """Minimise −ELBO with Adam.

    The weight of the KL increases to 1 over the first four fifths of the steps. A weight of 1 from the start makes the
    model ignore the latents.
    """
    steps = epochs * math.ceil(len(digits.train) / BATCH)
    optimizer = torch.optim.Adam(model.parameters(), RATE)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=steps)
    yield measure(model, digits)
    for _ in range(epochs):
        for rows in torch.randperm(len(digits.train)).split(BATCH):
            progress = schedule.last_epoch / steps
            reconstruction, kl = model(digits.train[rows], temperature=0.5**progress)
            optimizer.zero_grad()
            (reconstruction + min(1.0, progress / 0.8) * kl).mean().backward()
            optimizer.step()
            schedule.step()
        yield measure(model, digits)


@torch.no_grad()
def measure(model: CategoricalVAE, digits: Digits, draws: int = 1) -> Epoch:
    """Estimate the terms of the ELBO, with KL weight 1, from ``draws`` samples of z for each digit."""
    parts = digits.train[: len(digits.held_out)], digits.held_out
    return Epoch(*(Terms(*(term.mean().item() for term in model(x.repeat(draws, 1)))) for x in parts))


def independent_pixels(digits: Digits) -> float:
    """Return −log p of a baseline without latents, a smoothed histogram of each pixel, in nats per held-out digit."""
    counts = nn.functional.one_hot(digits.train, LEVELS).sum(0) + 0.1
    logits = counts.log().expand(len(digits.held_out), -1, -1)
    return PIXELS * softcurve.cross_entropy(logits, digits.held_out).item()


# --- which distribution the KL moves ---------------------------------------------------------------------------------


def divergence(q: QLogits, prior: PriorLogits) -> Tensor:
    """Return ``Σ KL(q‖prior)`` over digits and latents."""
    return softcurve.kl_divergence(q, prior.expand_as(q), reduction="sum")


def cross_entropy(q: QLogits, prior: PriorLogits) -> Tensor:
    """Return ``Σ H(q, prior)``, which is the KL plus ``H(q)``."""
    return softcurve.cross_entropy(prior.expand_as(q), softcurve.Logits(q), reduction="sum")


def backward(loss: Callable[[Tensor, Tensor], Tensor], q: QLogits, prior: PriorLogits, *, learned: bool) -> Gradients:
    """Return the gradients with respect to q and the prior; the latter is None for a fixed prior."""
    q, prior = q.detach().requires_grad_(), prior.detach().requires_grad_(learned)
    loss(q, prior).backward()
    assert q.grad is not None
    return q.grad, prior.grad


def compare(q: QLogits, prior: PriorLogits) -> tuple[dict[str, Gradients], dict[str, float]]:
    """Return the gradients of KL and of H(q, prior), and the largest deviations from the identities they satisfy."""
    found = {
        "kl_prior_fixed": backward(divergence, q, prior, learned=False),
        "kl_prior_learned": backward(divergence, q, prior, learned=True),
        "cross_entropy_prior_learned": backward(cross_entropy, q, prior, learned=True),
    }
    (fixed, _), (learned, in_prior), (crossed, crossed_in_prior) = found.values()
    of_entropy, _ = backward(lambda q, _: softcurve.entropy(q).sum(), q, prior, learned=False)
    assert in_prior is not None
    assert crossed_in_prior is not None
    first, second = q.softmax(-1), prior.softmax(-1).expand_as(q)
    pairs = {
        "kl_in_q": (fixed, reference.kl_gradient_in_first_logits(first, second)),
        "kl_in_prior": (in_prior, reference.kl_gradient_in_second_logits(first, second).sum(0)),
        "kl_and_cross_entropy_in_prior": (in_prior, crossed_in_prior),
        "kl_and_cross_entropy_less_entropy_in_q": (learned, crossed - of_entropy),
    }
    return found, {name: (a - b).abs().max().item() for name, (a, b) in pairs.items()}


def descend(q: QLogits, prior: PriorLogits, *, learned: bool) -> Descent:
    """Minimise the KL alone with Adam on the logits, without an encoder.

    Return, for each step, the KL in nats per digit and the mean total variation distance of q and of the prior from
    their starting points.
    """
    q, prior = q.clone().requires_grad_(), prior.clone().requires_grad_(learned)
    starts = [logits.detach().softmax(-1) for logits in (q, prior)]
    optimizer = torch.optim.Adam([q, prior], DESCENT_RATE)
    path: Descent = {"kl": [], "q_moved": [], "prior_moved": []}
    for _ in range(DESCENT_STEPS + 1):
        kl = divergence(q, prior)
        path["kl"].append(kl.item() / len(q))
        for moved, logits, start in zip((path["q_moved"], path["prior_moved"]), (q, prior), starts, strict=True):
            moved.append((logits.detach().softmax(-1) - start).abs().sum(-1).mean().item() / 2)
        optimizer.zero_grad()
        kl.backward()
        optimizer.step()
    return path


# --- the picture -----------------------------------------------------------------------------------------------------


def curves(axes: Axes, history: Sequence[Epoch], term: Callable[[Terms], float], title: str) -> None:
    """Plot one term of the ELBO over the epochs, for the training and the held-out digits."""
    axes.plot([term(epoch.train) for epoch in history], color=MUTED, linestyle="--", label="training digits")
    axes.plot([term(epoch.held_out) for epoch in history], color=Q_COLOUR, label="held-out digits")
    axes.set_title(title, loc="left")
    axes.set_xlabel("epoch")
    axes.set_ylabel("nats per digit")
    axes.legend(frameon=False)


def movement(axes: Axes, path: Descent, title: str) -> None:
    """Plot how far q and the prior move while the KL alone is minimised."""
    axes.plot(path["q_moved"], color=Q_COLOUR, label="q(z|x)")
    axes.plot(path["prior_moved"], color=PRIOR_COLOUR, label="prior")
    axes.set_title(f"{title}: KL {path['kl'][0]:.1f} → {path['kl'][-1]:.3f} nats per digit", loc="left")
    axes.set_xlabel("step of minimising KL(q‖prior) alone")
    axes.set_ylabel("total variation from the start")
    axes.legend(frameon=False, loc="center right")
    axes.label_outer()


def mosaic(axes: Axes, rows: Sequence[Tensor], names: Sequence[str], title: str) -> None:
    """Show rows of digits, black on white, each with a border of one white pixel."""
    pixels = nn.functional.pad(torch.stack(list(rows)).unflatten(-1, (SIDE, SIDE)), (1, 1, 1, 1))
    axes.imshow(pixels.transpose(1, 2).flatten(0, 1).flatten(1).numpy(), cmap="gray_r", vmin=0, vmax=LEVELS - 1)
    axes.set_yticks([(SIDE + 2) * (row + 0.5) - 0.5 for row in range(len(rows))], names)
    axes.set_xticks([])
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    axes.set_title(title, loc="left")


def draw(
    model: CategoricalVAE, digits: Digits, history: Sequence[Epoch], baseline: float, paths: dict[str, Descent]
) -> Figure:
    """Draw the training curves at the top, the effect of the KL in the middle, and digits at the bottom."""
    figure = Figure(figsize=(11, 8.2), layout="constrained")
    FigureCanvasAgg(figure)
    above, middle, below = figure.subfigures(3, 1, height_ratios=(1, 0.9, 0.42), squeeze=False).flat
    whole, reconstruction, kl = above.subplots(1, 3)
    whole.axhline(baseline, color=PRIOR_COLOUR, linewidth=0.8, label="histogram of each pixel")
    curves(whole, history, lambda terms: -terms.elbo(), "−ELBO")
    curves(reconstruction, history, lambda terms: terms.reconstruction, "reconstruction (cross-entropy)")
    curves(kl, history, lambda terms: terms.kl, "KL(q‖prior)")
    units = (lambda nats: np.divide(nats, BIT_PER_PIXEL), lambda bits: np.multiply(bits, BIT_PER_PIXEL))
    whole.secondary_yaxis("right", functions=units).set_ylabel("bits per pixel")
    for axes, (name, path) in zip(middle.subplots(1, 2, sharey=True), paths.items(), strict=True):
        movement(axes, path, f"prior {name}")
    with torch.no_grad():
        modes = model.posterior(digits.examples).argmax(-1)
        drawn = torch.distributions.Categorical(logits=model.prior).sample((20,))
    left, right = below.subplots(1, 2)
    mosaic(left, (digits.examples, model.images(modes)), ("x", "E[x|z]"), "held-out digits; z is the mode of q(z|x)")
    mosaic(right, model.images(drawn).split(10), ("E[x|z]", ""), "samples; z is drawn from the prior")
    return figure


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
    """Parse and check the command line before any computation."""
    parser = argparse.ArgumentParser(description="Train a VAE with categorical latents on digits.")
    parser.add_argument("--epochs", type=int, default=80, help="passes over the 1437 training digits (80)")
    parser.add_argument("--seed", type=int, default=0, help="random seed for weights, batches and samples (0)")
    parser.add_argument("--learned-prior", action="store_true", help="also train the prior, which starts uniform")
    parser.add_argument("--out", type=Path, default=Path("build/categorical_vae.png"), help="output file")
    chosen = parser.parse_args()
    if chosen.epochs < 1:
        parser.error(f"argument --epochs: must be at least 1, got {chosen.epochs}")
    if not 0 <= chosen.seed < 2**63:
        parser.error(f"argument --seed: must be at least 0 and below 2^63, got {chosen.seed}")
    if chosen.out.is_dir():
        parser.error(f"argument --out: {chosen.out} is a folder; give the name of a file in it")
    try:
        chosen.out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser.error(f"argument --out: the folder {chosen.out.parent} cannot be made ({error.strerror}); give another")
    return chosen


def show_training(epochs: Iterator[Epoch], total: int) -> list[Epoch]:
    """Train the model and print about ten epochs."""
    print("           training digits, nats per digit        held-out digits")
    print("epoch   reconstruction      KL    −ELBO    nats per digit   bits per pixel")
    history = []
    for number, epoch in enumerate(epochs):
        history.append(epoch)
        if number % max(1, total // 10) == 0 or number == total:
            seen, unseen = epoch.train, epoch.held_out.record()
            print(f"{number:5d}   {seen.reconstruction:14.2f}  {seen.kl:6.2f}  {-seen.elbo():7.2f}", end="   ")
            print(f"{-unseen['elbo']:15.2f}  {unseen['bits_per_pixel']:15.3f}", flush=True)
    return history


def show_gradients(norms: Iterable[Sequence[float | None]], deviations: Iterable[float]) -> None:
    """Print the gradient norms of each loss and the deviations of autograd from the formulas."""
    print(f"\n{'Gradient norm with respect to logits of':40s}{'q':>10s}{'the prior':>14s}")
    for name, pair in zip(LOSSES, norms, strict=True):
        of_q, of_prior = ("None" if norm is None else f"{norm:.5f}" for norm in pair)
        print(f"{name:40s}{of_q:>10s}{of_prior:>14s}")
    print(f"\n{'Autograd against formulas, float64':40s}{'deviation':>10s}")
    for formula, deviation in zip(FORMULAS, deviations, strict=True):
        print(f"{formula:40s}{deviation:10.1e}")


def main() -> None:
    """Train the model, check the gradients of the KL, and write the figure and the report."""
    chosen = arguments()
    torch.set_num_threads(1)  # the tensors are too small for a second thread to pay off
    torch.manual_seed(chosen.seed)
    digits, model = load_split(), CategoricalVAE(learned_prior=chosen.learned_prior)
    start = time.perf_counter()
    history = show_training(train(model, digits, chosen.epochs), chosen.epochs)
    final, baseline = measure(model, digits, draws=10), independent_pixels(digits)
    record = final.held_out.record()
    print(f"\nHeld-out bits per pixel: {record['bits_per_pixel']:.3f} with 10 samples per digit", end="; ")
    print(f"histogram of each pixel {baseline / BIT_PER_PIXEL:.3f}; uniform levels {math.log2(LEVELS):.3f}")

    with torch.no_grad():
        q, prior = model.posterior(digits.held_out).double(), model.prior.double()
    found, deviations = compare(q, prior)
    norms = {name: [None if g is None else g.norm().item() for g in pair] for name, pair in found.items()}
    show_gradients(norms.values(), deviations.values())
    received = model.prior.grad is not None
    print(f"\nDuring training, the prior received {'a gradient' if received else 'no gradient'}.")
    paths = {name: descend(q, prior, learned=name == "learned") for name in ("fixed", "learned")}
    for name, path in paths.items():
        print(f"KL alone, prior {name}: {path['kl'][0]:.3f} → {path['kl'][-1]:.3f} nats per digit;", end=" ")
        print(f"q moves by {path['q_moved'][-1]:.3f}, the prior by {path['prior_moved'][-1]:.3f} (total variation)")
    save(draw(model, digits, history, baseline, paths), chosen.out)
    print(f"\nThe picture is at {chosen.out}")
    report = {
        **vars(chosen),
        "out": str(chosen.out),
        "seconds": round(time.perf_counter() - start, 2),
        "untrained": history[0].held_out.record(),
        "train": final.train.record(),
        "held_out": record,
        "independent_pixels_bits_per_pixel": baseline / BIT_PER_PIXEL,
        "prior_received_gradient_in_training": received,
        "gradient_norms": {name: dict(zip(("q", "prior"), pair, strict=True)) for name, pair in norms.items()},
        "deviations": deviations,
        "descent": {name: {k: values[::DESCENT_STEPS] for k, values in path.items()} for name, path in paths.items()},
    }
    print(json.dumps(report, allow_nan=False))


if __name__ == "__main__":
    main()
