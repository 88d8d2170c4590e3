"""Cross-entropy and forward KL with soft targets: one gradient, and a gap that never moves."""

from __future__ import annotations

import math

import torch
from matplotlib.figure import Figure
from torch import Tensor

import softcurve
from softcurve.cli.explain.network import Network
from softcurve.cli.explain.section import Check, Section
from softcurve.cli.page.picture import Theme, canvas, picture


def explain_targets(network: Network) -> Section:
    """Compare the two losses, and their gradients in every parameter, on the held-out digits."""
    digits, history = network.held_out, network.history
    log_y, z = digits.soft.log(), network.logits(digits.x)
    units = {"nats": math.e, "bits": 2.0}
    values = {unit: _values(digits.soft, log_y, z, base) for unit, base in units.items()}
    constant = values["nats"]["entropy"]
    pairs = list(zip(history.cross_entropy, history.divergence, strict=True))
    drift = max(abs(ce - kl - constant) for ce, kl in pairs)
    decomposition = max(
        abs(found["divergence"] - (found["cross_entropy"] - found["entropy"])) for found in values.values()
    )
    in_nats = {name: value * math.log(2) for name, value in values["bits"].items()}
    conversion = max(abs(in_nats[name] - value) for name, value in values["nats"].items())
    return Section(
        "targets",
        "Cross-entropy and KL: one gradient, one constant apart",
        figures={
            "values": values,
            "gradient_deviation": _gradient_deviation(network),
            "gap_drift": drift,
            "steps": history.steps[-1],
            "cross_entropy_first": pairs[0][0],
            "divergence_first": pairs[0][1],
        },
        checks=(
            Check(
                "gradients of CE and KL(y‖p) in all parameters: largest difference",
                _gradient_deviation(network),
                "≤",
                1e-14,
            ),
            Check("CE − KL against H(y), at every recorded step of the training", drift, "≤", 1e-13),
            Check("KL = −H(y) + H(y, p), in nats and in bits", decomposition, "≤", 1e-14),
            Check("bits × ln 2 = nats", conversion, "≤", 1e-14),
        ),
        pictures={
            "training": picture(
                lambda theme: _training(theme, network, constant),
                "Cross-entropy and KL along the training: two curves of one shape, H(y) apart",
            )
        },
    )


def _values(y: Tensor, log_y: Tensor, z: Tensor, base: float) -> dict[str, float]:
    return {
        "entropy": softcurve.entropy(log_y, base=base).mean().item(),
        "cross_entropy": softcurve.cross_entropy(z, y, base=base).item(),
        "divergence": softcurve.kl_divergence(log_y, z, base=base).item(),
    }


def _gradient_deviation(network: Network) -> float:
    digits = network.held_out
    parameters = [*network.features.parameters(), *network.head.parameters()]
    z = network.head(network.features(digits.x))
    ce = torch.autograd.grad(softcurve.cross_entropy(z, digits.soft), parameters, retain_graph=True)
    kl = torch.autograd.grad(softcurve.kl_divergence(digits.soft.log(), z), parameters)
    return max((one - other).abs().max().item() for one, other in zip(ce, kl, strict=True))


def _training(theme: Theme, network: Network, constant: float) -> Figure:
    history = network.history
    figure, axes = canvas(4.8, 3.0)
    axes.fill_between(
        history.steps, history.divergence, history.cross_entropy, color=theme.third, alpha=0.16, linewidth=0
    )
    axes.plot(history.steps, history.cross_entropy, color=theme.first, label="H(y, p), cross-entropy")
    axes.plot(history.steps, history.divergence, color=theme.second, label="D(y ‖ p), KL")
    axes.axhline(constant, color=theme.third, linewidth=1, linestyle="--", label="H(y)")
    axes.set_ylim(bottom=0)
    axes.set_xlabel("training step")
    axes.set_ylabel("held-out loss, nats")
    axes.legend()
    return figure
