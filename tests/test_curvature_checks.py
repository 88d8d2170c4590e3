"""What curvature refuses or warns of before it is wrong: data and features that change, heads that are not the logits."""

from __future__ import annotations

import inspect
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune
from torch.utils.checkpoint import checkpoint
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    Sampler,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
)

from softcurve import curvature
from softcurve.curvature import (
    GGN,
    EmpiricalFisher,
    Fisher,
    HeadCurvature,
    Hessian,
    LastLayerLaplace,
    SymmetricOperator,
    influence,
    split_head,
)
from softcurve.curvature.kfac import DenseClassFactor, LowRankClassFactor

ROWS, CLASSES = 24, 3


def laplace(features: nn.Module, head: nn.Linear, data: object, **options: object) -> LastLayerLaplace:
    return LastLayerLaplace(head, data, features=features, **options)


OPERATORS = {"hessian": Hessian, "ggn": GGN, "fisher": Fisher, "empirical": EmpiricalFisher}
ENTRIES = {**OPERATORS, "laplace": laplace}


@pytest.fixture
def rows() -> TensorDataset:
    return TensorDataset(torch.randn(ROWS, 4, dtype=torch.float64), torch.randint(CLASSES, (ROWS,)))


def network(*more: nn.Module) -> tuple[nn.Sequential, nn.Linear]:
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), *more).double(), nn.Linear(5, CLASSES).double()


# --- loaders whose order is random -----------------------------------------------------------------------------------


class Shuffling(Sampler):
    """A sampler of somebody's own."""

    def __init__(self, rows: TensorDataset) -> None:
        self.rows = rows

    def __iter__(self):
        return iter(torch.randperm(len(self.rows)).tolist())

    def __len__(self) -> int:
        return len(self.rows)


class Stream(IterableDataset):
    def __init__(self, rows: TensorDataset) -> None:
        self.rows = rows

    def __iter__(self):
        return (self.rows[i] for i in Shuffling(self.rows))


class Reordered(list):
    """Batches that come in another order each time."""

    turn = 0

    def __iter__(self):
        self.turn += 1
        return iter([self[(i + self.turn) % len(self)] for i in range(len(self))])


SHUFFLED = {
    "shuffle": lambda rows: DataLoader(rows, 7, shuffle=True),
    "subset": lambda rows: DataLoader(rows, 7, sampler=SubsetRandomSampler(range(ROWS))),
    "batch sampler": lambda rows: DataLoader(rows, batch_sampler=BatchSampler(RandomSampler(rows), 7, False)),
    "distributed": lambda rows: DataLoader(rows, 7, sampler=DistributedSampler(rows, 1, 0, shuffle=True)),
    "own": lambda rows: DataLoader(rows, 7, sampler=Shuffling(rows)),
    "stream": lambda rows: DataLoader(Stream(rows), 7),
    "list": lambda rows: Reordered(map(tuple, DataLoader(rows, 7))),
}
OTHER_ROWS = {
    "weighted": lambda rows: DataLoader(rows, 7, sampler=WeightedRandomSampler([1.0] * ROWS, ROWS)),
    "with replacement": lambda rows: DataLoader(rows, 7, sampler=RandomSampler(rows, replacement=True)),
    "drop_last": lambda rows: DataLoader(rows, 7, shuffle=True, drop_last=True),
    "fewer": lambda rows: DataLoader(rows, 7, sampler=RandomSampler(rows, num_samples=9)),
}


@pytest.mark.parametrize("kind", SHUFFLED | OTHER_ROWS)
def test_an_order_that_is_random_is_refused_where_values_belong_to_rows(rows, kind):
    features, head = network()
    nn.init.zeros_(head.weight)  # at which all rows of a class have one loss
    loader, fixed = (SHUFFLED | OTHER_ROWS)[kind](rows), [rows[:]]
    with pytest.raises(ValueError, match=r"train_data must give .*check_deterministic=False skips"):
        influence(features, head, loader, fixed, damping=0.1)
    with pytest.raises(ValueError, match="test_data must give "):
        influence(features, head, fixed, loader, damping=0.1, rows="each")
    with pytest.raises(ValueError, match="data must give "):
        Fisher(features, head, loader, samples=2)
    Fisher(features, head, loader, samples=2, check_deterministic=False)
    influence(nn.Identity(), nn.Linear(4, CLASSES).double(), fixed, loader, damping=0.1)  # a mean, read once


@pytest.mark.parametrize(("name", "kind"), [*zip([*ENTRIES, "ggn", "laplace"], SHUFFLED, strict=True)])
def test_a_sum_over_rows_may_be_shuffled(rows, name, kind):
    features, head = network()
    got, expected = (ENTRIES[name](features, head, data) for data in (SHUFFLED[kind](rows), [rows[:]]))
    if isinstance(got, LastLayerLaplace):
        got, expected = (each.log_marginal_likelihood() for each in (got, expected))
    else:
        vector = torch.randn(got.shape[0]).double()
        got, expected = got @ vector, expected @ vector
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("kind", OTHER_ROWS)
def test_a_sum_over_other_rows_each_time_is_refused(rows, kind):
    features, head = network()
    for entry in ENTRIES.values():
        with pytest.raises(ValueError, match="data must give the same rows in each pass"):
            entry(features, head, OTHER_ROWS[kind](rows))


def test_a_fixed_order_is_taken(rows):
    features, head = network()
    loader = DataLoader(rows, 7)
    for entry in ENTRIES.values():
        entry(features, head, loader)
    found, expected = (influence(features, head, data, [rows[:]], damping=0.1) for data in (loader, [rows[:]]))
    torch.testing.assert_close(found.values, expected.values, rtol=1e-5, atol=1e-8)


# --- features and rows that change -----------------------------------------------------------------------------------


class Noise(nn.Module):
    """Noise from a generator that nobody seeds."""

    def __init__(self) -> None:
        super().__init__()
        self.generator = torch.Generator()

    def forward(self, x: Tensor) -> Tensor:
        return x + 0.01 * torch.randn(x.shape, generator=self.generator, dtype=x.dtype)


class Calls(nn.Module):
    """What it gives depends on how often it was called."""

    calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return x * (1 + 0.1 * self.calls)


class Augmented(torch.utils.data.Dataset):
    def __init__(self, rows: TensorDataset, *, labels: bool) -> None:
        self.rows, self.labels = rows, labels

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor]:
        x, y = self.rows[i]
        return (x, torch.randint(CLASSES, ())) if self.labels else (x + 0.01 * torch.randn(4), y)


CHANGING = {
    "noise": ([Noise()], lambda rows: [rows[:7], rows[7:]], "features must give the same result"),
    "state": ([Calls()], lambda rows: [rows[:7], rows[7:]], "features must give the same result"),
    "noise, loader": ([Noise()], lambda rows: DataLoader(rows, 7), "features must give the same result"),
    "dropout": ([nn.Dropout(0.3)], lambda rows: DataLoader(rows, 7, shuffle=True), r"Dropout '2'.* features\.eval"),
    "norm": ([nn.BatchNorm1d(5)], lambda rows: DataLoader(rows, 7, shuffle=True), r"BatchNorm1d '2'.* features\.eval"),
    "images": ([], lambda rows: DataLoader(Augmented(rows, labels=False), 7), "leave out random augmentation"),
    "labels": ([], lambda rows: DataLoader(Augmented(rows, labels=True), 7), "leave out random augmentation"),
}


@pytest.mark.parametrize("case", CHANGING)
def test_what_changes_between_passes_is_refused(rows, case):
    more, make, said = CHANGING[case]
    (features, head), data = network(*more), make(rows)
    state = torch.get_rng_state()
    for entry in ENTRIES.values():
        with pytest.raises(ValueError, match=said):
            entry(features, head, data)
    with pytest.raises(ValueError, match=r"features must give the same|train_data must give"):
        influence(features, head, data, [rows[:]], damping=0.1)
    assert torch.equal(torch.get_rng_state(), state)
    for entry in ENTRIES.values():
        entry(features, head, data, check_deterministic=False)


@pytest.mark.parametrize("name", OPERATORS)
def test_training_mode_over_fixed_batches_is_taken_and_writes_nothing(rows, name):
    features, head = network(nn.Dropout(0.3), nn.BatchNorm1d(5))
    before = {key: value.clone() for key, value in features.state_dict().items()}
    operator = OPERATORS[name](features, head, DataLoader(rows, 7))
    matrix = operator.to_dense()
    assert (matrix - matrix.T).abs().max() < 1e-12 * matrix.abs().max()
    assert all(torch.equal(before[key], value) for key, value in features.state_dict().items())


def test_predictions_of_a_posterior_write_nothing_and_do_not_change(rows):
    features, head = network(nn.Dropout(0.3), nn.BatchNorm1d(5))
    posterior = LastLayerLaplace(head, [rows[:]], features=features)
    before = {key: value.clone() for key, value in features.state_dict().items()}
    assert torch.equal(posterior.predict_proba(rows[:][0]), posterior.predict_proba(rows[:][0]))
    assert all(torch.equal(before[key], value) for key, value in features.state_dict().items())


# --- checkpoints -----------------------------------------------------------------------------------------------------


class Block(nn.Module):
    """Attention, and a normalisation whose buffers a second run of the forward would write to."""

    def __init__(self) -> None:
        super().__init__()
        self.project, self.norm, self.is_checkpointed = nn.Linear(4, 12), nn.BatchNorm1d(4), False
        self.drop = nn.Dropout(0.2)

    def attend(self, x: Tensor) -> Tensor:
        q, k, v = self.project(x).unflatten(-1, (3, 2, 2)).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(-2)
        return self.drop(self.norm(y.transpose(1, 2)).transpose(1, 2))

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.attend, x, use_reentrant=False) if self.is_checkpointed else self.attend(x)


@pytest.mark.parametrize("name", [*OPERATORS, "sampled", "kfac", "laplace", "influence"])
def test_checkpoints_change_nothing(name):
    block, head = Block(), nn.Linear(4, CLASSES)
    x, y = torch.randn(2, 5, 4), torch.randint(CLASSES, (2, 5))

    def found() -> Tensor:
        if name == "influence":
            return influence(block, head, [(x, y)], [(x, y)], damping=0.1, tol=1e-5).values
        if name == "laplace":
            return laplace(block, head, [(x, y)]).predictive_variance(x)
        if name == "kfac":
            return GGN(block, head, [(x, y)]).kfac().features
        operator = (Fisher if name == "sampled" else OPERATORS[name])(
            block, head, [(x, y)], **({"samples": 2} if name == "sampled" else {})
        )
        return operator @ torch.linspace(-1, 1, 2 * operator.shape[0]).reshape(-1, 2)

    expected, before = found(), {key: value.clone() for key, value in block.state_dict().items()}
    block.is_checkpointed = True
    torch.testing.assert_close(found(), expected, rtol=1e-4, atol=1e-6)
    assert all(torch.equal(before[key], value) for key, value in block.state_dict().items())


# --- heads -----------------------------------------------------------------------------------------------------------


class Model(nn.Module):
    """Features, a head of any kind, and what is done to its output."""

    def __init__(self, head: nn.Module, behind=lambda z: z, **attributes: object) -> None:
        super().__init__()
        self.body, self.head, self.behind = nn.Linear(4, 5), head, behind
        for name, value in attributes.items():
            setattr(self, name, value)

    def forward(self, x: Tensor) -> Tensor:
        return self.behind(self.head(torch.tanh(self.body(x))))


class Adapter(nn.Module):
    """As PEFT lays it out."""

    def __init__(self) -> None:
        super().__init__()
        self.base_layer = nn.Linear(5, CLASSES)
        self.lora_A, self.lora_B = nn.ModuleDict({"a": nn.Linear(5, 2)}), nn.ModuleDict({"a": nn.Linear(2, CLASSES)})
        self.merged = False

    def forward(self, x: Tensor) -> Tensor:
        return self.base_layer(x) + self.lora_B["a"](self.lora_A["a"](x))


class Pair(nn.Module):
    """An adapter under other names."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.down = nn.Linear(5, CLASSES), nn.Parameter(torch.randn(2, 5))
        self.up = nn.Parameter(torch.zeros(CLASSES, 2))

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) + x @ self.down.T @ self.up.T


class Scaled(nn.Module):
    def __init__(self, scale: float | nn.Parameter) -> None:
        super().__init__()
        self.inner, self.by = nn.Linear(5, CLASSES), scale

    def forward(self, x: Tensor) -> Tensor:
        return self.by * self.inner(x)


class OwnForward(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


class DistributedDataParallel(nn.parallel.DistributedDataParallel):
    """Its class without its processes."""

    def __init__(self, module: nn.Module) -> None:
        nn.Module.__init__(self)
        self.module = module


def replaced_forward() -> nn.Linear:
    head = nn.Linear(5, CLASSES)
    head.forward = lambda x: 3 * nn.Linear.forward(head, x)
    return head


def hooked(hook) -> nn.Linear:
    head = nn.Linear(5, CLASSES)
    head.register_forward_hook(hook)
    return head


def adapted() -> Model:
    return Model(Adapter())


def wrapped(kind: type[nn.Module]) -> nn.Module:
    return kind(Model(nn.Linear(5, CLASSES)))


REFUSED_HEADS = {
    "adapter": (adapted, "head", TypeError, r"got .*Adapter at 'head', a Linear with an adapter.*merge"),
    "inside the adapter": (adapted, "head.base_layer", TypeError, "the adapter would be left out; merge"),
    "parallel": (lambda: wrapped(DistributedDataParallel), "module.head", TypeError, "would not be synchronised"),
    "several devices": (lambda: wrapped(nn.DataParallel), "module.head", TypeError, r"model\.module"),
    "parallel head": (
        lambda: Model(DistributedDataParallel(nn.Linear(5, 3))), "head.module", TypeError, "DistributedDataParallel"
    ),
    "own forward": (lambda: Model(OwnForward(5, 3)), "head", TypeError, "OwnForward with its own forward"),
    "replaced forward": (lambda: Model(replaced_forward()), "head", TypeError, "hooks or a replaced forward"),
    "hook": (lambda: Model(hooked(lambda m, x, z: z / 2)), "head", TypeError, "hooks or a replaced forward"),
    "weight norm": (
        lambda: Model(parametrizations.weight_norm(nn.Linear(5, 3))), "head", TypeError, "hold its weight and bias"
    ),
    "pruned": (
        lambda: Model(prune.l1_unstructured(nn.Linear(5, 3), "weight", 0.5)), "head", TypeError, "hold its weight"
    ),
    "lazy": (lambda: Model(nn.LazyLinear(3)), "head", TypeError, "must be initialised"),
    "not the last": (lambda: nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3)), "0", TypeError, "the last"),
    "nested": (
        lambda: nn.Sequential(nn.Sequential(nn.Linear(4, 3)), nn.Hardtanh()), "0.0", TypeError, "front of a Hardtanh"
    ),
    "one logit": (lambda: Model(nn.Linear(5, 1)), "head", ValueError, "sigmoid as a softmax of two logits"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED_HEADS)
def test_a_head_whose_output_are_not_the_logits_is_refused(case):
    make, name, error, said = REFUSED_HEADS[case]
    with pytest.raises(error, match=said):
        split_head(make(), name)


WARNED_HEADS = {
    "pair": (lambda: Model(Pair()), "head.inner", r"down and up in a Pair.* adapter"),
    "scale": (lambda: Model(Scaled(nn.Parameter(torch.ones(())))), "head.inner", "other parameters .*: by"),
    "constant": (lambda: Model(Scaled(0.1)), "head.inner", "another output than its head's"),
    "attribute": (
        lambda: Model(nn.Linear(5, 3), logit_scale=nn.Parameter(torch.tensor(4.0))), "head", r"logit_scale is 4.*=0\.25"
    ),
    "nested config": (
        lambda: Model(nn.Linear(5, 3), config=SimpleNamespace(text_config={"logits_scaling": 8.0})), "head",
        r"model\.config\.text_config\.logits_scaling is 8",
    ),
    **{
        name: (
            lambda name=name: Model(nn.Linear(5, 3), config=SimpleNamespace(**{name: 30.0})), "head",
            rf"model\.config\.{name} is 30",
        )
        for name in ("final_logit_softcapping", "logits_soft_cap", "logit_softcap", "output_logit_cap", "logit_scale",
                     "logits_scaling", "lm_head_multiplier", "logit_multiplier", "logits_temperature")
    },
}  # fmt: skip


@pytest.mark.parametrize("case", WARNED_HEADS)
def test_what_seems_to_change_the_logits_behind_the_head_is_named(case):
    make, name, said = WARNED_HEADS[case]

    def act() -> None:
        features, _ = split_head(make(), name)
        features(torch.randn(6, 4))
        features(torch.randn(6, 4))

    with pytest.warns(UserWarning, match=said) as record:
        act()
    assert record[0].filename == __file__
    assert len({str(each.message) for each in record}) == len(record)  # once


def merged() -> Model:
    model = Model(Adapter())
    nn.init.zeros_(model.head.lora_B["a"].weight)
    nn.init.zeros_(model.head.lora_B["a"].bias)
    model.head.merged, model.head.forward = True, model.head.base_layer.forward
    return model


TAKEN_HEADS = {
    "plain": (lambda: Model(nn.Linear(5, 3)), "head"),
    "observed": (lambda: Model(hooked(lambda m, x, z: None)), "head"),
    "wrapped": (lambda: Model(nn.Sequential(nn.Linear(5, 3), nn.LogSoftmax(-1))), "head.0"),
    "neutral": (
        lambda: Model(nn.Linear(5, 3), config={"final_logit_softcapping": None, "logit_scale": 1.0, "vocab": 3,
                                               "attn_logit_softcapping": 50.0, "router_logits_scaling": 3.0}), "head",
    ),
    "compiled": (lambda: torch.compile(Model(nn.Linear(5, 3)), backend="eager"), "head"),
    "compiled name": (lambda: torch.compile(Model(nn.Linear(5, 3)), backend="eager"), "_orig_mod.head"),
    "compiled head": (lambda: Model(torch.compile(nn.Linear(5, 3), backend="eager")), "head"),
    "compiled in place": (lambda: (lambda m: (m.compile(backend="eager"), m)[1])(Model(nn.Linear(5, 3))), "head"),
}  # fmt: skip


@pytest.mark.parametrize("case", TAKEN_HEADS)
def test_a_head_that_gives_the_logits_is_taken_in_silence(case):
    make, name = TAKEN_HEADS[case]
    model, x = make(), torch.randn(6, 4)
    features, head = split_head(model, name)
    plain = getattr(model, "_orig_mod", model)
    expected = F.linear(torch.tanh(plain.body(x)), head.weight, head.bias)
    torch.testing.assert_close(head(features(x)), expected)
    GGN(features, head, [(x, torch.zeros(6).long())]) @ torch.ones(43)


def test_the_options_of_the_logits_that_were_declared_must_be_given():
    model = Model(nn.Linear(5, 3), config=SimpleNamespace(final_logit_softcapping=30.0, logit_scale=0.5))
    features, head = split_head(model, "head", softcap=30.0, temperature=2.0)
    data = [(torch.randn(6, 4), torch.zeros(6).long())]
    GGN(features, head, data, softcap=30.0, temperature=2.0)
    with pytest.raises(ValueError, match=r"softcap must be 30\.0 as in split_head, got None"):
        LastLayerLaplace(head, data, features=features, temperature=2.0)
    with pytest.raises(ValueError, match=r"temperature must be 2\.0"):
        influence(features, head, data, data, damping=0.1, softcap=30.0)


def test_features_of_several_processes_and_compiled_ones(rows):
    features, head = network()
    for wrapper in (DistributedDataParallel, nn.DataParallel):
        for entry in ENTRIES.values():
            with pytest.raises(TypeError, match=f"features must not hold a {wrapper.__name__}"):
                entry(nn.Sequential(wrapper(features)), head, [rows[:]])
    operator = Hessian(torch.compile(features, backend="aot_eager"), head, [rows[:]])
    plain = Hessian(features, head, [rows[:]])
    vector = torch.randn(plain.shape[0]).double()
    torch.testing.assert_close(operator @ vector, plain @ vector, rtol=0, atol=0)


ONE = {
    **{
        name: lambda head, entry=entry: entry(nn.Identity(), head, [(torch.randn(6, 5), torch.zeros(6).long())])
        for name, entry in ENTRIES.items()
    },
    "soft": lambda head: GGN(nn.Identity(), head, [(torch.randn(6, 5), torch.rand(6, 1))]),
    "head curvature": lambda head: HeadCurvature(torch.randn(6, 5), head.weight, torch.zeros(6).long()),
    "influence": lambda head: influence(nn.Identity(), head, [], [], damping=0.1),
}


@pytest.mark.parametrize("case", ONE)
def test_one_logit_is_refused(case):
    with pytest.raises(ValueError, match=r"must be at least 2, got 1: .* write a sigmoid as a softmax of two logits"):
        ONE[case](nn.Linear(5, 1))


def test_a_sigmoid_as_a_softmax_of_two_logits(rows):
    """The remedy that the error names: the block of the second row is the sigmoid's ``Σ p (1 − p) ẽẽᵀ / n``."""
    features, sigmoid = network()[0], nn.Linear(5, 1).double()
    head = nn.Linear(5, 2).double()
    with torch.no_grad():
        head.weight.copy_(torch.cat([torch.zeros(1, 5), sigmoid.weight]))
        head.bias.copy_(torch.cat([torch.zeros(1), sigmoid.bias]))
    features.requires_grad_(False)
    x, y = rows[:]
    matrix = GGN(features, head, [(x, y % 2)]).to_dense()
    wide = torch.cat([features(x), torch.ones(ROWS, 1)], 1)
    p = torch.sigmoid(sigmoid(features(x))).detach()
    own = [*range(5, 10), 11]
    torch.testing.assert_close(matrix[own][:, own], (wide * p * (1 - p)).T @ wide / ROWS)


# --- systems that are not solved -------------------------------------------------------------------------------------


def test_a_system_that_is_not_solved_warns(rows):
    features, head = network()
    data = [rows[:]]
    operator = GGN(features, head, data)
    b = torch.randn(operator.shape[0], 3).double()
    said = r"in 3 of 3 columns: the relative residual is \d.* after 2 iterations, requested is tol=1e-06; raise max_it"
    with pytest.warns(UserWarning, match="solve has not converged " + said) as record:
        solution = operator.solve(b, damping=1e-6, max_iterations=2)
    assert f"{float(solution.residuals.max()):.3g}" in str(record[0].message)
    assert record[0].filename == __file__
    with pytest.warns(UserWarning, match="solve has not converged: .* GGN in place of Hessian"):
        Hessian(features, head, data).solve(-b[:, 0])
    options = {"damping": 1e-6, "max_iterations": 2, "preconditioned": False, "rows": "each", "columns_at_once": 5}
    said = rf"influence has not converged in {ROWS} of {ROWS} columns: .* after 2 iterations"
    with pytest.warns(UserWarning, match=said) as record:
        influence(features, head, data, data, **options)
    assert len(record) == 1


# --- signatures and representations ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "function", [*OPERATORS.values(), HeadCurvature, LastLayerLaplace, influence, split_head], ids=lambda f: f.__name__
)
def test_options_are_spelled_out(function):
    parameters = inspect.signature(function).parameters.values()
    assert all(each.kind is not inspect.Parameter.VAR_KEYWORD for each in parameters)


def test_representations_are_short(rows):
    features, head = network()
    data = [rows[:]]
    operator = GGN(features, head, data)
    assert repr(operator) == "GGN(shape=(43, 43), dtype=float64, device=cpu)"
    factors = operator.kfac()
    records = [
        operator.diagonal(), operator.trace(), operator.eigsh(2), operator.spectral_density(probes=2, steps=3), factors,
        operator.solve(torch.ones(43).double(), damping=0.1), influence(features, head, data, data, damping=0.1),
        HeadCurvature(torch.randn(6, 5), torch.randn(3, 5), torch.zeros(6).long()), operator.layout, operator.losses,
        LastLayerLaplace(head, data, features=features), factors.form, factors.classes,
        LowRankClassFactor(torch.ones(3), torch.ones(3, 2), 0.0), DenseClassFactor(torch.ones(3), torch.ones(3, 3)),
    ]  # fmt: skip
    for record in records:
        shown = repr(record)
        assert shown.startswith(type(record).__name__ + "(")
        assert "\n" not in shown
        assert "tensor(" not in shown
        assert len(shown) < 400
    assert isinstance(factors.classes, SymmetricOperator)
    assert "residuals=float64[2]" in repr(records[2])
    assert curvature.Estimate.__repr__ is not object.__repr__
