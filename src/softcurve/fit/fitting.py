"""Fit a softmax head to the rows of a source."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from numbers import Integral, Real
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from softcurve.array_types import Float, Float64
from softcurve.fit import DataError
from softcurve.fit.checkpoint import Checkpoint, digest
from softcurve.fit.data.source import Source, is_sparse, row_entries, share_of
from softcurve.fit.data.sparse_features import linear
from softcurve.fit.data.subset import shared
from softcurve.fit.group import Group, require_same
from softcurve.fit.losses import check_loss, named_classes, target_labels, target_probability
from softcurve.fit.solver.coordinates import Coordinates, find_coordinates
from softcurve.fit.solver.curvature import Curvature, rounding_pays
from softcurve.fit.solver.newton import Newton, State, Step
from softcurve.fit.solver.objective import FitProblem, Objective
from softcurve.fit.solver.preconditioner import rows_in_memory
from softcurve.losses.divergences import Divergence
from softcurve.records import ShortRepr

IN_MEMORY, FROM_FILES = 2**30, 2**28
LEAST_BUDGET = 2**24
TILE = 2**19  # entries of the features and logits of a tile that the caches hold
FEWEST_ROWS = 64
# Shares of the memory budget for tiles, for the blocks of the classes, and for features and probabilities.
FOR_TILES, FOR_BLOCKS, FOR_ROWS = 0.125, 0.25, 0.5
LOGIT_BYTES = 36  # of a tile, for each logit: three float32 and three float64 numbers exist at a time
# Multiply-adds of the logits below which a second thread costs more than it saves, and below which float32 does.
ONE_THREAD_BELOW, DOUBLE_BELOW = 3_000_000, 1_000_000
SAME = "give all of them the same arguments"
FIRST_DAMPING, WARM_DAMPING = 1.0, 1e-2  # from zero, and from the head of a similar problem


@dataclass(frozen=True, eq=False, repr=False)
class Fit(ShortRepr):
    """A fitted head: ``weight`` (C, d), ``bias`` (C,), the objective in nats, and how it was reached.

    ``gradient_max`` is the largest entry of the gradient of the objective, in float64. ``converged`` tells whether it
    and the Newton decrement are within the tolerance, ``reason`` why the fit ended. ``separated`` tells that there is
    no penalty and every row is classified correctly: the loss then has no minimum, and falls as the weights grow.
    """

    weight: Float64[Tensor, "classes d"]
    bias: Float64[Tensor, " classes"]
    objective: float
    gradient_max: float
    iterations: int
    products: int
    converged: bool
    reason: str
    separated: bool
    history: tuple[Step, ...]


def fit_head(
    source: Source, *, loss: str | Divergence = "cross_entropy", C: float = 1.0, fit_intercept: bool = True,
    sample_weight: Tensor | None = None, tol: float = 1e-4, max_iter: int = 100, precision: str = "auto",
    memory_budget: int | None = None, start: tuple[Tensor, Tensor] | None = None,
    coordinates: Coordinates | None = None, checkpoint: Path | None = None, checkpoint_every: float = 30.0,
    on_step: Callable[[Step], None] = lambda step: None, on_product: Callable[[int], None] = lambda products: None,
    group: ProcessGroup | None = None,
) -> Fit:  # fmt: skip
    """Minimise ``Σ w_i loss_i / Σ w_i + ‖W‖² / (2 C Σ w_i)``: scikit-learn's objective divided by ``C Σ w_i``.

    The bias is not penalised. For two classes the penalty is that of their difference, ``½ ‖w_1 − w_0‖²``, as in
    scikit-learn. The fit has converged when no entry of the gradient of this mean exceeds ``tol``, and a Newton step
    would gain at most ``tol / 50``.

    Args:
        source: Rows and their targets.
        loss: ``cross_entropy``, ``forward_kl``, ``reverse_kl`` or ``js``.
        C: Inverse strength of the penalty; ``inf`` for none.
        fit_intercept: Whether there is a bias; otherwise it is zero.
        sample_weight: Weights of the rows, ≥ 0; ones by default.
        tol: Tolerance for the largest entry of the gradient.
        max_iter: Maximum number of Newton steps.
        precision: ``mixed`` multiplies in float32, or in bfloat16 as long as that is accurate and where the processor
            has instructions for it, and computes the objective and its gradient in float64; ``float64`` uses float64
            throughout; ``auto`` is ``mixed`` unless float32 would save nothing. All end at the same head.
        memory_budget: Bytes in addition to the rows of the source. By default 1 GiB for rows in memory, else 256 MiB.
        start: Weight and bias to start from, if the objective is lower there than at the default start: zeros and the
            class frequencies.
        coordinates: The result of :func:`coordinates_of`, for several fits to the same rows or to some of them.
        checkpoint: File in which the state is written every ``checkpoint_every`` seconds. If it exists, the fit goes on
            from it; it must belong to the same rows and options.
        on_step: Called after every step.
        on_product: Called with the number of products so far, after each.
        group: Processes that fit one head together. All give the same arguments, with the source and the
            ``sample_weight`` of all rows, of which each process reads its own share; the first one reads and writes the
            checkpoint. A source that is a share (:func:`~softcurve.fit.data.subset.shared`) comes with the weights of
            its own rows, and needs no group.

    Raises DataError for options, rows or a checkpoint that cannot be used, in all processes of a group, and
    :class:`~softcurve.fit.group.LostProcess` if a process ends or does not answer within the timeout of the group.
    """
    if group is not None:
        source, sample_weight = _own_part(source, sample_weight, group, start=start, coordinates=coordinates)
    share, classes = share_of(source), len(source.classes)
    options: dict[str, object] = {"loss": loss, "C": C, "fit_intercept": fit_intercept, "precision": precision}
    others = {"tol": tol, "max_iter": max_iter, "memory_budget": memory_budget, "checkpoint": checkpoint}
    require_same(share.group, options | others, SAME)
    if source.kind is None:
        raise DataError("the rows must have targets to fit a head to; give labels, distributions or lists")
    check_loss(loss, source.kind)
    check_options(C, tol, max_iter, precision, memory_budget)
    if start is not None:
        _check_start(start, classes, source.width)
    weights, total = _weights(sample_weight, source)
    budget, rows_at_once = _memory(source, memory_budget)
    work = share.total * row_entries(source) * classes
    double = precision == "float64" or (precision == "auto" and work < DOUBLE_BELOW)
    with _threads(work, share.group):
        if coordinates is None:
            coordinates = find_coordinates(source, weights, classes, intercept=fit_intercept, rows_at_once=rows_at_once)
        else:
            _check_coordinates(coordinates, source, fit_intercept)
        problem = FitProblem(source, weights, loss, (2.0 if classes == 2 else 1.0) / (C * total), rows_at_once)
        objective = Objective(problem, coordinates)
        cold = partial(_cold_state, objective, total, double=double)
        identity = {name: str(value) for name, value in options.items()} | {"classes": str(classes)}
        if checkpoint is not None:
            whole_weights = share.group.gathered(weights)
            identity |= {"rows": source.fingerprint[:16], "weights": digest(*whole_weights)}
        size, memory, for_blocks = coordinates.size, int(FOR_ROWS * budget), int(FOR_BLOCKS * budget)
        of_feature = 8 if double else 4 + 2 * rounding_pays(share.total, size, classes)
        features_fit = share.group.largest(of_feature * source.rows * size)[0] <= memory
        if not (features_fit and rows_in_memory(share.total, size, classes, torch.float32, for_blocks)):
            memory, for_blocks = memory + for_blocks, 0  # no blocks
        states = Checkpoint(checkpoint, coordinates, identity, share.group, every=checkpoint_every, on_step=on_step)
        state = states.open(classes)
        if state is None and start is not None:
            state = State(coordinates.parameters(*(part.double() for part in start)), WARM_DAMPING, double=double)
        with states.running():
            newton = Newton(
                objective,
                partial(Curvature, problem, coordinates, memory=memory, on_product=on_product),
                cold() if state is None else state,
                tol=tol, memory_of_blocks=for_blocks, cold=None if start is None else cold,
            )  # fmt: skip
            converged, reason = newton.run(max_iter, states.note)
        weight, bias = coordinates.head(newton.point.parameters)
        history = newton.state.history
        return Fit(
            weight, bias, newton.point.value, newton.point.gradient_max, iterations=len(history) - 1,
            products=history[-1].products, converged=converged, reason=reason,
            separated=not problem.penalty and separates(problem, weight, bias), history=history,
        )  # fmt: skip


def regularisation_path(source: Source, Cs: Sequence[float], **options: Any) -> tuple[Fit, ...]:
    """Return ``tuple(fit_head(source, C=C, **options) for C in Cs)``, each fit started from that of the next smaller C.

    The fits are in the order of ``Cs``, and share the coordinates. A ``start`` is that of the smallest C. Raises
    DataError for a C that is no inverse strength, and wherever ``fit_head`` does.
    """
    if not len(Cs) or not all(_is_number(C) and C > 0 for C in Cs):
        raise DataError(f"Cs must be positive numbers, or inf for no penalty, and at least one; got {list(Cs)}")
    if options.get("checkpoint") is not None:
        raise DataError("checkpoint must be left out of a path: it holds one fit; give it to a fit of its own")
    if (group := options.pop("group", None)) is not None:
        weights, start, coordinates = (options.get(name) for name in ("sample_weight", "start", "coordinates"))
        source, options["sample_weight"] = _own_part(source, weights, group, start=start, coordinates=coordinates)
    shared: dict[str, Any] = {name: options[name] for name in ("fit_intercept", "memory_budget") if name in options}
    require_same(share_of(source).group, {"Cs": list(Cs)} | shared, SAME)
    if options.get("coordinates") is None:
        options["coordinates"] = coordinates_of(source, sample_weight=options.get("sample_weight"), **shared)
    fits: dict[int, Fit] = {}
    for index in sorted(range(len(Cs)), key=lambda index: Cs[index]):
        fits[index] = fit = fit_head(source, C=Cs[index], **options)
        options["start"] = fit.weight, fit.bias
    return tuple(fits[index] for index in range(len(Cs)))


def coordinates_of(
    source: Source, *, fit_intercept: bool = True, sample_weight: Tensor | None = None, memory_budget: int | None = None
) -> Coordinates:
    """Return the coordinates that :func:`fit_head` finds first, from a pass over the rows and an eigendecomposition.

    They also serve a fit to some of the rows, since they span those; any mean and any axes lead to the same head.
    """
    weights, _ = _weights(sample_weight, source)
    share, classes = share_of(source), len(source.classes)
    rows_at_once = _memory(source, memory_budget)[1]
    with _threads(share.total * row_entries(source) * classes, share.group):
        return find_coordinates(source, weights, classes, intercept=fit_intercept, rows_at_once=rows_at_once)


def _own_part(
    source: Source, sample_weight: Tensor | None, group: ProcessGroup, *, start: tuple[Tensor, Tensor] | None,
    coordinates: Coordinates | None,
) -> tuple[Source, Float[Tensor, " rows"] | None]:  # fmt: skip
    """Return this process's share of the rows and of their weights. Raises DataError for arguments that differ."""
    part = shared(source, Group(group))
    share = share_of(part)
    weights = None if sample_weight is None else torch.as_tensor(sample_weight).double()
    axes = () if coordinates is None else (coordinates.mean, coordinates.basis)
    compared = {"sample_weight": (weights,), "start": start or (), "coordinates": axes}
    require_same(share.group, {name: _described(tensors) for name, tensors in compared.items()}, SAME)
    if weights is None:
        return part, None
    _require_length(weights, share.total)
    return part, weights[share.first : share.first + part.rows]


def _require_length(weights: Tensor, rows: int) -> None:
    if weights.shape != (rows,):
        raise DataError(f"sample_weight must have one entry for each of {rows} rows; got {tuple(weights.shape)}")


def _is_number(value: object) -> bool:
    """Return whether a value is a real number other than a bool."""
    return isinstance(value, Real) and not isinstance(value, bool)


def _described(tensors: Sequence[Tensor | None]) -> str | None:
    present = [tensor for tensor in tensors if tensor is not None]
    shapes = " and ".join(str(tuple(tensor.shape)) for tensor in present)
    return f"a tensor of shape {shapes} with digest {digest(*present)}" if present else None


def check_options(C: Any, tol: Any, max_iter: Any, precision: Any, memory_budget: Any) -> None:
    """Raise DataError for an option of :func:`fit_head` that cannot be used."""
    if not (_is_number(C) and C > 0):
        raise DataError(f"C must be a positive number; got {C!r} (inf is no penalty)")
    if not (_is_number(tol) and math.isfinite(tol) and tol > 0):
        raise DataError(f"tol must be a positive number; got {tol!r}")
    if not (_is_number(max_iter) and isinstance(max_iter, Integral) and int(max_iter) >= 0):
        raise DataError(f"max_iter must be an integer of 0 or more; got {max_iter!r}")
    if precision not in ("auto", "mixed", "float64"):
        raise DataError(f"precision must be auto, mixed or float64; got {precision!r}")
    check_budget(memory_budget)


def check_budget(memory_budget: Any) -> None:
    """Raise DataError for a memory budget that cannot be used."""
    if memory_budget is not None and not (_is_number(memory_budget) and memory_budget >= LEAST_BUDGET):
        raise DataError(f"memory_budget must be at least {LEAST_BUDGET} bytes; got {memory_budget!r}")


def _check_coordinates(coordinates: Coordinates, source: Source, fit_intercept: bool) -> None:
    expected, actual = (
        f"{width} {'sparse' if sparse else 'dense'} features and fit_intercept {intercept}"
        for width, sparse, intercept in (
            (source.width, is_sparse(source), fit_intercept),
            (len(coordinates.mean), coordinates.sparse, coordinates.intercept),
        )
    )
    if actual != expected:
        raise DataError(f"coordinates must be of {expected}; got {actual}: find them for these rows by coordinates_of")


def _check_start(start: tuple[Tensor, Tensor], classes: int, width: int) -> None:
    shapes = [tuple(tensor.shape) for tensor in start]
    if shapes != [(classes, width), (classes,)]:
        raise DataError(
            f"start must be a weight of shape {(classes, width)} and a bias of shape {(classes,)}, as these rows have "
            f"{classes} classes and {width} features; got shapes {shapes}"
        )
    if not all(tensor.isfinite().all() for tensor in start):
        raise DataError("start must be finite; leave it out to start from zeros")


def _weights(sample_weight: Tensor | None, source: Source) -> tuple[Float64[Tensor, " rows"], float]:
    """Return the weights of these rows divided by the sum of the weights of all rows; and that sum."""
    share = share_of(source)
    if sample_weight is None:
        return torch.full((source.rows,), 1.0 / share.total, dtype=torch.float64), float(share.total)
    weights = torch.as_tensor(sample_weight).double()
    with share.group.agreed():
        _require_length(weights, source.rows)
    whole = torch.cat(share.group.gathered(weights))  # so that the sum is rounded as in one process
    total = float(whole.sum())
    if not (whole.isfinite().all() and (whole >= 0).all() and 1e-200 < total < 1e200):
        raise DataError(
            "sample_weight must be finite, not negative, and positive somewhere, with a sum of an ordinary size; mend "
            "or drop such rows"
        )
    return weights / total, total


def budget_of(source: Source, memory_budget: int | None) -> int:
    """Return the memory budget in bytes, or its default for the rows of a source."""
    return (IN_MEMORY if source.in_memory else FROM_FILES) if memory_budget is None else memory_budget


def _memory(source: Source, memory_budget: int | None) -> tuple[int, int]:
    """Return the memory budget in bytes, and the largest number of rows in a block."""
    budget = budget_of(source, memory_budget)
    width, classes = row_entries(source), len(source.classes)
    within_budget = int(FOR_TILES * budget) // (LOGIT_BYTES * classes + 16 * width)
    # A tile of sparse features also makes passes over the head, which many rows share.
    in_caches = max(source.width, TILE // classes) if is_sparse(source) else TILE // (classes + width)
    return budget, max(1, min(source.rows, within_budget, max(FEWEST_ROWS, in_caches)))


@contextmanager
def _threads(work: int, group: Group) -> Iterator[None]:
    """Use one thread if a product takes microseconds, and otherwise as many in all processes.

    What the processes compute from the same numbers is then rounded alike, and they decide alike.
    """
    threads = torch.get_num_threads()
    fewest = -int(group.largest(-threads)[0])
    torch.set_num_threads(1 if work < ONE_THREAD_BELOW * group.size else fewest)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _cold_state(objective: Objective, total: float, *, double: bool) -> State:
    """Return the start at zero weights and, as bias, the logarithms of the class frequencies."""
    problem, coordinates = objective.problem, objective.coordinates
    parameters = coordinates.laid_out(torch.zeros(problem.classes, coordinates.size, dtype=torch.float64))
    if coordinates.intercept:
        # One more row with equal probabilities keeps the frequencies positive.
        logs = (_class_frequencies(problem) + 1.0 / (total * problem.classes)).log()
        parameters[:, -1] = logs - logs.mean()
    return State(parameters, FIRST_DAMPING, double=double)


def _class_frequencies(problem: FitProblem) -> Float64[Tensor, " classes"]:
    frequencies = torch.zeros(problem.classes, dtype=torch.float64)
    with problem.group.summed(frequencies):
        for block, weights in problem.blocks():
            assert block.target is not None
            if (named := named_classes(block.target, torch.float64)) is not None:
                classes, probs = named
                frequencies.index_add_(0, classes.flatten(), (probs * weights[:, None]).flatten())
            elif isinstance(block.target, Tensor):
                frequencies += weights @ block.target.double()
    return frequencies


def separates(problem: FitProblem, weight: Tensor, bias: Tensor) -> bool:
    """Whether the label of every row has the largest logit, so that larger weights always have a smaller loss."""
    if problem.source.kind == "top_k":
        return False
    blocks_against = torch.zeros(1, dtype=torch.float64)
    with problem.group.summed(blocks_against):
        for block, weights in problem.blocks():
            assert block.target is not None
            label = target_labels(block.target)
            certain = target_probability(block.target, label, problem.classes) >= 1.0
            logits = linear(block.features, weight, bias)
            label_logit = logits.gather(1, label[:, None])
            others = logits.scatter(1, label[:, None], -math.inf).amax(1, keepdim=True)
            if not (certain & (label_logit > others)[:, 0])[weights > 0].all():
                blocks_against += 1.0
                break
    return not blocks_against
