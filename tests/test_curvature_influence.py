"""Influence of training rows against dense matrices, and against training again without them."""

from __future__ import annotations

from dataclasses import FrozenInstanceError

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import softcurve
from softcurve.curvature.influence import Influence, influence

CLASSES, DAMPING, TIGHT = 4, 0.1, 1e-11


def network(kind):
    """Features, head, a maker of inputs."""
    if kind == "tied":
        features = nn.Sequential(nn.Embedding(CLASSES, 3), nn.Linear(3, 3), nn.Tanh()).double()
        head = nn.Linear(3, CLASSES, bias=False, dtype=torch.float64)
        head.weight = features[0].weight
        return features, head, lambda *rows: torch.randint(CLASSES, rows)
    head = nn.Linear(3, CLASSES, bias=kind != "no bias", dtype=torch.float64)
    if kind == "head alone":
        return nn.Identity(), head, lambda *rows: torch.randn(*rows, 3, dtype=torch.float64)
    features = nn.Sequential(nn.Linear(2, 3), nn.Tanh()).double()
    features.requires_grad_(kind != "frozen features")
    return features, head, lambda *rows: torch.randn(*rows, 2, dtype=torch.float64)


def batches(inputs, sizes, *, weights=False, soft=False):
    found = []
    for rows in sizes:
        target = torch.randn(*rows, CLASSES).double().softmax(-1) if soft else torch.randint(CLASSES, rows)
        weight = torch.rand(rows).double() * (torch.rand(rows) < 0.8)
        found.append((inputs(*rows), target, weight) if weights else (inputs(*rows), target))
    return found


TRAIN, TEST = ((7,), (2, 3)), ((2,), (1, 1))


class Dense:
    """All by definition: each row's Jacobian ``(C, P)`` and gradient ``(P,)``."""

    def __init__(self, features, head, data, *, weight=None, ignore_index=-100, label_smoothing=0.0, temperature=1.0):
        parameters = {id(p): p for p in [*features.parameters(), *head.parameters()] if p.requires_grad}.values()
        x, y, w = [], [], []
        for part, target, *rest in data:
            soft = target.is_floating_point()
            rows = target.shape[:-1] if soft else target.shape
            x.append(part.reshape(rows.numel(), *part.shape[len(rows) :]))
            y.append(target.reshape(rows.numel(), *target.shape[len(rows) :]))
            w.append(rest[0].flatten() if rest else torch.ones(rows.numel(), dtype=torch.float64))
        x, y, w = torch.cat(x), torch.cat(y), torch.cat(w)
        if not soft:
            w = torch.where(y == ignore_index, 0.0, w)
            y = F.one_hot(y.clamp(min=0), CLASSES).double()
        self.divisor = (w if weight is None else w * (y @ weight)).sum()
        y = ((1 - label_smoothing) * y + label_smoothing / CLASSES) * (1.0 if weight is None else weight)
        z = head(features(x)) / temperature
        losses = w * -(y * z.log_softmax(-1)).sum(-1)
        p = z.detach().softmax(-1)
        matrices = (w * y.sum(-1))[:, None, None] * (torch.diag_embed(p) - p[:, :, None] * p[:, None])
        self.gradients = torch.stack([self.flat(loss, parameters) for loss in losses])
        jacobians = torch.stack([torch.stack([self.flat(entry, parameters) for entry in row]) for row in z])
        self.curvature = torch.einsum("nkp,nkl,nlq->pq", jacobians, matrices, jacobians)

    @staticmethod
    def flat(scalar, parameters):
        found = torch.autograd.grad(scalar, list(parameters), retain_graph=True)
        return torch.cat([part.flatten() for part in found])


def expected(train, test, divisor=None):
    """On each test row, and on their mean."""
    g = train.curvature / (train.divisor if divisor is None else divisor)
    inverse = torch.linalg.inv(g + DAMPING * torch.eye(len(g), dtype=torch.float64))
    each = -train.gradients @ inverse @ test.gradients.T
    return each, each.sum(1) / test.divisor


def close(found, right, tol=1e-8):
    torch.testing.assert_close(found, right, rtol=tol, atol=tol * right.abs().max().item())


def both(features, head, train, test, **options):
    options = {"damping": DAMPING, "tol": TIGHT, **options}
    return (influence(features, head, train, test, rows=rows, **options) for rows in ("each", "mean"))


# --- against dense matrices --------------------------------------------------------------------------------------------

OPTIONS = {
    "plain": {},
    "temperature and smoothing": {"temperature": 1.6, "label_smoothing": 0.2},
    "class weights": {"weight": torch.tensor([0.5, 2.0, 1.0, 0.7]).double()},
    "ignored": {"ignore_index": 2},
}


@pytest.mark.parametrize("options", OPTIONS)
def test_values_are_the_dense_ones(options):
    features, head, inputs = network("all")
    weights = options != "plain"
    train, test = batches(inputs, TRAIN, weights=weights), batches(inputs, TEST, weights=weights)
    options = OPTIONS[options]
    dense = Dense(features, head, train, **options)
    right, right_mean = expected(dense, Dense(features, head, test, **options))
    each, mean = both(features, head, train, test, **options)
    assert each.values.shape == (13, 3)
    close(each.values, right)
    close(mean.values, right_mean)
    assert each.converged.shape == each.residuals.shape == (3,)
    assert mean.converged.shape == mean.residuals.shape == ()
    assert each.converged.all()
    assert mean.converged
    assert mean.products > 0
    assert mean.divisor == pytest.approx(dense.divisor.item(), rel=1e-12)
    close(mean.of_removal, -right_mean / dense.divisor)
    uncounted = dense.gradients.abs().sum(1) == 0
    assert not each.values[uncounted].any()


@pytest.mark.parametrize(
    ("kind", "preconditioned"),
    [("no bias", True), ("head alone", True), ("head alone", False), ("frozen features", True), ("tied", False)],
)
def test_whatever_is_trained(kind, preconditioned):
    features, head, inputs = network(kind)
    train, test = batches(inputs, TRAIN), batches(inputs, TEST)
    right = expected(Dense(features, head, train), Dense(features, head, test))[0]
    options = {"damping": DAMPING, "tol": TIGHT, "preconditioned": preconditioned}
    close(influence(features, head, train, test, rows="each", **options).values, right)
    assert all(p.grad is None for p in [*features.parameters(), *head.parameters()])


def test_one_row():
    features, head, inputs = network("all")
    train, test = batches(inputs, [(1,)]), batches(inputs, [(1,)])
    right, right_mean = expected(Dense(features, head, train), Dense(features, head, test))
    each, mean = both(features, head, train, test)
    close(each.values, right)
    close(mean.values, right_mean)


def test_soft_labels_and_reductions():
    features, head, inputs = network("head alone")
    train, test = batches(inputs, ((6,), (3,)), soft=True), batches(inputs, ((4,),), soft=True)
    ofs = Dense(features, head, train), Dense(features, head, test)
    summed = influence(features, head, train, test, damping=DAMPING, tol=TIGHT, reduction="sum")
    close(summed.values, expected(*ofs, divisor=1.0)[1])
    assert summed.divisor == 1.0
    mean = influence(features, head, train, test, damping=DAMPING, tol=TIGHT, loss="forward_kl")
    close(mean.values, expected(*ofs)[1])


def test_the_test_loss_may_have_options_of_its_own():
    features, head, inputs = network("all")
    train, test = batches(inputs, TRAIN), batches(inputs, TEST)
    right = expected(Dense(features, head, train, label_smoothing=0.3), Dense(features, head, test))[1]
    found = influence(features, head, train, test, damping=DAMPING, tol=TIGHT, label_smoothing=0.3, test_options={})
    close(found.values, right)


@pytest.mark.parametrize("loss", ["reverse_kl", "js"])
def test_divergences_by_their_own_gauss_newton_matrix(loss):
    """One test row is one training row: ``−gᵀ (G + λ)⁻¹ g < 0``, and each row's gradient is autograd's."""
    features, head, inputs = network("head alone")
    train = batches(inputs, ((5,),), soft=True)
    matrix = softcurve.curvature.GGN(features, head, train, loss=loss).to_dense()
    of = {"reverse_kl": softcurve.linear_kl_divergence, "js": softcurve.linear_js_divergence}[loss]
    direction = {"direction": "reverse"} if loss == "reverse_kl" else {}
    x, y = train[0]
    losses = of(x, head.weight, softcurve.Probabilities(y), linear_bias=head.bias, reduction="none", **direction)
    gradients = torch.stack([Dense.flat(one, list(head.parameters())) for one in losses])
    right = -gradients @ torch.linalg.inv(matrix + DAMPING * torch.eye(len(matrix)).double()) @ gradients.T
    each = influence(features, head, train, train, damping=DAMPING, tol=TIGHT, rows="each", loss=loss)
    close(each.values, right)
    assert (each.values.diagonal() < 0).all()


@pytest.mark.parametrize("columns_at_once", [1, 2])
def test_columns_share_passes_and_change_nothing(columns_at_once):
    features, head, inputs = network("all")
    train, test = batches(inputs, TRAIN), batches(inputs, TEST)
    right = expected(Dense(features, head, train), Dense(features, head, test))[0]
    walks = 0

    class Counted(list):
        def __iter__(self):
            nonlocal walks
            walks += 1
            return super().__iter__()

    found = influence(
        features, head, Counted(train), test, damping=DAMPING, tol=TIGHT, rows="each", columns_at_once=columns_at_once
    )
    close(found.values, right)
    assert (walks < found.products) == (columns_at_once > 1)


def test_of_low_rank_and_in_small_tiles():
    head, e = nn.Linear(3, 40, dtype=torch.float64), torch.randn(10, 3, dtype=torch.float64)
    train, test = [(e[:8], torch.randint(40, (8,)))], [(e[8:], torch.randint(40, (2,)))]
    plain = influence(nn.Identity(), head, train, test, damping=0.01, tol=TIGHT)
    low = influence(nn.Identity(), head, train, test, damping=0.01, tol=TIGHT, form="low_rank", rank=12)
    tiled = influence(nn.Identity(), head, train, test, damping=0.01, tol=TIGHT, memory_budget=12_000)
    close(low.values, plain.values)
    close(tiled.values, plain.values)


def test_in_float32():
    features, head, inputs = network("all")
    train, test = batches(inputs, TRAIN), batches(inputs, TEST)
    right = expected(Dense(features, head, train), Dense(features, head, test))[1]
    single = [[(x.float(), y) for x, y in data] for data in (train, test)]
    found = influence(features.float(), head.float(), *single, damping=DAMPING, tol=1e-6)
    assert found.values.dtype == torch.float32
    close(found.values.double(), right, tol=1e-4)


class Largest(TorchDispatchMode):
    """The largest tensor that an operation has made."""

    numel = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        for leaf in tree_leaves(made):
            if isinstance(leaf, torch.Tensor):
                self.numel = max(self.numel, leaf.numel())
        return made


def test_no_gradient_of_each_row():
    n, d, classes = 100, 8, 20
    head = nn.Linear(d, classes)
    train, test = ([(torch.randn(m, d), torch.randint(classes, (m,)))] for m in (n, 5))
    with Largest() as largest:
        influence(nn.Identity(), head, train, test, damping=0.1)
    assert n * classes <= largest.numel < 3 * n * classes


# --- against training again --------------------------------------------------------------------------------------------


def minimum(e, y, weight, decay):
    """Of ``Σ weight ℓ + decay/2 ‖θ‖²``, by Newton's method on dense matrices."""
    width = e.shape[1]
    theta = torch.zeros(3, width, dtype=torch.float64)
    onehot = F.one_hot(y, 3).double()
    for _ in range(30):
        p = (e @ theta.T).softmax(-1)
        gradient = ((weight[:, None] * (p - onehot)).T @ e + decay * theta).flatten()
        blocks = weight[:, None, None] * (torch.diag_embed(p) - p[:, :, None] * p[:, None])
        hessian = torch.einsum("nkl,ni,nj->kilj", blocks, e, e).reshape(3 * width, -1)
        step = torch.linalg.solve(hessian + decay * torch.eye(3 * width).double(), gradient)
        theta = theta - step.reshape(3, width)
        if gradient.abs().max() < 1e-13:
            return theta
    raise AssertionError("Newton's method did not converge")


def test_what_is_predicted_is_what_happens_without_the_row():
    n, decay = 60, 0.05
    centres = torch.randn(3, 4, dtype=torch.float64)
    y = torch.randint(3, (n + 30,))
    e = centres[y] + torch.randn(n + 30, 4, dtype=torch.float64)
    y[:4] = (y[:4] + 1) % 3  # wrong labels
    (e, e_test), (y, y_test) = e.split([n, 30]), y.split([n, 30])

    def test_loss(theta):
        return F.cross_entropy(e_test @ theta.T, y_test)

    whole = torch.full((n,), 1 / n, dtype=torch.float64)
    theta = minimum(e, y, whole, decay)
    changes = torch.stack([test_loss(minimum(e, y, whole * (torch.arange(n) != i), decay)) for i in range(n)])
    changes -= test_loss(theta)
    head = nn.Linear(4, 3, bias=False, dtype=torch.float64)
    with torch.no_grad():
        head.weight.copy_(theta)
    found = influence(nn.Identity(), head, [(e, y)], [(e_test, y_test)], damping=decay)
    assert torch.corrcoef(torch.stack([found.of_removal, changes]))[0, 1] > 0.99
    assert (found.of_removal - changes).norm() < 0.25 * changes.norm()
    # A row that helps has a negative value: without it the test loss rises.
    assert changes[found.most_helpful(1)] > 0
    assert changes[found.most_harmful(1)] < 0
    # Upweighting, to first order: a central difference of the retrained test loss.
    row = int(found.most_harmful(1))
    shift = 1e-4 * (torch.arange(n) == row)
    up, down = (test_loss(minimum(e, y, whole + sign * shift, decay)) for sign in (1, -1))
    assert found.values[row].item() == pytest.approx(((up - down) / 2e-4).item(), rel=1e-4)


# --- the record --------------------------------------------------------------------------------------------------------


def test_rankings():
    values = torch.tensor([[0.5, -3.0], [-1.0, 2.0], [0.0, 0.0], [2.0, 1.0]])
    record = Influence(values, 4.0, torch.zeros(2).double(), torch.ones(2).bool(), 3)
    assert record.most_harmful(2).tolist() == [[3, 1], [0, 3]]
    assert record.most_helpful(2).tolist() == [[1, 0], [2, 2]]
    alone = Influence(values[:, 0], 4.0, torch.tensor(0.0).double(), torch.tensor(True), 3)
    assert alone.most_harmful(3).tolist() == [3, 0, 2]
    assert alone.most_helpful(1).tolist() == [1]
    assert torch.equal(alone.of_removal, -values[:, 0] / 4)
    for k in (0, 5):
        with pytest.raises(ValueError, match="k must be "):
            alone.most_harmful(k)
    with pytest.raises(FrozenInstanceError):
        alone.divisor = 1.0


def test_what_has_not_converged_says_so():
    features, head, inputs = network("all")
    data = batches(inputs, TRAIN)
    with pytest.warns(UserWarning, match="influence has not converged"):
        found = influence(features, head, data, data, damping=1e-6, max_iterations=1, preconditioned=False)
    assert not found.converged
    assert found.residuals > 1e-6


BAD = {
    "damping": ({"damping": 0.0}, "damping must be a finite number above 0, got 0.0"),
    "rows": ({"rows": "all"}, "rows must be one of 'mean', 'each', got 'all'"),
    "tol": ({"tol": -1.0}, "tol must be a finite number above 0"),
    "columns": ({"columns_at_once": 0}, "columns_at_once must be a whole number >= 1, got 0"),
    "option": ({"loss": "hinge"}, "loss must be one of"),
    "test option": ({"test_options": {"temperature": 0.0}}, "temperature must be a finite number above 0"),
    "no test": ({"test_data": []}, "test_data must hold a row that counts, got none"),
    "no test rows": ({"test_data": [], "rows": "each"}, "test_data must hold a row, got none"),
    "no training": ({"train_data": []}, "data must hold a row that counts, got none"),
    "no training, plain": ({"train_data": [], "preconditioned": False}, "data must hold a row that counts, got none"),
    "wrong label": (
        {"test_data": [(torch.ones(1, 2).double(), torch.tensor([7]))]},
        "target must hold classes in 0 … 3",
    ),
}


@pytest.mark.usefixtures("without_shape_checks")  # which would refuse other words than the literals
@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_explained(case):
    change, said = BAD[case]
    features, head, inputs = network("all")
    options = {"damping": 0.1, "train_data": batches(inputs, TRAIN), "test_data": batches(inputs, TEST), **change}
    with pytest.raises(ValueError, match=said):
        influence(features, head, **options)


@pytest.mark.parametrize("argument", ["train_data", "test_data"])
def test_data_that_can_be_walked_once_only(argument):
    features, head, inputs = network("all")
    options = {"train_data": batches(inputs, TRAIN), "test_data": batches(inputs, TEST)}
    with pytest.raises(TypeError, match=f"{argument} must be a re-iterable of batches"):
        influence(features, head, damping=0.1, **{**options, argument: iter(options[argument])})


@pytest.mark.parametrize("kind", ["tied", "frozen bias"])
def test_a_head_that_has_no_kronecker_factors_of_its_own(kind):
    """Its preconditioner is another one, and the answer the same."""
    features, head, inputs = network("tied" if kind == "tied" else "all")
    if kind == "frozen bias":
        head.bias.requires_grad_(False)
    data = batches(inputs, TRAIN)
    helped, plain = (
        influence(features, head, data, data, damping=0.1, preconditioned=p, tol=1e-10) for p in (True, False)
    )
    assert helped.converged
    torch.testing.assert_close(helped.values, plain.values, rtol=1e-7, atol=1e-10)
