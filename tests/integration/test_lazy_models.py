"""Models and trainers of transformers, peft and TRL compute the same within ``lazy_logits``, and make no logits.

The models are small and random; the oracle is the same model, trainer or step without the context. This needs the extra
``integration``.
"""

from __future__ import annotations

import logging
import math
import os
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from softcurve import lazy_logits

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # models, tokenizers and data are made here
with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # what these packages warn of on import is not softcurve's
    transformers = pytest.importorskip("transformers")
    peft = pytest.importorskip("peft")
    from . import lazy_trainer, test_trl

logging.getLogger("transformers").setLevel(logging.ERROR)

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("default::FutureWarning", "default::UserWarning", "default::DeprecationWarning"),
]

V = 512
WIDTHS = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
SIDES = {
    "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 4, "decoder_attention_heads": 4,
    "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "d_model": 32, "vocab_size": V,
}  # fmt: skip
TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


def causal(config: str, **options: Any) -> Any:
    made = getattr(transformers, config)(vocab_size=V, **WIDTHS, **TOKENS, **options)
    return transformers.AutoModelForCausalLM.from_config(made)


def masked(config: str, **options: Any) -> Any:
    made = getattr(transformers, config)(vocab_size=V, **WIDTHS, **options)
    return transformers.AutoModelForMaskedLM.from_config(made)


def gpt2() -> Any:
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(vocab_size=V, n_embd=32, n_layer=2, n_head=4, **TOKENS))


def t5() -> Any:
    return transformers.T5ForConditionalGeneration(
        transformers.T5Config(
            vocab_size=V, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, decoder_start_token_id=0
        )
    )


def whisper() -> Any:
    return transformers.WhisperForConditionalGeneration(
        transformers.WhisperConfig(max_source_positions=50, num_mel_bins=8, decoder_start_token_id=1, **SIDES, **TOKENS)
    )


def bart() -> Any:
    return transformers.BartForConditionalGeneration(
        transformers.BartConfig(decoder_start_token_id=1, forced_eos_token_id=2, **SIDES, **TOKENS)
    )


def mamba() -> Any:
    return transformers.MambaForCausalLM(
        transformers.MambaConfig(vocab_size=V, hidden_size=32, num_hidden_layers=2, state_size=4)
    )


def llava() -> Any:
    config = transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(image_size=32, patch_size=16, **WIDTHS),
        text_config=transformers.LlamaConfig(vocab_size=V, **WIDTHS, **TOKENS), image_token_index=V - 1,
        vision_feature_layer=-1,
    )  # fmt: skip
    return transformers.LlavaForConditionalGeneration(config)


def vit() -> Any:
    return transformers.ViTForImageClassification(
        transformers.ViTConfig(**WIDTHS, image_size=32, patch_size=8, num_labels=V)
    )


MODELS: dict[str, Callable[[], Any]] = {
    "llama": partial(causal, "LlamaConfig", num_key_value_heads=2),
    "qwen3, tied": partial(causal, "Qwen3Config", num_key_value_heads=2, head_dim=8, tie_word_embeddings=True),
    "gpt2": gpt2,
    "gemma2, soft cap": partial(causal, "Gemma2Config", num_key_value_heads=2, head_dim=8, final_logit_softcapping=3.0),
    "cohere, scale": partial(causal, "CohereConfig", logit_scale=0.25),
    "granite, scale": partial(causal, "GraniteConfig", logits_scaling=4.0),
    "mixtral, auxiliary loss": partial(
        causal, "MixtralConfig", num_key_value_heads=2, num_local_experts=4, output_router_logits=True
    ),
    "bert": partial(masked, "BertConfig"),
    "t5": t5,
    "whisper": whisper,
    "vit": vit,
    "olmoe, auxiliary loss": partial(
        causal, "OlmoeConfig", num_experts=4, num_experts_per_tok=2, output_router_logits=True, num_key_value_heads=2
    ),
    "bart, bias of the logits": bart,
    "phi3": partial(causal, "Phi3Config", num_key_value_heads=2),
    "gpt-oss, auxiliary loss": partial(
        causal,
        "GptOssConfig",
        num_key_value_heads=2,
        head_dim=8,
        num_local_experts=4,
        num_experts_per_tok=2,
        output_router_logits=True,
    ),
    "deepseek v3": partial(
        causal,
        "DeepseekV3Config",
        num_key_value_heads=4,
        n_routed_experts=4,
        num_experts_per_tok=2,
        n_group=2,
        topk_group=1,
        moe_intermediate_size=16,
        q_lora_rank=8,
        kv_lora_rank=8,
        qk_rope_head_dim=8,
        qk_nope_head_dim=8,
        v_head_dim=8,
        first_k_dense_replace=1,
    ),
    "mamba": mamba,
    "llava, images": llava,
    "electra": partial(masked, "ElectraConfig", embedding_size=32),
}


def inputs_of(name: str) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, V, (2, 9), generator=generator)
    labels = ids.clone()
    labels[0, :3] = labels[1, 5:] = -100
    if name == "whisper":
        return {"input_features": torch.randn(2, 8, 100, generator=generator), "labels": labels}
    if name == "vit":
        return {"pixel_values": torch.randn(3, 3, 32, 32, generator=generator), "labels": labels[0, 3:6]}
    if name == "llava, images":
        ids[:, 2:6] = V - 1  # the patches of one image
        images = torch.randn(2, 3, 32, 32, generator=generator)
        return {"input_ids": ids, "pixel_values": images, "labels": labels}
    return {"input_ids": ids, "labels": labels}


def step(model: Any, inputs: dict[str, Tensor]) -> tuple[float, dict[str, Tensor]]:
    """Return the loss of a model and all its gradients."""
    torch.manual_seed(2)  # of dropout
    model.zero_grad()
    loss = model(**inputs).loss
    loss.backward()
    return float(loss), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def require_same_step(model: Any, inputs: dict[str, Tensor], head: str | None = None) -> None:
    loss, gradients = step(model, inputs)
    with lazy_logits(model, head, on_materialize="raise") as lazy:
        ours, others = step(model, inputs)
    assert lazy.materialized == 0
    assert ours == pytest.approx(loss, rel=1e-6)
    assert others.keys() == gradients.keys()
    largest = max(float(gradient.abs().max()) for gradient in gradients.values())
    for name, gradient in gradients.items():
        assert float((others[name] - gradient).abs().max()) <= 1e-6 * max(1.0, largest), name


@pytest.mark.parametrize("name", MODELS)
def test_loss_and_gradients_of_a_model(name):
    torch.manual_seed(0)
    require_same_step(MODELS[name](), inputs_of(name), "classifier" if name == "vit" else None)


@pytest.mark.parametrize("options", [{"target_modules": ["q_proj", "lm_head"]},
                                     {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}], ids=str)  # fmt: skip
def test_adapters_of_peft(options):
    torch.manual_seed(0)
    model = peft.get_peft_model(MODELS["llama"](), peft.LoraConfig(r=3, lora_dropout=0.0, **options))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:  # is zero at the start
                parameter.normal_(std=0.1)
    require_same_step(model, inputs_of("llama"))
    if "modules_to_save" not in options:
        with model.disable_adapter():
            expected = model(**inputs_of("llama")).loss
            with lazy_logits(model):
                assert float(model(**inputs_of("llama")).loss) == pytest.approx(float(expected), rel=1e-6)


# --- Trainer -----------------------------------------------------------------------------------------------------------

EVALUATED = 2  # times that the logits of an evaluation are made, one batch each, for compute_metrics

TRAINED: dict[str, dict[str, Any]] = {
    "plain": {}, "accumulated": {"gradient_accumulation_steps": 3}, "smoothed": {"label_smoothing_factor": 0.1},
    "checkpointed": {"gradient_checkpointing": True}, "bf16": {"bf16": True},
}  # fmt: skip


@pytest.mark.parametrize("name", TRAINED)
def test_trainer_logs_the_same(name, tmp_path):
    expected, _, _ = lazy_trainer.trained(tmp_path, lazy=False, **TRAINED[name])
    logs, made, _ = lazy_trainer.trained(tmp_path, lazy=True, **TRAINED[name])
    assert made == EVALUATED
    losses = [step["loss"] for step in expected if "loss" in step]
    assert len(losses) == 4
    assert losses[0] != losses[-1]
    # Stock logits are rounded to bf16; those of the streamed loss are not.
    bound = 5e-3 if name == "bf16" else 1e-5
    require_same_logs(logs, expected, bound)


def test_logs_in_bf16_differ_as_those_of_another_rounding(tmp_path):
    """The stock trainer rounds its logits. A relative change of 6e-8 of the weights moves its logs as much."""

    def deviation(**options: Any) -> float:
        logs, _, _ = lazy_trainer.trained(tmp_path, bf16=True, **options)
        return max(
            abs(ours["loss"] / step["loss"] - 1) for ours, step in zip(logs, expected, strict=True) if "loss" in step
        )

    expected, _, _ = lazy_trainer.trained(tmp_path, bf16=True, lazy=False)
    of_rounding = max(deviation(lazy=False, jitter=jitter) for jitter in (6e-8, 1.2e-7))
    assert 0 < deviation(lazy=True) <= 3 * of_rounding < 3e-3


def require_same_logs(logs: list[dict[str, float]], expected: list[dict[str, float]], bound: float) -> None:
    assert len(logs) == len(expected) > 4
    for ours, theirs in zip(logs, expected, strict=True):
        assert all(map(math.isfinite, theirs.values()))
        assert ours == pytest.approx(theirs, rel=bound, abs=1e-2 * bound)


def test_a_training_that_diverges_logs_the_same(tmp_path):
    options = {"learning_rate": 1e30, "logging_nan_inf_filter": False}
    expected, _, _ = lazy_trainer.trained(tmp_path, lazy=False, **options)
    logs, _, _ = lazy_trainer.trained(tmp_path, lazy=True, **options)
    losses = [step["loss"] for step in expected if "loss" in step]
    assert math.isfinite(losses[0])
    assert math.isnan(losses[-1])
    for ours, theirs in zip(logs, expected, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-5, nan_ok=True)


def test_saved_resumed_and_generated(tmp_path):
    options = {"save_strategy": "steps", "save_steps": 2}
    expected, _, stock = lazy_trainer.trained(tmp_path / "stock", lazy=False, **options)
    _, _, first = lazy_trainer.trained(tmp_path / "lazy", lazy=True, **options)
    log, _, resumed = lazy_trainer.trained(
        tmp_path / "lazy", lazy=True, resume=str(tmp_path / "lazy" / "checkpoint-2"), **options
    )
    require_same_logs(log[:-1], expected[:-1], 1e-5)  # the mean loss at the end is of the resumed steps
    ids = lazy_trainer.Rows(3, 2).batch()["input_ids"]
    for options in ({"do_sample": False}, {"do_sample": True, "top_k": 5}, {"num_beams": 3}):
        expected = generated(stock, ids, **options)
        assert generated(first, ids, **options).equal(expected)
        for model in (stock, first, resumed):
            with lazy_logits(model):
                assert generated(model, ids, **options).equal(expected)
    reloaded = type(stock).from_pretrained(tmp_path / "lazy" / "checkpoint-4")
    assert reloaded.state_dict().keys() == stock.state_dict().keys()
    assert reloaded(ids).logits.allclose(stock.eval()(ids).logits, rtol=1e-4, atol=1e-5)


def generated(model: Any, ids: Tensor, **options: Any) -> Tensor:
    transformers.set_seed(3)
    return model.eval().generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, **options)


def test_trainer_in_two_processes(tmp_path):
    processes = lazy_trainer.in_processes(2, tmp_path)
    assert len(processes) == 2
    for runs in processes:
        assert {name: run["sharded"] for name, run in runs.items()} == {
            "ddp": False, "fsdp2": True, "fsdp2, smoothed": True,
        }  # fmt: skip
        for run in runs.values():
            require_same_logs(run["lazy"], run["stock"], 1e-5)
            assert run["made"] == EVALUATED


# --- TRL ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["sft", "sft, soft cap", "dpo", "grpo", "gkd, given answers", "gkd, sampled answers"])
def test_trainers_of_trl_log_the_same(name, tmp_path):
    case = test_trl.CASES[name]
    theirs = test_trl.logged(case, tmp_path / "theirs")
    trainer = case.trainer(case.model, tmp_path / "ours")
    others = [getattr(trainer, part, None) for part in ("teacher_model", "ref_model")]
    with lazy_logits(trainer.model):
        handles = [lazy_logits(other) for other in others if other is not None]
        trainer.train()
        for handle in handles:
            handle.remove()
    ours = [step for step in trainer.state.log_history if "loss" in step]
    assert len(ours) == len(theirs) == test_trl.STEPS
    for wanted, figures in zip(theirs, ours, strict=True):
        assert {k: figures[k] for k in wanted} == pytest.approx(wanted, rel=test_trl.TOLERANCE, abs=test_trl.ZERO)


# --- memory ------------------------------------------------------------------------------------------------------------

ROWS, WIDE = 512, 32768

PEAK = f"""
import logging, os, sys, warnings
os.environ["HF_HUB_OFFLINE"] = "1"
warnings.simplefilter("ignore")
import torch, transformers
from bench.measure import extra_peak_of
from softcurve import lazy_logits
torch.set_num_threads(1)
config = transformers.LlamaConfig(vocab_size={WIDE}, hidden_size=64, intermediate_size=64, num_hidden_layers=1,
                                  num_attention_heads=4, pad_token_id=0, bos_token_id=1, eos_token_id=2)
model = transformers.LlamaForCausalLM(config)
ids = torch.randint(3, {WIDE}, (2, {ROWS // 2}))
handle = lazy_logits(model, memory_budget=2**24) if {{lazy}} else None
model(ids[:, :4], labels=ids[:, :4]).loss.backward()
print(extra_peak_of(lambda: model(ids, labels=ids).loss.backward()))
"""


def test_peak_memory(run_python):
    stock, lazy = (float(run_python(PEAK.format(lazy=lazy)).stdout.split()[-1]) for lazy in (False, True))
    logits_and_gradient = 2 * ROWS * WIDE * 4 / 2**20
    assert stock - lazy >= 0.9 * logits_and_gradient
