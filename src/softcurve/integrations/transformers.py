"""softcurve in ``transformers.Trainer``: metrics of tokens, distillation, and the curvature while training.

The loss itself needs nothing but :func:`softcurve.lazy_logits` around ``trainer.train()``. This module needs the extra
``integration``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Unpack

from torch import Tensor, nn

from softcurve.curvature.network import Batch
from softcurve.extras import needed
from softcurve.integrations.distillation import ROWS, Distillation, logits_of
from softcurve.integrations.heads import unmade_logits
from softcurve.integrations.metrics import token_metrics
from softcurve.integrations.monitor import CurvatureMonitor, MonitorOptions
from softcurve.linear import FORWARD_KL
from softcurve.losses.divergences import Divergence
from softcurve.losses.topk import TopKCache
from softcurve.typing import Integer, Number

with needed("softcurve.integrations.transformers", "integration"):
    from transformers import Trainer, TrainerCallback

if TYPE_CHECKING:
    from softcurve.losses.targets import Target

__all__ = ["CurvatureCallback", "DistillationTrainer", "token_metrics"]


class CurvatureCallback(TrainerCallback):  # type: ignore[misc]
    """Log the curvature of the model on fixed batches during training, by ``trainer.log``.

    Args:
        trainer: The ``Trainer`` whose loggers receive the figures ``curvature/top_eigenvalue``, ``curvature/trace``,
            its standard error ``curvature/trace_error``, and ``curvature/gradient_noise_scale``, in sequences.
        data: A list of batches, such as ``[trainer.data_collator([dataset[i] for i in range(16)])]``.
        every, options: Those of :class:`~softcurve.integrations.monitor.CurvatureMonitor`. A causal language model
            needs ``shift=1``.

    Weights, gradients, optimizer, module modes, buffers and the global random generators of torch, numpy and Python are
    left as they are, so that a training with the callback ends at the same weights as without. A measurement takes
    about as long as 100 steps on the batches, of which the noise takes 4 and the trace 30. In several processes the
    first one measures while the others wait.

    Raises:
        TypeError, ValueError: If an argument has a wrong type or value; when the training begins, if the model has no
            head that can be split off (see :func:`softcurve.curvature.split_head`), as inside FSDP or with a LoRA
            adapter on the head.

    Example:
        >>> from softcurve.integrations.transformers import CurvatureCallback
        >>> from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments
        >>> shape = {"num_hidden_layers": 1, "num_attention_heads": 2, "hidden_size": 16, "intermediate_size": 32}
        >>> model = LlamaForCausalLM(LlamaConfig(vocab_size=50, **shape))
        >>> data = [{"input_ids": row, "labels": row} for row in torch.randint(50, (8, 6))]
        >>> arguments = TrainingArguments("runs", max_steps=2, report_to="none", disable_tqdm=True)
        >>> trainer = Trainer(model, arguments, train_dataset=data)
        >>> batches = [trainer.data_collator(data[:4])]
        >>> trainer.add_callback(CurvatureCallback(trainer, batches, every=2, shift=1, figures=("trace",)))
        >>> result = trainer.train()
        {'curvature/trace': ...}
    """

    def __init__(
        self, trainer: Trainer, data: Sequence[Batch], *, every: int = 100, **options: Unpack[MonitorOptions]
    ) -> None:
        self.trainer, self.monitor = trainer, CurvatureMonitor(data, every=every, **options)

    @property
    def history(self) -> list[tuple[int, dict[str, float]]]:
        """The step and the figures of each measurement."""
        return self.monitor.history

    def on_train_begin(self, args: Any, state: Any, control: Any, model: nn.Module, **others: Any) -> None:
        """Require a head that can be split off."""
        self.monitor.split(model)

    def on_step_end(self, args: Any, state: Any, control: Any, model: nn.Module, **others: Any) -> None:
        """Measure after each ``every``-th optimizer step."""
        if state.global_step % self.monitor.every == 0 and state.is_world_process_zero:
            figures, logs_step = self.monitor.measure(model, state.global_step), control.should_log
            # The log of a trainer of TRL would also take and empty its averages of the steps since the last one.
            Trainer.log(self.trainer, figures)
            control.should_log = logs_step  # a log counts as that of the step


class DistillationTrainer(Trainer):  # type: ignore[misc]
    """A ``Trainer`` whose loss is :func:`softcurve.linear_distillation`, without logits of student or teacher.

    Args:
        args, kwargs: Those of ``transformers.Trainer``, except ``compute_loss_func``.
        teacher: A model, which runs on each batch, or a :class:`~softcurve.TopKCache` of its lists.
        alpha: The share of the labels, from 0 to 1.
        temperature: ``T``; the divergence has the factor ``T²``.
        divergence: ``D(teacher‖student)``, any :class:`~softcurve.Divergence` between two distributions.
        entropy_bonus: The factor of the student's entropy.
        shift: 1 if position ``i`` predicts the label of ``i + 1``, as in causal language models; otherwise 0.
        teacher_classes: Which classes of a teacher model are the student's, as for :class:`~softcurve.LinearTeacher`:
            for example ``slice(151936)`` where the teacher's vocabulary is padded further.

    With a cache, batches need a column ``teacher_rows``: a row of the cache for each label, or one for each sequence,
    which is the first of the rows of its unmasked tokens, or holds the lists of all of its positions. Negative rows
    stand for no list, whose divergence is 0 with ``tail="bucket"``. Pass ``remove_unused_columns=False`` to
    ``TrainingArguments`` to keep the column.

    The loss of an optimizer step is the mean over its labels, also with gradient accumulation and on several processes.
    ``label_smoothing_factor`` of ``TrainingArguments`` smooths the labels, as in a ``Trainer``.

    Raises:
        TypeError, ValueError: If an argument has a wrong type or value; in a step, if a model has no head with unmade
            logits (see :func:`softcurve.lazy_logits`).

    Example:
        >>> from softcurve.integrations.transformers import DistillationTrainer
        >>> from transformers import LlamaConfig, LlamaForCausalLM, TrainingArguments
        >>> shape = {"num_hidden_layers": 1, "num_attention_heads": 2, "hidden_size": 16, "intermediate_size": 32}
        >>> student, teacher = (LlamaForCausalLM(LlamaConfig(vocab_size=50, **shape)) for _ in range(2))
        >>> data = [{"input_ids": row, "labels": row} for row in torch.randint(50, (8, 6))]
        >>> arguments = TrainingArguments("runs", max_steps=2, report_to="none", disable_tqdm=True)
        >>> trainer = DistillationTrainer(student, arguments, train_dataset=data, teacher=teacher, alpha=0.5)
        >>> result = trainer.train()
        {'train_runtime': ...}

        A cache of the teacher's lists, which has a row for each token, takes the place of the teacher:

        >>> tokens = torch.stack([row["input_ids"] for row in data])
        >>> with torch.no_grad(), softcurve.lazy_logits(teacher), softcurve.TopKWriter("lists", classes=50) as writer:
        ...     log_probs, indices = teacher(tokens).logits.log_softmax(-1).topk(8)
        ...     writer.append(softcurve.TopK(indices.flatten(0, 1), log_probs.flatten(0, 1)))
        >>> rows = [{**row, "teacher_rows": 6 * i} for i, row in enumerate(data)]  # six tokens in each sequence
        >>> arguments.remove_unused_columns = False
        >>> cache = softcurve.TopK.load("lists")
        >>> trainer = DistillationTrainer(student, arguments, train_dataset=rows, teacher=cache, alpha=0.5)
        >>> result = trainer.train()
        {'train_runtime': ...}
    """

    def __init__(
        self, *args: Any, teacher: nn.Module | TopKCache, alpha: Number, temperature: Number = 1.0,
        divergence: Divergence = FORWARD_KL, entropy_bonus: Number = 0.0, shift: Integer = 1,
        teacher_classes: Any = None, **kwargs: Any,
    ) -> None:  # fmt: skip
        self.distillation = Distillation(teacher, alpha, temperature, divergence, entropy_bonus, shift, teacher_classes)
        self._target: Target | None = None
        if kwargs.setdefault("compute_loss_func", self._loss_of_outputs) != self._loss_of_outputs:
            raise ValueError("compute_loss_func must not be passed to a DistillationTrainer, which has its own")
        super().__init__(*args, **kwargs)
        # Trainer smooths labels in its own loss only, which compute_loss_func replaces.
        self.distillation = replace(self.distillation, label_smoothing=self.args.label_smoothing_factor)
        if isinstance(teacher, nn.Module):
            teacher.to(self.args.device)

    def compute_loss(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """Return the loss of a batch; the remaining steps are those of ``Trainer.compute_loss``."""
        self._target = self.distillation.target(inputs)
        of_student = {name: value for name, value in inputs.items() if name != ROWS}
        try:
            with unmade_logits(model):
                return super().compute_loss(model, of_student, *args, **kwargs)
        finally:
            self._target = None

    def _loss_of_outputs(self, outputs: Any, labels: Tensor, num_items_in_batch: Tensor | int | None = None) -> Tensor:
        assert self._target is not None
        return self.distillation.loss(logits_of(outputs), labels, self._target, num_items_in_batch)
