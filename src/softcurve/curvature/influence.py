"""How much each training row moves the loss on test rows, by the damped inverse Gauss-Newton matrix.

Add ``ε w_i ℓ_i`` to the training loss ``L = Σ_i w_i ℓ_i / Σ_i w_i``: its minimum moves by ``−ε (∇²L)⁻¹ w_i ∇ℓ_i``, and
the test loss at the minimum by ``ε I_i`` with the influence

    I_i = −∇L_testᵀ (G + damping I)⁻¹ w_i ∇ℓ_i

To leave the row out is ``ε = −1 / Σ_i w_i``. One solution ``s`` of ``(G + damping I) s = ∇L_test`` serves all training
rows, and ``∇ℓ_i · s`` is the change of a row's loss along ``s``: a pass forward through the features and one over the
head's tiles. No training row's gradient is ever held.

Koh, Liang 2017, "Understanding black-box predictions via influence functions".
Martens 2020, "New insights and perspectives on the natural gradient method": the Gauss-Newton matrix for the Hessian.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from softcurve import checks
from softcurve.array_types import Bool, Float, Float64, Int64
from softcurve.curvature.conjugate_gradients import Solution, solve_columns, warn_unless_converged
from softcurve.curvature.determinism import require_deterministic, require_fixed_order
from softcurve.curvature.ggn import GGN
from softcurve.curvature.kfac import Form
from softcurve.curvature.losses import Loss, LossOptions, Reduction
from softcurve.curvature.network import Batch, Rows, require_walkable
from softcurve.curvature.operator import require_count
from softcurve.head import loop
from softcurve.records import dataclass_repr
from softcurve.typing import Integer, Number

__all__ = ["Influence", "influence"]


@dataclass(frozen=True, eq=False)
class Influence:
    """``values[i] = −∇L_testᵀ (G + damping I)⁻¹ w_i ∇ℓ_i`` of each training row; negative: the row helps.

    ``(n,)`` on the mean test loss, or ``(n, m)`` on each of ``m`` test rows, in the order of the data, positions of a
    sequence being rows. A row that does not count has 0. ``divisor`` is what the training loss divides its sum by,
    ``Σ w`` for a mean. ``residuals`` and ``converged`` are those of the linear systems, one a column (see
    :class:`~softcurve.curvature.Solution`), ``products`` is how many products they took.
    """

    values: Float[Tensor, " n *test"]
    divisor: float
    residuals: Float64[Tensor, "*test"]
    converged: Bool[Tensor, "*test"]
    products: int

    __repr__ = dataclass_repr

    @property
    def of_removal(self) -> Float[Tensor, " n *test"]:
        """The predicted change of the test loss when a row is left out: ``−values / divisor``."""
        return -self.values / self.divisor

    def most_helpful(self, k: int) -> Int64[Tensor, " k *test"]:
        """The rows whose weight lowers the test loss most, the most helpful first."""
        return self._ranked(k, largest=False)

    def most_harmful(self, k: int) -> Int64[Tensor, " k *test"]:
        """The rows whose weight raises the test loss most, the most harmful first: where to look for wrong labels."""
        return self._ranked(k, largest=True)

    def _ranked(self, k: int, largest: bool) -> Tensor:
        require_count("k", k, 1)
        if k > len(self.values):
            raise ValueError(f"k must be at most {len(self.values)}, the number of training rows, got {k}")
        return self.values.topk(k, dim=0, largest=largest).indices


def influence(
    features: nn.Module,
    head: nn.Linear,
    train_data: Iterable[Batch],
    test_data: Iterable[Batch],
    *,
    damping: float,
    rows: Literal["mean", "each"] = "mean",
    loss: Loss = "cross_entropy",
    beta: Number = 0.5,
    weight: Float[Tensor, " classes"] | None = None,
    ignore_index: Integer | None = None,
    label_smoothing: Number = 0.0,
    temperature: Number = 1.0,
    softcap: Number | None = None,
    z_loss: Number = 0.0,
    shift: Integer = 0,
    reduction: Reduction = "mean",
    base: Number = math.e,
    memory_budget: Integer | None = None,
    test_options: LossOptions | None = None,
    preconditioned: bool = True,
    form: Form = "auto",
    rank: int = 128,
    tol: float = 1e-6,
    max_iterations: int | None = None,
    columns_at_once: int = 16,
    seed: int = 0,
    progress: bool = False,
    process_group: ProcessGroup | None = None,
    check_deterministic: bool = True,
) -> Influence:
    """The influence of each row of ``train_data`` on the loss on ``test_data``, in the parameters that are trained.

    Args:
        features: a module that maps a batch ``x`` to ``e (..., d)``, in its present mode; ``nn.Identity()`` for none.
        head: an ``nn.Linear`` from ``d`` to the classes.
        train_data: batches ``(x, target)`` or ``(x, target, sample_weight)``, in the same order each time: they are
            read for each product, and once more for each ``columns_at_once`` test rows. A shuffled loader is refused.
        test_data: the same; read once. With ``rows="each"`` it must not be shuffled either.
        damping: of the Gauss-Newton matrix of the reduced training loss; the weight decay ``λ`` of ``λ/2 ‖θ‖²``, where
            there is one.
        rows: ``"mean"``: on the mean test loss; ``"each"``: on the loss of each test row, times its weight. So the sum
            of the latter over their weights' sum is the former.
        loss, beta, ..., memory_budget: the training loss and its options, see
            :class:`~softcurve.curvature.Hessian`; a test loss is a mean whatever the ``reduction``.
        test_options: the options of the test loss; those of the training loss by default.
        preconditioned: solve with :meth:`softcurve.curvature.GGN.preconditioner`.
        form, rank: of the class factor, see :meth:`softcurve.curvature.GGN.preconditioner`.
        tol, max_iterations: of the solution, see :meth:`softcurve.curvature.GGN.solve`. Where it has not converged, it
            is returned with a ``UserWarning``.
        columns_at_once: test rows that share the passes over the training data.
        seed: of dropout and of the preconditioner.
        progress: a bar over the batches of each pass.
        process_group: of processes that have training rows of their own; each gets the values of its rows.
        check_deterministic: compare two passes over features and data at the start, rows in their order, and raise
            where they differ, or where a loader has a random sampler.

    The training loss should be near its minimum, where a row's weight moves the parameters as said above.

    Raises:
        TypeError, ValueError: for an argument of the wrong type or value; what the loss raises for a batch; passes
            that differ, or come in a random order.
    """
    checks.require_choice("rows", rows, ("mean", "each"))
    checks.require_positive("damping", damping)
    checks.require_positive("tol", tol)
    require_count("columns_at_once", columns_at_once, 1)
    require_walkable("train_data", train_data)
    require_walkable("test_data", test_data)
    options: LossOptions = {
        "loss": loss, "beta": beta, "weight": weight, "ignore_index": ignore_index, "label_smoothing": label_smoothing,
        "temperature": temperature, "softcap": softcap, "z_loss": z_loss, "shift": shift, "base": base,
        "memory_budget": memory_budget,
    }  # fmt: skip

    def network(data: Iterable[Batch], of_loss: LossOptions) -> GGN:
        return GGN(
            features, head, data, seed=seed, progress=progress, process_group=process_group, check_deterministic=False,
            **of_loss,
        )  # fmt: skip

    train = network(train_data, {**options, "reduction": reduction})
    if process_group is not None and rows == "each":
        raise ValueError("rows must be 'mean' with a process_group, whose processes have test rows of their own")
    test = network(test_data, {**(options if test_options is None else test_options), "reduction": "mean"})
    if check_deterministic:
        _require_order("train_data", train)
        if rows == "each":
            _require_order("test_data", test)
    preconditioner = train.preconditioner(damping, form=form, rank=rank, seed=seed) if preconditioned else None

    found: list[Tensor] = []
    solutions: list[Solution] = []
    divisor = 1.0
    gradients = iter([_mean_gradient(test)]) if rows == "mean" else _row_gradients(test)
    for columns in _groups(gradients, columns_at_once):
        solution = solve_columns(
            train, columns, damping=damping, preconditioner=preconditioner, tol=tol, max_iterations=max_iterations
        )
        changes, divisor = _changes(train, solution.x)
        found.append(changes.neg_())
        solutions.append(replace(solution, x=solution.x[:0]))
    if not found:
        raise ValueError("test_data must hold a row, got none")
    values, (residuals, converged, indefinite) = torch.cat(found, -1), _joined(solutions)
    if rows == "mean":
        values, residuals, converged, indefinite = (
            each.squeeze(-1) for each in (values, residuals, converged, indefinite)
        )
    warn_unless_converged("influence", residuals, indefinite, tol, max(each.iterations for each in solutions))
    return Influence(values, divisor, residuals, converged, sum(each.products for each in solutions))


def _joined(solutions: list[Solution]) -> tuple[Tensor, Tensor, Tensor]:
    """Residuals, and what became of the columns."""
    return (
        torch.cat([each.residuals for each in solutions]),
        torch.cat([each.converged for each in solutions]),
        torch.cat([each.indefinite for each in solutions]),
    )


def _require_order(name: str, network: GGN) -> None:
    """The same rows in the same order in each pass: a value belongs to a row by its place."""
    require_fixed_order(name, network.data)
    require_deterministic(network, name, ordered=True)


# --- gradients of the test loss --------------------------------------------------------------------------------------


def _mean_gradient(test: GGN) -> Tensor:
    """``∇L_test``, ``(P,)``."""
    flat, total = torch.zeros(test.shape[0], dtype=test.dtype, device=test.device), 0.0
    for rows in test.rows("Test gradient"):
        total += float(rows.posed.divisor(test.losses.reducer))
        _add_gradient(test, rows, slice(0, len(rows.e)), flat)
    flat, total = test.summed(test.over_classes(flat)), test.over_rows(total)
    if total == 0:
        raise ValueError("test_data must hold a row that counts, got none; see ignore_index and sample weights")
    return flat / total


def _row_gradients(test: GGN) -> Iterator[Tensor]:
    """``w_r ∇ℓ_r`` of each test row, ``(P,)``, one at a time."""
    for rows in test.rows("Test gradients"):
        for number in range(len(rows.e)):
            flat = torch.zeros(test.shape[0], dtype=test.dtype, device=test.device)
            _add_gradient(test, rows, slice(number, number + 1), flat)
            yield test.over_classes(flat)


def _add_gradient(network: GGN, rows: Rows, some: slice, flat: Tensor) -> None:
    """``flat += Σ w ∇ℓ`` over some rows of a batch."""
    loss, tensors, _, budget = rows.losses
    tensors = tensors._replace(
        input=tensors.input[some],
        target=None if tensors.target is None else tensors.target[some],
        indices=None if tensors.indices is None else tensors.indices[some],
        row_weight=tensors.row_weight[some],
    )
    into = network.sums(rows, flat.unsqueeze(0), tensors.dtype)[0]
    in_input, in_weight, in_bias = (part is not None for part in into)
    wanted = (in_input, in_weight, in_bias, False, False, False)
    gradients = loop.evaluate(loss, tensors, budget, wanted=wanted).gradients
    for part, gradient, here in zip(into, gradients, (some, slice(None), slice(None)), strict=False):
        if part is not None and gradient is not None:
            part[here] += network.own_share(gradient) if part is into.input else gradient
    network.add_pulled_back(rows, [into.input], flat.unsqueeze(0))


# --- changes of the training losses ----------------------------------------------------------------------------------


def _changes(train: GGN, columns: Float[Tensor, "parameters k"]) -> tuple[Float[Tensor, "n k"], float]:
    """``w_i ∇ℓ_i · s`` of each training row and each column ``s``, and what the training loss is divided by."""
    found, total = [], 0.0
    directions = columns.T.contiguous()
    for rows in train.rows("Training rows"):
        total += float(rows.posed.divisor(train.losses.reducer))
        loss, tensors, _, budget = rows.losses
        moved = None
        if rows.e.requires_grad:
            u, h = train.linearized(rows, torch.zeros_like(rows.e))
            moved = [train.pushed_forward(u, h, s, second=False)[0] for s in directions]
        weight = tensors.row_weight.unsqueeze(-1)
        along = [
            loop.evaluate(loss, tensors, budget, directions=(*direction, None, None, None), tangents=True).rows
            for direction in train.along(directions, moved)
        ]
        changes = torch.stack(along, -1)
        found.append(torch.where(weight == 0, 0.0, weight * changes).to(columns.dtype))
    values = torch.cat(found) if found else columns.new_zeros(0, columns.shape[1])
    return values, 1.0 if train.losses.reduction == "sum" else train.over_rows(total)


def _groups(vectors: Iterable[Tensor], size: int) -> Iterator[Tensor]:
    """As columns, ``size`` at a time."""
    group: list[Tensor] = []
    for vector in vectors:
        group.append(vector)
        if len(group) == size:
            yield torch.stack(group, -1)
            group = []
    if group:
        yield torch.stack(group, -1)
