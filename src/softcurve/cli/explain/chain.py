"""The chain x → e → z → p → L and its gradients against autograd, and the Jacobian of softmax."""

from __future__ import annotations

import math

import torch
from matplotlib.figure import Figure
from torch import Tensor

import softcurve
from softcurve.array_types import Float
from softcurve.cli.explain.network import CLASSES, Network
from softcurve.cli.page.picture import FIRST, THIRD, line_chart, picture
from softcurve.cli.page.render import Check, Section
from softcurve.typing import ChainLoss

BOUND, ROUNDING = 1e-12, 1e-15
LOSSES: dict[ChainLoss, str] = {"cross_entropy": "H(y, p)", "forward_kl": "D(y‖p)", "reverse_kl": "D(p‖y)"}
TARGETS = {"hard": "one-hot targets", "soft": "soft targets"}


def explain_chain(network: Network) -> Section:
    """Compare `softcurve.chain_rule` with autograd on the held-out digits, for each kind of target and loss."""
    digits, y = network.held_out, network.held_out.one_hot()
    hard_losses: tuple[ChainLoss, ...] = ("cross_entropy", "forward_kl")
    deviations = {
        "hard": {loss: _deviations(network, y, digits.labels, loss) for loss in hard_losses},
        "soft": {loss: _deviations(network, digits.soft, digits.soft, loss) for loss in LOSSES},
    }
    record = softcurve.chain_rule(network.features, network.head, digits.x, digits.labels)
    tensors = {"x": digits.x, "e": record.e, "z": record.z, "p": record.p, "loss": record.loss}
    tensors |= {"W": network.head.weight, "b": network.head.bias}
    tensors |= {f"theta[{name}]": value for name, value in network.features.named_parameters()}
    infinite = softcurve.kl_divergence(network.logits(digits.x), y.log(), reduction="none").min().item()
    checks = [
        Check(
            f"{TARGETS[target]}, {LOSSES[loss]}: largest difference between a gradient and that of autograd",
            max(value for name, value in by_name.items() if name != "loss"), "≤", BOUND,
        )
        for target, by_loss in deviations.items() for loss, by_name in by_loss.items()
    ]  # fmt: skip
    return Section(
        "chain",
        {"losses": LOSSES},
        figures={
            "shapes": {name: list(value.shape) for name, value in (tensors | _gradients(record)).items()},
            "deviations": deviations,
            "reverse_kl_of_hard_targets": infinite,
        },
        checks=(*checks, Check("one-hot targets, D(p‖y): smallest value over the digits", infinite, "=", math.inf)),
    )


def _gradients(record: softcurve.ChainRule) -> dict[str, Tensor]:
    """Return the loss and its gradients by their names, in the order of :func:`_by_autograd`."""
    names = ("loss", "dL_dp", "dL_dz", "dL_de", "dL_dx", "dL_dW", "dL_db")
    gradients = {name: getattr(record, name) for name in names}
    return gradients | {f"dL_dtheta[{name}]": value for name, value in record.dL_dtheta.items()}


def _deviations(network: Network, y: Float[Tensor, "n 10"], target: Tensor, loss: ChainLoss) -> dict[str, float]:
    """Return the largest absolute difference between the closed form and autograd, for L and each gradient."""
    closed = _gradients(softcurve.chain_rule(network.features, network.head, network.held_out.x, target, loss=loss))
    pairs = zip(closed.items(), _by_autograd(network, y, loss), strict=True)
    return {name: (value - truth).abs().max().item() for (name, value), truth in pairs}


def _by_autograd(network: Network, y: Float[Tensor, "n 10"], loss: str) -> tuple[Tensor, ...]:
    """Differentiate the chain, written as a user of torch would write it, by torch alone."""
    x = network.held_out.x.clone().requires_grad_()
    e = network.features(x)
    z = network.head(e)
    p = z.softmax(-1)
    rows = (p * (p.log() - y.log())).sum(-1) if loss == "reverse_kl" else -torch.xlogy(y, p).sum(-1)
    if loss == "forward_kl":
        rows = rows + torch.xlogy(y, y).sum(-1)
    by_row = torch.autograd.grad(rows.sum(), (p, z, e, x), retain_graph=True)
    return (rows.detach(), *by_row, *torch.autograd.grad(rows.mean(), network.parameters()))


def explain_jacobian(network: Network) -> Section:
    """Analyse the Jacobian for the digit that the network is least certain of."""
    row = network.ambiguous()
    x, label, y = (part[row] for part in (network.held_out.x, network.held_out.labels, network.held_out.soft))
    z = network.logits(x[None])[0]
    p = z.softmax(-1)
    jacobian, product = softcurve.softmax_jacobian(z), softcurve.softmax_jacobian_product
    eigenvalues, ordered = torch.linalg.eigvalsh(jacobian), p.sort().values
    by_autograd = torch.autograd.functional.jacobian(lambda logits: logits.softmax(-1), z)
    # λ₁ ≤ p₍₁₎ ≤ λ₂ ≤ p₍₂₎ ≤ … ≤ λ_C ≤ p₍C₎: the largest violation of any of these.
    violation = torch.cat([eigenvalues - ordered, ordered[:-1] - eigenvalues[1:]]).max()
    # Class weights give targets that sum to another number than 1, such as 2.5.
    identity = torch.stack([product(z, s * y / p) - (s * y - s * p) for s in (1.0, 2.5)])

    identity_columns = torch.stack([p, y, y / p, product(z, y / p), y - p], -1)

    def at_most(name: str, value: Tensor, bound: float = ROUNDING) -> Check:
        return Check(name, value.abs().max().item(), "≤", bound)

    return Section(
        "jacobian",
        {
            "spectrum": picture(_spectrum, eigenvalues.tolist(), ordered.tolist()),
            "ordered": ordered.tolist(),
            "identity": [(k, *row) for k, row in enumerate(identity_columns.tolist())],
            "likeliest": p.topk(2).indices.tolist(),
        },
        figures={
            "label": int(label), "p": p.tolist(), "eigenvalues": eigenvalues.tolist(), "trace": jacobian.trace().item(),
            "one_minus_p_squared": (1 - p.square().sum()).item(),
        },
        checks=(
            at_most("J and diag(p) − ppᵀ: largest difference", jacobian - (p.diag() - p.outer(p))),
            at_most("J and the Jacobian by autograd: largest difference", jacobian - by_autograd),
            at_most("J v in closed form and by the matrix product: largest difference", product(z, y) - jacobian @ y),
            at_most("J 𝟏 = 0: largest entry of J 𝟏", jacobian.sum(-1)),
            Check("smallest eigenvalue of J", eigenvalues[0].item(), "≥", -ROUNDING),
            Check("second smallest eigenvalue of J: only one is zero", eigenvalues[1].item(), "≥", 1e-9),
            Check("eigenvalues of J interlace with the sorted p: largest violation", violation.item(), "≤", ROUNDING),
            at_most("J(y ⊘ p) = y − (Σy) p for Σy = 1 and Σy = 2.5: largest difference", identity, 1e-14),
        ),
    )  # fmt: skip


def _spectrum(eigenvalues: list[float], ordered: list[float]) -> Figure:
    ranks = range(1, CLASSES + 1)
    marks = {"color": THIRD, "marker": "_", "linestyle": "", "markersize": 17, "markeredgewidth": 2}
    figure = line_chart(
        (ranks, ordered, marks | {"label": "p₍ᵢ₎"}),
        (ranks[1:], eigenvalues[1:], {"color": FIRST, "marker": "o", "linestyle": "", "label": "λᵢ"}),
        size=(4.4, 2.9), yscale="log", xticks=ranks, xlabel="i",
    )  # fmt: skip
    figure.axes[0].legend(loc="lower right")
    return figure
