"""A variational autoencoder with categorical latents, both of whose ELBO terms are softcurve's.

The data are scikit-learn's embedded digits: 64 pixels of 17 grey levels. An encoder gives q(z|x), 16 latent variables of 8
categories each; straight-through Gumbel-softmax draws z; a decoder and one linear head give each pixel a softmax over the
levels. So −ELBO = cross_entropy(levels) + Σ KL(q‖prior), the head's chain for one term and a divergence whose *first*
argument is learned for the other. In nats, an upper bound on −log p(x): a drawn z is one-hot, as the prior's are.

The note's remark on a VAE is then put to autograd. With a fixed prior, KL(q‖prior) gives a gradient to q alone and q moves
to the prior. With a learned prior both receive one and they meet. And H(q, prior) = KL(q‖prior) + H(q) has the same gradient
in the prior but another in q, because H(q) is no constant when q is learned: under a uniform prior it has none at all.

    python examples/categorical_vae.py [--epochs 100] [--seed 0] [--learned-prior] [--out build/categorical_vae.png]

Prints tables for people, then one line of JSON; draws the curves, reconstructions and samples into the picture.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

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
LATENTS, CATEGORIES = 16, 8
HIDDEN, PIXEL_FEATURES = 256, 16
BATCH, RATE = 128, 5e-3
DESCENT_STEPS = 200
Q_COLOUR, PRIOR_COLOUR, MUTED = "#1f62c4", "#c2500c", "#59636e"

Levels = Int[Tensor, "n pixels"]
QLogits = Float[Tensor, "n latents categories"]
PriorLogits = Float[Tensor, "latents categories"]


@dataclass(frozen=True)
class Digits:
    """Grey levels 0…16, split once and for all; ``examples`` is one held-out digit of each class."""

    train: Levels
    held_out: Levels
    examples: Levels


@dataclass(frozen=True)
class Terms:
    """The two terms of −ELBO, in nats per digit."""

    reconstruction: float
    kl: float

    @property
    def elbo(self) -> float:
        """In nats per digit, ≤ 0."""
        return -(self.reconstruction + self.kl)

    @property
    def bits_per_pixel(self) -> float:
        """−ELBO in the unit of a compressor."""
        return bits_per_pixel(-self.elbo)


@dataclass(frozen=True)
class Epoch:
    """What the model is worth on either part of the data; the first is the untrained model's."""

    train: Terms
    held_out: Terms


@dataclass(frozen=True)
class Gradients:
    """What one backward pass leaves in the logits of q and of the prior."""

    in_q: QLogits
    in_prior: PriorLogits | None


@dataclass(frozen=True)
class Descent:
    """KL in nats per digit, and how far q and the prior are from where they were, step by step, in total variation."""

    kl: list[float]
    q_moved: list[float]
    prior_moved: list[float]


# --- the model -------------------------------------------------------------------------------------------------------


class CategoricalVAE(nn.Module):
    """q(z|x), a prior by logits, and p(x|z): features of each pixel, then a linear head that all pixels share."""

    def __init__(self, *, learned_prior: bool) -> None:
        super().__init__()
        self.encoder = nn.Sequential(
            nn.Linear(PIXELS, HIDDEN),
            nn.ReLU(),
            nn.Linear(HIDDEN, LATENTS * CATEGORIES),
            nn.Unflatten(-1, (LATENTS, CATEGORIES)),
        )
        self.features = nn.Sequential(
            nn.Flatten(-2),
            nn.Linear(LATENTS * CATEGORIES, HIDDEN),
            nn.ReLU(),
            nn.Linear(HIDDEN, PIXELS * PIXEL_FEATURES),
            nn.Unflatten(-1, (PIXELS, PIXEL_FEATURES)),
            nn.ReLU(),
        )
        self.head = nn.Linear(PIXEL_FEATURES, LEVELS)
        self.prior = nn.Parameter(torch.zeros(LATENTS, CATEGORIES), requires_grad=learned_prior)

    def posterior(self, x: Levels) -> QLogits:
        """The logits of q(z|x)."""
        return self.encoder(x / (LEVELS // 2) - 1)

    def decode(self, z: Float[Tensor, "n latents categories"]) -> Float[Tensor, "n pixels levels"]:
        """The logits of p(x|z)."""
        return self.head(self.features(z))

    def forward(self, x: Levels, temperature: float = 1.0) -> tuple[Float[Tensor, " n"], Float[Tensor, " n"]]:
        """Reconstruction, by one draw of z, and KL of each digit; the temperature shapes gradients, not values."""
        q = self.posterior(x)
        z = nn.functional.gumbel_softmax(q, temperature, hard=True)
        reconstruction = softcurve.cross_entropy(self.decode(z), x, reduction="none").sum(-1)
        kl = softcurve.kl_divergence(q, self.prior.expand_as(q), reduction="none").sum(-1)
        return reconstruction, kl


def load_split() -> Digits:
    """One fifth is held out, the same whatever the seed."""
    data = load_digits()
    train, held_out, _, classes = train_test_split(
        torch.from_numpy(data.data).long().numpy(), data.target, test_size=360, random_state=0, stratify=data.target
    )
    examples = [int((classes == digit).argmax()) for digit in range(10)]
    return Digits(torch.from_numpy(train), torch.from_numpy(held_out), torch.from_numpy(held_out[examples]))


def train(model: CategoricalVAE, digits: Digits, epochs: int) -> Iterator[Epoch]:
    """Adam on −ELBO. The KL's weight grows to 1 over the first half, or the latents would be given up at the start."""
    steps = epochs * math.ceil(len(digits.train) / BATCH)
    optimizer = torch.optim.Adam(model.parameters(), RATE)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=steps)
    yield measure(model, digits)
    for _ in range(epochs):
        for rows in torch.randperm(len(digits.train)).split(BATCH):
            progress = schedule.last_epoch / steps
            reconstruction, kl = model(digits.train[rows], temperature=0.5**progress)
            optimizer.zero_grad()
            (reconstruction + min(1.0, 2 * progress) * kl).mean().backward()
            optimizer.step()
            schedule.step()
        yield measure(model, digits)


@torch.no_grad()
def measure(model: CategoricalVAE, digits: Digits, draws: int = 1) -> Epoch:
    """The terms of the ELBO, KL weighted by 1, with ``draws`` of z for each digit."""

    def terms(x: Levels) -> Terms:
        reconstruction, kl = model(x.repeat(draws, 1))
        return Terms(reconstruction.mean().item(), kl.mean().item())

    return Epoch(terms(digits.train), terms(digits.held_out))


def bits_per_pixel(nats_per_digit: float) -> float:
    """Nats per digit as bits per pixel."""
    return nats_per_digit / (PIXELS * math.log(2))


def independent_pixels(digits: Digits) -> float:
    """Held-out bits per pixel of the smoothed histogram of each pixel: what a model without latents can reach."""
    counts = nn.functional.one_hot(digits.train, LEVELS).sum(0) + 0.1
    logits = counts.log().expand(len(digits.held_out), -1, -1)
    return softcurve.cross_entropy(logits, digits.held_out, base=2).item()


# --- which distribution the KL moves ---------------------------------------------------------------------------------


def divergence(q: QLogits, prior: PriorLogits) -> Tensor:
    """``Σ KL(q‖prior)`` over digits and latents."""
    return softcurve.kl_divergence(q, prior.expand_as(q), reduction="sum")


def cross_entropy(q: QLogits, prior: PriorLogits) -> Tensor:
    """``Σ H(q, prior)``: the same without ``−H(q)``."""
    return softcurve.cross_entropy(prior.expand_as(q), softcurve.Logits(q), reduction="sum")


def gradients(loss: Callable[[Tensor, Tensor], Tensor], q: QLogits, prior: PriorLogits, *, learned: bool) -> Gradients:
    """Run autograd; the gradient of a fixed prior is None."""
    q, prior = q.detach().requires_grad_(), prior.detach().requires_grad_(learned)
    loss(q, prior).backward()
    assert q.grad is not None
    return Gradients(q.grad, prior.grad)


def descend(q: QLogits, prior: PriorLogits, *, learned: bool) -> Descent:
    """Follow the gradient of KL alone, without an encoder: Adam on the logits themselves."""
    q, prior = q.clone().requires_grad_(), prior.clone().requires_grad_(learned)
    starts = q.detach().softmax(-1), prior.detach().softmax(-1)
    optimizer = torch.optim.Adam([q, prior], lr=0.1)
    path = Descent([], [], [])
    for _ in range(DESCENT_STEPS):
        kl = divergence(q, prior)
        path.kl.append(kl.item() / len(q))
        for moved, now, start in zip((path.q_moved, path.prior_moved), (q, prior), starts, strict=True):
            moved.append((now.detach().softmax(-1) - start).abs().sum(-1).mean().item() / 2)
        optimizer.zero_grad()
        kl.backward()
        optimizer.step()
    return path


def deviation(a: Tensor, b: Tensor) -> float:
    """The largest difference of two elements."""
    return (a - b).abs().max().item()


def compare(q: QLogits, prior: PriorLogits) -> dict[str, float | None]:
    """The gradients' norms, and how far autograd is from the closed forms."""
    fixed = gradients(divergence, q, prior, learned=False)
    learned = gradients(divergence, q, prior, learned=True)
    crossed = gradients(cross_entropy, q, prior, learned=True)
    of_entropy = gradients(lambda q, _: softcurve.entropy(q).sum(), q, prior, learned=False)
    assert learned.in_prior is not None
    assert crossed.in_prior is not None
    first, second = q.softmax(-1), prior.softmax(-1).expand_as(q)
    in_prior = reference.kl_gradient_in_second_logits(first, second).sum(0)
    return {
        "fixed_in_q": fixed.in_q.norm().item(),
        "fixed_in_prior": None if fixed.in_prior is None else fixed.in_prior.norm().item(),
        "learned_in_q": learned.in_q.norm().item(),
        "learned_in_prior": learned.in_prior.norm().item(),
        "cross_entropy_in_q": crossed.in_q.norm().item(),
        "cross_entropy_in_prior": crossed.in_prior.norm().item(),
        "closed_form_in_q": deviation(fixed.in_q, reference.kl_gradient_in_first_logits(first, second)),
        "closed_form_in_prior": deviation(learned.in_prior, in_prior),
        "kl_less_cross_entropy_in_q": (learned.in_q - crossed.in_q).norm().item(),
        "kl_less_cross_entropy_in_prior": deviation(learned.in_prior, crossed.in_prior),
        "kl_less_cross_entropy_plus_entropy_in_q": deviation(learned.in_q, crossed.in_q - of_entropy.in_q),
    }


# --- the picture -----------------------------------------------------------------------------------------------------


@torch.no_grad()
def images(model: CategoricalVAE, z: Int[Tensor, "n latents"]) -> Float[Tensor, "n pixels"]:
    """The mean grey level of each pixel given z."""
    one_hot = nn.functional.one_hot(z, CATEGORIES).float()
    return model.decode(one_hot).softmax(-1) @ torch.arange(float(LEVELS))


def mosaic(axes: Axes, rows: Sequence[Tensor], names: Sequence[str], title: str) -> None:
    """Digits side by side, black on white, with a gap of half a pixel's white around each."""
    pixels = torch.cat(list(rows)).reshape(len(rows), -1, SIDE, SIDE)
    framed = nn.functional.pad(pixels, (1, 1, 1, 1))
    tiled = framed.permute(0, 2, 1, 3).reshape(len(rows) * (SIDE + 2), -1)
    axes.imshow(tiled.numpy(), cmap="gray_r", vmin=0, vmax=LEVELS - 1)
    axes.set_yticks([(SIDE + 2) * (row + 0.5) - 0.5 for row in range(len(rows))], names)
    axes.set_xticks([])
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    axes.set_title(title, loc="left")


def curves(axes: Axes, history: Sequence[Epoch], term: Callable[[Terms], float], title: str) -> None:
    """One term of the ELBO over the epochs, on both parts of the data."""
    epochs = range(len(history))
    axes.plot(epochs, [term(epoch.train) for epoch in history], color=MUTED, linestyle="--", label="train")
    axes.plot(epochs, [term(epoch.held_out) for epoch in history], color=Q_COLOUR, label="held out")
    axes.set_title(title, loc="left")
    axes.set_xlabel("epoch")
    axes.set_ylabel("nats per digit")
    axes.legend(frameon=False)


def movement(axes: Axes, path: Descent, title: str) -> None:
    """How far q and the prior move while KL alone is descended."""
    axes.plot(path.q_moved, color=Q_COLOUR, label="q(z|x) has moved")
    axes.plot(path.prior_moved, color=PRIOR_COLOUR, label="the prior has moved")
    axes.set_title(f"{title}: KL {path.kl[0]:.1f} → {path.kl[-1]:.2g} nats per digit", loc="left")
    axes.set_xlabel("step of descent on KL(q‖prior) alone")
    axes.set_ylabel("total variation")
    axes.set_ylim(-0.03, 1)
    axes.legend(frameon=False)


def draw(
    model: CategoricalVAE, digits: Digits, history: Sequence[Epoch], fixed: Descent, learned: Descent
) -> Figure:
    """Training above, what KL moves in the middle, digits below."""
    figure = Figure(figsize=(11, 11.5), layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.add_gridspec(3, 6, height_ratios=(1, 1, 1.1))
    whole, reconstruction, kl = (figure.add_subplot(grid[0, 2 * i : 2 * i + 2]) for i in range(3))
    curves(whole, history, lambda terms: -terms.elbo, "−ELBO")
    curves(reconstruction, history, lambda terms: terms.reconstruction, "reconstruction: cross-entropy")
    curves(kl, history, lambda terms: terms.kl, "KL(q‖prior)")
    bits = whole.secondary_yaxis("right", functions=(bits_per_pixel, lambda b: b * PIXELS * math.log(2)))
    bits.set_ylabel("bits per pixel")
    movement(figure.add_subplot(grid[1, :3]), fixed, "prior fixed")
    movement(figure.add_subplot(grid[1, 3:]), learned, "prior learned")
    with torch.no_grad():
        z = model.posterior(digits.examples).argmax(-1)
        drawn = torch.distributions.Categorical(logits=model.prior).sample((20,))
    rebuilt, samples = images(model, z), images(model, drawn)
    mosaic(
        figure.add_subplot(grid[2, :3]),
        (digits.examples, rebuilt),
        ("x", "mean\nof p(x|z)"),
        "held-out digits, and from the mode of q(z|x)",
    )
    mosaic(figure.add_subplot(grid[2, 3:]), samples.split(10), ("", ""), "from draws of the prior: mean of p(x|z)")
    return figure


def save(figure: Figure, out: Path) -> None:
    """Write beside the place and rename, so that a picture is whole or not there."""
    part = out.with_name(f".{out.name}.{os.getpid()}.part")
    try:
        figure.savefig(part, format="png", dpi=110)
        part.replace(out)
    finally:
        part.unlink(missing_ok=True)


# --- the command line ------------------------------------------------------------------------------------------------


def arguments() -> argparse.Namespace:
    """Parse the command line; what cannot work is said before any work is done."""
    parser = argparse.ArgumentParser(description="Train a VAE with categorical latents on digits.")
    parser.add_argument("--epochs", type=int, default=100, help="passes over the 1437 training digits (100)")
    parser.add_argument("--seed", type=int, default=0, help="of initial weights, batches and draws (0)")
    parser.add_argument("--learned-prior", action="store_true", help="train the prior too, from uniform")
    parser.add_argument("--out", type=Path, default=Path("build/categorical_vae.png"), help="the picture")
    chosen = parser.parse_args()
    if chosen.epochs < 1:
        parser.error(f"argument --epochs: must be at least 1, got {chosen.epochs}")
    if not 0 <= chosen.seed < 2**63:
        parser.error(f"argument --seed: must be in 0 … 2^63 − 1, got {chosen.seed}")
    if chosen.out.is_dir():
        parser.error(f"argument --out: {chosen.out} is a folder; give the name of a file in it")
    try:
        chosen.out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser.error(f"argument --out: no folder {chosen.out.parent} can be made ({error.strerror}); give another path")
    return chosen


def follow(epochs: Iterator[Epoch], total: int) -> list[Epoch]:
    """Train to the end and print about ten epochs."""
    print("epoch   reconstruction      KL    −ELBO   held-out −ELBO         held-out")
    print("        nats per digit                                    bits per pixel")
    history = []
    for number, epoch in enumerate(epochs):
        history.append(epoch)
        if number % max(1, total // 10) == 0 or number == total:
            train = epoch.train
            print(
                f"{number:5d}   {train.reconstruction:14.2f}  {train.kl:6.2f}  {-train.elbo:7.2f}"
                f"   {-epoch.held_out.elbo:14.2f}   {epoch.held_out.bits_per_pixel:14.3f}",
                flush=True,
            )
    return history


def show_gradients(found: dict[str, float | None]) -> None:
    """Say who receives a gradient from which loss."""

    def row(name: str, key: str) -> str:
        in_q, in_prior = found[f"{key}_in_q"], found[f"{key}_in_prior"]
        return f"{name:28s}  {in_q:14.6f}  {'None' if in_prior is None else f'{in_prior:.6f}':>18s}"

    print("\nNorm of the gradient in the logits   of q           of the prior")
    print(row("KL(q‖prior), prior fixed", "fixed"))
    print(row("KL(q‖prior), prior learned", "learned"))
    print(row("H(q, prior), prior learned", "cross_entropy"))
    print("\nLargest deviation, float64")
    print(f"∂KL/∂q      from q ⊙ (log(q⊘prior) − KL)   {found['closed_form_in_q']:.1e}")
    print(f"∂KL/∂prior  from Σ (prior − q)             {found['closed_form_in_prior']:.1e}")
    print(f"∂KL/∂prior  from ∂H(q, prior)/∂prior       {found['kl_less_cross_entropy_in_prior']:.1e}")
    print(f"∂KL/∂q      from ∂H(q, prior)/∂q − ∂H(q)/∂q {found['kl_less_cross_entropy_plus_entropy_in_q']:.1e}")


def show_descent(name: str, path: Descent) -> dict[str, float]:
    """Say where descending KL alone has led."""
    print(
        f"{name}: KL {path.kl[0]:.2f} → {path.kl[-1]:.2g} nats per digit; "
        f"q has moved by {path.q_moved[-1]:.3f}, the prior by {path.prior_moved[-1]:.3f}"
    )
    return {
        "kl_start": path.kl[0],
        "kl_end": path.kl[-1],
        "q_moved": path.q_moved[-1],
        "prior_moved": path.prior_moved[-1],
    }


def record(terms: Terms) -> dict[str, float]:
    """The terms with what follows from them."""
    return {**asdict(terms), "elbo": terms.elbo, "bits_per_pixel": terms.bits_per_pixel}


def main() -> None:
    """Train, put the note's remark to autograd, draw, report."""
    chosen = arguments()
    torch.set_num_threads(1)  # the tensors are small: a second thread would wait more than it works
    torch.manual_seed(chosen.seed)
    digits = load_split()
    model = CategoricalVAE(learned_prior=chosen.learned_prior)
    start = time.perf_counter()
    history = follow(train(model, digits, chosen.epochs), chosen.epochs)
    seconds = time.perf_counter() - start
    final, baseline = measure(model, digits, draws=20), independent_pixels(digits)
    print(f"\nHeld out, 20 draws: {final.held_out.bits_per_pixel:.3f} bits per pixel")
    print(f"Histogram of each pixel: {baseline:.3f}; uniform levels: {math.log2(LEVELS):.3f}; {seconds:.0f} s")

    with torch.no_grad():
        q, prior = model.posterior(digits.held_out).double(), model.prior.double()
    found = compare(q, prior)
    show_gradients(found)
    print(f"\nThe prior's gradient after training: {'None' if model.prior.grad is None else 'there is one'}")
    print("\nDescending KL alone on the logits")
    fixed, learned = descend(q, prior, learned=False), descend(q, prior, learned=True)
    paths = {"fixed": show_descent("prior fixed  ", fixed), "learned": show_descent("prior learned", learned)}
    save(draw(model, digits, history, fixed, learned), chosen.out)
    print(f"\nThe picture is at {chosen.out}")
    print(
        json.dumps(
            {
                "epochs": chosen.epochs,
                "seed": chosen.seed,
                "learned_prior": chosen.learned_prior,
                "seconds": round(seconds, 2),
                "untrained": record(history[0].held_out),
                "train": record(final.train),
                "held_out": record(final.held_out),
                "independent_pixels_bits_per_pixel": baseline,
                "prior_received_gradient_in_training": model.prior.grad is not None,
                "gradients": found,
                "descent": paths,
                "picture": str(chosen.out),
            },
            allow_nan=False,
        )
    )


if __name__ == "__main__":
    main()
