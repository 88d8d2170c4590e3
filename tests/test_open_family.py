"""A user's own member of the family, and the built-in ones, against float64 closed forms on every route."""

from __future__ import annotations

import itertools
import math
import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import mpmath
import numpy as np
import pytest
import torch
from torch import Tensor

import softcurve
from softcurve import (
    AlphaDivergence,
    CrossEntropy,
    Divergence,
    ForwardKL,
    JensenShannon,
    LinearTeacher,
    Logits,
    Pair,
    Probabilities,
    ReverseKL,
    SkewKL,
    TopK,
)
from softcurve.curvature import GGN, Direction, HeadCurvature, Hessian
from softcurve.losses.spec import LossSpec

F64 = torch.float64
ROWS, FEATURES, CLASSES = 7, 5, 90


PAGE = (Path(__file__).parent.parent / "docs" / "divergences.md").read_text(encoding="utf-8")
DEFINITION = re.findall(r"(?ms)^```python\n(.*?)^```", PAGE)[0]
NAMES: dict[str, object] = {"__name__": __name__}
exec(DEFINITION, NAMES)
PowerDivergence = NAMES["PowerDivergence"]  # what a user writes: the α-divergence in other letters


def test_the_example_of_the_documentation_is_short():
    """As docs/architecture.md says; test_code_blocks.py runs the page."""
    assert len(DEFINITION.splitlines()) <= 35


# --- oracles in plain torch, on probabilities ----------------------------------------------------------------------------


def phi(member: Divergence, p: Tensor, y: Tensor) -> Tensor:
    """The textbook formula of a member, for autograd to differentiate."""
    if isinstance(member, PowerDivergence | AlphaDivergence):
        a = member.a if isinstance(member, PowerDivergence) else member.alpha
        return (a * y + (1 - a) * p - y**a * p ** (1 - a)) / (a * (1 - a))
    if isinstance(member, SkewKL):
        first, second = (y, p) if member.direction == "forward" else (p, y)
        return first * (first / (member.weight * first + (1 - member.weight) * second)).log()
    if isinstance(member, JensenShannon):
        mixture = (1 - member.beta) * p + member.beta * y
        return member.beta * y * (y / mixture).log() + (1 - member.beta) * p * (p / mixture).log()
    first, second = (y, p) if isinstance(member, ForwardKL) else (p, y)
    return first * (first / second).log()


def rows_of(member: Divergence, z: Tensor, y: Tensor, temperature: float = 1.0) -> Tensor:
    return phi(member, torch.softmax(z / temperature, -1), y).sum(-1)


def bucket_of(member: Divergence, z: Tensor, y: Tensor, indices: Tensor) -> Tensor:
    def coarse(p: Tensor) -> Tensor:
        listed = p.gather(-1, indices)
        return torch.cat([listed, 1 - listed.sum(-1, keepdim=True)], -1)

    return phi(member, coarse(torch.softmax(z, -1)), coarse(y)).sum(-1)


OWN = PowerDivergence(0.4)
MEMBERS = (OWN, PowerDivergence(-0.5), AlphaDivergence(0.5), AlphaDivergence(2.0), SkewKL(0.1), SkewKL(0.3, "reverse"))
IDS = [repr(member) for member in MEMBERS]


@pytest.fixture
def problem():
    torch.manual_seed(0)
    x, w, b = (
        torch.randn(ROWS, FEATURES, dtype=F64),
        torch.randn(CLASSES, FEATURES, dtype=F64),
        torch.randn(CLASSES, dtype=F64),
    )
    t = 2 * torch.randn(ROWS, CLASSES, dtype=F64)
    return x, w, b, t


def same(found, expected, bound=1e-10):
    scale = expected.abs().max().clamp(min=1e-300)
    assert found.shape == expected.shape
    assert ((found - expected).abs().max() / scale) <= bound


def derivatives(value: Tensor, leaves: list[Tensor], seed: int = 1):
    """Gradients, and the Hessian times one fixed direction."""
    first = torch.autograd.grad(value, leaves, create_graph=True)
    generator = torch.Generator().manual_seed(seed)
    along = sum((g * torch.randn(g.shape, generator=generator, dtype=g.dtype)).sum() for g in first)
    return [*first, *torch.autograd.grad(along, leaves)]


def targets(t: Tensor) -> dict[str, object]:
    indices = t.topk(4).indices
    features, weight = torch.randn(ROWS, 3, dtype=F64), torch.randn(CLASSES, 3, dtype=F64)
    return {
        "logits": (Logits(t), torch.softmax(t, -1)),
        "probabilities": (Probabilities(torch.softmax(t, -1)), torch.softmax(t, -1)),
        "teacher": (LinearTeacher(features, weight), torch.softmax(features @ weight.T, -1)),
        "bucket": (TopK(indices, torch.log_softmax(t, -1).gather(-1, indices)), torch.softmax(t, -1)),
    }


@pytest.mark.parametrize("member", MEMBERS, ids=IDS)
def test_every_route_and_target_gives_the_closed_form(member, problem):
    x, w, b, t = problem
    for kind, (target, y) in targets(t).items():
        leaves = [a.clone().requires_grad_() for a in (x, w, b)]
        z = torch.nn.functional.linear(*leaves)
        truth = bucket_of(member, z, y, target.indices) if kind == "bucket" else rows_of(member, z, y)
        expected = [truth.mean(), *derivatives(truth.mean(), leaves)]
        routes = {"logits": None, "whole": None, "cut": 8 * 6000}
        for route, budget in routes.items():
            leaves = [a.clone().requires_grad_() for a in (x, w, b)]
            if route == "logits":
                value = softcurve.divergence(target, torch.nn.functional.linear(*leaves), divergence=member)
            else:
                value = softcurve.linear_divergence(
                    leaves[0], leaves[1], target, linear_bias=leaves[2], divergence=member, memory_budget=budget
                )
            for found, exact in zip([value, *derivatives(value, leaves)], expected, strict=True):
                same(found, exact)


@pytest.mark.parametrize("member", [OWN, AlphaDivergence(0.5)], ids=repr)
def test_a_renormalised_list_is_zero_elsewhere(member, problem):
    x, w, _, t = problem
    indices = t.topk(4).indices
    listed = torch.log_softmax(t, -1).gather(-1, indices)
    y = torch.zeros_like(t).scatter(-1, indices, torch.softmax(listed, -1))
    target = TopK(indices, listed, tail="renormalize")
    leaf = w.clone().requires_grad_()
    truth = rows_of(member, x @ leaf.T, y).mean()
    expected = [truth, *derivatives(truth, [leaf])]
    for budget in (None, 8 * 6000):
        value = softcurve.linear_divergence(x, leaf, target, divergence=member, memory_budget=budget)
        for found, exact in zip([value, *derivatives(value, [leaf])], expected, strict=True):
            same(found, exact)


@pytest.mark.parametrize("member", MEMBERS, ids=IDS)
def test_options_and_the_target_s_gradient(member, problem):
    x, w, _, t = problem
    weights = torch.rand(ROWS, dtype=F64)
    leaves = [a.clone().requires_grad_() for a in (x, w, t)]
    z = 3.0 * torch.tanh(leaves[0] @ leaves[1].T / 3.0)
    truth = (weights * rows_of(member, z, torch.softmax(leaves[2] / 1.7, -1), 1.7)).sum() / weights.sum() / math.log(2)
    expected = [truth, *derivatives(truth, leaves)]
    for budget in (None, 8 * 6000):
        leaves = [a.clone().requires_grad_() for a in (x, w, t)]
        value = softcurve.linear_divergence(
            leaves[0], leaves[1], Logits(leaves[2]), divergence=member, temperature=1.7, softcap=3.0,
            sample_weight=weights, base=2, memory_budget=budget,
        )  # fmt: skip
        for found, exact in zip([value, *derivatives(value, leaves)], expected, strict=True):
            same(found, exact)


@pytest.mark.parametrize("member", MEMBERS, ids=IDS)
def test_curvature(member, problem):
    """Hessian, Gauss-Newton, diagonal and the norms of a head, and of a network; GGN is ``J diag(φ″) J`` of each row."""
    x, w, _, t = problem
    y = torch.softmax(t, -1)
    of_weight = torch.autograd.functional.hessian(lambda w: rows_of(member, x @ w.T, y).sum(), w)
    p = torch.softmax(x @ w.T, -1)
    both = torch.autograd.functional.hessian(lambda p: phi(member, p, y).sum(), p)
    second = torch.stack([both[i, :, i] for i in range(ROWS)])
    jacobian = torch.diag_embed(p) - p.unsqueeze(-1) * p.unsqueeze(-2)
    of_rows = jacobian @ second @ jacobian
    ggn = torch.einsum("nij,na,nb->iajb", of_rows, x, x)
    v = torch.randn_like(w)
    for budget in (None, 8 * 20_000):
        head = HeadCurvature(x, w, Logits(t), loss=member, reduction="sum", memory_budget=budget)
        same(head.hvp(Direction(None, v, None)).weight, torch.einsum("iajb,jb->ia", of_weight, v))
        same(head.ggnvp(Direction(None, v, None)).weight, torch.einsum("iajb,jb->ia", ggn, v))
    model = torch.nn.Linear(FEATURES, CLASSES, bias=False, dtype=F64)
    with torch.no_grad():
        model.weight.copy_(w)
    for operator, exact in ((Hessian, of_weight), (GGN, ggn)):
        matrix = operator(torch.nn.Identity(), model, [(x, Logits(t))], loss=member, reduction="sum")
        same(matrix @ v.flatten(), torch.einsum("iajb,jb->ia", exact, v).flatten())


@pytest.mark.parametrize("member", [OWN, AlphaDivergence(0.5), SkewKL(0.2), SkewKL(0.2, "reverse")], ids=repr)
def test_a_fit_finds_its_minimum(member):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(60, 3, generator=generator, dtype=F64)
    y = torch.softmax(
        x @ torch.randn(3, 4, generator=generator, dtype=F64)
        + 0.5 * torch.randn(60, 4, generator=generator, dtype=F64),
        -1,
    )
    fit = softcurve.SoftmaxRegression(loss=member, C=10.0, tol=1e-9).fit(x.numpy(), y.numpy())
    w, b = (torch.tensor(a, dtype=F64, requires_grad=True) for a in (fit.coef_, fit.intercept_))
    objective = 10.0 * rows_of(member, x @ w.T + b, y).sum() + 0.5 * w.square().sum()
    gradients = torch.autograd.grad(objective, (w, b))
    assert max(float(g.abs().max()) for g in gradients) <= 1e-6


# --- exactness of the built-in members --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "member",
    [
        *map(AlphaDivergence, (0.5, 0.1, 0.9, -1.0, 2.0, 1e-3)),
        *(SkewKL(w, d) for w, d in itertools.product((0.0, 0.1, 0.9), ("forward", "reverse"))),
    ],
    ids=repr,
)
def test_terms_are_exact_relatively(member):
    mpmath.mp.dps = 50
    for p, r in itertools.product((0.3, 1e-5), (0.0, 1e-12, -1e-6, 1e-3, -0.3, 0.49, 0.51, -2.0, 5.0)):
        exact_p, exact_y = mpmath.mpf(p), mpmath.mpf(p) * mpmath.e ** (-mpmath.mpf(r))

        def term(p, y):
            if isinstance(member, AlphaDivergence):
                a = mpmath.mpf(member.alpha)
                return (a * y + (1 - a) * p - y**a * p ** (1 - a)) / (a * (1 - a))
            w = mpmath.mpf(member.weight)
            first, second = (y, p) if member.direction == "forward" else (p, y)
            mixture = w * first + (1 - w) * second
            return first * mpmath.log(first / mixture) + mixture - first

        at = (exact_p, exact_y)
        pair = Pair(*(torch.tensor([float(number)], dtype=F64) for number in (exact_p, exact_y, r, exact_p - exact_y)))
        score = exact_p * mpmath.diff(term, at, (1, 0))
        exact = {
            "value": term(*at),
            "score": score,
            "curve": score + exact_p**2 * mpmath.diff(term, at, (2, 0)),
            "cross": exact_p * exact_y * mpmath.diff(term, at, (1, 1)),
        }
        for name, truth in exact.items():
            found = float(getattr(member, name)(pair))
            assert abs(found - truth) <= 1e-13 * abs(truth) + 1e-40, (name, p, r)


@pytest.mark.parametrize(
    "member", [AlphaDivergence(0.5), AlphaDivergence(0.9), SkewKL(0.2), SkewKL(0.2, "reverse")], ids=repr
)
def test_mass_where_the_other_has_none(member):
    """Finite values, and gradients without NaN, where either side excludes a class."""
    for masked in ((0, 0), (0, 1), (1, 0)):
        z = torch.tensor([[0.3, -1.0, 0.7]], dtype=F64)
        t = torch.tensor([[1.0, 0.2, -0.5]], dtype=F64)
        if masked[0]:
            z[0, 1] = -math.inf
        if masked[1]:
            t[0, 1] = -math.inf
        z.requires_grad_()
        value = softcurve.divergence(Logits(t), z, divergence=member)
        p, y = torch.softmax(z, -1).detach(), torch.softmax(t, -1)
        kept = [k for k in range(3) if p[0, k] > 0 and y[0, k] > 0]
        expected = phi(member, p[0, kept], y[0, kept]).sum()
        if isinstance(member, AlphaDivergence):
            left_out = [k for k in range(3) if k not in kept]
            expected = expected + sum(p[0, k] / member.alpha + y[0, k] / (1 - member.alpha) for k in left_out)
        else:
            weight = member.weight
            first = y if member.direction == "forward" else p
            expected = expected + sum(first[0, k] * math.log(1 / weight) for k in range(3) if k not in kept)
        assert abs(float(value.detach() - expected)) <= 1e-13 * abs(float(expected))
        (gradient,) = torch.autograd.grad(value, z)
        assert gradient.isfinite().all()
        assert abs(float(gradient.sum())) <= 1e-13


def doubled(member: Divergence) -> Divergence:
    """A subclass of a built-in member with other formulas: twice the divergence."""

    @dataclass(frozen=True)
    class Doubled(type(member)):
        def value(self, pair):
            return 2 * member.value(pair)

        def score(self, pair):
            return 2 * member.score(pair)

        def curve(self, pair):
            return 2 * member.curve(pair)

        def cross(self, pair):
            return 2 * member.cross(pair)

        def exchanged(self):
            return doubled(member.exchanged())

    return Doubled(**vars(member))


@pytest.mark.parametrize("member", [ForwardKL(), ReverseKL(), JensenShannon(0.3), SkewKL(0.2)], ids=repr)
def test_a_subclass_of_a_built_in_member_has_its_own_formulas(member, problem):
    x, w, _, t = (tensor.float() for tensor in problem)
    v = torch.randn_like(w)

    def outcomes(divergence):
        leaf = w.clone().requires_grad_()
        value = softcurve.linear_divergence(x, leaf, Logits(t), divergence=divergence)
        on_logits = softcurve.divergence(Logits(t), x @ leaf.T, divergence=divergence)
        head = HeadCurvature(x, w, Logits(t), loss=divergence)
        along = Direction(None, v, None)
        products = [head.hvp(along).weight, head.ggnvp(along).weight]
        return [value, on_logits, *torch.autograd.grad(value + on_logits, leaf), products[0]], products[1]

    (twice, twice_ggn), (once, ggn) = outcomes(doubled(member)), outcomes(member)
    for found, expected in zip(twice, once, strict=True):
        same(found, 2 * expected, 1e-5)
    if not member.hessian_is_fisher:  # the Gauss-Newton matrix of the forward KL itself is its Hessian
        same(twice_ggn, 2 * ggn, 1e-5)


# --- encoding -----------------------------------------------------------------------------------------------------------


def test_a_description_survives_its_encoding():
    for member in (CrossEntropy(), ForwardKL(), ReverseKL(), JensenShannon(0.3), *MEMBERS):
        for spec in (
            LossSpec(member, "logits", 1 / 3, 30.0, 1e-4, 0.1),
            LossSpec(member, "sparse", group="7", first=3, classes=11),
        ):
            assert LossSpec.decode(spec.encode()) == spec
            assert hash(LossSpec.decode(spec.encode())) == hash(spec)


def test_two_classes_of_one_name_are_not_confused():
    def made(factor):
        @dataclass(frozen=True)
        class Scaled(PowerDivergence):
            def value(self, pair):
                return factor * super().value(pair)

        return Scaled(0.4)

    x, w, t = torch.randn(3, 2, dtype=F64), torch.randn(4, 2, dtype=F64), torch.randn(3, 4, dtype=F64)
    one, two = (softcurve.linear_divergence(x, w, Logits(t), divergence=made(factor)) for factor in (1.0, 2.0))
    same(two, 2 * one)


@pytest.mark.usefixtures("without_shape_checks")
@pytest.mark.parametrize("number", [np.float64(0.5), np.float32(0.5), torch.tensor(0.5), torch.tensor(0.5, dtype=F64)])
def test_a_number_may_be_of_numpy_or_torch(number):
    x, w, t = torch.randn(3, 2, dtype=F64), torch.randn(4, 2, dtype=F64), Logits(torch.randn(3, 4, dtype=F64))
    for member in (AlphaDivergence, SkewKL, JensenShannon, PowerDivergence):
        of_number, of_python = (softcurve.linear_divergence(x, w, t, divergence=member(n)) for n in (number, 0.5))
        assert torch.equal(of_number, of_python)


@pytest.mark.usefixtures("without_shape_checks")
@pytest.mark.parametrize("wrong", [0.0, 1.0, -0.5, 2.0, math.nan, "0.5", None])
def test_a_number_out_of_range_is_refused_by_its_name(wrong):
    with pytest.raises(ValueError, match=r"beta must be a finite number above 0 and below 1"):
        JensenShannon(wrong)
    if wrong not in (-0.5, 2.0):
        with pytest.raises(ValueError, match=r"alpha must be a finite number other than 0 and 1"):
            AlphaDivergence(wrong)
    if wrong != 0.0:
        with pytest.raises(ValueError, match=r"weight must be a finite number at least 0 and below 1"):
            SkewKL(wrong)


def test_a_cached_property_is_no_state():
    @dataclass(frozen=True)
    class Cached(PowerDivergence):
        @cached_property
        def half(self):
            return self.a / 2

        def score(self, pair):
            return super().score(pair) * (2 * self.half / self.a)

    member = Cached(0.4)
    x, w, t = torch.randn(3, 2, dtype=F64), torch.randn(4, 2, dtype=F64), Logits(torch.randn(3, 4, dtype=F64))
    first = softcurve.linear_divergence(x, w, t, divergence=member)
    assert member.half == 0.2
    same(softcurve.linear_divergence(x, w, t, divergence=member), first)


def test_the_curvature_of_a_skewed_kl_of_weight_0_is_that_of_the_kl():
    e, w, y = torch.ones(1, 1, dtype=F64), torch.tensor([[0.0], [4.0]], dtype=F64), Logits(torch.tensor([[4.0, 0.0]]))
    for member in (SkewKL(0.0), SkewKL(0.0, "reverse")):
        kl = ForwardKL() if member.direction == "forward" else ReverseKL()
        found, expected = (HeadCurvature(e, w, y, loss=each) for each in (member, kl))
        assert found.trace() == pytest.approx(expected.trace(), rel=1e-12)
        assert found.trace() <= found.largest_eigenvalue_bound() * 2  # two eigenvalues, one of them 0


def test_the_gradient_of_an_infinite_divergence_is_its_limit():
    z = torch.tensor([[0.0, -120.0]], requires_grad=True)  # of probability 0 in float32
    loss = softcurve.divergence(
        softcurve.Probabilities(torch.tensor([[0.5, 0.5]])), z, divergence=AlphaDivergence(2.5)
    )  # fmt: skip
    assert loss == math.inf
    assert torch.autograd.grad(loss, z)[0].tolist() == [[math.inf, -math.inf]]
    w, p = torch.tensor([[1.0], [-120.0]]), softcurve.Probabilities(torch.tensor([[0.5, 0.5]]))
    x = torch.ones(1, 1, requires_grad=True)
    loss = softcurve.linear_divergence(x, w, p, divergence=AlphaDivergence(2.5))
    assert torch.autograd.grad(loss, x)[0].item() == math.inf


@dataclass(frozen=True)
class Unsummed(PowerDivergence):
    def value(self, pair):
        return self.power(pair)


@dataclass(frozen=True)
class Summed(PowerDivergence):
    def score(self, pair):
        return super().score(pair).sum(-1)


@pytest.mark.parametrize(
    ("member", "words"),
    [
        (Unsummed(0.4), r"Unsummed\.value must return one number per row"),
        (Summed(0.4), r"Summed\.score must return one entry per class"),
    ],
)
def test_a_method_that_returns_another_shape_is_refused(member, words):
    """It would broadcast to a wrong loss, here of as many rows as classes."""
    x, w, t = torch.randn(4, 2), torch.randn(4, 2, requires_grad=True), Logits(torch.randn(4, 4))
    with pytest.raises(ValueError, match=words):
        softcurve.linear_divergence(x, w, t, divergence=member)
    with pytest.raises(ValueError, match=words):
        softcurve.divergence(t, x @ w.T, divergence=member).backward()


def test_a_member_that_is_nan_at_a_masked_class_is_named_among_the_causes():
    @dataclass(frozen=True)
    class Undefined(PowerDivergence):
        def power(self, pair):
            return pair.p * torch.exp(-self.a * pair.log_ratio)

    z, t = torch.tensor([[0.0, 1.0, -math.inf]]), torch.zeros(1, 3)
    with pytest.raises(ValueError, match="a divergence of your own be a number or inf"):
        softcurve.divergence(t, z, divergence=Undefined(0.4))


def test_what_cannot_be_encoded_is_refused():
    class Stateful(PowerDivergence):
        pass

    member = Stateful(0.4)
    object.__setattr__(member, "cache", [])
    x, w, t = torch.randn(3, 2), torch.randn(4, 2), Logits(torch.randn(3, 4))
    for wrong in (member, PowerDivergence(torch.ones(2)), "forward_kl", ForwardKL, None):
        with pytest.raises((TypeError, ValueError), match="divergence"):
            softcurve.linear_divergence(x, w, t, divergence=wrong)
        with pytest.raises((TypeError, ValueError), match="divergence"):
            softcurve.divergence(t, torch.randn(3, 4), divergence=wrong)


def test_cross_entropy_is_a_member():
    x, w, y = torch.randn(3, 2), torch.randn(4, 2), torch.tensor([0, 3, 1])
    same(softcurve.divergence(y, x @ w.T, divergence=CrossEntropy()), softcurve.cross_entropy(x @ w.T, y))
    same(softcurve.linear_divergence(x, w, y, divergence=CrossEntropy()), softcurve.linear_cross_entropy(x, w, y))
