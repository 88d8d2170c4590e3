"""Flatten a public call on features and a head into the tensors that a pass needs, and shape its result.

The arguments are localised first (:mod:`softcurve.head.sharded`), so that everything after it works on the rows and
classes of this process. The weights of rows and classes, the reduction and the base become one weight a row; each kind
of target becomes the tensors that a :class:`~softcurve.losses.spec.LossSpec` of its form names.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from softcurve import checks
from softcurve.head.autograd import head_outcome, head_statistics
from softcurve.head.local import (
    LocalHead,
    flat,
    local_exclusions,
    local_head,
    local_row_values,
    local_weight,
    low_rank_of,
    widened,
)
from softcurve.head.row_statistics import HeadStatistics, LossStats
from softcurve.head.sharded import PlainHead, head_layout
from softcurve.head.tensors import HeadTensors
from softcurve.losses import targets
from softcurve.losses.class_map import GroupedTarget
from softcurve.losses.divergences import CrossEntropy
from softcurve.losses.labels import Labels, cross_entropy_target, resolve_ignore_index
from softcurve.losses.low_rank import LowRankWeight, lowered_by_autocast, matrix_of
from softcurve.losses.reduction import Reduction, weighted
from softcurve.losses.spec import LossSpec, TargetForm
from softcurve.losses.targets import Logits, Probabilities, Target
from softcurve.losses.teacher import LinearTeacher
from softcurve.losses.topk import TopK
from softcurve.typing import Integer


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
    has_labels: bool = False  # whether ``label`` is the target itself, rather than the most probable class of it
    label_weight: Tensor | None = None  # (n,): that of each row times its class weight, of labels beside a divergence

    def divisor(self, reducer: Reduction) -> Tensor:
        """Return what the sum over the rows of all processes is divided by, ``()``."""
        layout, weight = self.head.layout, self.tensors.row_weight
        if reducer.kind != "mean":
            return reducer.divisor(layout.leading, weight, None)
        return layout.summed(reducer.divisor(self.head.leading, weight, self.mean_weight), divides_rows=True)

    def with_mean_of_labels(self, divisor: Tensor) -> tuple[HeadProblem, Tensor]:
        """Divide the labels' term by the weights of their classes instead of the divisor of the mean; return both.

        The divisor becomes 0 where these weights are all 0. Raises ``ValueError`` if the quotient, in which the pass
        does not differentiate, would have a derivative.
        """
        assert self.label_weight is not None
        of_labels = self.head.layout.summed(self.label_weight.sum())
        factor = torch.where(of_labels == 0, 0.0, divisor / torch.where(of_labels == 0, 1.0, of_labels))
        if _moves(factor):
            raise ValueError(
                "sample_weight must not require gradients beside weight and reduction='mean', which divides the terms "
                "by different sums; detach it, or use reduction='sum'"
            )
        problem = dataclasses.replace(self, tensors=self.tensors._replace(label_factor=factor))
        return problem, torch.where(of_labels == 0, 0.0, divisor)

    def without_moving_labels(self) -> HeadProblem | None:
        """Return the problem without the term of the labels if derivatives are wanted in them, which a pass lacks."""
        values, beside = self.tensors.label_values, self.loss.beside
        if values is None or beside is None or not beside.labels or not _moves(values):
            return None
        loss = dataclasses.replace(self.loss, beside=beside._replace(labels=0.0))
        return dataclasses.replace(self, loss=loss, tensors=self.tensors._replace(label_values=values.detach()))

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
        layout.agreed(lambda: explain_head_nan(self.tensors, rows, beside=self.loss.beside is not None))
        if per_row:
            result = weighted(weight, rows).reshape(head.leading)
            result = result if reducer.nats == 1 else result / reducer.nats
        else:
            result = layout.summed(total) + torch.where(divisor == 0, math.nan, 0.0).to(weight.dtype)
        result = layout.restored(result.to(head.dtype), per_row=per_row)
        if not return_stats:
            return result
        return result, self._stats(statistics, tensors, require_budget(memory_budget))

    def _stats(self, found: list[Tensor], tensors: HeadTensors, memory_budget: int | None) -> LossStats:
        """Return the statistics that the pass has found, differentiable, as the public call returns them."""
        lse, entropy, collision, log_prob, predicted, best = found
        head, layout, label = self.head, self.head.layout, best if self.label is None else self.label
        columns = [*[log_prob] * self.has_labels, entropy, lse, lse - entropy, collision]
        listed = label.unsqueeze(-1)[:, : int(self.has_labels)]
        whole = head_statistics(self.loss, tensors, listed, memory_budget, torch.stack(columns, -1))
        if self.has_labels:
            log_probs = torch.where(self.counted, whole[:, 0], 0.0)
            whole = torch.cat([log_probs.unsqueeze(-1), whole[:, 1:]], -1)
        correct = (predicted == label) & self.counted
        restored = [
            layout.restored(part.reshape((*head.leading, *part.shape[1:])), per_row=True)
            for part in (whole, predicted, correct)
        ]
        return LossStats(*HeadStatistics.of(restored[0], one=self.has_labels), *restored[1:])


def _moves(tensor: Tensor) -> bool:
    """Return whether a tensor has derivatives, in reverse or in forward mode."""
    if tensor.requires_grad:
        return torch.is_grad_enabled()
    forward = not torch.compiler.is_compiling() and forward_ad._current_level >= 0
    return forward and forward_ad.unpack_dual(tensor).tangent is not None


def explain_head_nan(t: HeadTensors, rows: Tensor, *, beside: bool = False) -> None:
    """If a row that counts has NaN as its loss, raise an error that names the argument at fault.

    With terms ``beside`` a divergence, its target is the argument ``teacher``.
    """
    if checks.values_visible(t.row_weight):
        of_head = {"input": t.features, "linear_weight": t.weight, "linear_bias": t.bias}
        if t.low_rank is not None:
            of_head |= {"linear_weight a": t.low_rank, "linear_weight b": t.input[:, t.weight.shape[1] :]}
        of_target = (t.target, t.target_weight, t.target_bias, t.target_low_rank)
        targets = {"teacher": of_target, "target": (t.label_values,)} if beside else {"target": of_target}
        checks.explain_nan(rows, t.row_weight, of_head, targets)


# --- from a public call to a problem ---------------------------------------------------------------------------------


def head_problem(
    loss: LossSpec, input: Tensor, linear_weight: Tensor | LowRankWeight, target: Tensor | Target, *,
    linear_bias: Tensor | None = None, weight: Tensor | None = None, sample_weight: Tensor | None = None,
    ignore_index: Integer | None = None, shift: int = 0, labels: Tensor | Target | None = None,
    exclude: Tensor | None = None,
) -> HeadProblem:  # fmt: skip
    """Return the problem of a public call, on the rows and classes of this process.

    ``labels`` are those of the terms beside a divergence, classes or a distribution in which the pass does not
    differentiate; then ``ignore_index`` and ``shift`` are for them. Raises what the public call raises, in all
    processes if in one.
    """
    checks.require_head(input, matrix_of(linear_weight), linear_bias)
    layout = head_layout(
        input, linear_weight, target, linear_bias=linear_bias, weight=weight, sample_weight=sample_weight,
        labels=labels, exclude=exclude,
    )  # fmt: skip

    def make() -> HeadProblem:
        class_weight = None if weight is None else layout.full("weight", weight)
        if loss.is_cross_entropy:
            known, ignored = cross_entropy_target(target, ignore_index, class_weight, layout.classes)
        else:
            known, ignored = _require_distribution(target), resolve_ignore_index(ignore_index)
            if labels is not None:
                cross_entropy_target(labels, ignore_index, class_weight, layout.classes)
        soft = labels if isinstance(labels, Target) else None
        head = local_head(layout, loss, input, linear_weight, linear_bias, known, class_weight, soft)
        row_weight = None
        if sample_weight is not None:
            row_weight = local_row_values(layout, "sample_weight", sample_weight, shift, 0).to(head.dtype)
            checks.require_numbers("sample_weight", row_weight)
        excluded = local_exclusions(layout, exclude, shift)
        if isinstance(known, Tensor):
            of_rows = local_row_values(layout, "target", known, shift, ignored)
            return _label_problem(head, loss, of_rows, row_weight, ignored, excluded)
        beside: Labels | None = None
        counted = None if sample_weight is None else sample_weight != 0
        if not isinstance(labels, Tensor):
            require_no_shift(shift)
        else:
            of_rows = local_row_values(layout, "target", labels, shift, ignored)
            wide = None if class_weight is None else class_weight.to(head.dtype)
            beside = Labels.of(of_rows, row_weight, wide, layout.classes, ignored, head.dtype)
            row_weight = beside.weight
            if head.leading == layout.leading:  # where all rows are here
                counted = (beside.weight != 0).reshape(layout.leading)
        try:
            _require_target(layout, known, counted)
        except ValueError as error:
            if labels is None:
                raise
            raise type(error)(str(error).replace("target", "teacher")) from None  # its name beside labels
        if soft is not None:
            _require_target(layout, soft, counted)
        problem = _distribution_problem(head, loss, known, row_weight, excluded)
        if soft is not None:
            return _with_soft_labels(problem, soft, row_weight, excluded)
        return problem if beside is None else _with_labels(problem, beside)

    return layout.agreed(make)


def _require_target(layout: PlainHead, target: Target, counted: Tensor | None) -> None:
    """Raise ``ValueError`` unless a distribution has the rows and classes of the head, and values that can be used."""
    layout.require_leading("target", target.leading, f"rows {tuple(target.leading)}")
    target.require_fit((*layout.leading, layout.classes), "linear_weight[:{classes}] (and the bias)")
    if not isinstance(target, TopK):  # whose own rows are checked where they are made local
        # A malformed row of weight 0 needs no clearing: the passes leave it out, or write a residual of 0.
        target.require_values(layout.classes, counted)


def _with_labels(problem: HeadProblem, labels: Labels) -> HeadProblem:
    """Add the labels of the terms beside a divergence; their ignored rows are left out of all terms."""
    head, smooths = problem.head, problem.loss.smooths_labels
    factors = head.smoothing_factors(problem.tensors.excluded) if smooths else head.class_weight
    tensors = problem.tensors._replace(labels=labels.classes.unsqueeze(-1), class_weight=factors)
    return dataclasses.replace(
        problem, tensors=tensors, mean_weight=labels.weight, counted=labels.counted, label=labels.classes,
        has_labels=True, label_weight=None if labels.class_weight is None else labels.mean_weight,
    )  # fmt: skip


def _with_soft_labels(
    problem: HeadProblem, labels: Target, row_weight: Tensor | None, excluded: Tensor | None
) -> HeadProblem:
    """Add a distribution as the labels of the terms beside a divergence."""
    loss, head = problem.loss, problem.head
    assert loss.beside is not None
    plain = LossSpec(CrossEntropy(), "logits", 1.0, loss.softcap, loss.beside.z_loss, loss.beside.smoothing)
    alone = _distribution_problem(head, plain, labels, row_weight, excluded)
    beside = loss.beside._replace(smoothing=alone.loss.smoothing, target=alone.loss.target)
    tensors = problem.tensors._replace(
        labels=alone.tensors.indices, label_values=alone.tensors.target, class_weight=alone.tensors.class_weight
    )
    loss = dataclasses.replace(loss, beside=beside)
    return dataclasses.replace(problem, loss=loss, tensors=tensors, label=alone.label)


def pair_problem(input: Tensor, other: Tensor, exclude: Tensor | None) -> HeadProblem:
    """Return the contrastive loss of pairs ``(n, d)`` in both directions; both lie over processes in one way."""
    loss = LossSpec(CrossEntropy(), "sparse")
    problem = head_problem(loss, input, other, torch.arange(len(input), device=input.device), exclude=exclude)
    return dataclasses.replace(problem, loss=dataclasses.replace(problem.loss, pairs=True))


def _require_distribution(target: Tensor | Target) -> Target:
    """Reject a plain tensor as the target of a divergence: it could hold probabilities or logits."""
    if isinstance(target, Target):
        return target
    if isinstance(target, Tensor) and target.is_floating_point():
        raise TypeError(
            f"target must be wrapped, got a plain {target.dtype} tensor, which could hold probabilities or logits; "
            "pass softcurve.Probabilities(target) or softcurve.Logits(target)"
        )
    targets.as_target(target, plain="")
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


# --- the two kinds of problem ----------------------------------------------------------------------------------------


def _label_problem(
    head: LocalHead, loss: LossSpec, target: Tensor, sample_weight: Tensor | None, ignore_index: int,
    excluded: Tensor | None,
) -> HeadProblem:  # fmt: skip
    """Return the cross-entropy of class indices ``(n,)``."""
    wide = None if head.class_weight is None else head.class_weight.to(head.dtype)
    labels = Labels.of(target, sample_weight, wide, head.layout.classes, ignore_index, head.dtype)
    masses = None
    if loss.smoothing or (loss.z_loss and wide is not None):
        # The masses on the class and on all others. The pass itself spreads the smoothing over all classes.
        mass = torch.ones_like(labels.weight) if labels.class_weight is None else labels.class_weight
        masses = torch.stack([(1 - loss.smoothing) * mass, torch.zeros_like(mass)], -1)
    tensors = HeadTensors(
        **head.tensors | {"target": masses}, indices=labels.classes.unsqueeze(-1),
        row_weight=labels.mean_weight if masses is None else labels.weight,
        class_weight=head.smoothing_factors(excluded) if loss.smoothing else None, excluded=excluded,
    )  # fmt: skip
    return HeadProblem(
        head, dataclasses.replace(loss, target="sparse", **head.layout.shard), tensors, labels.mean_weight,
        labels.counted, sample_weight is not None, label=labels.classes, has_labels=True,
    )  # fmt: skip


def _distribution_problem(
    head: LocalHead, loss: LossSpec, target: Target, sample_weight: Tensor | None, excluded: Tensor | None
) -> HeadProblem:
    """Return the loss of a distribution whose rows, classes and values are checked, but which is not localised."""
    if isinstance(target, GroupedTarget):
        return _grouped_problem(head, loss, target, sample_weight, excluded)
    layout, class_weight, label = head.layout, head.class_weight, None
    everywhere = torch.ones(len(head.input), dtype=torch.bool, device=head.input.device)
    row_weight = everywhere.to(head.dtype) if sample_weight is None else sample_weight
    tensors = HeadTensors(
        **head.tensors, indices=None, row_weight=row_weight, class_weight=class_weight, excluded=excluded
    )
    form: TargetForm
    if isinstance(target, TopK):
        local = TopK(flat(layout.local_rows(target.indices)), flat(layout.local_rows(target.log_probs)), target.tail)
        local = local.checked(sample_weight, layout.classes)
        masses, loss = _list_outcomes(head, loss, local, excluded)
        form, label = "sparse", local.most_probable
        class_weight = head.smoothing_factors(excluded) if loss.smoothing else None
        tensors = tensors._replace(target=masses, indices=local.listed_classes())
    else:
        if isinstance(target, LinearTeacher):
            form = "teacher"
            teacher = dataclasses.replace(target, input=flat(layout.local_rows(target.input)))
            tensors = tensors._replace(**_teacher_tensors(layout, teacher.checked(sample_weight, layout.classes)))
            cap = None if target.softcap is None else float(target.softcap)
            loss = dataclasses.replace(
                loss, teacher_scale=float(target.scale), teacher_softcap=cap, cuts_target=loss.groups > 0
            )
        else:
            form = "probabilities" if isinstance(target, Probabilities) else "logits"
            values = target.values if isinstance(target, Probabilities | Logits) else target.logits(head.dtype)
            # Groups of every class are merged on each process without a message, and receive gradients without one.
            loss = dataclasses.replace(loss, cuts_target=loss.groups > 0 and layout.cuts_classes_of(values))
            whole = loss.groups > 0 and not loss.cuts_target
            values = layout.local_rows(values) if whole else layout.local_distributions(values)
            tensors = tensors._replace(target=flat(values))
        class_weight = head.smoothing_factors(excluded) if loss.smoothing else class_weight
    return HeadProblem(
        head, dataclasses.replace(loss, target=form, **layout.shard), tensors._replace(class_weight=class_weight),
        sample_weight, everywhere, sample_weight is not None, label, target.merges_tail,
    )  # fmt: skip


def _grouped_problem(
    head: LocalHead, loss: LossSpec, target: GroupedTarget, sample_weight: Tensor | None, excluded: Tensor | None
) -> HeadProblem:
    """Return the loss of a teacher whose classes, and those of the head, are merged into groups."""
    loss, map = dataclasses.replace(loss, groups=target.class_map.count), target.class_map
    problem = _distribution_problem(head, loss, target.teacher, sample_weight, excluded)
    tensors = problem.tensors._replace(groups=map.student.of, target_groups=map.teacher.of)
    return dataclasses.replace(problem, tensors=tensors)


def _teacher_tensors(layout: PlainHead, teacher: LinearTeacher) -> dict[str, Any]:
    """Return the fields of :class:`~softcurve.head.tensors.HeadTensors` that are a teacher's."""
    weight, bias, rows = teacher.chosen()
    weight = local_weight(layout, weight, by_class=rows is None)
    bias = None if bias is None else layout.local_classes(bias)
    input, weight, bias = lowered_by_autocast(teacher.input, weight, bias)
    return {
        "target": widened(input, weight),
        "target_weight": matrix_of(weight),
        "target_low_rank": low_rank_of(weight),
        "target_bias": bias,
        "target_classes": None if rows is None else layout.local_classes(rows),
    }


def _list_outcomes(head: LocalHead, loss: LossSpec, target: TopK, excluded: Tensor | None) -> tuple[Tensor, LossSpec]:
    """Return a list over the listed classes and all others, ``(n, k + 1)``, and the loss without its smoothing.

    For a cross-entropy the outcomes are smoothed and weighted probabilities, for other divergences logits. Only a list
    of one bucket takes up the smoothing; otherwise the pass spreads it over all classes.
    """
    classes, temperature = head.layout.classes, 1.0 if loss.is_cross_entropy else loss.temperature
    sizes = _outcome_sizes(head, target, excluded)
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


def _outcome_sizes(head: LocalHead, target: TopK, excluded: Tensor | None) -> Tensor:
    """Return how many classes that neither the bias masks nor the row excludes each outcome has, ``(n, k + 1)``."""
    uniform = head.uniform()
    sizes = target.outcome_sizes(head.layout.classes, None if uniform is None else uniform > 0)
    if excluded is None:
        return sizes
    at = target.listed_classes()
    place = torch.searchsorted(excluded, at).clamp(max=excluded.shape[-1] - 1)
    listed = torch.where(excluded.gather(-1, place) == at, 0, sizes[..., :-1])
    gone = excluded >= 0
    if uniform is not None:
        gone = gone & (uniform[excluded.clamp(min=0)] > 0)
    number = sizes.sum(-1, keepdim=True) - gone.sum(-1, keepdim=True)
    return torch.cat([listed, number - listed.sum(-1, keepdim=True)], -1)
