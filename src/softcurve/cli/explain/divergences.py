"""Cross-entropy against KL, KL in its two directions, and KL near its minimum."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
from matplotlib.figure import Figure
from scipy.optimize import minimize
from torch import Tensor

import softcurve
from softcurve.array_types import Float
from softcurve.cli.explain.network import History, Network
from softcurve.cli.page.picture import FIRST, SECOND, THIRD, line_chart, picture
from softcurve.cli.page.render import Check, Section

GRID = torch.linspace(-6, 6, 80, dtype=torch.float64)
MODES = ((0.6, -2.5, 0.6), (0.4, 2.5, 0.8))  # weight, mean, standard deviation
MIDDLE = 0.0  # a point between the modes
STARTS = [(mean, log_width) for mean in (-3.0, 0.0, 3.0) for log_width in (0.0, 1.0)]
DIGITS = 200
SCALES = [10 ** (k / 4) for k in range(-16, 1)]
SMALL = 9  # the number of scales up to 0.01, where the slope is measured


def explain_targets(network: Network) -> Section:
    """Compare the two losses, and their gradients with respect to every parameter, on the held-out digits."""
    digits, history = network.held_out, network.history
    log_y = digits.soft.log()
    z = network.head(network.features(digits.x))
    values = {
        unit: {
            "entropy": softcurve.entropy(log_y, base=base).mean().item(),
            "cross_entropy": softcurve.cross_entropy(z, digits.soft, base=base).item(),
            "divergence": softcurve.kl_divergence(log_y, z, base=base).item(),
        }
        for unit, base in {"nats": math.e, "bits": 2.0}.items()
    }
    nats, bits = values["nats"], values["bits"]
    ce, kl = (
        torch.autograd.grad(loss, network.parameters(), retain_graph=True)
        for loss in (softcurve.cross_entropy(z, digits.soft), softcurve.kl_divergence(log_y, z))
    )
    deviation = max((one - other).abs().max().item() for one, other in zip(ce, kl, strict=True))
    gaps = np.subtract(history.cross_entropy, history.divergence)
    drift = float(np.abs(gaps - nats["entropy"]).max())
    decomposition = max(abs(v["divergence"] - (v["cross_entropy"] - v["entropy"])) for v in values.values())
    conversion = max(abs(bits[name] * math.log(2) - nats[name]) for name in nats)
    return Section(
        "targets",
        {"picture": picture(_training, history, nats["entropy"])},
        figures={
            "values": values, "gradient_deviation": deviation, "gap_drift": drift, "steps": history.steps[-1],
            "cross_entropy_first": history.cross_entropy[0], "divergence_first": history.divergence[0],
        },
        checks=(
            Check(
                "gradients of H(y, p) and D(y‖p) with respect to all parameters: largest difference", deviation, "≤",
                1e-14,
            ),
            Check("H(y, p) − D(y‖p) = H(y) during training: largest difference", drift, "≤", 1e-13),
            Check("D(y‖p) = −H(y) + H(y, p) in nats and in bits: largest difference", decomposition, "≤", 1e-14),
            Check("value in bits × ln 2 = value in nats: largest difference", conversion, "≤", 1e-14),
        ),
    )  # fmt: skip


def _training(history: History, entropy: float) -> Figure:
    steps, ce, kl = history.steps, history.cross_entropy, history.divergence
    constant = {"color": THIRD, "linewidth": 1, "linestyle": "--", "label": "H(y)"}
    figure = line_chart(
        (steps, ce, {"color": FIRST, "label": "H(y, p)"}),
        (steps, kl, {"color": SECOND, "label": "D(y ‖ p)"}),
        ([steps[0], steps[-1]], [entropy, entropy], constant),
        size=(4.8, 3.0), ylim=(0, None),
    )  # fmt: skip
    figure.axes[0].fill_between(steps, kl, ce, color=THIRD, alpha=0.16, linewidth=0)
    return figure


def explain_directions() -> Section:
    """Fit a discretised Gaussian to a mixture of two in both directions, from several starts."""
    target = target_logits()
    forward_minima = _minima(lambda q: softcurve.kl_divergence(target, q, reduction="sum"))
    reverse_minima = _minima(lambda q: softcurve.kl_divergence(q, target, reduction="sum"))
    names = ["target", "forward", "reverse", *(f"reverse, minimum {k}" for k in range(2, len(reverse_minima) + 1))]
    logits = [target, forward_minima[0], *reverse_minima]
    fits = {name: _describe(z, target) for name, z in zip(names, logits, strict=True)}
    truth, forward, reverse = (fits[name] for name in names[:3])
    # y = [½, ½] and p = [1 − ε, ε], down to ε = 0.
    epsilon = torch.tensor([1e-1, 1e-3, 1e-9, 1e-27, 1e-81, 1e-243, 0.0], dtype=torch.float64)
    q = torch.stack([torch.log1p(-epsilon), epsilon.log()], dim=-1)
    half = torch.full_like(q, 0.5).log()
    pairs = (softcurve.kl_divergence(*pair, reduction="none", base=2.0).tolist() for pair in ((half, q), (q, half)))
    edges = list(zip(epsilon.tolist(), *pairs, strict=True))
    _, at_zero, swapped_at_zero = edges[-1]
    at_mode = abs(reverse["reverse"] + math.log(MODES[0][0]))
    moments = max(abs(forward[name] - truth[name]) for name in ("mean", "deviation"))
    gains = reverse["forward"] - forward["forward"], forward["reverse"] - reverse["reverse"]
    return Section(
        "directions",
        {
            "minima": len(reverse_minima),
            "towards_zero": edges,
        },
        figures={
            "fits": fits,
            "half_half_against_one_zero_bits": at_zero,
            "one_zero_against_half_half_bits": swapped_at_zero,
        },
        checks=(
            Check("minimum of D(y‖p): largest difference of mean and width from those of y", moments, "≤", 1e-6),
            Check("minimum of D(y‖p) covers both modes: probability right of 0", forward["right"], "≥", 0.2),
            Check("minimum of D(p‖y) covers one mode: probability right of 0", reverse["right"], "≤", 0.01),
            Check("minimum of D(p‖y): its difference from −log w of the covered mode", at_mode, "≤", 1e-2),
            Check("D(y‖p): value at the minimum of D(p‖y) less its own minimum", gains[0], "≥", 0.1),
            Check("D(p‖y): value at the minimum of D(y‖p) less its own minimum", gains[1], "≥", 0.1),
            Check("D(y‖p) of y = [½, ½] and p = [1, 0]", at_zero, "=", math.inf),
            Check("D(p‖y) of the same two distributions, in bits", swapped_at_zero, "=", 1.0),
        ),
    )


def target_logits() -> Float[Tensor, " bins"]:
    """Return the log-probabilities of a mixture of two Gaussians on the bins."""
    densities = [math.log(w / s) - (GRID - m).square() / (2 * s * s) for w, m, s in MODES]
    return torch.stack(densities).logsumexp(0).log_softmax(-1)


def _minima(divergence: Callable[[Tensor], Tensor]) -> list[Float[Tensor, " bins"]]:
    """Return the logits of Gaussians at the distinct minima that the starts lead to, the best first."""

    def gaussian(parameters: Tensor) -> Tensor:
        mean, log_width = parameters[0], parameters[1]
        return -(GRID - mean).square() * (-2 * log_width).exp() / 2

    def value_and_gradient(at: np.ndarray) -> tuple[float, np.ndarray]:
        parameters = torch.from_numpy(at.copy()).requires_grad_()
        value = divergence(gaussian(parameters))
        (gradient,) = torch.autograd.grad(value, parameters)
        return value.item(), gradient.numpy()

    runs = [minimize(value_and_gradient, start, jac=True, options={"gtol": 1e-9}) for start in STARTS]
    minima: list[np.ndarray] = []
    for run in sorted(runs, key=lambda run: round(float(run.fun), 9)):
        if all(np.abs(run.x - other).max() > 1e-3 for other in minima):
            minima.append(run.x)
    return [gaussian(torch.from_numpy(at)) for at in minima]


def _describe(logits: Float[Tensor, " bins"], target: Float[Tensor, " bins"]) -> dict[str, float]:
    """Return the moments of a distribution, its probability on either side of the middle, and both divergences."""
    q = logits.softmax(-1)
    mean = (q * GRID).sum()
    return {
        "mean": mean.item(), "deviation": (q * (GRID - mean).square()).sum().sqrt().item(),
        "left": q[GRID < MIDDLE].sum().item(), "right": q[GRID >= MIDDLE].sum().item(),
        "forward": softcurve.kl_divergence(target, logits, reduction="sum").item(),
        "reverse": softcurve.kl_divergence(logits, target, reduction="sum").item(),
    }  # fmt: skip


def explain_minimum(network: Network, seed: int) -> Section:
    """Change the logits of many digits by random δ of decreasing size, and compare KL with ½ δᵀJδ."""
    z = network.logits(network.held_out.x[:DIGITS])
    direction = torch.randn(z.shape, generator=torch.Generator().manual_seed(seed), dtype=z.dtype)
    delta = torch.tensor(SCALES, dtype=z.dtype)[:, None, None] * direction
    at, moved = z.expand_as(delta), z + delta
    model = (delta * softcurve.softmax_jacobian_product(at, delta)).sum(-1) / 2
    ways = [softcurve.kl_divergence(*pair, reduction="none") for pair in ((at, moved), (moved, at))]
    difference, swapped_difference = (((way - model) / model).abs().median(-1).values.tolist() for way in ways)
    forward, backward, quadratic = (values.mean(-1).tolist() for values in (*ways, model))
    # The terms p log(p/q) of the divergence at the smallest scale.
    terms = z.softmax(-1) * (z.log_softmax(-1) - moved[0].log_softmax(-1))
    predicted = _third_order(z, direction)
    errors = [_float32_errors(z, direction, scale) for scale in (1e-4, 1e-3, 1e-2, 1e-1)]
    slope = float(np.polyfit(np.log(SCALES[:SMALL]), np.log(difference[:SMALL]), 1)[0])
    leading = abs(difference[0] / SCALES[0] / predicted - 1)
    float32_error = max(row["softcurve"] for row in errors)
    line = [predicted * scale for scale in SCALES]
    return Section(
        "minimum",
        {
            "curves": picture(_log_log, quadratic, "½ δᵀJδ", forward, backward),
            "differences": picture(_log_log, line, "|κ₃| / 3κ₂", difference, swapped_difference),
        },
        figures={
            "rows": DIGITS, "scales": SCALES, "divergence": forward, "swapped_divergence": backward,
            "quadratic_model": quadratic, "median_relative_difference": difference,
            "left_of_the_terms": (ways[0][0] / terms.abs().sum(-1)).median().item(), "float32_errors": errors,
            "slope": slope, "median_third_order_coefficient": predicted,
        },
        checks=(
            Check("smallest KL at any scale", min(forward), "≥", 0.0),
            Check("relative difference of KL and ½ δᵀJδ: |slope on log scales − 1|", abs(slope - 1), "≤", 0.02),
            Check(
                "relative difference at the smallest scale: its relative difference from |κ₃| / 3κ₂", leading, "≤", 1e-2
            ),
            Check("KL in float32: largest of the median relative errors", float32_error, "≤", 1e-6),
        ),
    )  # fmt: skip


def _float32_errors(z: Float[Tensor, "n c"], direction: Float[Tensor, "n c"], scale: float) -> dict[str, float]:
    """Return the median relative errors of two float32 sums, against float64 on the same rounded logits."""
    at, moved = z.float(), (z + scale * direction).float()
    truth = softcurve.kl_divergence(at.double(), moved.double(), reduction="none")
    log_p = at.log_softmax(-1)
    textbook = (log_p.exp() * (log_p - moved.log_softmax(-1))).sum(-1)
    sums = {"textbook": textbook, "softcurve": softcurve.kl_divergence(at, moved, reduction="none")}
    return {"scale": scale} | {name: ((value - truth) / truth).abs().median().item() for name, value in sums.items()}


def _third_order(z: Float[Tensor, "n c"], direction: Float[Tensor, "n c"]) -> float:
    """Return the leading term of the relative difference, divided by the scale: the median of |κ₃| / 3κ₂.

    κ₂ and κ₃ are the variance and the third central moment of δ under p: KL(p(z)‖p(z+δ)) = κ₂/2 + κ₃/6 + ….
    """
    p = z.softmax(-1)
    centred = direction - (p * direction).sum(-1, keepdim=True)
    second, third = (p * centred.square()).sum(-1), (p * centred.pow(3)).sum(-1)
    return (third / (3 * second)).abs().median().item()


def _log_log(reference: Sequence[float], label: str, forward: Sequence[float], backward: Sequence[float]) -> Figure:
    return line_chart(
        (SCALES, reference, {"color": THIRD, "linewidth": 5, "alpha": 0.4, "label": label}),
        (SCALES, forward, {"color": FIRST, "label": "D(p(z) ‖ p(z+δ))"}),
        (SCALES, backward, {"color": SECOND, "linestyle": "--", "label": "D(p(z+δ) ‖ p(z))"}),
        xscale="log", yscale="log",
    )  # fmt: skip
