"""The public losses.

Distributions are given by logits, with the classes last and leading dimensions free; log-probabilities are logits too.
Everything is in nats unless ``base`` says otherwise, twice differentiable in every floating-point argument, and exact
for confident rows, nearly equal distributions, masked classes (−inf) and offset logits.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from softcurve import checks, softmax
from softcurve.array_types import Float
from softcurve.autograd import row_losses
from softcurve.divergences import Divergence, ForwardKL, ReverseKL, jensen_shannon
from softcurve.objective import (
    DenseCrossEntropy,
    Entropy,
    IndexCrossEntropy,
    LogitDivergence,
    LogitMap,
    Reduction,
)
from softcurve.targets import Logits, Target, TopK, as_target


def cross_entropy(
    logits: Float[Tensor, "*rows classes"],
    target: Tensor | Target,
    *,
    weight: Float[Tensor, " classes"] | None = None,
    sample_weight: Float[Tensor, "*rows"] | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    temperature: float = 1.0,
    softcap: float | None = None,
    z_loss: float = 0.0,
    reduction: str = "mean",
    base: float = math.e,
) -> Float[Tensor, "*reduced"]:
    """``−(target * log_softmax(logits / temperature, -1)).sum(-1)``, reduced; exact also where this cancels.

    Args:
        logits: ``(..., C)``. −inf masks a class. Half precision is computed in float32 and returned in its own dtype.
        target: class indices ``(...)``; or a distribution ``(..., C)``: a floating-point tensor of probabilities or a
            :class:`~softcurve.Probabilities`, ``Logits``, ``TopK`` or ``LinearTeacher``, differentiable too. It is
            taken as it is: soft cap and temperature act on ``logits`` alone.
        weight: ``(C,)``, ≥ 0; a factor of each class in the target.
        sample_weight: ``(...)``; a factor of each row, z-loss included. A row of weight 0 has no part, whatever logits
            it holds.
        ignore_index: the class index of rows that have no part.
        label_smoothing: ``ε`` in [0, 1]: the target becomes ``(1 − ε) y + ε / C``.
        temperature: ``T`` in ``z / T``, after the soft cap.
        softcap: ``κ`` in ``κ tanh(z / κ)``.
        z_loss: ``λ`` in ``λ lse²``, on the log-sum-exp that the softmax sees; stays in squared nats.
        reduction: ``"none"``, ``"sum"``, ``"mean"`` (for class indices over the sum of the kept rows' weights, for
            distributions over the rows, as in torch; with ``sample_weight`` its weighted counterpart) or
            ``"batchmean"``.
        base: of the logarithm; 2 for bits.

    Raises:
        TypeError, ValueError: for an argument of the wrong type, shape or value, and for logits that hold NaN or +inf.

    Source: the seed's ``L(y, p) = −Σ_k y_k log p_k``, ``∂L/∂z = p − y``; ``∂²L/∂z² = diag(p) − p pᵀ``.
    """
    checks.require_floating("logits", logits)
    checks.require_between("label_smoothing", label_smoothing, 0.0, 1.0)
    checks.require_between("z_loss", z_loss, 0.0, math.inf)
    reducer, logit_map = Reduction(reduction, base), LogitMap(temperature, softcap)
    described = _CrossEntropy(weight, label_smoothing, z_loss * reducer.nats, logit_map)
    if weight is not None:
        require_class_weight(weight, logits.shape[-1])
    target = as_target(target)
    mass: Tensor | None = None
    if isinstance(target, Target):
        if isinstance(target, Logits) and sample_weight is not None and not sample_weight.requires_grad:
            checks.require_rows("sample_weight", sample_weight, logits.shape[:-1], "logits")
            target = Logits(torch.where((sample_weight == 0).unsqueeze(-1), 0.0, target.values))
        rows = described.against_distribution(logits, target)
    else:
        if isinstance(ignore_index, bool) or not isinstance(ignore_index, int):
            raise TypeError(f"ignore_index must be an int, got {type(ignore_index).__name__}")
        checks.require_rows("target", target, logits.shape[:-1], "logits")
        checks.require_class_indices("target", target, logits.shape[-1], ignore_index)
        rows, mass = described.against_indices(logits, target, ignore_index)
    return _reduced(rows, mass, sample_weight, reducer, logits.dtype, logits=logits)


def require_class_weight(weight: Tensor, classes: int) -> None:
    """One factor >= 0 per class."""
    checks.require_tensor("weight", weight)
    if not weight.is_floating_point() or tuple(weight.shape) != (classes,):
        raise ValueError(
            f"weight must be a floating-point tensor of one factor per class, shape ({classes},), "
            f"got {checks.describe(weight)}"
        )
    if checks.values_visible(weight) and not (weight >= 0).all():
        raise ValueError("weight must be >= 0 for every class, got a negative factor or NaN")


@dataclass(frozen=True)
class _CrossEntropy:
    """The options of a cross-entropy that shape its rows."""

    weight: Tensor | None
    smoothing: float
    z_loss: float
    logit_map: LogitMap

    def against_distribution(self, logits: Tensor, target: Target) -> Tensor:
        if target.coarsens:
            return self._against_coarse(logits, target)
        model, y = target.distribution_against(logits)
        return row_losses(DenseCrossEntropy(self.logit_map, self.z_loss), model, self._shaped(y, target, logits))

    def _against_coarse(self, logits: Tensor, target: Target) -> Tensor:
        """The map before the outcomes are made, which are those of the softmax; the z-loss on all classes."""
        if self.weight is not None:
            raise ValueError(
                "weight must be None for a TopK with tail='bucket', whose bucket has no class; "
                "use tail='renormalize' or sample_weight"
            )
        z = self.logit_map.value(_widened(logits))
        model, y = target.distribution_against(z)
        rows = row_losses(DenseCrossEntropy(LogitMap()), model, self._shaped(y, target, z))
        return rows + self.z_loss * torch.logsumexp(z, -1).square() if self.z_loss else rows

    def _shaped(self, y: Tensor, target: Target, logits: Tensor) -> Tensor:
        """Label smoothing and class weights act on the target."""
        if self.smoothing:
            y = (1 - self.smoothing) * y + self.smoothing * target.uniform_over(logits)
        return y if self.weight is None else y * self.weight

    def against_indices(self, logits: Tensor, target: Tensor, ignore_index: int) -> tuple[Tensor, Tensor]:
        """The rows, 0 where ignored, and the weight of each in a mean."""
        kept = target != ignore_index
        classes = torch.where(kept, target, 0)
        own = None if self.weight is None else self.weight[classes]
        if self.smoothing or (self.z_loss and own is not None):
            rows = row_losses(DenseCrossEntropy(self.logit_map, self.z_loss), logits, self._densified(logits, classes))
        else:
            rows = row_losses(IndexCrossEntropy(self.logit_map, self.z_loss), logits, classes)
            rows = rows if own is None else weighted(own, rows)
        mass = kept.to(rows.dtype) if own is None else torch.where(kept, own, 0.0)
        return torch.where(kept, rows, 0.0), mass

    def _densified(self, logits: Tensor, classes: Tensor) -> Tensor:
        """``(1 − ε) w_t`` at the class, ``ε w / C`` everywhere."""
        dtype = torch.promote_types(logits.dtype, torch.float32)
        weight = logits.new_ones(logits.shape[-1], dtype=dtype) if self.weight is None else self.weight.to(dtype)
        everywhere = (self.smoothing / logits.shape[-1]) * weight
        own = (1 - self.smoothing) * weight[classes]
        return everywhere.expand(logits.shape).scatter_add(-1, classes.unsqueeze(-1), own.unsqueeze(-1))


def kl_divergence(
    p: Tensor | Target,
    q: Tensor | Target,
    *,
    sample_weight: Float[Tensor, "*rows"] | None = None,
    temperature: float = 1.0,
    reduction: str = "batchmean",
    base: float = math.e,
) -> Float[Tensor, "*reduced"]:
    """``(softmax(p) * (log_softmax(p, -1) - log_softmax(q, -1))).sum(-1)``: ``D(P‖Q)``, as on paper, never negative.

    Forward KL of a model ``q`` against a target ``p``; exchange them for the reverse. Both sides receive gradients.

    Args:
        p: logits ``(..., C)``, or a :class:`~softcurve.Probabilities`, ``Logits``, ``LinearTeacher`` or (one side)
            ``TopK``.
        q: likewise.
        sample_weight: ``(...)``; a factor of each row.
        temperature: ``T``; both sides become ``softmax(z / T)``.
        reduction: ``"none"``, ``"sum"``, ``"mean"`` (over the rows, or the sum of their weights) or ``"batchmean"``.
        base: of the logarithm; 2 for bits.

    ``+inf`` where ``P`` has mass on a class that ``Q`` excludes; ``0 log 0 = 0``.

    Raises:
        TypeError, ValueError: for an argument of the wrong type, shape or value, and for logits that hold NaN or +inf.

    Source: the seed's ``D(P‖Q) = Σ_i p_i log(p_i/q_i)``, summed as ``Σ_i p_i h(log(q_i/p_i))``,
    ``h(t) = e^t − 1 − t ≥ 0``.
    """
    return _divergence(ForwardKL(), p, q, sample_weight, temperature, Reduction(reduction, base))


def js_divergence(
    p: Tensor | Target,
    q: Tensor | Target,
    *,
    beta: float = 0.5,
    sample_weight: Float[Tensor, "*rows"] | None = None,
    temperature: float = 1.0,
    reduction: str = "batchmean",
    base: float = math.e,
) -> Float[Tensor, "*reduced"]:
    """``beta * D(P‖M) + (1 − beta) * D(Q‖M)`` with ``M = beta * P + (1 − beta) * Q``; symmetric at ``beta = ½``.

    The ends are those of the field: ``beta = 0`` is ``D(P‖Q)`` and ``beta = 1`` is ``D(Q‖P)``, exactly; between them
    this is the mixture's formula, which tends to 0 towards the ends (divided by ``beta (1 − beta)`` it tends to the
    two KLs). Arguments, errors and units are those of :func:`kl_divergence`.

    Source: Lin (1991), "Divergence measures based on the Shannon entropy", with weights ``beta`` and ``1 − beta``.
    """
    checks.require_between("beta", beta, 0.0, 1.0)
    return _divergence(jensen_shannon(beta), p, q, sample_weight, temperature, Reduction(reduction, base))


def _divergence(
    divergence: Divergence,
    p: Tensor | Target,
    q: Tensor | Target,
    sample_weight: Tensor | None,
    temperature: float,
    reducer: Reduction,
) -> Tensor:
    """``divergence`` of target ``p`` and model ``q``; a top-k list cannot be the model, so there they change places."""
    p, q = _by_logits("p", p), _by_logits("q", q)
    if isinstance(q, TopK):
        divergence, p, q = divergence.exchanged(), q, p
    if isinstance(p, TopK):
        require_finite_against(divergence, p, temperature)
    model = q.logits()
    if isinstance(p, TopK):
        model, target = p.against(model)
    else:
        target = p.logits()
        if target.shape != model.shape:
            raise ValueError(
                f"p and q must have one shape (..., C), got {tuple(target.shape)} and {tuple(model.shape)}; "
                "expand the smaller one"
            )
    dtype = torch.promote_types(model.dtype, target.dtype)
    logit_map = LogitMap(temperature)
    target = target if logit_map.is_identity else logit_map.value(_widened(target))
    rows = row_losses(LogitDivergence(logit_map, divergence=divergence), model, target)
    return _reduced(rows, None, sample_weight, reducer, dtype, p=target, q=model)


def _by_logits(name: str, side: Tensor | Target) -> Target:
    """A plain tensor is logits here: a divergence has no class indices, and probabilities say that they are."""
    if isinstance(side, Target):
        return side
    if isinstance(side, Tensor) and not side.is_floating_point():
        raise TypeError(
            f"{name} must be logits (floating point) or a softcurve target, got {side.dtype}; "
            "for class indices use softcurve.cross_entropy, which is D(target‖model) there"
        )
    checks.require_floating(name, side)
    return Logits(side)


def require_finite_against(divergence: Divergence, listed: TopK, temperature: float) -> None:
    """A divergence that a list can be compared by, at a temperature that it can have."""
    if listed.tail == "renormalize" and isinstance(divergence, ReverseKL):
        raise ValueError(
            "a TopK with tail='renormalize' is zero outside its list, so D(model‖list) is infinite; use tail='bucket', "
            "the forward direction, or a Jensen-Shannon divergence between the ends"
        )
    if listed.tail == "bucket" and temperature != 1:
        raise ValueError(
            f"temperature must be 1 for a TopK with tail='bucket', got {temperature}: the bucket cannot be "
            "tempered, its classes being unknown; use tail='renormalize', or log-probabilities of that temperature"
        )


def entropy(logits: Float[Tensor, "*rows classes"], *, base: float = math.e) -> Float[Tensor, "*rows"]:
    """``−(softmax(logits) * log_softmax(logits)).sum(-1)``: ``H(p)`` of each row, ``(...)``, in nats or of ``base``.

    Raises:
        TypeError, ValueError: for logits that are not floating point, hold NaN or +inf, or mask every class.

    Source: the seed's ``H(p) = −Σ_i p_i log p_i``; ``∂H/∂z = −p ⊙ (log p + H)``.
    """
    checks.require_floating("logits", logits)
    rows = row_losses(Entropy(LogitMap()), logits, logits.new_zeros(logits.shape[:-1], dtype=torch.int64))
    return _reduced(rows, None, None, Reduction("none", base), logits.dtype, logits=logits)


def softmax_jacobian(logits: Float[Tensor, "*rows classes"]) -> Float[Tensor, "*rows classes classes"]:
    """``diag(p) − p pᵀ`` with ``p = softmax(logits)``: ``∂p/∂z``, ``(..., C, C)``; symmetric, and its rows sum to 0.

    For the product with a vector use :func:`softmax_jacobian_product`, which costs ``O(C)`` and no matrix.

    Raises:
        TypeError, ValueError: for logits that are not floating point or have no class dimension.

    Source: the seed's ``∂p_i/∂z_j = p_i (1_{i=j} − p_j)``.
    """
    checks.require_floating("logits", logits)
    return softmax.jacobian(_widened(logits)).to(logits.dtype)


def softmax_jacobian_product(
    logits: Float[Tensor, "*rows classes"], vector: Float[Tensor, "*rows classes"]
) -> Float[Tensor, "*rows classes"]:
    """``softmax_jacobian(logits) @ vector`` as ``p ⊙ (v − p·v)``, ``(..., C)``; also the product with the transpose.

    Raises:
        TypeError, ValueError: for arguments that are not floating point, or of different shapes.

    Source: the seed's ``J = diag(p) − p pᵀ``.
    """
    checks.require_floating("logits", logits)
    checks.require_floating("vector", vector)
    if vector.shape != logits.shape:
        raise ValueError(
            f"vector must have the shape {tuple(logits.shape)} of logits, got {checks.describe(vector)}; "
            "expand it first"
        )
    return softmax.jacobian_product(_widened(logits), _widened(vector)).to(logits.dtype)


def _widened(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def weighted(weight: Tensor, rows: Tensor) -> Tensor:
    """``weight ⊙ rows``; 0 in a row of weight 0 that is infinite or no number."""
    return weight * torch.where((weight == 0) & ~rows.isfinite(), 0.0, rows)


def _reduced(
    rows: Tensor,
    mass: Tensor | None,
    sample_weight: Tensor | None,
    reducer: Reduction,
    dtype: torch.dtype,
    **logits: Tensor,
) -> Tensor:
    """Rows in nats, weighted, reduced, and rounded once to the dtype of the result."""
    if sample_weight is not None:
        checks.require_rows("sample_weight", sample_weight, rows.shape, next(iter(logits)))
        checks.require_numbers("sample_weight", sample_weight)
    checks.explain_nan(rows, sample_weight, **logits)
    if sample_weight is not None:
        rows = weighted(sample_weight, rows)
        mass = sample_weight if mass is None else mass * sample_weight
    if reducer.nats != 1:
        rows = rows / reducer.nats
    result = reducer.apply(rows, mass)
    device = rows.device.type
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(
        device
    ):  # autocast keeps losses in float32, as for torch's own
        dtype = torch.promote_types(dtype, torch.float32)
    return result.to(dtype)
