"""The public losses on features and a linear head, which never hold the logits.

Each equals its namesake in :mod:`softcurve.functional` on ``logits = linear(input, linear_weight, linear_bias)``, in
value, gradients and second derivatives. The memory beyond inputs and gradients stays within ``memory_budget``.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Literal, TypeAlias, TypedDict, Unpack, overload

from torch import Tensor

from softcurve import checks
from softcurve.array_types import Float
from softcurve.head.few_logits import few_logits_loss
from softcurve.head.positions import by_position, problems_by_position
from softcurve.head.problem import head_problem, require_shift
from softcurve.head.row_statistics import LossStats
from softcurve.losses.divergences import CrossEntropy, Divergence, ForwardKL, divergence_of
from softcurve.losses.labels import require_labels
from softcurve.losses.low_rank import LowRankWeight
from softcurve.losses.reduction import Reduction
from softcurve.losses.spec import Beside, LossSpec
from softcurve.losses.targets import Target
from softcurve.typing import Integer, KLDirection, Number, ReductionKind

FORWARD_KL = ForwardKL()

Features: TypeAlias = Float[Tensor, "*rows features"]
HeadWeight: TypeAlias = Float[Tensor, "classes *positions features"] | LowRankWeight
HeadBias: TypeAlias = Float[Tensor, " classes *positions"]
Loss: TypeAlias = Float[Tensor, "*reduced"]


class LinearDivergenceOptions(TypedDict, total=False):
    """The options that every loss on features and a head has; see :func:`linear_cross_entropy`."""

    linear_bias: HeadBias | None
    sample_weight: Tensor | None
    temperature: Number
    softcap: Number | None
    reduction: ReductionKind
    base: Number
    shift: Integer
    exclude: Tensor | None
    memory_budget: Integer | None


class LinearCrossEntropyOptions(LinearDivergenceOptions, total=False):
    """The options of :func:`linear_cross_entropy`."""

    weight: Float[Tensor, " classes"] | None
    ignore_index: Integer | None
    label_smoothing: Number
    z_loss: Number


# fmt: off
@overload
def linear_cross_entropy(
    input: Features, linear_weight: HeadWeight, target: Tensor | Target, *,
    return_stats: Literal[False] = False, **options: Unpack[LinearCrossEntropyOptions],
) -> Loss: ...
@overload
def linear_cross_entropy(
    input: Features, linear_weight: HeadWeight, target: Tensor | Target, *,
    return_stats: Literal[True], **options: Unpack[LinearCrossEntropyOptions],
) -> tuple[Loss, LossStats]: ...
@overload
def linear_cross_entropy(
    input: Features, linear_weight: HeadWeight, target: Tensor | Target, *,
    return_stats: bool, **options: Unpack[LinearCrossEntropyOptions],
) -> Loss | tuple[Loss, LossStats]: ...
def linear_cross_entropy(
    input: Features, linear_weight: HeadWeight, target: Tensor | Target, *, linear_bias: HeadBias | None = None,
    weight: Float[Tensor, " classes"] | None = None, sample_weight: Tensor | None = None,
    ignore_index: Integer | None = None, label_smoothing: Number = 0.0, temperature: Number = 1.0,
    softcap: Number | None = None, z_loss: Number = 0.0, reduction: ReductionKind = "mean", base: Number = math.e,
    shift: Integer = 0, exclude: Tensor | None = None, memory_budget: Integer | None = None,
    return_stats: bool = False,
) -> Loss | tuple[Loss, LossStats]:
    # fmt: on
    """Return ``cross_entropy(linear(input, linear_weight, linear_bias), target, ...)`` without holding the logits.

    Up to 65,536 logits of a call without options are held, since that is faster.
    It accepts every call of ``torch.nn.functional.linear_cross_entropy`` except its ``options``, including
    one-dimensional input, and weights ``(C, d_1, …, d_K, d)`` for a target of ``K`` more dimensions.

    Args:
        input: Features ``(..., d)``.
        linear_weight: ``(C, d)``; it may be a tied embedding's, or a :class:`~softcurve.LowRankWeight`.
        target: Class indices ``(...)``; a floating-point tensor ``(..., C)``, whose rows may have any sum, as in torch;
            or a :class:`~softcurve.Probabilities`, ``Logits``, ``TopK`` or ``LinearTeacher``, differentiable.
        linear_bias: ``(C,)``; −inf masks a class, which then has no share of the label smoothing.
        sample_weight: ``(...)``: a factor of each row. Rows of weight 0 are left out, and their target may hold
            anything. ``shift`` moves it together with the target.
        reduction: As in :func:`softcurve.cross_entropy`; ``"none"`` computes the logits once more in the backward pass.
        shift: ``s`` compares position ``i`` with the target of ``i + s`` along the last dimension of rows: 1 for a
            causal language model whose targets are its inputs. The last ``s`` positions do not contribute.
        exclude: ``(..., k)``: class indices that have no part in a row's softmax, and −1 where a row has fewer; as in
            :func:`softcurve.cross_entropy`. ``shift`` moves it together with the target.
        memory_budget: Bytes for tiles; by default 128 MiB on the CPU and 1 GiB on CUDA.
        return_stats: Also return :class:`LossStats`, from the same pass: the statistics of :func:`linear_log_probs`,
            with the log-probability of the target's class, and whether the prediction is right. They are in nats
            whatever the ``base``. Gradients of them take one more pass, whichever are used.

    The other options are those of :func:`softcurve.cross_entropy`.

    Returns:
        The loss in float32, or float64 if features, weight or a distribution are; torch's has the dtype of the
        features. Half precision is multiplied and summed in float32, weight gradients too, and rounded once. Third
        derivatives are not available.

    Raises:
        TypeError, ValueError: If an argument has a wrong type, shape or value. NaN in the loss of a row that counts is
            an error in eager mode on the CPU; elsewhere it is returned.

    Example:
        >>> x, w = torch.randn(3, 4), torch.randn(5, 4)
        >>> loss = softcurve.linear_cross_entropy(x, w, torch.tensor([0, 4, 2]))

    Source: Bishop (2006), eq. 4.109, and the chain rule: ``∂L/∂e = Wᵀ(p − y)``, ``∂L/∂W = Σ (p − y) eᵀ``.
    """
    whole = weight is sample_weight is exclude is memory_budget is None and not return_stats
    if whole and type(shift) is int and not shift:
        options = (reduction, base, temperature, softcap, z_loss, label_smoothing)
        few = few_logits_loss(options, input, linear_weight, linear_bias, target, ignore_index)
        if few is not None:
            return few
    reducer, shift = Reduction.of(reduction, base), require_shift(shift)
    loss = LossSpec.of(CrossEntropy(), reducer, temperature, softcap, z_loss, label_smoothing)
    if isinstance(linear_weight, Tensor) and linear_weight.ndim > 2:
        problems, rows = problems_by_position(
            loss, input, linear_weight, target, linear_bias, sample_weight, shift, exclude, weight=weight,
            ignore_index=ignore_index,
        )  # fmt: skip
        return by_position(problems, rows, reducer, memory_budget, return_stats)
    problem = head_problem(
        loss, input, linear_weight, target, linear_bias=linear_bias, weight=weight, sample_weight=sample_weight,
        ignore_index=ignore_index, shift=shift, exclude=exclude,
    )  # fmt: skip
    return problem.computed(reducer, problem.divisor(reducer), memory_budget, return_stats)


# fmt: off
@overload
def linear_kl_divergence(
    input: Features, linear_weight: HeadWeight, target: Tensor | Target, *, direction: KLDirection = "forward",
    return_stats: Literal[False] = False, **options: Unpack[LinearDivergenceOptions],
) -> Loss: ...
@overload
def linear_kl_divergence(
    input: Features, linear_weight: HeadWeight, target: Tensor | Target, *, direction: KLDirection = "forward",
    return_stats: Literal[True], **options: Unpack[LinearDivergenceOptions],
) -> tuple[Loss, LossStats]: ...
@overload
def linear_kl_divergence(
    input: Features, linear_weight: HeadWeight, target: Tensor | Target, *, direction: KLDirection = "forward",
    return_stats: bool, **options: Unpack[LinearDivergenceOptions],
) -> Loss | tuple[Loss, LossStats]: ...
def linear_kl_divergence(
    input: Features, linear_weight: HeadWeight, target: Tensor | Target, *, direction: KLDirection = "forward",
    linear_bias: HeadBias | None = None, sample_weight: Tensor | None = None,
    temperature: Number = 1.0, softcap: Number | None = None, reduction: ReductionKind = "mean", base: Number = math.e,
    shift: Integer = 0, exclude: Tensor | None = None, memory_budget: Integer | None = None,
    return_stats: bool = False,
) -> Loss | tuple[Loss, LossStats]:
    # fmt: on
    """Return ``kl_divergence(target, linear(input, linear_weight, linear_bias))``, or the reverse, without the logits.

    Args:
        target: A :class:`~softcurve.Probabilities`, ``Logits`` or ``TopK``, or a ``LinearTeacher``, whose logits are
            also computed tile by tile. A plain tensor is an error: it could hold probabilities or logits.
        direction: ``"forward"``: ``D(target‖model)``, mode-covering; ``"reverse"``: ``D(model‖target)``,
            mode-seeking.
        temperature: ``T``; both sides become ``softmax(z / T)``.
        softcap: Applies to the model's logits only.
        shift: Must be 0: a distribution already belongs to a row.

    The other arguments and the errors are those of :func:`linear_cross_entropy`, values and units those of
    :func:`softcurve.kl_divergence`.

    Example:
        >>> x, w = torch.randn(3, 4), torch.randn(5, 4)
        >>> loss = softcurve.linear_kl_divergence(x, w, softcurve.Logits(torch.randn(3, 5)), direction="reverse")

    Source: Kullback and Leibler (1951): ``D(P‖Q) = Σ_i p_i log(p_i/q_i)``; ``∂D/∂z = s − p Σs`` with ``s = p ∂φ/∂p``.
    """
    checks.require_choice("direction", direction, ("forward", "reverse"))
    return linear_divergence(
        input, linear_weight, target, divergence=divergence_of(f"{direction}_kl"),
        linear_bias=linear_bias, sample_weight=sample_weight, temperature=temperature, softcap=softcap,
        reduction=reduction, base=base, shift=shift, exclude=exclude, memory_budget=memory_budget,
        return_stats=return_stats,
    )  # fmt: skip


# fmt: off
@overload
def linear_js_divergence(
    input: Features, linear_weight: HeadWeight, target: Tensor | Target, *, beta: Number = 0.5,
    return_stats: Literal[False] = False, **options: Unpack[LinearDivergenceOptions],
) -> Loss: ...
@overload
def linear_js_divergence(
    input: Features, linear_weight: HeadWeight, target: Tensor | Target, *, beta: Number = 0.5,
    return_stats: Literal[True], **options: Unpack[LinearDivergenceOptions],
) -> tuple[Loss, LossStats]: ...
@overload
def linear_js_divergence(
    input: Features, linear_weight: HeadWeight, target: Tensor | Target, *, beta: Number = 0.5,
    return_stats: bool, **options: Unpack[LinearDivergenceOptions],
) -> Loss | tuple[Loss, LossStats]: ...
def linear_js_divergence(
    input: Features, linear_weight: HeadWeight, target: Tensor | Target, *, beta: Number = 0.5,
    linear_bias: HeadBias | None = None, sample_weight: Tensor | None = None,
    temperature: Number = 1.0, softcap: Number | None = None, reduction: ReductionKind = "mean", base: Number = math.e,
    shift: Integer = 0, exclude: Tensor | None = None, memory_budget: Integer | None = None,
    return_stats: bool = False,
) -> Loss | tuple[Loss, LossStats]:
    # fmt: on
    """Return ``js_divergence(target, linear(input, linear_weight, linear_bias), beta=beta)`` without the logits.

    ``beta * D(target‖M) + (1 − beta) * D(model‖M)`` with ``M = beta * target + (1 − beta) * model``; ``beta = 0`` is
    the forward and ``beta = 1`` the reverse KL, exactly. Arguments and errors are those of
    :func:`linear_kl_divergence`, the source is that of :func:`softcurve.js_divergence`.

    Example:
        >>> x, w = torch.randn(3, 4), torch.randn(5, 4)
        >>> loss = softcurve.linear_js_divergence(x, w, softcurve.Logits(torch.randn(3, 5)), beta=0.5)
    """
    return linear_divergence(
        input, linear_weight, target, divergence=divergence_of("js", checks.require_between("beta", beta, 0.0, 1.0)),
        linear_bias=linear_bias, sample_weight=sample_weight, temperature=temperature, softcap=softcap,
        reduction=reduction, base=base, shift=shift, exclude=exclude, memory_budget=memory_budget,
        return_stats=return_stats,
    )  # fmt: skip


# fmt: off
@overload
def linear_divergence(
    input: Features, linear_weight: HeadWeight, target: Tensor | Target, *, divergence: Divergence,
    return_stats: Literal[False] = False, **options: Unpack[LinearDivergenceOptions],
) -> Loss: ...
@overload
def linear_divergence(
    input: Features, linear_weight: HeadWeight, target: Tensor | Target, *, divergence: Divergence,
    return_stats: Literal[True], **options: Unpack[LinearDivergenceOptions],
) -> tuple[Loss, LossStats]: ...
@overload
def linear_divergence(
    input: Features, linear_weight: HeadWeight, target: Tensor | Target, *, divergence: Divergence,
    return_stats: bool, **options: Unpack[LinearDivergenceOptions],
) -> Loss | tuple[Loss, LossStats]: ...
def linear_divergence(
    input: Features, linear_weight: HeadWeight, target: Tensor | Target, *, divergence: Divergence,
    linear_bias: HeadBias | None = None, sample_weight: Tensor | None = None,
    temperature: Number = 1.0, softcap: Number | None = None, reduction: ReductionKind = "mean", base: Number = math.e,
    shift: Integer = 0, exclude: Tensor | None = None, memory_budget: Integer | None = None,
    return_stats: bool = False,
) -> Loss | tuple[Loss, LossStats]:
    # fmt: on
    """Return ``divergence(target, linear(input, linear_weight, linear_bias), ...)`` without holding the logits.

    Args:
        divergence: A divergence such as :class:`~softcurve.AlphaDivergence`, or an instance of your own subclass of
            :class:`~softcurve.Divergence`. For ``CrossEntropy()`` this is :func:`linear_cross_entropy`.

    The other arguments and errors are those of :func:`linear_kl_divergence`, values and units those of
    :func:`softcurve.divergence`.

    Example:
        >>> x, w = torch.randn(3, 4), torch.randn(5, 4)
        >>> teacher = softcurve.Logits(torch.randn(3, 5))
        >>> loss = softcurve.linear_divergence(x, w, teacher, divergence=softcurve.SkewKL(0.1))

    Source: Csiszár (1967) for the family; ``∂D/∂z = s − p Σs`` with ``s = p ∂φ/∂p``.
    """
    divergence = divergence_of(divergence)
    if type(divergence) is CrossEntropy:
        return linear_cross_entropy(
            input, linear_weight, target, linear_bias=linear_bias, sample_weight=sample_weight,
            temperature=temperature, softcap=softcap, reduction=reduction, base=base, shift=shift,
            exclude=exclude, memory_budget=memory_budget, return_stats=return_stats,
        )  # fmt: skip
    reducer, shift = Reduction.of(reduction, base), require_shift(shift)
    loss = LossSpec.of(divergence, reducer, temperature, softcap)
    problem = head_problem(
        loss, input, linear_weight, target, linear_bias=linear_bias, sample_weight=sample_weight, shift=shift,
        exclude=exclude,
    )  # fmt: skip
    return problem.computed(reducer, problem.divisor(reducer), memory_budget, return_stats)


# fmt: off
@overload
def linear_distillation(
    input: Features, linear_weight: HeadWeight, target: Tensor | Target, teacher: Target, *, alpha: Number,
    divergence: Divergence = FORWARD_KL, entropy_bonus: Number = 0.0, return_stats: Literal[False] = False,
    **options: Unpack[LinearCrossEntropyOptions],
) -> Loss: ...
@overload
def linear_distillation(
    input: Features, linear_weight: HeadWeight, target: Tensor | Target, teacher: Target, *, alpha: Number,
    divergence: Divergence = FORWARD_KL, entropy_bonus: Number = 0.0, return_stats: Literal[True],
    **options: Unpack[LinearCrossEntropyOptions],
) -> tuple[Loss, LossStats]: ...
@overload
def linear_distillation(
    input: Features, linear_weight: HeadWeight, target: Tensor | Target, teacher: Target, *, alpha: Number,
    divergence: Divergence = FORWARD_KL, entropy_bonus: Number = 0.0, return_stats: bool,
    **options: Unpack[LinearCrossEntropyOptions],
) -> Loss | tuple[Loss, LossStats]: ...
def linear_distillation(
    input: Features, linear_weight: HeadWeight, target: Tensor | Target, teacher: Target, *, alpha: Number,
    divergence: Divergence = FORWARD_KL, temperature: Number = 1.0, entropy_bonus: Number = 0.0,
    linear_bias: HeadBias | None = None, weight: Float[Tensor, " classes"] | None = None,
    sample_weight: Tensor | None = None, ignore_index: Integer | None = None, label_smoothing: Number = 0.0,
    softcap: Number | None = None, z_loss: Number = 0.0, reduction: ReductionKind = "mean", base: Number = math.e,
    exclude: Tensor | None = None, shift: Integer = 0, memory_budget: Integer | None = None,
    return_stats: bool = False,
) -> Loss | tuple[Loss, LossStats]:
    # fmt: on
    """Return the loss of a student of labels and of a teacher, from one product with the student's weight.

    The loss of a row is ``alpha CE(target, model) + (1 − alpha) T² D(teacher‖model) − entropy_bonus H(model)``. The
    temperature ``T`` is that of both sides of the divergence; the other two terms are at temperature 1.

    Args:
        input: Features of the student ``(..., d)``.
        linear_weight: ``(C, d)``.
        target: Class indices ``(...)``, whose rows of ``ignore_index`` are left out of all terms; or soft labels as
            :func:`linear_cross_entropy` takes them, a floating-point tensor ``(..., C)``, a
            :class:`~softcurve.Probabilities`, ``Logits`` or ``TopK``. If soft labels receive gradients, their
            cross-entropy takes a pass, and a product, of its own.
        teacher: A :class:`~softcurve.Probabilities`, ``Logits``, ``TopK`` or ``LinearTeacher``, differentiable.
        alpha: The share of the labels, from 0 to 1.
        divergence: ``D``, such as :class:`~softcurve.ReverseKL` or an instance of your own subclass of
            :class:`~softcurve.Divergence`.
        temperature: ``T``. The factor ``T²`` keeps the size of the divergence's gradient.
        entropy_bonus: The factor of the entropy ``H``, ≥ 0; it rewards an uncertain model.
        weight: ``(C,)``: a factor of each class, of the cross-entropy of the labels, as ``label_smoothing`` and
            ``z_loss`` are.
        reduction: As in :func:`softcurve.cross_entropy`, of all terms together; the mean is the sum of the means of the
            terms, of which that of class indices is divided by the weights of their classes. Then a ``sample_weight``
            must not require gradients beside a ``weight``.
        shift: ``s`` compares position ``i`` with the label of ``i + s``, a class index; the teacher belongs to position
            ``i`` itself.
        return_stats: Also return :class:`LossStats` of the model at temperature 1, from the same pass.

    The other options and errors are those of :func:`linear_cross_entropy`.

    Example:
        >>> x, w, labels = torch.randn(3, 4), torch.randn(5, 4), torch.tensor([0, 4, 2])
        >>> teacher = softcurve.LinearTeacher(torch.randn(3, 8), torch.randn(5, 8))
        >>> loss = softcurve.linear_distillation(x, w, labels, teacher, alpha=0.5, temperature=2.0)

    Source: Hinton, Vinyals and Dean, "Distilling the knowledge in a neural network", 2015.
    """
    divergence = divergence_of(divergence)
    if type(divergence) is CrossEntropy:
        raise ValueError("divergence must compare two distributions, got CrossEntropy(); use ForwardKL()")
    if not isinstance(teacher, Target):
        raise TypeError(
            "teacher must be one of softcurve.Probabilities, Logits, TopK, LinearTeacher, got "
            f"{type(teacher).__name__}; wrap a tensor to say what it holds, and read the rows of a cache by cache[rows]"
        )
    reducer, shift = Reduction.of(reduction, base), require_shift(shift)
    of_labels = LossSpec.of(CrossEntropy(), reducer, 1.0, softcap, z_loss, label_smoothing)
    loss = LossSpec.of(divergence, reducer, temperature, softcap)
    share = checks.require_between("alpha", alpha, 0.0, 1.0)
    bonus = checks.require_between("entropy_bonus", entropy_bonus, 0.0, math.inf)
    beside = Beside((1 - share) * loss.temperature**2, share, bonus, of_labels.smoothing, of_labels.z_loss)
    problem = head_problem(
        replace(loss, beside=beside), input, linear_weight, teacher, linear_bias=linear_bias, weight=weight,
        sample_weight=sample_weight, ignore_index=ignore_index, shift=shift, exclude=exclude,
        labels=require_labels(target),
    )  # fmt: skip
    divisor = problem.divisor(reducer)
    if problem.label_weight is not None and share and reducer.kind == "mean":
        problem, divisor = problem.with_mean_of_labels(divisor)
    others = problem.without_moving_labels()
    if others is None:
        return problem.computed(reducer, divisor, memory_budget, return_stats)
    of_labels_alone = share * linear_cross_entropy(
        input, linear_weight, target, linear_bias=linear_bias, weight=weight, sample_weight=sample_weight,
        label_smoothing=label_smoothing, softcap=softcap, z_loss=z_loss, reduction=reduction, base=base,
        exclude=exclude, memory_budget=memory_budget,
    )  # fmt: skip
    rest = others.computed(reducer, divisor, memory_budget, return_stats)
    return (of_labels_alone + rest[0], rest[1]) if isinstance(rest, tuple) else of_labels_alone + rest
