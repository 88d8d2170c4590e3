"""softcurve in stock trainers: metrics, smoothed labels, distillation, and curvature that leaves the training alone.

The oracles are stock trainers with dense logits. This needs the extra ``integration``.
"""

from __future__ import annotations

import os
import warnings
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import softcurve

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # models and data are made here
with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # what these packages warn of on import is not softcurve's
    transformers = pytest.importorskip("transformers")
    lightning = pytest.importorskip("lightning")
    from lightning.pytorch.loggers.logger import Logger

    from softcurve.integrations.lightning import CurvatureCallback as LightningCallback
    from softcurve.integrations.monitor import CurvatureMonitor
    from softcurve.integrations.transformers import CurvatureCallback, DistillationTrainer, token_metrics

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("default::FutureWarning"),  # transformers warns of its own names
    pytest.mark.filterwarnings("default::DeprecationWarning:lightning"),
]

WORDS, ALPHA, TEMPERATURE = 61, 0.3, 2.0
SHAPE = {
    "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
    "num_key_value_heads": 1, "vocab_size": WORDS, "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": None,
    "max_position_embeddings": 32, "initializer_range": 0.3, "attention_dropout": 0.2,
}  # fmt: skip
MODELS = {
    "qwen2": ("Qwen2", {}),
    "gemma2": ("Gemma2", {"head_dim": 8, "final_logit_softcapping": 3.0, "attn_implementation": "eager"}),
    "cohere": ("Cohere", {"logit_scale": 0.3}),
}


def made(name: str, seed: int = 0) -> Any:
    torch.manual_seed(seed)
    kind, options = MODELS[name]
    config = getattr(transformers, f"{kind}Config")(**SHAPE | options)
    return getattr(transformers, f"{kind}ForCausalLM")(config)


def sequences(n: int, seed: int) -> list[dict[str, Any]]:
    """Make sequences of different lengths, of which the first tokens are a prompt without labels."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for length in torch.randint(4, 11, (n,), generator=generator).tolist():
        ids = torch.randint(2, WORDS, (length,), generator=generator).tolist()
        rows.append({"input_ids": ids, "labels": [-100, -100, *ids[2:]], "attention_mask": [1] * length})
    return rows


def collate(rows: list[dict[str, Any]]) -> dict[str, Tensor]:
    longest = max(len(row["labels"]) for row in rows)
    fill = {"input_ids": 0, "labels": -100, "attention_mask": 0}
    batch = {
        name: torch.tensor([row[name] + [value] * (longest - len(row[name])) for row in rows])
        for name, value in fill.items()
    }
    if "teacher_rows" in rows[0]:
        batch["teacher_rows"] = torch.tensor([row["teacher_rows"] for row in rows])
    return batch


def arguments(folder: Any, **options: Any) -> Any:
    defaults = {"gradient_accumulation_steps": 3, "max_steps": 3, "logging_steps": 1, "learning_rate": 1e-2}
    return transformers.TrainingArguments(
        output_dir=str(folder), per_device_train_batch_size=2, per_device_eval_batch_size=3, save_strategy="no",
        use_cpu=True, report_to="none", disable_tqdm=True, seed=3, remove_unused_columns=False,
        **(defaults | options),
    )  # fmt: skip


def trained(folder: Any, model: Any, kind: Any = transformers.Trainer, options: Any = None, **more: Any) -> Any:
    data = more.pop("train_dataset", None) or sequences(18, 1)
    trainer = kind(
        model, arguments(folder, **(options or {})), data_collator=collate, train_dataset=data,
        eval_dataset=sequences(7, 2), **more,
    )  # fmt: skip
    trainer.train()
    return trainer


def figures(trainer: Any, *names: str) -> list[float]:
    return [row[name] for row in trainer.state.log_history for name in names if name in row]


def same_weights(one: nn.Module, other: nn.Module) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


# --- metrics and smoothed labels -----------------------------------------------------------------------------------------


def dense_metrics(prediction: Any) -> dict[str, float]:
    z = torch.as_tensor(prediction.predictions)[:, :-1].double()
    labels = torch.as_tensor(prediction.label_ids)[:, 1:]
    counted = labels != -100
    log_p = z.log_softmax(-1)[counted]
    nll = F.nll_loss(log_p, labels[counted])
    return {
        "accuracy": (log_p.argmax(-1) == labels[counted]).double().mean().item(),
        "perplexity": nll.exp().item(),
        "entropy": -(log_p.exp() * log_p).sum(-1).mean().item(),
    }


@pytest.mark.parametrize("lazy", [True, False])
@pytest.mark.parametrize("name", MODELS)
def test_metrics_are_those_of_the_logits_without_making_them(tmp_path, name, lazy):
    data = sequences(7, 2)
    evaluate = {"args": arguments(tmp_path), "data_collator": collate, "eval_dataset": data}
    expected = transformers.Trainer(made(name), compute_metrics=dense_metrics, **evaluate).evaluate()
    model = made(name)
    trainer = transformers.Trainer(model, **token_metrics(), **evaluate)
    if lazy:
        with softcurve.lazy_logits(model, on_materialize="raise") as head:
            measured = trainer.evaluate()
        assert head.materialized == 0
    else:
        measured = trainer.evaluate()
    for figure in ("eval_loss", "eval_accuracy", "eval_perplexity", "eval_entropy"):
        assert measured[figure] == pytest.approx(expected[figure], rel=2e-6), figure


@pytest.mark.parametrize("lazy", [True, False])
def test_metrics_of_a_diverged_model_are_nan(tmp_path, lazy):
    model = made("qwen2")
    with torch.no_grad():
        model.lm_head.weight[3] = torch.nan
    evaluate = {"args": arguments(tmp_path), "data_collator": collate, "eval_dataset": sequences(7, 2)}
    trainer = transformers.Trainer(model, **token_metrics(), **evaluate)
    with softcurve.lazy_logits(model) if lazy else nullcontext():
        measured = trainer.evaluate()
    assert all(np.isnan(measured[f"eval_{name}"]) for name in ("loss", "accuracy", "perplexity", "entropy"))


def test_labels_are_smoothed_without_logits(tmp_path):
    options = {"label_smoothing_factor": 0.2}
    stock = trained(tmp_path, made("gemma2"), options=options)
    model = made("gemma2")
    with softcurve.lazy_logits(model, on_materialize="raise"):
        lazy = trained(tmp_path, model, options=options)
    assert figures(lazy, "loss", "grad_norm") == pytest.approx(figures(stock, "loss", "grad_norm"), rel=1e-5)
    assert len(figures(lazy, "loss")) == 3


# --- distillation --------------------------------------------------------------------------------------------------------


class Dense(transformers.Trainer):
    """The loss of distillation as it is often written: from the logits of both models."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        inputs, labels = {n: inputs[n] for n in ("input_ids", "attention_mask")}, inputs["labels"][:, 1:]
        outputs = model(**inputs)
        with torch.no_grad():
            teacher = self.teacher(**inputs).logits[:, :-1]
        z, counted = outputs.logits[:, :-1], labels != -100
        of_labels = F.cross_entropy(z.transpose(1, 2), labels, reduction="none")
        log_p, log_q = (F.log_softmax(each / TEMPERATURE, -1) for each in (z, teacher))
        kl = (log_q.exp() * (log_q - log_p)).sum(-1) * counted
        loss = (ALPHA * of_labels + (1 - ALPHA) * TEMPERATURE**2 * kl).sum()
        loss = loss / (counted.sum() if num_items_in_batch is None else num_items_in_batch)
        return (loss, outputs) if return_outputs else loss


@pytest.fixture(scope="module")
def dense_teacher() -> Any:
    return made("gemma2", seed=5).eval()


def dense(folder: Any, name: str, teacher: Any) -> Any:
    kind = type("DenseOfTeacher", (Dense,), {"teacher": teacher})
    return trained(folder, made(name), kind, {"eval_strategy": "steps", "eval_steps": 3})


@pytest.mark.parametrize("name", MODELS)
def test_a_teacher_on_each_batch_is_the_dense_loss(tmp_path, name, dense_teacher):
    stock, model = dense(tmp_path, name, dense_teacher), made(name)
    lazy = trained(
        tmp_path, model, DistillationTrainer, {"eval_strategy": "steps", "eval_steps": 3}, teacher=dense_teacher,
        alpha=ALPHA, temperature=TEMPERATURE, **token_metrics(),
    )  # fmt: skip
    names = ("loss", "grad_norm", "eval_loss")
    assert figures(lazy, *names) == pytest.approx(figures(stock, *names), rel=1e-5)
    assert len(figures(lazy, "eval_accuracy")) == 1
    assert "forward" not in vars(model.lm_head)
    assert "forward" not in vars(dense_teacher.lm_head)


def test_a_trainer_that_smooths_labels_does_so_beside_a_teacher(tmp_path, dense_teacher):
    options = {"label_smoothing_factor": 0.2, "eval_strategy": "steps", "eval_steps": 3}
    stock = trained(tmp_path, made("qwen2"), options=options)
    of_labels = trained(tmp_path, made("qwen2"), DistillationTrainer, options, teacher=dense_teacher, alpha=1.0)
    names = ("loss", "grad_norm", "eval_loss")
    assert figures(of_labels, *names) == pytest.approx(figures(stock, *names), rel=1e-5)
    assert len(figures(stock, *names)) == 7


def test_a_distillation_that_diverges_goes_on(tmp_path, dense_teacher):
    options = {"learning_rate": 1e30, "logging_nan_inf_filter": False}
    trainer = trained(tmp_path, made("qwen2"), DistillationTrainer, options, teacher=dense_teacher, alpha=ALPHA)
    losses, norms = figures(trainer, "loss"), figures(trainer, "grad_norm")
    assert len(losses) == len(norms) == 3
    assert np.isfinite([losses[0], norms[0]]).all()
    assert np.isnan([losses[-1], norms[-1]]).all()


def test_a_cached_teacher_is_the_teacher(tmp_path, dense_teacher):
    """The lists are of all words, in rows of tokens; a sequence knows the row of its first."""
    data = sequences(18, 1)
    with torch.no_grad(), softcurve.lazy_logits(dense_teacher, on_materialize="raise"), \
            softcurve.TopKWriter(tmp_path / "cache", classes=WORDS) as writer:  # fmt: skip
        for start in range(0, len(data), 6):
            rows = data[start : start + 6]
            batch = collate(rows)
            arguments = {name: batch[name] for name in ("input_ids", "attention_mask")}
            log_probs, indices = dense_teacher(**arguments).logits.log_softmax(-1).topk(WORDS)
            lengths = np.cumsum([0, *(len(row["labels"]) for row in rows)])
            for row, first in zip(rows, lengths[:-1].tolist(), strict=True):
                row["teacher_rows"] = len(writer) + first
            writer.append(softcurve.TopK(indices, log_probs)[batch["attention_mask"].bool()])
    options = {"alpha": ALPHA, "train_dataset": data}
    online = trained(tmp_path, made("qwen2"), DistillationTrainer, teacher=dense_teacher, **options)
    model, cache = made("qwen2"), softcurve.TopK.load(tmp_path / "cache")
    with softcurve.lazy_logits(model, on_materialize="raise"):  # which may be there already
        cached = trained(tmp_path, model, DistillationTrainer, teacher=cache, **options)
    assert figures(cached, "loss", "grad_norm") == pytest.approx(figures(online, "loss", "grad_norm"), rel=1e-4)


def test_a_model_without_a_head_or_a_batch_without_rows_is_an_error(tmp_path, dense_teacher):
    bare = made("qwen2").model
    with pytest.raises(ValueError, match="head must be given for a Qwen2Model"):
        trained(tmp_path, bare, DistillationTrainer, teacher=dense_teacher, alpha=ALPHA)
    softcurve.TopK(torch.zeros(3, 1).long(), torch.full((3, 1), -1.0)).save(tmp_path / "lists", classes=WORDS)
    with pytest.raises(ValueError, match=r"inputs must hold 'teacher_rows'.*remove_unused_columns=False"):
        trained(
            tmp_path, made("qwen2"), DistillationTrainer, teacher=softcurve.TopK.load(tmp_path / "lists"), alpha=ALPHA
        )
    with pytest.raises(ValueError, match="compute_loss_func must not be passed"):
        DistillationTrainer(made("qwen2"), teacher=dense_teacher, alpha=ALPHA, compute_loss_func=print)


# --- curvature -----------------------------------------------------------------------------------------------------------

NAMES = ["top_eigenvalue", "trace", "trace_error", "gradient_noise_scale"]


@pytest.mark.parametrize("case", ["plain", "lazy", "bf16", "checkpointing"])
def test_a_trainer_logs_curvature_and_trains_as_without(tmp_path, case):
    """Dropout makes the weights depend on the random numbers of each step."""
    more = {"plain": {}, "lazy": {}, "bf16": {"bf16": True}, "checkpointing": {"gradient_checkpointing": True}}[case]
    batches = [collate(sequences(5, 4))]

    def run(with_callback: bool) -> Any:
        model = made("qwen2")
        trainer = transformers.Trainer(
            model, arguments(tmp_path, max_steps=4, **more), data_collator=collate, train_dataset=sequences(24, 1)
        )
        if with_callback:
            trainer.add_callback(CurvatureCallback(trainer, batches, every=2, shift=1, products=8, matrix="hessian"))
        if case == "lazy":
            with softcurve.lazy_logits(model, on_materialize="raise"):
                trainer.train()
        else:
            trainer.train()
        return trainer

    without, measured = run(False), run(True)
    assert same_weights(without.model, measured.model)
    rows = [row for row in measured.state.log_history if "curvature/trace" in row]
    assert [row["step"] for row in rows] == [2, 4]
    for row in rows:
        assert all(np.isfinite(row[f"curvature/{name}"]) for name in NAMES[:3])
        assert row["curvature/top_eigenvalue"] > 0
        assert row["curvature/gradient_noise_scale"] > 0
    assert figures(without, "loss", "grad_norm") == figures(measured, "loss", "grad_norm")


def test_a_diverged_model_is_measured_as_nan():
    model, data = made("qwen2"), [collate(sequences(5, 4))]
    monitors = [CurvatureMonitor(data, shift=1, products=8) for _ in range(2)]
    before = monitors[0].measure(model, 0)
    assert not any(map(np.isnan, before.values()))
    with torch.no_grad():
        model.lm_head.weight[3] = torch.nan
    for monitor in monitors:  # one has measured before
        measured = monitor.measure(model, 1)
        assert measured.keys() == before.keys() == {f"curvature/{name}" for name in NAMES}
        assert all(map(np.isnan, measured.values()))


def test_a_forgotten_shift_is_named(tmp_path):
    model, data = made("qwen2"), [collate(sequences(3, 4))]
    trainer = transformers.Trainer(model, arguments(tmp_path))
    callback = CurvatureCallback(trainer, data, every=1, figures=("gradient_noise",))
    with pytest.warns(UserWarning, match=r"the loss of a batch is .* a causal language model needs shift=1"):
        callback.monitor.measure(model, 1)


def test_a_model_that_cannot_be_split_is_refused_before_it_is_trained(tmp_path):
    trainer = transformers.Trainer(
        nn.Linear(2, 2), arguments(tmp_path), data_collator=collate, train_dataset=sequences(2, 1)
    )
    trainer.add_callback(CurvatureCallback(trainer, [collate(sequences(3, 4))], shift=1))
    with pytest.raises(ValueError, match="head must be given for a Linear"):
        trainer.train()
    callback = LightningCallback([(torch.zeros(2, 4), torch.zeros(2).long())], head="lm_head")
    with pytest.raises(ValueError, match="head must be the name of a Linear of the model"):
        callback.on_fit_start(lightning.Trainer(accelerator="cpu", logger=False), Classifier())


class Recording(Logger):
    """A logger that keeps what it receives."""

    name, version = "recording", 0

    def __init__(self):
        super().__init__()
        self.rows = []

    def log_metrics(self, metrics, step=None):
        self.rows.append((step, metrics))

    def log_hyperparams(self, *args, **kwargs):
        pass


class Classifier(lightning.LightningModule):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Dropout(0.3))
        self.head = nn.Linear(8, 3)
        self.body[0].eval()  # a mode that a call of train() would not give back

    def forward(self, x):
        return self.head(self.body(x))

    def training_step(self, batch, _):
        return F.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=0.05)


@pytest.mark.filterwarnings("ignore:.*does not have many workers:UserWarning")
@pytest.mark.filterwarnings("ignore:The number of training batches:UserWarning")
@pytest.mark.filterwarnings("ignore:Found 1 module.* in eval mode:UserWarning")
def test_lightning_logs_curvature_and_trains_as_without(tmp_path):
    x = torch.randn(24, 4)
    y = torch.randint(3, (24,))
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), batch_size=4)

    def run(*callbacks: Any) -> tuple[Any, Any, Any]:
        torch.manual_seed(1)
        module, logger = Classifier(), Recording()
        trainer = lightning.Trainer(
            accelerator="cpu", max_epochs=2, accumulate_grad_batches=2, logger=logger, callbacks=list(callbacks),
            enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
            default_root_dir=tmp_path,
        )  # fmt: skip
        trainer.fit(module, loader)
        return module, logger, trainer

    callback = LightningCallback([(x, y)], every=2, head="head")
    without, _, _ = run()
    module, logger, trainer = run(callback)
    assert trainer.global_step == 6
    assert same_weights(without, module)
    assert all(torch.equal(a, b) for a, b in zip(without.buffers(), module.buffers(), strict=True))
    assert not module.body[0].training
    rows = [(step, row) for step, row in logger.rows if "curvature/trace" in row]
    assert rows == callback.history
    assert [step for step, _ in rows] == [2, 4, 6]
    assert sorted(rows[0][1]) == sorted(f"curvature/{name}" for name in NAMES)


@pytest.mark.parametrize("resumed", [False, True])
def test_a_second_fit_is_measured_as_the_first(resumed, without_shape_checks):
    """A new trainer, which begins at step 0, and the same one, which goes on."""
    callback = LightningCallback([(torch.zeros(2, 4), torch.zeros(2).long())], every=2, head="head")
    measured = []
    callback.monitor.measure = lambda module, step: measured.append(step) or {}
    trainer = SimpleNamespace(global_step=0, is_global_zero=True, loggers=[])
    for first in (0, 2 if resumed else 0):
        trainer.global_step = first
        callback.on_train_start(trainer, None)
        for step in (0, 1, 1, 2, 2):  # two batches a step
            trainer.global_step = first + step
            callback.on_train_batch_end(trainer, None, None, None, 0)
    assert measured == ([2, 4] if resumed else [2, 2])
