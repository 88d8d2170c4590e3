"""Kronecker factors of a head's Gauss-Newton matrix: ``Σ_i B_i ⊗ ẽ_i ẽ_iᵀ ≈ B ⊗ A``.

``A = Σ_i m_i ẽ_i ẽ_iᵀ / Σ_i m_i`` over features ``ẽ = [e; 1]`` (the 1 with a bias) is dense, ``(d, d)``.
``B = Σ_i B_i`` over classes is known by streamed products; for a cross-entropy ``B = diag(Σ m p) − Pᵀ diag(m) P``. Its
inverse needs a form that is held: all of it where the classes are few, or its diagonal minus a matrix of low rank.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from softcurve import checks
from softcurve.curvature.class_forms import ClassForm, Damped, DenseForm, LowRankForm
from softcurve.curvature.operator import SymmetricOperator
from softcurve.head.curvature import RowLosses, add_class_products, add_products, class_coefficients, row_masses
from softcurve.head.products import Direction

DENSE_CLASSES = 2048  # up to here the form "auto" holds all of B


class ClassFactor(SymmetricOperator):
    """``B``, ``(C, C)``, by streamed products: what the curvature is in the bias of the head."""

    is_positive = True

    def __init__(self, batches: Callable[[], Iterable[RowLosses]], matrix: str, scale: float, like: Tensor) -> None:
        self._batches, self._matrix, self._scale, self._like = batches, matrix, scale, like

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
        return self._apply(vectors)[1]

    def _apply(self, vectors: Tensor) -> tuple[Tensor, Tensor]:
        """The diagonal part, where ``B`` is that minus products of probabilities, and ``B`` times ``vectors``."""
        diagonal = torch.zeros(len(self._like), dtype=self.dtype, device=self.device)
        into = torch.zeros(vectors.shape, dtype=self.dtype, device=self.device)
        if vectors.shape[1]:
            for rows in self._batches():
                if class_coefficients(rows, self._matrix):
                    part = torch.zeros_like(diagonal)
                    add_class_products(rows, self._matrix, -vectors, into, part)
                    diagonal += part
                    into += part.unsqueeze(-1) * vectors
                else:
                    columns = [Direction(None, None, v) for v in vectors.T.contiguous()]
                    sums = torch.zeros_like(vectors.T)
                    add_products(rows, self._matrix, columns, [Direction(None, None, s) for s in sums])
                    into += sums.T
        return diagonal * self._scale, into * self._scale

    def dense_form(self) -> DenseForm:
        """All of it."""
        dense = self.to_dense(columns_at_once=256).double()
        values, vectors = torch.linalg.eigh((dense + dense.T) / 2)
        values, vectors = values.clamp(min=0).to(self.dtype), vectors.to(self.dtype)
        return DenseForm(values, vectors)

    def low_rank_form(self, rank: int, seed: int = 0) -> LowRankForm:
        """``diag − low lowᵀ`` by the Nyström method, one step of subspace iteration before it.

        Nyström's approximation of ``Pᵀ m P`` is below it, so that the form is above ``B`` and stays positive.
        """
        if not all(class_coefficients(rows, self._matrix) for rows in self._batches()):
            raise ValueError(
                "form must be 'dense' for a soft cap, JS or a TopK with a bucket, whose class factor is not a "
                "diagonal minus products of probabilities, got 'low_rank'"
            )
        generator = torch.Generator().manual_seed(seed)
        probes = torch.randn(len(self._like), rank, generator=generator, dtype=self.dtype).to(self.device)
        probes = torch.linalg.qr(self._outer(probes)[1])[0]
        diagonal, image = self._outer(probes)
        shift = torch.finfo(self.dtype).eps * torch.linalg.matrix_norm(image)
        image = image + shift * probes
        core = probes.T.double() @ image.double()
        values, vectors = torch.linalg.eigh((core + core.T) / 2)
        kept = values > values.amax().clamp(min=0) * 1e-12
        low = image.double() @ vectors[:, kept] / values[kept].sqrt()
        # Take the shift out again.
        left, singular, _ = torch.linalg.svd(low, full_matrices=False)
        low = left * (singular.square() - shift.double()).clamp(min=0).sqrt()
        return LowRankForm(diagonal, low.to(self.dtype))

    def _outer(self, vectors: Tensor) -> tuple[Tensor, Tensor]:
        """The diagonal, and ``(diag − B)`` times ``vectors``."""
        diagonal, product = self._apply(vectors)
        return diagonal, diagonal.unsqueeze(-1) * vectors - product


@dataclass(frozen=True, eq=False)
class KroneckerFactors:
    """``B ⊗ A``: what a head's weight and bias ``[W | b] (C, d + 1)`` are multiplied by is ``B [W | b] A``."""

    features: Float[Tensor, "d d"]  # A
    classes: ClassFactor  # B
    form: ClassForm
    has_bias: bool

    @staticmethod
    def of(
        batches: Callable[[], Iterable[RowLosses]],
        matrix: str,
        scale: float,
        like: Tensor,
        *,
        has_bias: bool,
        form: str,
        rank: int,
        seed: int,
    ) -> KroneckerFactors:
        """Of rows that come in batches; ``scale`` is what a mean divides by, inverted."""
        checks.require_choice("form", form, ("auto", "dense", "low_rank"))
        if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
            raise ValueError(f"rank must be a positive int, got {rank!r}")
        features, total = None, 0.0
        for rows in batches():
            e, mass = rows.tensors.input, rows.tensors.row_weight * row_masses(rows)
            e = e.to(rows.tensors.dtype)[mass != 0]
            e = torch.cat([e, torch.ones_like(e[:, :1])], -1) if has_bias else e
            part = e.T @ (mass[mass != 0].to(e.dtype).unsqueeze(-1) * e)
            features = part if features is None else features + part
            total += float(mass.sum())
        if features is None or total == 0:
            raise ValueError("data must hold a row that counts, got none; see ignore_index and sample weights")
        factor = ClassFactor(batches, matrix, scale, like)
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
