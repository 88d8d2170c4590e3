"""The fit of a softmax head to the rows of a source."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from numbers import Real
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from softcurve.array_types import Float, Float64
from softcurve.fit import DataError
from softcurve.fit.checkpoint import Keeper, digest
from softcurve.fit.data.source import Block, Source, share_of
from softcurve.fit.data.subset import shared
from softcurve.fit.losses import check_loss
from softcurve.fit.solver.coordinates import Coordinates, find_coordinates
from softcurve.fit.solver.curvature import AT_AGREEMENT, Curvature
from softcurve.fit.solver.newton import Outcome, State, Step, minimise
from softcurve.fit.solver.objective import Objective
from softcurve.fit.together import Processes, Together, require_same
from softcurve.records import ShortRepr

__all__ = ["Fit", "coordinates_of", "fit_head", "is_number", "own_part"]

IN_MEMORY, FROM_FILES = 2**30, 2**28
LEAST_BUDGET = 2**24
# Entries of a tile's features and logits: what the cores' caches hold.
TILE = 2**19
FEWEST_ROWS = 64
# Of the memory budget: for tiles, for the classes' blocks, and for features and probabilities.
FOR_TILES, FOR_BLOCKS, FOR_ROWS = 0.125, 0.25, 0.5
# Bytes of an entry of a tile of logits: three in float32 and three in float64 are alive at a time.
OF_LOGIT = 36
# Multiply-adds of the logits below which waiting for a second thread costs more than it brings.
ONE_THREAD_BELOW = 3_000_000
# And those below which float32 saves nothing.
DOUBLE_BELOW = 1_000_000
SAME = "give all of them the same arguments"
# From zero, and from the head of a similar problem.
FIRST_DAMPING, WARM_DAMPING = 1.0, 1e-2


@dataclass(frozen=True, eq=False, repr=False)
class Fit(ShortRepr):
    """A fitted head: ``weight`` (C, d), ``bias`` (C,), the objective in nats, and how it was reached.

    ``gradient_max`` is the largest entry of the objective's gradient in float64. ``converged`` says whether it and the
    Newton decrement are within the tolerance, ``reason`` why the fit ended. ``separated`` says that nothing was
    penalised and every row is on the right side: the loss then has no minimum, and falls forever as the weights grow.
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
    source: Source,
    *,
    loss: str = "cross_entropy",
    C: float = 1.0,
    fit_intercept: bool = True,
    sample_weight: Tensor | None = None,
    tol: float = 1e-4,
    max_iter: int = 100,
    precision: str = "auto",
    memory_budget: int | None = None,
    start: tuple[Tensor, Tensor] | None = None,
    coordinates: Coordinates | None = None,
    checkpoint: Path | None = None,
    checkpoint_every: float = 30.0,
    on_step: Callable[[Step], None] = lambda step: None,
    on_product: Callable[[int], None] = lambda products: None,
    group: ProcessGroup | None = None,
) -> Fit:
    """Minimise ``Σ w_i loss_i / Σ w_i + ‖W‖² / (2 C Σ w_i)``: scikit-learn's objective divided by ``C Σ w_i``.

    The bias is not penalised. Two classes are penalised by their one difference, as there: by ``½ ‖w_1 − w_0‖²``. It
    has converged when no entry of this mean's gradient exceeds ``tol``, and a Newton step would gain at most
    ``tol / 50``.

    Args:
        source: Rows and their targets.
        loss: ``cross_entropy``, ``forward_kl``, ``reverse_kl`` or ``js``.
        C: Inverse strength of the penalty; ``inf`` for none.
        fit_intercept: Whether there is a bias; otherwise it is zero.
        sample_weight: Of each row, ≥ 0; ones by default.
        tol: Of the largest entry of the gradient.
        max_iter: Newton steps at most.
        precision: ``mixed`` multiplies in float32 and takes the objective and its gradient in float64; ``float64`` is
            float64 throughout; ``auto`` is ``mixed``, but where float32 would save nothing. All end at the same head.
        memory_budget: Bytes beyond the rows of the source. By default 1 GiB where they are in memory, or else 256 MiB.
        start: Weight and bias to start from, where the objective is lower there than at the default: zeros and the
            classes' shares.
        coordinates: Those of :func:`coordinates_of`, for several fits to the same rows, or to some of them.
        checkpoint: Where the state is written every ``checkpoint_every`` seconds. If it is there already, the fit goes
            on from it; it must belong to the same rows and options.
        on_step: Called after every step.
        on_product: Called with the number of products so far, after each.
        group: Processes that fit one head together. All give the same arguments, the source and ``sample_weight`` of
            all rows, of which each reads a part of its own; the first one reads and writes the checkpoint. A source
            that is such a part already (:func:`~softcurve.fit.data.subset.shared`) comes with the weights of its own
            rows, and needs no group.

    Raises DataError for options, rows or a checkpoint that cannot be used, in all processes of a group, and
    :class:`~softcurve.fit.together.LostProcess` where one of them ends or does not answer within the group's timeout.
    """
    if group is not None:
        source, sample_weight = own_part(source, sample_weight, group, start=start, coordinates=coordinates)
    given = {"loss": loss, "C": C, "fit_intercept": fit_intercept, "tol": tol, "max_iter": max_iter}
    given |= {"precision": precision, "memory_budget": memory_budget, "checkpoint": checkpoint}
    require_same(share_of(source).together, given, SAME)
    if source.kind is None:
        raise DataError("the rows must have targets to fit a head to; give labels, distributions or lists")
    check_loss(loss, source.kind)
    _check_options(C, tol, max_iter, precision, memory_budget)
    classes = len(source.classes)
    _check_start(start, classes, source.width)
    share = share_of(source)
    together = share.together
    weights, total = _weights(sample_weight, source)
    budget = _budget(source, memory_budget)
    rows_at_once = _rows_at_once(source, classes, budget)
    penalty = (2.0 if classes == 2 else 1.0) / (C * total)
    work = share.total * source.width * classes
    double = precision == "float64" or (precision == "auto" and work < DOUBLE_BELOW)
    with _threads(work, together):
        if coordinates is None:
            coordinates = find_coordinates(source, weights, classes, intercept=fit_intercept, rows_at_once=rows_at_once)
        _require_fitting(coordinates, source.width, fit_intercept)
        objective = Objective(source, loss, penalty, weights, coordinates, classes, rows_at_once)

        def curvature_in(dtype: torch.dtype) -> Curvature:
            return Curvature(
                source, coordinates, weights, classes, scale=AT_AGREEMENT[loss], penalty=penalty, dtype=dtype,
                rows_at_once=rows_at_once, memory=int(FOR_ROWS * budget), on_product=on_product,
            )  # fmt: skip

        keeper, state = Keeper(together, on_step), None
        if checkpoint is not None:
            options = {"loss": loss, "C": C, "fit_intercept": fit_intercept, "precision": precision, "classes": classes}
            identity = {name: str(value) for name, value in options.items()} | _digests(source, weights)
            state = keeper.open(checkpoint, coordinates, identity, classes, every=checkpoint_every)

        def cold() -> State:
            return _cold_state(objective, total, double=double)

        if state is None:
            state = cold() if start is None else _warm_state(objective, *start, double=double)
        with keeper.running():
            outcome = minimise(
                objective, curvature_in, state, tol=tol, max_iter=max_iter, memory_of_blocks=int(FOR_BLOCKS * budget),
                on_step=keeper.note, cold=cold if start is not None else None,
            )  # fmt: skip
        return _fit_of(outcome, objective)


def coordinates_of(
    source: Source,
    *,
    fit_intercept: bool = True,
    sample_weight: Tensor | None = None,
    memory_budget: int | None = None,
) -> Coordinates:
    """The coordinates that :func:`fit_head` finds first: one pass over the rows, and the eigenvectors of a covariance.

    They also serve a fit to some of the rows, as they span those; any mean and any axes lead to the same head.
    """
    weights, _ = _weights(sample_weight, source)
    share, classes = share_of(source), len(source.classes)
    rows_at_once = _rows_at_once(source, classes, _budget(source, memory_budget))
    with _threads(share.total * source.width * classes, share.together):
        return find_coordinates(source, weights, classes, intercept=fit_intercept, rows_at_once=rows_at_once)


def _require_fitting(coordinates: Coordinates, width: int, fit_intercept: bool) -> None:
    if len(coordinates.mean) != width or coordinates.intercept != fit_intercept:
        raise DataError(
            f"coordinates must be of {width} features and fit_intercept {fit_intercept}; got "
            f"{len(coordinates.mean)} and {coordinates.intercept}: find them for these rows by coordinates_of"
        )


def _fit_of(outcome: Outcome, objective: Objective) -> Fit:
    weight, bias = objective.coordinates.head(outcome.point.parameters)
    history = outcome.state.history
    return Fit(
        weight=weight,
        bias=bias,
        objective=outcome.point.value,
        gradient_max=outcome.point.gradient_max,
        iterations=len(history) - 1,
        products=history[-1].products,
        converged=outcome.converged,
        reason=outcome.reason,
        separated=not objective.penalty and _separates(objective, weight, bias),
        history=history,
    )


def _separates(objective: Objective, weight: Tensor, bias: Tensor) -> bool:
    """Whether every row's label has the largest logit: then a larger weight has a smaller loss, without end."""
    if objective.source.kind == "top_k":
        return False
    against = torch.zeros(1, dtype=torch.float64)
    with share_of(objective.source).together.summed(against):
        for block in objective.source.blocks(objective.rows_at_once):
            of_rows = objective.weights[block.start : block.start + len(block)] > 0
            if not _separated(block, weight, bias)[of_rows].all():
                against += 1.0
                break
    return not against


def _separated(block: Block, weight: Tensor, bias: Tensor) -> Tensor:
    label = block.target
    assert isinstance(label, Tensor)
    certain = torch.ones(len(block), dtype=torch.bool)
    if label.is_floating_point():
        share, label = label.max(1)
        certain = share >= 1.0
    logits = torch.addmm(bias, block.features.double(), weight.T)
    of_label = logits.gather(1, label[:, None])
    others = logits.scatter(1, label[:, None], -math.inf).amax(1, keepdim=True)
    return certain & (of_label > others)[:, 0]


def _digests(source: Source, weights: Tensor) -> dict[str, str]:
    """Of the rows of all processes, and of their weights, as long as tells them apart."""
    return {"rows": source.fingerprint[:16], "weights": digest(*share_of(source).together.in_order(weights))}


def _warm_state(objective: Objective, weight: Tensor, bias: Tensor, *, double: bool) -> State:
    parameters = objective.coordinates.parameters(weight.double(), bias.double())
    return State(parameters, WARM_DAMPING, math.inf, 0, double, False, ())


def _cold_state(objective: Objective, total: float, *, double: bool) -> State:
    coordinates = objective.coordinates
    parameters = torch.zeros(objective.classes, coordinates.size, dtype=torch.float64)
    if coordinates.intercept:
        shares = _class_shares(objective)
        # As if there were one row more, spread over all classes.
        logs = (shares + 1.0 / (total * objective.classes)).log()
        parameters[:, -1] = logs - logs.mean()
    return State(parameters, FIRST_DAMPING, math.inf, 0, double, False, ())


def _class_shares(objective: Objective) -> Float64[Tensor, " classes"]:
    shares = torch.zeros(objective.classes, dtype=torch.float64)
    with share_of(objective.source).together.summed(shares):
        for block in objective.source.blocks(objective.rows_at_once):
            weights = objective.weights[block.start : block.start + len(block)]
            assert block.target is not None
            if not isinstance(block.target, Tensor):
                probs = block.target.log_probs.double().exp() * weights[:, None]
                shares.scatter_add_(0, block.target.indices.flatten(), probs.flatten())
            elif block.target.is_floating_point():
                shares += weights @ block.target.double()
            else:
                shares.scatter_add_(0, block.target, weights)
    return shares


def _budget(source: Source, given: int | None) -> int:
    return (IN_MEMORY if source.in_memory else FROM_FILES) if given is None else given


def _rows_at_once(source: Source, classes: int, budget: int) -> int:
    fits = int(FOR_TILES * budget) // (OF_LOGIT * classes + 16 * source.width)
    return max(1, min(source.rows, fits, max(FEWEST_ROWS, TILE // (classes + source.width))))


def _weights(sample_weight: Tensor | None, source: Source) -> tuple[Float64[Tensor, " rows"], float]:
    """The weights of these rows, divided by the sum of all rows' weights; and that sum."""
    share = share_of(source)
    if sample_weight is None:
        return torch.full((source.rows,), 1.0 / share.total, dtype=torch.float64), float(share.total)
    given = torch.as_tensor(sample_weight).double()
    with share.together.agreed():
        if given.shape != (source.rows,):
            raise DataError(
                f"sample_weight must have one entry for each of {source.rows} rows; got {tuple(given.shape)}"
            )
    # All of them, as their sum has the rounding that it has in one process.
    pieces = list(share.together.in_order(given))
    whole = pieces[0] if len(pieces) == 1 else torch.cat(pieces)
    total = float(whole.sum())
    if not (whole.isfinite().all() and (whole >= 0).all() and 1e-200 < total < 1e200):
        raise DataError(
            "sample_weight must be finite, not negative, and positive somewhere, with a sum of an ordinary size; mend "
            "or drop such rows"
        )
    return given / total, total


def own_part(
    source: Source,
    sample_weight: Tensor | None,
    group: ProcessGroup,
    *,
    start: tuple[Tensor, Tensor] | None = None,
    coordinates: Coordinates | None = None,
) -> tuple[Source, Float[Tensor, " rows"] | None]:
    """The rows, and their weights, that this process of a group has; see :func:`fit_head`. Raises DataError.

    The other arguments are only compared with those of the other processes.
    """
    own = shared(source, Processes(group))
    weights = None if sample_weight is None else torch.as_tensor(sample_weight).double()
    axes = () if coordinates is None else (coordinates.mean, coordinates.basis)
    compared = {"sample_weight": (weights,), "start": start or (), "coordinates": axes}
    require_same(share_of(own).together, {name: _of_tensors(each) for name, each in compared.items()}, SAME)
    if weights is None:
        return own, None
    share = share_of(own)
    if weights.shape != (share.total,):
        raise DataError(f"sample_weight must have one entry for each of {share.total} rows; got {tuple(weights.shape)}")
    return own, weights[share.first : share.first + own.rows]


def _of_tensors(tensors: Sequence[Tensor | None]) -> str | None:
    there = [tensor for tensor in tensors if tensor is not None]
    shapes = " and ".join(str(tuple(tensor.shape)) for tensor in there)
    return f"a tensor of shape {shapes} with digest {digest(*there)}" if there else None


def _check_options(C: float, tol: float, max_iter: int, precision: str, memory_budget: int | None) -> None:
    if not (is_number(C) and C > 0):
        raise DataError(f"C must be a positive number; got {C!r} (inf is no penalty)")
    if not (is_number(tol) and math.isfinite(tol) and tol > 0):
        raise DataError(f"tol must be a positive number; got {tol!r}")
    if isinstance(max_iter, bool) or not (isinstance(max_iter, int) and max_iter >= 0):
        raise DataError(f"max_iter must be an integer of 0 or more; got {max_iter!r}")
    if precision not in ("auto", "mixed", "float64"):
        raise DataError(f"precision must be auto, mixed or float64; got {precision!r}")
    if memory_budget is not None and not (is_number(memory_budget) and memory_budget >= LEAST_BUDGET):
        raise DataError(f"memory_budget must be at least {LEAST_BUDGET} bytes; got {memory_budget!r}")


def is_number(value: object) -> bool:
    """Whether it is a real number, and no truth value."""
    return isinstance(value, Real) and not isinstance(value, bool)


def _check_start(start: tuple[Tensor, Tensor] | None, classes: int, width: int) -> None:
    if start is None:
        return
    shapes = [tuple(tensor.shape) for tensor in start]
    if shapes != [(classes, width), (classes,)]:
        raise DataError(
            f"start must be a weight of shape {(classes, width)} and a bias of shape {(classes,)}, as these rows have "
            f"{classes} classes and {width} features; got shapes {shapes}"
        )
    if not all(tensor.isfinite().all() for tensor in start):
        raise DataError("start must be finite; leave it out to start from zeros")


@contextmanager
def _threads(work: int, together: Together) -> Iterator[None]:
    """Keep torch to one thread where a product is a matter of microseconds; and all processes to as many.

    They add up what they all have with the same rounding then, and decide alike.
    """
    threads = torch.get_num_threads()
    fewest = -int(together.largest(-threads)[0])
    torch.set_num_threads(1 if work < ONE_THREAD_BELOW * together.size else fewest)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
