"""The formulas of `reference.py`, held to 50 digits and to derivatives by autograd of the formula before."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.autograd.functional import jacobian

from softcurve import reference

from . import oracle
from .oracle import MP

F64 = torch.float64
Z = torch.tensor([0.3, -1.2, 2.0, 0.7], dtype=F64)
Y = torch.tensor([0.1, 0.0, 0.65, 0.25], dtype=F64)
FULL = torch.tensor([0.1, 0.2, 0.45, 0.25], dtype=F64)
P = torch.softmax(Z, -1)
EXACT = {"rtol": 1e-14, "atol": 1e-15}

assert_close = torch.testing.assert_close


def as_tensor(row: list[object]) -> Tensor:
    return torch.tensor([float(v) for v in row], dtype=F64)  # type: ignore[arg-type]


@pytest.mark.parametrize("z", [Z, 30 * Z, Z + 1e3, -400 * Z])
def test_softmax(z: Tensor) -> None:
    assert_close(reference.softmax(z), as_tensor(oracle.exact_softmax(oracle.exact(z))), **EXACT)


def test_jacobian() -> None:
    """Elementwise and as a matrix, against central differences of 50 digits."""
    z, h = oracle.exact(Z), MP.mpf(10) ** -20
    J = reference.softmax_jacobian(P)
    for j in range(4):
        up, down = ([v + s * h * (k == j) for k, v in enumerate(z)] for s in (1, -1))
        column = [(a - b) / (2 * h) for a, b in zip(oracle.exact_softmax(up), oracle.exact_softmax(down), strict=True)]
        assert_close(J[:, j], as_tensor(column), **EXACT)
        for i in range(4):
            assert_close(reference.softmax_derivative(P, i, j), J[i, j], **EXACT)
    assert torch.equal(J, J.T)
    assert reference.softmax_jacobian(torch.rand(2, 3, 4, dtype=F64)).shape == (2, 3, 4, 4)


@pytest.mark.parametrize("base", [math.e, 2.0, 10.0])
def test_entropy_cross_entropy_kl(base: float) -> None:
    y, p = oracle.exact(Y), oracle.exact(P)
    unit = MP.log(MP.mpf(base)) if base != math.e else 1
    information = [(a, -MP.log(b)) for a, b in zip(y, p, strict=True)]
    cross = MP.fsum(a * i for a, i in information) / unit
    own = -MP.fsum(a * MP.log(a) for a in y if a) / unit
    assert oracle.relative_error(reference.cross_entropy(Y, P, base).item(), cross) < 1e-15
    assert oracle.relative_error(reference.entropy(Y, base).item(), own) < 1e-15
    for kl in (reference.kl_divergence, reference.forward_kl, reference.kl_from_cross_entropy):
        of_y_and_p = kl(Y, P, base)
        assert oracle.relative_error(of_y_and_p.item(), cross - own) < 1e-14
    assert (
        oracle.relative_error(reference.reverse_kl(FULL, P, base).item(), oracle.exact_kl(p, oracle.exact(FULL)) / unit)
        < 1e-14
    )


def test_bits() -> None:
    half, certain = torch.tensor([0.5, 0.5]), torch.tensor([1.0, 0.0])
    assert reference.entropy(half, base=2.0) == 1
    assert reference.kl_divergence(certain, half, base=2.0) == 1
    assert reference.kl_divergence(half, certain) == math.inf
    assert reference.entropy(certain) == 0
    assert reference.cross_entropy(certain, certain) == 0


def by_logits(loss: object, z: Tensor) -> Tensor:
    return jacobian(lambda z: loss(torch.softmax(z, -1)), z)  # type: ignore[operator]


def test_chain_of_cross_entropy() -> None:
    """Each link against autograd of the formula that it differentiates."""
    loss = lambda p: -(Y * torch.log(p)).sum()  # noqa: E731
    assert_close(reference.dL_dp(Y, P), jacobian(loss, P), **EXACT)
    assert_close(reference.dL_dz(Y, P), by_logits(loss, Z), **EXACT)
    assert_close(reference.dL_dz(Y, P), P - Y, **EXACT)
    W, e, b = torch.randn(4, 3, dtype=F64), torch.randn(3, dtype=F64), torch.randn(4, dtype=F64)
    of_head = lambda e, W: loss(torch.softmax(W @ e + b, -1))  # noqa: E731
    g = reference.dL_dz(Y, torch.softmax(W @ e + b, -1))
    in_e, in_W = jacobian(of_head, (e, W))
    assert_close(reference.dL_de(g, W), in_e, **EXACT)
    assert_close(reference.dL_dW(g, e), in_W, **EXACT)
    x, theta = torch.randn(5, dtype=F64), torch.randn(3, 5, dtype=F64)
    features = lambda x, theta: torch.tanh(theta @ x)  # noqa: E731
    e, pull_back = torch.func.vjp(features, x, theta)
    dL_de = reference.dL_de(reference.dL_dz(Y, torch.softmax(W @ e + b, -1)), W)
    in_x, in_theta = jacobian(lambda x, theta: of_head(features(x, theta), W), (x, theta))
    assert_close(reference.dL_dx(lambda g: pull_back(g)[0], dL_de), in_x, **EXACT)
    assert_close(reference.dL_dtheta(lambda g: {"theta": pull_back(g)[1]}, dL_de)["theta"], in_theta, **EXACT)


@pytest.mark.parametrize("mass", [1.0, 0.4, 2.5, 0.0])
def test_basic_identity(mass: float) -> None:
    """``J(y ⊘ p) = y − (Σy) p``, for a target of any mass, by the matrix itself."""
    y = mass * Y
    J = torch.diag(P) - torch.outer(P, P)
    assert_close(reference.basic_identity(y, P), J @ (y / P), **EXACT)
    assert_close(reference.basic_identity(y, P), y - y.sum() * P, **EXACT)
    assert_close(reference.dL_dz(y, P), J @ reference.dL_dp(y, P), **EXACT)


def test_gradients_of_kl_in_both_arguments() -> None:
    kl = lambda p, q: (p * torch.log(p / q)).sum()  # noqa: E731
    in_p, in_q = jacobian(kl, (P, FULL))
    assert_close(reference.kl_gradient_in_first(P, FULL), in_p, **EXACT)
    assert_close(reference.kl_gradient_in_second(P, FULL), in_q, **EXACT)
    z_q = torch.log(FULL)
    assert_close(reference.kl_gradient_in_first_logits(P, FULL), by_logits(lambda p: kl(p, FULL), Z), **EXACT)
    assert_close(reference.kl_gradient_in_second_logits(P, FULL), by_logits(lambda q: kl(P, q), z_q), **EXACT)
    assert_close(reference.kl_gradient_in_second_logits(FULL, P), reference.dL_dz(FULL, P), **EXACT)


def test_gap_of_kl_and_cross_entropy_is_the_entropy() -> None:
    """Whatever the model: so their gradients agree."""
    for _ in range(5):
        p = torch.softmax(torch.randn(4, dtype=F64), -1)
        assert_close(
            reference.cross_entropy(Y, p) - reference.forward_kl(Y, p), reference.entropy(Y), rtol=1e-13, atol=0
        )
