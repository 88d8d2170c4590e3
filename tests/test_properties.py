"""What holds of every divergence whatever the numbers: drawn by hypothesis."""

from __future__ import annotations

import math

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import assume, example, given, settings
from torch import Tensor

import softcurve

DTYPES = st.sampled_from([torch.float32, torch.float64])
few = settings(max_examples=40)  # of the dearer ones
BETAS = st.sampled_from([0.0, 1e-3, 0.25, 0.5, 0.8, 1.0])


def as_logits(*sides: Tensor | softcurve.TopK) -> list[softcurve.Logits | softcurve.TopK]:
    """Said outright: rows such as (0, 1) are drawn too, and look like probabilities."""
    return [softcurve.Logits(side) if isinstance(side, Tensor) else side for side in sides]


def KL(p: Tensor | softcurve.TopK, q: Tensor | softcurve.TopK) -> Tensor:
    return softcurve.kl_divergence(*as_logits(p, q))


def JS(p: Tensor | softcurve.TopK, q: Tensor | softcurve.TopK, **options: float) -> Tensor:
    return softcurve.js_divergence(*as_logits(p, q), **options)


@st.composite
def rows(draw: st.DrawFn, count: int = 2, largest: float = 30.0, masks: bool = False) -> list[Tensor]:
    """``count`` rows of logits over the same 2 … 9 classes, on a grid of 2⁻¹⁰, sometimes tied, sometimes masked."""
    classes, dtype = draw(st.integers(2, 9)), draw(DTYPES)
    entry = st.integers(-int(largest * 1024), int(largest * 1024)).map(lambda n: n / 1024)
    entry = st.one_of(entry, st.sampled_from([0.0, 1.0, -largest, largest]))
    drawn = [draw(st.lists(entry, min_size=classes, max_size=classes)) for _ in range(count)]
    if masks:
        for row in drawn:
            for k in draw(st.sets(st.integers(1, classes - 1))):
                row[k] = -math.inf
    return [torch.tensor(row, dtype=dtype) for row in drawn]


def total_variation(p: Tensor, q: Tensor) -> float:
    return float((torch.softmax(p.double(), -1) - torch.softmax(q.double(), -1)).abs().sum() / 2)


@given(rows(masks=True), BETAS)
def test_never_negative(pair: list[Tensor], beta: float) -> None:
    """And by Pinsker's inequality at least ``2 TV²``, so that it is zero only where the two are equal."""
    p, q = pair
    ulp = torch.finfo(p.dtype).eps
    for kl in (KL(p, q), KL(q, p)):
        assert kl >= 0
        assert kl * (1 + 20 * ulp) >= 2 * total_variation(p, q) ** 2 * (1 - 20 * ulp) - 20 * ulp**2
    assert JS(p, q, beta=beta) >= 0


@given(rows(count=1, masks=True), st.sampled_from([0.0, -7.0, 512.0, 1e4]), BETAS)
def test_zero_of_equals(only: list[Tensor], offset: float, beta: float) -> None:
    """Equal up to an offset, which the grid keeps exact: exactly zero."""
    (p,) = only
    q = p + offset
    assume(torch.equal(q - offset, p))
    assert KL(p, q).item() == 0
    assert JS(p, q, beta=beta).item() == 0


@given(rows(), st.integers(0, 8))
def test_positive_of_unequals(pair: list[Tensor], at: int) -> None:
    """One logit one grid step apart is already a positive divergence, to the right first digits."""
    p, _ = pair
    q = p.clone()
    q[at % len(p)] += 1 / 1024
    probability = torch.softmax(p.double(), -1)[at % len(p)]
    assume(probability * (1 - probability) > 1e-30)
    step = 1 / 1024
    truth = torch.log1p(probability * math.expm1(step)) - probability * step
    assume(truth > 1e-35)
    # log1p(a) − b cancels: p small leaves p (e^s − 1 − s), near 1 the other class's share.
    assert KL(p, q).item() == pytest.approx(float(truth), rel=2e-3)
    assert KL(p, q).item() > 0


@few
@given(rows(), st.sampled_from([-1e3, -3.0, 0.5, 64.0]), BETAS)
def test_shift_invariance(pair: list[Tensor], offset: float, beta: float) -> None:
    """Of every loss, in every logits argument."""
    p, q = pair
    losses = [
        lambda p, q: softcurve.cross_entropy(p, torch.tensor(1)),
        lambda p, q: softcurve.cross_entropy(p, torch.tensor(0), label_smoothing=0.2, temperature=2.0),
        lambda p, q: softcurve.cross_entropy(p, softcurve.Logits(q)),
        lambda p, q: softcurve.entropy(p),
        lambda p, q: KL(p, q),
        lambda p, q: JS(p, q, beta=beta),
        lambda p, q: softcurve.softmax_jacobian(p),
        lambda p, q: softcurve.softmax_jacobian_product(p, q),
    ]
    ulp = torch.finfo(p.dtype).eps
    for number, loss in enumerate(losses):
        base = loss(p, q)
        seconds = (q,) if number == 7 else (q, q + offset)  # there it is a vector
        for first in (p, p + offset):
            for second in seconds:
                torch.testing.assert_close(loss(first, second), base, rtol=100 * ulp, atol=4 * ulp)


@given(rows(masks=True))
def test_jensen_shannon_is_symmetric_at_one_half(pair: list[Tensor]) -> None:
    p, q = pair
    ulp = torch.finfo(p.dtype).eps
    torch.testing.assert_close(JS(p, q), JS(q, p), rtol=20 * ulp, atol=0)


@given(rows(masks=True), BETAS)
def test_jensen_shannon_exchanged(pair: list[Tensor], beta: float) -> None:
    """``JS_β(P, Q) = JS_{1−β}(Q, P)``, the ends included."""
    p, q = pair
    ulp = torch.finfo(p.dtype).eps
    torch.testing.assert_close(JS(p, q, beta=beta), JS(q, p, beta=1 - beta), rtol=100 * ulp, atol=ulp**2)


@given(rows(largest=80.0, masks=True), st.sampled_from([1e-3, 0.25, 0.5, 0.8]))
def test_jensen_shannon_is_bounded(pair: list[Tensor], beta: float) -> None:
    """By the entropy of ``(β, 1 − β)``, which is log 2 at one half; reached where the supports are apart."""
    p, q = pair
    bound = -beta * math.log(beta) - (1 - beta) * math.log1p(-beta)
    assert JS(p, q, beta=beta).item() <= bound * (1 + 8 * torch.finfo(p.dtype).eps)
    apart = torch.tensor([0.0, -math.inf], dtype=p.dtype)
    assert JS(apart, apart.flip(0), beta=beta).item() == pytest.approx(bound, rel=8 * torch.finfo(p.dtype).eps)


@few
@given(rows(largest=4.0))
@example([torch.tensor([0.0, 2.0], dtype=torch.float64), torch.tensor([1.0, 0.0], dtype=torch.float64)])
def test_jensen_shannon_tends_to_the_divergences(pair: list[Tensor]) -> None:
    """``JS_β / (β (1 − β)) → D(P‖Q)`` as β → 0 and ``D(Q‖P)`` as β → 1, linearly in the distance to the end."""
    p, q = (z.double() for z in pair)
    assume(KL(p, q) > 1e-6)
    for near, end in ((lambda b: JS(p, q, beta=b), KL(p, q)), (lambda b: JS(p, q, beta=1 - b), KL(q, p))):
        far, close, closer = ((near(b) / (b * (1 - b)) / end - 1).abs().item() for b in (1e-2, 1e-4, 1e-6))
        assert close <= far / 10 + 1e-9
        assert closer <= far / 100 + 1e-9


@given(rows(count=1, masks=True))
def test_entropy_is_bounded(only: list[Tensor]) -> None:
    """By 0 and by ``log C``, C the classes that are not masked, which the uniform distribution attains."""
    (z,) = only
    kept = int((z > -math.inf).sum())
    ulp = torch.finfo(z.dtype).eps
    assert 0 <= softcurve.entropy(z).item() <= math.log(kept) * (1 + 4 * ulp)
    uniform = torch.where(z > -math.inf, 0.0, z)
    assert softcurve.entropy(uniform).item() == pytest.approx(math.log(kept), rel=4 * ulp)


@given(rows())
def test_cross_entropy_is_entropy_and_divergence(pair: list[Tensor]) -> None:
    """The decomposition ``H(y, p) = H(y) + D(y‖p)``."""
    y, p = pair
    ulp = torch.finfo(y.dtype).eps
    whole = softcurve.cross_entropy(p, softcurve.Logits(y))
    torch.testing.assert_close(softcurve.entropy(y) + KL(y, p), whole, rtol=50 * ulp, atol=0)


@few
@given(rows(largest=4.0), st.integers(1, 8), BETAS)
def test_data_processing(pair: list[Tensor], k: int, beta: float) -> None:
    """Making one outcome of the tail never adds to a divergence, and a tail of one class loses nothing."""
    p, q = (z.double() for z in pair)
    classes = len(p)
    log_p = torch.log_softmax(p, -1)
    top = log_p.topk(min(k, classes - 1))
    bucket = softcurve.TopK(top.indices, top.values)
    for coarse, full in (
        (KL(bucket, q), KL(p, q)),
        (KL(q, bucket), KL(q, p)),
        (JS(bucket, q, beta=beta), JS(p, q, beta=beta)),
    ):
        assert coarse >= 0
        assert coarse <= full * (1 + 1e-9) + 1e-13
    if k >= classes - 1:
        torch.testing.assert_close(KL(bucket, q), KL(p, q), rtol=1e-9, atol=1e-13)


@given(rows(largest=8.0))
def test_jacobian(pair: list[Tensor]) -> None:
    """Symmetric, ``J 1 = 0``, positive semidefinite with eigenvalues at most ½, and its product is its product."""
    z, v = pair
    J = softcurve.softmax_jacobian(z)
    ulp = torch.finfo(z.dtype).eps
    assert torch.equal(J, J.T)
    assert (J.sum(-1).abs() <= 4 * ulp * J.abs().sum(-1)).all()
    eigenvalues = torch.linalg.eigvalsh(J.double())
    assert eigenvalues.min() >= -8 * ulp * J.diagonal().max()
    assert eigenvalues.max() <= 0.5 * (1 + 8 * ulp)
    product = softcurve.softmax_jacobian_product(z, v)
    torch.testing.assert_close(product, J @ v, rtol=0, atol=float(20 * ulp * v.abs().max()))
    assert softcurve.softmax_jacobian_product(z, torch.full_like(z, 3.0)).abs().max() <= 10 * ulp


@given(rows(largest=8.0))
def test_near_the_minimum_the_divergence_is_its_curvature(pair: list[Tensor]) -> None:
    """``D(z ‖ z + δ) → ½ δᵀ J δ``, in both directions, to the third order of δ."""
    z, direction = (v.double() for v in pair)
    assume(direction.std() > 0.1)
    for step in (1e-3, 1e-5):
        delta = step * direction / direction.abs().max()
        quadratic = 0.5 * (delta * softcurve.softmax_jacobian_product(z, delta)).sum()
        assume(quadratic > 1e-25)
        for kl in (KL(z, z + delta), KL(z + delta, z)):
            assert abs(kl - quadratic) <= 2 * step * quadratic + 1e-10 * quadratic
