"""A divergence from a teacher beside a cross-entropy of labels and an entropy bonus, on the logits of one product.

    loss = a D(target‖model at T) + b CE(labels, model) − c H(model)

The kernel of the divergence works on the tile as it would alone. The other terms see the model without its temperature:
each has a copy of the logits, times ``T``, and its residuals are added to those of the divergence.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from softcurve.head import backends
from softcurve.head.kernel import Block, Kernel, Residuals, RowData, class_factors
from softcurve.head.sparse import SparseKernel
from softcurve.head.statistics import StatisticsKernel
from softcurve.head.tensors import STATISTICS
from softcurve.losses.divergences import CrossEntropy
from softcurve.losses.spec import LossSpec


class Term(NamedTuple):
    """The kernel of a term beside the divergence and its factor; 0 for one whose statistics alone are wanted."""

    kernel: Kernel
    factor: Tensor | float
    counts: bool = True


def terms_beside(loss: LossSpec, data: RowData, labels: Tensor, label_factor: Tensor | None) -> list[Term]:
    """Return the terms beside the divergence; ``label_factor`` is another factor of that of the labels."""
    beside = loss.beside
    assert beside is not None
    offset = None if data.offset is None else data.offset / loss.scale
    shared = dataclasses.replace(data, offset=offset, target=None, target_v=None, fillers=None, wants_target=False)
    plain = dataclasses.replace(loss, divergence=CrossEntropy(), temperature=1.0, beside=None)
    terms: list[Term] = []
    if beside.labels or data.wants_stats:
        spec = dataclasses.replace(plain, target="sparse", z_loss=beside.z_loss, smoothing=beside.smoothing)
        masses, (own, _) = None, class_factors(data.class_weight)
        if beside.smoothing or own is not None:
            mass = torch.ones_like(labels, dtype=data.weight.dtype) if own is None else own[labels]
            masses = torch.cat([(1 - beside.smoothing) * mass, torch.zeros_like(mass)], -1)
        factor = beside.labels if label_factor is None else beside.labels * label_factor
        of_labels = dataclasses.replace(shared, indices=labels - data.first, target=masses, weight=factor * data.weight)
        terms.append(Term(SparseKernel(spec, of_labels), factor, bool(beside.labels)))
    if beside.entropy:
        coefficients = data.weight.new_zeros(len(labels), STATISTICS)
        coefficients[:, 0] = 1.0
        weight = -beside.entropy * data.weight
        of_entropy = dataclasses.replace(
            shared, indices=labels[:, :0], target=coefficients, weight=weight, class_weight=None
        )
        terms.append(Term(StatisticsKernel(plain.of_statistics(), of_entropy), -beside.entropy))
    return terms


class CompositeKernel(Kernel):
    """The kernel of a divergence, whose weights hold its factor, and the terms beside it."""

    def __init__(
        self, loss: LossSpec, data: RowData, main: Kernel, terms: Sequence[Term],
        buffer: Callable[[str, slice], Tensor],
    ) -> None:  # fmt: skip
        super().__init__(loss, data)
        assert loss.beside is not None
        self.main, self.terms, self.buffer = main, terms, buffer
        self.counted = [term for term in terms if term.counts]
        self.factor, self.stretch = loss.beside.divergence, 1 / loss.scale
        self.sweeps = main.sweeps
        self.copies: list[tuple[Term, Block]] = []  # the logits that each term sees

    def accumulate(self, number: int, block: Block) -> None:  # noqa: D102
        if number == 0:
            self._copy(block)
            for term, copy in self.copies:
                term.kernel.accumulate(0, copy)
        self.main.accumulate(number, block)

    def _copy(self, block: Block) -> None:
        """Copy the logits and their changes, which kernels overwrite, without the temperature of the divergence."""
        self.copies = []
        # Of a block without a class, which a ClassMap may have on some processes, the terms have nothing to see.
        for number, term in enumerate(self.terms if block.z.shape[1] else ()):

            def copied(name: str, tensor: Tensor, number: int = number) -> Tensor:
                return torch.mul(tensor, self.stretch, out=self.buffer(f"{name} {number}", block.classes))

            copy = Block(block.classes, copied("z", block.z))
            if block.v is not None:
                copy.v = copied("z v", block.v)
            if self.loss.softcap is not None and not backends.serves(term.kernel.loss, block.z.device, block.z.dtype):
                copy.raw = self.buffer(f"raw {number}", block.classes)
            self.copies.append((term, copy))

    def reduce_over(self, number: int, group: ProcessGroup) -> None:  # noqa: D102
        self.main.reduce_over(number, group)
        for term in self.terms if number == 0 else ():
            term.kernel.reduce_over(0, group)

    def finish(self, number: int) -> None:  # noqa: D102
        self.main.finish(number)
        for term in self.terms if number == 0 else ():
            term.kernel.finish(0)
            if term.kernel.statistics.lse is not None:  # those of the model as the labels' term sees it
                self.statistics = term.kernel.statistics

    def losses(self) -> Tensor:  # noqa: D102
        return self._total(self.main.losses(), [term.factor * term.kernel.losses() for term in self.counted])

    def tangents(self, group: ProcessGroup | None) -> Tensor:  # noqa: D102
        others = [term.factor * term.kernel.tangents(group) for term in self.counted]
        return self._total(self.main.tangents(group), others)

    def _total(self, main: Tensor, others: Sequence[Tensor]) -> Tensor:
        """Return the sum of the terms of each row, in which a divergence of factor 0 has no part, if it is infinite."""
        total = self.factor * main if self.factor else torch.zeros_like(main)
        return sum(others, start=total)

    def prepare_residuals(self) -> None:  # noqa: D102
        self.main.prepare_residuals()
        self.target_gradient, self.target_product = self.main.target_gradient, self.main.target_product
        for term in self.counted:
            term.kernel.prepare_residuals()

    def residuals(self, block: Block, fresh: bool) -> Residuals:
        """Add the residuals of all terms."""
        if fresh:
            self._copy(block)
        found = self.main.residuals(block, fresh)
        totals = (found.z, found.v)
        if self.main.row_factor is not None:
            found.z.mul_(self.main.row_factor)
        if not self.factor:
            for part in found:
                if part is not None:
                    part.zero_()
        for term, copy in self.copies:
            if not term.counts:
                continue
            residuals, factors = term.kernel.residuals(copy, fresh), (term.kernel.row_factor, None)
            for total, part, factor in zip(totals, (residuals.z, residuals.v), factors, strict=True):
                if total is not None and part is not None:
                    total.add_(part if factor is None else part.mul_(factor), alpha=self.stretch)
        return found
