"""A short run of transformers' ``Trainer``, with and without unmade logits, alone or as one of several processes."""

from __future__ import annotations

import json
import os
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from softcurve import lazy_logits

os.environ.setdefault("HF_HUB_OFFLINE", "1")
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import transformers
    from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin

V, LENGTH = 97, 14
TIMES = ("runtime", "per_second", "total_flos")


class Rows(torch.utils.data.Dataset[dict[str, Tensor]]):
    """Random sequences of different lengths, with a prompt and padding that have no labels."""

    def __init__(self, seed: int, count: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.ids = torch.randint(3, V, (count, LENGTH), generator=generator)
        lengths = torch.randint(5, LENGTH, (count, 1), generator=generator)
        self.mask = (torch.arange(LENGTH) < lengths).long()
        self.labels = self.ids.masked_fill(self.mask == 0, -100)
        self.labels[:, :2] = -100

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, row: Any) -> dict[str, Tensor]:
        return {
            "input_ids": self.ids[row] * self.mask[row],
            "attention_mask": self.mask[row],
            "labels": self.labels[row],
        }

    def batch(self) -> dict[str, Tensor]:
        return self[slice(None)]


class ShardingTrainer(transformers.Trainer):  # type: ignore[misc]
    """A ``Trainer`` whose accelerator shards by FSDP2 on the CPU, where accelerate ignores the plugin.

    ``AcceleratorState`` selects FSDP for every kind of accelerator, but not for ``MULTI_CPU``.
    """

    def create_accelerator_and_postprocess(self) -> None:
        super().create_accelerator_and_postprocess()
        state = self.accelerator.state
        state.distributed_type = DistributedType.FSDP
        state.fsdp_plugin = FullyShardedDataParallelPlugin(**self.args.fsdp_plugin_args)
        self.is_fsdp_enabled = True


SHARDED = {"fsdp": True, "fsdp_config": {"version": 2, "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"]}}


def metrics(prediction: Any) -> dict[str, float]:
    logits, labels = prediction.predictions[:, :-1], prediction.label_ids[:, 1:]
    counts = labels != -100
    hits = logits.argmax(-1) == labels
    return {"accuracy": float(hits[counts].mean()), "spread": float(logits.std())}


def trained(
    folder: Path, *, lazy: bool, resume: str | None = None, jitter: float = 0.0, **options: Any
) -> tuple[list[dict[str, float]], int, Any]:
    """Train and return what was logged, without times, how often logits were made, and the model.

    The weights of the beginning are changed by a relative ``jitter``.
    """
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=V, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, pad_token_id=0, bos_token_id=1, eos_token_id=2, initializer_range=0.2,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config)
    for parameter in model.parameters():
        parameter.data.mul_(1 + jitter * torch.randn_like(parameter))
    settings = {"save_strategy": "no", "learning_rate": 1e-3, "eval_strategy": "steps", "eval_steps": 2, **options}
    arguments = transformers.TrainingArguments(
        str(folder), per_device_train_batch_size=4, max_steps=4, logging_steps=1, use_cpu=True, report_to="none",
        disable_tqdm=True, **settings,
    )  # fmt: skip
    kind = ShardingTrainer if "fsdp" in options else transformers.Trainer
    trainer = kind(model, arguments, train_dataset=Rows(1, 24), eval_dataset=Rows(2, 8), compute_metrics=metrics)
    handle = lazy_logits(model) if lazy else None
    trainer.train(resume_from_checkpoint=resume)
    made = 0
    if handle is not None:
        handle.remove()
        made = handle.materialized
    log = [
        {k: v for k, v in step.items() if not any(time in k for time in TIMES)} for step in trainer.state.log_history
    ]
    return log, made, model


def in_processes(count: int, folder: Path) -> list[dict[str, Any]]:
    """Return what each of several processes logged, under DDP and under FSDP2."""
    from tests.spawned import start, wait

    ended = wait(start(count, "-m", "tests.integration.lazy_trainer", str(folder)), timeout=300)
    assert not any(ended.codes), "\n".join(error[-3000:] for error in ended.errors)
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(count)]


def main() -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    folder, rank = Path(sys.argv[1]), os.environ["RANK"]
    os.environ["LOCAL_RANK"] = rank
    results = {}
    for name, options in {
        "ddp": {},
        "fsdp2": SHARDED,
        "fsdp2, smoothed": {**SHARDED, "label_smoothing_factor": 0.1},
    }.items():
        stock, _, _ = trained(folder / "out", lazy=False, ddp_backend="gloo", **options)
        lazy, made, model = trained(folder / "out", lazy=True, ddp_backend="gloo", **options)
        sharded = isinstance(model, torch.distributed.fsdp.FSDPModule)
        results[name] = {"stock": stock, "lazy": lazy, "made": made, "sharded": sharded}
    (folder / f"{rank}.json").write_text(json.dumps(results))


if __name__ == "__main__":
    main()
