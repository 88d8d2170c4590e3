"""Models defined by user code, ``FILE.py:function`` or ``package.module:function``, which is imported and called."""

from __future__ import annotations

import importlib
import importlib.util
import sys
import traceback
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import nn

from softcurve.fit import DataError

Model = tuple[nn.Module, nn.Linear, Iterable[Any]]  # features, head, and batches


def call_function(model: str, seed: int) -> tuple[Model, str | None]:
    """Seed torch's generator and call the function; return its model and the file of its code. Raises DataError."""
    source, colon, name = model.rpartition(":")
    if not (colon and source and name):
        raise DataError(
            f"model: {model} must be a head that ends in .safetensors, or FILE.py:function or "
            "package.module:function, which returns (features, head, data)"
        )
    module = _imported(source)
    function = getattr(module, name, None)
    if not callable(function):
        names = [key for key, value in vars(module).items() if getattr(value, "__module__", "") == module.__name__]
        raise DataError(
            f"model: {source} has no function {name!r}; it has {', '.join(map(repr, names[:8])) or 'none at all'}"
        )
    torch.manual_seed(seed)
    try:
        returned = function()
    except (Exception, SystemExit) as error:
        raise DataError(f"model: {model} raised {describe(error)}{line_in(module.__file__, error)}") from error
    return _checked(model, returned), module.__file__


def _imported(source: str) -> ModuleType:
    """Import the module as Python itself would run it: with its folder, or the current one, on the path."""
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
        return _load_file(path.resolve()) if is_file else importlib.import_module(source)
    except (Exception, SystemExit) as error:
        line = line_in(str(path.resolve()), error) if is_file else ""
        raise DataError(f"model: {source} cannot be imported: {describe(error)}{line}") from error


def _load_file(path: Path) -> ModuleType:
    # Worker processes can import the module by its own name too, unless another module has that name.
    name = path.stem if path.stem not in sys.modules else f"softcurve_model_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def _checked(model: str, returned: object) -> Model:
    parts = returned if isinstance(returned, tuple | list) else ()
    if len(parts) == 3:
        features, head, data = parts
        if isinstance(data, Iterator):
            raise DataError(
                f"model: {model} must return re-iterable data, such as a list or a DataLoader; "
                f"got a one-time {type(data).__name__}: make it a list"
            )
        if isinstance(features, nn.Module) and isinstance(head, nn.Linear) and isinstance(data, Iterable):
            return features, head, data
    kind = f"({', '.join(type(part).__name__ for part in parts)})" if parts else type(returned).__name__
    raise DataError(
        f"model: {model} must return (features, head, data), a torch.nn.Module, a torch.nn.Linear and an iterable of "
        f"batches (x, target); got {kind}"
    )


def describe(error: BaseException) -> str:
    """Return ``Type: first line of the message``."""
    return ": ".join(filter(None, (type(error).__name__, first_line(error))))


def first_line(error: BaseException) -> str:
    """Return the first line of the error's message."""
    return str(error).strip().partition("\n")[0]


def line_in(file: str | None, error: BaseException) -> str:
    """Return the line of ``file`` that the error passed through, in brackets; empty if it did not."""
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == file]
    return f" ({Path(file).name}, line {lines[-1]})" if file and lines else ""
