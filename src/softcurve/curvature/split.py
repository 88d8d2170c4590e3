"""A model cut at its head, wherever in it the head sits."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn


class HeadInput(nn.Module):
    """What a model gives its head. The model stops there: nothing of the head or behind it is computed."""

    def __init__(self, model: nn.Module, head: nn.Linear) -> None:
        super().__init__()
        self.model = model
        self._head = (head,)  # a tuple, so that it is no submodule twice

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """The head's input when the model is called with these arguments."""
        handle = self._head[0].register_forward_pre_hook(_stop, with_kwargs=True)
        try:
            self.model(*args, **kwargs)
        except _Reached as reached:
            return reached.features
        finally:
            handle.remove()
        raise ValueError("model must call its head, got a model that returned without; name another module")

    def named_parameters(
        self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True
    ) -> Iterator[tuple[str, nn.Parameter]]:
        """All parameters of the model but those that belong to the head alone."""
        seen: set[int] = set()
        for name, module in self.named_modules(prefix=prefix, remove_duplicate=remove_duplicate):
            if module is self._head[0]:
                continue
            for own, parameter in module._parameters.items():
                if parameter is not None and not (remove_duplicate and id(parameter) in seen):
                    seen.add(id(parameter))
                    yield f"{name}.{own}" if name else own, parameter


class _Reached(BaseException):
    """The head was called. No ``except Exception`` of the model stops it."""

    def __init__(self, features: Tensor) -> None:
        super().__init__()
        self.features = features


def _stop(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    raise _Reached(args[0] if args else kwargs["input"])


def split_head(model: nn.Module, head: str) -> tuple[HeadInput, nn.Linear]:
    """``features, head`` of a model: ``head(features(x))`` is what ``model(x)`` makes of its logits.

    Args:
        model: any module that calls its head once, and what precedes it with autograd. At a second call it does not
            arrive; parameters that are used behind the head alone count, with zeros in every matrix.
        head: the dotted name of an ``nn.Linear`` in it, such as ``"lm_head"`` or ``"decoder.output"``.

    A weight that is tied to an embedding stays tied: it is a parameter of the features too.

    Raises:
        ValueError: there is no such module. TypeError: it is no ``nn.Linear``.
    """
    modules = dict(model.named_modules())
    if head not in modules:
        known = [name for name, module in modules.items() if isinstance(module, nn.Linear)]
        raise ValueError(f"head must be the name of a Linear of the model, one of {known}, got {head!r}")
    found = modules[head]
    if not isinstance(found, nn.Linear):
        raise TypeError(f"head must name a torch.nn.Linear, got {type(found).__name__} at {head!r}")
    return HeadInput(model, found), found
