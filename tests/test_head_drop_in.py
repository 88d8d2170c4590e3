"""In place of ``torch.nn.functional.linear_cross_entropy`` and ``torch.nn.LinearCrossEntropyLoss``: every call they accept."""

from __future__ import annotations

import copy
import inspect
import itertools
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import softcurve

from .cases import assert_same, derivatives
from .pairwise import pairwise

CLASSES, FEATURES = 5, 3
WEIGHT = torch.tensor([0.3, 1.7, 0.0, 2.0, 0.9], dtype=torch.float64)

# name: the leading dimensions of the input, and the K further ones of the weight
SHAPES: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = {
    "one row": ((), ()),
    "rows": ((6,), ()),
    "one of one": ((1,), ()),
    "K=1": ((6,), (4,)),
    "K=2": ((5,), (2, 3)),
    "K=3": ((2,), (1, 3, 2)),
    "K=1 of one": ((3,), (1,)),
}
FACTORS: dict[str, Any] = {
    "shape": tuple(SHAPES),
    "biased": (False, True),
    "weight": (None, WEIGHT),
    "label_smoothing": (0.0, 0.15, 1.0),
    "reduction": ("none", "sum", "mean"),
}


def shown(setting: dict[str, Any]) -> str:
    return "-".join("weighted" if isinstance(v, Tensor) else str(v) for v in setting.values())


def leaves(shape: str, biased: bool, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """Input, weight and bias, which require gradients."""
    rows, more = SHAPES[shape]
    made = [torch.randn(*rows, FEATURES, dtype=dtype), torch.randn(CLASSES, *more, FEATURES, dtype=dtype)]
    made += [torch.randn(CLASSES, *more, dtype=dtype)] if biased else []
    return [tensor.requires_grad_() for tensor in made]


def indices_for(shape: str, ignore_index: int | None) -> Tensor:
    rows, more = SHAPES[shape]
    target = torch.randint(CLASSES, (*rows, *more))
    if target.numel() > 2:
        target.view(-1)[::3] = -100 if ignore_index is None else ignore_index
    return target


def probabilities_for(shape: str) -> Tensor:
    rows, more = SHAPES[shape]
    return torch.softmax(torch.randn(*rows, CLASSES, *more, dtype=torch.float64), len(rows))


def assert_equal(arguments: list[Tensor], target: Tensor, second: bool = False, **options: Any) -> None:
    """Value, gradients, and Hessian products if wanted, of the same shapes and dtypes; a mean of nothing is NaN."""
    results = []
    for loss in (softcurve.linear_cross_entropy, F.linear_cross_entropy):
        bias = arguments[2] if len(arguments) > 2 else None
        value = loss(arguments[0], arguments[1], target, linear_bias=bias, **options)
        gradients = torch.autograd.grad(value.sum(), arguments, retain_graph=True)
        results.append([value, *gradients, *(derivatives(value, tuple(arguments)) if second else ())])
    if results[1][0].isnan().any():
        assert torch.equal(results[0][0].isnan(), results[1][0].isnan())
        return
    for got, expected in zip(*results, strict=True):
        assert_same(got, expected)


@pytest.mark.parametrize("setting", pairwise(FACTORS | {"ignore_index": (None, -100, 2, 7)}), ids=shown)
def test_class_indices(setting: dict[str, Any]) -> None:
    shape, biased, *_ = setting.values()
    options = {name: value for name, value in setting.items() if name not in ("shape", "biased")}
    assert_equal(leaves(shape, biased), indices_for(shape, options["ignore_index"]), **options)


@pytest.mark.parametrize("setting", pairwise(FACTORS), ids=shown)
def test_probabilities(setting: dict[str, Any]) -> None:
    shape, biased, *_ = setting.values()
    options = {name: value for name, value in setting.items() if name not in ("shape", "biased")}
    assert_equal(leaves(shape, biased), probabilities_for(shape), **options)


@pytest.mark.parametrize("shape", SHAPES)
def test_defaults(shape: str) -> None:
    for target in (indices_for(shape, None), probabilities_for(shape)):
        assert_equal(leaves(shape, False), target, second=True)


def test_rows_of_any_mass() -> None:
    """torch does not ask that probabilities sum to 1, and neither may a drop-in."""
    for shape in SHAPES:
        for factor in (0.0, 0.5, 3.0):
            assert_equal(leaves(shape, True), factor * probabilities_for(shape), label_smoothing=0.1, weight=WEIGHT)


@pytest.mark.parametrize("shape", SHAPES)
def test_gradient_in_probabilities(shape: str) -> None:
    arguments, target = leaves(shape, True), probabilities_for(shape).requires_grad_()
    values = [
        loss(arguments[0], arguments[1], target, linear_bias=arguments[2], label_smoothing=0.1, weight=WEIGHT)
        for loss in (softcurve.linear_cross_entropy, F.linear_cross_entropy)
    ]
    got, expected = (torch.autograd.grad(value, (target, *arguments)) for value in values)
    for one, other in zip(got, expected, strict=True):
        assert_same(one, other)


@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
def test_empty_batch(reduction: str) -> None:
    for more in ((), (4,)):
        x = torch.randn(0, FEATURES, requires_grad=True)
        w = torch.randn(CLASSES, *more, FEATURES, requires_grad=True)
        for target in (torch.zeros(0, *more, dtype=torch.int64), torch.zeros(0, CLASSES, *more)):
            ours, torchs = (
                f(x, w, target, reduction=reduction) for f in (softcurve.linear_cross_entropy, F.linear_cross_entropy)
            )
            torch.testing.assert_close(ours, torchs, rtol=0, atol=0, equal_nan=True)
            if reduction != "mean":
                assert all((g == 0).all() for g in torch.autograd.grad(ours.sum(), (x, w)))


def test_all_rows_ignored() -> None:
    x, w = torch.randn(3, FEATURES, requires_grad=True), torch.randn(CLASSES, FEATURES, requires_grad=True)
    for reduction in ("none", "sum", "mean"):
        for options in ({}, {"label_smoothing": 0.1}, {"weight": WEIGHT.float()}):
            ours, torchs = (
                f(x, w, torch.full((3,), -100), reduction=reduction, **options)
                for f in (softcurve.linear_cross_entropy, F.linear_cross_entropy)
            )
            torch.testing.assert_close(ours, torchs, rtol=0, atol=0, equal_nan=True)


def test_one_class() -> None:
    for more in ((), (2,)):
        x, w = torch.randn(4, FEATURES, requires_grad=True), torch.randn(1, *more, FEATURES, requires_grad=True)
        loss = softcurve.linear_cross_entropy(x, w, torch.zeros(4, *more, dtype=torch.int64), reduction="none")
        assert (loss == 0).all()
        assert all((g == 0).all() for g in torch.autograd.grad(loss.sum(), (x, w)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", ["one row", "rows", "K=2"])
def test_dtypes(shape: str, dtype: torch.dtype) -> None:
    """Losses in float32, gradients in the leaves' dtypes, and as near to torch's as the dtype allows."""
    arguments, target = leaves(shape, True, dtype), indices_for(shape, None)
    ours, torchs = (
        f(*arguments[:2], target, linear_bias=arguments[2], weight=WEIGHT.to(dtype) + 0.5)
        for f in (softcurve.linear_cross_entropy, F.linear_cross_entropy)
    )
    assert ours.dtype == torch.float32
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(ours, torchs.float(), rtol=8 * eps, atol=eps)
    for got, expected in zip(*(torch.autograd.grad(v, arguments) for v in (ours, torchs)), strict=True):
        torch.testing.assert_close(got, expected, rtol=0, atol=16 * eps * expected.abs().max().item())


def test_further_options_of_many_dimensions() -> None:
    """Temperature, soft cap, z-loss, sample weights and budgets at every one of the K positions."""
    x, w, b = leaves("K=2", True)
    target, options = indices_for("K=2", None), {"temperature": 0.7, "softcap": 3.0, "z_loss": 0.1, "base": 2.0}
    sample = torch.rand(target.shape, dtype=torch.float64).requires_grad_()
    for reduction in ("none", "sum", "mean", "batchmean"):
        given = {**options, "reduction": reduction, "sample_weight": sample, "label_smoothing": 0.1, "weight": WEIGHT}
        logits = torch.einsum("nd,cijd->nijc", x, w) + b.movedim(0, -1)
        dense = softcurve.cross_entropy(logits, target, **given)
        expected = (dense, *derivatives(dense, (x, w, b, sample)))
        for budget in (None, 1 << 20):
            ours = softcurve.linear_cross_entropy(x, w, target, linear_bias=b, memory_budget=budget, **given)
            for got, truth in zip((ours, *derivatives(ours, (x, w, b, sample))), expected, strict=True):
                assert_same(got, truth)


def test_narrow_class_indices() -> None:
    """torch takes uint8 besides int64."""
    x, w = leaves("rows", False)
    target = torch.tensor([0, 4, 1, 1, 3, 2])
    assert torch.equal(
        softcurve.linear_cross_entropy(x, w, target.to(torch.uint8)), softcurve.linear_cross_entropy(x, w, target)
    )


def test_signature() -> None:
    """torch's names, kinds and defaults, in torch's order; only ``options`` is missing."""
    for ours, torchs in (
        (softcurve.linear_cross_entropy, F.linear_cross_entropy),
        (softcurve.nn.LinearCrossEntropyLoss.__init__, torch.nn.LinearCrossEntropyLoss.__init__),
    ):
        mine, theirs = inspect.signature(ours).parameters, inspect.signature(torchs).parameters
        for name, parameter in theirs.items():
            if name != "options":
                assert mine[name].kind == parameter.kind, name
                assert mine[name].default == parameter.default, name
        positional = [name for name, p in theirs.items() if p.kind is p.POSITIONAL_OR_KEYWORD]
        assert list(mine)[: len(positional)] == positional
    more = inspect.signature(softcurve.linear_cross_entropy).parameters.values()
    assert all(p.kind is p.KEYWORD_ONLY for p in list(more)[3:])


# --- the module --------------------------------------------------------------------------------------------------------

MODULES = [
    {"bias": bias, "out_features": out_features, "weight": weight, "reduction": reduction, **more}
    for (bias, out_features, weight), (reduction, more) in zip(
        itertools.product((False, True), ((), (4,), (2, 3)), (None, WEIGHT)),
        itertools.cycle(
            (
                ("mean", {}),
                ("sum", {"label_smoothing": 0.2}),
                ("none", {"ignore_index": 1}),
                ("mean", {"ignore_index": -1, "label_smoothing": 0.1}),
                ("none", {}),
            )
        ),
        strict=False,
    )
]


@pytest.mark.parametrize("options", MODULES, ids=shown)
def test_module_exchanges_its_state_with_torchs(options: dict[str, Any]) -> None:
    """The same keys and shapes, strictly, both ways; then the same loss and the same gradients."""
    given = options | {"dtype": torch.float64}
    ours, torchs = (m.LinearCrossEntropyLoss(FEATURES, CLASSES, **given) for m in (softcurve.nn, torch.nn))
    assert ours.state_dict().keys() == torchs.state_dict().keys()
    assert [(n, p.shape) for n, p in ours.named_parameters()] == [(n, p.shape) for n, p in torchs.named_parameters()]
    assert dict(ours.named_buffers()).keys() == dict(torchs.named_buffers()).keys()
    back = torch.nn.LinearCrossEntropyLoss(FEATURES, CLASSES, **given)
    ours.load_state_dict(torchs.state_dict(), strict=True)
    back.load_state_dict(ours.state_dict(), strict=True)
    x = torch.randn(6, FEATURES, dtype=torch.float64, requires_grad=True)
    target = torch.randint(CLASSES, (6, *options["out_features"]))
    target.view(-1)[::4] = options.get("ignore_index", -100)
    probabilities = torch.softmax(torch.randn(6, CLASSES, *options["out_features"], dtype=torch.float64), 1)
    for goal in (target, probabilities) if "ignore_index" not in options else (target,):
        values = [module(x, goal) for module in (ours, torchs, back, copy.deepcopy(ours))]
        for value in values:
            assert_same(value, values[1])
        got, expected = (
            torch.autograd.grad(value.sum(), (x, *module.parameters()))
            for value, module in zip(values[:2], (ours, torchs), strict=True)
        )
        for one, other in zip(got, expected, strict=True):
            assert_same(one, other)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("out_features", [(), (4,)])
def test_module_starts_as_torchs(bias: bool, out_features: tuple[int, ...]) -> None:
    """From the same seed, the same parameters."""
    modules = []
    for made in (softcurve.nn.LinearCrossEntropyLoss, torch.nn.LinearCrossEntropyLoss):
        torch.manual_seed(7)
        modules.append(made(FEATURES, CLASSES, bias=bias, out_features=out_features))
    for ours, torchs in zip(*(m.state_dict().values() for m in modules), strict=True):
        assert torch.equal(ours, torchs)


def test_module_on_another_device_or_dtype() -> None:
    module = softcurve.nn.LinearCrossEntropyLoss(
        FEATURES, CLASSES, bias=True, device="meta", dtype=torch.bfloat16, weight=WEIGHT
    )
    assert all((p.device.type, p.dtype) == ("meta", torch.bfloat16) for p in module.parameters())
    module = softcurve.nn.LinearCrossEntropyLoss(FEATURES, CLASSES, weight=WEIGHT).double()
    assert {t.dtype for t in module.state_dict().values()} == {torch.float64}
    assert torch.nn.Sequential(torch.nn.Linear(2, FEATURES), module).to("meta")[1].weight.device.type == "meta"


def test_one_training_step_as_torchs() -> None:
    """An optimiser sees the same parameters and leaves the same ones behind."""
    x, y = torch.randn(8, FEATURES, dtype=torch.float64), torch.randint(CLASSES, (8,))
    ends = []
    for made in (softcurve.nn.LinearCrossEntropyLoss, torch.nn.LinearCrossEntropyLoss):
        torch.manual_seed(3)
        module = made(FEATURES, CLASSES, bias=True, dtype=torch.float64)
        optimiser = torch.optim.SGD(module.parameters(), lr=0.5, momentum=0.9)
        for _ in range(5):
            optimiser.zero_grad()
            module(x, y).backward()
            optimiser.step()
        ends.append(list(module.parameters()))
    for ours, torchs in zip(*ends, strict=True):
        assert_same(ours.detach(), torchs.detach())


def test_attributes_are_torchs() -> None:
    given = {"out_features": (2, 3), "reduction": "sum", "ignore_index": 4, "label_smoothing": 0.25}
    ours, torchs = (m(5, 7, **given) for m in (softcurve.nn.LinearCrossEntropyLoss, torch.nn.LinearCrossEntropyLoss))
    for name in torch.nn.LinearCrossEntropyLoss.__constants__:
        assert getattr(ours, name) == getattr(torchs, name), name
    assert "out_features=(2, 3)" in repr(ours)
