"""A divergence from a teacher beside a cross-entropy of labels and an entropy bonus, on the logits of one product.

    loss = a D(target‖model at T) + b CE(labels, model) − c H(model)

The kernel of the divergence works on the tile as it would alone. The other terms see the model without its temperature:
each has a copy of the logits, times ``T``, and its residuals are added to those of the divergence.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from softcurve.head import backends
from softcurve.head.kernel import Block, Kernel, Residuals, RowData
from softcurve.head.sparse import SparseKernel
from softcurve.head.statistics import StatisticsKernel
from softcurve.head.tensors import STATISTICS
from softcurve.losses.divergences import CrossEntropy
from softcurve.losses.spec import LossSpec


def terms_beside(loss: LossSpec, data: RowData, labels: Tensor) -> list[tuple[float, Kernel]]:
    """Return the factor and the kernel of each term beside the divergence."""
    beside = loss.beside
    assert beside is not None
    offset = None if data.offset is None else data.offset / loss.scale
    shared = dataclasses.replace(data, offset=offset, target=None, target_v=None, fillers=None, wants_target=False)
    plain = dataclasses.replace(loss, divergence=CrossEntropy(), temperature=1.0, beside=None)
    terms: list[tuple[float, Kernel]] = []
    if beside.labels:
        spec = dataclasses.replace(plain, target="sparse", z_loss=beside.z_loss, smoothing=beside.smoothing)
        masses = None
        if beside.smoothing:
            masses = data.weight.new_tensor([1 - beside.smoothing, 0.0]).expand(len(labels), 2)
        weight = beside.labels * data.weight
        of_labels = dataclasses.replace(shared, indices=labels - data.first, target=masses, weight=weight)
        terms.append((beside.labels, SparseKernel(spec, of_labels)))
    if beside.entropy:
        coefficients = data.weight.new_zeros(len(labels), STATISTICS)
        coefficients[:, 0] = 1.0
        weight = -beside.entropy * data.weight
        of_entropy = dataclasses.replace(
            shared, indices=labels[:, :0], target=coefficients, weight=weight, class_weight=None
        )
        terms.append((-beside.entropy, StatisticsKernel(plain.of_statistics(), of_entropy)))
    return terms


class CompositeKernel(Kernel):
    """The kernel of a divergence, whose weights hold its factor, and the terms beside it."""

    def __init__(
        self, loss: LossSpec, data: RowData, main: Kernel, terms: Sequence[tuple[float, Kernel]],
        buffer: Callable[[str, slice], Tensor],
    ) -> None:  # fmt: skip
        super().__init__(loss, data)
        assert loss.beside is not None
        self.main, self.terms, self.buffer = main, terms, buffer
        self.factor, self.stretch = loss.beside.divergence, 1 / loss.scale
        self.sweeps = main.sweeps
        self.copies: list[Block] = []

    def accumulate(self, number: int, block: Block) -> None:  # noqa: D102
        if number == 0:
            self._copy(block)
            for (_, kernel), copy in zip(self.terms, self.copies, strict=True):
                kernel.accumulate(0, copy)
        self.main.accumulate(number, block)

    def _copy(self, block: Block) -> None:
        """Copy the logits and their changes, which kernels overwrite, without the temperature of the divergence."""
        self.copies = []
        for number, (_, kernel) in enumerate(self.terms):

            def copied(name: str, tensor: Tensor, number: int = number) -> Tensor:
                return torch.mul(tensor, self.stretch, out=self.buffer(f"{name} {number}", block.classes))

            copy = Block(block.classes, copied("z", block.z))
            if block.v is not None:
                copy.v = copied("z v", block.v)
            if self.loss.softcap is not None and not backends.serves(kernel.loss, block.z.device, block.z.dtype):
                copy.raw = self.buffer(f"raw {number}", block.classes)
            self.copies.append(copy)

    def reduce_over(self, number: int, group: ProcessGroup) -> None:  # noqa: D102
        self.main.reduce_over(number, group)
        for _, kernel in self.terms if number == 0 else ():
            kernel.reduce_over(0, group)

    def finish(self, number: int) -> None:  # noqa: D102
        self.main.finish(number)
        for _, kernel in self.terms if number == 0 else ():
            kernel.finish(0)

    def losses(self) -> Tensor:  # noqa: D102
        return self._total(self.main.losses(), [factor * kernel.losses() for factor, kernel in self.terms])

    def tangents(self, group: ProcessGroup | None) -> Tensor:  # noqa: D102
        others = [factor * kernel.tangents(group) for factor, kernel in self.terms]
        return self._total(self.main.tangents(group), others)

    def _total(self, main: Tensor, others: Sequence[Tensor]) -> Tensor:
        """Return the sum of the terms of each row, in which a divergence of factor 0 has no part, if it is infinite."""
        total = self.factor * main if self.factor else torch.zeros_like(main)
        return sum(others, start=total)

    def prepare_residuals(self) -> None:  # noqa: D102
        self.main.prepare_residuals()
        self.target_gradient, self.target_product = self.main.target_gradient, self.main.target_product
        for _, kernel in self.terms:
            kernel.prepare_residuals()

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
        for (_, kernel), copy in zip(self.terms, self.copies, strict=True):
            residuals = kernel.residuals(copy, fresh)
            for total, part, factor in zip(totals, (residuals.z, residuals.v), (kernel.row_factor, None), strict=True):
                if total is not None and part is not None:
                    total.add_(part if factor is None else part.mul_(factor), alpha=self.stretch)
        return found
