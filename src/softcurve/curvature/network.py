"""A network as features and a head over batches of data, and the base class of its second-order matrices.

The head is streamed (:mod:`softcurve.head.curvature`); the features are differentiated by autograd. One graph of a
batch serves all columns: with ``e = f(θ)`` and ``h(u) = Jᵀu``, the derivative of ``v·h`` is ``J v`` with respect to
``u`` and, at ``u = ∂L/∂e``, the second-order term ``(Σ u ∂²e) v`` with respect to ``θ``. So there are no finite
differences and no forward mode, which many kernels lack, and all columns see the same dropout masks.
"""

from __future__ import annotations

import hashlib
from abc import abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any, Literal, Unpack

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from softcurve import checks
from softcurve.curvature.determinism import require_deterministic
from softcurve.curvature.features import FeatureMap
from softcurve.curvature.losses import HeadLosses, LossOptions, with_options_of
from softcurve.curvature.operator import SymmetricOperator
from softcurve.curvature.split import require_head, require_same_logits
from softcurve.extras import needed
from softcurve.head import loop
from softcurve.head.products import STILL, Direction, MapParts
from softcurve.head.sharded import class_group, lies_over_processes, own_classes
from softcurve.head.tensors import RowLosses, joined
from softcurve.losses.targets import Target
from softcurve.processes import sum_over

Batch = tuple[Any, Tensor | Target] | tuple[Any, Tensor | Target, Tensor] | Mapping[str, Any]
Unit = Literal["row", "sequence"]
Parts = Sequence[Tensor]  # one tensor for each trained parameter of the features


class Layout:
    """The trained parameters of ``features``, then of ``head``, in ``named_parameters`` order, a tied one once.

    ``of_features`` are the numbers of the parameters that the features use, ``head_weight`` and ``head_bias`` those of
    the head's, ``None`` for a frozen one. ``size`` and ``dtype``, at least float32, are those of a flat vector.
    """

    def __init__(self, features: nn.Module, head: nn.Linear) -> None:
        named: dict[Tensor, str] = {}
        for prefix, module in (("features", features), ("head", head)):
            for name, parameter in module.named_parameters():
                if parameter.requires_grad:
                    named.setdefault(parameter, f"{prefix}.{name}")
        if not named:
            raise ValueError("features and head must have a parameter that requires a gradient, got none; unfreeze one")
        places = {parameter: number for number, parameter in enumerate(named)}
        ends = list(accumulate((parameter.numel() for parameter in named), initial=0))
        self.names, self.tensors, self.size = tuple(named.values()), tuple(named), ends[-1]
        self.slices = [slice(start, end) for start, end in pairwise(ends)]
        self.of_features = sorted({places[p] for p in features.parameters() if p in places})
        self.head_weight = places.get(head.weight)
        self.head_bias = None if head.bias is None else places.get(head.bias)
        self.dtype = checks.wide_dtype(*(parameter.dtype for parameter in named))

    def __repr__(self) -> str:
        return f"Layout(size={self.size}, parameters={len(self.names)}, dtype={str(self.dtype).removeprefix('torch.')})"

    def view(self, flat: Tensor, number: int) -> Tensor:
        """Return a parameter's part of a flat vector, in the parameter's shape."""
        return flat[self.slices[number]].view(self.tensors[number].shape)


@dataclass(frozen=True, eq=False)
class BatchRows:
    """The head's rows of a batch, with the graph of the features."""

    number: int
    e: Tensor  # (n, d), with a graph where a parameter of the features is trained
    losses: RowLosses
    divisor: float  # the batch's share of what the sum over all rows is divided by
    sequences: int  # the first dimension of the features, each of the same number of rows

    def grouping(self, unit: Unit) -> tuple[int, int]:
        """Return the number of units and the number of rows in each: single rows, or those of a sequence."""
        return (len(self.e), 1) if unit == "row" else (self.sequences, len(self.e) // max(1, self.sequences))


@dataclass(eq=False)
class SplitNetwork:
    """``head(features(x))`` over all batches of ``data``, with the loss of the head."""

    features: nn.Module
    head: nn.Linear
    data: Iterable[Batch]
    losses: HeadLosses
    seed: int
    progress: bool
    process_group: ProcessGroup | None

    def __post_init__(self) -> None:
        self.map = FeatureMap(self.features)
        require_head(self.head)
        require_reiterable("data", self.data)
        checks.require_count("seed", self.seed, 0)
        self.layout = Layout(self.features, self.head)
        self.class_group = class_group(self.head.weight)
        for name, parameter in self.features.named_parameters():
            if lies_over_processes(parameter):
                raise TypeError(
                    f"features must hold plain tensors, got a DTensor as {name}; only the head may be sharded"
                )
        require_same_logits(self.features, self.losses.spec.temperature, self.losses.spec.softcap)

    @property
    def device(self) -> torch.device:
        """The device of the head."""
        return self.head.weight.device

    def rows(self, description: str, *, graph: bool = True) -> Iterator[BatchRows]:
        """Iterate over the batches, with the ``graph`` of the features or without."""
        for number, batch in enumerate(_with_progress(self.data, description) if self.progress else self.data):
            _, target, sample_weight = _unpack(batch, number)
            e = self.features_of(batch, number, graph=graph)
            problem = self.losses.problem(e, self.head.weight, self.head.bias, target, sample_weight)
            with torch.inference_mode(False), torch.set_grad_enabled(graph):
                flat = e.reshape(-1, e.shape[-1])
            divisor, sequences = float(problem.divisor(self.losses.reducer)), 1 if e.ndim == 1 else len(e)
            yield BatchRows(number, flat, self.losses.rows(problem), divisor, sequences)

    def random_seed(self, use: str, number: int) -> int:
        """Return a seed for one use of random numbers in a batch; the hash keeps neighbouring seeds and uses apart."""
        # Batches of the same number are different ones in each process.
        process = f"{self.process_group.rank()} " if self.process_group is not None else ""
        mixed = hashlib.blake2b(f"{process}{self.seed} {number} {use}".encode(), digest_size=4)  # mt19937 takes 32 bits
        return int.from_bytes(mixed.digest(), "little")

    def features_of(self, batch: Any, number: int, *, graph: bool) -> Tensor:
        """Return the features of a batch, ``(..., d)``; dropout is drawn from the seed and the batch's number."""
        x = _unpack(batch, number)[0]
        e = self.map(x, self.random_seed("features", number), device=self.device, graph=graph)
        width = self.head.in_features
        if not isinstance(e, Tensor) or e.ndim == 0 or e.shape[-1] != width:
            raise ValueError(
                f"features must map x to a tensor of shape (..., {width}), as head takes, got {checks.describe(e)} in "
                f"batch {number}"
            )
        if lies_over_processes(e):
            raise TypeError("features must return a plain tensor, got a DTensor; return its own rows by to_local()")
        return e

    # Sums over processes: those that hold other classes of a sharded head, and those that iterate over other data.

    def sum_class_shards(self, part: Tensor) -> Tensor:
        """Sum in place over the processes of a sharded head, each of which has filled in its classes."""
        if self.class_group is not None:
            sum_over([part], self.class_group)
        return part

    def class_share(self, whole: Tensor) -> Tensor:
        """This process's share of a tensor that :meth:`sum_class_shards` is to restore."""
        return whole if self.class_group is None else whole / self.class_group.size()

    def sum_data_shards(self, part: Tensor) -> Tensor:
        """Sum in place over the processes that iterate over other data."""
        if self.process_group is not None:
            sum_over([part], self.process_group)
        return part

    def sum_number(self, number: float, *, over_classes: bool = False) -> float:
        """Sum a number over the processes with other data and, if ``over_classes``, over those with other classes."""
        part = torch.tensor(number, dtype=torch.float64, device=self.device)
        return float(self.sum_data_shards(self.sum_class_shards(part) if over_classes else part))

    def divisor(self, total: float, name: str = "data") -> float:
        """What the sum over all rows is divided by, from the ``total`` of this process's batches."""
        return 1.0 if self.losses.reducer.kind == "sum" else self.require_rows(total, name)

    def require_rows(self, total: float, name: str = "data") -> float:
        """Sum a number over the processes with other data; 0 is an error that names the argument of the rows."""
        total = self.sum_number(total)
        if total == 0:
            raise ValueError(f"{name} must hold a row that counts, got none; see ignore_index and sample weights")
        return total

    # Derivatives of the features, and the head's part of flat vectors.

    @property
    def trained(self) -> list[Tensor]:
        """The trained parameters that the features use."""
        return [self.layout.tensors[number] for number in self.layout.of_features]

    def directions(
        self, rows: BatchRows, columns: Tensor, cotangent: Tensor | None = None
    ) -> tuple[list[Direction], list[Parts]]:
        """Return each of ``columns (k, P)`` as a change of the head's input, ``J v``, weight and bias.

        With a ``cotangent`` ``u (n, d)`` also the second-order terms ``(Σ u ∂²e) v`` of each column.
        """
        if not rows.e.requires_grad:
            return [Direction(None, *self._head_parts(column)) for column in columns], []
        u = torch.zeros_like(rows.e) if cotangent is None else cotangent.detach().to(rows.e.dtype)
        wanted = [u.requires_grad_(), *(self.trained if cotangent is not None else ())]
        with torch.enable_grad():
            h = self._vjp(rows.e, self.trained, u, create_graph=True)
        moving = [(part, number) for part, number in zip(h, self.layout.of_features, strict=True) if part.requires_grad]
        directions: list[Direction] = []
        terms: list[Parts] = []
        for column in columns:
            along = [self.layout.view(column, number).to(part.dtype) for part, number in moving]
            change, *second = self._vjp([part for part, _ in moving], wanted, along)
            directions.append(Direction(change, *self._head_parts(column)))
            terms.append(second)
        return directions, terms

    def _vjp(self, outputs: Any, inputs: Parts, cotangents: Any, *, create_graph: bool = False) -> Parts:
        """Return the vector-Jacobian product of a part of the features' graph, which is kept."""
        if not len(outputs):
            return [torch.zeros_like(each) for each in inputs]
        with self.map.conditions():
            return torch.autograd.grad(
                outputs, inputs, cotangents, retain_graph=True, create_graph=create_graph, materialize_grads=True
            )

    def sums(self, rows: BatchRows, into: Tensor) -> list[Direction]:
        """Where the head's passes add: new zeros for the features, views of ``into (k, P)`` for the parameters."""
        has_graph, dtype = rows.e.requires_grad, rows.losses.tensors.dtype
        return [
            Direction(torch.zeros_like(rows.e, dtype=dtype, requires_grad=False) if has_graph else None, *parts)
            for parts in map(self._head_parts, into)
        ]

    def _head_parts(self, flat: Tensor) -> tuple[Tensor | None, Tensor | None]:
        own = own_classes(self.head.weight)
        weight, bias = (
            None if number is None else self.layout.view(flat, number)[own]
            for number in (self.layout.head_weight, self.layout.head_bias)
        )
        return weight, bias

    def add_pulled_back(self, rows: BatchRows, sums: Sequence[Direction], into: Tensor) -> None:
        """``into += (∂e/∂θ)ᵀ`` of the features' part of each of ``sums``."""
        for j, (cotangent, _, _) in enumerate(sums):
            if cotangent is not None and rows.e.requires_grad:
                self.add_parts(self._vjp(rows.e, self.trained, cotangent.to(rows.e.dtype)), into[j])

    def add_parts(self, parts: Parts, flat: Tensor) -> None:
        """Add gradients with respect to :attr:`trained` to a flat vector."""
        for number, part in zip(self.layout.of_features, parts, strict=True):
            self.layout.view(flat, number).add_(part)

    def gradients(self, rows: BatchRows, unit: Unit) -> Iterator[Tensor]:
        """Yield this process's share of ``Σ w ∇ℓ`` of each unit of a batch, ``(P,)``, one at a time."""
        count, size = rows.grouping(unit)
        return (self.gradient(rows, slice(size * number, size * (number + 1))) for number in range(count))

    def gradient(self, rows: BatchRows, some: slice) -> Tensor:
        """Return this process's share of ``Σ w ∇ℓ`` over some rows of a batch, ``(P,)``."""
        loss, t, _, budget = rows.losses
        target, indices = (None if part is None else part[some] for part in (t.target, t.indices))
        t = t._replace(input=t.input[some], target=target, indices=indices, row_weight=t.row_weight[some])
        columns = torch.zeros(1, self.layout.size, dtype=self.layout.dtype, device=self.device)
        (into,) = sums = self.sums(rows, columns)
        wanted = [part is not None for part in joined(MapParts(*into), STILL)]
        in_input, in_weight, in_bias, *_ = loop.evaluate(loss, t, budget, wanted=wanted).gradients
        if into.input is not None and in_input is not None:
            into.input[some] += self.class_share(in_input)
        for part, gradient in ((into.weight, in_weight), (into.bias, in_bias)):
            if part is not None and gradient is not None:
                part += gradient
        self.add_pulled_back(rows, sums, columns)
        return columns.squeeze(0)


class NetworkOperator(SymmetricOperator):
    """A second-order matrix of ``loss(head(features(x)), target)`` over all of ``data``."""

    depends_on_order: bool = False  # whether the matrix depends on the order of the rows

    @with_options_of(HeadLosses.of)
    def __init__(
        self, features: nn.Module, head: nn.Linear, data: Iterable[Batch], *, seed: int = 0, progress: bool = False,
        process_group: ProcessGroup | None = None, check_deterministic: bool = True, **options: Unpack[LossOptions],
    ) -> None:  # fmt: skip
        self.features, self.head, self.data = features, head, data
        self.losses = HeadLosses.of(**options)
        self.network = SplitNetwork(features, head, data, self.losses, seed, progress, process_group)
        self.layout = self.network.layout
        if check_deterministic:
            require_deterministic(self.network, "data", ordered=self.depends_on_order)

    @property
    def shape(self) -> tuple[int, int]:
        """The shape ``(P, P)`` for ``P`` trained parameters."""
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
        """Return a flat vector ``(P,)`` as tensors by parameter name."""
        if vector.shape != (self.layout.size,):
            raise ValueError(f"vector must be of shape ({self.layout.size},), got {checks.describe(vector)}")
        return {name: self.layout.view(vector, number) for number, name in enumerate(self.layout.names)}

    def _columns(self, vectors: Tensor) -> Tensor:
        with torch.inference_mode(False):
            columns = vectors.T
            if vectors.is_inference() or not columns.is_contiguous():
                # So that a parameter's part of a row is contiguous; column by column takes half the time of one copy.
                columns = torch.stack(vectors.unbind(1)) if vectors.shape[1] else columns.clone()
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


def require_reiterable(name: str, data: object) -> None:
    """Require an iterable that starts again with each loop: every product reads all of the data."""
    if not isinstance(data, Iterable) or isinstance(data, Iterator):
        raise TypeError(
            f"{name} must be a re-iterable of batches, such as a list or a DataLoader, got {type(data).__name__}; "
            "make it a list"
        )


def length_of(data: Any) -> int | None:
    """Return the number of batches if it is known: a ``DataLoader`` of an iterable dataset has no working length."""
    try:
        return len(data)
    except TypeError:
        return None


def _unpack(batch: Any, number: int) -> tuple[Any, Tensor | Target, Tensor | None]:
    if isinstance(batch, Mapping) and batch.get("labels") is not None:
        return batch, batch["labels"], None  # an encoder-decoder makes its decoder's input from the labels
    if not isinstance(batch, tuple | list) or len(batch) not in (2, 3):
        raise TypeError(
            f"data must yield (x, target) or (x, target, sample_weight), got {type(batch).__name__} in batch {number}; "
            "a single batch is a list of one: [(x, target)], and a mapping must have labels"
        )
    x, target, *rest = batch
    return x, target, rest[0] if rest else None


def _with_progress(data: Iterable[Batch], description: str) -> Iterable[Batch]:
    with needed("progress=True", "app"):
        from rich.console import Console
        from rich.progress import track
    return track(data, description, total=length_of(data), transient=True, console=Console(stderr=True))
