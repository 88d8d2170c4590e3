"""A network as features and a head over data that is walked in batches, and what its matrices of second order share.

The head is streamed (:mod:`softcurve.head.curvature`); the features are autograd's. One graph of a batch serves all
columns: with ``e = f(θ)`` and ``h(u) = Jᵀu``, the derivative of ``v·h`` is ``J v`` in ``u`` and, at ``u = ∂L/∂e``, the
second-order term ``(Σ u ∂²e) v`` in ``θ``. So there is no finite difference and no forward mode, which many kernels
lack, and all columns see the same dropout. Features and data are checked to be the same in each pass.
"""

from __future__ import annotations

import hashlib
import math
from abc import abstractmethod
from collections.abc import Iterable, Iterator, Sequence, Sized
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from softcurve import checks
from softcurve.array_types import Float
from softcurve.curvature.determinism import require_deterministic, require_fixed_order
from softcurve.curvature.features import FeatureMap
from softcurve.curvature.linear_head import require_head
from softcurve.curvature.losses import HeadLosses, Loss, Reduction
from softcurve.curvature.operator import SymmetricOperator, require_count
from softcurve.curvature.parameters import Layout
from softcurve.curvature.split import require_same_logits
from softcurve.extras import needed
from softcurve.head.problem import Posed
from softcurve.head.products import Direction
from softcurve.head.sharded import class_group, lies_over_processes, own_classes
from softcurve.head.tensors import RowLosses
from softcurve.losses.spec import LogitMap
from softcurve.losses.targets import Target
from softcurve.processes import sum_over
from softcurve.typing import Integer, Number

Batch = tuple[Any, Tensor | Target] | tuple[Any, Tensor | Target, Tensor]


@dataclass(frozen=True, eq=False)
class Rows:
    """A batch behind the features: the head's rows, and the graph of the features."""

    number: int
    e: Tensor  # (n, d), with the graph where a parameter of the features is trained
    posed: Posed
    losses: RowLosses


class NetworkOperator(SymmetricOperator):
    """A matrix of second order of ``loss(head(features(x)), target)`` over all of ``data``."""

    def __init__(
        self,
        features: nn.Module,
        head: nn.Linear,
        data: Iterable[Batch],
        *,
        loss: Loss = "cross_entropy",
        beta: Number = 0.5,
        weight: Float[Tensor, " classes"] | None = None,
        ignore_index: Integer | None = None,
        label_smoothing: Number = 0.0,
        temperature: Number = 1.0,
        softcap: Number | None = None,
        z_loss: Number = 0.0,
        shift: Integer = 0,
        reduction: Reduction = "mean",
        base: Number = math.e,
        memory_budget: Integer | None = None,
        seed: int = 0,
        progress: bool = False,
        process_group: ProcessGroup | None = None,
        check_deterministic: bool = True,
    ) -> None:
        self.map = FeatureMap(features)
        require_head(head)
        require_walkable("data", data)
        require_count("seed", seed, 0)
        self.losses = HeadLosses(
            loss=loss, beta=beta, weight=weight, ignore_index=ignore_index, label_smoothing=label_smoothing,
            temperature=temperature, softcap=softcap, z_loss=z_loss, shift=shift, reduction=reduction, base=base,
            memory_budget=memory_budget,
        )  # fmt: skip
        self.features, self.head, self.data = features, head, data
        self.seed, self.progress, self.process_group = seed, progress, process_group
        self.layout = Layout.of(features, head)
        for name, parameter in features.named_parameters():
            if lies_over_processes(parameter):
                raise TypeError(
                    f"features must hold plain tensors, got a DTensor as {name}; only the head may be sharded"
                )
        logit_map = LogitMap.of(temperature, softcap)
        require_same_logits(features, logit_map.temperature, logit_map.softcap)
        if check_deterministic:
            if self.by_order:
                require_fixed_order("data", data)
            require_deterministic(self, "data", ordered=self.by_order)

    @property
    def by_order(self) -> bool:
        """Whether the matrix depends on the order of the rows, though features do not."""
        return False

    @property
    def shape(self) -> tuple[int, int]:
        """``(P, P)`` for ``P`` trainable parameters."""
        return self.layout.size, self.layout.size

    @property
    def dtype(self) -> torch.dtype:
        """At least float32."""
        return self.layout.dtype

    @property
    def device(self) -> torch.device:
        """The head's."""
        return self.head.weight.device

    def split(self, vector: Tensor) -> dict[str, Tensor]:
        """A flat vector ``(P,)`` as parameters by name."""
        if vector.shape != (self.layout.size,):
            raise ValueError(f"vector must be of shape ({self.layout.size},), got {checks.describe(vector)}")
        return self.layout.split(vector)

    # --- data --------------------------------------------------------------------------------------------------------

    def rows(self, description: str, *, graph: bool = True) -> Iterator[Rows]:
        """The batches, with the features' ``graph``; dropout is drawn from the seed and the batch's number."""
        batches = _with_progress(self.data, description) if self.progress else self.data
        for number, batch in enumerate(batches):
            _, target, sample_weight = _unpacked(batch, number)
            e = self.features_of(batch, number, graph=graph)
            posed = self.losses.pose(e, self.head.weight, self.head.bias, target, sample_weight)
            with torch.inference_mode(False), torch.set_grad_enabled(graph):
                flat = e.reshape(-1, e.shape[-1])
            yield Rows(number, flat, posed, self.losses.rows(posed))

    def seed_of(self, use: str, number: int) -> int:
        """Of a batch, mixed by a hash: neighbouring seeds, batches and uses of random numbers share none."""
        # Batches of one number are different ones in each process.
        process = f"{self.process_group.rank()} " if self.process_group is not None else ""
        mixed = hashlib.blake2b(f"{process}{self.seed} {number} {use}".encode(), digest_size=4)  # mt19937 takes 32 bits
        return int.from_bytes(mixed.digest(), "little")

    def features_of(self, batch: Any, number: int, *, graph: bool) -> Tensor:
        """The features of a batch, of which the head takes the last dimension."""
        x = _unpacked(batch, number)[0]
        e = self.map(x, self.seed_of("features", number), device=self.device, graph=graph)
        wanted = self.head.in_features
        if not isinstance(e, Tensor) or e.ndim == 0 or e.shape[-1] != wanted:
            came = checks.describe(e) if isinstance(e, Tensor) else type(e).__name__
            raise ValueError(
                f"features must map x to a tensor of shape (..., {wanted}), as wide as head, "
                f"got {came} in batch {number}"
            )
        if lies_over_processes(e):
            raise TypeError("features must return a plain tensor, got a DTensor; return its own rows by to_local()")
        return e

    # --- products ----------------------------------------------------------------------------------------------------

    def _columns(self, vectors: Tensor) -> Tensor:
        with torch.inference_mode(False):
            columns = vectors.T.clone() if vectors.is_inference() else vectors.T
            return self._rows_of_columns(columns.contiguous()).T  # a parameter's part of a row is contiguous

    def _rows_of_columns(self, columns: Tensor) -> Tensor:
        into = torch.zeros_like(columns)
        total = 0.0
        if len(columns):
            for rows in self.rows(f"{type(self).__name__} product"):
                total += float(rows.posed.divisor(self.losses.reducer)) if self.losses.reduction != "sum" else 0.0
                self._add(rows, columns, into)
            self.over_classes(into).div_(self._divisor(self.over_rows(total)))
        return self.summed(into)

    def over_classes(self, part: Tensor) -> Tensor:
        """Of a sharded head each process has filled in its classes, and its part of the features' sum; in place."""
        if (shared := class_group(self.head.weight)) is not None:
            sum_over([part], shared)
        return part

    def own_share(self, whole: Tensor) -> Tensor:
        """What :meth:`over_classes` makes whole again."""
        shared = class_group(self.head.weight)
        return whole if shared is None else whole / shared.size()

    def summed(self, part: Tensor) -> Tensor:
        """Over the processes that walk other data, in place."""
        if self.process_group is not None:
            sum_over([part], self.process_group)
        return part

    def over_rows(self, total: float) -> float:
        """As :meth:`summed`, of a number."""
        return float(self.summed(torch.tensor(total, dtype=torch.float64, device=self.device)))

    def over_everyone(self, count: float) -> float:
        """The sum of a number over all processes that have a part in the products."""
        if self.process_group is None and class_group(self.head.weight) is None:
            return count
        total = torch.tensor(count, dtype=torch.float64, device=self.device)
        return float(self.summed(self.over_classes(total)))

    def _divisor(self, total: float) -> float:
        if self.losses.reduction == "sum":
            return 1.0
        if total == 0:
            raise ValueError("data must hold a row that counts, got none; see ignore_index and sample weights")
        return total

    @abstractmethod
    def _add(self, rows: Rows, columns: Tensor, into: Tensor) -> None:
        """The sum over a batch's rows along each of ``columns (k, P)``, added to ``into``."""

    # --- what batches are made of ------------------------------------------------------------------------------------

    def along(self, columns: Tensor, changes: Sequence[Tensor] | None) -> list[Direction]:
        """Each column as the head sees it; ``changes`` are the features' own, one a column."""
        return [
            Direction(None if changes is None else changes[j], *self._head_parts(column))
            for j, column in enumerate(columns)
        ]

    def sums(self, rows: Rows, into: Tensor, dtype: torch.dtype) -> list[Direction]:
        """Where the head's passes add: the features' part anew, the parameters' part in ``into`` itself."""
        moves = rows.e.requires_grad
        return [
            Direction(torch.zeros_like(rows.e, dtype=dtype, requires_grad=False) if moves else None, *parts)
            for parts in map(self._head_parts, into)
        ]

    def _head_parts(self, flat: Tensor) -> tuple[Tensor | None, Tensor | None]:
        own = own_classes(self.head.weight)
        weight, bias = (
            None if number is None else self.layout.view(flat, number)[own]
            for number in (self.layout.head_weight, self.layout.head_bias)
        )
        return weight, bias

    def add_pulled_back(self, rows: Rows, in_features: Sequence[Tensor | None], into: Tensor) -> None:
        """``into += (∂e/∂θ)ᵀ`` of each column's gradient in the features."""
        for j, cotangent in enumerate(in_features):
            if cotangent is not None and rows.e.requires_grad:
                with self.map.conditions():
                    found = torch.autograd.grad(
                        rows.e, self.moving, cotangent.to(rows.e.dtype), retain_graph=True, allow_unused=True
                    )
                self.add_parts(found, into[j])

    def add_parts(self, parts: Sequence[Tensor | None], flat: Tensor) -> None:
        """Gradients in :attr:`moving`, added to a flat vector."""
        for number, part in zip(self.layout.of_features, parts, strict=True):
            if part is not None:
                self.layout.view(flat, number).add_(part)

    @property
    def moving(self) -> list[nn.Parameter]:
        """The trained parameters that the features use."""
        return [self.layout.tensors[number] for number in self.layout.of_features]

    def linearized(self, rows: Rows, cotangent: Tensor) -> tuple[Tensor, tuple[Tensor | None, ...]]:
        """``u``, a leaf that holds ``cotangent``, and ``h = Jᵀu`` with its graph."""
        u = cotangent.detach().to(rows.e.dtype).requires_grad_()
        with torch.enable_grad(), self.map.conditions():
            h = torch.autograd.grad(rows.e, self.moving, u, create_graph=True, allow_unused=True)
        return u, h

    def pushed_forward(
        self, u: Tensor, h: Sequence[Tensor | None], column: Tensor, *, second: bool
    ) -> tuple[Tensor, tuple[Tensor | None, ...]]:
        """``J v``, and the second-order term in :attr:`moving` if it is wanted."""
        pairs = [
            (part, self.layout.view(column, number).to(part.dtype))
            for number, part in zip(self.layout.of_features, h, strict=True)
            if part is not None and part.requires_grad
        ]
        moving = self.moving if second else []
        if not pairs:
            return torch.zeros_like(u), (None,) * len(moving)
        outputs, directions = zip(*pairs, strict=True)
        with self.map.conditions():
            change, *terms = torch.autograd.grad(
                outputs, [u, *moving], directions, retain_graph=True, allow_unused=True
            )
        return torch.zeros_like(u) if change is None else change, tuple(terms)


def require_walkable(name: str, data: object) -> None:
    """Data for more than one pass."""
    if not isinstance(data, Iterable) or isinstance(data, Iterator):
        raise TypeError(
            f"{name} must be an iterable that can be walked again, such as a list or a DataLoader, got "
            f"{type(data).__name__}; make it a list"
        )


def length_of(data: Iterable[Any]) -> int | None:
    """How many batches, where that is known: a ``DataLoader`` of an iterable dataset has a length only in name."""
    try:
        return len(data) if isinstance(data, Sized) else None
    except TypeError:
        return None


def _unpacked(batch: Any, number: int) -> tuple[Any, Tensor | Target, Tensor | None]:
    if not isinstance(batch, tuple | list) or len(batch) not in (2, 3):
        raise TypeError(
            f"data must yield (x, target) or (x, target, sample_weight), got {type(batch).__name__} in batch {number}; "
            "a single batch is a list of one: [(x, target)]"
        )
    x, target, *rest = batch
    return x, target, rest[0] if rest else None


def _with_progress(data: Iterable[Batch], description: str) -> Iterable[Batch]:
    with needed("progress=True", "app"):
        from rich.console import Console
        from rich.progress import track
    return track(data, description, total=length_of(data), transient=True, console=Console(stderr=True))
