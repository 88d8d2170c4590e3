"""The base class of the second-order matrices of a network: a product is one pass over the data for all columns."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Sequence
from typing import Unpack

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from softcurve import checks
from softcurve.curvature.determinism import require_deterministic
from softcurve.curvature.losses import HeadLosses, LossOptions, with_options_of
from softcurve.curvature.network import Batch, BatchRows, Parts, SplitNetwork
from softcurve.curvature.operator import SymmetricOperator
from softcurve.head.products import Direction


class NetworkOperator(SymmetricOperator):
    """A second-order matrix of ``loss(head(features(x)), target)`` over all of ``data``."""

    depends_on_order: bool = False  # whether the matrix depends on the order of the rows

    @with_options_of(HeadLosses.of)
    def __init__(
        self,
        features: nn.Module,
        head: nn.Linear,
        data: Iterable[Batch],
        *,
        seed: int = 0,
        progress: bool = False,
        process_group: ProcessGroup | None = None,
        check_deterministic: bool = True,
        **options: Unpack[LossOptions],
    ) -> None:
        self.features, self.head, self.data = features, head, data
        self.losses = HeadLosses.of(**options)
        self.network = SplitNetwork(features, head, data, self.losses, seed, progress, process_group)
        self.layout = self.network.layout
        if check_deterministic:
            require_deterministic(self.network, "data", ordered=self.depends_on_order)

    @property
    def shape(self) -> tuple[int, int]:
        """``(P, P)`` for ``P`` trained parameters."""
        return self.layout.size, self.layout.size

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the parameters, at least float32."""
        return self.layout.dtype

    @property
    def device(self) -> torch.device:
        """The device of the head."""
        return self.network.device

    def split(self, vector: Tensor) -> dict[str, Tensor]:
        """A flat vector ``(P,)`` as tensors by parameter name."""
        if vector.shape != (self.layout.size,):
            raise ValueError(f"vector must be of shape ({self.layout.size},), got {checks.describe(vector)}")
        return {name: self.layout.view(vector, number) for number, name in enumerate(self.layout.names)}

    def _columns(self, vectors: Tensor) -> Tensor:
        with torch.inference_mode(False):
            columns = vectors.T.clone() if vectors.is_inference() else vectors.T
            columns = columns.contiguous()  # so that a parameter's part of a row is contiguous
            into, total = torch.zeros_like(columns), 0.0
            if len(columns) == 0:
                return into.T
            for rows in self.network.rows(f"{type(self).__name__} product"):
                total += rows.divisor
                sums = self.network.sums(rows, into)
                terms = self._add_products(rows, columns, sums)
                self.network.add_pulled_back(rows, sums, into)
                for j, parts in enumerate(terms):
                    self.network.add_parts(parts, into[j])
            self.network.sum_class_shards(into).div_(self.network.divisor(total))
            return self.network.sum_data_shards(into).T

    @abstractmethod
    def _add_products(self, rows: BatchRows, columns: Tensor, sums: Sequence[Direction]) -> Sequence[Parts]:
        """Add the head's products with ``columns (k, P)`` to ``sums``; return the features' second-order terms."""
