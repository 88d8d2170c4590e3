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
        >>> from softcurve.integrations.lightning import CurvatureCallback
        >>> callback = CurvatureCallback([(images, labels)], every=50, head="head")
        >>> lightning.Trainer(callbacks=[callback]).fit(module, loader)
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
