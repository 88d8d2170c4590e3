"""The public losses on logits.

Distributions are given by logits, with the classes last, or in dimension ``dim``, and the other dimensions free;
log-probabilities are logits too.
Every loss is in nats unless ``base`` is given, twice differentiable with respect to every floating-point argument, and
exact for confident rows, nearly equal distributions, masked classes (−inf) and logits with a common offset.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from softcurve import checks
from softcurve.array_types import Float
from softcurve.losses import softmax
from softcurve.losses.autograd import row_losses
from softcurve.losses.class_map import GroupedTarget
from softcurve.losses.divergences import CrossEntropy, Divergence, ForwardKL, divergence_of
from softcurve.losses.few_logits import few_logits_loss
from softcurve.losses.labels import Labels, count_alike, cross_entropy_target
from softcurve.losses.reduction import Reduction, weighted
from softcurve.losses.rows import (
    DenseCrossEntropy,
    Entropy,
    LogitDivergence,
    cross_entropy_options,
)  # fmt: skip
from softcurve.losses.spec import LogitMap
from softcurve.losses.targets import Logits, Target, excluded_mask, uniform_over_unmasked, with_classes_last
from softcurve.losses.topk import TopK
from softcurve.typing import Integer, Number, ReductionKind
from softcurve.warn import warn_caller

__all__ = [
    "cross_entropy", "divergence", "entropy", "js_divergence", "kl_divergence", "softmax_jacobian",
    "softmax_jacobian_product",
]  # fmt: skip


def __dir__() -> list[str]:
    return __all__


def cross_entropy(
    logits: Float[Tensor, "*any"], target: Tensor | Target, *,
    weight: Float[Tensor, " classes"] | None = None, sample_weight: Float[Tensor, "*rows"] | None = None,
    ignore_index: Integer | None = -100, label_smoothing: Number = 0.0, temperature: Number = 1.0,
    softcap: Number | None = None, z_loss: Number = 0.0, reduction: ReductionKind = "mean", base: Number = math.e,
    exclude: Tensor | None = None, dim: Integer = -1,
) -> Float[Tensor, "*reduced"]:  # fmt: skip
    """Return ``−(target * log_softmax(logits / temperature, -1)).sum(-1)``, reduced, but exact where this cancels.

    Args:
        logits: ``(..., C)``, with the classes last unless ``dim`` says otherwise. −inf masks a class.
        target: Class indices ``(...)``; or a distribution ``(..., C)``: a floating-point tensor of probabilities, whose
            rows may have any sum, as in torch; or a :class:`~softcurve.Probabilities`, ``Logits``, ``TopK`` or
            ``LinearTeacher``. Distributions receive gradients. Soft cap and temperature apply to ``logits`` only.
        weight: ``(C,)``, ≥ 0: a factor of each class in the target, which receives no gradient.
        sample_weight: ``(...)``: a factor of each row, z-loss included. A row of weight 0 does not contribute to value
            and gradients, and its logits and target may hold anything.
        ignore_index: The class index of rows that do not contribute; ``None`` is −100. Only for class indices.
        label_smoothing: ``ε`` in [0, 1]: the target becomes ``(1 − ε) y + ε / C``, where ``C`` counts the classes that
            are not masked; a masked class has no share.
        temperature: ``T`` in ``z / T``, after the soft cap.
        softcap: ``κ`` in ``κ tanh(z / κ)``.
        z_loss: ``λ`` in ``λ lse²``, on the log-sum-exp that the softmax sees, in squared nats for every ``base``.
        reduction: ``"none"``; ``"sum"``; ``"mean"``, the sum over ``Σ_i w_i``, where ``w_i`` is the row's
            ``sample_weight`` (default 1), for class indices times the class weight of its target, and 0 for an ignored
            row; or ``"batchmean"``, the sum over ``logits.shape[0]``, 1 for a single row. A divisor of 0 gives NaN with
            gradient 0.
        base: The base of the logarithm; 2 for bits.
        exclude: ``(..., k)``: class indices that have no part in the softmax of their row, such as the items that a
            user has already seen; −1 and repeated indices fill rows that exclude fewer. They are classes of logit −inf:
            without probability, gradient and share of the label smoothing. The softmax of a target given by ``Logits``
            or a ``LinearTeacher`` leaves them out too. Class indices, probabilities and a ``TopK`` state what mass the
            target has; the loss is ``+inf`` if an excluded class has some.
        dim: The dimension of the classes in ``logits``: ``dim=1`` is torch's layout ``(N, C, d_1, ...)``. No copy is
            made. Distributions have their classes, a ``TopK`` its lists and ``exclude`` its indices in the same
            dimension; a ``LinearTeacher`` has its features last. Class indices and ``sample_weight`` have the shape of
            the rows, that of ``logits`` without ``dim``, whose first dimension is the divisor of ``"batchmean"``.

    Returns:
        The loss in float32, or float64 if ``logits`` or a distribution are float64. torch returns the loss of
        half-precision logits in half precision, which rounds it by up to 0.4 % (bfloat16).

    Raises:
        TypeError, ValueError: If an argument has a wrong type, shape or value. NaN or +inf in a row that counts is an
            error in eager mode on the CPU; elsewhere it gives NaN.

    Example:
        >>> loss = softcurve.cross_entropy(torch.zeros(2, 4), torch.tensor([0, 3]), base=2)  # 2 bits

    Source: Bishop (2006), "Pattern Recognition and Machine Learning", eqs. 4.108 to 4.110:
    ``L(y, p) = −Σ_k y_k log p_k``, ``∂L/∂z = p − y``, ``∂²L/∂z² = diag(p) − p pᵀ``.
    """
    name, options = "logits", (reduction, base, temperature, softcap, z_loss, label_smoothing)
    if weight is sample_weight is exclude is None and type(dim) is int and dim == -1:
        few = few_logits_loss(options, logits, target, ignore_index)
        if few is not None:
            return few
    if dim != -1:
        logits, target, exclude = with_classes_last(dim, logits=logits, target=target, exclude=exclude)
        name = f"logits.movedim({dim}, -1)"
    checks.require_floating("logits", logits)
    classes = logits.shape[-1]
    reducer, of_class = cross_entropy_options(*options)
    row_loss = DenseCrossEntropy(of_class.logit_map, of_class.z_loss)
    target, ignore_index = cross_entropy_target(target, ignore_index, weight, classes)
    weight = None if weight is None else checks.widened(weight)
    sample_weight = _checked_weight(sample_weight, logits.shape[:-1], name)
    mask = excluded_mask(checks.require_exclude(exclude, logits.shape[:-1], classes), classes)
    logits = _masked(logits, mask)
    dtype, mean_weight = logits.dtype, sample_weight
    if isinstance(target, Target):
        dtype = torch.promote_types(dtype, target.dtype)
        if mask is not None or isinstance(target, TopK):
            target.require_fit(logits.shape)
        if isinstance(target, TopK):
            logits = _cleared(logits, sample_weight)
        target = target.checked(sample_weight, classes).excluding(mask, checks.wide_dtype(dtype))
        rows = _against_distribution(row_loss, logits, target, weight, of_class.smoothing)
    else:
        checks.require_rows("target", target, logits.shape[:-1], name, classes)
        unweighted, smoothing = weight is None and sample_weight is None, of_class.smoothing
        if unweighted and count_alike(target, classes, ignore_index) and not (smoothing and _masks_any(logits, None)):
            rows = row_losses(of_class, logits, target)
        else:
            labels = Labels.of(target, sample_weight, weight, classes, ignore_index, checks.wide_dtype(dtype))
            sample_weight, mean_weight = labels.weight, labels.mean_weight
            # A class weight is one factor of the row unless there are other terms.
            weighs_terms = weight is not None and (smoothing or of_class.z_loss)
            if weighs_terms or (smoothing and _masks_any(logits, labels.weight)):
                rows = row_losses(row_loss, logits, _densified(smoothing, logits, labels, weight))
            else:
                rows, sample_weight = row_losses(of_class, logits, labels.classes), mean_weight
    return _reduced(rows, sample_weight, mean_weight, reducer, dtype, logits=logits)


def _masks_any(logits: Tensor, row_weight: Tensor | None) -> bool:
    """Return whether a class may be masked in a row that counts: then smoothing is not the same for all classes."""
    if not softmax.may_be_masked(logits):
        return False
    if not checks.values_visible(logits, *(() if row_weight is None else (row_weight,))):
        return True
    masked = (logits == -math.inf).any(-1)
    return bool((masked if row_weight is None else masked & (row_weight != 0)).any())


def _against_distribution(
    row_loss: DenseCrossEntropy, logits: Tensor, target: Target, weight: Tensor | None, smoothing: float
) -> Tensor:
    """Return the cross-entropy of each row; the classes of a bucket are merged after the logit map."""
    z = logits
    if target.merges_tail:
        logits = checks.widened(logits)  # once for both parts, so that the sum of their gradients is rounded once
        z, _ = row_loss.logit_map.shifted_value(logits)
    model, y = target.distribution_against(z)
    if smoothing or weight is not None:
        y = y.to(checks.wide_dtype(y.dtype, z.dtype))
    if smoothing:
        y = (1 - smoothing) * y + smoothing * target.uniform_over(z)
    y = y if weight is None else y * weight
    if not target.merges_tail:
        return row_losses(row_loss, model, y)
    rows = row_losses(DenseCrossEntropy(LogitMap()), model, y)
    if row_loss.z_loss:  # The z-loss is over all classes: it is the loss of a target without mass.
        rows = rows + row_losses(row_loss, logits, z.new_zeros(()).expand(z.shape))
    return rows


def _densified(smoothing: float, logits: Tensor, labels: Labels, weight: Tensor | None) -> Tensor:
    """Return ``(1 − ε) w_t`` at the class, and ``ε w / C`` at each of the ``C`` classes that are not masked."""
    everywhere = smoothing * uniform_over_unmasked(logits)
    at_class = torch.full_like(labels.classes, 1 - smoothing, dtype=everywhere.dtype)
    if weight is not None and labels.class_weight is not None:
        everywhere, at_class = everywhere * weight, at_class * labels.class_weight
    return everywhere.expand(logits.shape).scatter_add(
        -1, labels.classes.unsqueeze(-1), at_class.to(everywhere.dtype).unsqueeze(-1)
    )


def kl_divergence(
    p: Tensor | Target, q: Tensor | Target, *, sample_weight: Float[Tensor, "*rows"] | None = None,
    temperature: Number = 1.0, reduction: ReductionKind = "mean", base: Number = math.e,
    exclude: Tensor | None = None, dim: Integer = -1,
) -> Float[Tensor, "*reduced"]:  # fmt: skip
    """Return ``(softmax(p) * (log_softmax(p, -1) - log_softmax(q, -1))).sum(-1)``, ``D(P‖Q) ≥ 0``, reduced.

    This is the forward KL of a model ``q`` against a target ``p``, which is mode-covering; exchange them for the
    reverse. Both sides receive gradients. The value is ``+inf`` where ``P`` has mass on a class that ``Q`` excludes,
    and ``0 log 0 = 0``. It is float32, or float64 if either side is.

    Args:
        p: Logits ``(..., C)``, or a :class:`~softcurve.Probabilities`, ``Logits``, ``LinearTeacher`` or (one side)
            ``TopK``. A plain tensor is logits, unlike a target of :func:`cross_entropy`; on the CPU a warning says so
            if its rows look like probabilities.
        q: The same as ``p``.
        sample_weight: ``(...)``: a factor of each row. A row of weight 0 may hold anything.
        temperature: ``T``; both sides become ``softmax(z / T)``.
        reduction: ``"none"``; ``"sum"``; ``"mean"``, ``Σ_i w_i D_i / Σ_i w_i`` over all rows, where ``w_i`` is the
            row's ``sample_weight`` (default 1); or ``"batchmean"``, ``Σ_i w_i D_i / q.shape[0]`` (1 for a single row),
            as in ``torch.nn.functional.kl_div``, whose own ``"mean"`` divides by the number of entries. A divisor of 0
            gives NaN with gradient 0.
        base: The base of the logarithm; 2 for bits.
        exclude: ``(..., k)``: class indices that have no part in a row's softmax, on neither side, as in
            :func:`cross_entropy`. ``Probabilities`` and a ``TopK`` keep the mass that they state.
        dim: The dimension of the classes on both sides, as in :func:`cross_entropy`.

    Raises:
        TypeError, ValueError: As in :func:`cross_entropy`.

    Example:
        >>> loss = softcurve.kl_divergence(softcurve.Probabilities(torch.tensor([[0.7, 0.3]])), torch.zeros(1, 2))

    Source: Kullback and Leibler (1951), "On information and sufficiency": ``D(P‖Q) = Σ_i p_i log(p_i/q_i)``, summed as
    ``Σ_i p_i h(log(q_i/p_i))`` with ``h(t) = e^t − 1 − t ≥ 0``.
    """
    reducer = Reduction.of(reduction, base)
    return _divergence(ForwardKL(), p, q, sample_weight, LogitMap.of(temperature), reducer, exclude, dim)


def js_divergence(
    p: Tensor | Target, q: Tensor | Target, *, beta: Number = 0.5, sample_weight: Float[Tensor, "*rows"] | None = None,
    temperature: Number = 1.0, reduction: ReductionKind = "mean", base: Number = math.e,
    exclude: Tensor | None = None, dim: Integer = -1,
) -> Float[Tensor, "*reduced"]:  # fmt: skip
    """Return ``beta * D(P‖M) + (1 − beta) * D(Q‖M)`` with ``M = beta * P + (1 − beta) * Q``, reduced.

    It is symmetric at ``beta = ½``. By the convention of the field, ``beta = 0`` is ``D(P‖Q)`` and ``beta = 1`` is
    ``D(Q‖P)``, exactly; between them this is the mixture's formula, which tends to 0 towards the ends (divided by
    ``beta (1 − beta)`` it tends to the two KLs). Arguments, errors and units are those of :func:`kl_divergence`.

    Example:
        >>> loss = softcurve.js_divergence(torch.randn(3, 5), torch.randn(3, 5), beta=0.5)

    Source: Lin (1991), "Divergence measures based on the Shannon entropy", with weights ``beta`` and ``1 − beta``.
    """
    divergence = divergence_of("js", checks.require_between("beta", beta, 0.0, 1.0))
    reducer = Reduction.of(reduction, base)
    return _divergence(divergence, p, q, sample_weight, LogitMap.of(temperature), reducer, exclude, dim)


def divergence(
    target: Tensor | Target, logits: Tensor | Target, *, divergence: Divergence,
    sample_weight: Float[Tensor, "*rows"] | None = None, temperature: Number = 1.0, reduction: ReductionKind = "mean",
    base: Number = math.e, exclude: Tensor | None = None, dim: Integer = -1,
) -> Float[Tensor, "*reduced"]:  # fmt: skip
    """Return a divergence ``D(y, p) = Σ_k φ(p_k, y_k)`` between a target ``y`` and ``p = softmax(logits)``, reduced.

    Args:
        target: The same as ``p`` of :func:`kl_divergence`: logits, or a wrapped distribution; for ``CrossEntropy()``
            the same as the target of :func:`cross_entropy`.
        logits: The same as ``q`` of :func:`kl_divergence`, ``(..., C)``.
        divergence: A divergence such as :class:`~softcurve.AlphaDivergence`, :class:`~softcurve.SkewKL` or
            ``JensenShannon``, or an instance of your own subclass of :class:`~softcurve.Divergence`.

    The other arguments, errors and units are those of :func:`kl_divergence`.

    Example:
        >>> y, z = torch.tensor([[0.7, 0.3]]), torch.zeros(1, 2)
        >>> value = softcurve.divergence(softcurve.Probabilities(y), z, divergence=softcurve.AlphaDivergence(0.5))

    Source: Csiszár (1967), "Information-type measures of difference of probability distributions and indirect
    observations", for the family; ``∂D/∂z = s − p Σs`` with ``s = p ∂φ/∂p``.
    """
    divergence = divergence_of(divergence)
    reducer, logit_map = Reduction.of(reduction, base), LogitMap.of(temperature)
    if type(divergence) is CrossEntropy:
        if isinstance(logits, Target):
            raise TypeError(f"logits must be a tensor for a cross-entropy, got {type(logits).__name__}")
        return cross_entropy(
            logits, target, sample_weight=sample_weight, temperature=temperature, reduction=reduction, base=base,
            exclude=exclude, dim=dim,
        )  # fmt: skip
    names = ("target", "logits")
    return _divergence(divergence, target, logits, sample_weight, logit_map, reducer, exclude, dim, names)


def _divergence(
    divergence: Divergence, p: Tensor | Target, q: Tensor | Target, sample_weight: Tensor | None, logit_map: LogitMap,
    reducer: Reduction, exclude: Tensor | None, dim: Integer, names: tuple[str, str] = ("p", "q"),
) -> Tensor:  # fmt: skip
    """Return the loss of target ``p`` and model ``q``; a list or groups can be the target only."""
    if dim != -1:
        p, q, exclude = with_classes_last(dim, **{names[0]: p, names[1]: q}, exclude=exclude)
    target, model = _as_logits(names[0], p), _as_logits(names[1], q)
    dtype = torch.promote_types(target.dtype, model.dtype)
    if isinstance(model, TopK | GroupedTarget):
        divergence, target, model = divergence.exchanged(), model, target
    if isinstance(target, TopK):
        target.require_comparable(divergence)
    sample_weight = _checked_weight(sample_weight, model.leading, names[1])
    for name, side in zip(names, (p, q), strict=True):
        if isinstance(side, Tensor):
            _warn_of_probabilities(name, side, sample_weight)
    wide = checks.wide_dtype(dtype)
    z = _logits_of(model, sample_weight, wide)
    mask = excluded_mask(checks.require_exclude(exclude, z.shape[:-1], z.shape[-1]), z.shape[-1])
    z = z if model.states_mass else _masked(z, mask)
    if isinstance(target, TopK):
        target.require_fit(z.shape)
        z = _cleared(z, sample_weight)
        if target.merges_tail:  # whose classes are merged after the temperature
            z, _ = logit_map.shifted_value(z.to(wide))
        z, y = target.checked(sample_weight, z.shape[-1]).against(z, logit_map.temperature)
        logit_map = LogitMap() if target.merges_tail else logit_map
    elif isinstance(target, GroupedTarget):
        target.require_fit(z.shape)
        z, y = target.checked(sample_weight, z.shape[-1]).tempered(_cleared(z, sample_weight), logit_map)
        logit_map = LogitMap()
    else:
        y = _logits_of(target, sample_weight, wide)
        if y.shape != z.shape:
            remedy = checks.shape_remedy(y.shape, z.shape, f"{names[0]}[..., :{{classes}}]")
            raise ValueError(
                f"{names[0]} and {names[1]} must have one shape (..., C), "
                f"got {tuple(y.shape)} and {tuple(z.shape)}{remedy or '; expand the smaller one'}"
            )
        y = y if target.states_mass else _masked(y, mask)
    if not logit_map.is_identity:
        y, _ = logit_map.shifted_value(y.to(wide))
    rows = row_losses(LogitDivergence(logit_map, divergence=divergence), z, y)
    return _reduced(rows, sample_weight, sample_weight, reducer, dtype, **{names[0]: y, names[1]: z})


def _masked(logits: Tensor, mask: Tensor | None) -> Tensor:
    """Return logits with −inf at the classes that a row excludes."""
    return logits if mask is None else torch.where(mask, -math.inf, logits)


def _cleared(logits: Tensor, sample_weight: Tensor | None) -> Tensor:
    """Return logits whose malformed rows of weight 0 are finite, since a list merges classes before weights apply."""
    return logits if sample_weight is None else Logits(logits).checked(sample_weight, 0).values


def _logits_of(side: Target, sample_weight: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Return the logits of one side over all classes; given logits need no clearing of rows of weight 0."""
    checked = side if isinstance(side, Logits | TopK | GroupedTarget) else side.checked(sample_weight, 0)
    return checked.logits(dtype)


def _as_logits(name: str, side: Tensor | Target) -> Target:
    """Read a plain tensor as logits: a divergence has no class indices, and probabilities are wrapped."""
    if isinstance(side, Target):
        return side
    if isinstance(side, Tensor) and not side.is_floating_point():
        raise TypeError(
            f"{name} must be logits (floating point) or a softcurve target, got {side.dtype}; "
            "for class indices use softcurve.cross_entropy, which is D(target‖model) there"
        )
    checks.require_floating(name, side)
    return Logits(side)


def _warn_of_probabilities(name: str, side: Tensor, sample_weight: Tensor | None) -> None:
    """Warn if the rows of plain logits that count look like probabilities."""
    counted = None if sample_weight is None or sample_weight.shape != side.shape[:-1] else sample_weight != 0
    if checks.look_like_probabilities(side, counted):
        warn_caller(
            f"{name} is read as logits, but its rows look like probabilities (entries in [0, 1] that sum to 1); wrap "
            f"them as softcurve.Probabilities({name}), or as softcurve.Logits({name}) if they are logits"
        )


def entropy(logits: Float[Tensor, "*any"], *, base: Number = math.e, dim: Integer = -1) -> Float[Tensor, "*rows"]:
    """Return the entropy ``−(softmax(logits, dim) * log_softmax(logits, dim)).sum(dim)`` of each row.

    Raises:
        TypeError, ValueError: If the logits are not floating point, hold NaN or +inf, or mask every class.

    Example:
        >>> bits = softcurve.entropy(torch.zeros(3, 4), base=2)  # 2 in each row

    Source: Shannon (1948), "A mathematical theory of communication": ``H(p) = −Σ_i p_i log p_i``, whose gradient is
    ``∂H/∂z = −p ⊙ (log p + H)``.
    """
    (logits,) = with_classes_last(dim, logits=logits)
    checks.require_floating("logits", logits)
    rows = row_losses(Entropy(LogitMap()), logits, logits.new_zeros(logits.shape[:-1], dtype=torch.int64))
    return _reduced(rows, None, None, Reduction.of("none", base), logits.dtype, logits=logits)


def softmax_jacobian(logits: Float[Tensor, "*any"], *, dim: Integer = -1) -> Float[Tensor, "*rows classes classes"]:
    """Return ``∂p/∂z = diag(p) − p pᵀ`` of ``p = softmax(logits, dim)``, ``(..., C, C)``, whose rows sum to 0.

    The matrix is in the last two dimensions, whatever ``dim`` is. The product with a vector costs only ``O(C)`` by
    :func:`softmax_jacobian_product`.

    Raises:
        TypeError, ValueError: If the logits are not floating point or have no class dimension.

    Example:
        >>> jacobian = softcurve.softmax_jacobian(torch.randn(3, 5))  # (3, 5, 5)

    Source: Bishop (2006), eq. 4.106: ``∂p_i/∂z_j = p_i (1_{i=j} − p_j)``.
    """
    (logits,) = with_classes_last(dim, logits=logits)
    checks.require_floating("logits", logits)
    return softmax.jacobian(checks.widened(logits)).to(logits.dtype)


def softmax_jacobian_product(
    logits: Float[Tensor, "*any"], vector: Float[Tensor, "*any"], *, dim: Integer = -1
) -> Float[Tensor, "*any"]:
    """Return ``softmax_jacobian(logits) @ vector``, as ``p ⊙ (v − p·v)``, of the shape of both; ``J`` is symmetric.

    The classes are in dimension ``dim``.

    Raises:
        TypeError, ValueError: If an argument is not floating point, or the shapes differ.

    Example:
        >>> product = softcurve.softmax_jacobian_product(torch.randn(3, 5), torch.randn(3, 5))

    Source: Bishop (2006), eq. 4.106: ``J = diag(p) − p pᵀ``.
    """
    checks.require_floating("logits", logits)
    checks.require_floating("vector", vector)
    if vector.shape != logits.shape:
        raise ValueError(
            f"vector must have the shape {tuple(logits.shape)} of logits, got {checks.describe(vector)}; "
            "expand it first"
        )
    z, v = with_classes_last(dim, logits=logits, vector=vector)
    product = softmax.jacobian_product(checks.widened(z), checks.widened(v)).to(logits.dtype)
    return product.movedim(-1, checks.require_dim(dim))


def _checked_weight(sample_weight: Tensor | None, rows: Sequence[int], against: str) -> Tensor | None:
    """Check the weights of rows and return them in float32 or wider."""
    if sample_weight is None:
        return None
    checks.require_rows("sample_weight", sample_weight, rows, against)
    checks.require_numbers("sample_weight", sample_weight)
    return checks.widened(sample_weight)


def _reduced(
    rows: Tensor, row_weight: Tensor | None, mean_weight: Tensor | None, reducer: Reduction, dtype: torch.dtype,
    **logits: Tensor,
) -> Tensor:  # fmt: skip
    """Weight and reduce rows in nats; the result is of ``dtype``, or float32 if that is narrower."""
    counted = rows if row_weight is None else weighted(row_weight, rows)
    counted = counted if reducer.nats == 1 else counted / reducer.nats
    result = reducer.apply(counted, mean_weight)
    if result.ndim or not checks.values_visible(result) or math.isnan(result.item()):
        checks.explain_nan(rows, row_weight, logits)
    return result.to(checks.wide_dtype(dtype))
