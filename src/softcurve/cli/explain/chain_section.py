"""The chain x → e → z → p → L: every shape, and every closed-form gradient against autograd."""

from __future__ import annotations

import math

import torch
from markupsafe import Markup
from torch import Tensor

import softcurve
from softcurve.array_types import Float
from softcurve.cli.explain.network import Network
from softcurve.cli.page.picture import Picture, bars, matrix_chart, picture
from softcurve.cli.page.section import Check, Section
from softcurve.typing import ChainLoss

BOUND = 1e-12
ROW_GRADIENTS = ("dL_dp", "dL_dz", "dL_de", "dL_dx")
LOSSES: dict[ChainLoss, str] = {"cross_entropy": "CE", "forward_kl": "KL(y‖p)", "reverse_kl": "KL(p‖y)"}


def explain_chain(network: Network) -> Section:
    """Compare `softcurve.chain_rule` with autograd on the held-out digits, for each kind of target and loss."""
    digits = network.held_out
    pairs: list[tuple[str, ChainLoss]] = [("hard", "cross_entropy"), ("hard", "forward_kl")]
    pairs += [("soft", loss) for loss in LOSSES]
    deviations = {pair: _deviations(network, *pair) for pair in pairs}
    log_y = digits.one_hot().log()
    infinite = softcurve.kl_divergence(network.logits(digits.x), log_y, reduction="none").min().item()
    shapes = _shapes(network, softcurve.chain_rule(network.features, network.head, digits.x, digits.labels))
    checks = [
        Check(
            f"{target} targets, {LOSSES[loss]}: largest deviation of a gradient from autograd",
            max(value for name, value in by_name.items() if name != "loss"), "≤", BOUND,
        )
        for (target, loss), by_name in deviations.items()
    ]  # fmt: skip
    checks.append(Check("hard targets, KL(p‖y): smallest value over the digits", infinite, "=", math.inf))
    columns = {f"{target}, {LOSSES[loss]}": "" for target, loss in pairs}
    return Section(
        "chain",
        "The chain, stage by stage",
        values={
            "pictures": _pictures(network),
            "parameters": [(_symbol(name), _size(shapes[name])) for name in shapes if name[0] in "Wbt"],
            "columns": {"gradient": "s", "shape": "s"} | columns,
            "gradients": [
                (_symbol(name), _size(shapes[name]), *(deviations[pair][name] for pair in pairs))
                for name in deviations[pairs[0]]
            ],
            "digit": int(digits.labels[network.ambiguous()]),
        },
        figures={
            "shapes": shapes,
            "deviations": {
                target: {loss: by_name for (kind, loss), by_name in deviations.items() if kind == target}
                for target in ("hard", "soft")
            },
            "reverse_kl_of_hard_targets": infinite,
        },
        checks=tuple(checks),
    )


def _symbol(name: str) -> Markup:
    """The formula of ``loss``, ``dL_d…`` or a parameter, whose own name may follow in brackets."""
    symbol, _, parameter = name.replace("theta", r"\theta").partition("[")
    latex = symbol.replace("dL_d", r"\partial L/\partial ").replace("loss", "L")
    return Markup(rf"\({latex}\)") + (Markup(" <small>{}</small>").format(parameter[:-1]) if parameter else "")


def _size(shape: list[int]) -> str:
    return " × ".join(map(str, shape))


def _deviations(network: Network, target: str, loss: ChainLoss) -> dict[str, float]:
    """The largest absolute difference between the closed form and autograd, for L and each gradient."""
    digits = network.held_out
    y = digits.one_hot() if target == "hard" else digits.soft
    argument = digits.labels if target == "hard" else digits.soft
    closed = _named(softcurve.chain_rule(network.features, network.head, digits.x, argument, loss=loss))
    truth = _by_autograd(network, digits.x, y, loss)
    return {name: (closed[name] - truth[name]).abs().max().item() for name in truth}


def _named(record: softcurve.ChainRule) -> dict[str, Tensor]:
    gradients = {name: getattr(record, name) for name in ("loss", *ROW_GRADIENTS, "dL_dW", "dL_db")}
    return gradients | {f"dL_dtheta[{name}]": value for name, value in record.dL_dtheta.items()}


def _by_autograd(network: Network, x: Float[Tensor, "n 64"], y: Float[Tensor, "n 10"], loss: str) -> dict[str, Tensor]:
    """The chain as a user of torch would write it, differentiated by torch alone."""
    x = x.clone().requires_grad_()
    e = network.features(x)
    z = network.head(e)
    p = z.softmax(-1)
    rows = (p * (p.log() - y.log())).sum(-1) if loss == "reverse_kl" else -torch.xlogy(y, p).sum(-1)
    if loss == "forward_kl":
        rows = rows + torch.xlogy(y, y).sum(-1)
    by_row = torch.autograd.grad(rows.sum(), (p, z, e, x), retain_graph=True)
    theta = dict(network.features.named_parameters())
    shared = torch.autograd.grad(rows.mean(), (network.head.weight, network.head.bias, *theta.values()))
    names = ("loss", *ROW_GRADIENTS, "dL_dW", "dL_db", *(f"dL_dtheta[{name}]" for name in theta))
    return dict(zip(names, (rows.detach(), *by_row, *shared), strict=True))


def _shapes(network: Network, record: softcurve.ChainRule) -> dict[str, list[int]]:
    stages = {"x": network.held_out.x, "e": record.e, "z": record.z, "p": record.p, "loss": record.loss}
    parameters = {"W": network.head.weight, "b": network.head.bias}
    parameters |= {f"theta[{name}]": value for name, value in network.features.named_parameters()}
    return {name: list(value.shape) for name, value in (stages | parameters | _named(record)).items()}


def _pictures(network: Network) -> dict[str, Picture]:
    """Every stage and its gradient for one digit, whose label is the target."""
    row = network.ambiguous()
    x, label = network.held_out.x[row : row + 1], network.held_out.labels[row : row + 1]
    record = softcurve.chain_rule(network.features, network.head, x, label)
    assert record.dL_dx is not None  # pixels are real numbers
    y = network.held_out.one_hot()[row].tolist()

    def grid(values: Tensor, columns: int, alt: str, *, signed: bool = True) -> Picture:
        return picture(alt, matrix_chart, values.reshape(-1, columns).tolist(), signed=signed)

    def chart(values: Tensor, alt: str, target: list[float] | None = None) -> Picture:
        return picture(alt, bars, values[0].tolist(), target=target)

    wrt = "The gradient with respect to"
    return {
        "x": grid(x, 8, f"The image of a handwritten {label.item()}, 8 by 8 pixels", signed=False),
        "e": grid(record.e, 8, "The 32 features as signed squares"),
        "z": chart(record.z, "The ten logits as bars"),
        "p": chart(record.p, "The ten probabilities as bars, with the one-hot target as lines", y),
        "dL_dx": grid(record.dL_dx, 8, f"{wrt} the pixels as 8 by 8 signed squares"),
        "dL_de": grid(record.dL_de, 8, f"{wrt} the 32 features as signed squares"),
        "dL_dz": chart(record.dL_dz, f"{wrt} the ten logits, p minus y"),
        "dL_dp": chart(record.dL_dp, f"{wrt} the ten probabilities: one negative bar"),
        "dL_dW": grid(record.dL_dW, 32, f"{wrt} W, 10 by 32: a matrix of rank one"),
    }
