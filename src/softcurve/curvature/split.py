"""Split a model into its features and its head, wherever in the model the head is."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from typing import Any

from torch import Tensor, nn

from softcurve.curvature.features import eager, parallel_wrapper
from softcurve.curvature.linear_head import (
    adapter_parts,
    class_name,
    require_head,
    require_nothing_beside,
    warn_of_logit_maps,
    warn_of_wrapper,
)
from softcurve.losses.spec import LogitMap
from softcurve.typing import Number

COMPILED = "_orig_mod"  # torch.compile's name for the module that it wraps


class HeadInput(nn.Module):
    """The input of a model's head. The model stops there: nothing of the head or behind it is computed."""

    def __init__(
        self,
        model: nn.Module,
        head: nn.Linear,
        ancestors: tuple[nn.Module, ...],
        softcap: Number | None,
        temperature: Number,
        compiled: bool,
    ) -> None:
        super().__init__()
        self.model = model
        self.softcap, self.temperature = softcap, temperature
        # In tuples, so that they are not registered as submodules twice.
        self._head, self._ancestors = (head,), ancestors
        self._is_compiled, self._was_called = compiled, False

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """The head's input when the model is called with these arguments."""
        entered: list[tuple[nn.Module, Tensor]] = []

        def enter(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            entered.extend((module, value) for value in (*args, *kwargs.values())[:1] if isinstance(value, Tensor))

        with ExitStack() as stack:
            watched = () if self._was_called else self._ancestors
            for module, hook in (*((each, enter) for each in watched), (self._head[0], _stop)):
                stack.enter_context(module.register_forward_pre_hook(hook, with_kwargs=True))
            if self._is_compiled:
                stack.enter_context(eager())  # a compiled graph would hold the head
            try:
                self.model(*args, **kwargs)
                raise ValueError("model must call its head, got a model that returned without; name another module")
            except _HeadReached as reached:
                features = reached.features
        if not self._was_called and entered and entered[-1][1] is features:
            warn_of_wrapper(entered[-1][0], self._head[0], features)
        self._was_called = True
        return features

    def named_parameters(
        self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True
    ) -> Iterator[tuple[str, nn.Parameter]]:
        """All parameters of the model except those that belong to the head alone."""

        def members(module: nn.Module) -> Iterable[tuple[str, nn.Parameter | None]]:
            return () if module is self._head[0] else module._parameters.items()

        yield from self._named_members(members, prefix, recurse, remove_duplicate)


class _HeadReached(BaseException):
    """Raised when the head is called; no ``except Exception`` of the model stops it."""

    def __init__(self, features: Tensor) -> None:
        super().__init__()
        self.features = features


def _stop(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    raise _HeadReached(args[0] if args else kwargs["input"])


def split_head(
    model: nn.Module, head: str, *, softcap: float | None = None, temperature: float = 1.0
) -> tuple[HeadInput, nn.Linear]:
    """Split a model into ``features, head`` such that ``head(features(x))`` are the logits of ``model(x)``.

    Args:
        model: any module that calls its head once, after differentiable computations. Only the first call is seen.
            Parameters that are used only behind the head count, with zeros in every matrix. Compiled modules around the
            head run uncompiled.
        head: the dotted name of an ``nn.Linear`` in it, such as ``"lm_head"`` or ``"decoder.output"``.
        softcap, temperature: the model's map of its logits, which ``features`` and ``head`` leave out; the losses and
            operators need the same options, and operators refuse others.

    A weight that is tied to an embedding stays tied and is a parameter of the features too.

    Warns (``UserWarning``) where the logits seem to be more than the head's output: a soft cap or a scale in the
    model's ``config`` that differs from the arguments, an adapter beside the head, a module around it.

    Raises:
        ValueError: there is no such module, or it has one class.
        TypeError: it is no ``nn.Linear``, computes something else than ``W e + b``, or is inside a wrapper for several
            processes (``DistributedDataParallel``, FSDP), whose forward must run to its end to synchronise gradients.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    LogitMap.of(temperature, softcap)
    path, compiled = _path_to(model, head)
    *ancestors, module = path
    if not isinstance(module, nn.Linear):
        raise TypeError(_not_linear(module, head))
    require_head(module)
    watched = tuple(ancestors) if ancestors and require_nothing_beside(path, head) else ()
    warn_of_logit_maps(ancestors, softcap, temperature)
    return HeadInput(path[0], module, watched, softcap, temperature, compiled), module


def require_same_logits(features: nn.Module, temperature: float, softcap: float | None) -> None:
    """Require the softcap and the temperature that ``split_head`` was given, if it made ``features``."""
    for name, value, neutral in (("softcap", softcap, None), ("temperature", temperature, 1.0)):
        declared = getattr(features, name) if isinstance(features, HeadInput) else neutral
        if declared not in (neutral, value):
            raise ValueError(f"{name} must be {declared} as in split_head, got {value}")


def _path_to(model: nn.Module, head: str) -> tuple[tuple[nn.Module, ...], bool]:
    """The uncompiled modules from the model down to its head, and whether one of them is compiled."""
    module, compiled = model, False
    place, path = "", []
    for part in ["", *(part for part in head.split(".") if part not in ("", COMPILED))]:
        if part:
            inner = module._modules.get(part)
            if inner is None:
                raise ValueError(
                    f"head must be the name of a Linear of the model, one of {_linear_names(model)}, got {head!r}"
                )
            module, place = inner, f"{place}.{part}".strip(".")
        while COMPILED in module._modules and isinstance(written := module._modules[COMPILED], nn.Module):
            # The model itself is called uncompiled; within it, the compiled part is still called.
            module, compiled = written, compiled or bool(part)
        compiled = compiled or module._compiled_call_impl is not None
        _require_one_process(module, place)
        path.append(module)
    return tuple(path), compiled


def _require_one_process(module: nn.Module, place: str) -> None:
    wrapper = parallel_wrapper(module)
    if wrapper is None:
        return
    remedy = "split the model inside it (model.module), and wrap the module that calls features and the loss"
    if wrapper.startswith(("FSDP", "Fully")):
        remedy = "split the model before it is sharded, and shard the module that calls features and the loss"
    raise TypeError(
        f"model must not stand in a {wrapper}, got one{f' at {place!r}' if place else ''}: its forward does not end "
        f"where the head is cut off, and gradients would not be synchronised; {remedy}"
    )


def _linear_names(model: nn.Module) -> list[str]:
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    return [name.replace(f"{COMPILED}.", "").removesuffix(f".{COMPILED}") for name in names]


def _not_linear(module: nn.Module, head: str) -> str:
    """The error message for a module that is no ``nn.Linear``, with the remedy."""
    message = f"head must name a torch.nn.Linear, got {class_name(module)} at {head!r}"
    if adapter_parts(module):
        return (
            f"{message}, a Linear with an adapter, whose logits are not those of one weight; merge the adapter into "
            "the weight first (model.merge_and_unload() in PEFT), not the Linear inside it, which would leave it out"
        )
    if inside := _linear_names(module):
        return f"{message}; inside it are {inside}, of which one may be named if nothing is done to its output"
    return message
