"""Array annotations such as ``Float[Tensor, "rows d"]``, from jaxtyping if it is installed.

Only the tests check the shapes. Without jaxtyping, an annotation is the bare array type.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeAlias

from torch import Tensor

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Float64, Int, Int64
    from jaxtyping import Integer as AnyInt
else:
    try:
        from jaxtyping import Bool, Float, Float64, Int, Int64
        from jaxtyping import Integer as AnyInt
    except ModuleNotFoundError:

        class _Unchecked:
            """Evaluates ``Kind[array, shape]`` to ``array``."""

            def __class_getitem__(cls, array_and_shape: tuple[Any, str]) -> Any:
                return array_and_shape[0]

        AnyInt = Bool = Float = Float64 = Int = Int64 = _Unchecked

Rows: TypeAlias = Float[Tensor, "*rows classes"]
Column: TypeAlias = Float[Tensor, "*rows 1"]
Values: TypeAlias = Float[Tensor, "*rows"]
Indices: TypeAlias = Int[Tensor, "*rows"]
Flags: TypeAlias = Bool[Tensor, "*rows"]

__all__ = ["AnyInt", "Bool", "Column", "Flags", "Float", "Float64", "Indices", "Int", "Int64", "Rows", "Values"]
