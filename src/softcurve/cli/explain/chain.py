"""The chain x → e → z → p → L and its gradients against autograd, and the Jacobian of softmax."""

from __future__ import annotations

import math

import torch
from markupsafe import Markup
from matplotlib.figure import Figure
from torch import Tensor

import softcurve
from softcurve.array_types import Float
from softcurve.cli.explain.network import CLASSES, Network
from softcurve.cli.page.picture import FIRST, THIRD, Picture, bars, canvas, cells, line_chart, matrix_chart, picture
from softcurve.cli.page.render import Check, Section
from softcurve.typing import ChainLoss

BOUND, ROUNDING = 1e-12, 1e-15
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


def explain_jacobian(network: Network) -> Section:
    """Analyse the Jacobian for the digit that the network is least certain of."""
    row = network.ambiguous()
    x, label, y = (part[row] for part in (network.held_out.x, network.held_out.labels, network.held_out.soft))
    z = network.logits(x[None])[0]
    p = z.softmax(-1)
    jacobian = softcurve.softmax_jacobian(z)
    eigenvalues, ordered = torch.linalg.eigvalsh(jacobian), p.sort().values
    identity = softcurve.softmax_jacobian_product(z, y / p)
    spectrum_alt = "The nine positive eigenvalues of the Jacobian, each between two neighbours of the sorted p"
    matrix_alt = "The Jacobian as a 10 by 10 heat map: positive on the diagonal, negative elsewhere"
    bars_alt = "Its ten probabilities as bars, with the soft target as lines"
    return Section(
        "jacobian",
        "Softmax and its Jacobian",
        values={
            "pictures": {
                "digit": picture("The digit, 8 by 8 pixels", matrix_chart, x.reshape(8, 8).tolist(), signed=False),
                "p": picture(bars_alt, bars, p.tolist(), target=y.tolist(), width=4.4),
                "matrix": picture(matrix_alt, _heat_map, jacobian),
                "spectrum": picture(spectrum_alt, _spectrum, eigenvalues.tolist(), ordered.tolist()),
            },
            "ordered": ordered.tolist(),
            "identity": list(zip(range(CLASSES), *(v.tolist() for v in (p, y, y / p, identity, y - p)), strict=True)),
            "likeliest": p.topk(2).indices.tolist(),
        },
        figures={
            "label": int(label),
            "p": p.tolist(),
            "eigenvalues": eigenvalues.tolist(),
            "trace": jacobian.trace().item(),
            "one_minus_p_squared": (1 - p.square().sum()).item(),
        },
        checks=_jacobian_checks(z, y),
    )


def _jacobian_checks(z: Float[Tensor, " c"], y: Float[Tensor, " c"]) -> tuple[Check, ...]:
    p, jacobian = z.softmax(-1), softcurve.softmax_jacobian(z)
    eigenvalues, ordered = torch.linalg.eigvalsh(jacobian), p.sort().values
    by_autograd = torch.autograd.functional.jacobian(lambda logits: logits.softmax(-1), z)
    product = softcurve.softmax_jacobian_product(z, y)
    # λ₁ ≤ p₍₁₎ ≤ λ₂ ≤ p₍₂₎ ≤ … ≤ λ_C ≤ p₍C₎: the largest violation of any of these.
    violation = torch.cat([eigenvalues - ordered, ordered[:-1] - eigenvalues[1:]]).max()
    # Class weights give targets that sum to another number than 1, such as 2.5.
    identity = torch.stack([softcurve.softmax_jacobian_product(z, s * y / p) - (s * y - s * p) for s in (1.0, 2.5)])

    def at_most(name: str, value: Tensor, bound: float = ROUNDING) -> Check:
        return Check(name, value.abs().max().item(), "≤", bound)

    return (
        at_most("J against diag(p) − ppᵀ", jacobian - (p.diag() - p.outer(p))),
        at_most("J against autograd of softmax", jacobian - by_autograd),
        at_most("J v in closed form against the matrix product", product - jacobian @ y),
        at_most("J 1 = 0", jacobian.sum(-1)),
        Check("smallest eigenvalue of J", eigenvalues[0].item(), "≥", -ROUNDING),
        Check("second smallest eigenvalue of J: only one is zero", eigenvalues[1].item(), "≥", 1e-9),
        Check("eigenvalues interlace with the sorted p: largest violation", violation.item(), "≤", ROUNDING),
        at_most("J(y ⊘ p) = y − (Σy) p, for Σy = 1 and Σy = 2.5", identity, 1e-14),
    )


def _spectrum(eigenvalues: list[float], ordered: list[float]) -> Figure:
    ranks = range(1, CLASSES + 1)
    marks = {"color": THIRD, "marker": "_", "linestyle": "", "markersize": 17, "markeredgewidth": 2}
    figure = line_chart(
        (ranks, ordered, marks | {"label": "sorted p"}),
        (ranks[1:], eigenvalues[1:], {"color": FIRST, "marker": "o", "linestyle": "", "label": "eigenvalue λ of J"}),
        size=(4.4, 2.9), yscale="log", xticks=ranks, xlabel="rank (λ₁ = 0 cannot be shown on a log scale)",
    )  # fmt: skip
    figure.axes[0].legend(loc="lower right")
    return figure


def _heat_map(jacobian: Float[Tensor, "c c"]) -> Figure:
    figure, axes = canvas(4.2, 3.4)
    mesh = cells(axes, jacobian.tolist(), signed=True)
    axes.grid(visible=False)
    centres, names = [k + 0.5 for k in range(CLASSES)], [str(k) for k in range(CLASSES)]
    axes.set_xticks(centres, names)
    axes.set_yticks(centres, names)
    axes.tick_params(length=0)
    axes.set(xlabel="class j", ylabel="class i")
    figure.colorbar(mesh, ax=axes, shrink=0.9).outline.set_visible(False)
    return figure
