"""A representation of records in one line: tensors by shape and dtype instead of their entries."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from torch import Tensor

__all__ = ["short_repr"]


def short_repr(record: Any) -> str:
    """``Class(field=...)`` of a dataclass; assign it as ``__repr__``. Single numbers are shown, larger tensors not."""
    parts = (f"{field.name}={_shown(getattr(record, field.name))}" for field in fields(record) if field.repr)
    return f"{type(record).__name__}({', '.join(parts)})"


def _shown(value: object) -> str:
    if isinstance(value, Tensor):
        if value.ndim == 0 and value.device.type != "meta":
            return f"{value.item():.6g}" if value.is_floating_point() else str(value.item())
        return f"Tensor({', '.join(map(str, value.shape))}; {str(value.dtype).removeprefix('torch.')})"
    if isinstance(value, float):
        return f"{value:.6g}"
    return repr(value)
