"""What counts as a linear head: a ``torch.nn.Linear`` whose output is ``W e + b`` with parameters of its own."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from softcurve.head.sharded import lies_over_processes

__all__ = ["class_name", "require_classes", "require_head"]

PROBES = 3  # rows on which a head with hooks is compared with W e + b


def require_head(head: object, name: str = "head") -> None:
    """A ``torch.nn.Linear`` of at least two classes that computes ``W e + b`` from its own parameters.

    Raises:
        TypeError: it is another module, computes its weight, or computes something else. ValueError: it has one class.
    """
    if not isinstance(head, nn.Linear):
        raise TypeError(
            f"{name} must be a torch.nn.Linear, got {class_name(head)}; softcurve.curvature.split_head finds it in a "
            "model"
        )
    if not {"weight", "bias"} <= head._parameters.keys():
        raise TypeError(
            f"{name} must hold its weight and bias as parameters, got one that computes them (weight_norm, pruning, a "
            "parametrization); take that off first, as with torch.nn.utils.parametrize.remove_parametrizations"
        )
    if isinstance(head.weight, nn.UninitializedParameter):
        raise TypeError(f"{name} must be initialised, got a LazyLinear; call the model once before")
    kind = type(head)
    own_call = kind.__call__ is not nn.Module.__call__ or kind._call_impl is not nn.Module._call_impl
    if kind.forward is not nn.Linear.forward or own_call:
        raise TypeError(
            f"{name} must compute W e + b as torch.nn.Linear does, got a {class_name(head)} with its own forward; copy "
            "its weight and bias into a torch.nn.Linear, and put what its forward adds into features, or into "
            "temperature= and softcap="
        )
    require_classes(f"{name}.out_features", head.out_features)
    _require_plain_output(head, name)


def require_classes(name: str, classes: int) -> None:
    """At least two: the softmax of one logit is 1 whatever the parameters, so that every matrix is 0."""
    if classes < 2:
        raise ValueError(
            f"{name} must be at least 2, got {classes}: the softmax of one logit is always 1, and its curvature 0; "
            "write a sigmoid as a softmax of two logits, by a head of two rows, 0 and the present weight and bias, "
            "and class indices 0 and 1"
        )


def _require_plain_output(head: nn.Linear, name: str) -> None:
    """Compare a head that has hooks, or a forward of this one instance, with ``W e + b`` on a few random rows."""
    if not head._forward_hooks and not head._forward_pre_hooks and "forward" not in vars(head):
        return
    if lies_over_processes(head.weight) or head.weight.is_meta:
        return  # the hooks of a parallel plan change how tensors are placed, not their values
    with torch.inference_mode(False), torch.no_grad():
        probe = torch.randn(PROBES, head.in_features, generator=torch.Generator().manual_seed(0)).to(head.weight)
        found, expected = head(probe), nn.functional.linear(probe, head.weight, head.bias)
    close = 1e-4 if expected.dtype in (torch.float32, torch.float64) else 2e-2
    if not isinstance(found, Tensor) or not torch.allclose(
        found.to(expected), expected, rtol=close, atol=close, equal_nan=True
    ):
        raise TypeError(
            f"{name} must compute W e + b as torch.nn.Linear does, got hooks or a replaced forward that change its "
            "input or output; remove them, or move what they do into features"
        )


def class_name(value: object) -> str:
    """The class, with its module where the name alone would be mistaken for torch's own."""
    kind = type(value)
    is_torch = kind.__module__.startswith("torch.nn.")
    return f"{kind.__module__}.{kind.__name__}" if kind.__name__ in vars(nn) and not is_torch else kind.__name__
