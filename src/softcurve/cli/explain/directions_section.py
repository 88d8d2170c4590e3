"""Forward against reverse KL: one hump fitted to two, and the infinity where Q = 0 < P."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from matplotlib.figure import Figure
from scipy.optimize import minimize
from torch import Tensor

import softcurve
from softcurve.array_types import Float
from softcurve.cli.explain.section import Check, Section
from softcurve.cli.page.picture import Theme, canvas, picture

GRID = torch.linspace(-6, 6, 80, dtype=torch.float64)
HUMPS = ((0.6, -2.5, 0.6), (0.4, 2.5, 0.8))  # weight, mean, width
VALLEY = 0.0  # the cut between the humps
STARTS = [(mean, log_width) for mean in (-3.0, 0.0, 3.0) for log_width in (0.0, 1.0)]

Divergence = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Fit:
    """A distribution over the bins: its moments, the mass on either side of the valley, both divergences."""

    mean: float
    deviation: float
    left: float
    right: float
    forward: float
    reverse: float
    density: tuple[float, ...]


def explain_directions() -> Section:
    """Fit a discretised Gaussian to a mixture of two in both directions, from several starts."""
    target = _target()
    truth = _describe(target, target)
    forward, *_ = _fits(lambda q: softcurve.kl_divergence(target, q, reduction="sum"), target)
    reverse, *others = _fits(lambda q: softcurve.kl_divergence(q, target, reduction="sum"), target)
    shown = {"target": truth, "forward": forward, "reverse": reverse}
    shown |= {f"reverse, minimum {k}": other for k, other in enumerate(others, start=2)}
    edges = _towards_zero()
    at_zero = edges[-1]
    at_hump = abs(reverse.reverse + math.log(HUMPS[0][0]))
    moments = max(abs(forward.mean - truth.mean), abs(forward.deviation - truth.deviation))
    return Section(
        "directions",
        "KL has a direction",
        figures={
            "fits": {
                name: {key: value for key, value in vars(fit).items() if key != "density"}
                for name, fit in shown.items()
            },
            "half_half_against_one_zero_bits": at_zero["forward"],
            "one_zero_against_half_half_bits": at_zero["reverse"],
        },
        checks=(
            Check("forward fit: mean and width against those of the target", moments, "≤", 1e-6),
            Check("forward fit covers: mass under the smaller hump", forward.right, "≥", 0.2),
            Check("reverse fit seeks: mass under the other hump", reverse.right, "≤", 0.01),
            Check("reverse fit: D(Q‖P) against −log of its hump's weight", at_hump, "≤", 1e-2),
            Check("D(P‖Q): how much lower the forward fit is", reverse.forward - forward.forward, "≥", 0.1),
            Check("D(Q‖P): how much lower the reverse fit is", forward.reverse - reverse.reverse, "≥", 0.1),
            Check("D([½, ½] ‖ [1, 0])", at_zero["forward"], "=", math.inf),
            Check("D([1, 0] ‖ [½, ½]) in bits", at_zero["reverse"], "=", 1.0),
        ),
        pictures={
            "fits": picture(
                lambda theme: _draw(theme, truth, forward, reverse),
                "A target of two humps; the forward fit lies wide over both, the reverse fit sits on one",
            )
        },
        tables={"fits": shown, "towards_zero": edges},
    )


def _target() -> Float[Tensor, " bins"]:
    humps = [math.log(w / s) - (GRID - m).square() / (2 * s * s) for w, m, s in HUMPS]
    return torch.logsumexp(torch.stack(humps), 0).log_softmax(-1)


def _model(parameters: Float[Tensor, " 2"]) -> Float[Tensor, " bins"]:
    """The logits of a discretised Gaussian: quadratic in the bin."""
    mean, log_width = parameters[0], parameters[1]
    return -(GRID - mean).square() * (-2 * log_width).exp() / 2


def _fits(divergence: Divergence, target: Float[Tensor, " bins"]) -> list[Fit]:
    """The different minima that the starts lead to, the best first."""

    def value_and_gradient(at: np.ndarray) -> tuple[float, np.ndarray]:
        parameters = torch.from_numpy(at.copy()).requires_grad_()
        value = divergence(_model(parameters))
        (gradient,) = torch.autograd.grad(value, parameters)
        return value.item(), gradient.numpy()

    runs = [minimize(value_and_gradient, start, jac=True, options={"gtol": 1e-9}) for start in STARTS]
    minima: list[np.ndarray] = []
    for run in sorted(runs, key=lambda run: round(float(run.fun), 9)):
        if all(np.abs(run.x - found).max() > 1e-3 for found in minima):
            minima.append(run.x)
    return [_describe(_model(torch.from_numpy(at)), target) for at in minima]


def _describe(logits: Float[Tensor, " bins"], target: Float[Tensor, " bins"]) -> Fit:
    q = logits.softmax(-1)
    mean = (q * GRID).sum()
    return Fit(
        mean=mean.item(),
        deviation=(q * (GRID - mean).square()).sum().sqrt().item(),
        left=q[GRID < VALLEY].sum().item(),
        right=q[GRID >= VALLEY].sum().item(),
        forward=softcurve.kl_divergence(target, logits, reduction="sum").item(),
        reverse=softcurve.kl_divergence(logits, target, reduction="sum").item(),
        density=tuple(q.tolist()),
    )


def _towards_zero() -> list[dict[str, float]]:
    """D(P‖Q) and D(Q‖P) in bits for P = [½, ½] and Q = [1 − ε, ε], until ε = 0."""
    half = torch.tensor([0.5, 0.5], dtype=torch.float64).log()
    rows = []
    for epsilon in (1e-1, 1e-3, 1e-9, 1e-27, 1e-81, 1e-243, 0.0):
        small = torch.tensor(epsilon, dtype=torch.float64)
        q = torch.stack([torch.log1p(-small), small.log()])
        rows.append(
            {
                "epsilon": epsilon,
                "forward": softcurve.kl_divergence(half, q, reduction="sum", base=2.0).item(),
                "reverse": softcurve.kl_divergence(q, half, reduction="sum", base=2.0).item(),
            }
        )
    return rows


def _draw(theme: Theme, truth: Fit, forward: Fit, reverse: Fit) -> Figure:
    figure, axes = canvas(4.8, 3.0)
    axes.fill_between(GRID, truth.density, color=theme.muted, alpha=0.35, linewidth=0, label="target P")
    axes.plot(GRID, forward.density, color=theme.first, label="Q that minimises D(P ‖ Q)")
    axes.plot(GRID, reverse.density, color=theme.second, label="Q that minimises D(Q ‖ P)")
    axes.set_ylim(bottom=0)
    axes.set_xlabel("bin")
    axes.set_ylabel("probability of the bin")
    axes.legend()
    return figure
