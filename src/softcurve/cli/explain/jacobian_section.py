"""The Jacobian of softmax: its picture, its eigenvalues, and the basic identity of the chain."""

from __future__ import annotations

import torch
from matplotlib.figure import Figure
from torch import Tensor

import softcurve
from softcurve.array_types import Float
from softcurve.cli.explain.network import CLASSES, Network
from softcurve.cli.explain.section import Check, Section
from softcurve.cli.page.picture import Picture, Theme, bars, canvas, cells, picture, powers

ROUNDING = 1e-15


def explain_jacobian(network: Network) -> Section:
    """Take the Jacobian apart for the digit that the network finds hardest to read."""
    row = network.ambiguous()
    x, label, y = (part[row] for part in (network.held_out.x, network.held_out.labels, network.held_out.soft))
    z = network.logits(x[None])[0]
    p = z.softmax(-1)
    jacobian = softcurve.softmax_jacobian(z)
    eigenvalues, ordered = torch.linalg.eigvalsh(jacobian), p.sort().values
    identity = softcurve.softmax_jacobian_product(z, y / p)
    return Section(
        "jacobian",
        "Softmax and its Jacobian",
        figures={
            "label": int(label),
            "p": p.tolist(),
            "eigenvalues": eigenvalues.tolist(),
            "trace": jacobian.trace().item(),
            "one_minus_p_squared": (1 - p.square().sum()).item(),
        },
        checks=_checks(z, y, jacobian, eigenvalues, ordered),
        pictures=_pictures(x, p, y, jacobian, eigenvalues, ordered),
        tables={
            "identity": list(zip(range(CLASSES), *(v.tolist() for v in (p, y, y / p, identity, y - p)), strict=True)),
            "likeliest": p.topk(2).indices.tolist(),
        },
    )


def _checks(
    z: Float[Tensor, " c"],
    y: Float[Tensor, " c"],
    jacobian: Float[Tensor, "c c"],
    eigenvalues: Float[Tensor, " c"],
    ordered: Float[Tensor, " c"],
) -> tuple[Check, ...]:
    p = z.softmax(-1)
    by_autograd = torch.autograd.functional.jacobian(lambda logits: logits.softmax(-1), z)
    product = softcurve.softmax_jacobian_product(z, y)
    # λ₁ ≤ p₍₁₎ ≤ λ₂ ≤ p₍₂₎ ≤ … ≤ λ_C ≤ p₍C₎: how far any of these is broken.
    broken = torch.cat([eigenvalues - ordered, ordered[:-1] - eigenvalues[1:]]).max()
    heavy = 2.5 * y  # a target of mass 2.5, as class weights make them
    identity = torch.stack(
        [
            softcurve.softmax_jacobian_product(z, y / p) - (y - p),
            softcurve.softmax_jacobian_product(z, heavy / p) - (heavy - 2.5 * p),
        ]
    )

    def at_most(name: str, value: Tensor, bound: float = ROUNDING) -> Check:
        return Check(name, value.abs().max().item(), "≤", bound)

    return (
        at_most("J against diag(p) − ppᵀ", jacobian - (p.diag() - p.outer(p))),
        at_most("J against autograd of softmax", jacobian - by_autograd),
        at_most("J v without J against the matrix product", product - jacobian @ y),
        at_most("J 1 = 0", jacobian.sum(-1)),
        Check("smallest eigenvalue of J", eigenvalues[0].item(), "≥", -ROUNDING),
        Check("second smallest eigenvalue: only one is zero", eigenvalues[1].item(), "≥", 1e-9),
        Check("eigenvalues interlace with the sorted p: largest breach", broken.item(), "≤", ROUNDING),
        at_most("J(y ⊘ p) = y − (Σy) p, for Σy = 1 and Σy = 2.5", identity, 1e-14),
    )


def _pictures(
    x: Float[Tensor, " 64"],
    p: Float[Tensor, " c"],
    y: Float[Tensor, " c"],
    jacobian: Float[Tensor, "c c"],
    eigenvalues: Float[Tensor, " c"],
    ordered: Float[Tensor, " c"],
) -> dict[str, Picture]:
    image = x.reshape(8, 8).tolist()

    def spectrum(theme: Theme) -> Figure:
        figure, axes = canvas(4.4, 2.9)
        ranks = range(1, CLASSES + 1)
        axes.semilogy(ranks, ordered, "_", color=theme.third, markersize=17, markeredgewidth=2, label="sorted p")
        axes.semilogy(ranks[1:], eigenvalues[1:], "o", color=theme.first, label="eigenvalue λ of J")
        axes.set_xticks(ranks)
        powers(axes.yaxis)
        axes.set_xlabel("rank (λ₁ = 0 has no place on a log scale)")
        axes.legend(loc="lower right")
        return figure

    return {
        "digit": picture(lambda theme: cells(theme, image, signed=False), "The digit, 8 by 8 pixels"),
        "p": picture(
            lambda theme: bars(theme, p.tolist(), target=y.tolist(), width=4.4),
            "Its ten probabilities as bars, with the soft target as lines",
        ),
        "matrix": picture(
            lambda theme: _heat_map(theme, jacobian),
            "The Jacobian as a 10 by 10 heat map: positive on the diagonal, negative elsewhere",
        ),
        "spectrum": picture(
            spectrum,
            "The nine positive eigenvalues of the Jacobian, each between two neighbours of the sorted p",
        ),
    }


def _heat_map(theme: Theme, jacobian: Float[Tensor, "c c"]) -> Figure:
    figure, axes = canvas(4.2, 3.4)
    largest = jacobian.abs().max().item()
    mesh = axes.pcolormesh(
        jacobian.numpy(),
        cmap=theme.signed(),
        vmin=-largest,
        vmax=largest,
        edgecolors=theme.grid,
        linewidth=0.4,
    )
    axes.set_aspect("equal")
    axes.invert_yaxis()
    axes.grid(visible=False)
    centres, names = [k + 0.5 for k in range(CLASSES)], [str(k) for k in range(CLASSES)]
    axes.set_xticks(centres, names)
    axes.set_yticks(centres, names)
    axes.tick_params(length=0)
    axes.set_xlabel("class j")
    axes.set_ylabel("class i")
    bar = figure.colorbar(mesh, ax=axes, shrink=0.9)
    bar.outline.set_visible(False)
    return figure
