"""Array annotations such as ``Float[Tensor, "rows d"]``, from jaxtyping if it is installed.

Only the tests check the shapes. Without jaxtyping, an annotation is the bare array type.
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
            """Evaluates ``Kind[array, shape]`` to ``array``."""

            def __class_getitem__(cls, array_and_shape: tuple[Any, str]) -> Any:
                return array_and_shape[0]

        Bool = Float = Float64 = Int = Int64 = _Unchecked

__all__ = ["Bool", "Float", "Float64", "Int", "Int64"]
