"""The chain x → e → z → p → L: every shape, and every closed-form gradient against autograd."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

import softcurve
from softcurve.array_types import Float
from softcurve.cli.explain.network import CLASSES, Network
from softcurve.cli.explain.section import Check, Section
from softcurve.cli.page.picture import Picture, bars, cells, picture
from softcurve.typing import ChainLoss

BOUND = 1e-12
ROWS = ("dL_dp", "dL_dz", "dL_de", "dL_dx")
LOSSES: dict[ChainLoss, str] = {"cross_entropy": "CE", "forward_kl": "KL(y‖p)", "reverse_kl": "KL(p‖y)"}
SYMBOLS = {
    "loss": r"L",
    "dL_dp": r"\partial L/\partial p",
    "dL_dz": r"\partial L/\partial z",
    "dL_de": r"\partial L/\partial e",
    "dL_dx": r"\partial L/\partial x",
    "dL_dW": r"\partial L/\partial W",
    "dL_db": r"\partial L/\partial b",
    "dL_dtheta": r"\partial L/\partial\theta",
}


def explain_chain(network: Network) -> Section:
    """Compare `softcurve.chain_rule` with autograd on the held-out digits, for each target and loss."""
    digits = network.held_out
    pairs: list[tuple[str, ChainLoss]] = [("hard", "cross_entropy"), ("hard", "forward_kl")]
    pairs += [("soft", loss) for loss in LOSSES]
    deviations = {pair: _deviations(network, *pair) for pair in pairs}
    one_hot = nn.functional.one_hot(digits.labels, CLASSES).to(digits.x)
    infinite = softcurve.kl_divergence(network.logits(digits.x), one_hot.log(), reduction="none").min().item()
    record = softcurve.chain_rule(network.features, network.head, digits.x, digits.labels)
    checks = [
        Check(
            f"{target} targets, {LOSSES[loss]}: largest deviation of a gradient from autograd",
            max(value for name, value in found.items() if name != "loss"),
            "≤",
            BOUND,
        )
        for (target, loss), found in deviations.items()
    ]
    checks.append(Check("hard targets, KL(p‖y): its smallest value over the digits", infinite, "=", math.inf))
    return Section(
        "chain",
        "The chain, link by link",
        figures={
            "shapes": _shapes(network, record),
            "deviations": {
                target: {loss: found for (of, loss), found in deviations.items() if of == target}
                for target in ("hard", "soft")
            },
            "reverse_kl_of_hard_targets": infinite,
        },
        checks=tuple(checks),
        pictures=_pictures(network),
        tables={
            "symbols": {name: SYMBOLS[name.partition("[")[0]] for name in deviations[pairs[0]]},
            "columns": {pair: f"{pair[0]}, {LOSSES[pair[1]]}" for pair in pairs},
            "deviations": deviations,
            "digit": int(digits.labels[network.ambiguous()]),
        },
    )


def _deviations(network: Network, target: str, loss: ChainLoss) -> dict[str, float]:
    """The largest absolute difference between the closed form and autograd, for L and each gradient."""
    digits = network.held_out
    given = digits.labels if target == "hard" else digits.soft
    y = nn.functional.one_hot(digits.labels, CLASSES).to(digits.x) if target == "hard" else digits.soft
    record = softcurve.chain_rule(network.features, network.head, digits.x, given, loss=loss)
    closed = _named(record)
    truth = _by_autograd(network, digits.x, y, loss)
    return {name: (closed[name] - truth[name]).abs().max().item() for name in truth}


def _named(record: softcurve.ChainRule) -> dict[str, Tensor]:
    gradients = {name: getattr(record, name) for name in ("loss", *ROWS, "dL_dW", "dL_db")}
    return gradients | {f"dL_dtheta[{name}]": value for name, value in record.dL_dtheta.items()}


def _by_autograd(network: Network, x: Float[Tensor, "n 64"], y: Float[Tensor, "n 10"], loss: str) -> dict[str, Tensor]:
    """The chain as anyone would write it in torch, differentiated by torch alone."""
    x = x.clone().requires_grad_()
    e = network.features(x)
    z = network.head(e)
    p = z.softmax(-1)
    match loss:
        case "cross_entropy":
            rows = -torch.xlogy(y, p).sum(-1)
        case "forward_kl":
            rows = (torch.xlogy(y, y) - torch.xlogy(y, p)).sum(-1)
        case _:
            rows = (p * (p.log() - y.log())).sum(-1)
    by_row = torch.autograd.grad(rows.sum(), (p, z, e, x), retain_graph=True)
    theta = dict(network.features.named_parameters())
    shared = torch.autograd.grad(rows.mean(), (network.head.weight, network.head.bias, *theta.values()))
    names = ("loss", *ROWS, "dL_dW", "dL_db", *(f"dL_dtheta[{name}]" for name in theta))
    return dict(zip(names, (rows.detach(), *by_row, *shared), strict=True))


def _shapes(network: Network, record: softcurve.ChainRule) -> dict[str, list[int]]:
    links = {"x": network.held_out.x, "e": record.e, "z": record.z, "p": record.p, "loss": record.loss}
    parameters = {"W": network.head.weight, "b": network.head.bias}
    parameters |= {f"theta[{name}]": value for name, value in network.features.named_parameters()}
    return {name: list(value.shape) for name, value in (links | parameters | _named(record)).items()}


def _pictures(network: Network) -> dict[str, Picture]:
    """Every link and its gradient for one digit, whose label is the target."""
    row = network.ambiguous()
    x, label = network.held_out.x[row : row + 1], network.held_out.labels[row : row + 1]
    record = softcurve.chain_rule(network.features, network.head, x, label)
    assert record.dL_dx is not None  # pixels are real numbers
    y = nn.functional.one_hot(label, CLASSES)[0].to(x).tolist()

    def grid(values: Tensor, columns: int, alt: str, *, signed: bool = True) -> Picture:
        matrix = values.reshape(-1, columns).tolist()
        return picture(lambda theme: cells(theme, matrix, signed=signed), alt)

    def chart(values: Tensor, alt: str, target: list[float] | None = None) -> Picture:
        return picture(lambda theme: bars(theme, values[0].tolist(), target=target), alt)

    return {
        "x": grid(x, 8, f"The image of a handwritten {label.item()}, 8 by 8 pixels", signed=False),
        "e": grid(record.e, 8, "The 32 features as signed squares"),
        "z": chart(record.z, "The ten logits as bars"),
        "p": chart(record.p, "The ten probabilities as bars, with the one-hot target as lines", y),
        "dL_dx": grid(record.dL_dx, 8, "The gradient in the pixels, 8 by 8 signed squares"),
        "dL_de": grid(record.dL_de, 8, "The gradient in the 32 features as signed squares"),
        "dL_dz": chart(record.dL_dz, "The gradient in the ten logits: p minus y"),
        "dL_dp": chart(record.dL_dp, "The gradient in the ten probabilities: one negative bar"),
        "dL_dW": grid(record.dL_dW, 32, "The gradient in W, 10 by 32: a matrix of rank one"),
    }
