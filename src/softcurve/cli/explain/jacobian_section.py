"""The Jacobian of softmax: a picture, its eigenvalues, and the identity J(y ⊘ p) = y − (Σy) p."""

from __future__ import annotations

import torch
from matplotlib.figure import Figure
from torch import Tensor

import softcurve
from softcurve.array_types import Float
from softcurve.cli.explain.network import CLASSES, Network
from softcurve.cli.page.picture import FIRST, THIRD, bars, canvas, cells, line_chart, matrix_chart, picture
from softcurve.cli.page.section import Check, Section

ROUNDING = 1e-15


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
        checks=_checks(z, y, jacobian, eigenvalues, ordered),
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
