"""Which distribution the KL(q‖prior) of a VAE moves: three descents on the simplex of three categories."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from matplotlib.figure import Figure
from torch import Tensor

import softcurve
from softcurve.array_types import Float
from softcurve.cli.page.picture import FIRST, MUTED, SECOND, SURFACE, canvas, picture
from softcurve.cli.page.render import Check, Section

POSTERIORS = ((0.90, 0.06, 0.04), (0.08, 0.86, 0.06), (0.05, 0.10, 0.85), (0.15, 0.05, 0.80))
PRIOR = (0.2, 0.5, 0.3)
STEPS, RATE = 200, 1.0
CORNERS = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.5, math.sqrt(3) / 2]], dtype=torch.float64)

Loss = Callable[[Tensor, Tensor], Tensor]


class Descent(NamedTuple):
    """The path of q(z|x) for each x, the path of the prior, and the figures of the record."""

    q: Float[Tensor, "steps n 3"]
    prior: Float[Tensor, "steps 3"]
    figures: dict[str, Any]


def explain_vae() -> Section:
    """Descend KL(q‖prior) with the prior fixed and learned, and H(q, prior) in place of KL."""
    cases = {"fixed": (_divergence, False), "learned": (_divergence, True), "cross_entropy": (_cross_entropy, False)}
    runs = {name: _descend(loss, learned=learned) for name, (loss, learned) in cases.items()}
    fixed, learned = runs["fixed"].figures, runs["learned"].figures
    wrt_q, wrt_prior, closed = _gradients()
    in_corner = runs["cross_entropy"].q[-1, :, max(range(3), key=PRIOR.__getitem__)].min().item()
    return Section(
        "vae",
        {"pictures": {name: picture(_simplex, run) for name, run in runs.items()}},
        figures={
            "runs": {name: run.figures for name, run in runs.items()},
            "ce_against_kl_gradient_in_q": wrt_q,
            "ce_against_kl_gradient_in_prior": wrt_prior,
            "steps": STEPS,
        },
        checks=(
            Check(
                "prior fixed: number of gradients that reach it",
                float(fixed["first_gradient_in_prior"] is not None),
                "=",
                0.0,
            ),
            Check("prior fixed: total-variation distance that it moves", fixed["prior_moved"], "=", 0.0),
            Check(
                "prior fixed: total-variation distance of q from it at the end", fixed["distance_at_the_end"], "≤", 1e-6
            ),
            Check("prior learned: norm of its gradient at the start", learned["first_gradient_in_prior"], "≥", 0.1),
            Check("prior learned: total-variation distance that it moves", learned["prior_moved"], "≥", 0.02),
            Check(
                "gradients of KL with respect to q and the prior and their closed forms: largest difference",
                closed,
                "≤",
                1e-14,
            ),
            Check(
                "gradients of cross-entropy and KL with respect to the prior: largest difference", wrt_prior, "≤", 1e-14
            ),
            Check(
                "gradients of cross-entropy and KL with respect to q: largest difference (they differ)", wrt_q, "≥", 0.1
            ),
            Check(
                "minimum of the cross-entropy over q: probability of the prior's most probable category",
                in_corner,
                "≥",
                0.95,
            ),
            Check(
                "KL of Gaussians in closed form and as a sum over narrow bins: largest difference",
                _gaussians(),
                "≤",
                1e-12,
            ),
        ),
    )


def _divergence(q: Tensor, prior: Tensor) -> Tensor:
    return softcurve.kl_divergence(q, prior.expand_as(q), reduction="sum")


def _cross_entropy(q: Tensor, prior: Tensor) -> Tensor:
    return _divergence(q, prior) + softcurve.entropy(q).sum()


def _start() -> tuple[Float[Tensor, "n 3"], Float[Tensor, " 3"]]:
    return torch.tensor(POSTERIORS, dtype=torch.float64).log(), torch.tensor(PRIOR, dtype=torch.float64).log()


def _descend(loss: Loss, *, learned: bool) -> Descent:
    """Descend on the logits of q, and of the prior where it is learned, by its mean gradient over x."""
    q, prior = _start()
    q.requires_grad_()
    prior.requires_grad_(learned)
    optimizer = torch.optim.SGD([{"params": [q], "lr": RATE}, {"params": [prior], "lr": RATE / len(q)}])
    path, norms = [], []
    for _ in range(STEPS + 1):
        path.append((q.detach().softmax(-1), prior.detach().softmax(-1)))
        optimizer.zero_grad()
        loss(q, prior).backward()
        norms.append([each.grad.norm().item() for each in (q, prior) if each.grad is not None])
        optimizer.step()
    qs, priors = (torch.stack(states) for states in zip(*path, strict=True))
    figures = {
        "first_gradient_in_q": norms[0][0], "first_gradient_in_prior": norms[0][1] if learned else None,
        "q_moved": _variation(qs[-1], qs[0]), "prior_moved": _variation(priors[-1], priors[0]),
        "distance_at_the_end": _variation(qs[-1], priors[-1]), "q_at_the_end": qs[-1, 0].tolist(),
        "prior_at_the_end": priors[-1].tolist(),
    }  # fmt: skip
    return Descent(qs, priors, figures)


def _gaussians() -> float:
    """Return the largest error of the closed form of D(N(μ, σ²)‖N(0, 1)) against bins of a hundredth."""
    grid, errors = torch.arange(-12, 12, 0.01, dtype=torch.float64), []
    for mu, sigma in ((1.5, 0.5), (-1.0, 1.2), (0.0, 1.0)):
        closed = (mu**2 + sigma**2 - 1 - math.log(sigma**2)) / 2
        q, prior = -(((grid - mu) / sigma) ** 2) / 2, -(grid**2) / 2
        errors.append(abs(closed - softcurve.kl_divergence(q, prior, reduction="sum").item()))
    return max(errors)


def _variation(p: Tensor, q: Tensor) -> float:
    """Return the largest total variation between rows of p and of q."""
    return ((p - q).abs().sum(-1) / 2).max().item()


def _gradients() -> tuple[float, float, float]:
    """Return the largest difference of CE and KL w.r.t. q and the prior, and that of KL from its closed forms."""
    q, prior = (logits.requires_grad_() for logits in _start())
    kl = torch.autograd.grad(_divergence(q, prior), (q, prior))
    ce = torch.autograd.grad(_cross_entropy(q, prior), (q, prior))
    with torch.no_grad():
        # ∂KL/∂z_q = J_q (log q − log r), as for reverse KL; ∂KL/∂z_r = r − q, as for forward KL, summed over x.
        wrt_q = softcurve.softmax_jacobian_product(q, q.log_softmax(-1) - prior.log_softmax(-1))
        wrt_prior = (prior.softmax(-1) - q.softmax(-1)).sum(0)
        deviation = max((kl[0] - wrt_q).abs().max().item(), (kl[1] - wrt_prior).abs().max().item())
    return (ce[0] - kl[0]).abs().max().item(), (ce[1] - kl[1]).abs().max().item(), deviation


def _simplex(run: Descent) -> Figure:
    figure, axes = canvas(3.1, 2.8, left=0.05, bottom=0.05, rest=0.05)
    corners = CORNERS.tolist()
    axes.plot(*zip(*corners, corners[0], strict=True), color=MUTED, linewidth=0.8)
    for k, (x, y) in enumerate(corners):
        shift, side = (0.04, "bottom") if k == 2 else (-0.04, "top")
        axes.text(x, y + shift, f"k = {k + 1}", ha="center", va=side, color=MUTED)

    def draw(path: Float[Tensor, "steps 3"], color: str, width: float, marker: str, size: int) -> None:
        points = (path @ CORNERS).tolist()
        axes.plot(*zip(*points, strict=True), color=color, linewidth=width)
        axes.plot(*points[0], marker, color=SURFACE, markeredgecolor=color, markersize=size)
        axes.plot(*points[-1], marker, color=color, markersize=size - 2)

    for row in range(len(POSTERIORS)):
        draw(run.q[:, row], FIRST, 1.4, "o", 6)
    draw(run.prior, SECOND, 2.4, "D", 7)
    axes.set(xlim=(-0.08, 1.08), ylim=(-0.12, 1.0), aspect="equal")
    axes.set_axis_off()
    return figure
