"""Short representations of records of tensors, with shapes and dtypes instead of values."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

import numpy as np
from torch import Tensor


def summary(value: object) -> str:
    """Format a tensor or array as ``float32[4, 16]``, a container by its length, and other values by their ``repr``."""
    if isinstance(value, Tensor) and value.ndim == 0 and value.device.type == "cpu":
        value = value.item()
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, Tensor):
        device = "" if value.device.type == "cpu" else f", device={str(value.device)!r}"
        return f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)}{device}"
    if isinstance(value, np.ndarray):
        return f"{value.dtype}{list(value.shape)}"
    if type(value) in (dict, list, tuple, set, frozenset):
        return f"<{type(value).__name__} of {len(value)}>"  # type: ignore[arg-type]
    return repr(value)


def short_repr(record: object, values: Mapping[str, object]) -> str:
    """Return ``Name(field=summary, …)``."""
    return f"{type(record).__name__}({', '.join(f'{name}={summary(value)}' for name, value in values.items())})"


def dataclass_repr(record: Any) -> str:
    """Return the ``repr`` of a dataclass with the shapes and dtypes of its tensors."""
    return short_repr(record, {field.name: getattr(record, field.name) for field in fields(record) if field.repr})


class ShortRepr:
    """Mixin for dataclasses, declared with ``repr=False``, whose ``repr`` shows the shapes and dtypes of tensors."""

    __repr__ = dataclass_repr
