"""The state of a fit as a safetensors file, written whole or not at all: a run that is killed goes on from it.

The file holds a digest of everything else in it, so that no damage goes unnoticed. It names the rows and the options
that it belongs to; a state of others is refused.
"""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from softcurve.fit import DataError
from softcurve.fit.atomic import check_writable
from softcurve.fit.group import Group, LostProcess
from softcurve.fit.solver.coordinates import Coordinates
from softcurve.fit.solver.newton import OtherRows, State, Step
from softcurve.fit.tensor_file import read_tensors, write_tensors

__all__ = ["Checkpoint", "Keeper", "digest", "digest_of_all"]

FORMAT = "softcurve.fit"
VERSION = "3"
ANOTHER = "give another file, or the rows and options that it was written with"
CALLED = {"rows": "digest of the rows to fit", "weights": "digest of the weights"}


def digest(*pieces: Tensor) -> str:
    """The digest of a tensor's values; it may come in pieces."""
    state = hashlib.sha256()
    for piece in pieces:
        state.update(piece.contiguous().numpy().tobytes())
    return state.hexdigest()[:16]


class Checkpoint:
    """Reads the state that belongs to these rows and options, and writes it every so many seconds.

    ``identity`` has a digest of the rows, and the options by name. A Newton step depends on nothing but the state, so
    that a run which goes on from it ends where it would have ended. Eigenvectors, of any sign, may come out otherwise
    on another machine; a run goes on there from the head.
    """

    def __init__(self, path: Path, coordinates: Coordinates, identity: Mapping[str, str], *, every: float) -> None:
        check_writable(path, "checkpoint")
        if not every >= 0:
            raise DataError(f"checkpoint_every must be a number of seconds, 0 or more; got {every!r}")
        self.path, self.coordinates, self.every = path, coordinates, every
        basis = coordinates.basis
        self.axes = digest(coordinates.mean) + ("" if basis is None else digest(basis))
        self.identity = {"format": FORMAT, "format_version": VERSION, **identity}
        self.written = time.monotonic()

    def load(self, classes: int) -> State | None:
        """The state, or ``None`` where no file is there yet. Raises DataError, and leaves the file as it is."""
        if not self.path.exists():
            return None
        tensors, metadata = self._read()
        self._require_same(metadata, ("format", "format_version"))
        if metadata.pop("digest", None) != digest_of_all(tensors, metadata):
            raise self._damaged("its content does not agree with the digest that was written with it")
        self._require_same(metadata, self.identity)
        weight = self._checked(tensors, "weight", (classes, len(self.coordinates.mean)))
        parameters = self.coordinates.parameters(weight, self._checked(tensors, "bias", (classes,)))
        if metadata.get("axes") == self.axes:  # without the rounding of a turn
            parameters = self._checked(tensors, "parameters", (classes, self.coordinates.size))
        try:
            return _understood(metadata["state"], parameters)
        except (KeyError, TypeError, ValueError, OverflowError, RecursionError) as error:
            raise self._damaged("its metadata 'state' cannot be read") from error

    def save(self, state: State, *, now: bool = False) -> None:
        """Write the state if it is time to, or ``now``."""
        if not now and time.monotonic() - self.written < self.every:
            return
        weight, bias = self.coordinates.head(state.parameters)
        tensors = {"weight": weight, "bias": bias, "parameters": state.parameters}
        metadata = self.identity | {"axes": self.axes, "state": _told(state)}
        write_tensors(self.path, tensors, metadata | {"digest": digest_of_all(tensors, metadata)})
        self.written = time.monotonic()

    def _require_same(self, metadata: Mapping[str, str], names: Iterable[str]) -> None:
        for name in names:
            found, expected = metadata.get(name), self.identity[name]
            if found != expected:
                raise DataError(
                    f"checkpoint: {self.path} is of another run: its {CALLED.get(name, name)} is {found!r}, and here "
                    f"it is {expected!r}; {ANOTHER}"
                )

    def _read(self) -> tuple[dict[str, Tensor], dict[str, str]]:
        try:
            return read_tensors(self.path)
        except ValueError as error:
            raise self._damaged(str(error)) from error

    def _checked(self, tensors: dict[str, Tensor], name: str, shape: tuple[int, ...]) -> Tensor:
        tensor = tensors.get(name)
        if tensor is None or tensor.shape != shape or tensor.dtype != torch.float64:
            raise self._damaged(f"its tensor {name!r} must be float64 of shape {shape}")
        if not tensor.isfinite().all():
            raise self._damaged(f"its tensor {name!r} has entries that are not finite")
        return tensor

    def _damaged(self, what: str) -> DataError:
        return DataError(f"checkpoint: {self.path} is damaged: {what}; it was left as it is: delete it to start anew")


class Keeper:
    """Keeps the latest state of a fit, and calls ``on_step`` with every step.

    Where a file is opened, the state is kept in it; the first of several processes reads and writes it.
    """

    def __init__(self, together: Group, on_step: Callable[[Step], None]) -> None:
        self.together, self.on_step = together, on_step
        self.path: Path | None = None
        self.file: Checkpoint | None = None
        self.latest: State | None = None

    def open(
        self, path: Path, coordinates: Coordinates, identity: Mapping[str, str], classes: int, *, every: float
    ) -> State | None:
        """The state that the file has, in all processes; ``None`` where there is no file yet. Raises DataError."""
        self.path, state = path, None
        with self.together.agreed():
            if self.together.first:
                self.file = Checkpoint(path, coordinates, identity, every=every)
                state = self.file.load(classes)
        said = self.together.texts("" if state is None else _told(state))[0]
        if self.together.size == 1 or not said:
            return state
        parameters = torch.zeros(classes, coordinates.size, dtype=torch.float64)
        return _understood(said, self.together.from_first(parameters if state is None else state.parameters))

    def note(self, state: State) -> None:
        """The state after a step, which is written if it is time to."""
        self.latest = state
        with self.together.agreed():
            self._save(now=False)
            self.on_step(state.history[-1])

    @contextmanager
    def running(self) -> Iterator[None]:
        """Write the latest state at the end of the block, and where it is interrupted or another process is lost."""
        try:
            yield
            with self.together.agreed():
                self._save(now=True)
        except KeyboardInterrupt:
            self._save(now=True)
            raise
        except LostProcess:
            with suppress(OSError, DataError):  # the error to be shown is the loss
                self._save(now=True)
            raise
        except OtherRows as error:
            raise DataError(f"checkpoint: {self.path} is of other rows: {error}; {ANOTHER}") from error

    def _save(self, *, now: bool) -> None:
        # Before the first point there is nothing to go on from.
        if self.file is not None and self.latest is not None:
            self.file.save(self.latest, now=now)


def digest_of_all(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> str:
    """The digest of the names, types, shapes and values of tensors, and of all metadata."""
    form = [(name, str(tensor.dtype), list(tensor.shape)) for name, tensor in sorted(tensors.items())]
    state = hashlib.sha256(json.dumps([form, sorted(metadata.items())]).encode())
    for _, tensor in sorted(tensors.items()):
        state.update(tensor.contiguous().view(-1).view(torch.uint8).numpy().data)
    return state.hexdigest()


def _told(state: State) -> str:
    """All but the parameters."""
    kept = {key: getattr(state, key) for key in STATE} | {"history": [asdict(step) for step in state.history]}
    return json.dumps(kept)


def _understood(said: str, parameters: Tensor) -> State:
    """Raises KeyError, TypeError, ValueError, OverflowError or RecursionError for what ``_told`` has not said."""
    state = json.loads(said)
    history = tuple(Step(**{key: kind(step[key]) for key, kind in STEP.items()}) for step in state["history"])
    if not history or [step.iteration for step in history] != list(range(len(history))):
        raise ValueError("the steps must count from 0")
    return State(parameters, history=history, **{key: kind(state[key]) for key, kind in STATE.items()})


def _flag(value: Any) -> bool:
    if type(value) is not bool:
        raise ValueError(f"{value!r} is no truth value")
    return value


def _count(value: Any) -> int:
    if type(value) is not int or not 0 <= value < 2**63:
        raise ValueError("it is no integer of 0 or more, or too large")
    return value


def _finite(value: Any) -> float:
    if type(value) not in (int, float) or not math.isfinite(value):
        raise ValueError(f"{value!r} is not finite")
    return float(value)


def _size(value: Any) -> float:
    if _finite(value) < 0.0:
        raise ValueError(f"{value!r} is below zero")
    return float(value)


def _size_or_infinite(value: Any) -> float:
    return value if value == math.inf else _size(value)


# Of a state, beside the parameters and the history; and of a step.
STATE: dict[str, Callable[[Any], Any]] = {
    "damping": _size, "model_error": _size_or_infinite, "failures": _count, "double": _flag, "blocks": _flag,
}  # fmt: skip
STEP: dict[str, Callable[[Any], Any]] = {
    "iteration": _count, "objective": _finite, "gradient_max": _size, "products": _count, "seconds": _size,
    "damping": _size,
}  # fmt: skip
