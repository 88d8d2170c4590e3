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
from softcurve.cli.page.picture import FIRST, SECOND, THIRD, line_chart, picture
from softcurve.cli.page.section import Check, Section

DIGITS = 200
SCALES = [10 ** (k / 4) for k in range(-16, 1)]
SMALL = 9  # the number of scales up to 0.01, where the slope is measured


def explain_minimum(network: Network, seed: int) -> Section:
    """Change the logits of many digits by random δ of decreasing size, and compare KL with ½ δᵀJδ."""
    z = network.logits(network.held_out.x[:DIGITS])
    generator = torch.Generator().manual_seed(seed)
    direction = torch.randn(z.shape, generator=generator, dtype=z.dtype)
    curves = [_compare(z, scale * direction) for scale in SCALES]
    forward, backward, model, difference, backward_difference = (list(curve) for curve in zip(*curves, strict=True))
    predicted = _third_order(z, direction)
    errors = [_float32_errors(z, direction, scale) for scale in (1e-4, 1e-3, 1e-2, 1e-1)]
    slope = float(np.polyfit(np.log(SCALES[:SMALL]), np.log(difference[:SMALL]), 1)[0])
    leading = abs(difference[0] / SCALES[0] / predicted - 1)
    float32_error = max(row["softcurve"] for row in errors)
    line = [predicted * scale for scale in SCALES]
    curves_alt = "KL in both directions and the quadratic model on log scales: lines that separate only near 1"
    difference_alt = "The relative differences on log scales: straight lines of slope one"
    return Section(
        "minimum",
        "KL near its minimum",
        values={
            "curves": picture(curves_alt, _log_log, model, "½ δᵀJδ", forward, backward, "nats, mean over digits"),
            "differences": picture(
                difference_alt, _log_log, line, "scale × |κ₃| / 3κ₂", difference, backward_difference,
                "relative difference, median",
            ),
            "scales_shown": list(zip(SCALES, forward, model, difference, strict=True))[::4],
            "error_rows": [tuple(row.values()) for row in errors],
        },
        figures={
            "rows": DIGITS,
            "scales": SCALES,
            "divergence": forward,
            "swapped_divergence": backward,
            "quadratic_model": model,
            "median_relative_difference": difference,
            "left_of_the_terms": _remainder(z, z + SCALES[0] * direction),
            "float32_errors": errors,
            "slope": slope,
            "median_third_order_coefficient": predicted,
        },
        checks=(
            Check("smallest KL at any scale", min(forward), "≥", 0.0),
            Check("relative difference of KL and ½ δᵀJδ: |slope against the scale − 1|", abs(slope - 1), "≤", 0.02),
            Check("relative difference at the smallest scale against the third cumulant", leading, "≤", 1e-2),
            Check("KL in float32: median relative error at any scale", float32_error, "≤", 1e-6),
        ),
    )  # fmt: skip


def _compare(z: Float[Tensor, "n c"], delta: Float[Tensor, "n c"]) -> tuple[float, float, float, float, float]:
    """Mean KL in either direction, the mean model, and the median relative difference of each KL from the model."""
    forward = softcurve.kl_divergence(z, z + delta, reduction="none")
    backward = softcurve.kl_divergence(z + delta, z, reduction="none")
    model = (delta * softcurve.softmax_jacobian_product(z, delta)).sum(-1) / 2
    relative = [((way - model) / model).abs().median().item() for way in (forward, backward)]
    return forward.mean().item(), backward.mean().item(), model.mean().item(), relative[0], relative[1]


def _remainder(z: Float[Tensor, "n c"], moved: Float[Tensor, "n c"]) -> float:
    """KL divided by the sum of the absolute values of its terms p log(p/q), the median over the rows."""
    p, log_ratio = z.softmax(-1), z.log_softmax(-1) - moved.log_softmax(-1)
    divergence = softcurve.kl_divergence(z, moved, reduction="none")
    return (divergence / (p * log_ratio).abs().sum(-1)).median().item()


def _float32_errors(z: Float[Tensor, "n c"], direction: Float[Tensor, "n c"], scale: float) -> dict[str, float]:
    """Median relative errors of two float32 sums, against float64 on the same rounded logits."""
    at, moved = z.float(), (z + scale * direction).float()
    truth = softcurve.kl_divergence(at.double(), moved.double(), reduction="none")
    log_p, log_q = at.log_softmax(-1), moved.log_softmax(-1)
    sums = {
        "textbook": (log_p.exp() * (log_p - log_q)).sum(-1),
        "softcurve": softcurve.kl_divergence(at, moved, reduction="none"),
    }
    return {"scale": scale} | {name: ((value - truth) / truth).abs().median().item() for name, value in sums.items()}


def _third_order(z: Float[Tensor, "n c"], direction: Float[Tensor, "n c"]) -> float:
    """The leading term of the relative difference, divided by the scale: the median of |κ₃| / 3κ₂.

    κ₂ and κ₃ are the variance and the third central moment of δ under p: KL(p(z)‖p(z+δ)) = κ₂/2 + κ₃/6 + ….
    """
    p = z.softmax(-1)
    centred = direction - (p * direction).sum(-1, keepdim=True)
    second, third = (p * centred.square()).sum(-1), (p * centred.pow(3)).sum(-1)
    return (third / (3 * second)).abs().median().item()


def _log_log(
    reference: Sequence[float], label: str, forward: Sequence[float], backward: Sequence[float], ylabel: str
) -> Figure:
    return line_chart(
        (SCALES, reference, {"color": THIRD, "linewidth": 5, "alpha": 0.4, "label": label}),
        (SCALES, forward, {"color": FIRST, "label": "D(p(z) ‖ p(z+δ))"}),
        (SCALES, backward, {"color": SECOND, "linestyle": "--", "label": "D(p(z+δ) ‖ p(z))"}),
        xscale="log", yscale="log", xlabel="scale of δ", ylabel=ylabel,
    )  # fmt: skip
