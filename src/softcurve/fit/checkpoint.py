"""The state of a fit as a safetensors file, from which a run that was killed continues.

The file holds a digest of everything else in it, so that any damage is noticed. It names the rows and the options of
its run; a run with others refuses it.
"""

from __future__ import annotations

import hashlib
import json
import math
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from softcurve.files.atomic import check_writable, replacing
from softcurve.files.tensors import digest_of_all, encode_tensors, read_tensors
from softcurve.fit import DataError
from softcurve.fit.group import Group, LostProcess
from softcurve.fit.solver.coordinates import Coordinates
from softcurve.fit.solver.newton import OtherRows, State, Step

FORMAT = "softcurve.fit"
VERSION = "5"
ANOTHER = "give another file, or the rows and options that it was written with"
DESCRIPTIONS = {"rows": "digest of the rows to fit", "weights": "digest of the weights"}
OF_BLOCKS = "blocks_"  # the tensors of the point where the blocks of the classes are computed
# The largest values of the fields of a state and of a step that are stored as JSON, by their type.
LARGEST: dict[Any, float] = {"bool": 1, "int": 2**63 - 1, "float": sys.float_info.max}


def digest(*pieces: Tensor) -> str:
    """Return the digest of the values of a tensor that comes in pieces."""
    state = hashlib.sha256()
    for piece in pieces:
        state.update(piece.contiguous().numpy().tobytes())
    return state.hexdigest()[:16]


class Checkpoint:
    """The latest state of a fit, also in a file if ``path`` is given, which the first process reads and writes.

    ``identity`` has a digest of the rows, and the options by name; ``on_step`` is called with every step. A Newton step
    depends only on the state. Where another machine finds other eigenvectors, it is made from the head.
    """

    def __init__(
        self, path: Path | None, coordinates: Coordinates, identity: Mapping[str, str], group: Group, *, every: float,
        on_step: Callable[[Step], None],
    ) -> None:  # fmt: skip
        self.path, self.coordinates, self.group, self.every, self.on_step = path, coordinates, group, every, on_step
        self.identity = {"format": FORMAT, "format_version": VERSION, **identity}
        self.latest: State | None = None
        self.written = time.monotonic()

    @cached_property
    def axes(self) -> str:
        """The digest of the coordinates."""
        basis = self.coordinates.basis
        return digest(self.coordinates.mean) + ("" if basis is None else digest(basis))

    def open(self, classes: int) -> State | None:
        """Return the state in the file, in all processes; ``None`` if there is no file. Raises DataError."""
        if self.path is None:
            return None
        state = None
        with self.group.agreed():
            if self.group.first:
                check_writable(self.path, "checkpoint")
                if not self.every >= 0:
                    raise DataError(f"checkpoint_every must be a number of seconds, 0 or more; got {self.every!r}")
                state = self._load(self.path, classes) if self.path.exists() else None
        return self.group.values(state)[0]

    def note(self, state: State) -> None:
        """Keep the state after a step."""
        self.latest = state
        with self.group.agreed():
            self._save(now=False)
            self.on_step(state.history[-1])

    @contextmanager
    def running(self) -> Iterator[None]:
        """Write the latest state at the end of the block, and where it is interrupted or another process is lost."""
        try:
            yield
            with self.group.agreed():
                self._save(now=True)
        except KeyboardInterrupt:
            self._save(now=True)
            raise
        except LostProcess:
            with suppress(OSError, DataError):  # the loss is the error to be shown
                self._save(now=True)
            raise
        except OtherRows as error:
            raise DataError(f"checkpoint: {self.path} is of other rows: {error}; {ANOTHER}") from error

    def _load(self, path: Path, classes: int) -> State:
        """Read the state. Raises DataError, and leaves the file unchanged."""
        try:
            tensors, metadata = read_tensors(path)
        except ValueError as error:
            raise self._damaged(str(error)) from error
        self._require_same(metadata, ("format", "format_version"))
        if metadata.pop("digest", None) != digest_of_all(tensors, metadata):
            raise self._damaged("its content does not agree with the digest that was written with it")
        self._require_same(metadata, self.identity)
        parameters = self._point(tensors, "", classes)
        if metadata.get("axes") == self.axes:  # without the rounding of the conversion
            parameters = self._checked(tensors, "parameters", (classes, self.coordinates.size))
        blocks_at = self._point(tensors, OF_BLOCKS, classes) if OF_BLOCKS + "weight" in tensors else None
        try:
            return replace(_decoded(metadata["state"], parameters), blocks_at=blocks_at)
        except (KeyError, TypeError, ValueError, RecursionError) as error:
            raise self._damaged("its metadata 'state' cannot be read") from error

    def _save(self, *, now: bool) -> None:
        """Write the latest state if ``every`` seconds have passed since the last time, or ``now``."""
        state, waits = self.latest, not now and time.monotonic() - self.written < self.every
        if self.path is None or state is None or waits or not self.group.first:
            return
        tensors = {"parameters": state.parameters}
        for prefix, point in (("", state.parameters), (OF_BLOCKS, state.blocks_at)):
            if point is not None:
                tensors[prefix + "weight"], tensors[prefix + "bias"] = self.coordinates.head(point)
        values = {field.name: getattr(state, field.name) for field in fields(state) if field.type in LARGEST}
        encoded = json.dumps(values | {"history": [asdict(step) for step in state.history]})
        metadata = self.identity | {"axes": self.axes, "state": encoded}
        with replacing(self.path, "checkpoint") as file:
            file.writelines(encode_tensors(tensors, metadata | {"digest": digest_of_all(tensors, metadata)}))
        self.written = time.monotonic()

    def _require_same(self, metadata: Mapping[str, str], names: Iterable[str]) -> None:
        for name in names:
            if metadata.get(name) != self.identity[name]:
                raise DataError(
                    f"checkpoint: {self.path} is of another run: its {DESCRIPTIONS.get(name, name)} is "
                    f"{metadata.get(name)!r}, and here it is {self.identity[name]!r}; {ANOTHER}"
                )

    def _point(self, tensors: dict[str, Tensor], prefix: str, classes: int) -> Tensor:
        weight = self._checked(tensors, prefix + "weight", (classes, len(self.coordinates.mean)))
        return self.coordinates.parameters(weight, self._checked(tensors, prefix + "bias", (classes,)))

    def _checked(self, tensors: dict[str, Tensor], name: str, shape: tuple[int, ...]) -> Tensor:
        tensor = tensors.get(name)
        if tensor is None or tensor.shape != shape or tensor.dtype != torch.float64:
            raise self._damaged(f"its tensor {name!r} must be float64 of shape {shape}")
        if not tensor.isfinite().all():
            raise self._damaged(f"its tensor {name!r} has entries that are not finite")
        return tensor

    def _damaged(self, what: str) -> DataError:
        return DataError(f"checkpoint: {self.path} is damaged: {what}; it was left as it is: delete it to start anew")


def _decoded(text: str, parameters: Tensor) -> State:
    """Return the state of a JSON text. Raises KeyError, TypeError, ValueError or RecursionError for any other text."""
    values = json.loads(text)
    history = tuple(Step(**_checked_fields(step, Step)) for step in values["history"])
    if not history or [step.iteration for step in history] != list(range(len(history))):
        raise ValueError("the steps must count from 0")
    return State(parameters, history=history, **_checked_fields(values, State))


def _checked_fields(values: Mapping[str, Any], record: type[State | Step]) -> dict[str, Any]:
    """Return the fields of a record that are numbers, of the right type and range."""
    kinds = {field.name: field.type for field in fields(record) if field.type in LARGEST}
    for name, kind in kinds.items():
        value, least = values[name], -LARGEST["float"] if name == "objective" else 0
        largest = math.inf if name == "model_error" else LARGEST[kind]
        if type(value).__name__ != kind or not least <= value <= largest:
            raise ValueError(f"{name} must be of type {kind} and at least {least}, got {value!r}")
    return {name: values[name] for name in kinds}
