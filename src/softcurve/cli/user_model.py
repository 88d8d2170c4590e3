"""Models of somebody's own code: ``FILE.py:function`` or ``package.module:function``, imported and called."""

from __future__ import annotations

import importlib
import importlib.util
import sys
import traceback
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import nn

from softcurve.fit import DataError

__all__ = ["UserModel", "call_function", "first_line", "place_in", "said"]


class UserModel(NamedTuple):
    """What a function returned, and the file that it stands in."""

    features: nn.Module
    head: nn.Linear
    data: Iterable[Any]
    file: str | None


def call_function(model: str, seed: int) -> UserModel:
    """What the function returns, torch's generator seeded before. Raises DataError."""
    source, colon, name = model.rpartition(":")
    if not (colon and source and name):
        raise DataError(
            f"model: {model} must be a head that ends in .safetensors, or FILE.py:function or "
            "package.module:function, which returns (features, head, data)"
        )
    module = _imported(source)
    function = getattr(module, name, None)
    if not callable(function):
        found = [key for key, value in vars(module).items() if getattr(value, "__module__", "") == module.__name__]
        raise DataError(
            f"model: {source} has no function {name!r}; it has {', '.join(map(repr, found[:8])) or 'none at all'}"
        )
    torch.manual_seed(seed)
    try:
        made = function()
    except (Exception, SystemExit) as error:
        raise DataError(f"model: {model} raised {said(error)}{place_in(module.__file__, error)}") from error
    return UserModel(*_checked(model, made), module.__file__)


def _imported(source: str) -> ModuleType:
    """The module, imported as Python itself would run it: with its folder, or the current one, on the path."""
    path = Path(source)
    is_file = path.suffix == ".py" or len(path.parts) > 1
    if is_file and path.suffix != ".py":
        raise DataError(f"model: {source} must end in .py, or be a module as in package.module:function")
    if is_file and not path.is_file():
        raise DataError(f"model: there is no file {source}; check the path")
    folder = str(path.resolve().parent if is_file else Path.cwd())
    if folder not in sys.path:
        sys.path.insert(0, folder)
    try:
        return _of_file(path.resolve()) if is_file else importlib.import_module(source)
    except (Exception, SystemExit) as error:
        place = place_in(str(path.resolve()), error) if is_file else ""
        raise DataError(f"model: {source} cannot be imported: {said(error)}{place}") from error


def _of_file(path: Path) -> ModuleType:
    # Under its own name worker processes can import it too, unless that is the name of another module.
    name = path.stem if path.stem not in sys.modules else f"softcurve_model_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        sys.modules.pop(name, None)
        raise
    return module


def _checked(model: str, made: object) -> tuple[nn.Module, nn.Linear, Iterable[Any]]:
    if isinstance(made, tuple | list) and len(made) == 3:
        features, head, data = made
        if isinstance(features, nn.Module) and isinstance(head, nn.Linear) and isinstance(data, Iterable):
            if not isinstance(data, Iterator):
                return features, head, data
            raise DataError(
                f"model: {model} must return data that can be walked again, such as a list or a DataLoader; "
                f"got a one-time {type(data).__name__}: make it a list"
            )
    came = type(made).__name__
    if isinstance(made, tuple | list):
        came = f"({', '.join(type(part).__name__ for part in made)})"
    raise DataError(
        f"model: {model} must return (features, head, data), a torch.nn.Module, a torch.nn.Linear and an iterable of "
        f"batches (x, target); got {came}"
    )


def said(error: BaseException) -> str:
    """``Type: first line of the message``."""
    line = first_line(error)
    return f"{type(error).__name__}: {line}" if line else type(error).__name__


def first_line(error: BaseException) -> str:
    """Of the message."""
    return next(iter(str(error).strip().splitlines()), "")


def place_in(file: str | None, error: BaseException) -> str:
    """The line of ``file`` that an error came through, or nothing where it did not."""
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == file]
    return f" ({Path(file).name}, line {lines[-1]})" if file and lines else ""
