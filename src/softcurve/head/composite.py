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
from softcurve.head.dense import DenseKernel
from softcurve.head.kernel import Block, Kernel, Residuals, RowData, class_factors, fillers_of
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


def terms_beside(
    loss: LossSpec, data: RowData, labels: Tensor | None, values: Tensor | None, label_factor: Tensor | None
) -> list[Term]:
    """Return the terms beside the divergence; ``label_factor`` is another factor of that of the labels.

    ``labels (rows, k)`` are classes, and ``values`` the masses on them and on all others of soft labels. Those for
    every class come with the blocks.
    """
    beside, count = loss.beside, len(data.weight)
    assert beside is not None
    offset = None if data.offset is None else data.offset / loss.scale
    shared = dataclasses.replace(data, offset=offset, target=None, target_v=None, fillers=None, wants_target=False)
    plain = dataclasses.replace(
        loss, divergence=CrossEntropy(), temperature=1.0, beside=None, teacher_scale=1.0, teacher_softcap=None, groups=0
    )
    terms: list[Term] = []
    if beside.labels or data.wants_stats:
        spec = dataclasses.replace(plain, target=beside.target, z_loss=beside.z_loss, smoothing=beside.smoothing)
        factor = beside.labels if label_factor is None else beside.labels * label_factor
        of_labels = dataclasses.replace(shared, weight=factor * data.weight)
        kernel = DenseKernel(spec, of_labels) if labels is None else _listed(spec, of_labels, labels, values)
        terms.append(Term(kernel, factor, bool(beside.labels)))
    if beside.entropy:
        coefficients = data.weight.new_zeros(count, STATISTICS)
        coefficients[:, 0] = 1.0
        weight, nothing = -beside.entropy * data.weight, torch.zeros_like(coefficients[:, :0], dtype=torch.int64)
        of_entropy = dataclasses.replace(shared, indices=nothing, target=coefficients, weight=weight, class_weight=None)
        terms.append(Term(StatisticsKernel(plain.of_statistics(), of_entropy), -beside.entropy))
    return terms


def _listed(spec: LossSpec, data: RowData, labels: Tensor, values: Tensor | None) -> Kernel:
    """Return the kernel of labels that name classes; without ``values`` all mass is on the one that they name."""
    masses, fillers, (factors, _) = values, None, class_factors(data.class_weight)
    if values is not None:
        fillers = fillers_of(labels)
    elif spec.smoothing or factors is not None:
        mass = torch.ones_like(labels, dtype=data.weight.dtype) if factors is None else factors[labels]
        masses = torch.cat([(1 - spec.smoothing) * mass, torch.zeros_like(mass)], -1)
    return SparseKernel(spec, dataclasses.replace(data, indices=labels - data.first, target=masses, fillers=fillers))


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
        self.sweeps = max(main.sweeps, *[term.kernel.sweeps for term in terms], 1)
        self.copies: list[tuple[Term, Block]] = []  # the logits that each term sees

    def accumulate(self, number: int, block: Block) -> None:  # noqa: D102
        if number == 0 or self.data.cuts_classes:
            self._copy(block, number)
        for term, copy in self.copies:
            if number < term.kernel.sweeps:
                term.kernel.accumulate(number, copy)
        if number < self.main.sweeps:
            self.main.accumulate(number, block)

    def _copy(self, block: Block, sweep: int = 0) -> None:
        """Copy the logits and their changes, which kernels overwrite, without the temperature of the divergence.

        The copies are for the terms that have a ``sweep`` of this number.
        """
        self.copies = []
        # Of a block without a class, which a ClassMap may have on some processes, the terms have nothing to see.
        for number, term in enumerate(self.terms if block.z.shape[1] else ()):
            if sweep >= term.kernel.sweeps:
                continue

            def copied(name: str, tensor: Tensor, number: int = number) -> Tensor:
                return torch.mul(tensor, self.stretch, out=self.buffer(f"{name} {number}", block.classes))

            copy = Block(block.classes, copied("z", block.z), target=block.labels)
            if block.v is not None:
                copy.v = copied("z v", block.v)
                copy.target_v = torch.zeros_like(copy.v[:1]).expand_as(copy.v)  # labels stand still
            if self.loss.softcap is not None and not backends.serves(term.kernel.loss, block.z.device, block.z.dtype):
                copy.raw = self.buffer(f"raw {number}", block.classes)
            self.copies.append((term, copy))

    def reduce_over(self, number: int, group: ProcessGroup) -> None:  # noqa: D102
        for kernel in self._kernels(number):
            kernel.reduce_over(number, group)

    def finish(self, number: int) -> None:  # noqa: D102
        for kernel in self._kernels(number):
            kernel.finish(number)
        for term in self.terms:
            if term.kernel.statistics.lse is not None:  # those of the model as the labels' term sees it
                self.statistics = term.kernel.statistics

    def _kernels(self, number: int) -> list[Kernel]:
        """Return the kernels that have a sweep of this number."""
        kernels = [self.main, *[term.kernel for term in self.terms]]
        return [kernel for kernel in kernels if number < kernel.sweeps]

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
        sums = self.main.residuals(block, fresh)
        totals = (sums.z, sums.v)
        for total in totals:
            if total is not None and self.main.row_factor is not None:
                total.mul_(self.main.row_factor)
        if not self.factor:
            for part in sums:
                if part is not None:
                    part.zero_()
        for term, copy in self.copies:
            if not term.counts:
                continue
            residuals, factor = term.kernel.residuals(copy, fresh), term.kernel.row_factor
            for total, part in zip(totals, (residuals.z, residuals.v), strict=True):
                if total is not None and part is not None:
                    total.add_(part if factor is None else part.mul_(factor), alpha=self.stretch)
        return sums
