"""Annotations of arrays, such as ``Float[Tensor, "rows d"]``: those of jaxtyping, or the bare array types without it.

Only the tests check the shapes, so a machine that runs a checkout with torch alone does not need jaxtyping.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Float64, Int, Int64
else:
    try:
        from jaxtyping import Bool, Float, Float64, Int, Int64
    except ModuleNotFoundError:

        class _Unchecked:
            """``Kind[array, shape]`` is ``array``."""

            def __class_getitem__(cls, array_and_shape: tuple[Any, str]) -> Any:
                return array_and_shape[0]

        Bool = Float = Float64 = Int = Int64 = _Unchecked

__all__ = ["Bool", "Float", "Float64", "Int", "Int64"]
