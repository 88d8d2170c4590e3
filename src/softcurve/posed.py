"""A public call on features and a head, made into the passes' own terms, and their outcome into what the call returns.

Rows are flattened; weights of rows and classes, the reduction and the base become one weight a row; each kind of target
becomes the tensors that a :class:`~softcurve.head.problem.HeadLoss` of that kind names.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from softcurve import checks
from softcurve.array_types import Bool, Float, Int
from softcurve.functional import require_class_weight, require_finite_against, weighted
from softcurve.head.autograd import head_outcome
from softcurve.head.problem import HeadLoss, HeadTensors
from softcurve.head.sharded import Spread, lies_over_processes
from softcurve.objective import LogitMap, Reduction
from softcurve.targets import LinearTeacher, Logits, Probabilities, Target, TopK, as_target

DEFAULT_IGNORED = -100  # torch's own default of ignore_index


class LossStats(NamedTuple):
    """Of the softmax of each row, detached: shape ``(...)`` as the rows of ``input``."""

    lse: Float[Tensor, "*rows"]  # log Σ e^z of what the softmax sees, in nats
    entropy: Float[Tensor, "*rows"]  # in units of ``base``
    predicted: Int[Tensor, "*rows"]  # the most probable class
    correct: Bool[Tensor, "*rows"]  # whether it is the target's (most probable) class; never in a row that is ignored


# --- the head --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Head:
    """A head and its rows, which are flattened; where it is ``spread`` over processes, the part of this one."""

    input: Tensor  # (n, d)
    weight: Tensor
    bias: Tensor | None
    leading: torch.Size
    classes: int  # of all processes
    dtype: torch.dtype  # of the result
    spread: Spread | None

    @staticmethod
    def of(input: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor | Target) -> Head:
        """Rows flattened, in the dtype of autocast where that is on, as torch's ``linear`` would."""
        checks.require_features("input", input)
        checks.require_features("linear_weight", weight)
        if weight.ndim != 2 or weight.shape[1] != input.shape[-1]:
            raise ValueError(
                f"linear_weight must be of shape (C, {input.shape[-1]}), as wide as input {tuple(input.shape)}, "
                f"got {checks.describe(weight)}"
            )
        if len(weight) == 0:
            raise ValueError(f"linear_weight must have at least one class, got {checks.describe(weight)}")
        if bias is not None:
            checks.require_tensor("linear_bias", bias)
            if not bias.is_floating_point() or tuple(bias.shape) != (len(weight),):
                raise ValueError(
                    f"linear_bias must be a floating-point tensor of shape ({len(weight)},), one entry per class, "
                    f"got {checks.describe(bias)}"
                )
        classes = len(weight)
        spread = Spread.of(input, [weight, *([target.linear_weight] if isinstance(target, LinearTeacher) else [])])
        if spread is not None:
            input, weight = spread.features(input), spread.classes_of(weight)
            bias = None if bias is None else spread.classes_of(bias)
        leading, device = input.shape[:-1], input.device.type
        dtype = torch.promote_types(input.dtype, weight.dtype)
        if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
            lower = torch.get_autocast_dtype(device)
            input, weight = _lowered(input, lower), _lowered(weight, lower)
            bias = None if bias is None else _lowered(bias, lower)
            dtype = torch.promote_types(dtype, torch.float32)
        head = Head(input.reshape(-1, input.shape[-1]), weight, bias, leading, classes, dtype, spread)
        head.require_plain(linear_bias=bias)
        return head

    def agreed(self, make: Callable[[], Posed]) -> Posed:
        """``make()``, whose errors are those of all processes."""
        return make() if self.spread is None else self.spread.agreed(make)

    def require_plain(self, **named: object) -> None:
        """No DTensor beside a head that is none: it would be of other processes."""
        if self.spread is not None:
            return
        for name, value in named.items():
            parts = vars(value).values() if isinstance(value, Target) else (value,)
            if any(map(lies_over_processes, parts)):
                raise ValueError(
                    f"{name} must be plain where input and linear_weight are, got a DTensor; make input one too, "
                    "replicated or sharded on rows, by DTensor.from_local"
                )

    @property
    def shard(self) -> dict[str, Any]:
        """Of a :class:`HeadLoss`: which classes these are."""
        spread = self.spread
        return {} if spread is None else {"group": spread.group, "first": spread.first, "classes": spread.classes}

    @property
    def wide(self) -> torch.dtype:
        """Of the losses before the last rounding."""
        return torch.promote_types(self.dtype, torch.float32)


def _lowered(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.to(dtype)


# --- a loss of its rows ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Posed:
    """A loss of a head's rows, in the passes' own terms, before it is reduced."""

    head: Head
    loss: HeadLoss
    weight: Tensor  # (n,), of the rows
    mass: Tensor | float  # what a mean divides by
    batch: Tensor | float  # what "batchmean" divides by
    counted: Tensor  # (n,): which rows have a part
    weighs: bool  # whether a sample weight is in the rows' weights
    target: tuple[Tensor | None, Tensor | None, Tensor | None] = (None, None, None)
    indices: Tensor | None = None
    label: Tensor | None = None  # the target's class, (n,), where the pass does not see the whole target
    class_weight: Tensor | None = None
    coarsens: bool = False  # whether the outcomes are a list and one bucket

    def tensors(self, row_weight: Tensor) -> HeadTensors:
        """What the passes are given."""
        head = self.head
        return HeadTensors(
            head.input, head.weight, head.bias, *self.target, self.indices, row_weight, self.class_weight
        )

    def reduced(
        self, reducer: Reduction, memory_budget: int | None, return_stats: bool
    ) -> Tensor | tuple[Tensor, LossStats]:
        """What the public call returns."""
        require_budget(memory_budget)
        head, per_row = self.head, reducer.kind == "none"
        wide = self.weight.dtype
        if per_row:
            row_weight = self.counted.to(wide)
            if not self.weight.requires_grad:
                row_weight = torch.where(self.weight == 0, 0.0, row_weight)
        else:
            divisor = self.divisor(reducer)
            row_weight = self.weight / (torch.where(divisor == 0, 1.0, divisor) * reducer.nats)
        spread = head.spread
        outcome = head_outcome(
            self.loss,
            self.tensors(row_weight),
            memory_budget,
            per_row=per_row,
            weighs=self.weighs,
            stats=return_stats,
        )
        if per_row:
            result = weighted(self.weight, outcome.rows).reshape(head.leading)
            result = result if reducer.nats == 1 else result / reducer.nats
        else:
            # A mean of nothing is NaN and has gradient 0, as in torch.
            total = outcome.total if spread is None else spread.total(outcome.total)
            result = total + torch.where(divisor == 0, math.nan, 0.0).to(wide)
        result = result.to(head.dtype)
        if spread is not None:
            result = spread.result(result, per_row=per_row)
        if not return_stats:
            return result
        lse, entropy, predicted, found = (
            column.detach().reshape(head.leading) for column in vars(outcome.statistics).values()
        )
        label = found if self.label is None else self.label.reshape(head.leading)
        correct = (predicted == label) & self.counted.reshape(head.leading)
        stats = LossStats(lse, entropy / reducer.nats, predicted, correct)
        if spread is not None:
            stats = LossStats(*(spread.result(column, per_row=True) for column in stats))
        return result, stats

    def divisor(self, reducer: Reduction) -> Tensor:
        """What the sum over the rows is divided by, ``()``."""
        if reducer.kind == "sum":
            return self.weight.new_ones(())
        own = self.mass if reducer.kind == "mean" else self.batch
        divisor = own.to(self.weight.dtype) if isinstance(own, Tensor) else self.weight.new_full((), own)
        return divisor if self.head.spread is None else self.head.spread.divisor(divisor)


def require_budget(budget: int | None) -> None:
    """Bytes, or ``None``."""
    if budget is not None and (isinstance(budget, bool) or not isinstance(budget, int) or budget < 1):
        raise ValueError(f"memory_budget must be a positive int of bytes, or None, got {budget!r}")


def _sampled(head: Head, sample_weight: Tensor | None) -> Tensor | None:
    """``(n,)``, in the dtype of the losses."""
    if sample_weight is None:
        return None
    if head.spread is not None:
        sample_weight = head.spread.rows_of("sample_weight", sample_weight)
    checks.require_rows("sample_weight", sample_weight, head.leading, "input")
    checks.require_numbers("sample_weight", sample_weight)
    return sample_weight.reshape(-1).to(head.wide)


def cross_entropy_from(
    head: Head,
    target: Tensor | Target,
    *,
    weight: Tensor | None,
    sample_weight: Tensor | None,
    ignore_index: int | None,
    smoothing: float,
    shift: int,
    options: dict[str, float | None],
) -> Posed:
    """The cross-entropy of any target; ``options`` are temperature, soft cap and z-loss."""
    head.require_plain(target=target, weight=weight, sample_weight=sample_weight)
    given = (weight, sample_weight, ignore_index, smoothing, shift, options)
    return head.agreed(lambda: _cross_entropy_from(head, target, *given))


def _cross_entropy_from(
    head: Head,
    target: Tensor | Target,
    weight: Tensor | None,
    sample_weight: Tensor | None,
    ignore_index: int | None,
    smoothing: float,
    shift: int,
    options: dict[str, float | None],
) -> Posed:
    if weight is not None:
        weight = weight if head.spread is None else head.spread.whole(weight)
        require_class_weight(weight, head.classes)
        if weight.requires_grad:
            raise ValueError(
                "weight must not require gradients, as in torch; detach it, or weigh rows by sample_weight"
            )
    target = target if isinstance(target, Tensor) and target.is_floating_point() else as_target(target)
    if isinstance(target, Tensor) and not target.is_floating_point():
        ignored = DEFAULT_IGNORED if ignore_index is None else ignore_index
        return _against_indices(head, target, ignored, weight, sample_weight, smoothing, shift, options)
    if ignore_index is not None:
        raise ValueError(
            f"ignore_index must not be given for a target that is a distribution, got {ignore_index}; "
            "use sample_weight to leave out rows"
        )
    require_no_shift(shift)
    return _against_distribution(head, target, weight, sample_weight, smoothing, options)


# --- class indices ---------------------------------------------------------------------------------------------------


def _against_indices(
    head: Head,
    target: Tensor,
    ignore_index: int,
    weight: Tensor | None,
    sample_weight: Tensor | None,
    smoothing: float,
    shift: int,
    options: dict[str, float | None],
) -> Posed:
    """The cross-entropy of class indices."""
    if isinstance(ignore_index, bool) or not isinstance(ignore_index, int):
        raise TypeError(f"ignore_index must be an int or None, got {type(ignore_index).__name__}")
    require_shift(shift)
    target, present = _own_indices(head, target, shift, ignore_index)
    checks.require_class_indices("target", target, head.classes, ignore_index)
    target = target.reshape(-1)
    kept = target != ignore_index
    classes = torch.where(kept, target, 0)
    sampled = _sampled(head, sample_weight)
    counted = kept.to(head.wide) if sampled is None else torch.where(kept, sampled, 0.0)
    own = None if weight is None else weight.to(head.wide)[classes]
    mass = counted if own is None else counted * own
    coarse = None
    if smoothing or (options["z_loss"] and own is not None):
        # Over the class and the rest: the mass on the class. Smoothing over all classes is the head's own matter.
        mine = (1 - smoothing) * (torch.ones_like(counted) if own is None else own)
        coarse = torch.stack([mine, torch.zeros_like(mine)], -1)
        row_weight = counted
    else:
        row_weight, weight = mass, None
    return Posed(
        head,
        HeadLoss("cross_entropy", "list", smoothing=smoothing, **options, **head.shard),  # type: ignore[arg-type]
        row_weight,
        mass.sum(),
        present.sum(),
        kept,
        sampled is not None,
        target=(coarse, None, None),
        indices=classes.unsqueeze(-1),
        label=classes,
        class_weight=weight,
    )


def _own_indices(head: Head, target: Tensor, shift: int, ignore_index: int) -> tuple[Tensor, Tensor]:
    """The targets of these rows, and where there is one."""
    spread = head.spread
    if spread is None:
        checks.require_rows("target", target, head.leading, "input")
        return _shifted(target, shift, ignore_index)
    spread.require_leading("target", target)
    checks.require_rows("target", target, spread.leading, "input")
    if shift == 0:
        own = spread.rows_of("target", target)
        return own, torch.ones_like(own, dtype=torch.bool)
    # A shift looks beyond the rows of this process.
    target, present = _shifted(spread.whole(target), shift, ignore_index)
    return spread.rows_of("target", target), spread.rows_of("target", present)


def _shifted(target: Tensor, shift: int, ignore_index: int) -> tuple[Tensor, Tensor]:
    """The targets ``shift`` positions further on, nothing at the end; and where there is one."""
    if shift == 0:
        return target, torch.ones_like(target, dtype=torch.bool)
    if target.ndim == 0:
        raise ValueError("shift must be 0 for a single row, which has no next position")
    shift = min(shift, target.shape[-1])
    missing = torch.full_like(target[..., :shift], ignore_index)
    present = torch.cat([torch.ones_like(target[..., shift:]), torch.zeros_like(missing)], -1).bool()
    return torch.cat([target[..., shift:], missing], -1), present


def require_shift(shift: int) -> None:
    """Positions to look ahead."""
    if isinstance(shift, bool) or not isinstance(shift, int) or shift < 0:
        raise ValueError(f"shift must be an int >= 0, got {shift!r}")


def require_no_shift(shift: int) -> None:
    """Only class indices can be looked up further on."""
    if shift != 0:
        raise ValueError(
            f"shift must be 0 unless the target holds class indices, got {shift!r}; "
            "a distribution belongs to its row: slice input and target instead"
        )


# --- distributions ---------------------------------------------------------------------------------------------------


def _against_distribution(
    head: Head,
    target: Tensor | Target,
    weight: Tensor | None,
    sample_weight: Tensor | None,
    smoothing: float,
    options: dict[str, float | None],
) -> Posed:
    """The cross-entropy of a distribution."""
    rows = _rows_of_distributions(head, sample_weight)
    if isinstance(target, TopK):
        target = _fitting(head, target)
        if target.coarsens and weight is not None:
            raise ValueError(
                "weight must be None for a TopK with tail='bucket', whose bucket has no class; "
                "use tail='renormalize' or sample_weight"
            )
        indices = _flat(target.indices)
        y = _flat(torch.softmax(target.coarse_log_probs(head.classes), -1))
        everywhere: float = 0.0
        if target.coarsens and smoothing:
            # The uniform distribution, as it looks over the outcomes.
            k = indices.shape[-1]
            uniform = torch.full_like(y, 1 / head.classes)
            uniform[:, -1] = (head.classes - k) / head.classes
            y = (1 - smoothing) * y + smoothing * uniform
        elif smoothing:
            y, everywhere = (1 - smoothing) * y, smoothing
        if weight is not None:
            own = weight.to(y.dtype)[indices]
            y = torch.cat([y[:, :-1] * own, y[:, -1:]], -1)
        loss = HeadLoss("cross_entropy", "list", smoothing=everywhere, **options, **head.shard)  # type: ignore[arg-type]
        label, coarsens = _most_probable(target), target.coarsens
        return Posed(
            head, loss, *rows, target=(y, None, None), indices=indices, label=label, class_weight=weight,
            coarsens=coarsens,
        )  # fmt: skip
    kind, tensors = _dense_target(head, target)
    loss = HeadLoss("cross_entropy", kind, smoothing=smoothing, **options, **head.shard)  # type: ignore[arg-type]
    return Posed(head, loss, *rows, target=tensors, class_weight=weight)


def divergence_from(
    head: Head,
    target: Tensor | Target,
    *,
    family: str,
    beta: float,
    sample_weight: Tensor | None,
    temperature: float,
    softcap: float | None,
) -> Posed:
    """The divergence between a distribution and the head's."""
    head.require_plain(target=target, sample_weight=sample_weight)
    return head.agreed(lambda: _divergence_from(head, target, family, beta, sample_weight, temperature, softcap))


def _divergence_from(
    head: Head,
    target: Tensor | Target,
    family: str,
    beta: float,
    sample_weight: Tensor | None,
    temperature: float,
    softcap: float | None,
) -> Posed:
    LogitMap(temperature, softcap)
    target = as_target(target)
    if isinstance(target, Tensor):
        raise TypeError(
            f"target must be a distribution, got class indices ({target.dtype}); "
            "for those use softcurve.linear_cross_entropy, which is D(target‖model) there"
        )
    rows = _rows_of_distributions(head, sample_weight)

    def loss(kind: str) -> HeadLoss:
        return HeadLoss(family, kind, beta, temperature, softcap, **head.shard)

    if isinstance(target, TopK):
        target = _fitting(head, target)
        require_finite_against(loss("list").divergence, target, temperature)
        logits = target.coarse_log_probs(head.classes)
        logits = logits if temperature == 1 else logits / temperature
        return Posed(
            head,
            loss("list"),
            *rows,
            target=(_flat(logits), None, None),
            indices=_flat(target.indices),
            label=_most_probable(target),
            coarsens=target.coarsens,
        )
    kind, tensors = _dense_target(head, target)
    return Posed(head, loss(kind), *rows, target=tensors)


def _rows_of_distributions(
    head: Head, sample_weight: Tensor | None
) -> tuple[Tensor, Tensor | float, Tensor | float, Tensor, bool]:
    """The rows' weights, what means divide by, which rows count, and whether there is a sample weight."""
    count = len(head.input)
    everywhere = torch.ones(count, dtype=torch.bool, device=head.input.device)
    sampled = _sampled(head, sample_weight)
    if sampled is None:
        return everywhere.to(head.wide), float(count), float(count), everywhere, False
    return sampled, sampled.sum(), float(count), everywhere, True


def _dense_target(
    head: Head, target: Tensor | Target
) -> tuple[str, tuple[Tensor | None, Tensor | None, Tensor | None]]:
    """The kind of a target that speaks of every class, and its tensors."""
    spread = head.spread
    leading = head.leading if spread is None else spread.leading
    if isinstance(target, LinearTeacher):
        if target.linear_weight.shape[0] != head.classes or target.input.shape[:-1] != leading:
            raise ValueError(
                f"target (LinearTeacher) must have the {head.classes} classes of linear_weight and the rows "
                f"{tuple(leading)} of input, got {target.linear_weight.shape[0]} classes and rows "
                f"{tuple(target.input.shape[:-1])}"
            )
        e, weight, bias = target.input, target.linear_weight, target.linear_bias
        if spread is not None:
            e, weight = spread.features(e), spread.classes_of(weight)
            bias = None if bias is None else spread.classes_of(bias)
        return "teacher", (_flat(e), weight, bias)
    kind = "logits" if isinstance(target, Logits) else "probabilities"
    if isinstance(target, Probabilities | Logits):
        target = target.values
    assert isinstance(target, Tensor)
    if tuple(target.shape) != (*leading, head.classes):
        raise ValueError(
            f"target ({kind}) must have the shape {(*leading, head.classes)} of the logits, "
            f"got {checks.describe(target)}"
        )
    if spread is not None:
        target = spread.distributions("target", target)
    return kind, (_flat(target), None, None)


def _fitting(head: Head, target: TopK) -> TopK:
    """A list for each row of this process."""
    if head.spread is not None:
        of_rows = head.spread.rows_of
        target = TopK(of_rows("target", target.indices), of_rows("target", target.log_probs), target.tail)
    target.require_fit((*head.leading, head.classes))
    return target


def _most_probable(target: TopK) -> Tensor:
    """The class that heads a list."""
    return target.indices.gather(-1, target.log_probs.argmax(-1, keepdim=True)).squeeze(-1)


def _flat(tensor: Tensor) -> Tensor:
    return tensor.reshape(math.prod(tensor.shape[:-1]), tensor.shape[-1])  # of no classes -1 could be any number
