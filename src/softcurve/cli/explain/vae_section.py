"""Which distribution a VAE's KL(q‖prior) moves: three descents on the simplex of three categories."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from matplotlib.figure import Figure
from torch import Tensor

import softcurve
from softcurve.array_types import Float
from softcurve.cli.explain.section import Check, Section
from softcurve.cli.page.picture import Theme, canvas, picture

POSTERIORS = ((0.90, 0.06, 0.04), (0.08, 0.86, 0.06), (0.05, 0.10, 0.85), (0.15, 0.05, 0.80))
PRIOR = (0.2, 0.5, 0.3)
STEPS = 200
RATE = 1.0
CORNERS = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.5, math.sqrt(3) / 2]], dtype=torch.float64)

Loss = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Descent:
    """Where q(z|x) of each x and the prior were, step by step, and the first gradients in their logits."""

    q: Float[Tensor, "steps n 3"]
    prior: Float[Tensor, "steps 3"]
    q_gradient: float
    prior_gradient: float | None

    def distance(self) -> float:
        """The largest total variation between an end of q and the end of the prior."""
        return (self.q[-1] - self.prior[-1]).abs().sum(-1).max().item() / 2

    def moved(self) -> tuple[float, float]:
        """How far, in total variation, the furthest q and the prior have moved."""
        q, prior = ((path[-1] - path[0]).abs().sum(-1) / 2 for path in (self.q, self.prior))
        return q.max().item(), prior.item()


def explain_vae() -> Section:
    """Descend KL(q‖prior) with the prior fixed and learned, and H(q, prior) in place of KL."""
    fixed = _descend(_divergence, learned=False)
    learned = _descend(_divergence, learned=True)
    crossed = _descend(_cross_entropy, learned=False)
    in_q, in_prior, closed = _gradients()
    mode = max(range(3), key=PRIOR.__getitem__)
    runs = {"fixed": fixed, "learned": learned, "cross_entropy": crossed}
    return Section(
        "vae",
        "Which distribution a VAE's KL moves",
        figures={
            "runs": {name: _record(run) for name, run in runs.items()},
            "ce_against_kl_gradient_in_q": in_q,
            "ce_against_kl_gradient_in_prior": in_prior,
            "steps": STEPS,
        },
        checks=(
            Check("prior fixed: gradients that reach it", float(fixed.prior_gradient is not None), "=", 0.0),
            Check("prior fixed: how far it moves", fixed.moved()[1], "=", 0.0),
            Check("prior fixed: distance of q from it at the end", fixed.distance(), "≤", 1e-6),
            Check("prior learned: its first gradient", learned.prior_gradient or 0.0, "≥", 0.1),
            Check("prior learned: how far it moves", learned.moved()[1], "≥", 0.02),
            Check("gradients in both arguments against their closed forms", closed, "≤", 1e-14),
            Check("gradients of CE and KL in the prior: largest difference", in_prior, "≤", 1e-14),
            Check("gradients of CE and KL in q: largest difference (they are not the same)", in_q, "≥", 0.1),
            Check(
                "CE descended in q: probability of the prior's mode",
                crossed.q[-1, :, mode].min().item(),
                "≥",
                0.95,
            ),
        ),
        pictures={
            "fixed": picture(
                lambda theme: _simplex(theme, fixed),
                "Prior fixed: four paths of q end at the prior, which stays",
            ),
            "learned": picture(
                lambda theme: _simplex(theme, learned),
                "Prior learned: four paths of q and the path of the prior meet",
            ),
            "crossed": picture(
                lambda theme: _simplex(theme, crossed),
                "Cross-entropy in place of KL: four paths of q end in the corner of the prior's mode",
            ),
        },
    )


def _divergence(q: Tensor, prior: Tensor) -> Tensor:
    return softcurve.kl_divergence(q, prior.expand_as(q), reduction="sum")


def _cross_entropy(q: Tensor, prior: Tensor) -> Tensor:
    """H(q, prior) = KL(q‖prior) + H(q)."""
    return _divergence(q, prior) + softcurve.entropy(q).sum()


def _start() -> tuple[Float[Tensor, "n 3"], Float[Tensor, " 3"]]:
    return torch.tensor(POSTERIORS, dtype=torch.float64).log(), torch.tensor(PRIOR, dtype=torch.float64).log()


def _descend(loss: Loss, *, learned: bool) -> Descent:
    """Gradient descent on the logits of q, and of the prior where it is learned; the prior takes the mean."""
    q, prior = _start()
    qs, priors = [q.softmax(-1)], [prior.softmax(-1)]
    first = _backward(loss, q, prior, learned=learned)
    for _ in range(STEPS):
        in_q, in_prior = _backward(loss, q, prior, learned=learned)
        q = q - RATE * in_q
        if in_prior is not None:
            prior = prior - RATE * in_prior / len(q)
        qs.append(q.softmax(-1))
        priors.append(prior.softmax(-1))
    in_prior_norm = None if first[1] is None else first[1].norm().item()
    return Descent(torch.stack(qs), torch.stack(priors), first[0].norm().item(), in_prior_norm)


def _backward(loss: Loss, q: Tensor, prior: Tensor, *, learned: bool) -> tuple[Tensor, Tensor | None]:
    """The gradients that a backward pass leaves in q and in the prior: None in a fixed one."""
    q, prior = q.detach().requires_grad_(), prior.detach().requires_grad_(learned)
    loss(q, prior).backward()
    assert q.grad is not None
    return q.grad, prior.grad


def _gradients() -> tuple[float, float, float]:
    """CE against KL: the largest difference in q and in the prior; and KL against its closed forms."""
    q, prior = (logits.requires_grad_() for logits in _start())
    kl = torch.autograd.grad(_divergence(q, prior), (q, prior))
    ce = torch.autograd.grad(_cross_entropy(q, prior), (q, prior))
    with torch.no_grad():
        probabilities, expected = q.softmax(-1), prior.softmax(-1)
        # ∂KL/∂z_q = J_q (log q − log r), as of reverse KL; ∂KL/∂z_r = r − q, as of forward KL, summed over x.
        in_q = softcurve.softmax_jacobian_product(q, q.log_softmax(-1) - prior.log_softmax(-1))
        in_prior = (expected - probabilities).sum(0)
        deviation = max((kl[0] - in_q).abs().max().item(), (kl[1] - in_prior).abs().max().item())
    return (ce[0] - kl[0]).abs().max().item(), (ce[1] - kl[1]).abs().max().item(), deviation


def _record(run: Descent) -> dict[str, object]:
    q, prior = run.moved()
    return {
        "first_gradient_in_q": run.q_gradient,
        "first_gradient_in_prior": run.prior_gradient,
        "q_moved": q,
        "prior_moved": prior,
        "distance_at_the_end": run.distance(),
        "q_at_the_end": run.q[-1, 0].tolist(),
        "prior_at_the_end": run.prior[-1].tolist(),
    }


def _simplex(theme: Theme, run: Descent) -> Figure:
    figure, axes = canvas(3.1, 2.8, left=0.05, bottom=0.05, rest=0.05)
    corners = [*CORNERS.tolist(), CORNERS[0].tolist()]
    axes.plot(*zip(*corners, strict=True), color=theme.muted, linewidth=0.8)
    for k, (x, y) in enumerate(CORNERS.tolist()):
        axes.text(
            x,
            y + (0.04 if k == 2 else -0.04),
            f"k = {k + 1}",
            ha="center",
            color=theme.muted,
            va="bottom" if k == 2 else "top",
        )
    for row in range(len(POSTERIORS)):
        path = (run.q[:, row] @ CORNERS).tolist()
        axes.plot(*zip(*path, strict=True), color=theme.first, linewidth=1.4)
        axes.plot(*path[0], "o", color=theme.surface, markeredgecolor=theme.first, markersize=6)
        axes.plot(*path[-1], "o", color=theme.first, markersize=4)
    path = (run.prior @ CORNERS).tolist()
    axes.plot(*zip(*path, strict=True), color=theme.second, linewidth=2.4)
    axes.plot(*path[0], "D", color=theme.surface, markeredgecolor=theme.second, markersize=7)
    axes.plot(*path[-1], "D", color=theme.second, markersize=5)
    axes.set_xlim(-0.08, 1.08)
    axes.set_ylim(-0.12, 1.0)
    axes.set_aspect("equal")
    axes.set_axis_off()
    return figure
