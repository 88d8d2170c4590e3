"""The curvature of one head on one set of rows, in its features, weight and bias."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, get_args, overload

import torch
from torch import Tensor

from softcurve import checks
from softcurve.array_types import Float
from softcurve.curvature.kfac import Form, KroneckerFactors, moment_of, one_a_class, pieces_of
from softcurve.curvature.linear_head import require_classes
from softcurve.curvature.losses import HeadLosses, Loss, Reduction
from softcurve.head import curvature, loop, per_row
from softcurve.head.products import Direction
from softcurve.losses.rows import GAUSS_NEWTON, HESSIAN
from softcurve.losses.targets import Target
from softcurve.typing import Integer, Number

Matrix = Literal["hessian", "gauss_newton", "fisher"]
PositiveMatrix = Literal["gauss_newton", "fisher"]
Part = Literal["input", "weight", "bias"]
PARTS: tuple[Part, ...] = ("input", "weight", "bias")


class HeadCurvature:
    """The second order of ``linear_cross_entropy(input, linear_weight, target, ...)`` and its kin, streamed.

    Args:
        input: features ``(..., d)``.
        linear_weight: ``(C, d)``.
        target: as for the loss.
        linear_bias: ``(C,)``.
        loss: ``"cross_entropy"``, ``"forward_kl"`` (``D(target‖model)``), ``"reverse_kl"`` or ``"js"``.
        sample_weight: ``(...)``; a factor of each row.

    The other options are those of :func:`softcurve.linear_cross_entropy` and its kin. Nothing here records a graph.

    Raises:
        TypeError, ValueError: what the loss raises.

    Source: ``B = diag(q) − q pᵀ − p qᵀ + (Σq) p pᵀ`` for every loss of the family.
    """

    def __init__(
        self,
        input: Float[Tensor, "*rows features"],
        linear_weight: Float[Tensor, "classes features"],
        target: Tensor | Target,
        *,
        linear_bias: Float[Tensor, " classes"] | None = None,
        loss: Loss = "cross_entropy",
        beta: Number = 0.5,
        weight: Float[Tensor, " classes"] | None = None,
        sample_weight: Tensor | None = None,
        ignore_index: Integer | None = None,
        label_smoothing: Number = 0.0,
        temperature: Number = 1.0,
        softcap: Number | None = None,
        z_loss: Number = 0.0,
        shift: Integer = 0,
        reduction: Reduction = "mean",
        base: Number = math.e,
        memory_budget: Integer | None = None,
    ) -> None:
        if isinstance(linear_weight, Tensor) and linear_weight.ndim == 2:
            require_classes("linear_weight.shape[0]", linear_weight.shape[0])
        self.losses = HeadLosses(
            loss=loss, beta=beta, weight=weight, ignore_index=ignore_index, label_smoothing=label_smoothing,
            temperature=temperature, softcap=softcap, z_loss=z_loss, shift=shift, reduction=reduction, base=base,
            memory_budget=memory_budget,
        )  # fmt: skip
        posed = self.losses.pose(input, linear_weight, linear_bias, target, sample_weight)
        divisor = float(posed.divisor(self.losses.reducer))
        if divisor == 0:
            raise ValueError("target must have a row that counts, got none; see ignore_index and sample_weight")
        self.leading = input.shape[:-1]
        self.rows, self.scale = self.losses.rows(posed), 1 / divisor
        self.given, self.spread = (input.detach(), linear_weight.detach(), linear_bias), posed.head.spread
        self.local_leading = posed.head.leading

    def __repr__(self) -> str:
        """One line."""
        t = self.rows.tensors
        shape = f"rows={len(t.input)}, classes={self.given[1].shape[0]}, features={t.input.shape[1]}"
        dtype = str(t.dtype).removeprefix("torch.")
        return f"HeadCurvature({shape}, loss={self.losses.loss!r}, dtype={dtype}, device={t.input.device})"

    # --- products ----------------------------------------------------------------------------------------------------

    @overload
    def hvp(self, direction: Direction, *, parts: Sequence[Part] = ...) -> Direction: ...
    @overload
    def hvp(self, direction: list[Direction], *, parts: Sequence[Part] = ...) -> list[Direction]: ...
    def hvp(
        self, direction: Direction | list[Direction], *, parts: Sequence[Part] = PARTS
    ) -> Direction | list[Direction]:
        """The Hessian's product with ``Direction(input, weight, bias)``, whose parts may be ``None`` for zero.

        A list of directions shares the passes. ``parts`` are those of the product that are wanted, in the computation's
        dtype; the bias's is ``None`` for a head without one.
        """
        return self._product(HESSIAN, direction, parts)

    @overload
    def ggnvp(self, direction: Direction, *, parts: Sequence[Part] = ...) -> Direction: ...
    @overload
    def ggnvp(self, direction: list[Direction], *, parts: Sequence[Part] = ...) -> list[Direction]: ...
    def ggnvp(
        self, direction: Direction | list[Direction], *, parts: Sequence[Part] = PARTS
    ) -> Direction | list[Direction]:
        """As :meth:`hvp`, of the Gauss-Newton matrix (see :class:`~softcurve.curvature.GGN`)."""
        return self._product(GAUSS_NEWTON, direction, parts)

    def _product(
        self, matrix: str, direction: Direction | list[Direction], parts: Sequence[Part]
    ) -> Direction | list[Direction]:
        if isinstance(parts, str) or not isinstance(parts, Sequence):
            raise TypeError(f"parts must be a sequence of names such as ('weight',), got {parts!r}")
        for part in parts:
            checks.require_choice("parts", part, PARTS)
        t = self.rows.tensors
        given = direction if isinstance(direction, list) else [direction]
        columns = [self._checked(each) for each in given]
        into = [
            Direction(*(
                torch.zeros_like(tensor, dtype=t.dtype) if name in parts and tensor is not None else None
                for name, tensor in zip(PARTS, t[:3], strict=True)
            ))
            for _ in columns
        ]  # fmt: skip
        curvature.add_products(self.rows, matrix, columns, into, self.scale)
        found = [self._returned(each) for each in into]
        return found[0] if isinstance(direction, Direction) else found

    def _returned(self, found: Direction) -> Direction:
        """In the shapes, and lying over processes, as the tensors that were given."""
        e, spread = found.input, self.spread
        if spread is None:
            return found._replace(input=None if e is None else e.reshape(self.given[0].shape))
        input, weight, bias = self.given
        local = (*self.local_leading, input.shape[-1])
        return Direction(
            None if e is None else spread.features_back(e.reshape(local), input),
            None if found.weight is None else spread.classes_back(found.weight, weight),
            None if found.bias is None or bias is None else spread.classes_back(found.bias, bias),
        )

    def _checked(self, direction: Direction) -> Direction:
        if not isinstance(direction, Direction):
            raise TypeError(
                "direction must be a softcurve.curvature.Direction(input, weight, bias) or a list of them, got "
                f"{type(direction).__name__}"
            )
        t = self.rows.tensors
        shapes = [None if each is None else tuple(each.shape) for each in self.given]
        for name, part, shape in zip(PARTS, direction, shapes, strict=True):
            if part is None:
                continue
            checks.require_tensor(f"direction.{name}", part)
            if shape is None:
                raise ValueError(f"direction.{name} must be None: the head has none, got {checks.describe(part)}")
            if tuple(part.shape) != shape:
                raise ValueError(f"direction.{name} must be of shape {shape}, got {checks.describe(part)}")
        e, weight, bias = (None if part is None else part.detach() for part in direction)
        if self.spread is not None:
            e = None if e is None else self.spread.features(e)
            weight, bias = (None if part is None else self.spread.classes_of(part) for part in (weight, bias))
        e = None if e is None else e.reshape(t.input.shape)
        return Direction(*(None if part is None else part.to(t.dtype) for part in (e, weight, bias)))

    # --- closed forms ------------------------------------------------------------------------------------------------

    def diagonal(self, *, matrix: Matrix = "gauss_newton") -> Direction:
        """The exact diagonal in the weight ``(C, d)`` and the bias: ``Σ_i diag(B_i) ⊗ (e ⊙ e)``; no input's."""
        found = curvature.diagonal(self.rows, self._known(matrix), wants_diagonal=True)
        assert found.weight is not None
        assert found.bias is not None
        bias = None if self.rows.tensors.bias is None else found.bias * self.scale
        return self._returned(Direction(None, found.weight * self.scale, bias))

    def trace(self, *, matrix: Matrix = "gauss_newton") -> float:
        """The exact trace in weight and bias: ``Σ_i tr(B_i) (‖e_i‖² + 1)``, the 1 with a bias."""
        rows = curvature.diagonal(self.rows, self._known(matrix), wants_diagonal=False).rows
        return float(self._summed((rows.double() * self._squared_norms()).sum())) * self.scale

    def gradient_norms(self, kind: Literal["grand", "el2n"] = "grand") -> Tensor:
        """The gradient norm of each row's own loss, ``(...)``, in float64; 0 for a row that does not count.

        ``"el2n"``: in the logits, ``‖p − y‖`` for a cross-entropy. ``"grand"``: in weight and bias,
        ``‖∂ℓ/∂z‖ ‖[e; 1]‖``, the 1 with a bias. Source: Paul, Ganguli, Dziugaite 2021, "Deep learning on a data diet".
        """
        checks.require_choice("kind", kind, ("grand", "el2n"))
        norms = per_row.gradient_norms(self.rows) / self.losses.reducer.nats
        loss, t, weight = self.rows.loss, self.rows.tensors, self.losses.weight
        if weight is not None and loss.target == "sparse" and t.target is None and t.indices is not None:
            # Of a class index the class's weight is in the row's, which is not in its own loss.
            weight = weight if self.spread is None else self.spread.whole(weight)
            norms *= weight.detach().double()[t.indices.squeeze(-1)]
        if kind == "grand":
            norms = norms * self._squared_norms().sqrt()
        if self.spread is not None:
            return self.spread.rows_back(norms.reshape(self.local_leading))
        return norms.reshape(self.leading)

    def kfac(
        self,
        *,
        matrix: PositiveMatrix = "gauss_newton",
        form: Form = "auto",
        rank: int = 128,
        seed: int = 0,
    ) -> KroneckerFactors:
        """The Kronecker factors of the matrix in weight and bias.

        ``form`` says how the class factor is held for its inverse: ``"dense"`` ``(C, C)``, ``"low_rank"``
        ``(C, rank)``, or ``"auto"``, dense up to 2,048 classes.
        """
        checks.require_choice("matrix", matrix, get_args(PositiveMatrix))
        t = self.rows.tensors
        return KroneckerFactors.of(
            lambda: [self.rows], matrix, self.scale, one_a_class(self.given[1]), width=t.input.shape[1],
            has_bias=t.bias is not None, form=form, rank=rank, seed=seed, summed=self._summed,
        )  # fmt: skip

    def largest_eigenvalue_bound(self) -> float:
        """Never below the largest eigenvalue of the Gauss-Newton matrix in weight and bias; one ``d × d`` problem.

        For weights of rows and classes that are not negative.

        ``diag(p) − p pᵀ ⪯ ½ (I − 1 1ᵀ/C)``, so ``½ λ_max(Σ_i m_i ẽ_i ẽ_iᵀ) / T²``; a JS divergence has ``1 − β`` of it,
        a z-loss adds ``2 λ (1 + max(lse, 0) / 2)`` to a row. Source: Böhning 1992.
        """
        loss, t = self.rows.loss, self.rows.tensors
        mass = per_row.row_masses(self.rows).double() / 2
        if loss.divergence.gauss_newton_bound == math.inf:
            raise ValueError(
                f"loss must have a bounded Gauss-Newton matrix for an eigenvalue bound, got {loss.divergence}; "
                "use largest_eigenvalues"
            )
        mass *= loss.divergence.gauss_newton_bound
        if loss.z_loss:
            lse = loop.evaluate(loss, t, self.rows.memory_budget, stats=True).statistics.lse
            assert lse is not None
            mass += 2 * loss.z_loss * (1 + lse.double().clamp(min=0) / 2)
        mass *= t.row_weight.double()
        moment = self._summed(moment_of(t.input, mass, has_bias=t.bias is not None, dtype=torch.float64))
        return float(torch.linalg.eigvalsh(moment)[-1]) * self.scale / loss.temperature**2

    def _summed(self, part: Tensor) -> Tensor:
        """Over the processes that have other rows."""
        return part if self.spread is None else self.spread.total(part)

    def _squared_norms(self) -> Tensor:
        t = self.rows.tensors
        found = [torch.linalg.vecdot(part.double(), part.double()) for part in t.input.split(pieces_of(t.input))]
        return torch.cat(found) + (t.bias is not None)

    @staticmethod
    def _known(matrix: str) -> str:
        checks.require_choice("matrix", matrix, get_args(Matrix))
        return matrix
