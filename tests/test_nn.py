"""The modules are the functions with their options fixed, and CrossEntropyLoss stands in for torch's."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import softcurve
from softcurve import nn

Z, T = torch.randn(2, 6, 5, generator=torch.Generator().manual_seed(1))
INDEX, WEIGHT, SAMPLE = torch.arange(6) % 5, torch.linspace(0.5, 2, 5), torch.linspace(0, 1, 6)

MODULES: list[tuple[Callable[..., torch.nn.Module], Callable[..., Tensor], tuple[Any, Any], dict[str, Any]]] = [
    (nn.CrossEntropyLoss, softcurve.cross_entropy, (Z, INDEX), {}),
    (nn.CrossEntropyLoss, softcurve.cross_entropy, (Z, softcurve.Logits(T)), {"z_loss": 0.1, "reduction": "none"}),
    (
        nn.CrossEntropyLoss,
        softcurve.cross_entropy,
        (Z, INDEX),
        {
            "weight": WEIGHT,
            "ignore_index": 2,
            "label_smoothing": 0.1,
            "temperature": 0.7,
            "softcap": 4.0,
            "z_loss": 0.2,
            "reduction": "sum",
            "base": 2.0,
        },
    ),
    (nn.KLDivergenceLoss, softcurve.kl_divergence, (T, Z), {}),
    (nn.KLDivergenceLoss, softcurve.kl_divergence, (T, Z), {"temperature": 2.0, "reduction": "none", "base": 2.0}),
    (nn.JSDivergenceLoss, softcurve.js_divergence, (T, Z), {}),
    (
        nn.JSDivergenceLoss,
        softcurve.js_divergence,
        (T, Z),
        {"beta": 0.2, "temperature": 2.0, "reduction": "sum", "base": 2.0},
    ),
    (nn.DivergenceLoss, softcurve.divergence, (T, Z), {"divergence": softcurve.AlphaDivergence(0.5)}),
    (
        nn.DivergenceLoss,
        softcurve.divergence,
        (T, Z),
        {"divergence": softcurve.SkewKL(0.1), "temperature": 2.0, "reduction": "none", "base": 2.0},
    ),
    (nn.DivergenceLoss, softcurve.divergence, (INDEX, Z), {"divergence": softcurve.CrossEntropy()}),
]


@pytest.mark.parametrize(("module", "function", "arguments", "options"), MODULES)
def test_equals_the_function(module, function, arguments, options) -> None:
    for more in ({}, {"sample_weight": SAMPLE}):
        made = module(**options)
        expected = function(*arguments, **options, **more)
        assert torch.equal(made(*arguments, **more), expected)
        assert torch.equal(copy.deepcopy(made)(*arguments, **more), expected)
        assert torch.equal(pickle.loads(pickle.dumps(made))(*arguments, **more), expected)  # noqa: S301


@pytest.mark.parametrize(("module", "function", "arguments", "options"), MODULES)
def test_repr_shows_every_option(module, function, arguments, options) -> None:
    shown = repr(module(**options))
    assert shown.startswith(f"{module.__name__}(")
    for name, value in options.items():
        if name != "weight":  # a buffer
            assert f"{name}={value!r}" in shown
    assert "reduction=" in shown


def test_state_dict_is_torchs() -> None:
    """The class weights are a buffer of the same name: checkpoints go both ways."""
    ours, torchs = nn.CrossEntropyLoss(WEIGHT), torch.nn.CrossEntropyLoss(WEIGHT)
    assert ours.state_dict().keys() == torchs.state_dict().keys() == {"weight"}
    assert torch.equal(ours.state_dict()["weight"], WEIGHT)
    other = nn.CrossEntropyLoss(torch.ones(5))
    other.load_state_dict(torchs.state_dict())
    assert torch.equal(other(Z, INDEX), ours(Z, INDEX))
    torch.testing.assert_close(other(Z, INDEX), torchs(Z, INDEX), rtol=1e-6, atol=0)
    assert nn.CrossEntropyLoss().state_dict() == torch.nn.CrossEntropyLoss().state_dict() == {}
    assert not list(ours.parameters())


def test_weight_moves_with_the_module() -> None:
    assert nn.CrossEntropyLoss(WEIGHT).double().weight.dtype == torch.float64
    assert nn.CrossEntropyLoss(WEIGHT).to("meta").weight.device.type == "meta"


@pytest.mark.usefixtures("without_shape_checks")  # which know the types too
def test_a_divergence_must_be_a_member_of_the_family() -> None:
    for make in (nn.DivergenceLoss, lambda divergence: nn.LinearDivergenceLoss(5, 7, divergence=divergence)):
        with pytest.raises(TypeError, match="divergence must be an instance of"):
            make(softcurve.AlphaDivergence)


@pytest.mark.usefixtures("without_shape_checks")  # which know the words too
def test_bad_reduction_is_known_at_once() -> None:
    for module in (nn.CrossEntropyLoss, nn.KLDivergenceLoss, nn.JSDivergenceLoss):
        with pytest.raises(ValueError, match="reduction"):
            module(reduction="median")
