"""How much each training row moves the loss on test rows, by the damped inverse Gauss-Newton matrix.

Add ``ε w_i ℓ_i`` to the training loss ``L = Σ_i w_i ℓ_i / Σ_i w_i``: its minimum moves by ``−ε (∇²L)⁻¹ w_i ∇ℓ_i``, and
the test loss at the minimum by ``ε I_i`` with the influence

    I_i = −∇L_testᵀ (G + damping I)⁻¹ w_i ∇ℓ_i

Leaving the row out is ``ε = −1 / Σ_i w_i``. One solution ``s`` of ``(G + damping I) s = ∇L_test`` serves all training
rows, and ``∇ℓ_i · s`` is the change of a row's loss along ``s``: a forward pass through the features and one over the
head's tiles. No training row's gradient is ever held.

Koh, Liang 2017, "Understanding black-box predictions via influence functions".
Martens 2020, "New insights and perspectives on the natural gradient method": the Gauss-Newton matrix for the Hessian.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import islice
from typing import Literal, Unpack, get_args

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from softcurve import checks
from softcurve.array_types import Bool, Float, Float64, Int64
from softcurve.curvature.algorithms.conjugate_gradients import conjugate_gradients, warn_unless_converged
from softcurve.curvature.determinism import require_deterministic
from softcurve.curvature.ggn import GGN
from softcurve.curvature.kfac import FactorForm
from softcurve.curvature.losses import HeadLosses, LossOptions, with_options_of
from softcurve.curvature.network import Batch, SplitNetwork, Unit, require_reiterable
from softcurve.head import loop
from softcurve.head.products import STILL, MapParts
from softcurve.head.tensors import joined
from softcurve.records import ShortRepr


@dataclass(frozen=True, eq=False, repr=False)
class Influence(ShortRepr):
    """``values[i] = −∇L_testᵀ (G + damping I)⁻¹ w_i ∇ℓ_i`` of each training row; a negative value means that it helps.

    ``(n,)`` on the mean test loss, or ``(n, m)`` on each of ``m`` test rows, in the order of the data; positions of a
    sequence are rows, unless ``unit="sequence"`` takes them together. A row that does not count has 0. ``divisor`` is
    what the training loss divides its sum by, ``Σ w`` for a mean. ``residuals`` and ``converged`` are those of the
    linear systems, one per column (see :class:`~softcurve.curvature.Solution`), and ``products`` is how many products
    they took.
    """

    values: Float[Tensor, " n *test"]
    divisor: float
    residuals: Float64[Tensor, "*test"]
    converged: Bool[Tensor, "*test"]
    products: int

    @property
    def of_removal(self) -> Float[Tensor, " n *test"]:
        """The predicted change of the test loss when a row is left out: ``−values / divisor``."""
        return -self.values / self.divisor

    def most_helpful(self, k: int) -> Int64[Tensor, " k *test"]:
        """Return the rows whose weight lowers the test loss most, the most helpful first."""
        return self._ranked(k, largest=False)

    def most_harmful(self, k: int) -> Int64[Tensor, " k *test"]:
        """Return the rows whose weight raises the test loss most, the worst first: candidates for wrong labels."""
        return self._ranked(k, largest=True)

    def _ranked(self, k: int, largest: bool) -> Tensor:
        checks.require_count("k", k, 1)
        if k > len(self.values):
            raise ValueError(f"k must be at most {len(self.values)}, the number of training rows, got {k}")
        return self.values.topk(k, dim=0, largest=largest).indices


@with_options_of(HeadLosses.of)
def influence(
    features: nn.Module, head: nn.Linear, train_data: Iterable[Batch], test_data: Iterable[Batch], *, damping: float,
    rows: Literal["mean", "each"] = "mean", unit: Unit = "row", test_options: LossOptions | None = None,
    preconditioned: bool = True, form: FactorForm = "auto", rank: int = 128, tol: float = 1e-6,
    max_iterations: int | None = None, columns_at_once: int = 16, seed: int = 0, progress: bool = False,
    process_group: ProcessGroup | None = None, check_deterministic: bool = True, **options: Unpack[LossOptions],
) -> Influence:  # fmt: skip
    """Return the influence of each row of ``train_data`` on the loss on ``test_data``, in the trained parameters.

    Args:
        features: a module that maps a batch ``x`` to ``e (..., d)``, in its present mode; ``nn.Identity()`` for none.
        head: an ``nn.Linear`` from ``d`` to the classes.
        train_data: a re-iterable of batches ``(x, target)``, ``(x, target, sample_weight)`` or mappings with
            ``labels`` (see :class:`~softcurve.curvature.Hessian`), in the same order each time: they are read for each
            product, and once more for each ``columns_at_once`` test rows. A shuffled loader is refused.
        test_data: the same; read once. With ``rows="each"`` it must not be shuffled either.
        damping: added to the diagonal of the Gauss-Newton matrix of the reduced training loss; the weight decay ``λ``
            of ``λ/2 ‖θ‖²``, where there is one.
        rows: ``"mean"``: on the mean test loss; ``"each"``: on the loss of each test row, times its weight. The sum of
            the latter divided by the sum of the weights is the former.
        unit: ``"row"``, or ``"sequence"``: the rows of each index of the first dimension of the features together, such
            as the tokens of a sequence of a language model, in the training data and for ``rows="each"`` in the test
            data. The influence of a sequence is the sum of those of its tokens.
        loss, beta, ..., memory_budget: the training loss and its options, see
            :class:`~softcurve.curvature.Hessian`; a test loss is a mean whatever the ``reduction``.
        test_options: the options of the test loss; those of the training loss by default.
        preconditioned: solve with :meth:`softcurve.curvature.GGN.preconditioner`.
        form, rank: the form of the class factor, see :meth:`softcurve.curvature.GGN.preconditioner`.
        tol, max_iterations: of the solution, see :meth:`softcurve.curvature.GGN.solve`. Where it has not converged, it
            is returned with a ``UserWarning``.
        columns_at_once: how many test rows share the passes over the training data.
        seed: the seed of dropout and of the preconditioner.
        progress: show a progress bar over the batches of each pass.
        process_group: processes that have training rows of their own; each gets the values of its rows.
        check_deterministic: compare two passes over features and data at the start, rows in their order, and raise
            where they differ, or where a loader has a random sampler.

    The training loss should be near its minimum, where a row's weight moves the parameters as described.

    Raises:
        TypeError, ValueError: for an argument of the wrong type or value; what the loss raises for a batch; passes
            that differ, or come in a random order.

    Example:
        >>> head, data = torch.nn.Linear(4, 3), [(torch.randn(20, 4), torch.randint(3, (20,)))]
        >>> softcurve.curvature.influence(torch.nn.Identity(), head, data, data, damping=0.1).values.shape
        torch.Size([20])
    """
    checks.require_choice("rows", rows, ("mean", "each"))
    checks.require_choice("unit", unit, get_args(Unit))
    checks.require_positive("damping", damping)
    checks.require_positive("tol", tol)
    checks.require_count("columns_at_once", columns_at_once, 1)
    require_reiterable("train_data", train_data)
    require_reiterable("test_data", test_data)
    network = functools.partial(
        GGN, features, head, seed=seed, progress=progress, process_group=process_group, check_deterministic=False
    )
    train = network(train_data, **options)
    if process_group is not None and rows == "each":
        raise ValueError("rows must be 'mean' with a process_group, whose processes have test rows of their own")
    test_loss: LossOptions = {**(options if test_options is None else test_options), "reduction": "mean"}
    test = network(test_data, **test_loss).network
    if check_deterministic:
        require_deterministic(train.network, "train_data", ordered=True)
        if rows == "each":
            require_deterministic(test, "test_data", ordered=True)
    preconditioner = train.preconditioner(damping, form=form, rank=rank, seed=seed) if preconditioned else None

    gradients = iter([_mean_gradient(test)]) if rows == "mean" else _unit_gradients(test, unit)
    values, solutions, divisor = [], [], 1.0
    while group := list(islice(gradients, columns_at_once)):
        solution = conjugate_gradients(train, torch.stack(group, -1), damping, preconditioner, tol, max_iterations)
        changes, divisor = _changes(train.network, solution.x, unit)
        values.append(changes.neg_())
        solutions.append(replace(solution, x=solution.x[:0]))
    if not values:
        raise ValueError("test_data must hold a row, got none")
    columns = [(each.residuals, each.converged, each.indefinite) for each in solutions]
    parts = [torch.cat(values, -1), *map(torch.cat, zip(*columns, strict=True))]
    influences, residuals, converged, indefinite = (part.squeeze(-1) for part in parts) if rows == "mean" else parts
    warn_unless_converged("influence", residuals, indefinite, tol, max(each.iterations for each in solutions))
    return Influence(influences, divisor, residuals, converged, sum(each.products for each in solutions))


def _mean_gradient(test: SplitNetwork) -> Tensor:
    """Return ``∇L_test``, ``(P,)``."""
    flat, total = torch.zeros(test.layout.size, dtype=test.layout.dtype, device=test.device), 0.0
    for rows in test.rows("Test gradient"):
        total += rows.divisor
        flat += test.gradient(rows, slice(0, len(rows.e)))
    return test.sum_data_shards(test.sum_class_shards(flat)) / test.divisor(total, "test_data")


def _unit_gradients(test: SplitNetwork, unit: Unit) -> Iterator[Tensor]:
    """Yield ``Σ w_r ∇ℓ_r`` of each test row or sequence, ``(P,)``, one at a time."""
    for rows in test.rows("Test gradients"):
        yield from map(test.sum_class_shards, test.gradients(rows, unit))


def _changes(
    train: SplitNetwork, columns: Float[Tensor, "parameters k"], unit: Unit
) -> tuple[Float[Tensor, "n k"], float]:
    """Return ``Σ w_i ∇ℓ_i · s`` of each training unit and each column ``s``, and what the training loss is divided by.

    A unit is a row, or the rows of a sequence.
    """
    changes, total = [columns.new_zeros(0, columns.shape[1])], 0.0
    for rows in train.rows("Training rows"):
        total += rows.divisor
        loss, tensors, _, budget = rows.losses
        along = [
            loop.evaluate(loss, tensors, budget, directions=joined(MapParts(*direction), STILL), tangents=True).rows
            for direction in train.directions(rows, columns.T.contiguous())[0]
        ]
        weight = tensors.row_weight.unsqueeze(-1)
        of_rows = torch.where(weight == 0, 0.0, weight * torch.stack(along, -1)).to(columns.dtype)
        changes.append(of_rows.reshape(*rows.grouping(unit), columns.shape[1]).sum(1))
    return torch.cat(changes), train.divisor(total)
