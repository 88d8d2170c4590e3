"""Cross-entropy and forward KL with soft targets: the same gradient, and values that differ by a constant."""

from __future__ import annotations

import math

import torch
from matplotlib.figure import Figure

import softcurve
from softcurve.cli.explain.network import History, Network
from softcurve.cli.page.picture import FIRST, SECOND, THIRD, line_chart, picture
from softcurve.cli.page.section import Check, Section


def explain_targets(network: Network) -> Section:
    """Compare the two losses, and their gradients with respect to every parameter, on the held-out digits."""
    digits, history = network.held_out, network.history
    log_y, z = digits.soft.log(), network.logits(digits.x)
    values = {
        unit: {
            "entropy": softcurve.entropy(log_y, base=base).mean().item(),
            "cross_entropy": softcurve.cross_entropy(z, digits.soft, base=base).item(),
            "divergence": softcurve.kl_divergence(log_y, z, base=base).item(),
        }
        for unit, base in {"nats": math.e, "bits": 2.0}.items()
    }
    nats, bits = values["nats"], values["bits"]
    gaps = [ce - kl for ce, kl in zip(history.cross_entropy, history.divergence, strict=True)]
    drift = max(abs(gap - nats["entropy"]) for gap in gaps)
    decomposition = max(abs(v["divergence"] - (v["cross_entropy"] - v["entropy"])) for v in values.values())
    conversion = max(abs(bits[name] * math.log(2) - nats[name]) for name in nats)
    deviation = _gradient_deviation(network)
    alt = "Cross-entropy and KL during the training: two curves of the same shape, H(y) apart"
    return Section(
        "targets",
        "Cross-entropy and KL: the same gradient, a constant apart",
        values={
            "picture": picture(alt, _training, history, nats["entropy"]),
            "rows": [(unit, *value.values()) for unit, value in values.items()],
        },
        figures={
            "values": values,
            "gradient_deviation": deviation,
            "gap_drift": drift,
            "steps": history.steps[-1],
            "cross_entropy_first": history.cross_entropy[0],
            "divergence_first": history.divergence[0],
        },
        checks=(
            Check("gradients of CE and KL(y‖p) w.r.t. all parameters: largest difference", deviation, "≤", 1e-14),
            Check("CE − KL against H(y), at every recorded step of the training", drift, "≤", 1e-13),
            Check("KL = −H(y) + H(y, p), in nats and in bits", decomposition, "≤", 1e-14),
            Check("bits × ln 2 = nats", conversion, "≤", 1e-14),
        ),
    )


def _gradient_deviation(network: Network) -> float:
    digits = network.held_out
    parameters = [*network.features.parameters(), *network.head.parameters()]
    z = network.head(network.features(digits.x))
    ce = torch.autograd.grad(softcurve.cross_entropy(z, digits.soft), parameters, retain_graph=True)
    kl = torch.autograd.grad(softcurve.kl_divergence(digits.soft.log(), z), parameters)
    return max((one - other).abs().max().item() for one, other in zip(ce, kl, strict=True))


def _training(history: History, entropy: float) -> Figure:
    steps, ce, kl = history.steps, history.cross_entropy, history.divergence
    constant = {"color": THIRD, "linewidth": 1, "linestyle": "--", "label": "H(y)"}
    figure = line_chart(
        (steps, ce, {"color": FIRST, "label": "H(y, p), cross-entropy"}),
        (steps, kl, {"color": SECOND, "label": "D(y ‖ p), KL"}),
        ([steps[0], steps[-1]], [entropy, entropy], constant),
        size=(4.8, 3.0), ylim=(0, None), xlabel="training step", ylabel="held-out loss, nats",
    )  # fmt: skip
    figure.axes[0].fill_between(steps, kl, ce, color=THIRD, alpha=0.16, linewidth=0)
    return figure
