"""KL near its minimum: a paraboloid whose matrix is the Jacobian of softmax."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor

import softcurve
from softcurve.array_types import Float
from softcurve.cli.explain.network import Network
from softcurve.cli.explain.section import Check, Section
from softcurve.cli.page.picture import Theme, canvas, picture, powers

ROWS = 200
SCALES = tuple(10 ** (k / 4) for k in range(-16, 1))
SMALL = 9  # the scales up to 1e-2, where the slope is measured


def explain_minimum(network: Network, seed: int) -> Section:
    """Move the logits of many digits by random δ of shrinking size, and compare KL with ½ δᵀJδ."""
    z = network.logits(network.held_out.x[:ROWS])
    generator = torch.Generator().manual_seed(seed)
    direction = torch.randn(z.shape, generator=generator, dtype=z.dtype)
    curves = [_compare(z, scale * direction) for scale in SCALES]
    forward, backward, model, difference, backward_difference = (list(curve) for curve in zip(*curves, strict=True))
    predicted = _third_order(z, direction)
    errors = [_float32_errors(z, direction, scale) for scale in (1e-4, 1e-3, 1e-2, 1e-1)]
    slope = float(np.polyfit(np.log(SCALES[:SMALL]), np.log(difference[:SMALL]), 1)[0])
    leading = difference[0] / SCALES[0] / predicted - 1
    return Section(
        "minimum",
        "KL near its minimum",
        figures={
            "rows": ROWS,
            "scales": list(SCALES),
            "divergence": forward,
            "swapped_divergence": backward,
            "quadratic_model": model,
            "median_relative_difference": difference,
            "left_of_the_terms": _left_of_the_terms(z, z + SCALES[0] * direction),
            "float32_errors": errors,
            "slope": slope,
            "median_third_order_coefficient": predicted,
        },
        checks=(
            Check("smallest KL of any step", min(forward), "≥", 0.0),
            Check(
                "relative difference of KL and ½ δᵀJδ: slope against the scale, from 1",
                abs(slope - 1),
                "≤",
                0.02,
            ),
            Check("its size at the smallest scale against the third cumulant", abs(leading), "≤", 1e-2),
            Check(
                "KL in float32: median relative error at any scale",
                max(row["softcurve"] for row in errors),
                "≤",
                1e-6,
            ),
        ),
        pictures={
            "curves": picture(
                lambda theme: _curves(theme, forward, backward, model),
                "KL in both directions and the quadratic model, on log scales: lines that part only near 1",
            ),
            "difference": picture(
                lambda theme: _differences(theme, difference, backward_difference, predicted),
                "The relative differences on log scales: straight lines of slope one",
            ),
        },
    )


def _compare(z: Float[Tensor, "n c"], delta: Float[Tensor, "n c"]) -> tuple[float, float, float, float, float]:
    """Mean KL either way, the mean model, and the median relative difference of each KL from the model."""
    forward = softcurve.kl_divergence(z, z + delta, reduction="none")
    backward = softcurve.kl_divergence(z + delta, z, reduction="none")
    model = (delta * softcurve.softmax_jacobian_product(z, delta)).sum(-1) / 2
    relative = [((way - model) / model).abs().median().item() for way in (forward, backward)]
    return forward.mean().item(), backward.mean().item(), model.mean().item(), relative[0], relative[1]


def _left_of_the_terms(z: Float[Tensor, "n c"], moved: Float[Tensor, "n c"]) -> float:
    """KL against the sum of the sizes of the terms p log(p/q) that it is made of, median over the rows."""
    p, log_ratio = z.softmax(-1), z.log_softmax(-1) - moved.log_softmax(-1)
    divergence = softcurve.kl_divergence(z, moved, reduction="none")
    return (divergence / (p * log_ratio).abs().sum(-1)).median().item()


def _float32_errors(z: Float[Tensor, "n c"], direction: Float[Tensor, "n c"], scale: float) -> dict[str, float]:
    """Median relative errors of two float32 sums; the truth is the same in float64, of the rounded logits."""
    at, moved = z.float(), (z + scale * direction).float()
    truth = softcurve.kl_divergence(at.double(), moved.double(), reduction="none")
    log_p, log_q = at.log_softmax(-1), moved.log_softmax(-1)
    sums = {
        "textbook": (log_p.exp() * (log_p - log_q)).sum(-1),
        "softcurve": softcurve.kl_divergence(at, moved, reduction="none"),
    }
    return {"scale": scale} | {name: ((value - truth) / truth).abs().median().item() for name, value in sums.items()}


def _third_order(z: Float[Tensor, "n c"], direction: Float[Tensor, "n c"]) -> float:
    """What the relative difference starts with, divided by the scale: the median of |κ₃| / 3κ₂.

    κ₂ and κ₃ are the variance and the third central moment of δ under p: KL(p(z)‖p(z+δ)) = κ₂/2 + κ₃/6 + ….
    """
    p = z.softmax(-1)
    centred = direction - (p * direction).sum(-1, keepdim=True)
    second, third = (p * centred.square()).sum(-1), (p * centred.pow(3)).sum(-1)
    return (third / (3 * second)).abs().median().item()


def _curves(theme: Theme, forward: Sequence[float], backward: Sequence[float], model: Sequence[float]) -> Figure:
    figure, axes = canvas(4.4, 3.0)
    axes.loglog(SCALES, model, color=theme.third, linewidth=5, alpha=0.4, label="½ δᵀJδ")
    axes.loglog(SCALES, forward, color=theme.first, label="D(p(z) ‖ p(z+δ))")
    axes.loglog(SCALES, backward, color=theme.second, linestyle="--", label="D(p(z+δ) ‖ p(z))")
    axes.set_xlabel("scale of δ")
    axes.set_ylabel("nats, mean over digits")
    powers(axes.xaxis)
    powers(axes.yaxis)
    axes.legend()
    return figure


def _differences(theme: Theme, forward: Sequence[float], backward: Sequence[float], predicted: float) -> Figure:
    figure, axes = canvas(4.4, 3.0)
    line = [predicted * scale for scale in SCALES]
    axes.loglog(SCALES, line, color=theme.third, linewidth=5, alpha=0.4, label="scale × |κ₃| / 3κ₂")
    axes.loglog(SCALES, forward, color=theme.first, label="D(p(z) ‖ p(z+δ))")
    axes.loglog(SCALES, backward, color=theme.second, linestyle="--", label="D(p(z+δ) ‖ p(z))")
    axes.set_xlabel("scale of δ")
    axes.set_ylabel("relative difference, median")
    powers(axes.xaxis)
    powers(axes.yaxis)
    axes.legend()
    return figure
