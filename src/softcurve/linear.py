"""The public losses on features and a linear head: no logits are held.

Each equals its namesake in :mod:`softcurve.functional` on ``logits = linear(input, linear_weight, linear_bias)``, in
value, gradients and second derivatives. What they need beyond inputs and gradients stays within ``memory_budget``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from softcurve import checks
from softcurve.divergences import Divergence, ForwardKL, ReverseKL
from softcurve.functional import require_class_weight, require_finite_against, weighted
from softcurve.head.autograd import head_outcome
from softcurve.head.problem import HeadLoss, HeadTensors
from softcurve.objective import LogitMap, Reduction
from softcurve.targets import LinearTeacher, Logits, Probabilities, Target, TopK, as_target

NOT_GIVEN = -100  # torch's own default of ignore_index


class LossStats(NamedTuple):
    """Of the softmax of each row, detached: shape ``(...)`` as the rows of ``input``."""

    lse: Float[Tensor, "*rows"]  # log Σ e^z of what the softmax sees, in nats
    entropy: Float[Tensor, "*rows"]  # in units of ``base``
    predicted: Int[Tensor, "*rows"]  # the most probable class
    correct: Bool[Tensor, "*rows"]  # whether it is the target's (most probable) class; never in a row that is ignored


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
    head = _Head.of(input, linear_weight, linear_bias)
    if weight is not None:
        require_class_weight(weight, head.classes)
        if weight.requires_grad:
            raise ValueError(
                "weight must not require gradients, as in torch; detach it, or weigh rows by sample_weight"
            )
    target = target if isinstance(target, Tensor) and target.is_floating_point() else as_target(target)
    posed = _Posed(head, reducer, memory_budget, return_stats)
    options = {"temperature": temperature, "softcap": softcap, "z_loss": z_loss * reducer.nats}
    if isinstance(target, Tensor) and not target.is_floating_point():
        ignored = NOT_GIVEN if ignore_index is None else ignore_index
        return _against_indices(posed, target, ignored, weight, sample_weight, label_smoothing, shift, options)
    if ignore_index is not None:
        raise ValueError(
            f"ignore_index must not be given for a target that is a distribution, got {ignore_index}; "
            "use sample_weight to leave out rows"
        )
    _require_no_shift(shift)
    return _against_distribution(posed, target, weight, sample_weight, label_smoothing, options)


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
    posed = _Posed(_Head.of(input, linear_weight, linear_bias), Reduction(reduction, base), memory_budget, return_stats)
    _require_no_shift(shift)
    divergence = ForwardKL() if direction == "forward" else ReverseKL()
    return _divergence(posed, direction, 0.5, divergence, target, sample_weight, temperature, softcap)


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
    posed = _Posed(_Head.of(input, linear_weight, linear_bias), Reduction(reduction, base), memory_budget, return_stats)
    _require_no_shift(shift)
    family = {0.0: "forward", 1.0: "reverse"}.get(float(beta), "js")
    divergence = HeadLoss(family, "logits", beta).divergence
    return _divergence(posed, family, beta, divergence, target, sample_weight, temperature, softcap)


# --- the head --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Head:
    input: Tensor  # (n, d)
    weight: Tensor
    bias: Tensor | None
    leading: torch.Size
    dtype: torch.dtype  # of the result

    @staticmethod
    def of(input: Tensor, weight: Tensor, bias: Tensor | None) -> _Head:
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
        return _Head(input.reshape(-1, input.shape[-1]), weight, bias, leading, dtype)

    @property
    def classes(self) -> int:
        return len(self.weight)


def _lowered(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.to(dtype)


@dataclass(frozen=True)
class _Posed:
    """A head, and what is to be done with its rows."""

    head: _Head
    reducer: Reduction
    memory_budget: int | None
    return_stats: bool

    def __post_init__(self) -> None:
        budget = self.memory_budget
        if budget is not None and (isinstance(budget, bool) or not isinstance(budget, int) or budget < 1):
            raise ValueError(f"memory_budget must be a positive int of bytes, or None, got {budget!r}")

    @property
    def wide(self) -> torch.dtype:
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
        *,
        target: tuple[Tensor | None, Tensor | None, Tensor | None] = (None, None, None),
        indices: Tensor | None = None,
        label: Tensor | None = None,
        class_weight: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, LossStats]:
        """Rows of the given ``weight`` reduced; ``mass`` is what a mean divides by. ``counted`` rows can be correct.

        ``label`` is the target's class, ``(n,)``, where the pass does not see the whole target.
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
        outcome = head_outcome(loss, tensors, self.memory_budget, per_row=per_row, stats=self.return_stats)
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


def _against_indices(
    posed: _Posed,
    target: Tensor,
    ignore_index: int,
    weight: Tensor | None,
    sample_weight: Tensor | None,
    smoothing: float,
    shift: int,
    options: dict[str, float | None],
) -> Tensor | tuple[Tensor, LossStats]:
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


def _require_no_shift(shift: int) -> None:
    if shift != 0:
        raise ValueError(
            f"shift must be 0 unless the target holds class indices, got {shift!r}; "
            "a distribution belongs to its row: slice input and target instead"
        )


# --- distributions ---------------------------------------------------------------------------------------------------


def _against_distribution(
    posed: _Posed,
    target: Tensor | Target,
    weight: Tensor | None,
    sample_weight: Tensor | None,
    smoothing: float,
    options: dict[str, float | None],
) -> Tensor | tuple[Tensor, LossStats]:
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


def _divergence(
    posed: _Posed,
    family: str,
    beta: float,
    divergence: Divergence,
    target: Tensor | Target,
    sample_weight: Tensor | None,
    temperature: float,
    softcap: float | None,
) -> Tensor | tuple[Tensor, LossStats]:
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


def _rows_of_distributions(posed: _Posed, sample_weight: Tensor | None) -> tuple[Tensor, Tensor | float, Tensor]:
    """The rows' weights, what a mean divides by, and which rows count."""
    count = len(posed.head.input)
    everywhere = torch.ones(count, dtype=torch.bool, device=posed.head.input.device)
    sampled = posed.sample_weight(sample_weight)
    if sampled is None:
        return everywhere.to(posed.wide), float(count), everywhere
    return sampled, float(count) if posed.reducer.kind == "batchmean" else sampled.sum(), everywhere


def _dense_target(
    posed: _Posed, target: Tensor | Target
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
    if input.ndim != 2:
        raise ValueError(f"input must be of shape (N, d) for a weight of K dimensions, got {checks.describe(input)}")
    if shift:
        raise ValueError(f"shift must be 0 for a linear_weight of more than two dimensions, got {shift}")
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
        kept = target != (NOT_GIVEN if ignore_index is None else ignore_index)
        own = ones if weight is None else weight[torch.where(kept, target, 0)]
        mass = torch.where(kept, mass * own, 0.0)
    return mass.sum()
