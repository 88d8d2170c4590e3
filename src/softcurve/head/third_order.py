"""The refusal of third derivatives."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.autograd import Function

from softcurve.head.tensors import DIFFERENTIABLE, HeadTensors


def raise_third(*_: Any) -> Any:
    """Raise the error of a derivative that does not exist."""
    raise NotImplementedError(
        "a loss on a head has exact first and second derivatives, but none of third order; for those use the loss on "
        "logits: softcurve.cross_entropy(linear(input, weight), ...)"
    )


class _SecondOrderOnly(Function):
    """The same tensors, whose derivatives are an error."""

    generate_vmap_rule = True

    @staticmethod
    def forward(*tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(tensor.view_as(tensor) for tensor in tensors)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.set_materialize_grads(False)

    backward = jvp = staticmethod(raise_third)  # type: ignore[assignment]


def without_third(tensors: HeadTensors) -> HeadTensors:
    """Return the tensors of a Hessian product, in which it has no derivatives.

    Autograd runs the backward of a function for each derivative that is wanted of it, and does not say which they are:
    only a function of these tensors alone can refuse theirs and leave those in the directions.
    """
    names = (*HeadTensors._fields[:DIFFERENTIABLE], "row_weight")
    present = {name: tensor for name in names if (tensor := getattr(tensors, name)) is not None}
    refusing = _SecondOrderOnly.apply(*present.values())  # type: ignore[no-untyped-call]
    return tensors._replace(**dict(zip(present, refusing, strict=True)))
