"""The Laplace posterior of a head against dense precision matrices, Jacobians and densities."""

from __future__ import annotations

import math
import sys

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import softcurve
from softcurve.curvature.kfac import LowRankClassFactor
from softcurve.curvature.laplace import LastLayerLaplace

STRUCTURES = ["kronecker", "diagonal"]
OPTIONS = {
    "plain": {},
    "temperature": {"temperature": 1.7},
    "softcap": {"softcap": 2.5, "temperature": 0.8},
    "smoothing": {"label_smoothing": 0.2},
    "class weights": {"weight": torch.tensor([0.5, 2.0, 1.0, 1.5, 0.7], dtype=torch.float64)},
    "weights and smoothing": {
        "weight": torch.tensor([0.5, 2.0, 1.0, 1.5, 0.7], dtype=torch.float64),
        "label_smoothing": 0.3,
    },
    "ignored": {"ignore_index": 2},
}


def a_head(d=4, classes=5, *, bias=True, dtype=torch.float64):
    head = nn.Linear(d, classes, bias=bias, dtype=dtype)
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.normal_()
    return head


def batches(d=4, classes=5, *, weights=False, soft=False, dtype=torch.float64):
    """Ragged; some of more than one leading dimension."""
    found = []
    for rows in ((7,), (1,), (2, 3), (11,)):
        e = torch.randn(*rows, d, dtype=dtype)
        target = torch.randn(*rows, classes, dtype=dtype).softmax(-1) if soft else torch.randint(classes, rows)
        weight = (torch.rand(rows, dtype=dtype) * 2) * (torch.rand(rows) < 0.8)
        found.append((e, target, weight) if weights else (e, target))
    return found


class Dense:
    """All of it by definition: ``(C (d+1))²`` matrices, parameters in the order class, feature."""

    def __init__(
        self,
        head,
        data,
        structure,
        prior,
        *,
        weight=None,
        ignore_index=-100,
        label_smoothing=0.0,
        temperature=1.0,
        softcap=None,
    ):
        self.head, self.temperature, self.softcap = head, temperature, softcap
        self.theta = torch.cat([p.detach().reshape(len(head.weight), -1).double() for p in head.parameters()], 1)
        classes, width = self.theta.shape
        e, y, w = [], [], []
        for x, target, *rest in data:
            e.append(x.reshape(-1, x.shape[-1]).double())
            w.append(rest[0].reshape(-1).double() if rest else torch.ones(len(e[-1]), dtype=torch.float64))
            if target.is_floating_point():
                y.append(target.reshape(-1, classes).double())
            else:
                label = target.reshape(-1)
                w[-1] = torch.where(label == ignore_index, 0.0, w[-1])
                y.append(F.one_hot(label.clamp(min=0), classes).double())
        e, y, w = torch.cat(e), torch.cat(y), torch.cat(w)
        y = ((1 - label_smoothing) * y + label_smoothing / classes) * (1.0 if weight is None else weight.double())
        log_p, slope = self.log_p(e)
        p = log_p.exp()
        self.log_likelihood = (w * (y * log_p).sum(-1)).sum()
        mass, features = w * y.sum(-1), self.augmented(e)
        b_rows = (
            mass[:, None, None]
            * slope[:, :, None]
            * (torch.diag_embed(p) - p[:, :, None] * p[:, None])
            * slope[:, None]
        )
        if structure == "kronecker":
            a = torch.einsum("n,ni,nj->ij", mass, features, features) / mass.sum()
            self.curvature = torch.kron(b_rows.sum(0), a)
        else:
            self.curvature = torch.diag(torch.einsum("nkk,nj->kj", b_rows, features.square()).flatten())
        self.prior, self.size = prior, classes * width

    def augmented(self, e):
        return e if self.head.bias is None else torch.cat([e, torch.ones_like(e[:, :1])], -1)

    def log_p(self, e):
        z = self.augmented(e) @ self.theta.T
        slope = torch.full_like(z, 1 / self.temperature)
        if self.softcap is not None:
            slope = (1 - (z / self.softcap).tanh().square()) / self.temperature
            z = self.softcap * (z / self.softcap).tanh()
        return (z / self.temperature).log_softmax(-1), slope

    def precision(self, prior):
        return self.curvature + prior * torch.eye(self.size, dtype=torch.float64)

    def variance(self, e):
        jacobian = torch.stack(
            [torch.kron(torch.eye(len(self.theta), dtype=torch.float64), row) for row in self.augmented(e)]
        )
        return torch.einsum("nkp,pq,nkq->nk", jacobian, torch.linalg.inv(self.precision(self.prior)), jacobian)

    def evidence(self, prior):
        theta = self.theta.flatten()
        log_prior = self.size / 2 * math.log(prior / (2 * math.pi)) - prior / 2 * theta.square().sum()
        return (
            self.log_likelihood
            + log_prior
            + self.size / 2 * math.log(2 * math.pi)
            - torch.logdet(self.precision(prior)) / 2
        )


def close(found, expected, rtol=1e-9, atol=1e-11):
    torch.testing.assert_close(found.double(), expected, rtol=rtol, atol=atol)


# --- against dense matrices --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("bias", "weights"), [(True, False), (False, True)], ids=["bias", "no bias, sample weights"])
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("structure", STRUCTURES)
def test_variances_and_evidence_are_the_dense_ones(structure, options, weights, bias):
    head, data, options = a_head(bias=bias), batches(weights=weights), OPTIONS[options]
    laplace = LastLayerLaplace(head, data, structure=structure, prior_precision=0.3, **options)
    dense = Dense(head, data, structure, 0.3, **options)
    e = torch.randn(6, 4, dtype=torch.float64) * 3
    close(laplace.predictive_variance(e), dense.variance(e))
    priors = torch.tensor([[1e-3], [1e5]], dtype=torch.float64)
    close(laplace.log_marginal_likelihood(priors), torch.stack([dense.evidence(1e-3), dense.evidence(1e5)])[:, None])
    close(laplace.log_marginal_likelihood(), dense.evidence(0.3))
    close(laplace.log_marginal_likelihood(2.0), dense.evidence(2.0))
    assert laplace.log_likelihood == pytest.approx(dense.log_likelihood.item(), rel=1e-12)


@pytest.mark.parametrize("structure", STRUCTURES)
def test_soft_labels_of_every_kind(structure):
    head, data = a_head(), batches(soft=True, weights=True)
    e = torch.randn(3, 4, dtype=torch.float64)
    dense = Dense(head, data, structure, 1.0)
    for wrapped in (
        data,
        [(x, softcurve.Probabilities(y), w) for x, y, w in data],
        [(x, softcurve.Logits(y.log()), w) for x, y, w in data],
        [
            (x, softcurve.TopK(torch.arange(5).expand_as(y).contiguous(), y.log(), tail="renormalize"), w)
            for x, y, w in data
        ],
    ):
        laplace = LastLayerLaplace(head, wrapped, structure=structure)
        close(laplace.predictive_variance(e), dense.variance(e))
        close(laplace.log_marginal_likelihood(), dense.evidence(1.0))


def test_of_one_row_the_kronecker_form_is_the_hessian_of_the_posterior():
    head, e, prior = a_head(d=3), torch.randn(1, 3, dtype=torch.float64), 0.7
    y = torch.tensor([2])

    def logits(theta, e):
        return e @ theta[:, :3].T + theta[:, 3]

    def negative_log_joint(theta):
        return F.cross_entropy(logits(theta, e), y, reduction="sum") + prior / 2 * theta.square().sum()

    theta = torch.cat([head.weight, head.bias[:, None]], 1).detach()
    hessian = torch.autograd.functional.hessian(negative_log_joint, theta).reshape(20, 20)
    elsewhere = torch.randn(4, 3, dtype=torch.float64)
    jacobians = torch.autograd.functional.jacobian(lambda theta: logits(theta, elsewhere), theta).reshape(4, 5, 20)
    covariances = jacobians @ torch.linalg.inv(hessian) @ jacobians.mT
    laplace = LastLayerLaplace(head, [(e, y)], prior_precision=prior)
    close(laplace.predictive_variance(elsewhere), covariances.diagonal(dim1=-2, dim2=-1))
    # Laplace's integral of exp(-f), over the prior's normalizer.
    integral = -negative_log_joint(theta) - torch.logdet(hessian) / 2 + 20 / 2 * math.log(prior)
    close(laplace.log_marginal_likelihood(), integral)


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
def test_a_class_factor_of_low_rank(bias):
    """The rows are fewer than the rank, so that nothing is lost."""
    head = a_head(6, 40, bias=bias)
    data = [(torch.randn(n, 6, dtype=torch.float64), torch.randint(40, (n,))) for n in (5, 9)]
    dense = Dense(head, data, "kronecker", 0.1)
    e = torch.randn(5, 6, dtype=torch.float64)
    laplace = LastLayerLaplace(head, data, prior_precision=0.1, form="low_rank", rank=20)
    assert isinstance(laplace.structure.form, LowRankClassFactor)
    close(laplace.predictive_variance(e), dense.variance(e), rtol=1e-7)
    for prior in (1e-3, 0.1, 1e4):
        close(laplace.log_marginal_likelihood(prior), dense.evidence(prior), rtol=1e-8)
    # A form that leaves out a part of PᵀP has a larger precision: smaller variances.
    coarse = LastLayerLaplace(head, data, prior_precision=0.1, form="low_rank", rank=3)
    assert (coarse.predictive_variance(e) <= dense.variance(e) * (1 + 1e-9)).all()


def test_through_features_and_for_mappings():
    features, head = nn.Sequential(nn.Linear(3, 4), nn.Tanh()).double(), a_head()
    x = [torch.randn(n, 3, dtype=torch.float64) for n in (5, 8)]
    targets = [torch.randint(5, (len(part),)) for part in x]
    through = LastLayerLaplace(head, list(zip(x, targets, strict=True)), features=features)
    with torch.no_grad():
        on_features = LastLayerLaplace(head, [(features(a), y) for a, y in zip(x, targets, strict=True)])
        e = features(x[0])
    assert torch.equal(through.predictive_variance(x[0]), on_features.predictive_variance(e))
    assert torch.equal(through.predict_proba(x[0]), on_features.predict_proba(e))
    assert not through.predict_proba(x[0]).requires_grad

    class Named(nn.Module):
        def forward(self, left, right):
            return left + right

    named = LastLayerLaplace(head, [({"left": e, "right": e}, targets[0])], features=Named())
    assert torch.equal(
        named.predictive_variance({"left": e, "right": e}),
        LastLayerLaplace(head, [(2 * e, targets[0])]).predictive_variance(2 * e),
    )


@pytest.mark.parametrize("structure", STRUCTURES)
def test_leading_dimensions_and_no_rows(structure):
    laplace = LastLayerLaplace(a_head(), batches(), structure=structure)
    e = torch.randn(2, 3, 4, dtype=torch.float64)
    assert laplace.predictive_variance(e).shape == laplace.predict_proba(e).shape == (2, 3, 5)
    close(laplace.predictive_variance(e)[1, 2], laplace.predictive_variance(e[1, 2]))
    assert laplace.predict_proba(e[:, :0]).shape == (2, 0, 5)


@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("form", ["dense", "low_rank"])
def test_small_budgets_change_nothing(structure, form):
    head, data = a_head(7, 30), batches(7, 30)
    e = torch.randn(50, 7, dtype=torch.float64)
    whole, tiled = (
        LastLayerLaplace(head, data, structure=structure, form=form, rank=30, memory_budget=budget)
        for budget in (None, 12_000)
    )
    assert tiled.structure.budget // (32 * 30) < len(e)
    close(tiled.predictive_variance(e), whole.predictive_variance(e))
    close(tiled.log_marginal_likelihood(), whole.log_marginal_likelihood())
    for correction in ("probit", "mc", "none"):
        close(tiled.predict_proba(e, correction=correction), whole.predict_proba(e, correction=correction))


class Largest(TorchDispatchMode):
    """The largest tensor that an operation has made."""

    numel = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        for leaf in tree_leaves(made):
            if isinstance(leaf, torch.Tensor):
                self.numel = max(self.numel, leaf.numel())
        return made


@pytest.mark.parametrize("structure", STRUCTURES)
def test_no_jacobian_and_no_square_of_the_classes(structure):
    n, d, classes = 30, 12, 3000
    head = a_head(d, classes, dtype=torch.float32)
    data = [(torch.randn(n, d), torch.randint(classes, (n,)))]
    with Largest() as largest:
        laplace = LastLayerLaplace(head, data, structure=structure, rank=8)
        laplace.predict_proba(torch.randn(n, d))
        laplace.log_marginal_likelihood()
    assert n * classes <= largest.numel < 3 * n * classes


# --- probabilities -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", ["plain", "temperature", "softcap"])
@pytest.mark.parametrize("structure", STRUCTURES)
def test_the_probit_is_the_formula(structure, options):
    head, data, options = a_head(), batches(), OPTIONS[options]
    laplace = LastLayerLaplace(head, data, structure=structure, prior_precision=0.2, **options)
    dense = Dense(head, data, structure, 0.2, **options)
    e = torch.randn(9, 4, dtype=torch.float64)
    log_p, slope = dense.log_p(e)
    z = dense.augmented(e) @ dense.theta.T
    z = z if dense.softcap is None else dense.softcap * (z / dense.softcap).tanh()
    z = z / dense.temperature
    corrected = (z / (1 + math.pi / 8 * slope**2 * dense.variance(e)).sqrt()).softmax(-1)
    close(laplace.predict_proba(e), corrected)
    close(laplace.predict_proba(e, correction="none"), log_p.exp())


def test_mc_tends_to_the_mean_over_independent_logits():
    laplace, e = LastLayerLaplace(a_head(), batches(), prior_precision=0.5), torch.randn(4, 4, dtype=torch.float64)
    z, deviation = F.linear(e, laplace.head.weight, laplace.head.bias).detach(), laplace.predictive_variance(e).sqrt()
    draws = (z + deviation * torch.randn(20_000, 4, 5, dtype=torch.float64)).softmax(-1)
    found = laplace.predict_proba(e, correction="mc", samples=2_000)
    error = draws.std(0) * math.sqrt(1 / 2_000 + 1 / 20_000)
    assert ((found - draws.mean(0)).abs() < 4.5 * error).all()
    assert ((found - z.softmax(-1)).abs() > 10 * error).any()


def test_mc_draws_depend_on_the_seed_and_not_on_the_batch():
    laplace, e = LastLayerLaplace(a_head(), batches()), torch.randn(6, 4, dtype=torch.float64)
    found = laplace.predict_proba(e, correction="mc", samples=8, seed=3)
    assert torch.equal(found, laplace.predict_proba(e, correction="mc", samples=8, seed=3))
    close(found[4:], laplace.predict_proba(e[4:], correction="mc", samples=8, seed=3), rtol=1e-12)
    assert not torch.allclose(found, laplace.predict_proba(e, correction="mc", samples=8, seed=4))


def test_far_from_the_data_confidence_falls_to_a_limit_below_one():
    """Kristiadi, Hein, Hennig 2020: the deviation grows as the logits do."""
    head = a_head()
    laplace = LastLayerLaplace(head, batches(), prior_precision=0.1)
    far = torch.randn(20, 4, dtype=torch.float64) * 1e4
    assert laplace.predict_proba(far, correction="none").amax(-1).min() > 1 - 1e-9
    confidence = laplace.predict_proba(far).amax(-1)
    assert confidence.max() < 0.95
    close(confidence, laplace.predict_proba(far * 10).amax(-1), rtol=1e-3)
    # The order of the classes under a common variance is that of the logits; every row sums to 1.
    close(laplace.predict_proba(far).sum(-1), torch.ones(20, dtype=torch.float64))


# --- the prior ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
def test_the_best_prior_precision_balances_norm_and_determined_parameters(structure, bias):
    head, data = a_head(bias=bias), batches()
    laplace = LastLayerLaplace(head, data, structure=structure)
    best = laplace.optimize_prior_precision()
    h = torch.linalg.eigvalsh(Dense(head, data, structure, 1.0).curvature)
    prior = best.prior_precision
    square = sum(p.detach().square().sum().item() for p in head.parameters())
    assert prior * square == pytest.approx((h / (h + prior)).sum().item(), rel=1e-4)
    around = best.log_marginal_likelihood(prior * torch.tensor([0.9, 1.0, 1.1], dtype=torch.float64))
    assert around.argmax() == 1
    assert laplace.prior_precision == 1.0
    assert best.log_marginal_likelihood() > laplace.log_marginal_likelihood()


def test_the_evidence_is_concave_in_the_logarithm_of_the_precision():
    laplace = LastLayerLaplace(a_head(), batches())
    curve = laplace.log_marginal_likelihood(torch.logspace(-8, 8, 33, dtype=torch.float64))
    assert (curve.diff().diff() < 0).all()


def test_a_bound_is_returned_where_the_evidence_still_rises():
    best = LastLayerLaplace(a_head(), batches()).optimize_prior_precision(bounds=(1e3, 1e4))
    assert best.prior_precision == pytest.approx(1e3, rel=1e-4)


@pytest.mark.parametrize("structure", STRUCTURES)
def test_another_prior_is_another_posterior(structure):
    head, data, e = a_head(), batches(), torch.randn(3, 4, dtype=torch.float64)
    first = LastLayerLaplace(head, data, structure=structure)
    before = first.predictive_variance(e)
    other = first.with_prior_precision(7.0)
    close(other.predictive_variance(e), Dense(head, data, structure, 7.0).variance(e))
    assert torch.equal(first.predictive_variance(e), before)
    assert (first.prior_precision, other.prior_precision) == (1.0, 7.0)


def test_training_on_does_not_move_the_posterior():
    head, e = a_head(), torch.randn(3, 4, dtype=torch.float64)
    head.weight.requires_grad_(False)
    laplace = LastLayerLaplace(head, batches())
    before = laplace.predict_proba(e), laplace.log_marginal_likelihood()
    with torch.no_grad():
        head.weight += 1
    assert torch.equal(laplace.predict_proba(e), before[0])
    assert torch.equal(laplace.log_marginal_likelihood(), before[1])


def test_without_scipy_the_error_says_what_to_install(monkeypatch):
    laplace = LastLayerLaplace(a_head(), batches())
    monkeypatch.setitem(sys.modules, "scipy.optimize", None)
    with pytest.raises(ImportError, match=r"optimize_prior_precision needs scipy.* pip install -e '\.\[fit\]'"):
        laplace.optimize_prior_precision()


# --- other dtypes, bad input -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lower_precisions(structure, dtype):
    head, data = a_head(dtype=dtype), batches(dtype=dtype)
    laplace = LastLayerLaplace(head, data, structure=structure, prior_precision=0.5)
    dense = Dense(head, data, structure, 0.5)
    e = torch.randn(6, 4, dtype=dtype)
    assert laplace.predictive_variance(e).dtype == laplace.predict_proba(e).dtype == torch.float32
    close(laplace.predictive_variance(e), dense.variance(e.double()), rtol=2e-5)
    close(laplace.log_marginal_likelihood(), dense.evidence(0.5), rtol=1e-6)


def test_many_rows_in_float32_and_a_class_factor_of_low_rank():
    """``B`` has the eigenvalue 0 and entries of 1e3 times the prior, rounded to 1e-7."""
    head, numbers = a_head(3, 20, dtype=torch.float32), np.random.default_rng(0)  # the same on every machine
    for parameter in head.parameters():
        parameter.data = torch.from_numpy(numbers.uniform(-0.5, 0.5, tuple(parameter.shape))).float()
    x, y = numbers.standard_normal((20_000, 3)), numbers.integers(20, size=20_000)
    data = [(torch.from_numpy(x).float(), torch.from_numpy(y))]
    e = torch.from_numpy(numbers.standard_normal((4, 3))).float()
    low, dense = (LastLayerLaplace(head, data, form=form, rank=20) for form in ("low_rank", "dense"))
    close(low.predictive_variance(e), dense.predictive_variance(e).double(), rtol=1e-3)
    close(low.log_marginal_likelihood(), dense.log_marginal_likelihood(), rtol=1e-7)
    weak = low.with_prior_precision(1e-5)
    for act in (weak.log_marginal_likelihood, lambda: weak.predictive_variance(e)):
        with pytest.raises(ValueError, match=r"prior_precision must be larger than the rounding errors .* got 1e-05"):
            act()
    assert (dense.with_prior_precision(1e-5).predictive_variance(e) > 0).all()


BAD = {
    "infinite head": (
        lambda: LastLayerLaplace(masked_head(), batches()),
        ValueError,
        "head must hold finite numbers, got NaN or infinity",
    ),
    "structure": (
        lambda: a_posterior(structure="full"),
        ValueError,
        "structure must be one of 'kronecker', 'diagonal'",
    ),
    "prior": (
        lambda: a_posterior(prior_precision=0.0),
        ValueError,
        "prior_precision must be a finite number above 0, got 0.0",
    ),
    "one-time data": (
        lambda: LastLayerLaplace(a_head(), iter(batches())),
        TypeError,
        "data must be a re-iterable of batches",
    ),
    "no data": (lambda: LastLayerLaplace(a_head(), []), ValueError, "data must hold a row that counts"),
    "no row that counts": (
        lambda: LastLayerLaplace(a_head(), [(torch.ones(2, 4).double(), torch.full((2,), -100))], structure="diagonal"),
        ValueError,
        "data must hold a row that counts",
    ),
    # Of the losses those options alone that leave a likelihood.
    "loss": (lambda: a_posterior(loss="cross_entropy"), TypeError, "loss"),
    "z-loss": (lambda: a_posterior(z_loss=1e-4), TypeError, "z_loss"),
    "reduction": (lambda: a_posterior(reduction="mean"), TypeError, "reduction"),
    "base": (lambda: a_posterior(base=2.0), TypeError, "base"),
    "form": (lambda: a_posterior(form="sparse"), ValueError, "form must be one of 'auto', 'dense', 'low_rank'"),
    "soft cap of low rank": (
        lambda: a_posterior(form="low_rank", softcap=3.0),
        ValueError,
        "form must be 'dense' for a soft cap",
    ),
    "x's width": (
        lambda: a_posterior().predict_proba(torch.ones(2, 3)),
        ValueError,
        r"x must have .* shape \(\.\.\., 4\)",
    ),
    "x's type": (lambda: a_posterior().predictive_variance([1.0]), ValueError, "x must have .* got list"),
    "correction": (
        lambda: a_posterior().predict_proba(torch.ones(2, 4).double(), correction="bridge"),
        ValueError,
        "correction must be one of 'probit', 'mc', 'none', got 'bridge'",
    ),
    "samples": (
        lambda: a_posterior().predict_proba(torch.ones(2, 4).double(), correction="mc", samples=0),
        ValueError,
        "samples must be a whole number >= 1, got 0",
    ),
    "precisions": (
        lambda: a_posterior().log_marginal_likelihood(torch.tensor([1.0, -1.0])),
        ValueError,
        "prior_precision must hold finite numbers above 0",
    ),
    "bounds": (
        lambda: a_posterior().optimize_prior_precision(bounds=(2.0, 1.0)),
        ValueError,
        "bounds must be a smaller and",
    ),
    "new prior": (
        lambda: a_posterior().with_prior_precision(math.inf),
        ValueError,
        "prior_precision must be a finite number",
    ),
}


def a_posterior(**options):
    return LastLayerLaplace(a_head(), batches(), **options)


def masked_head():
    head = a_head()
    with torch.no_grad():
        head.bias[1] = -math.inf
    return head


@pytest.mark.usefixtures("without_shape_checks")  # which would refuse other words than the literals
@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_explained(case):
    act, error, said = BAD[case]
    with pytest.raises(error, match=said):
        act()
