"""Kronecker factors of a head's Gauss-Newton matrix: ``Σ_i B_i ⊗ ẽ_i ẽ_iᵀ ≈ B ⊗ A``.

``A = Σ_i m_i ẽ_i ẽ_iᵀ / Σ_i m_i`` over features ``ẽ = [e; 1]`` (the 1 with a bias) is dense, ``(d, d)``.
``B = Σ_i B_i`` over classes is known by streamed products; for a cross-entropy ``B = diag(Σ m p) − Pᵀ diag(m) P``. Its
inverse needs a form that is held: all of it where the classes are few, or its diagonal minus a matrix of low rank.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from softcurve import checks
from softcurve.array_types import Float
from softcurve.curvature.class_forms import ClassForm, Damped, DenseForm, LowRankForm
from softcurve.curvature.nystrom import low_rank
from softcurve.curvature.operator import SymmetricOperator, require_count
from softcurve.head.curvature import add_class_products, add_products, class_coefficients
from softcurve.head.per_row import row_masses
from softcurve.head.products import WIDENED_ENTRIES, Direction
from softcurve.head.tensors import RowLosses
from softcurve.processes import sum_over
from softcurve.records import dataclass_repr

Summed = Callable[[Tensor], Tensor]

Form = Literal["auto", "dense", "low_rank"]

DENSE_CLASSES = 2048  # up to here the form "auto" holds all of B


def pieces_of(input: Float[Tensor, "n d"]) -> int:
    """Rows that are widened at a time."""
    return max(1, WIDENED_ENTRIES // max(1, input.shape[1]))


def moment_of(
    input: Float[Tensor, "n d"], mass: Float[Tensor, " n"], *, has_bias: bool, dtype: torch.dtype
) -> Float[Tensor, "m m"]:
    """``Σ_i mass_i ẽ_i ẽ_iᵀ``, the rows of mass 0 left out, some rows at a time."""
    width = input.shape[1] + has_bias
    moment = torch.zeros(width, width, dtype=dtype, device=input.device)
    for e, m in zip(input.split(pieces_of(input)), mass.split(pieces_of(input)), strict=True):
        kept = e[m != 0].to(dtype)
        kept = torch.cat([kept, torch.ones_like(kept[:, :1])], -1) if has_bias else kept
        moment.addmm_(kept.T, m[m != 0].to(dtype).unsqueeze(-1) * kept)
    return moment


def one_a_class(weight: Tensor) -> Tensor:
    """A vector as a weight's classes: its dtype and device count."""
    return torch.empty(weight.shape[0], dtype=weight.dtype, device=weight.device)


def _own_classes(rows: RowLosses) -> slice:
    """Those that this process has of a sharded head."""
    return slice(rows.loss.first, rows.loss.first + len(rows.tensors.weight))


class ClassFactor(SymmetricOperator):
    """``B``, ``(C, C)``, by streamed products: what the curvature is in the bias of the head."""

    is_positive = True

    def __init__(
        self, batches: Callable[[], Iterable[RowLosses]], matrix: str, scale: float, like: Tensor, summed: Summed
    ) -> None:
        self._batches, self._matrix, self._scale, self._like = batches, matrix, scale, like
        self._over_rows = summed

    @property
    def shape(self) -> tuple[int, int]:
        """``(C, C)``."""
        return len(self._like), len(self._like)

    @property
    def dtype(self) -> torch.dtype:
        """At least float32."""
        return torch.promote_types(self._like.dtype, torch.float32)

    @property
    def device(self) -> torch.device:
        """The head's."""
        return self._like.device

    def _columns(self, vectors: Tensor) -> Tensor:
        if vectors.shape[1] == 0:
            return torch.zeros_like(vectors)
        if self._is_diagonal_minus_products:
            diagonal, outer = self._parts(vectors)
            return torch.addcmul(-outer, diagonal.unsqueeze(-1), vectors)
        sums, columns = torch.zeros_like(vectors.T, memory_format=torch.contiguous_format), vectors.T.contiguous()
        group = None
        for rows in self._batches():
            own, group = _own_classes(rows), rows.loss.processes
            along = [Direction(None, None, column[own]) for column in columns]
            add_products(rows, self._matrix, along, [Direction(None, None, part[own]) for part in sums])
        return self._summed(sums, group).mul_(self._scale).T

    @functools.cached_property
    def _is_diagonal_minus_products(self) -> bool:
        """Of the rows of all processes, which would otherwise go different ways."""
        others = sum(not class_coefficients(rows, self._matrix) for rows in self._batches())
        return not self._over_rows(torch.tensor(float(others), dtype=torch.float64, device=self.device))

    def _parts(self, vectors: Tensor) -> tuple[Tensor, Tensor]:
        """``diagonal`` of ``B = diag(diagonal) − Σ b p pᵀ``, and ``Σ b p pᵀ`` times ``vectors``."""
        diagonal = torch.zeros(len(self._like), dtype=self.dtype, device=self.device)
        outer = torch.zeros(vectors.shape, dtype=self.dtype, device=self.device)
        group = None
        for rows in self._batches():
            own, group = _own_classes(rows), rows.loss.processes
            add_class_products(rows, self._matrix, vectors[own], outer[own], diagonal[own])
        diagonal, outer = self._summed(diagonal, group), self._summed(outer, group)
        return diagonal.mul_(self._scale), outer.mul_(self._scale)

    def _summed(self, own: Tensor, group: ProcessGroup | None) -> Tensor:
        """Over the processes of the rows, and of the classes, each of which has filled in its own."""
        if group is not None:
            sum_over([own], group)
        return self._over_rows(own)

    def dense_form(self) -> DenseForm:
        """All of it."""
        dense = self.to_dense(columns_at_once=256).double()
        values, vectors = torch.linalg.eigh((dense + dense.T) / 2)
        values, vectors = values.clamp(min=0).to(self.dtype), vectors.to(self.dtype)
        return DenseForm(values, vectors)

    def low_rank_form(self, rank: int, seed: int = 0) -> LowRankForm:
        """``diag − low lowᵀ`` by the Nyström method, one step of subspace iteration before it.

        Nyström's approximation of ``Pᵀ m P`` is below it, so that the form is above ``B`` and stays positive. On the
        way it takes about four times the memory of ``low``.
        """
        if not self._is_diagonal_minus_products:
            raise ValueError(
                "form must be 'dense' for a soft cap, JS or a TopK with a bucket, whose class factor is not a "
                "diagonal minus products of probabilities, got 'low_rank'"
            )
        generator = torch.Generator().manual_seed(seed)
        probes = torch.randn(len(self._like), rank, generator=generator, dtype=self.dtype).to(self.device)
        probes = torch.linalg.qr(self._parts(probes)[1])[0]
        diagonal, image = self._parts(probes)
        try:
            low = low_rank(probes, image)
        except ValueError as error:
            raise ValueError(
                "form must be 'dense' for so large a z_loss, whose class factor is a diagonal plus products of "
                "probabilities, got 'low_rank'"
            ) from error
        return LowRankForm(diagonal, low, torch.finfo(self.dtype).eps)


@dataclass(frozen=True, eq=False)
class KroneckerFactors:
    """``B ⊗ A``: what a head's weight and bias ``[W | b] (C, d + 1)`` are multiplied by is ``B [W | b] A``."""

    features: Float[Tensor, "d d"]  # A
    classes: ClassFactor  # B
    form: ClassForm
    has_bias: bool

    __repr__ = dataclass_repr

    @staticmethod
    def of(
        batches: Callable[[], Iterable[RowLosses]],
        matrix: str,
        scale: float,
        like: Tensor,
        *,
        width: int,
        has_bias: bool,
        form: Form,
        rank: int,
        seed: int,
        summed: Summed,
    ) -> KroneckerFactors:
        """Of rows that come in batches; ``scale`` is what a mean divides by, inverted.

        ``like`` is of one entry a class; ``summed`` is over the processes that have other rows.
        """
        checks.require_choice("form", form, get_args(Form))
        require_count("rank", rank, 1)
        require_count("seed", seed, 0)
        size = width + has_bias
        features = torch.zeros(size, size, dtype=torch.promote_types(like.dtype, torch.float32), device=like.device)
        total = 0.0
        for rows in batches():
            mass = rows.tensors.row_weight * row_masses(rows)
            features += moment_of(rows.tensors.input, mass, has_bias=has_bias, dtype=features.dtype)
            total += float(mass.sum())
        total = float(summed(torch.tensor(total, dtype=torch.float64, device=like.device)))
        if total == 0:
            raise ValueError("the rows must hold one that counts, got none; see ignore_index and sample weights")
        features = summed(features)
        factor = ClassFactor(batches, matrix, scale, like, summed)
        dense = form == "dense" or (form == "auto" and len(like) <= DENSE_CLASSES)
        held = factor.dense_form() if dense else factor.low_rank_form(min(rank, len(like)), seed)
        return KroneckerFactors(features / total, factor, held, has_bias)

    def product(self, weight: Tensor, bias: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """``B [weight | bias] A``, ``(C, d)`` and ``(C,)``, with the exact ``B``."""
        return self._split(self.classes @ (self._joined(weight, bias) @ self.features))

    def solve(self, weight: Tensor, bias: Tensor | None = None, *, damping: float) -> tuple[Tensor, Tensor | None]:
        """``(B ⊗ A + damping I)⁻¹ [weight | bias]``, ``(C, d)`` and ``(C,)``, exact for the held form of ``B``.

        Raises ``ValueError`` where a form of low rank in float32 cannot resolve the ``damping``.
        """
        checks.require_positive("damping", damping)
        vectors = self.feature_spectrum()[1]
        rotated = self.damped(damping).solve(self._joined(weight, bias) @ vectors)
        return self._split(rotated @ vectors.T)

    def damped(self, damping: float) -> Damped:
        """``a B + damping I`` for each eigenvalue ``a`` of ``A``; kept until another damping is asked for."""
        if self._kept.get(damping) is None:
            self._kept.clear()
            self._kept[damping] = self.form.damped(self.feature_spectrum()[0], damping)
        return self._kept[damping]

    @functools.cached_property
    def _kept(self) -> dict[float, Damped]:
        return {}

    def feature_spectrum(self) -> tuple[Tensor, Tensor]:
        """The eigenvalues ``≥ 0`` and eigenvectors of ``A``."""
        return self._spectrum

    @functools.cached_property
    def _spectrum(self) -> tuple[Tensor, Tensor]:
        values, vectors = torch.linalg.eigh(self.features.double())
        return values.clamp(min=0).to(self.features.dtype), vectors.to(self.features.dtype)

    def _joined(self, weight: Tensor, bias: Tensor | None) -> Tensor:
        if (bias is not None) != self.has_bias:
            raise ValueError(
                f"bias must be {'given, as the head has one' if self.has_bias else 'None: the head has none'}"
            )
        shape = (self.form.classes, len(self.features) - self.has_bias)
        for name, part, wanted in (("weight", weight, shape), ("bias", bias, shape[:1])):
            if part is not None and (not isinstance(part, Tensor) or part.shape != wanted):
                came = checks.describe(part) if isinstance(part, Tensor) else type(part).__name__
                raise ValueError(f"{name} must be a tensor of shape {wanted}, got {came}")
        weight = weight.to(self.features.dtype)
        bias = None if bias is None else bias.to(self.features.dtype)
        return weight if bias is None else torch.cat([weight, bias.unsqueeze(-1)], -1)

    def _split(self, joined: Tensor) -> tuple[Tensor, Tensor | None]:
        return (joined[:, :-1], joined[:, -1]) if self.has_bias else (joined, None)


def preconditioner(
    factors: KroneckerFactors,
    damping: float,
    weight: slice,
    bias: slice | None,
    elsewhere: Float[Tensor, " parameters"],
) -> Callable[[Tensor], Tensor]:
    """``(B ⊗ A + damping I)⁻¹`` on the head's part of flat columns ``(P, k)``, ``1 / elsewhere`` on all others."""

    def apply(columns: Tensor) -> Tensor:
        solved = columns / elsewhere.unsqueeze(-1)
        for j in range(columns.shape[1]):
            head = columns[weight, j].view(factors.form.classes, -1)
            part = factors.solve(head, None if bias is None else columns[bias, j], damping=damping)
            solved[weight, j] = part[0].reshape(-1)
            if bias is not None and part[1] is not None:
                solved[bias, j] = part[1]
        return solved

    return apply
