"""The curvature of one head on one set of rows, with respect to its features, weight and bias."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, TypeVar, Unpack, get_args

import torch
from torch import Tensor

from softcurve import checks
from softcurve.array_types import Float
from softcurve.curvature.kfac import FactorForm, KroneckerFactors, StreamedClassFactor, split_rows, weighted_moment
from softcurve.curvature.losses import HeadLosses, LossOptions, with_options_of
from softcurve.curvature.split import require_classes
from softcurve.head import curvature, loop, per_row
from softcurve.head.products import Direction
from softcurve.losses.low_rank import LowRankWeight, matrix_of
from softcurve.losses.rows import GAUSS_NEWTON, HESSIAN
from softcurve.losses.targets import Target

MatrixName = Literal["hessian", "gauss_newton", "fisher"]
PositiveMatrixName = Literal["gauss_newton", "fisher"]
PartName = Literal["input", "weight", "bias"]
PARTS: tuple[PartName, ...] = ("input", "weight", "bias")

OneOrMany = TypeVar("OneOrMany", Direction, list[Direction])


class HeadCurvature:
    """The second derivatives of ``linear_cross_entropy(input, linear_weight, target, ...)`` and the other losses.

    Args:
        input: features ``(..., d)``.
        linear_weight: ``(C, d)``; for a :class:`~softcurve.LowRankWeight` the derivatives are those with respect to the
            sum.
        target: as for the loss.
        linear_bias: ``(C,)``.
        loss: ``"cross_entropy"``, ``"forward_kl"`` (``D(target‖model)``), ``"reverse_kl"`` or ``"js"``.
        sample_weight: ``(...)``; a factor of each row.
        exclude: ``(..., k)``; class indices that have no part in a row's softmax, or −1.

    The other options are those of :func:`softcurve.linear_cross_entropy` and the other losses. Every result is
    computed tile by tile, and nothing records a graph.

    Raises:
        TypeError, ValueError: what the loss raises.

    Source: ``B = diag(q) − q pᵀ − p qᵀ + (Σq) p pᵀ`` for every loss of the family.
    """

    @with_options_of(HeadLosses.of)
    def __init__(
        self, input: Float[Tensor, "*rows features"],
        linear_weight: Float[Tensor, "classes features"] | LowRankWeight, target: Tensor | Target, *,
        linear_bias: Float[Tensor, " classes"] | None = None, sample_weight: Tensor | None = None,
        exclude: Tensor | None = None, **options: Unpack[LossOptions],
    ) -> None:  # fmt: skip
        if isinstance(linear_weight, Tensor | LowRankWeight) and len(linear_weight.shape) == 2:
            require_classes("linear_weight.shape[0]", linear_weight.shape[0])
        self.losses = HeadLosses.of(**options)
        problem = self.losses.problem(input, linear_weight, linear_bias, target, sample_weight, exclude)
        divisor = float(problem.divisor(self.losses.reducer))
        if divisor == 0:
            raise ValueError("target must have a row that counts, got none; see ignore_index and sample_weight")
        self.rows, self.scale = self.losses.rows(problem), 1 / divisor
        self.arguments = (input.detach(), matrix_of(linear_weight).detach(), linear_bias)
        self.layout, self.weight = problem.head.layout, problem.head.weight
        self.leading = problem.head.leading  # of this process's rows

    def __repr__(self) -> str:
        t = self.rows.tensors
        shape = f"rows={len(t.input)}, classes={self.arguments[1].shape[0]}, features={t.weight.shape[1]}"
        dtype = str(t.dtype).removeprefix("torch.")
        return f"HeadCurvature({shape}, loss={self.losses.loss!r}, dtype={dtype}, device={t.input.device})"

    def hvp(self, direction: OneOrMany, *, parts: Sequence[PartName] = PARTS) -> OneOrMany:
        """Return the Hessian's product with ``Direction(input, weight, bias)``, whose parts may be ``None`` for zero.

        A list of directions shares the passes. ``parts`` names the wanted parts of the product, which are in the dtype
        of the computation; the bias's is ``None`` for a head without one.
        """
        return self._product(HESSIAN, direction, parts)

    def ggnvp(self, direction: OneOrMany, *, parts: Sequence[PartName] = PARTS) -> OneOrMany:
        """Return the same product with the Gauss-Newton matrix (see :class:`~softcurve.curvature.GGN`)."""
        return self._product(GAUSS_NEWTON, direction, parts)

    def _product(self, matrix: str, direction: OneOrMany, parts: Sequence[PartName]) -> OneOrMany:
        if isinstance(parts, str) or not isinstance(parts, Sequence):
            raise TypeError(f"parts must be a sequence of names such as ('weight',), got {parts!r}")
        for part in parts:
            checks.require_choice("parts", part, PARTS)
        t = self.rows.tensors
        columns = [self._local(each) for each in (direction if isinstance(direction, list) else [direction])]
        wanted = [getattr(t, name) if name in parts else None for name in PARTS]
        into = [
            Direction(*(None if each is None else torch.zeros_like(each, dtype=t.dtype) for each in wanted))
            for _ in columns
        ]
        curvature.add_products(self.rows, matrix, columns, into, self.scale)
        products = [self._global(each) for each in into]
        return products if isinstance(direction, list) else products[0]

    def _global(self, local: Direction) -> Direction:
        """Return the parts in the shapes of the arguments, and sharded as they are."""
        e, layout = local.input, self.layout
        input, weight, bias = self.arguments
        shape = (*self.leading, input.shape[-1])
        if e is not None and isinstance(self.weight, LowRankWeight):
            e = self.weight.narrowed(e)
        return Direction(
            None if e is None else layout.restored_features(e.reshape(shape), input),
            None if local.weight is None else layout.restored_classes(local.weight, weight),
            None if local.bias is None or bias is None else layout.restored_classes(local.bias, bias),
        )

    def _local(self, direction: Direction) -> Direction:
        """This process's part of a direction, checked, with flat rows."""
        if not isinstance(direction, Direction):
            raise TypeError(
                "direction must be a softcurve.curvature.Direction(input, weight, bias) or a list of them, got "
                f"{type(direction).__name__}"
            )
        t, local = self.rows.tensors, dict[str, Tensor]()
        for name, part, argument in zip(PARTS, direction, self.arguments, strict=True):
            if part is None:
                continue
            checks.require_tensor(f"direction.{name}", part)
            if argument is None:
                raise ValueError(f"direction.{name} must be None: the head has none, got {checks.describe(part)}")
            if part.shape != argument.shape:
                shape = tuple(argument.shape)
                raise ValueError(f"direction.{name} must be of shape {shape}, got {checks.describe(part)}")
            localise = self.layout.local_rows if name == "input" else self.layout.local_classes
            local[name] = localise(part.detach()).to(t.dtype)
        e = local.get("input")
        if e is not None and isinstance(self.weight, LowRankWeight):
            e = self.weight.widened(e, t.dtype)
        return Direction(None if e is None else e.reshape(t.input.shape), local.get("weight"), local.get("bias"))

    def diagonal(self, *, matrix: MatrixName = "gauss_newton") -> Direction:
        """Return the exact diagonal ``Σ_i diag(B_i) ⊗ (e ⊙ e)`` in the weight ``(C, d)`` and the bias alone."""
        checks.require_choice("matrix", matrix, get_args(MatrixName))
        weight, bias, _ = curvature.diagonal(self.rows, matrix, wants_diagonal=True)
        assert weight is not None
        assert bias is not None
        in_bias = None if self.rows.tensors.bias is None else bias * self.scale
        return self._global(Direction(None, weight * self.scale, in_bias))

    def trace(self, *, matrix: MatrixName = "gauss_newton") -> float:
        """Return the exact trace in weight and bias: ``Σ_i tr(B_i) (‖e_i‖² + 1)``, the 1 with a bias."""
        checks.require_choice("matrix", matrix, get_args(MatrixName))
        traces = curvature.diagonal(self.rows, matrix, wants_diagonal=False).rows
        return float(self.layout.summed((traces.double() * self._squared_norms()).sum())) * self.scale

    def gradient_norms(self, kind: Literal["grand", "el2n"] = "grand") -> Tensor:
        """Return the gradient norm of each row's own loss, ``(...)``, in float64; 0 for a row that does not count.

        ``"el2n"``: with respect to the logits, ``‖p − y‖`` for a cross-entropy. ``"grand"``: with respect to weight and
        bias, ``‖∂ℓ/∂z‖ ‖[e; 1]‖``, the 1 with a bias. Source: Paul, Ganguli, Dziugaite 2021, "Deep learning on a data
        diet".
        """
        checks.require_choice("kind", kind, ("grand", "el2n"))
        norms = per_row.gradient_norms(self.rows) / self.losses.reducer.nats
        loss, t, weight = self.rows.loss, self.rows.tensors, self.losses.class_weight
        if weight is not None and loss.target == "sparse" and t.target is None and t.indices is not None:
            # With class indices the class weight is part of the row's weight, which is not in the row's own loss.
            weight = self.layout.full("weight", weight)
            norms *= weight.detach().double()[t.indices.squeeze(-1)]
        if kind == "grand":
            norms = norms * self._squared_norms().sqrt()
        return self.layout.restored(norms.reshape(self.leading), per_row=True)

    def kfac(
        self, *, matrix: PositiveMatrixName = "gauss_newton", form: FactorForm = "auto", rank: int = 128, seed: int = 0
    ) -> KroneckerFactors:
        """Return the Kronecker factors of the matrix in weight and bias.

        ``form`` is the explicit form of the class factor for its inverse: ``"dense"`` ``(C, C)``, ``"low_rank"``
        ``(C, rank)``, or ``"auto"``, dense up to 2,048 classes.
        """
        checks.require_choice("matrix", matrix, get_args(PositiveMatrixName))
        factor = StreamedClassFactor(lambda: [self.rows], matrix, self.scale, self.arguments[1], self.layout.summed)
        has_bias = self.rows.tensors.bias is not None
        return KroneckerFactors.of(factor, has_bias=has_bias, form=form, rank=rank, seed=seed)

    def largest_eigenvalue_bound(self) -> float:
        """Return an upper bound of the largest eigenvalue of the Gauss-Newton matrix in weight and bias.

        It costs one ``d × d`` problem, and holds for row and class weights that are not negative:
        ``diag(p) − p pᵀ ⪯ ½ (I − 1 1ᵀ/C)``, so ``½ λ_max(Σ_i m_i ẽ_i ẽ_iᵀ) / T²``; a JS divergence has ``1 − β`` of it,
        a z-loss adds ``2 λ (1 + max(lse, 0) / 2)`` to a row. Source: Böhning 1992,
        "Multinomial logistic regression algorithm".
        """
        loss, t = self.rows.loss, self.rows.tensors
        mass = per_row.row_masses(self.rows).double() / 2
        if loss.divergence.gauss_newton_bound == math.inf:
            raise ValueError(
                f"loss must have a bounded Gauss-Newton matrix for an eigenvalue bound, got {loss.divergence}; "
                "use softcurve.curvature.GGN(...).eigsh"
            )
        mass *= loss.divergence.gauss_newton_bound
        if loss.z_loss:
            lse = loop.evaluate(loss, t, self.rows.memory_budget, stats=True).statistics.lse
            assert lse is not None
            mass += 2 * loss.z_loss * (1 + lse.double().clamp(min=0) / 2)
        mass *= t.row_weight.double()
        moment = self.layout.summed(weighted_moment(t.features, mass, has_bias=t.bias is not None, dtype=torch.float64))
        return float(torch.linalg.eigvalsh(moment)[-1]) * self.scale / loss.temperature**2

    def _squared_norms(self) -> Tensor:
        t = self.rows.tensors
        norms = [torch.linalg.vecdot(part.double(), part.double()) for (part,) in split_rows(t.features)]
        return torch.cat(norms) + (t.bias is not None)
