"""softcurve in ``lightning.Trainer``: the curvature while training. This module needs the extra ``integration``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Unpack

from softcurve.curvature.network import Batch
from softcurve.extras import needed
from softcurve.integrations.monitor import CurvatureMonitor, MonitorOptions

with needed("softcurve.integrations.lightning", "integration"):
    from lightning import Callback, LightningModule, Trainer

__all__ = ["CurvatureCallback"]


class CurvatureCallback(Callback):  # type: ignore[misc]
    """Log the curvature of a ``LightningModule`` on fixed batches during training, to each logger of the trainer.

    Args:
        data: A list of batches, ``(x, target)`` or mappings with ``labels``, for the module's ``forward``.
        every: Number of optimizer steps between measurements.
        options: Those of :class:`~softcurve.integrations.monitor.CurvatureMonitor`, among them ``head``, the name of
            the ``nn.Linear`` of the module that makes the logits, such as ``"model.head"``.

    The figures are those of :class:`softcurve.integrations.transformers.CurvatureCallback`, and as there, the training
    is left as it is. ``history`` holds them without a logger, too.

    Raises:
        TypeError, ValueError: If an argument has a wrong type or value; when the training begins, if the module has no
            head that can be split off (see :func:`softcurve.curvature.split_head`).

    Example:
        >>> from lightning import LightningModule, Trainer
        >>> from softcurve.integrations.lightning import CurvatureCallback
        >>> class Classifier(LightningModule):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.hidden, self.head = torch.nn.Linear(4, 8), torch.nn.Linear(8, 3)
        ...
        ...     def forward(self, x):
        ...         return self.head(self.hidden(x).tanh())
        ...
        ...     def training_step(self, batch, batch_idx):
        ...         return softcurve.cross_entropy(self(batch[0]), batch[1])
        ...
        ...     def configure_optimizers(self):
        ...         return torch.optim.SGD(self.parameters(), lr=0.1)
        >>> x, y = torch.randn(64, 4), torch.randint(3, (64,))
        >>> loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), batch_size=16)
        >>> callback = CurvatureCallback([(x[:16], y[:16])], every=2, head="head", figures=("trace",))
        >>> options = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
        >>> options |= {"enable_model_summary": False, "max_steps": 4, "accelerator": "cpu"}
        >>> Trainer(callbacks=[callback], **options).fit(Classifier(), loader)
        >>> [step for step, figures in callback.history]
        [2, 4]
    """

    def __init__(self, data: Sequence[Batch], *, every: int = 100, **options: Unpack[MonitorOptions]) -> None:
        self.monitor = CurvatureMonitor(data, every=every, **options)
        self._last_step = 0

    @property
    def history(self) -> list[tuple[int, dict[str, float]]]:
        """The step and the figures of each measurement."""
        return self.monitor.history

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Require a head that can be split off."""
        self.monitor.split(pl_module)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Count steps from those of this fit, which may be resumed, or follow another fit with the same callback."""
        self._last_step = trainer.global_step

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Measure after each ``every``-th optimizer step, of which a batch may be a part."""
        step, last = trainer.global_step, self._last_step
        self._last_step = step
        if step == last or step % self.monitor.every or not trainer.is_global_zero:
            return
        figures = self.monitor.measure(pl_module, step)
        for logger in trainer.loggers:
            logger.log_metrics(figures, step=step)
