"""Value, score, curve and cross term of each divergence, against derivatives of φ by mpmath in 50 digits."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

from softcurve.losses.divergences import (
    Divergence,
    ForwardKL,
    JensenShannon,
    Pair,
    ReverseKL,
    divergence_of,
    excess,
    log_mixture,
)

from .oracle import MP, relative_error

BETAS = (0.01, 0.3, 0.5, 0.9)


def forward(p: Any, y: Any) -> Any:
    return y * MP.log(y / p) - y + p


def reverse(p: Any, y: Any) -> Any:
    return forward(y, p)


def jensen(beta: float) -> Callable[[Any, Any], Any]:
    b = MP.mpf(beta)

    def phi(p: Any, y: Any) -> Any:
        m = (1 - b) * p + b * y
        return b * forward(m, y) + (1 - b) * forward(m, p)

    return phi


MEMBERS: list[tuple[Divergence, Callable[[Any, Any], Any]]] = [
    (ForwardKL(), forward),
    (ReverseKL(), reverse),
    *((JensenShannon(beta), jensen(beta)) for beta in BETAS),
]
POINTS = [(0.3, 0.2), (0.3, 0.30000001), (1e-6, 0.9), (0.9, 1e-6), (0.5, 0.5), (1e-30, 1e-28), (0.999, 0.4)]


def pair_of(p: float, y: float) -> Pair:
    """One class, with the log-ratio and difference right to the last digit."""
    ratio, difference = float(MP.log(MP.mpf(p) / MP.mpf(y))), float(MP.mpf(p) - MP.mpf(y))
    return Pair(*(torch.tensor([v], dtype=torch.float64) for v in (p, y, ratio, difference)))


@pytest.mark.parametrize(("p", "y"), POINTS)
@pytest.mark.parametrize(("divergence", "phi"), MEMBERS, ids=[repr(d) for d, _ in MEMBERS])
def test_derivatives_of_phi(divergence: Divergence, phi: Callable[[Any, Any], Any], p: float, y: float) -> None:
    pair, at = pair_of(p, y), (MP.mpf(p), MP.mpf(y))
    with MP.workdps(80):
        first = MP.diff(phi, at, (1, 0), h=at[0] * MP.mpf(10) ** -25)
        second = MP.diff(lambda a: phi(a, at[1]), at[0], 2, h=at[0] * MP.mpf(10) ** -20)
        mixed = MP.diff(
            lambda a: MP.diff(lambda b: phi(a, b), at[1], h=at[1] * MP.mpf(10) ** -20),
            at[0],
            h=at[0] * MP.mpf(10) ** -20,
        )
        expected = {
            "value": phi(*at),
            "score": at[0] * first,
            "curve": at[0] * first + at[0] ** 2 * second,
            "cross": at[0] * at[1] * mixed,
        }
    for name, truth in expected.items():
        got = getattr(divergence, name)(pair).sum().item()
        scale = max(abs(truth), MP.mpf(10) ** -16 * min(at) if name == "score" else 0)
        if scale == 0:
            assert got == 0, name
        else:  # a curve near p = y is a sum of two small terms
            assert abs(MP.mpf(got) - truth) <= 4e-14 * scale, (name, got, truth)


@pytest.mark.parametrize(("divergence", "phi"), MEMBERS, ids=[repr(d) for d, _ in MEMBERS])
def test_exchanged(divergence: Divergence, phi: Callable[[Any, Any], Any]) -> None:
    for point in POINTS:
        pair = pair_of(*point)
        other = divergence.exchanged()
        torch.testing.assert_close(other.value(pair.exchanged()), divergence.value(pair), rtol=1e-14, atol=0)
        torch.testing.assert_close(other.cross(pair.exchanged()), divergence.cross(pair), rtol=1e-14, atol=0)
        assert type(other.exchanged()) is type(divergence)


def masked_pair(p: float, y: float) -> Pair:
    ratio = 0.0 if p == y == 0 else (-math.inf if p == 0 else math.inf)
    return Pair(*(torch.tensor([v], dtype=torch.float64) for v in (p, y, ratio, p - y)))


MASKED = [  # divergence, value at (0, y), (p, 0) by the limits of φ
    (ForwardKL(), math.inf, lambda p: p),
    (ReverseKL(), 0.7, lambda p: math.inf),
    (
        JensenShannon(0.3),
        0.7 * float(jensen(0.3)(MP.mpf(10) ** -40, MP.mpf(1))),
        lambda p: p * float(jensen(0.3)(MP.mpf(1), MP.mpf(10) ** -40)),
    ),
]


@pytest.mark.parametrize(("divergence", "at_no_model", "at_no_target"), MASKED)
def test_masked_entries(divergence: Divergence, at_no_model: float, at_no_target: Callable[[float], float]) -> None:
    """The limits of φ where one side, or both, have no mass; no part in score or curve where the model has none."""
    without_model, without_target, nothing = masked_pair(0.0, 0.7), masked_pair(0.4, 0.0), masked_pair(0.0, 0.0)
    assert divergence.value(without_model).item() == pytest.approx(at_no_model, rel=1e-14)
    assert divergence.value(without_target).item() == pytest.approx(at_no_target(0.4), rel=1e-14)
    for name in ("value", "score", "curve", "cross"):
        assert getattr(divergence, name)(nothing).sum().item() == 0, name
    if not isinstance(divergence, ForwardKL):  # whose gauge has s = p − y
        assert divergence.score(without_model).item() == 0
        assert divergence.curve(without_model).item() == 0
    assert not divergence.score(without_target).isnan().any()
    assert not divergence.curve(without_target).isnan().any()


@pytest.mark.parametrize("t", [0.0, 1e-300, 1e-9, -1e-9, 1e-3, -0.3, 0.4999, 0.5, -0.5, 0.5001, -0.7, 3.0, -40.0, 60.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_excess(t: float, dtype: torch.dtype) -> None:
    """``a (e^t − 1 − t)``, relatively, where the plain formula would lose everything to 1."""
    exact = torch.tensor([t], dtype=dtype)
    e = MP.mpf(exact.item())
    difference = torch.tensor([float(MP.exp(e) - 1)], dtype=dtype)
    got = excess(torch.ones(1, dtype=dtype), difference, exact).item()
    truth = MP.exp(e) - 1 - e
    ulp = torch.finfo(dtype).eps
    assert got >= 0
    if truth < torch.finfo(dtype).tiny:
        assert got <= torch.finfo(dtype).tiny
    else:
        assert relative_error(got, truth) <= 12 * ulp


@pytest.mark.parametrize("weight", [1e-6, 1e-3, 0.3, 0.5, 0.999])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_log_mixture(weight: float, dtype: torch.dtype) -> None:
    """Relatively, where it is nearly 0, where ``e^t`` overflows, and where it is the log of a small weight."""
    w = MP.mpf(weight)
    for t in (-math.inf, -800.0, -30.0, -1.0, -1e-12, 0.0, 1e-12, 0.999, 1.0, 1.001, 30.0, 79.0, 81.0, 800.0):
        exact = torch.tensor([t], dtype=dtype)
        got = log_mixture(exact, weight).item()
        truth = MP.log(1 - w) if t == -math.inf else MP.log((1 - w) + w * MP.exp(MP.mpf(exact.item())))
        if truth == 0:
            assert got == 0, t
        else:
            assert relative_error(got, truth) <= 6 * torch.finfo(dtype).eps, t


def test_ends() -> None:
    assert divergence_of("js", 0.0) == ForwardKL()
    assert divergence_of("js", 1.0) == ReverseKL()
    assert divergence_of("js", 0.25) == JensenShannon(0.25)
