"""The networks' one suite: every operator is a symmetric matrix, and the dense one of ``curvature_oracle``, in float64."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import softcurve
from softcurve.curvature import GGN, EmpiricalFisher, Fisher, Hessian, fisher

from .cases import BY_NAME, CASES, Case, Rows, assert_same, everything, problem
from .curvature_oracle import DenseNetwork, DenseRows, Network, batch_of, loss_options, row_gradients
from .pairwise import pairwise

BOUND = 1e-9
CLASSES, WIDTH = 6, 3

EXACT = {"hessian": Hessian, "gauss_newton": GGN, "fisher": Fisher, "empirical_fisher": EmpiricalFisher}
OPERATORS: dict[str, Callable[..., Any]] = {**EXACT, "sampled_fisher": partial(Fisher, samples=2, seed=7)}

over_operators = pytest.mark.parametrize("make", OPERATORS.values(), ids=OPERATORS.keys())
over_exact = pytest.mark.parametrize("name", EXACT)


def over_pairs(**factors: Iterable[Any]) -> Any:
    """Any two levels of the factors, which are the test's arguments, meet in one of its runs."""
    settings = [tuple(each.values()) for each in pairwise({name: list(levels) for name, levels in factors.items()})]
    return pytest.mark.parametrize(",".join(factors), settings)


# --- networks and data ---------------------------------------------------------------------------------------------------


def small_features(dtype: torch.dtype = torch.float64) -> nn.Module:
    return nn.Sequential(nn.Linear(2, 3, dtype=dtype), nn.Tanh(), nn.Linear(3, WIDTH, dtype=dtype))


def small_head(*, bias: bool = True, dtype: torch.dtype = torch.float64) -> nn.Linear:
    return nn.Linear(WIDTH, CLASSES, bias=bias, dtype=dtype)


class Setting:
    """A network over batches, as an operator takes it and as the oracle does."""

    def __init__(
        self,
        features: nn.Module | None = None,
        head: nn.Linear | None = None,
        *,
        case: str | Case = "cross_entropy-indices",
        options: dict[str, Any] | None = None,
        reduction: str = "mean",
        rows: tuple[Rows, ...] = ((5,), (3,), (1,)),
        x: Callable[[Rows], Any] = lambda rows: torch.randn(*rows, 2, dtype=torch.float64),
    ) -> None:
        self.features = small_features() if features is None else features
        self.head = small_head() if head is None else head
        case = BY_NAME[case] if isinstance(case, str) else case
        posed = [problem(case, options, reduction, each, WIDTH, self.head.out_features) for each in rows]
        self.problems = [replace(each, weight=posed[0].weight) for each in posed]
        self.x = [x(each) for each in rows]
        self.data = [batch_of(each, x) for each, x in zip(self.problems, self.x, strict=True)]
        self.options = loss_options(posed[0])

    def operator(self, make: Callable[..., Any], **more: Any) -> Any:
        return make(self.features, self.head, self.data, **self.options | more)

    @property
    def dense(self) -> DenseNetwork:
        rows = map(DenseRows.of, self.problems)
        network = Network(self.features, self.head)
        return DenseNetwork(network, list(zip(self.x, rows, strict=True)), self.options["reduction"])

    def assert_equals_dense(self, name: str, **more: Any) -> None:
        operator, truth = self.operator(EXACT[name], **more), self.dense.matrix(name)
        assert operator.shape == tuple(truth.shape)
        columns = torch.randn(len(truth), 2, dtype=torch.float64)
        assert_same(operator @ columns, truth @ columns, name, BOUND)


def inputs_as_wide_as_the_head(rows: Rows) -> Tensor:
    return torch.randn(*rows, WIDTH, dtype=torch.float64)


def token_ids(rows: Rows) -> Tensor:
    return torch.randint(CLASSES, rows)


# --- a matrix ------------------------------------------------------------------------------------------------------------


@over_operators
class TestMatrix:
    """What is true of any symmetric matrix."""

    @pytest.fixture
    def operator(self, make):
        return Setting(options={"sample_weight": True, "ignore_index": -100}).operator(make)

    def test_shape_dtype_and_device(self, operator):
        count = (2 * 3 + 3) + (3 * WIDTH + WIDTH) + (WIDTH * CLASSES + CLASSES)
        assert operator.shape == (count, count)
        assert operator.dtype == torch.float64
        assert operator.device == torch.device("cpu")

    def test_a_vector_is_split_by_the_parameters_names(self, operator):
        vector = torch.arange(operator.shape[0], dtype=torch.float64)
        parts = operator.split(vector)
        named = [(f"features.{n}", p) for n, p in operator.features.named_parameters()]
        named += [(f"head.{n}", p) for n, p in operator.head.named_parameters()]
        assert [(name, part.shape) for name, part in parts.items()] == [(name, p.shape) for name, p in named]
        assert torch.equal(torch.cat([part.flatten() for part in parts.values()]), vector)

    def test_linear(self, operator):
        x, y = torch.randn(2, operator.shape[0], 2, dtype=torch.float64)
        assert_same(operator @ (2 * x - 0.3 * y), 2 * (operator @ x) - 0.3 * (operator @ y), bound=1e-12)

    def test_symmetric(self, operator):
        matrix = operator.to_dense()
        assert_same(matrix, matrix.mT, bound=1e-13)

    def test_positive_semidefinite_where_it_says_so(self, operator):
        assert operator.is_positive is (not isinstance(operator, Hessian))
        eigenvalues = torch.linalg.eigvalsh(operator.to_dense())
        assert eigenvalues[-1] > 1e-3
        assert (eigenvalues[0] > -1e-13 * eigenvalues[-1]) == operator.is_positive

    def test_a_vector_is_a_matrix_of_one_column(self, operator):
        columns = torch.randn(operator.shape[0], 3, dtype=torch.float64)
        together = operator @ columns
        assert together.shape == columns.shape
        for j in range(3):
            product = operator @ columns[:, j]
            assert product.shape == (operator.shape[0],)
            assert_same(product, together[:, j], bound=1e-13)

    def test_no_columns_and_no_change(self, operator):
        count = operator.shape[0]
        assert (operator @ torch.zeros(count, 0, dtype=torch.float64)).shape == (count, 0)
        assert not (operator @ torch.zeros(count, 2, dtype=torch.float64)).any()

    def test_the_same_twice(self, make, operator):
        vector = torch.randn(operator.shape[0], dtype=torch.float64)
        first = operator @ vector
        again = make(operator.features, operator.head, operator.data, ignore_index=-100)
        assert torch.equal(operator @ vector, first)
        assert torch.equal(again @ vector, first)

    def test_products_record_nothing_and_leave_nothing(self, operator):
        vector = torch.randn(operator.shape[0], dtype=torch.float64, requires_grad=True)
        state = torch.get_rng_state()
        product = operator @ vector
        assert not product.requires_grad
        assert torch.equal(torch.get_rng_state(), state)
        assert all(p.grad is None for p in [*operator.features.parameters(), *operator.head.parameters()])

    @pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
    def test_without_gradients(self, operator, context):
        vector = torch.randn(operator.shape[0], dtype=torch.float64)
        expected = operator @ vector
        with context():
            product = operator @ vector
        assert torch.equal(product, expected)

    def test_numpy(self, operator):
        columns = torch.randn(operator.shape[0], 2, dtype=torch.float64)
        for array in (columns.numpy(), np.asfortranarray(columns.numpy())):
            product = operator @ array
            assert (type(product), product.dtype) == (np.ndarray, np.float64)
            assert np.array_equal(product, (operator @ columns).numpy())

    def test_scipy(self, operator):
        view, columns = operator.to_scipy(), torch.randn(operator.shape[0], 2, dtype=torch.float64)
        expected = (operator @ columns).numpy()
        assert (view.shape, view.dtype) == (operator.shape, np.float64)
        assert np.array_equal(view @ columns.numpy(), expected)
        assert np.array_equal(view.T @ columns.numpy(), expected)
        assert np.allclose(view @ columns[:, 0].numpy(), expected[:, 0], rtol=0, atol=1e-13)

    def test_a_loader_is_data(self, make):
        x, target = torch.randn(9, 2, dtype=torch.float64), torch.randint(CLASSES, (9,))
        features, head = small_features(), small_head()
        loader = DataLoader(TensorDataset(x, target), batch_size=4)
        batches = [(x[start : start + 4], target[start : start + 4]) for start in (0, 4, 8)]
        vector = torch.randn(make(features, head, batches).shape[0], dtype=torch.float64)
        assert torch.equal(make(features, head, loader) @ vector, make(features, head, batches) @ vector)

    def test_float32(self, make):
        double = Setting(options={"ignore_index": -100})
        single = [(x.float(), target) for x, target in double.data]
        vector = torch.randn(double.operator(make).shape[0], dtype=torch.float64)
        expected = double.operator(make) @ vector
        operator = make(double.features.float(), double.head.float(), single, ignore_index=-100)
        assert operator.dtype == torch.float32
        assert_same((operator @ vector.float()).double(), expected, bound=1e-5)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_half_precision_is_float32(self, make, dtype):
        """Where the head is all there is, nothing but its own numbers is rounded."""
        head, x = small_head(dtype=dtype), torch.randn(5, WIDTH, dtype=dtype)
        operator = make(nn.Identity(), head, [(x, torch.randint(CLASSES, (5,)))])
        vector = torch.randn(operator.shape[0], dtype=torch.float64)
        product = operator @ vector.float()
        assert operator.dtype == product.dtype == torch.float32
        exact = make(nn.Identity(), head.double(), [(x.double(), operator.data[0][1])])
        assert_same(product.double(), exact @ vector, bound=1e-5)

    @pytest.mark.parametrize(("dtype", "bound"), [(torch.bfloat16, 0.06), (torch.float16, 0.008)])
    def test_half_precision_features(self, make, dtype, bound):
        """A few roundings of the features, of 2⁻⁸ and 2⁻¹¹ each."""
        features, head = small_features(dtype), small_head(dtype=dtype)
        data = [(torch.randn(5, 2, dtype=dtype), torch.randint(CLASSES, (5,)))]
        matrix = make(features, head, data).to_dense()
        assert matrix.dtype == torch.float32
        exact = make(features.double(), head.double(), [(x.double(), target) for x, target in data])
        assert_same(matrix.double(), exact.to_dense(), bound=bound)


@pytest.mark.parametrize("case", ["reverse-Logits", "js0.3-Logits"])
def test_gauss_newton_is_positive_where_the_hessian_in_the_logits_is_not(case):
    """With no features but the identity, all that is indefinite is the loss."""
    setting = Setting(nn.Identity(), case=case, x=inputs_as_wide_as_the_head)
    hessian = torch.linalg.eigvalsh(setting.operator(Hessian).to_dense())
    gauss_newton = torch.linalg.eigvalsh(setting.operator(GGN).to_dense())
    assert hessian[0] < -0.01 * hessian[-1]
    assert gauss_newton[0] > -1e-13 * gauss_newton[-1]


# --- the dense matrix ----------------------------------------------------------------------------------------------------


def option_sets(case: Case) -> dict[str, dict[str, Any]]:
    """No option, all of them, a few: each time with another reduction."""
    sets = {
        "everything, batchmean": everything(case, "shift"),
        "softcap and temperature, sum": {"softcap": 2.0, "temperature": 0.7},
    }
    if case.is_cross_entropy:
        sets["plain, mean"] = {}
        sets["z_loss, mean"] = {"z_loss": 0.3, "sample_weight": True}
        sets["class weight, mean"] = {"weight": True, "ignore_index": -100}
    known = {name: {o: v for o, v in options.items() if case.knows(o)} for name, options in sets.items()}
    return {name: options for name, options in known.items() if options or name == "plain, mean"}


def knows(name: str, case: Case, other: str, options: str) -> bool:
    return (name, other) != ("case", "options") or options in option_sets(case)


ALL_OPTIONS = list(dict.fromkeys(name for case in CASES for name in option_sets(case)))
GRID = pairwise({"case": CASES, "options": ALL_OPTIONS, "name": list(EXACT)}, knows)


@pytest.mark.parametrize("setting", GRID, ids=lambda setting: "-".join(map(str, setting.values())))
def test_every_loss_with_its_options(setting):
    """Any two of loss, options and operator meet."""
    case, options = setting["case"], setting["options"]
    reduction = options.split(", ")[-1]
    Setting(case=case, options=option_sets(case)[options], reduction=reduction).assert_equals_dense(setting["name"])


@over_pairs(name=EXACT, case=("cross_entropy-indices", "cross_entropy-float"), reduction=("mean", "batchmean", "sum"))
def test_reductions_over_ragged_batches(name, case, reduction):
    """One divisor for all batches: the mean of means is another matrix."""
    options = {"weight": True, "sample_weight": True, "ignore_index": -100, "base": 2.0}
    Setting(case=case, options=options, reduction=reduction).assert_equals_dense(name)


@over_exact
@pytest.mark.parametrize("case", ["cross_entropy-indices", "js0.3-LinearTeacher"])
def test_a_budget_changes_nothing(name, case):
    setting = Setting(case=case, options=everything(BY_NAME[case], "shift"))
    with pytest.raises(ValueError, match="memory_budget must be at least"):
        setting.operator(EXACT[name], memory_budget=1).to_dense()
    setting.assert_equals_dense(name, memory_budget=9000)


@over_exact
@pytest.mark.parametrize("case", ["cross_entropy-indices", "reverse-Logits"])
def test_a_head_without_bias(name, case):
    Setting(head=small_head(bias=False), case=case).assert_equals_dense(name)


@over_exact
@pytest.mark.parametrize("case", ["cross_entropy-indices", "reverse-Logits"])
def test_no_features(name, case):
    Setting(nn.Identity(), case=case, x=inputs_as_wide_as_the_head).assert_equals_dense(name)


# --- which parameters ----------------------------------------------------------------------------------------------------

FROZEN = {
    "features": ("features.0.weight", "features.0.bias", "features.2.weight", "features.2.bias"),
    "first layer": ("features.0.weight", "features.0.bias"),
    "last layer's weight": ("features.2.weight",),
    "head": ("head.weight", "head.bias"),
    "head's bias": ("head.bias",),
    "head's weight": ("head.weight",),
    "all but a bias": ("features.0.weight", "features.2.weight", "features.2.bias", "head.weight", "head.bias"),
}


@over_exact
@pytest.mark.parametrize("frozen", FROZEN)
def test_frozen_parameters_have_no_rows_and_no_columns(name, frozen):
    setting = Setting(options={"sample_weight": True})
    whole, parameters = setting.dense.matrix(name), dict(Network(setting.features, setting.head).named_parameters())
    for each in FROZEN[frozen]:
        parameters[each].requires_grad_(False)
    kept = torch.cat([torch.full((p.numel(),), p.requires_grad) for p in parameters.values()])
    assert_same(setting.operator(EXACT[name]).to_dense(), whole[kept][:, kept], frozen, BOUND)
    setting.assert_equals_dense(name)


def language_model(*, tied: bool) -> tuple[nn.Module, nn.Linear]:
    features, head = (
        nn.Sequential(nn.Embedding(CLASSES, WIDTH), nn.Linear(WIDTH, WIDTH), nn.Tanh()).double(),
        small_head(),
    )
    if tied:
        head.weight = features[0].weight
    return features, head


@over_pairs(name=EXACT, case=("cross_entropy-indices", "reverse-Logits"), frozen=("nothing", "the tied weight"))
def test_a_tied_embedding_counts_once(name, case, frozen):
    features, head = language_model(tied=True)
    head.weight.requires_grad_(frozen == "nothing")
    setting = Setting(features, head, case=case, rows=((3, 4), (1, 2)), x=token_ids)
    count = CLASSES * WIDTH * (frozen == "nothing") + WIDTH * WIDTH + WIDTH + CLASSES
    assert setting.operator(EXACT[name]).shape == (count, count)
    setting.assert_equals_dense(name)


# --- features ------------------------------------------------------------------------------------------------------------


@over_pairs(
    name=EXACT,
    options=({"shift": 1}, {"shift": 2, "sample_weight": True, "ignore_index": -100, "z_loss": 0.1}),
    reduction=("mean", "batchmean"),
)
def test_sequences_look_ahead(name, options, reduction):
    setting = Setting(
        *language_model(tied=False), options=options, reduction=reduction, rows=((3, 4), (1, 5)), x=token_ids
    )
    setting.assert_equals_dense(name)


class Pair(nn.Module):
    """Of two inputs by name."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(2, WIDTH).double(), nn.Linear(4, WIDTH).double()

    def forward(self, left: Tensor, right: Tensor) -> Tensor:
        return torch.tanh(self.left(left)) * self.right(right)


@over_exact
def test_inputs_by_name(name):
    def x(rows: Rows) -> dict[str, Tensor]:
        return {
            "right": torch.randn(*rows, 4, dtype=torch.float64),
            "left": torch.randn(*rows, 2, dtype=torch.float64),
        }

    Setting(Pair(), x=x).assert_equals_dense(name)


@over_exact
@pytest.mark.parametrize("training", [True, False])
def test_batch_normalisation_in_its_present_mode(name, training):
    """In training every row's features depend on all rows of the batch, and running statistics stay as they were."""
    features = nn.Sequential(nn.Linear(2, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, WIDTH)).double()
    features[1](3 + 2 * torch.randn(50, 4, dtype=torch.float64))
    features.train(training)
    before = {buffer: value.clone() for buffer, value in features.named_buffers()}
    Setting(features, rows=((5,), (3,))).assert_equals_dense(name)
    assert features.training is training
    assert all(torch.equal(value, before[buffer]) for buffer, value in features.named_buffers())


class Masks(nn.Module):
    """Multiplies by the mask of its size."""

    def __init__(self, masks: list[Tensor]) -> None:
        super().__init__()
        self.masks = {mask.shape: mask for mask in masks}
        assert len(self.masks) == len(masks), "batches must be of different sizes"

    def forward(self, x: Tensor) -> Tensor:
        return x * self.masks[x.shape]


def dropped_out() -> tuple[nn.Sequential, list[Tensor]]:
    """Features with dropout, and the masks of every forward."""
    features, masks = nn.Sequential(nn.Linear(2, 5), nn.Tanh(), nn.Dropout(0.4), nn.Linear(5, WIDTH)).double(), []
    features[2].register_forward_hook(lambda _, x, y: masks.append((y / x[0]).detach()))
    return features, masks


@over_operators
def test_products_see_the_same_dropout(make):
    features, masks = dropped_out()
    setting = Setting(features)
    operator = setting.operator(make, seed=3, check_deterministic=False)
    columns = torch.randn(operator.shape[0], 2, dtype=torch.float64)
    first = operator @ columns
    torch.manual_seed(1)
    assert torch.equal(operator @ columns, first)
    assert torch.equal(setting.operator(make, seed=3, check_deterministic=False) @ columns, first)
    assert not torch.allclose(setting.operator(make, seed=4, check_deterministic=False) @ columns, first)
    batches = len(setting.data)
    assert len(masks) == 4 * batches
    for mask, again in zip(masks[:batches], masks[batches : 2 * batches], strict=True):
        assert torch.equal(mask, again)
    seeds = {
        setting.operator(make, seed=s, check_deterministic=False).network.random_seed(use, n)
        for s in (3, 4)
        for use in ("a", "b")
        for n in range(3)
    }
    assert len(seeds) == 12


@over_exact
def test_dropout(name):
    features, masks = dropped_out()
    setting = Setting(features)
    operator = setting.operator(EXACT[name], seed=3, check_deterministic=False)
    columns = torch.randn(operator.shape[0], 2, dtype=torch.float64)
    product = operator @ columns
    assert all(0 < (mask == 0).sum() < mask.numel() for mask in masks[:2])
    played_back = nn.Sequential(features[0], features[1], Masks(masks[: len(setting.data)]), features[3])
    setting.features = played_back
    assert_same(product, setting.dense.matrix(name) @ columns, name, BOUND)


@over_exact
@pytest.mark.parametrize("training", [True, False])
def test_a_transformer_layer(name, training):
    """Its attention's fast kernels have no second derivatives."""
    layer = nn.TransformerEncoderLayer(4, 2, dim_feedforward=5, dropout=0.0, activation="gelu", batch_first=True)
    features = nn.Sequential(nn.Embedding(CLASSES, 4), layer, nn.Linear(4, WIDTH)).double().train(training)
    options = {"shift": 1, "softcap": 3.0}
    Setting(features, options=options, rows=((2, 3), (1, 4)), x=token_ids).assert_equals_dense(name)


# --- sampled classes -----------------------------------------------------------------------------------------------------


def sampled_products(setting: Setting, vector: Tensor, *, draws: int, samples: int) -> Tensor:
    """``vᵀ F̂ v`` of as many independent estimates. The seeds are far apart, for each batch to have its own numbers."""
    options = {"samples": samples, "check_deterministic": False}
    estimates = [setting.operator(Fisher, seed=1000 * seed, **options) for seed in range(draws)]
    return torch.stack([vector @ (estimate @ vector) for estimate in estimates])


def deviation_of_a_sample(setting: Setting, vector: Tensor) -> float:
    """Of ``vᵀ F̂ v`` with one class a row: ``Σ a_i² m_i² Var_k (g_ik · v)²``, the rows being independent."""
    dense, variance = setting.dense, 0.0
    for x, rows in dense.batches:
        z = dense.logits(dense.point, x).detach()
        slope = row_gradients(lambda z, rows=rows: rows.seen(z).sum(-1), z)
        p, change = torch.softmax(rows.seen(z), -1), slope * (dense.jacobian(x) @ vector)
        squares = (change - (p * change).sum(-1, keepdim=True)).square()
        mass = rows.weight * rows.masses(rows.seen(z)) / rows.nats / dense.divisor
        variance += (mass.square() * ((p * squares.square()).sum(-1) - (p * squares).sum(-1).square())).sum().item()
    return math.sqrt(variance)


@pytest.mark.parametrize(
    ("options", "samples"),
    [
        ({}, 1),
        ({}, 9),
        ({"softcap": 2.0, "temperature": 0.7, "base": 2.0, "label_smoothing": 0.2, "weight": True, "z_loss": 0.3}, 3),
    ],
)
def test_sampled_fisher_has_the_exact_mean_and_error(options, samples):
    """The error falls as ``samples^-1/2``, with the factor that it must have if all draws are independent."""
    setting, draws = Setting(options=options, rows=((5,), (3,))), 24
    vector = torch.randn(setting.operator(Fisher).shape[0], dtype=torch.float64)
    exact = vector @ setting.dense.matrix("fisher") @ vector
    deviation = deviation_of_a_sample(setting, vector) / math.sqrt(samples)
    found = sampled_products(setting, vector, draws=draws, samples=samples)
    assert abs(found.mean() - exact) < 4 * deviation / math.sqrt(draws)
    assert abs(found.std() / deviation - 1) < 0.35


@pytest.mark.parametrize("case", ["cross_entropy-indices", "cross_entropy-bucket", "reverse-Logits"])
def test_sampled_fisher_is_the_moment_of_the_gradients_at_its_classes(case, monkeypatch):
    drawn = []

    def record(*arguments: Any) -> Tensor:
        drawn.append(sample_classes(*arguments))
        return drawn[-1]

    sample_classes = fisher.sample_classes
    monkeypatch.setattr(fisher, "sample_classes", record)
    setting = Setting(case=case, options=everything(BY_NAME[case], "shift"))
    operator = setting.operator(Fisher, samples=3, seed=5)
    columns = torch.randn(operator.shape[0], 2, dtype=torch.float64)
    product = operator @ columns

    dense, truth = setting.dense, torch.zeros(operator.shape, dtype=torch.float64)
    for (x, rows), classes in zip(dense.batches, drawn, strict=True):
        jacobian, z = dense.jacobian(x), dense.logits(dense.point, x).detach()
        mass = rows.weight * rows.masses(rows.seen(z)) / rows.nats
        for column in classes.unbind(-1):
            leaf = z.clone().requires_grad_()
            picked = torch.log_softmax(rows.seen(leaf), -1).gather(-1, column.unsqueeze(-1))
            gradients = torch.einsum("na,nap->np", torch.autograd.grad(picked.sum(), leaf)[0], jacobian)
            truth += torch.einsum("n,np,nq->pq", mass / 3, gradients, gradients) / dense.divisor
    assert_same(product, truth @ columns, case, BOUND)


def test_samples_depend_on_the_seed_alone():
    setting = Setting()
    vector = torch.randn(setting.operator(Fisher).shape[0], dtype=torch.float64)
    first = setting.operator(Fisher, samples=2, seed=1) @ vector
    torch.manual_seed(99)
    assert torch.equal(setting.operator(Fisher, samples=2, seed=1) @ vector, first)
    assert not torch.allclose(setting.operator(Fisher, samples=2, seed=2) @ vector, first)


class Noise(nn.Module):
    """Features that are noise: each row's own number in [−8, 8]."""

    def forward(self, x: Tensor) -> Tensor:
        return 16 * torch.rand(len(x), 1, dtype=torch.float64) - 8


def test_samples_are_independent_of_the_features_noise():
    """Given the features the estimate's mean is the exact matrix of these features, which the same seed reproduces."""
    head = nn.Linear(1, 2, dtype=torch.float64)
    with torch.no_grad():
        head.weight.copy_(torch.tensor([[0.5], [-0.5]]))
        head.bias.zero_()
    data = [(torch.zeros(1, 1, dtype=torch.float64), torch.zeros(1, dtype=torch.int64))]
    along = torch.tensor([0.0, 0.0, 1.0, 0.0], dtype=torch.float64)  # the first class's bias

    def curvature(**options: Any) -> float:
        return float(along @ (Fisher(Noise(), head, data, check_deterministic=False, **options) @ along))

    seeds = [1000 * seed for seed in range(60)]
    errors = torch.tensor([curvature(samples=1, seed=seed) - curvature(seed=seed) for seed in seeds])
    assert abs(errors.mean()) < 4 * errors.std() / math.sqrt(len(seeds))


# --- errors --------------------------------------------------------------------------------------------------------------


def batches(*, rows: int = 3, inputs: int = 2) -> list[tuple[Tensor, Tensor]]:
    return [(torch.randn(rows, inputs, dtype=torch.float64), torch.randint(CLASSES, (rows,)))]


@over_operators
class TestErrors:
    """Each names the argument."""

    def test_data_without_a_row_that_counts(self, make):
        ignored = [(torch.randn(3, 2, dtype=torch.float64), torch.full((3,), -100))]
        for data in (ignored, []):
            operator = make(small_features(), small_head(), data)
            with pytest.raises(ValueError, match="data must hold a row that counts"):
                operator @ torch.ones(operator.shape[0], dtype=torch.float64)

    def test_a_sum_over_no_row_is_zero(self, make):
        ignored = [(torch.randn(3, 2, dtype=torch.float64), torch.full((3,), -100))]
        operator = make(small_features(), small_head(), ignored, reduction="sum")
        assert not operator.to_dense().any()

    def test_data_that_can_be_walked_once(self, make):
        with pytest.raises(TypeError, match=r"data must be a re-iterable of batches.*generator"):
            make(small_features(), small_head(), (batch for batch in batches()))

    def test_features_of_another_width(self, make):
        features = nn.Linear(2, WIDTH + 1, dtype=torch.float64)
        with pytest.raises(ValueError, match=r"features must map x to a tensor of shape \(..., 3\).*4"):
            make(features, small_head(), batches())

    def test_features_that_give_no_tensor(self, make):
        features = nn.LSTM(2, WIDTH, dtype=torch.float64)
        with pytest.raises(ValueError, match=r"features must map x to a tensor.*tuple"):
            make(features, small_head(), batches())

    def test_nothing_requires_a_gradient(self, make):
        with pytest.raises(ValueError, match="features and head must have a parameter that requires a gradient"):
            make(small_features().requires_grad_(False), small_head().requires_grad_(False), batches())

    def test_unknown_options(self, make):
        with pytest.raises(TypeError, match="smoothing_label"):
            make(small_features(), small_head(), batches(), smoothing_label=0.1)

    @pytest.mark.parametrize(
        ("target", "options", "error", "words"),
        [
            (torch.full((3,), CLASSES), {}, ValueError, "target"),
            (torch.zeros(4, dtype=torch.int64), {}, ValueError, "target"),
            (torch.ones(3, CLASSES - 1, dtype=torch.float64), {}, ValueError, "target"),
            (torch.zeros(3, dtype=torch.int64), {"loss": "reverse_kl"}, TypeError, "target must be a distribution"),
            (torch.ones(3, CLASSES, dtype=torch.float64), {"ignore_index": 0}, ValueError, "ignore_index"),
            (torch.ones(3, CLASSES, dtype=torch.float64), {"shift": 1}, ValueError, "shift"),
            (torch.zeros(3, dtype=torch.int64), {"weight": torch.ones(2)}, ValueError, "weight"),
        ],
    )
    def test_what_the_loss_refuses_of_a_batch(self, make, target, options, error, words):
        data = [(torch.randn(3, 2, dtype=torch.float64), target)]
        operator = make(small_features(), small_head(), data, **options)
        with pytest.raises(error, match=words):
            operator.to_dense()

    def test_sample_weights_of_another_shape(self, make):
        ((x, target),) = batches()
        operator = make(small_features(), small_head(), [(x, target, torch.ones(2, dtype=torch.float64))])
        with pytest.raises(ValueError, match="sample_weight"):
            operator.to_dense()

    @pytest.mark.parametrize(
        ("vectors", "error"),
        [
            (torch.ones(3, dtype=torch.float64), ValueError),
            (torch.ones(45, dtype=torch.int64), TypeError),
            ([1.0] * 45, TypeError),
            (np.ones(45, dtype=complex), TypeError),
        ],
        ids=["length", "ints", "list", "complex"],
    )
    def test_vectors(self, make, vectors, error):
        operator = make(small_features(), small_head(), batches())
        assert operator.shape == (45, 45)
        with pytest.raises(error, match="vectors must"):
            operator @ vectors


CROSS_ENTROPY_OPTIONS = {
    "weight": torch.ones(CLASSES), "ignore_index": 0, "label_smoothing": 0.1, "z_loss": 0.1, "shift": 1
}  # fmt: skip
OUT_OF_RANGE = {
    "loss": "kl", "reduction": "none", "label_smoothing": 1.5, "temperature": 0.0, "softcap": -1.0, "z_loss": -0.1,
    "base": 1.0, "memory_budget": 0,
}  # fmt: skip


@over_pairs(make=OPERATORS.values(), loss=("forward_kl", "reverse_kl", "js"), option=CROSS_ENTROPY_OPTIONS)
def test_options_of_the_cross_entropy_alone(make, loss, option):
    with pytest.raises(ValueError, match=f"{option} must"):
        make(small_features(), small_head(), batches(), loss=loss, **{option: CROSS_ENTROPY_OPTIONS[option]})


@over_operators
@pytest.mark.usefixtures("without_shape_checks")  # which would refuse other words than the literals
def test_values_out_of_range(make):
    network = small_features(), small_head(), batches()
    for loss in ("cross_entropy", "forward_kl", "reverse_kl"):
        with pytest.raises(ValueError, match="beta must"):
            make(*network, loss=loss, beta=0.3)
    for option, value in OUT_OF_RANGE.items():
        with pytest.raises(ValueError, match=option):
            make(*network, **{option: value})


# Run without the import hook, whose own TypeCheckError would come before ours.
WRONG_TYPES = """
import torch
from torch import nn
from softcurve.curvature import GGN, EmpiricalFisher, Fisher, Hessian, LastLayerLaplace

bad, features, head, x, target = [], nn.Linear(2, 3), nn.Linear(3, 6), torch.zeros(4, 2), torch.zeros(4, dtype=torch.int64)
for make in (Hessian, GGN, Fisher, EmpiricalFisher):
    for arguments, options, words in (
        ((torch.tanh, head, [(x, target)]), {}, "features must be a torch.nn.Module, got builtin"),
        ((features, nn.Sequential(head), [(x, target)]), {}, "head must be a torch.nn.Linear, got Sequential"),
        ((features, head, [x]), {}, "data must yield (x, target) or (x, target, sample_weight), got Tensor in batch 0"),
        ((features, head, [(x, target), (x,)]), {}, "data must yield (x, target)"),
        ((features, head, [(x, target, None, None)]), {}, "data must yield (x, target)"),
        ((features, head, 3), {}, "data must be a re-iterable"),
        ((features, head, [(x, [0, 1, 2, 3])]), {}, "target must be"),
        ((features, head, [(x, target)]), {"ignore_index": 1.0}, "ignore_index must be"),
    ):
        try:
            make(*arguments, **options).to_dense()
        except Exception as error:
            if not isinstance(error, TypeError) or words not in str(error):
                bad.append((make.__name__, words, repr(error)))
        else:
            bad.append((make.__name__, words, "no error"))
for arguments, options, words in (
    ((nn.Identity(), [(x, target)]), {}, "head must be a torch.nn.Linear, got Identity"),
    ((head, [(x, target)]), {"features": abs}, "features must be a torch.nn.Module"),
):
    try:
        LastLayerLaplace(*arguments, **options)
    except TypeError as error:
        if words not in str(error):
            bad.append(("LastLayerLaplace", words, repr(error)))
    else:
        bad.append(("LastLayerLaplace", words, "no error"))
assert LastLayerLaplace(head, [(x @ torch.ones(2, 3), target)], prior_precision=2).prior_precision == 2.0
assert not bad, bad
"""


def test_arguments_of_the_wrong_type(run_python):
    run_python(WRONG_TYPES)


@pytest.mark.parametrize("samples", [0, -1, True])
def test_samples_are_a_positive_int(samples):
    with pytest.raises(ValueError, match="samples must be a positive int"):
        Fisher(small_features(), small_head(), batches(), samples=samples)


def test_reverse_kl_against_a_list_alone_is_infinite():
    target = softcurve.TopK(torch.tensor([[0, 1]] * 3), torch.full((3, 2), -1.0), tail="renormalize")
    operator = GGN(small_features(), small_head(), [(batches()[0][0], target)], loss="reverse_kl")
    with pytest.raises(ValueError, match="TopK with tail='renormalize'"):
        operator.to_dense()
