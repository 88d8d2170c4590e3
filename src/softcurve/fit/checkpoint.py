"""The state of a fit as a safetensors file, written whole or not at all: a run that is killed goes on from it."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from softcurve.fit import DataError
from softcurve.fit.atomic import check_writable
from softcurve.fit.solver.coordinates import Coordinates
from softcurve.fit.solver.newton import State, Step
from softcurve.fit.tensor_file import read_tensors, write_tensors
from softcurve.fit.together import Together

__all__ = ["Checkpoint", "digest", "state_of_first"]

FORMAT = "softcurve.fit"
VERSION = "2"


def digest(*pieces: Tensor) -> str:
    """Of a tensor's values; it may come in pieces."""
    state = hashlib.sha256()
    for piece in pieces:
        state.update(piece.contiguous().numpy().tobytes())
    return state.hexdigest()[:16]


def state_of_first(state: State | None, shape: tuple[int, int], together: Together) -> State | None:
    """The state that the first process has read; ``shape`` is that of its parameters."""
    said = together.texts("" if state is None else _told(state))[0]
    if together.size == 1 or not said:
        return state
    parameters = torch.zeros(shape, dtype=torch.float64) if state is None else state.parameters
    return _understood(said, together.from_first(parameters))


class Checkpoint:
    """Reads the state that belongs to these rows and settings, and writes it every so many seconds.

    A Newton step depends on nothing but the state, so that a run which goes on from it ends where it would have ended.
    Eigenvectors, of any sign, may come out otherwise on another machine; a run goes on there from the head.
    """

    def __init__(self, path: Path, coordinates: Coordinates, rows: str, settings: str, *, every: float) -> None:
        check_writable(path, "checkpoint")
        if not every >= 0:
            raise DataError(f"checkpoint_every must be a number of seconds, 0 or more; got {every!r}")
        self.path, self.coordinates, self.every = path, coordinates, every
        basis = coordinates.basis
        self.axes = digest(coordinates.mean) + ("" if basis is None else digest(basis))
        self.identity = {"format": FORMAT, "format_version": VERSION, "rows": rows, "settings": settings}
        self.written = time.monotonic()

    def load(self, classes: int) -> State | None:
        """The state, or ``None`` where no file is there yet. Raises DataError, and leaves the file as it is."""
        if not self.path.exists():
            return None
        tensors, metadata = self._read()
        for name, expected in self.identity.items():
            if metadata.get(name) != expected:
                raise DataError(
                    f"checkpoint: {self.path} is of another run: its {name} is {metadata.get(name)!r}, and here it is "
                    f"{expected!r}; give another file, or the rows and options that it was written with"
                )
        weight = self._checked(tensors, "weight", (classes, len(self.coordinates.mean)))
        parameters = self.coordinates.parameters(weight, self._checked(tensors, "bias", (classes,)))
        if metadata.get("axes") == self.axes:  # without the rounding of a turn
            parameters = self._checked(tensors, "parameters", (classes, self.coordinates.size))
        try:
            return _understood(metadata["state"], parameters)
        except (KeyError, TypeError, ValueError) as error:
            raise self._damaged("its metadata 'state' cannot be read") from error

    def save(self, state: State, *, now: bool = False) -> None:
        """Write the state if it is time to, or ``now``."""
        if not now and time.monotonic() - self.written < self.every:
            return
        weight, bias = self.coordinates.head(state.parameters)
        tensors = {"weight": weight, "bias": bias, "parameters": state.parameters}
        write_tensors(self.path, tensors, self.identity | {"axes": self.axes, "state": _told(state)})
        self.written = time.monotonic()

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


def _told(state: State) -> str:
    """All but the parameters."""
    kept = {key: getattr(state, key) for key in STATE} | {"history": [asdict(step) for step in state.history]}
    return json.dumps(kept)


def _understood(said: str, parameters: Tensor) -> State:
    """Raises KeyError, TypeError or ValueError for what ``_told`` has not said."""
    state = json.loads(said)
    history = tuple(Step(**{key: kind(step[key]) for key, kind in STEP.items()}) for step in state["history"])
    kept = {key: kind(state[key]) for key, kind in STATE.items()}
    if not history or not kept["damping"] >= 0.0:
        raise ValueError("no step, or a damping below zero")
    return State(parameters, history=history, **kept)


# Of a state, beside the parameters and the history; and of a step.
STATE: dict[str, Callable[[Any], Any]] = {
    "damping": float, "model_error": float, "failures": int, "double": bool, "blocks": bool,
}  # fmt: skip
STEP: dict[str, Callable[[Any], Any]] = {
    "iteration": int, "objective": float, "gradient_max": float, "products": int, "seconds": float, "damping": float,
}  # fmt: skip
