"""A public call on features and a head, made into the passes' own terms, and their outcome into what the call returns.

Rows are flattened; weights of rows and classes, the reduction and the base become one weight a row; each kind of target
becomes the tensors that a :class:`~softcurve.head.problem.HeadLoss` of that kind names.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from softcurve import checks
from softcurve.divergences import Divergence
from softcurve.functional import require_finite_against, weighted
from softcurve.head.autograd import head_outcome
from softcurve.head.problem import HeadLoss, HeadTensors
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
    """A head and its rows, which are flattened."""

    input: Tensor  # (n, d)
    weight: Tensor
    bias: Tensor | None
    leading: torch.Size
    dtype: torch.dtype  # of the result

    @staticmethod
    def of(input: Tensor, weight: Tensor, bias: Tensor | None) -> Head:
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
        leading, device = input.shape[:-1], input.device.type
        dtype = torch.promote_types(input.dtype, weight.dtype)
        if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
            lower = torch.get_autocast_dtype(device)
            input, weight = _lowered(input, lower), _lowered(weight, lower)
            bias = None if bias is None else _lowered(bias, lower)
            dtype = torch.promote_types(dtype, torch.float32)
        return Head(input.reshape(-1, input.shape[-1]), weight, bias, leading, dtype)

    @property
    def classes(self) -> int:
        """``C``."""
        return len(self.weight)


def _lowered(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.to(dtype)


@dataclass(frozen=True)
class Posed:
    """A head, and what is to be done with its rows."""

    head: Head
    reducer: Reduction
    memory_budget: int | None
    return_stats: bool

    def __post_init__(self) -> None:
        budget = self.memory_budget
        if budget is not None and (isinstance(budget, bool) or not isinstance(budget, int) or budget < 1):
            raise ValueError(f"memory_budget must be a positive int of bytes, or None, got {budget!r}")

    @property
    def wide(self) -> torch.dtype:
        """Of the losses before the last rounding."""
        return torch.promote_types(self.head.dtype, torch.float32)

    def sample_weight(self, sample_weight: Tensor | None) -> Tensor | None:
        """``(n,)``, in the dtype of the losses."""
        if sample_weight is None:
            return None
        checks.require_rows("sample_weight", sample_weight, self.head.leading, "input")
        checks.require_numbers("sample_weight", sample_weight)
        return sample_weight.reshape(-1).to(self.wide)

    def solve(
        self,
        loss: HeadLoss,
        weight: Tensor,
        mass: Tensor | float,
        counted: Tensor,
        weighs: bool,
        *,
        target: tuple[Tensor | None, Tensor | None, Tensor | None] = (None, None, None),
        indices: Tensor | None = None,
        label: Tensor | None = None,
        class_weight: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, LossStats]:
        """Rows of the given ``weight`` reduced; ``mass`` is what a mean divides by. ``counted`` rows can be correct.

        ``weighs`` says whether a sample weight is in the rows' weights. ``label`` is the target's class, ``(n,)``,
        where the pass does not see the whole target.
        """
        head, per_row = self.head, self.reducer.kind == "none"
        wide = weight.dtype
        if per_row:
            row_weight = counted.to(wide)
            if not weight.requires_grad:
                row_weight = torch.where(weight == 0, 0.0, row_weight)
        else:
            mass = 1.0 if self.reducer.kind == "sum" else mass
            divisor = mass.to(wide) if isinstance(mass, Tensor) else weight.new_full((), mass)
            row_weight = weight / (torch.where(divisor == 0, 1.0, divisor) * self.reducer.nats)
        tensors = HeadTensors(head.input, head.weight, head.bias, *target, indices, row_weight, class_weight)
        outcome = head_outcome(
            loss, tensors, self.memory_budget, per_row=per_row, weighs=weighs, stats=self.return_stats
        )
        if per_row:
            result = weighted(weight, outcome.rows).reshape(head.leading)
            result = result if self.reducer.nats == 1 else result / self.reducer.nats
        else:
            # A mean of nothing is NaN and has gradient 0, as in torch.
            result = outcome.total + torch.where(divisor == 0, math.nan, 0.0).to(wide)
        result = result.to(head.dtype)
        if not self.return_stats:
            return result
        lse, entropy, predicted, found = (
            column.detach().reshape(head.leading) for column in vars(outcome.statistics).values()
        )
        label = found if label is None else label.reshape(head.leading)
        correct = (predicted == label) & counted.reshape(head.leading)
        return result, LossStats(lse, entropy / self.reducer.nats, predicted, correct)


# --- class indices ---------------------------------------------------------------------------------------------------


def against_indices(
    posed: Posed,
    target: Tensor,
    ignore_index: int,
    weight: Tensor | None,
    sample_weight: Tensor | None,
    smoothing: float,
    shift: int,
    options: dict[str, float | None],
) -> Tensor | tuple[Tensor, LossStats]:
    """The cross-entropy of class indices."""
    head = posed.head
    if isinstance(ignore_index, bool) or not isinstance(ignore_index, int):
        raise TypeError(f"ignore_index must be an int or None, got {type(ignore_index).__name__}")
    checks.require_rows("target", target, head.leading, "input")
    checks.require_class_indices("target", target, head.classes, ignore_index)
    present = torch.ones_like(target, dtype=torch.bool)
    require_shift(shift)
    if shift != 0:
        target, present = _shifted(target, shift, ignore_index)
    target = target.reshape(-1)
    kept = target != ignore_index
    classes = torch.where(kept, target, 0)
    sampled = posed.sample_weight(sample_weight)
    counted = kept.to(posed.wide) if sampled is None else torch.where(kept, sampled, 0.0)
    own = None if weight is None else weight.to(posed.wide)[classes]
    mass = counted if own is None else counted * own
    coarse = None
    if smoothing or (options["z_loss"] and own is not None):
        # Over the class and the rest: the mass on the class. Smoothing over all classes is the head's own matter.
        mine = (1 - smoothing) * (torch.ones_like(counted) if own is None else own)
        coarse = torch.stack([mine, torch.zeros_like(mine)], -1)
        row_weight = counted
    else:
        row_weight, weight = mass, None
    divisor = mass.sum()
    if posed.reducer.kind == "batchmean":
        divisor = present.sum().to(posed.wide)
    loss = HeadLoss("cross_entropy", "list", smoothing=smoothing, **options)  # type: ignore[arg-type]
    return posed.solve(
        loss,
        row_weight,
        divisor,
        kept,
        sampled is not None,
        target=(coarse, None, None),
        indices=classes.unsqueeze(-1),
        label=classes,
        class_weight=weight,
    )


def _shifted(target: Tensor, shift: int, ignore_index: int) -> tuple[Tensor, Tensor]:
    """The targets ``shift`` positions further on, nothing at the end; and where there is one."""
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


def against_distribution(
    posed: Posed,
    target: Tensor | Target,
    weight: Tensor | None,
    sample_weight: Tensor | None,
    smoothing: float,
    options: dict[str, float | None],
) -> Tensor | tuple[Tensor, LossStats]:
    """The cross-entropy of a distribution."""
    head = posed.head
    rows = _rows_of_distributions(posed, sample_weight)
    if isinstance(target, TopK):
        target.require_fit((*head.leading, head.classes))
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
        loss = HeadLoss("cross_entropy", "list", smoothing=everywhere, **options)  # type: ignore[arg-type]
        return posed.solve(
            loss, *rows, target=(y, None, None), indices=indices, label=_most_probable(target), class_weight=weight
        )
    kind, tensors = _dense_target(posed, target)
    loss = HeadLoss("cross_entropy", kind, smoothing=smoothing, **options)  # type: ignore[arg-type]
    return posed.solve(loss, *rows, target=tensors, class_weight=weight)


def divergence_from(
    posed: Posed,
    family: str,
    beta: float,
    divergence: Divergence,
    target: Tensor | Target,
    sample_weight: Tensor | None,
    temperature: float,
    softcap: float | None,
) -> Tensor | tuple[Tensor, LossStats]:
    """The divergence between a distribution and the head's."""
    LogitMap(temperature, softcap)
    head = posed.head
    target = as_target(target)
    if isinstance(target, Tensor):
        raise TypeError(
            f"target must be a distribution, got class indices ({target.dtype}); "
            "for those use softcurve.linear_cross_entropy, which is D(target‖model) there"
        )
    rows = _rows_of_distributions(posed, sample_weight)

    def loss(kind: str) -> HeadLoss:
        return HeadLoss(family, kind, beta, temperature, softcap)

    if isinstance(target, TopK):
        target.require_fit((*head.leading, head.classes))
        require_finite_against(divergence, target, temperature)
        logits = target.coarse_log_probs(head.classes)
        logits = logits if temperature == 1 else logits / temperature
        coarse = (_flat(logits), None, None)
        label = _most_probable(target)
        return posed.solve(loss("list"), *rows, target=coarse, indices=_flat(target.indices), label=label)
    kind, tensors = _dense_target(posed, target)
    return posed.solve(loss(kind), *rows, target=tensors)


def _rows_of_distributions(posed: Posed, sample_weight: Tensor | None) -> tuple[Tensor, Tensor | float, Tensor, bool]:
    """The rows' weights, what a mean divides by, which rows count, and whether there is a sample weight."""
    count = len(posed.head.input)
    everywhere = torch.ones(count, dtype=torch.bool, device=posed.head.input.device)
    sampled = posed.sample_weight(sample_weight)
    if sampled is None:
        return everywhere.to(posed.wide), float(count), everywhere, False
    return sampled, float(count) if posed.reducer.kind == "batchmean" else sampled.sum(), everywhere, True


def _dense_target(
    posed: Posed, target: Tensor | Target
) -> tuple[str, tuple[Tensor | None, Tensor | None, Tensor | None]]:
    """The kind of a target that speaks of every class, and its tensors."""
    head = posed.head
    if isinstance(target, LinearTeacher):
        if target.linear_weight.shape[0] != head.classes or target.input.shape[:-1] != head.leading:
            raise ValueError(
                f"target (LinearTeacher) must have the {head.classes} classes of linear_weight and the rows "
                f"{tuple(head.leading)} of input, got {target.linear_weight.shape[0]} classes and rows "
                f"{tuple(target.input.shape[:-1])}"
            )
        return "teacher", (_flat(target.input), target.linear_weight, target.linear_bias)
    kind = "logits" if isinstance(target, Logits) else "probabilities"
    if isinstance(target, Probabilities | Logits):
        target = target.values
    assert isinstance(target, Tensor)
    if tuple(target.shape) != (*head.leading, head.classes):
        raise ValueError(
            f"target ({kind}) must have the shape {(*head.leading, head.classes)} of the logits, "
            f"got {checks.describe(target)}"
        )
    return kind, (_flat(target), None, None)


def _most_probable(target: TopK) -> Tensor:
    """The class that heads a list."""
    return target.indices.gather(-1, target.log_probs.argmax(-1, keepdim=True)).squeeze(-1)


def _flat(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1, tensor.shape[-1])
