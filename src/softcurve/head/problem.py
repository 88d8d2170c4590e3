"""A public call on features and a head, made into the passes' own terms, and their outcome into what the call returns.

Rows are flattened; weights of rows and classes, the reduction and the base become one weight a row; each kind of target
becomes the tensors that a :class:`~softcurve.losses.spec.LossSpec` of that kind names.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from softcurve import checks
from softcurve.array_types import Bool, Float, Int
from softcurve.head.autograd import head_outcome
from softcurve.head.sharded import Spread, lies_over_processes
from softcurve.head.tensors import HeadTensors
from softcurve.losses.divergences import CrossEntropy, Divergence
from softcurve.losses.reduction import Reduction, weighted
from softcurve.losses.spec import LossSpec
from softcurve.losses.targets import (
    LinearTeacher,
    Logits,
    Probabilities,
    Target,
    TopK,
    as_target,
    clear_class_indices,
    require_finite_against,
    resolve_ignore_index,
    uniform_over_unmasked,
)
from softcurve.records import short_repr
from softcurve.typing import Integer

T = TypeVar("T")


class LossStats(NamedTuple):
    """Of the softmax of each row, detached: shape ``(...)`` as the rows of ``input``."""

    lse: Float[Tensor, "*rows"]  # log Σ e^z of what the softmax sees, in nats
    entropy: Float[Tensor, "*rows"]  # in units of ``base``
    predicted: Int[Tensor, "*rows"]  # the most probable class
    correct: Bool[Tensor, "*rows"]  # whether it is the target's (most probable) class; never in a row that is ignored

    def __repr__(self) -> str:
        return short_repr(self, self._asdict())


# --- the head --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Head:
    """A head and its rows, which are flattened; where it is ``spread`` over processes, the part of this one."""

    input: Tensor  # (n, d)
    weight: Tensor
    bias: Tensor | None
    leading: torch.Size
    classes: int  # of all processes
    dtype: torch.dtype  # of the losses: float32 or wider
    bias_given: Tensor | None  # of all processes
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
        bias_given = bias
        if spread is not None:
            input, weight = spread.features(input), spread.classes_of(weight)
            bias = None if bias is None else spread.classes_of(bias)
        leading, device = input.shape[:-1], input.device.type
        dtype = torch.promote_types(torch.promote_types(input.dtype, weight.dtype), torch.float32)
        if isinstance(target, Target) or (isinstance(target, Tensor) and target.is_floating_point()):
            dtype = torch.promote_types(dtype, target.dtype)
        if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
            lower = torch.get_autocast_dtype(device)
            input, weight = _lowered(input, lower), _lowered(weight, lower)
            bias = None if bias is None else _lowered(bias, lower)
        head = Head(input.reshape(-1, input.shape[-1]), weight, bias, leading, classes, dtype, bias_given, spread)
        head.require_plain(linear_bias=bias)
        return head

    def agreed(self, make: Callable[[], T]) -> T:
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
        """Of a :class:`LossSpec`: which classes these are."""
        spread = self.spread
        return {} if spread is None else {"group": spread.group, "first": spread.first, "classes": spread.classes}

    @property
    def all_leading(self) -> torch.Size:
        """The leading dimensions of the rows of all processes."""
        return self.leading if self.spread is None else self.spread.leading

    def uniform(self) -> Tensor | None:
        """The uniform distribution over the unmasked classes of all processes, ``(C,)``; ``None`` if none is masked."""
        bias, spread = self.bias_given, self.spread
        if bias is None:
            return None
        bias = bias.detach() if spread is None else spread.whole(bias)
        uniform = uniform_over_unmasked(bias.to(self.dtype))
        return uniform if uniform.ndim else None

    def share_of_smoothing(self, weight: Tensor | None) -> Tensor | None:
        """The factor of each class in the ``ε / C`` of label smoothing, ``(C,)``: its class weight; 0 if masked."""
        uniform = self.uniform()
        if uniform is None:
            return weight
        share = uniform * self.classes
        return share if weight is None else share * weight.to(share.dtype)


def _lowered(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.to(dtype)


# --- a loss of its rows ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Posed:
    """A loss of a head's rows, in the passes' own terms, before it is reduced."""

    head: Head
    loss: LossSpec
    weight: Tensor  # (n,), of the rows
    mean_weight: Tensor | None  # (n,), of which the sum divides a mean; None: one each
    counted: Tensor  # (n,): which rows have a part
    weighs: bool  # whether a sample weight is in the rows' weights
    target: tuple[Tensor | None, Tensor | None, Tensor | None] = (None, None, None)
    indices: Tensor | None = None
    label: Tensor | None = None  # the target's class, (n,), where the pass does not see the whole target
    class_weight: Tensor | None = None
    merges_tail: bool = False  # whether the outcomes are a list and one bucket

    def tensors(self, row_weight: Tensor) -> HeadTensors:
        """What the passes are given."""
        head = self.head
        return HeadTensors(
            head.input, head.weight, head.bias, *self.target, self.indices, row_weight, self.class_weight
        )

    def reduced(
        self, reducer: Reduction, memory_budget: Integer | None, return_stats: bool
    ) -> Tensor | tuple[Tensor, LossStats]:
        """What the public call returns."""
        head, per_row = self.head, reducer.kind == "none"
        wide = self.weight.dtype
        divisor = None
        if per_row:
            row_weight = self.counted.to(wide)
            if not self.weight.requires_grad:
                row_weight = torch.where(self.weight == 0, 0.0, row_weight)
        else:
            divisor = self.divisor(reducer)
            # A mean of nothing is NaN and has gradient 0, as in torch.
            some = torch.where(divisor == 0, 1.0, divisor)
            row_weight = torch.where(divisor == 0, 0.0, self.weight / (some * reducer.nats))
        spread = head.spread
        outcome = head_outcome(
            self.loss,
            self.tensors(row_weight),
            require_budget(memory_budget),
            per_row=per_row,
            weighs=self.weighs,
            stats=return_stats,
        )
        head.agreed(lambda: self.explain_nan(outcome.rows))
        if divisor is None:
            result = weighted(self.weight, outcome.rows).reshape(head.leading)
            result = result if reducer.nats == 1 else result / reducer.nats
        else:
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

    def explain_nan(self, rows: Tensor) -> None:
        """Raise ``ValueError`` if the loss of a row that counts is NaN, where that can be seen."""
        given: dict[str, Tensor | None] = {
            "input": self.head.input, "linear_weight": self.head.weight, "linear_bias": self.head.bias
        }  # fmt: skip
        checks.explain_head_nan(rows, self.weight, given, [part for part in self.target if part is not None])

    def divisor(self, reducer: Reduction) -> Tensor:
        """What the sum over the rows is divided by, ``()``."""
        head = self.head
        if reducer.kind != "mean":
            return reducer.divisor(head.all_leading, self.weight, None)
        divisor = reducer.divisor(head.leading, self.weight, self.mean_weight)
        return divisor if head.spread is None else head.spread.divisor(divisor)


def require_budget(budget: object) -> int | None:
    """Return a number of bytes as a Python int, or ``None``."""
    bytes_ = None if budget is None else checks.as_integer(budget)
    if budget is not None and (bytes_ is None or bytes_ < 1):
        raise ValueError(f"memory_budget must be a positive int of bytes, or None, got {budget!r}")
    return bytes_


def _row_weight(head: Head, sample_weight: Tensor | None, shift: int = 0) -> Tensor | None:
    """The weights of this process's rows, of the shape of the rows, in the dtype of the losses."""
    if sample_weight is None:
        return None
    sample_weight = _own_rows(head, "sample_weight", sample_weight, shift, 0)
    checks.require_numbers("sample_weight", sample_weight)
    return sample_weight.to(head.dtype)


def cross_entropy_from(
    head: Head,
    target: Tensor | Target,
    *,
    weight: Tensor | None,
    sample_weight: Tensor | None,
    ignore_index: Integer | None,
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
    ignore_index: Integer | None,
    smoothing: float,
    shift: int,
    options: dict[str, float | None],
) -> Posed:
    if weight is not None:
        weight = weight if head.spread is None else head.spread.whole(weight)
        checks.require_class_weight(weight, head.classes)
    target = as_target(target)
    ignore_index = resolve_ignore_index(ignore_index, target)
    if isinstance(target, Tensor):
        return _against_indices(head, target, ignore_index, weight, sample_weight, smoothing, shift, options)
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
    target = _own_rows(head, "target", target, shift, ignore_index)
    sampled = _row_weight(head, sample_weight, shift)
    target = clear_class_indices(target, sampled, head.classes, ignore_index)
    checks.require_class_indices("target", target, head.classes, ignore_index)
    target = target.reshape(-1)
    kept = target != ignore_index
    classes = torch.where(kept, target, 0)
    counted = kept.to(head.dtype) if sampled is None else torch.where(kept, sampled.reshape(-1), 0.0)
    own = None if weight is None else weight.to(head.dtype)[classes]
    mean_weight = counted if own is None else counted * own
    coarse, row_weight = None, mean_weight
    if smoothing or (options["z_loss"] and own is not None):
        # Over the class and the rest: the mass on the class. Smoothing over all classes is the head's own matter.
        mine = (1 - smoothing) * (torch.ones_like(counted) if own is None else own)
        coarse = torch.stack([mine, torch.zeros_like(mine)], -1)
        row_weight = counted
    return Posed(
        head,
        LossSpec(CrossEntropy(), "sparse", smoothing=smoothing, **options, **head.shard),  # type: ignore[arg-type]
        row_weight,
        mean_weight,
        kept,
        sampled is not None,
        target=(coarse, None, None),
        indices=classes.unsqueeze(-1),
        label=classes,
        class_weight=head.share_of_smoothing(weight) if smoothing else None,
    )


def _own_rows(head: Head, name: str, tensor: Tensor, shift: int, missing: int) -> Tensor:
    """One entry for each row of this process, from ``shift`` positions further on; ``missing`` where there is none."""
    spread = head.spread
    if spread is None:
        checks.require_rows(name, tensor, head.leading, "input", head.classes)
        return _shifted(tensor, shift, missing)
    spread.require_leading(name, tensor)
    checks.require_rows(name, tensor, spread.leading, "input")
    if shift:  # which looks beyond the rows of this process
        if tensor.requires_grad and lies_over_processes(tensor):
            raise ValueError(f"{name} must not require gradients where rows are shifted and sharded; detach it")
        tensor = _shifted(spread.whole(tensor), shift, missing)
    return spread.rows_of(name, tensor)


def _shifted(tensor: Tensor, shift: int, missing: int) -> Tensor:
    """The entries ``shift`` positions further on along the last dimension, and ``missing`` at the end."""
    if shift == 0:
        return tensor
    if tensor.ndim == 0:
        raise ValueError("shift must be 0 for a single row, which has no next position")
    shift = min(shift, tensor.shape[-1])
    return torch.cat([tensor[..., shift:], torch.full_like(tensor[..., :shift], missing)], -1)


def require_shift(shift: object) -> int:
    """Return the number of positions to look ahead as a Python int >= 0."""
    positions = checks.as_integer(shift)
    if positions is None or positions < 0:
        raise ValueError(f"shift must be an int >= 0, got {shift!r}")
    return positions


def require_no_shift(shift: object) -> None:
    """Only class indices can be looked up further on."""
    if require_shift(shift) != 0:
        raise ValueError(
            f"shift must be 0 unless the target holds class indices, got {shift!r}; "
            "a distribution belongs to its row: slice input and target instead"
        )


# --- distributions ---------------------------------------------------------------------------------------------------


def _against_distribution(
    head: Head,
    target: Target,
    weight: Tensor | None,
    sample_weight: Tensor | None,
    smoothing: float,
    options: dict[str, float | None],
) -> Posed:
    """The cross-entropy of a distribution."""
    sampled = _row_weight(head, sample_weight)
    rows = _rows_of_distributions(head, sampled)
    if isinstance(target, TopK):
        target = _fitting(head, target, sampled)
        if target.merges_tail and weight is not None:
            raise ValueError(
                "weight must be None for a TopK with tail='bucket', whose bucket has no class; "
                "use tail='renormalize' or sample_weight"
            )
        y = _flat(torch.softmax(_outcomes(head, target), -1))
        indices = _flat(target.indices)
        everywhere: float = 0.0
        if target.merges_tail and smoothing:
            each = head.uniform()
            each = y.new_full((head.classes,), 1 / head.classes) if each is None else each
            y = (1 - smoothing) * y + smoothing * _flat(target.uniform_over_outcomes(each))
        elif smoothing:
            y, everywhere = (1 - smoothing) * y, smoothing
        if weight is not None:
            own = weight.to(y.dtype)[indices]
            y = torch.cat([y[:, :-1] * own, y[:, -1:]], -1)
        loss = LossSpec(CrossEntropy(), "sparse", smoothing=everywhere, **options, **head.shard)  # type: ignore[arg-type]
        return Posed(
            head,
            loss,
            *rows,
            target=(y, None, None),
            indices=indices,
            label=_most_probable(target),
            class_weight=head.share_of_smoothing(weight) if everywhere else None,
            merges_tail=target.merges_tail,
        )
    kind, tensors = _dense_target(head, target, sample_weight)
    loss = LossSpec(CrossEntropy(), kind, smoothing=smoothing, **options, **head.shard)  # type: ignore[arg-type]
    share = head.share_of_smoothing(weight) if smoothing else weight
    if share is not None and share is not weight:
        # Masked classes have no share of the smoothing, but their class weight still acts on the target's own mass.
        weight = torch.stack([torch.ones_like(share) if weight is None else weight.to(share.dtype), share])
    return Posed(head, loss, *rows, target=tensors, class_weight=weight)


def divergence_from(
    head: Head,
    target: Tensor | Target,
    *,
    divergence: Divergence,
    sample_weight: Tensor | None,
    temperature: float,
    softcap: float | None,
) -> Posed:
    """The divergence between a distribution and the head's."""
    head.require_plain(target=target, sample_weight=sample_weight)
    return head.agreed(lambda: _divergence_from(head, target, divergence, sample_weight, temperature, softcap))


def _divergence_from(
    head: Head,
    target: Tensor | Target,
    divergence: Divergence,
    sample_weight: Tensor | None,
    temperature: float,
    softcap: float | None,
) -> Posed:
    target = _wrapped(target)
    sampled = _row_weight(head, sample_weight)
    rows = _rows_of_distributions(head, sampled)

    def loss(kind: str) -> LossSpec:
        return LossSpec(divergence, kind, temperature, softcap, **head.shard)  # type: ignore[arg-type]

    if isinstance(target, TopK):
        target = _fitting(head, target, sampled)
        require_finite_against(divergence, target, temperature)
        logits = _outcomes(head, target)
        logits = logits if temperature == 1 else logits / temperature
        return Posed(
            head,
            loss("sparse"),
            *rows,
            target=(_flat(logits), None, None),
            indices=_flat(target.indices),
            label=_most_probable(target),
            merges_tail=target.merges_tail,
        )
    kind, tensors = _dense_target(head, target, sample_weight)
    return Posed(head, loss(kind), *rows, target=tensors)


def _wrapped(target: Tensor | Target) -> Target:
    """Refuse a plain tensor as one side of a divergence: it could hold probabilities or logits."""
    if isinstance(target, Target):
        return target
    if isinstance(target, Tensor) and target.is_floating_point():
        raise TypeError(
            f"target must be wrapped, got a plain {target.dtype} tensor, which could hold probabilities or logits; "
            "pass softcurve.Probabilities(target) or softcurve.Logits(target)"
        )
    as_target(target)
    raise TypeError(
        f"target must be a distribution, got class indices ({getattr(target, 'dtype', None)}); "
        "for those use softcurve.linear_cross_entropy, which is D(target‖model) there"
    )


def _rows_of_distributions(head: Head, sampled: Tensor | None) -> tuple[Tensor, Tensor | None, Tensor, bool]:
    """The rows' weights, what a mean sums up to divide by, which rows count, and whether there is a sample weight."""
    everywhere = torch.ones(len(head.input), dtype=torch.bool, device=head.input.device)
    if sampled is None:
        return everywhere.to(head.dtype), None, everywhere, False
    sampled = sampled.reshape(-1)
    return sampled, sampled, everywhere, True


def _dense_target(
    head: Head, target: Target, sample_weight: Tensor | None
) -> tuple[str, tuple[Tensor | None, Tensor | None, Tensor | None]]:
    """The kind of a target that speaks of every class, and its tensors."""
    spread, leading = head.spread, head.all_leading
    if isinstance(target, LinearTeacher):
        count = target.linear_weight.shape[0]
        if count != head.classes or target.input.shape[:-1] != leading:
            remedy = ""
            if count != head.classes:
                larger = "the teacher's linear_weight" if count > head.classes else "linear_weight"
                least = min(count, head.classes)
                remedy = f"; if one vocabulary is padded, cut {larger} and its bias to weight[:{least}], bias[:{least}]"
            raise ValueError(
                f"target (LinearTeacher) must have the {head.classes} classes of linear_weight and the rows "
                f"{tuple(leading)} of input, got {count} classes and rows {tuple(target.input.shape[:-1])}{remedy}"
            )
        if not any(map(lies_over_processes, (target.input, sample_weight))):
            checked = target.checked(sample_weight, count)
            assert isinstance(checked, LinearTeacher)
            target = checked
        e, weight, bias = target.input, target.linear_weight, target.linear_bias
        if spread is not None:
            e, weight = spread.features(e), spread.classes_of(weight)
            bias = None if bias is None else spread.classes_of(bias)
        return "teacher", (_flat(e), weight, bias)
    kind = "logits" if isinstance(target, Logits) else "probabilities"
    assert isinstance(target, Probabilities | Logits)
    shape = (*leading, head.classes)
    if tuple(target.values.shape) != shape:
        raise ValueError(
            f"target ({kind}) must have the shape {shape} of the logits, got {checks.describe(target.values)}"
            + checks.shape_remedy(shape, target.values.shape, "linear_weight[:{classes}] (and the bias)")
        )
    values = target.values
    if not any(map(lies_over_processes, (values, sample_weight))):
        # A malformed row of weight 0 needs no clearing: the passes leave it out, or write a residual of 0.
        target.require_values(head.classes, None if sample_weight is None else sample_weight != 0)
    if spread is not None:
        values = spread.distributions("target", values)
    return kind, (_flat(values), None, None)


def _fitting(head: Head, target: TopK, sampled: Tensor | None) -> TopK:
    """A list for each row of this process, its values checked."""
    if head.spread is not None:
        of_rows = head.spread.rows_of
        target = TopK(of_rows("target", target.indices), of_rows("target", target.log_probs), target.tail)
    target.require_fit((*head.leading, head.classes))
    checked = target.checked(sampled, head.classes)
    assert isinstance(checked, TopK)
    return checked


def _outcomes(head: Head, target: TopK) -> Tensor:
    """The log-probabilities of a list over the listed classes and all others, ``(..., k + 1)``."""
    uniform = head.uniform() if target.merges_tail else None
    if uniform is None:
        return target.outcome_log_probs(head.classes, head.dtype)
    rest_is_masked = target.uniform_over_outcomes(uniform)[..., -1:] == 0
    return target.outcome_log_probs(head.classes, head.dtype, rest_is_masked)


def _most_probable(target: TopK) -> Tensor:
    """The class that heads a list."""
    return target.indices.gather(-1, target.log_probs.argmax(-1, keepdim=True)).squeeze(-1)


def _flat(tensor: Tensor) -> Tensor:
    return tensor.reshape(math.prod(tensor.shape[:-1]), tensor.shape[-1])  # of no classes -1 could be any number
