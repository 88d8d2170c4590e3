"""Flatten a public call on features and a head into the tensors that a pass needs, and shape its result.

The arguments are localised first (:mod:`softcurve.head.sharded`), so that everything after it works on the rows and
classes of this process. The weights of rows and classes, the reduction and the base become one weight a row; each kind
of target becomes the tensors that a :class:`~softcurve.losses.spec.LossSpec` of its form names.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from softcurve import checks
from softcurve.array_types import Bool, Float, Int
from softcurve.head.autograd import head_outcome
from softcurve.head.sharded import PlainHead, head_layout
from softcurve.head.tensors import HeadTensors
from softcurve.losses import targets
from softcurve.losses.labels import Labels, cross_entropy_target
from softcurve.losses.reduction import Reduction, weighted
from softcurve.losses.spec import LossSpec, TargetForm
from softcurve.losses.targets import LinearTeacher, Logits, Probabilities, Target
from softcurve.losses.topk import TopK
from softcurve.records import short_repr
from softcurve.typing import Integer

MOST_LISTED = 1024  # classes of a list


class LossStats(NamedTuple):
    """Statistics of the softmax of each row, without gradients: shape ``(...)`` as the rows of ``input``."""

    lse: Float[Tensor, "*rows"]  # log Σ e^z of what the softmax sees, in nats
    entropy: Float[Tensor, "*rows"]  # in units of ``base``
    predicted: Int[Tensor, "*rows"]  # the most probable class
    correct: Bool[Tensor, "*rows"]  # whether it is the target's (most probable) class; False in an ignored row

    def __repr__(self) -> str:
        return short_repr(self, self._asdict())


@dataclass(frozen=True)
class LocalHead:
    """The part of a head and of its rows that this process holds; rows are flattened."""

    layout: PlainHead
    input: Tensor  # (n, d)
    weight: Tensor  # (C_local, d)
    bias: Tensor | None  # (C_local,)
    leading: torch.Size  # of the rows before they were flattened
    dtype: torch.dtype  # of the losses: float32 or wider
    full_bias: Tensor | None  # (C,), without gradient; None unless masked classes matter to the target
    class_weight: Tensor | None  # (C,)

    def uniform(self) -> Tensor | None:
        """Return the uniform distribution over the unmasked classes, ``(C,)``; ``None`` if none is masked."""
        if self.full_bias is None:
            return None
        uniform = targets.uniform_over_unmasked(self.full_bias.to(self.dtype))
        return uniform if uniform.ndim else None

    def share_of_smoothing(self) -> Tensor | None:
        """Return each class's factor in the ``ε / C`` of label smoothing, ``(C,)``: its weight, or 0 if masked."""
        uniform = self.uniform()
        if uniform is None:
            return self.class_weight
        share = uniform * self.layout.classes
        return share if self.class_weight is None else share * self.class_weight.to(share.dtype)


@dataclass(frozen=True)
class HeadProblem:
    """The losses of a head's rows, described for a pass, before they are reduced."""

    head: LocalHead
    loss: LossSpec
    tensors: HeadTensors
    mean_weight: Tensor | None  # (n,), whose sum is the divisor of a mean; None: one each
    counted: Tensor  # (n,): which rows are not ignored
    has_sample_weight: bool
    label: Tensor | None = None  # the target's class, (n,), where the pass does not see the whole target
    merges_tail: bool = False  # whether the outcomes are a list and one bucket

    def divisor(self, reducer: Reduction) -> Tensor:
        """Return what the sum over the rows of all processes is divided by, ``()``."""
        layout, weight = self.head.layout, self.tensors.row_weight
        if reducer.kind != "mean":
            return reducer.divisor(layout.leading, weight, None)
        return layout.summed(reducer.divisor(self.head.leading, weight, self.mean_weight), divides_rows=True)

    def _pass_weight(self, reducer: Reduction, divisor: Tensor) -> Tensor:
        """Return the weight of each row in the pass; losses per row are weighted after it."""
        weight = self.tensors.row_weight
        if reducer.kind == "none":
            counted = self.counted.to(weight.dtype)
            return counted if weight.requires_grad else torch.where(weight == 0, 0.0, counted)
        # As in torch, a mean over no rows is NaN and has gradient 0.
        safe = torch.where(divisor == 0, 1.0, divisor)
        return torch.where(divisor == 0, 0.0, weight / (safe * reducer.nats))

    def computed(
        self, reducer: Reduction, divisor: Tensor, memory_budget: Integer | None, return_stats: bool
    ) -> Tensor | tuple[Tensor, LossStats]:
        """Compute what the public call returns, the loss and its statistics, in one pass over the tiles."""
        head, layout, per_row = self.head, self.head.layout, reducer.kind == "none"
        tensors, weight = self.tensors._replace(row_weight=self._pass_weight(reducer, divisor)), self.tensors.row_weight
        total, rows, statistics = head_outcome(
            self.loss, tensors, require_budget(memory_budget), per_row=per_row, weighs=self.has_sample_weight,
            stats=return_stats,
        )  # fmt: skip
        layout.agreed(lambda: self._explain_nan(rows))
        if per_row:
            result = weighted(weight, rows).reshape(head.leading)
            result = result if reducer.nats == 1 else result / reducer.nats
        else:
            result = layout.summed(total) + torch.where(divisor == 0, math.nan, 0.0).to(weight.dtype)
        result = layout.restored(result.to(head.dtype), per_row=per_row)
        if not return_stats:
            return result
        lse, entropy, predicted, label = statistics
        correct = (predicted == (label if self.label is None else self.label)) & self.counted
        columns = (lse, entropy / reducer.nats, predicted, correct)
        return result, LossStats(
            *(layout.restored(column.detach().reshape(head.leading), per_row=True) for column in columns)
        )

    def _explain_nan(self, rows: Tensor) -> None:
        t = self.tensors
        if checks.values_visible(t.row_weight):
            of_head = {"input": t.input, "linear_weight": t.weight, "linear_bias": t.bias}
            of_target = [part for part in (t.target, t.target_weight, t.target_bias) if part is not None]
            checks.explain_nan(rows, t.row_weight, of_head, of_target)


# --- from a public call to a problem ---------------------------------------------------------------------------------


def head_problem(
    loss: LossSpec, input: Tensor, linear_weight: Tensor, target: Tensor | Target, *,
    linear_bias: Tensor | None = None, weight: Tensor | None = None, sample_weight: Tensor | None = None,
    ignore_index: Integer | None = None, shift: int = 0,
) -> HeadProblem:  # fmt: skip
    """Return the problem of a public call, on the rows and classes of this process.

    Raises what the public call raises, in all processes if in one.
    """
    checks.require_head(input, linear_weight, linear_bias)
    layout = head_layout(
        input, linear_weight, target, linear_bias=linear_bias, weight=weight, sample_weight=sample_weight
    )

    def make() -> HeadProblem:
        class_weight = None if weight is None else layout.full("weight", weight)
        if loss.is_cross_entropy:
            known, ignored = cross_entropy_target(target, ignore_index, class_weight, layout.classes)
        else:
            known, ignored = _require_distribution(target), 0
        head = _local_head(layout, loss, input, linear_weight, linear_bias, known, class_weight)
        row_weight = None
        if sample_weight is not None:
            row_weight = _local_row_values(layout, "sample_weight", sample_weight, shift, 0).to(head.dtype)
            checks.require_numbers("sample_weight", row_weight)
        if isinstance(known, Tensor):
            labels = _local_row_values(layout, "target", known, shift, ignored)
            return _label_problem(head, loss, labels, row_weight, ignored)
        require_no_shift(shift)
        layout.require_leading("target", known.leading, f"rows {tuple(known.leading)}")
        known.require_fit((*layout.leading, layout.classes), "linear_weight[:{classes}] (and the bias)")
        if not isinstance(known, TopK):  # whose own rows are checked where they are made local
            # A malformed row of weight 0 needs no clearing: the passes leave it out, or write a residual of 0.
            known.require_values(layout.classes, None if sample_weight is None else sample_weight != 0)
        return _distribution_problem(head, loss, known, row_weight)

    return layout.agreed(make)


def _require_distribution(target: Tensor | Target) -> Target:
    """Reject a plain tensor as the target of a divergence: it could hold probabilities or logits."""
    if isinstance(target, Target):
        return target
    if isinstance(target, Tensor) and target.is_floating_point():
        raise TypeError(
            f"target must be wrapped, got a plain {target.dtype} tensor, which could hold probabilities or logits; "
            "pass softcurve.Probabilities(target) or softcurve.Logits(target)"
        )
    targets.as_target(target)
    raise TypeError(
        f"target must be a distribution, got class indices ({target.dtype}); "
        "for those use softcurve.linear_cross_entropy, which is D(target‖model) there"
    )


def require_shift(shift: object) -> int:
    """Return the number of positions to look ahead as a Python int >= 0."""
    positions = checks.as_integer(shift)
    if positions is None or positions < 0:
        raise ValueError(f"shift must be an int >= 0, got {shift!r}")
    return positions


def require_no_shift(shift: object) -> None:
    """Require a shift of 0: only class indices can be shifted."""
    if require_shift(shift):
        raise ValueError(
            f"shift must be 0 unless the target holds class indices, got {shift!r}; "
            "a distribution belongs to its row: slice input and target instead"
        )


def require_budget(budget: object) -> int | None:
    """Return a number of bytes as a Python int, or ``None``."""
    count = None if budget is None else checks.as_integer(budget)
    if budget is not None and (count is None or count < 1):
        raise ValueError(f"memory_budget must be a positive int of bytes, or None, got {budget!r}")
    return count


def head_top_classes(
    loss: LossSpec, input: Tensor, linear_weight: Tensor, linear_bias: Tensor | None, k: object,
    memory_budget: Integer | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Return the ``k`` most probable classes of each row of a public call and their log-probabilities, detached."""
    checks.require_head(input, linear_weight, linear_bias)
    layout = head_layout(input, linear_weight, None, linear_bias=linear_bias)
    count, most = checks.as_integer(k), min(layout.classes, MOST_LISTED)
    if count is None or not 1 <= count <= most:
        raise ValueError(
            f"k must be an int from 1 to {most}, the smaller of the {layout.classes} classes and {MOST_LISTED}, "
            f"got {k!r}"
        )

    def make() -> tuple[Tensor, Tensor]:
        head = _local_head(layout, loss, input.detach(), linear_weight.detach(), linear_bias, None, None)
        bias = None if head.bias is None else head.bias.detach()
        ones = head.input.new_ones(len(head.input), dtype=head.dtype)
        tensors = HeadTensors(head.input, head.weight, bias, *(None,) * 6, row_weight=ones, class_weight=None)
        spec = dataclasses.replace(loss, target="sparse", **layout.shard)
        indices, log_probs = torch.ops.softcurve.head_top_classes(
            *tensors, spec.encode(), count, require_budget(memory_budget)
        )
        checks.explain_nan(
            log_probs[:, 0], None, {"input": head.input, "linear_weight": head.weight, "linear_bias": bias}
        )
        shape = (*head.leading, count)
        return indices.reshape(shape), log_probs.to(head.dtype).reshape(shape)

    indices, log_probs = layout.agreed(make)
    return layout.restored(indices, per_row=True), layout.restored(log_probs, per_row=True)


# --- local tensors ---------------------------------------------------------------------------------------------------


def _local_head(
    layout: PlainHead, loss: LossSpec, input: Tensor, weight: Tensor, bias: Tensor | None,
    target: Tensor | Target | None, class_weight: Tensor | None,
) -> LocalHead:  # fmt: skip
    """Localise and flatten features, weight and bias, in the dtype of autocast if that is on, as torch's ``linear``."""
    full_bias = None
    if bias is not None and (loss.smoothing or (isinstance(target, Target) and target.merges_tail)):
        full_bias = layout.full("linear_bias", bias.detach())
    input, weight = layout.local_rows(input), layout.local_classes(weight)
    bias = None if bias is None else layout.local_classes(bias)
    dtype = checks.wide_dtype(input.dtype, weight.dtype, *([target.dtype] if isinstance(target, Target) else []))
    device = input.device.type
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        lower = torch.get_autocast_dtype(device)
        input, weight = (t if t.dtype == torch.float64 else t.to(lower) for t in (input, weight))
        bias = bias if bias is None or bias.dtype == torch.float64 else bias.to(lower)
    return LocalHead(layout, _flat(input), weight, bias, input.shape[:-1], dtype, full_bias, class_weight)


def _local_row_values(layout: PlainHead, name: str, tensor: Tensor, shift: int, missing: int) -> Tensor:
    """Return one entry for each row of this process, ``(n,)``: that of ``shift`` positions ahead, or ``missing``."""
    checks.require_tensor(name, tensor)
    layout.require_leading(name, tensor.shape, checks.describe(tensor))
    checks.require_rows(name, tensor, layout.leading, "input", layout.classes)
    if shift:  # The entries ahead may be on another process.
        if tensor.ndim == 0:
            raise ValueError("shift must be 0 for a single row, which has no next position")
        tensor, shift = layout.full(name, tensor), min(shift, tensor.shape[-1])
        tensor = torch.cat([tensor[..., shift:], torch.full_like(tensor[..., :shift], missing)], -1)
    return layout.local_rows(tensor).reshape(-1)


def _flat(tensor: Tensor) -> Tensor:
    return tensor.reshape(math.prod(tensor.shape[:-1]), tensor.shape[-1])  # of no classes -1 could be any number


# --- the two kinds of problem ----------------------------------------------------------------------------------------


def _label_problem(
    head: LocalHead, loss: LossSpec, target: Tensor, sample_weight: Tensor | None, ignore_index: int
) -> HeadProblem:
    """Return the cross-entropy of class indices ``(n,)``."""
    wide = None if head.class_weight is None else head.class_weight.to(head.dtype)
    labels = Labels.of(target, sample_weight, wide, head.layout.classes, ignore_index, head.dtype)
    masses = None
    if loss.smoothing or (loss.z_loss and wide is not None):
        # The masses on the class and on all others. The pass itself spreads the smoothing over all classes.
        mass = torch.ones_like(labels.weight) if labels.class_weight is None else labels.class_weight
        masses = torch.stack([(1 - loss.smoothing) * mass, torch.zeros_like(mass)], -1)
    tensors = HeadTensors(
        head.input, head.weight, head.bias, masses, *(None,) * 4, indices=labels.classes.unsqueeze(-1),
        row_weight=labels.mean_weight if masses is None else labels.weight,
        class_weight=head.share_of_smoothing() if loss.smoothing else None,
    )  # fmt: skip
    return HeadProblem(
        head, dataclasses.replace(loss, target="sparse", **head.layout.shard), tensors, labels.mean_weight,
        labels.counted, sample_weight is not None, label=labels.classes,
    )  # fmt: skip


def _distribution_problem(head: LocalHead, loss: LossSpec, target: Target, sample_weight: Tensor | None) -> HeadProblem:
    """Return the loss of a distribution whose rows, classes and values are checked, but which is not localised."""
    layout, class_weight, label = head.layout, head.class_weight, None
    everywhere = torch.ones(len(head.input), dtype=torch.bool, device=head.input.device)
    row_weight = everywhere.to(head.dtype) if sample_weight is None else sample_weight
    tensors = HeadTensors(head.input, head.weight, head.bias, *(None,) * 6, row_weight, class_weight)
    form: TargetForm
    if isinstance(target, TopK):
        local = TopK(_flat(layout.local_rows(target.indices)), _flat(layout.local_rows(target.log_probs)), target.tail)
        local = local.checked(sample_weight, layout.classes)
        masses, loss = _list_outcomes(head, loss, local)
        form, label, class_weight = "sparse", local.most_probable, head.share_of_smoothing() if loss.smoothing else None
        tensors = tensors._replace(target=masses, indices=local.listed_classes())
    else:
        if isinstance(target, LinearTeacher):
            e, w, b = _flat(layout.local_rows(target.input)), target.linear_weight, target.linear_bias
            e = LinearTeacher(e, w, b).checked(sample_weight, layout.classes).input
            form, w, b = "teacher", layout.local_classes(w), None if b is None else layout.local_classes(b)
            tensors = tensors._replace(target=e, target_weight=w, target_bias=b)
        else:
            form = "probabilities" if isinstance(target, Probabilities) else "logits"
            values = target.values if isinstance(target, Probabilities | Logits) else target.logits(head.dtype)
            tensors = tensors._replace(target=_flat(layout.local_distributions(values)))
        share = head.share_of_smoothing() if loss.smoothing else class_weight
        if share is not None and share is not class_weight:
            # Masked classes have no share of the smoothing, but their class weight acts on the target's own mass.
            in_target = torch.ones_like(share) if class_weight is None else class_weight.to(share.dtype)
            class_weight = torch.stack([in_target, share])
    return HeadProblem(
        head, dataclasses.replace(loss, target=form, **layout.shard), tensors._replace(class_weight=class_weight),
        sample_weight, everywhere, sample_weight is not None, label, target.merges_tail,
    )  # fmt: skip


def _list_outcomes(head: LocalHead, loss: LossSpec, target: TopK) -> tuple[Tensor, LossSpec]:
    """Return a list over the listed classes and all others, ``(n, k + 1)``, and the loss without its smoothing.

    For a cross-entropy the outcomes are smoothed and weighted probabilities, for other divergences logits. Only a list
    of one bucket takes up the smoothing; otherwise the pass spreads it over all classes.
    """
    classes, temperature = head.layout.classes, 1.0 if loss.is_cross_entropy else loss.temperature
    uniform = head.uniform() if target.merges_tail else None
    sizes = target.outcome_sizes(classes, None if uniform is None else uniform > 0)
    log_probs = target.outcome_log_probs(classes, head.dtype, sizes[..., -1:], temperature)
    if not loss.is_cross_entropy:
        target.require_comparable(loss.divergence)
        return log_probs, loss
    y, smoothing = torch.softmax(log_probs, -1), loss.smoothing
    if smoothing:
        y = (1 - smoothing) * y
    if smoothing and target.merges_tail:
        y = y + smoothing * sizes.to(y.dtype) / sizes.sum(-1, keepdim=True)
        loss = dataclasses.replace(loss, smoothing=0.0)
    if head.class_weight is not None:
        y = torch.cat([y[:, :-1] * head.class_weight.to(y.dtype)[target.listed_classes().clamp(min=0)], y[:, -1:]], -1)
    return y, loss
