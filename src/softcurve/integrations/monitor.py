"""The curvature of a model in training, measured on fixed batches and leaving the training as it is."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, Literal, Unpack, get_args

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from softcurve import checks
from softcurve.curvature.algorithms.eigenpairs import EigenMethod
from softcurve.curvature.algorithms.estimates import LEAST_PRODUCTS
from softcurve.curvature.ggn import GGN
from softcurve.curvature.gradient_noise import gradient_noise
from softcurve.curvature.hessian import Hessian
from softcurve.curvature.losses import HeadLosses, LossOptions
from softcurve.curvature.network import Batch, NetworkOperator
from softcurve.curvature.split import split_head
from softcurve.lazy import lazy_logits
from softcurve.lazy.heads import is_lazy
from softcurve.linear import linear_cross_entropy
from softcurve.warn import warn_caller

Figure = Literal["top_eigenvalue", "trace", "gradient_noise"]
NetworkMatrix = Literal["gauss_newton", "hessian"]


class MonitorOptions(LossOptions, total=False):
    """The options of a :class:`CurvatureMonitor` beside its batches and ``every``."""

    head: str | None
    matrix: NetworkMatrix
    figures: Sequence[Figure]
    products: int
    tol: float
    method: EigenMethod
    seed: int


# The names under which each figure is logged.
LOGGED: dict[Figure, tuple[str, ...]] = {
    "top_eigenvalue": ("curvature/top_eigenvalue",),
    "trace": ("curvature/trace", "curvature/trace_error"),
    "gradient_noise": ("curvature/gradient_noise_scale",),
}
SAME_LOSS = 0.01  # relative; losses of half precision are as accurate


class CurvatureMonitor:
    """Figures of the curvature on fixed batches, for the callbacks of the training libraries.

    Args:
        data: A list of batches, ``(x, target)`` or mappings with ``labels``, see
            :class:`~softcurve.curvature.Hessian`. They are moved to the device of the head.
        every: Number of optimizer steps between measurements.
        head: The name of the ``nn.Linear`` that makes the logits; by default ``get_output_embeddings()``.
        matrix: ``"gauss_newton"``, which is positive semidefinite, or ``"hessian"``.
        figures: Which of ``"top_eigenvalue"``, ``"trace"`` and ``"gradient_noise"`` are measured.
        products: Random products of the trace, whose standard error falls as ``products^(−1/2)``.
        tol, method: Of the top eigenvalue, see :meth:`softcurve.curvature.Hessian.eigsh`. The tolerance bounds the
            relative residual, in which the error of the eigenvalue is of second order. ``"lanczos"`` is as fast, needs
            no scipy, and holds 21 copies of the trained parameters instead of a few.
        seed: Of the random vectors, which are the same in each measurement.
        options: The options of the loss, such as ``shift=1`` for a causal language model, ``temperature`` and
            ``softcap``.

    ``history`` is a list of pairs of the step and its figures. The model is measured in evaluation mode, without
    dropout. Its modes, gradients and buffers, and the global random generators of torch, numpy and Python, are as they
    were before.

    Raises:
        TypeError, ValueError: If an argument has a wrong type or value.

    Example:
        >>> from softcurve.integrations.monitor import CurvatureMonitor
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 3))
        >>> data = [(torch.randn(16, 4), torch.randint(3, (16,)))]
        >>> monitor = CurvatureMonitor(data, head="2", figures=("trace",))
        >>> sorted(monitor.measure(model, step=0))
        ['curvature/trace', 'curvature/trace_error']
    """

    def __init__(
        self, data: Sequence[Batch], *, every: int = 100, head: str | None = None,
        matrix: NetworkMatrix = "gauss_newton", figures: Sequence[Figure] = get_args(Figure), products: int = 16,
        tol: float = 0.03, method: EigenMethod = "lobpcg", seed: int = 0, **options: Unpack[LossOptions],
    ) -> None:  # fmt: skip
        if not isinstance(data, list | tuple) or not data:
            raise TypeError(
                f"data must be a list of one or more batches, got {type(data).__name__}; take them from a loader by "
                "[batch for batch, _ in zip(loader, range(4))]"
            )
        checks.require_count("every", every, 1)
        checks.require_choice("matrix", matrix, get_args(NetworkMatrix))
        if isinstance(figures, str):
            raise TypeError(f"figures must be a sequence of names, got {figures!r}; pass figures=({figures!r},)")
        for figure in figures:
            checks.require_choice("figures", figure, get_args(Figure))
        # The operators check these too, but only at the first measurement, hours into a training.
        checks.require_count("products", products, LEAST_PRODUCTS["hutchinson"])
        checks.require_between("tol", tol, 0.0, 1.0)
        checks.require_choice("method", method, get_args(EigenMethod))
        checks.require_count("seed", seed, 0)
        HeadLosses.of(**options)  # raises for an option that does not fit
        self.data, self.every, self.head, self.matrix, self.figures = data, every, head, matrix, tuple(figures)
        self.products, self.tol, self.method, self.seed, self.options = products, tol, method, seed, options
        self.history: list[tuple[int, dict[str, float]]] = []

    def split(self, model: nn.Module) -> tuple[nn.Module, nn.Linear]:
        """Return a model's features and head; the errors are those of :func:`softcurve.curvature.split_head`."""
        options: dict[str, Any] = {**self.options}
        return split_head(model, self.head, **{n: options[n] for n in ("softcap", "temperature") if n in options})

    def measure(self, model: nn.Module, step: int) -> dict[str, float]:
        """Return the figures of a model by name, NaN if it has diverged, and append them to the history."""
        with _undisturbed(model):
            measured = self._measured(model)
        self.history.append((step, measured))
        return dict(measured)

    def _measured(self, model: nn.Module) -> dict[str, float]:
        try:
            features, head = self.split(model)
            data = [_on_device(batch, head.weight.device) for batch in self.data]
            kind = GGN if self.matrix == "gauss_newton" else Hessian
            check = not self.history
            operator = kind(features, head, data, seed=self.seed, check_deterministic=check, **self.options)
            if not self.history:
                self._compare_losses(model, operator, data[0])
            return self._figures(operator)
        except checks.InvalidEntriesError:  # a trainer goes on where its model has diverged
            return {name: math.nan for figure in self.figures for name in LOGGED[figure]}

    def _figures(self, operator: NetworkOperator) -> dict[str, float]:
        measured: dict[Figure, tuple[float, ...]] = {}
        if "top_eigenvalue" in self.figures:
            pairs = operator.eigsh(1, tol=self.tol, method=self.method, seed=self.seed)
            measured["top_eigenvalue"] = (pairs.values.item(),)
        if "trace" in self.figures:
            # Hutchinson's method holds the fewest vectors.
            trace = operator.trace(method="hutchinson", products=self.products, seed=self.seed, columns_at_once=4)
            measured["trace"] = (trace.value, trace.standard_error)
        if "gradient_noise" in self.figures:
            noise = gradient_noise(operator.features, operator.network.head, operator.data, **self.options)
            measured["gradient_noise"] = (noise.scale,)
        return {
            name: value for figure in measured for name, value in zip(LOGGED[figure], measured[figure], strict=True)
        }

    def _compare_losses(self, model: nn.Module, operator: NetworkOperator, batch: Any) -> None:
        """Warn if the loss that the model returns for a batch is not the one whose curvature is measured."""
        if not isinstance(batch, Mapping) or self.options.get("loss", "cross_entropy") != "cross_entropy":
            return
        head, options = operator.network.head, dict[str, Any](self.options)
        for name in ("loss", "beta", "reduction"):
            options.pop(name, None)
        with torch.no_grad(), nullcontext() if is_lazy(head) else lazy_logits(model, head):
            of_model = getattr(model(**batch), "loss", None)
        if not isinstance(of_model, Tensor) or of_model.numel() != 1:
            return
        e = operator.network.features_of(batch, 0, graph=False)
        of_head = linear_cross_entropy(e, head.weight, batch["labels"], linear_bias=head.bias, **options).item()
        if not abs(of_model.item() - of_head) <= SAME_LOSS * abs(of_head):
            warn_caller(
                f"the loss of a batch is {of_model.item():.5g} by the model and {of_head:.5g} by the options of the "
                "callback, whose curvature is measured; a causal language model needs shift=1, and a model that scales "
                "or caps its logits temperature= or softcap="
            )


@contextmanager
def _undisturbed(model: nn.Module) -> Iterator[None]:
    """Set a model to evaluation mode, and give back the mode of each module and the random generators' states.

    The generators are the global ones of torch, numpy and Python, from which a forward or a batch may draw.
    """
    modes = [(module, module.training) for module in model.modules()]
    of_python, of_numpy = random.getstate(), np.random.get_state()  # noqa: NPY002  # what other code may draw from
    devices = sorted({p.device.index for p in model.parameters() if p.device.type == "cuda"})
    with torch.random.fork_rng(devices), torch.enable_grad():
        try:
            for module, _ in modes:
                module.training = False
            yield
        finally:
            for module, training in modes:
                module.training = training
            random.setstate(of_python)
            np.random.set_state(of_numpy)  # noqa: NPY002


def _on_device(batch: Any, device: torch.device) -> Any:
    # A tokenizer returns mappings of its own kind, into which torch's trees do not descend.
    batch = dict(batch) if isinstance(batch, Mapping) else batch
    return pytree.tree_map_only(Tensor, lambda part: part.to(device), batch)
