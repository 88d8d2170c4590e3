"""The public losses on features and a linear head: no logits are held.

Each equals its namesake in :mod:`softcurve.functional` on ``logits = linear(input, linear_weight, linear_bias)``, in
value, gradients and second derivatives. What they need beyond inputs and gradients stays within ``memory_budget``.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from softcurve import checks
from softcurve.array_types import Float
from softcurve.objective import LogitMap, Reduction
from softcurve.posed import (
    DEFAULT_IGNORED,
    Head,
    LossStats,
    cross_entropy_from,
    divergence_from,
    require_no_shift,
)
from softcurve.targets import Target


def linear_cross_entropy(
    input: Float[Tensor, "*rows features"],
    linear_weight: Float[Tensor, "classes *positions features"],
    target: Tensor | Target,
    *,
    linear_bias: Float[Tensor, " classes *positions"] | None = None,
    weight: Float[Tensor, " classes"] | None = None,
    sample_weight: Tensor | None = None,
    ignore_index: int | None = None,
    label_smoothing: float = 0.0,
    temperature: float = 1.0,
    softcap: float | None = None,
    z_loss: float = 0.0,
    reduction: str = "mean",
    base: float = math.e,
    shift: int = 0,
    memory_budget: int | None = None,
    return_stats: bool = False,
) -> Float[Tensor, "*reduced"] | tuple[Float[Tensor, "*reduced"], LossStats]:
    """``cross_entropy(linear(input, linear_weight, linear_bias), target, ...)``, without the logits.

    Takes every call of ``torch.nn.functional.linear_cross_entropy`` but its ``options``: one-dimensional input, and
    weights ``(C, d_1, …, d_K, d)`` for a target of ``K`` more dimensions, included.

    Args:
        input: features ``(..., d)``.
        linear_weight: ``(C, d)``; may be a tied embedding's.
        target: class indices ``(...)``; a floating-point tensor ``(..., C)``, taken with the mass that it has, as in
            torch; or a :class:`~softcurve.Probabilities`, ``Logits``, ``TopK`` or ``LinearTeacher``, differentiable.
        linear_bias: ``(C,)``; −inf masks a class.
        weight: ``(C,)``, ≥ 0; a factor of each class in the target. Receives no gradient.
        sample_weight: ``(...)``; a factor of each row. Rows of weight 0 are left out.
        ignore_index: the class index of rows that have no part; ``None`` is −100. Only for class indices.
        label_smoothing: ``ε`` in [0, 1]: the target becomes ``(1 − ε) y + ε / C``.
        temperature: ``T`` in ``z / T``, after the soft cap.
        softcap: ``κ`` in ``κ tanh(z / κ)``.
        z_loss: ``λ`` in ``λ lse²``; stays in squared nats.
        reduction: ``"none"``, ``"sum"``, ``"mean"`` (as in torch, NaN for no rows included) or ``"batchmean"``.
            ``"none"`` computes the logits once more in the backward pass.
        base: of the logarithm; 2 for bits.
        shift: ``s`` compares position ``i`` with the target of ``i + s`` along the last dimension of rows: 1 for a
            causal language model whose targets are its inputs. The last ``s`` positions have no part.
        memory_budget: bytes for tiles; by default 128 MiB on the CPU and 1 GiB on CUDA.
        return_stats: also return :class:`LossStats`, from the same pass.

    Half precision is multiplied and summed in float32, weight gradients too, and rounded once. Third derivatives are
    not offered.

    Raises:
        TypeError, ValueError: for an argument of the wrong type, shape or value. NaN gives NaN.

    Source: the seed's ``∂L/∂e = Wᵀ(p − y)``, ``∂L/∂W = Σ (p − y) eᵀ``.
    """
    checks.require_between("label_smoothing", label_smoothing, 0.0, 1.0)
    checks.require_between("z_loss", z_loss, 0.0, math.inf)
    reducer, _ = Reduction(reduction, base), LogitMap(temperature, softcap)
    if isinstance(linear_weight, Tensor) and linear_weight.ndim > 2:
        return _by_positions(
            input, linear_weight, target, linear_bias, weight, sample_weight, ignore_index, shift, return_stats,
            reducer, memory_budget, label_smoothing=label_smoothing, temperature=temperature, softcap=softcap,
            z_loss=z_loss,
        )  # fmt: skip
    head = Head.of(input, linear_weight, linear_bias, target)
    posed = cross_entropy_from(
        head,
        target,
        weight=weight,
        sample_weight=sample_weight,
        ignore_index=ignore_index,
        smoothing=label_smoothing,
        shift=shift,
        options={"temperature": temperature, "softcap": softcap, "z_loss": z_loss * reducer.nats},
    )
    return posed.reduced(reducer, memory_budget, return_stats)


def linear_kl_divergence(
    input: Float[Tensor, "*rows features"],
    linear_weight: Float[Tensor, "classes features"],
    target: Tensor | Target,
    *,
    direction: str = "forward",
    linear_bias: Float[Tensor, " classes"] | None = None,
    sample_weight: Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    reduction: str = "batchmean",
    base: float = math.e,
    shift: int = 0,
    memory_budget: int | None = None,
    return_stats: bool = False,
) -> Float[Tensor, "*reduced"] | tuple[Float[Tensor, "*reduced"], LossStats]:
    """``kl_divergence(target, linear(input, linear_weight, linear_bias))``, or the reverse, without the logits.

    Args:
        target: a floating-point tensor of probabilities ``(..., C)``, or a :class:`~softcurve.Probabilities`,
            ``Logits``, ``TopK`` or ``LinearTeacher``, whose own logits are made tile by tile as well.
        direction: ``"forward"``: ``D(target‖model)``, mode-covering; ``"reverse"``: ``D(model‖target)``, mode-seeking.
        temperature: ``T``; both sides become ``softmax(z / T)``.
        softcap: of the model's logits alone.
        shift: must be 0: a distribution already belongs to a row.

    The other arguments are those of :func:`linear_cross_entropy`, values and units those of
    :func:`softcurve.kl_divergence`.

    Raises:
        TypeError, ValueError: for an argument of the wrong type, shape or value. NaN gives NaN.

    Source: the seed's ``D(P‖Q) = Σ_i p_i log(p_i/q_i)``; ``∂D/∂z = s − p Σs`` for a divergence with score ``s``.
    """
    checks.require_choice("direction", direction, ("forward", "reverse"))
    reducer, head = Reduction(reduction, base), Head.of(input, linear_weight, linear_bias, target)
    require_no_shift(shift)
    posed = divergence_from(
        head,
        target,
        family=direction,
        beta=0.5,
        sample_weight=sample_weight,
        temperature=temperature,
        softcap=softcap,
    )
    return posed.reduced(reducer, memory_budget, return_stats)


def linear_js_divergence(
    input: Float[Tensor, "*rows features"],
    linear_weight: Float[Tensor, "classes features"],
    target: Tensor | Target,
    *,
    beta: float = 0.5,
    linear_bias: Float[Tensor, " classes"] | None = None,
    sample_weight: Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    reduction: str = "batchmean",
    base: float = math.e,
    shift: int = 0,
    memory_budget: int | None = None,
    return_stats: bool = False,
) -> Float[Tensor, "*reduced"] | tuple[Float[Tensor, "*reduced"], LossStats]:
    """``js_divergence(target, linear(input, linear_weight, linear_bias), beta=beta)``, without the logits.

    ``beta * D(target‖M) + (1 − beta) * D(model‖M)`` with ``M = beta * target + (1 − beta) * model``; ``beta = 0`` is
    the forward and ``beta = 1`` the reverse KL, exactly. Arguments and errors are those of
    :func:`linear_kl_divergence`, the source is that of :func:`softcurve.js_divergence`.
    """
    checks.require_between("beta", beta, 0.0, 1.0)
    reducer, head = Reduction(reduction, base), Head.of(input, linear_weight, linear_bias, target)
    require_no_shift(shift)
    posed = divergence_from(
        head,
        target,
        family={0.0: "forward", 1.0: "reverse"}.get(float(beta), "js"),
        beta=beta,
        sample_weight=sample_weight,
        temperature=temperature,
        softcap=softcap,
    )
    return posed.reduced(reducer, memory_budget, return_stats)


# --- losses of K more dimensions -------------------------------------------------------------------------------------


def _by_positions(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor | Target,
    linear_bias: Tensor | None,
    weight: Tensor | None,
    sample_weight: Tensor | None,
    ignore_index: int | None,
    shift: int,
    return_stats: bool,
    reducer: Reduction,
    memory_budget: int | None,
    **options: float | None,
) -> Tensor | tuple[Tensor, LossStats]:
    """A head of its own for each position ``d_1 … d_K``, as torch reads a weight ``(C, d_1, …, d_K, d)``."""
    classes, *positions, _ = linear_weight.shape
    if not isinstance(target, Tensor):
        raise TypeError(
            f"target must be a tensor for a linear_weight of more than two dimensions, got {type(target).__name__}"
        )
    checks.require_tensor("input", input)
    if input.ndim != 2:
        raise ValueError(f"input must be of shape (N, d) for a weight of K dimensions, got {checks.describe(input)}")
    if shift:
        raise ValueError(f"shift must be 0 for a linear_weight of more than two dimensions, got {shift}")
    if linear_bias is not None:
        checks.require_tensor("linear_bias", linear_bias)
    if 0 in positions:
        raise ValueError(f"linear_weight must have at least one position, got {checks.describe(linear_weight)}")
    if input.shape[1] != linear_weight.shape[-1]:
        raise ValueError(
            f"linear_weight must be as wide as input {tuple(input.shape)}, got {checks.describe(linear_weight)}"
        )
    if linear_bias is not None and tuple(linear_bias.shape) != (classes, *positions):
        raise ValueError(
            f"linear_bias must be of shape {(classes, *positions)}, as linear_weight, "
            f"got {checks.describe(linear_bias)}"
        )
    soft = target.is_floating_point()
    rows = (len(input), *positions)
    expected = (len(input), classes, *positions) if soft else rows
    if tuple(target.shape) != expected:
        raise ValueError(f"target must be of shape {expected}, got {checks.describe(target)}")
    if sample_weight is not None:
        checks.require_rows("sample_weight", sample_weight, rows, "the target")
        sample_weight = sample_weight.flatten(1)
    flat_target = target.flatten(2) if soft else target.flatten(1)
    biases = None if linear_bias is None else linear_bias.flatten(1)
    parts = [
        linear_cross_entropy(
            input,
            head,
            flat_target[..., i],
            linear_bias=None if biases is None else biases[:, i],
            weight=weight,
            sample_weight=None if sample_weight is None else sample_weight[:, i],
            ignore_index=ignore_index,
            reduction="none" if reducer.kind == "none" else "sum",
            base=reducer.base,
            return_stats=return_stats,
            memory_budget=memory_budget,
            **options,  # type: ignore[arg-type]
        )
        for i, head in enumerate(linear_weight.flatten(1, -2).unbind(1))
    ]
    losses = torch.stack([part[0] if isinstance(part, tuple) else part for part in parts], -1)
    if reducer.kind == "none":
        result = losses.reshape(rows)
    elif reducer.kind == "sum":
        result = losses.sum()
    else:
        mass = _mass(reducer, flat_target, soft, weight, sample_weight, ignore_index)
        result = losses.sum() / torch.where(mass == 0, 1.0, mass) + torch.where(mass == 0, math.nan, 0.0)
        result = result.to(losses.dtype)
    if not return_stats:
        return result
    stats = [part[1] for part in parts if isinstance(part, tuple)]
    return result, LossStats(*(torch.stack(column, -1).reshape(rows) for column in zip(*stats, strict=True)))


def _mass(
    reducer: Reduction,
    target: Tensor,
    soft: bool,
    weight: Tensor | None,
    sample_weight: Tensor | None,
    ignore_index: int | None,
) -> Tensor:
    """What the mean of a loss of ``K`` more dimensions divides by."""
    rows = target[:, 0] if soft else target
    ones = torch.ones_like(rows, dtype=torch.float64)
    if reducer.kind == "batchmean":
        return ones.sum()
    mass = ones if sample_weight is None else sample_weight
    if not soft:
        kept = target != (DEFAULT_IGNORED if ignore_index is None else ignore_index)
        own = ones if weight is None else weight[torch.where(kept, target, 0).long()]
        mass = torch.where(kept, mass * own, 0.0)
    return mass.sum()
