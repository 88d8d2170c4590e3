"""Forward against reverse KL: one Gaussian fitted to a target of two modes, and the infinity where Q = 0 < P."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
from matplotlib.figure import Figure
from scipy.optimize import minimize
from torch import Tensor

import softcurve
from softcurve.array_types import Float
from softcurve.cli.page.picture import FIRST, MUTED, SECOND, line_chart, picture
from softcurve.cli.page.section import Check, Section

GRID = torch.linspace(-6, 6, 80, dtype=torch.float64)
MODES = ((0.6, -2.5, 0.6), (0.4, 2.5, 0.8))  # weight, mean, standard deviation
MIDDLE = 0.0  # a point between the modes
STARTS = [(mean, log_width) for mean in (-3.0, 0.0, 3.0) for log_width in (0.0, 1.0)]


def explain_directions() -> Section:
    """Fit a discretised Gaussian to a mixture of two in both directions, from several starts."""
    densities = [math.log(w / s) - (GRID - m).square() / (2 * s * s) for w, m, s in MODES]
    target = torch.stack(densities).logsumexp(0).log_softmax(-1)
    forward_minima = _minima(lambda q: softcurve.kl_divergence(target, q, reduction="sum"))
    reverse_minima = _minima(lambda q: softcurve.kl_divergence(q, target, reduction="sum"))
    names = ["target", "forward", "reverse", *(f"reverse, minimum {k}" for k in range(2, len(reverse_minima) + 1))]
    logits = [target, forward_minima[0], *reverse_minima]
    fits = {name: _describe(z, target) for name, z in zip(names, logits, strict=True)}
    truth, forward, reverse = (fits[name] for name in names[:3])
    edges = _towards_zero()
    _, at_zero, swapped_at_zero = edges[-1]
    at_mode = abs(reverse["reverse"] + math.log(MODES[0][0]))
    moments = max(abs(forward[name] - truth[name]) for name in ("mean", "deviation"))
    gains = reverse["forward"] - forward["forward"], forward["reverse"] - reverse["reverse"]
    alt = "A target of two modes; the forward fit lies wide over both, the reverse fit sits on one"
    return Section(
        "directions",
        "KL has a direction",
        values={
            "picture": picture(alt, _draw, *(z.softmax(-1).tolist() for z in logits[:3])),
            "rows": [(name, *fit.values()) for name, fit in fits.items()],
            "minima": len(reverse_minima),
            "towards_zero": edges,
        },
        figures={
            "fits": fits,
            "half_half_against_one_zero_bits": at_zero,
            "one_zero_against_half_half_bits": swapped_at_zero,
        },
        checks=(
            Check("forward fit: mean and width against those of the target", moments, "≤", 1e-6),
            Check("forward fit covers: probability near the smaller mode", forward["right"], "≥", 0.2),
            Check("reverse fit seeks: probability near the other mode", reverse["right"], "≤", 0.01),
            Check("reverse fit: D(Q‖P) against −log of its mode's weight", at_mode, "≤", 1e-2),
            Check("D(P‖Q): how much lower the forward fit is", gains[0], "≥", 0.1),
            Check("D(Q‖P): how much lower the reverse fit is", gains[1], "≥", 0.1),
            Check("D([½, ½] ‖ [1, 0])", at_zero, "=", math.inf),
            Check("D([1, 0] ‖ [½, ½]) in bits", swapped_at_zero, "=", 1.0),
        ),
    )


def _gaussian(parameters: Float[Tensor, " 2"]) -> Float[Tensor, " bins"]:
    """The logits of a discretised Gaussian, which are quadratic in the bin."""
    mean, log_width = parameters[0], parameters[1]
    return -(GRID - mean).square() * (-2 * log_width).exp() / 2


def _minima(divergence: Callable[[Tensor], Tensor]) -> list[Float[Tensor, " bins"]]:
    """The logits at the distinct minima that the starts lead to, the best first."""

    def value_and_gradient(at: np.ndarray) -> tuple[float, np.ndarray]:
        parameters = torch.from_numpy(at.copy()).requires_grad_()
        value = divergence(_gaussian(parameters))
        (gradient,) = torch.autograd.grad(value, parameters)
        return value.item(), gradient.numpy()

    runs = [minimize(value_and_gradient, start, jac=True, options={"gtol": 1e-9}) for start in STARTS]
    minima: list[np.ndarray] = []
    for run in sorted(runs, key=lambda run: round(float(run.fun), 9)):
        if all(np.abs(run.x - other).max() > 1e-3 for other in minima):
            minima.append(run.x)
    return [_gaussian(torch.from_numpy(at)) for at in minima]


def _describe(logits: Float[Tensor, " bins"], target: Float[Tensor, " bins"]) -> dict[str, float]:
    """The moments of a distribution, its probability on either side of the middle, and both divergences."""
    q = logits.softmax(-1)
    mean = (q * GRID).sum()
    return {
        "mean": mean.item(),
        "deviation": (q * (GRID - mean).square()).sum().sqrt().item(),
        "left": q[GRID < MIDDLE].sum().item(),
        "right": q[GRID >= MIDDLE].sum().item(),
        "forward": softcurve.kl_divergence(target, logits, reduction="sum").item(),
        "reverse": softcurve.kl_divergence(logits, target, reduction="sum").item(),
    }


def _towards_zero() -> list[tuple[float, float, float]]:
    """ε, D(P‖Q) and D(Q‖P) in bits for P = [½, ½] and Q = [1 − ε, ε], down to ε = 0."""
    half = torch.tensor([0.5, 0.5], dtype=torch.float64).log()
    epsilon = torch.tensor([1e-1, 1e-3, 1e-9, 1e-27, 1e-81, 1e-243, 0.0], dtype=torch.float64)
    q = torch.stack([torch.log1p(-epsilon), epsilon.log()], dim=-1)
    half = half.expand_as(q)
    pairs = (softcurve.kl_divergence(*pair, reduction="none", base=2.0).tolist() for pair in ((half, q), (q, half)))
    return list(zip(epsilon.tolist(), *pairs, strict=True))


def _draw(target: list[float], forward: list[float], reverse: list[float]) -> Figure:
    grid = GRID.tolist()
    figure = line_chart(
        (grid, forward, {"color": FIRST, "label": "Q that minimises D(P ‖ Q)"}),
        (grid, reverse, {"color": SECOND, "label": "Q that minimises D(Q ‖ P)"}),
        size=(4.8, 3.0), ylim=(0, None), xlabel="bin", ylabel="probability of the bin",
    )  # fmt: skip
    figure.axes[0].fill_between(grid, target, color=MUTED, alpha=0.35, linewidth=0, label="target P")
    figure.axes[0].set_ylim(bottom=0)
    figure.axes[0].legend()
    return figure
