"""TRL's trainers log the same figures with softcurve's functions of a head in place of their own.

Each trainer runs a few steps twice from the same seed, on a small random model: as TRL has it, and with the function that
computes log-probabilities, entropies or divergences from hidden states replaced. This needs the extra ``integration``.
"""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import softcurve

os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # models, tokenizers and data are made here
with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # what these packages warn of on import is not softcurve's
    trl = pytest.importorskip("trl")
    datasets = pytest.importorskip("datasets")
    transformers = pytest.importorskip("transformers")
    from tokenizers import Tokenizer, models, pre_tokenizers
    from trl.experimental import gkd
    from trl.trainer import distillation_trainer, utils

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("default::FutureWarning"),  # transformers warns of its own names, which TRL uses
]

STEPS, BATCH, WORDS, RATE = 4, 4, 301, 2e-4
TOLERANCE, ZERO = (
    1e-5,
    2e-7,
)  # relative; and absolute, for sums that cancel, such as GRPO's policy loss in its first step
TIMES = ("runtime", "per_second", "step_time", "epoch", "total_flos")
CHAT = (
    "{% for m in messages %}w1 {{ m['role'] }} {{ m['content'] }} w2 {% endfor %}"
    "{% if add_generation_prompt %}w1 assistant {% endif %}"
)


# --- the functions that replace TRL's ----------------------------------------------------------------------------------


def log_probs_of_head(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, temperature: float, chunk_size: int,
    softcap: float | None, scale: float, outputs: tuple[str, ...],
) -> tuple[Tensor | None, ...]:  # fmt: skip
    """Stand in for ``ChunkedLogProbFunction.apply``: one call of ``linear_log_probs`` has all but two metrics."""
    assert scale == 1.0
    found = softcurve.linear_log_probs(
        hidden, weight, targets, linear_bias=bias, temperature=temperature, softcap=softcap
    )
    mean, top1 = metrics_of_logits(hidden, weight, targets)
    return found.log_probs, found.entropy, found.collision, mean / temperature, top1


def cross_entropy_of_head(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, temperature: float, chunk_size: int,
    softcap: float | None, scale: float, outputs: tuple[str, ...],
) -> tuple[Tensor | None, ...]:  # fmt: skip
    """Do the same by the losses of ``linear_cross_entropy`` and their statistics."""
    assert scale == 1.0
    losses, stats = softcurve.linear_cross_entropy(
        hidden, weight, targets, linear_bias=bias, temperature=temperature, softcap=softcap, reduction="none",
        return_stats=True,
    )  # fmt: skip
    mean, top1 = metrics_of_logits(hidden, weight, targets)
    return -losses, stats.entropy, stats.collision, mean / temperature, top1


@torch.no_grad()
def metrics_of_logits(hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Return the mean logit over classes (TRL's ``logits/chosen``, without a cap) and whether the target is the largest."""
    return hidden @ weight.mean(0), (hidden @ weight.T).argmax(-1) == targets


def divergence_of_heads(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, teacher_hidden: Tensor, teacher_weight: Tensor,
    teacher_bias: Tensor | None, beta: float, temperature: float, scale: float, softcap: float | None,
    teacher_scale: float, teacher_softcap: float | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Stand in for ``ChunkedDivergenceFunction.apply``, whose loss has no factor ``T²``."""
    assert scale == 1.0
    teacher = softcurve.LinearTeacher(
        teacher_hidden, teacher_weight, teacher_bias, softcap=teacher_softcap, scale=teacher_scale
    )
    labels = torch.zeros(len(hidden), dtype=torch.int64)  # of no effect: alpha is 0
    losses = softcurve.linear_distillation(
        hidden, weight, labels, teacher, alpha=0.0, divergence=softcurve.JensenShannon(beta), linear_bias=bias,
        temperature=temperature, softcap=softcap, reduction="none",
    )  # fmt: skip
    with torch.no_grad():
        found = softcurve.linear_log_probs(
            hidden, weight, None, linear_bias=bias, temperature=temperature, softcap=softcap
        )
    return losses / temperature**2, found.entropy


def gkd_loss(
    self: Any, model: Any, inputs: dict[str, Tensor], return_outputs: bool = False, num_items_in_batch: Any = None
) -> Tensor:
    """Stand in for ``GKDTrainer.compute_loss``, which holds the logits of both models."""
    given = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    with torch.no_grad():
        of_teacher = self.teacher_model.eval().base_model(**given).last_hidden_state
    teacher = softcurve.LinearTeacher(of_teacher[:, :-1], self.teacher_model.get_output_embeddings().weight)
    return softcurve.linear_js_divergence(
        model.base_model(**given).last_hidden_state[:, :-1], model.get_output_embeddings().weight, teacher,
        beta=self.beta, sample_weight=(inputs["labels"][:, 1:] != -100).float(), reduction="sum",
    ) / num_items_in_batch  # fmt: skip


# --- models and data ---------------------------------------------------------------------------------------------------


@cache
def tokenizer() -> Any:
    """Make a tokenizer of words ``w0`` to ``w300`` and the roles of a conversation."""
    words = ["<pad>", "<eos>", "<unk>", "user", "assistant", *(f"w{i}" for i in range(WORDS - 5))]
    made = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>"
    )
    fast.chat_template = CHAT
    return fast


def qwen2(seed: int, width: int = 64) -> Any:
    """Make a random Qwen2, whose head has its own weight and no bias."""
    return made(seed, transformers.Qwen2ForCausalLM, transformers.Qwen2Config, width, tie_word_embeddings=False)


def gemma2(seed: int, width: int = 64) -> Any:
    """Make a random Gemma2, whose head is tied to the embedding and whose logits are capped, here within ±2."""
    return made(
        seed, transformers.Gemma2ForCausalLM, transformers.Gemma2Config, width, head_dim=16,
        final_logit_softcapping=2.0, query_pre_attn_scalar=16, attn_implementation="eager",
    )  # fmt: skip


def made(seed: int, model: Any, config: Any, width: int, **options: Any) -> Any:
    """Make a random model with wide logits, so that a distribution is far from uniform."""
    torch.manual_seed(seed)
    options |= {"vocab_size": WORDS, "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": None}
    options |= {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    options |= {"max_position_embeddings": 64, "initializer_range": 0.2}
    return model(config(hidden_size=width, intermediate_size=2 * width, **options))


def sentences(seed: int, shortest: int, longest: int) -> list[str]:
    """Return random sentences of different lengths."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(shortest, longest + 1, (BATCH * STEPS,), generator=generator).tolist()
    return [" ".join(f"w{i}" for i in torch.randint(3, 290, (n,), generator=generator).tolist()) for n in lengths]


def messages(prompt: str, answer: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]


def even_words(completions: list[str], **_: Any) -> list[float]:
    """Reward the fraction of words with an even number."""
    split = [completion.split() for completion in completions]
    return [sum(word[-1] in "02468" for word in words) / max(1, len(words)) for words in split]


# --- the trainers ------------------------------------------------------------------------------------------------------


def arguments(config: Any, folder: Any, **options: Any) -> Any:
    """Return the arguments of a short run on the CPU in float32 that logs every step."""
    return config(
        output_dir=str(folder), per_device_train_batch_size=BATCH, max_steps=STEPS, logging_steps=1, save_strategy="no",
        learning_rate=RATE, use_cpu=True, bf16=False, report_to="none", disable_tqdm=True, gradient_checkpointing=False,
        seed=3, **options,
    )  # fmt: skip


def sft(model: Callable[..., Any], folder: Any) -> Any:
    rows = [{"prompt": p + " ", "completion": c} for p, c in zip(sentences(1, 2, 6), sentences(2, 3, 9), strict=True)]
    return trl.SFTTrainer(
        model(0), args=arguments(trl.SFTConfig, folder, max_length=32), processing_class=tokenizer(),
        train_dataset=datasets.Dataset.from_list(rows),
    )  # fmt: skip


def dpo(model: Callable[..., Any], folder: Any, *, weighted: bool = False) -> Any:
    """Compare with the reference, another model; ``weighted`` is WPO, whose weights take ``log Σp²``."""
    texts = (sentences(1, 2, 6), sentences(2, 3, 9), sentences(3, 3, 9))
    rows = [{"prompt": p + " ", "chosen": c, "rejected": r} for p, c, r in zip(*texts, strict=True)]
    return trl.DPOTrainer(
        model(0), model(5), args=arguments(trl.DPOConfig, folder, max_length=32, beta=0.1, use_weighting=weighted),
        processing_class=tokenizer(), train_dataset=datasets.Dataset.from_list(rows),
    )  # fmt: skip


def grpo(model: Callable[..., Any], folder: Any) -> Any:
    options = {"num_generations": 2, "max_completion_length": 8, "num_iterations": 2, "temperature": 0.7, "beta": 0.05}
    model(0).save_pretrained(folder / "initial")  # also the reference model of the KL term is read from there
    return trl.GRPOTrainer(
        str(folder / "initial"), even_words, args=arguments(trl.GRPOConfig, folder, entropy_coef=0.01, **options),
        processing_class=tokenizer(),
        train_dataset=datasets.Dataset.from_list([{"prompt": p} for p in sentences(1, 2, 6)]),
    )  # fmt: skip


def gkd_trainer(model: Callable[..., Any], folder: Any, lmbda: float) -> Any:
    """Sample all answers (``lmbda`` of 1) or none: the shape checks draw from the random numbers that decide between."""
    pairs = zip(sentences(1, 2, 6), sentences(2, 3, 9), strict=True)
    return gkd.GKDTrainer(
        model(0), model(5, 96), args=arguments(gkd.GKDConfig, folder, max_new_tokens=8, lmbda=lmbda, beta=0.3),
        processing_class=tokenizer(),
        train_dataset=datasets.Dataset.from_list([{"messages": messages(*pair)} for pair in pairs]),
    )  # fmt: skip


def distillation(model: Callable[..., Any], folder: Any) -> Any:
    options = {"max_completion_length": 8, "beta": 0.3, "temperature": 2.0}
    return trl.DistillationTrainer(
        model(0), model(5, 96), args=arguments(trl.DistillationConfig, folder, **options), processing_class=tokenizer(),
        train_dataset=datasets.Dataset.from_list([{"prompt": p} for p in sentences(1, 2, 6)]),
    )  # fmt: skip


LOG_PROBS, DIVERGENCE = (utils, "_ChunkedLogProbFunction"), (distillation_trainer, "ChunkedDivergenceFunction")
GKD_LOSS = gkd.GKDTrainer, "compute_loss"


@dataclass(frozen=True)
class Case:
    """A trainer, its model, what is replaced and by what, and some of the figures that it must log."""

    trainer: Callable[..., Any]
    model: Callable[..., Any]
    where: tuple[Any, str]
    by: Callable[..., Any]
    figures: tuple[str, ...] = ()


CASES = {
    "sft": Case(sft, qwen2, LOG_PROBS, log_probs_of_head, ("entropy", "mean_token_accuracy")),
    "sft, soft cap": Case(sft, gemma2, LOG_PROBS, log_probs_of_head, ("entropy",)),
    "sft, cross-entropy": Case(sft, gemma2, LOG_PROBS, cross_entropy_of_head, ("entropy",)),
    "dpo": Case(dpo, qwen2, LOG_PROBS, log_probs_of_head, ("rewards/margins", "logps/chosen", "logits/rejected")),
    "dpo, weighted": Case(partial(dpo, weighted=True), qwen2, LOG_PROBS, log_probs_of_head, ("rewards/accuracies",)),
    "grpo": Case(grpo, qwen2, LOG_PROBS, log_probs_of_head, ("reward", "kl", "entropy")),
    "gkd, given answers": Case(partial(gkd_trainer, lmbda=0.0), qwen2, GKD_LOSS, gkd_loss),
    "gkd, sampled answers": Case(partial(gkd_trainer, lmbda=1.0), qwen2, GKD_LOSS, gkd_loss),
    "distillation": Case(distillation, gemma2, DIVERGENCE, divergence_of_heads, ("entropy",)),
}


def logged(case: Case, folder: Any) -> list[dict[str, float]]:
    """Train and return the figures of each step, but those that measure time."""
    trainer = case.trainer(case.model, folder)
    trainer.train()
    steps = [step for step in trainer.state.log_history if "loss" in step]
    return [{k: v for k, v in step.items() if not any(time in k for time in TIMES)} for step in steps]


@pytest.mark.parametrize("name", CASES)
def test_a_trainer_logs_the_same_figures(name, tmp_path, monkeypatch):
    case, calls = CASES[name], 0
    theirs = logged(case, tmp_path / "theirs")

    def counted(*arguments: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        return case.by(*arguments, **options)

    owner, attribute = case.where
    is_function = hasattr(getattr(owner, attribute), "apply")
    monkeypatch.setattr(owner, attribute, SimpleNamespace(apply=counted) if is_function else counted)
    ours = logged(case, tmp_path / "ours")

    assert calls >= STEPS
    assert len(theirs) == STEPS
    assert theirs[0]["loss"] != theirs[-1]["loss"]  # the model has been trained
    assert {"loss", "grad_norm", *case.figures} <= theirs[0].keys()
    for wanted, found in zip(theirs, ours, strict=True):
        assert all(map(math.isfinite, wanted.values()))
        assert found == pytest.approx(wanted, rel=TOLERANCE, abs=ZERO)
