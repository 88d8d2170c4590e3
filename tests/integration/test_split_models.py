"""``curvature.split_head`` on models of transformers and peft: right with the options that it names, or an error."""

from __future__ import annotations

import math
import warnings
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from softcurve import lazy_logits
from softcurve.curvature import GGN, split_head

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    peft = pytest.importorskip("peft")
    pytest.importorskip("transformers")
    from .test_lazy_models import MODELS, V, inputs_of

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("default::FutureWarning", "default::DeprecationWarning")]

CAPPED: dict[str, tuple[str, dict[str, float]]] = {
    "gemma2, soft cap": (r"final_logit_softcapping is 3: .* give softcap=3 ", {"softcap": 3.0}),
    "cohere, scale": (r"logit_scale is 0\.25: .* give temperature=4 ", {"temperature": 4.0}),
    "granite, scale": (r"logits_scaling is 4: .*\(of logits times it; 4, over it\)", {"temperature": 4.0}),
}


def made(name: str) -> tuple[Any, dict[str, torch.Tensor], torch.Tensor]:
    torch.manual_seed(0)
    model = MODELS[name]().eval()
    model.requires_grad_(False)
    model.get_output_embeddings().weight.requires_grad_(True)  # that of the head alone, of which the oracle is short
    ids = inputs_of(name)["input_ids"]
    return model, {"input_ids": ids}, ids % V


@pytest.mark.parametrize("name", CAPPED)
@pytest.mark.parametrize("lazy", [False, True])
def test_maps_of_the_logits_are_named_and_right(name, lazy):
    words, options = CAPPED[name]
    model, x, y = made(name)
    with pytest.warns(UserWarning, match=words):
        split_head(model, "lm_head")
    logits = model(**x).logits.flatten(0, 1).detach().requires_grad_()
    handle = lazy_logits(model) if lazy else None
    features, head = split_head(model, "lm_head", **options)
    z = head(features(**x)).flatten(0, 1) if handle is None else None
    matrix = GGN(features, head, [(x, y)], check_deterministic=False, **options)
    if handle is not None:
        handle.remove()
    direction = torch.randn(matrix.shape[0], generator=torch.Generator().manual_seed(1))
    weight = model.get_output_embeddings().weight
    e = features(**x).detach().flatten(0, 1)
    change = e @ direction.view(weight.shape).T  # of the head's output

    def mapped(z: torch.Tensor) -> torch.Tensor:
        cap = options.get("softcap", math.inf)
        z = z if cap == math.inf else cap * torch.tanh(z / cap)
        return z / options.get("temperature", 1.0)

    plain = F.linear(e, weight.detach())
    assert mapped(plain).allclose(logits, rtol=1e-5, atol=1e-5)
    assert z is None or z.allclose(plain, rtol=1e-5, atol=1e-6)
    if weight is model.get_input_embeddings().weight:
        return  # the features depend on a tied weight too
    _, moved = torch.func.jvp(mapped, (plain,), (change,))
    p = torch.softmax(logits.detach(), -1)
    second = p * (moved - (p * moved).sum(-1, keepdim=True))
    slope = torch.func.vjp(mapped, plain)[1](second)[0]
    expected = (slope.T @ e / len(e)).flatten()
    assert (matrix @ direction).allclose(expected, rtol=1e-4, atol=1e-6)


def test_adapters_are_errors():
    model, _, _ = made("llama")
    with_adapter = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["lm_head"]))
    for name in ("base_model.model.lm_head", "base_model.model.lm_head.base_layer"):
        with pytest.raises(TypeError, match=r"merge .*merge_and_unload"):
            split_head(with_adapter, name)
    merged = with_adapter.merge_and_unload()
    split_head(merged, "lm_head")
    saved = peft.get_peft_model(merged, peft.LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"]))
    with pytest.raises(TypeError, match="ModulesToSaveWrapper"):
        split_head(saved, "base_model.model.lm_head")
    inside = peft.get_peft_model(made("llama")[0], peft.LoraConfig(r=2, target_modules=["q_proj"]))
    features, head = split_head(inside, "base_model.model.lm_head")
    x = {"input_ids": inputs_of("llama")["input_ids"]}
    assert head(features(**x)).allclose(inside(**x).logits)
