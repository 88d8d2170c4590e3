"""A model cut at its head, wherever in it the head sits."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

from torch import Tensor, nn

from softcurve.curvature.behind_head import adapter_parts, require_nothing_beside, warn_of_logit_maps, warn_of_wrapper
from softcurve.curvature.features import eager, parallel_wrapper
from softcurve.curvature.linear_head import class_name, require_head
from softcurve.losses.spec import LogitMap
from softcurve.typing import Number

__all__ = ["HeadInput", "require_same_logits", "split_head"]

COMPILED = "_orig_mod"  # what torch.compile calls the module that it wraps


class HeadInput(nn.Module):
    """What a model gives its head. The model stops there: nothing of the head or behind it is computed."""

    def __init__(
        self,
        model: nn.Module,
        head: nn.Linear,
        ancestors: tuple[nn.Module, ...] = (),
        *,
        softcap: Number | None = None,
        temperature: Number = 1.0,
        compiled: bool = False,
    ) -> None:
        super().__init__()
        self.model = model
        self.softcap, self.temperature = softcap, temperature
        # In tuples, so that they are no submodules twice.
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
                stack.callback(module.register_forward_pre_hook(hook, with_kwargs=True).remove)
            if self._is_compiled:
                stack.enter_context(eager())  # a compiled graph would hold the head
            try:
                self.model(*args, **kwargs)
            except _Reached as reached:
                features = reached.features
            else:
                raise ValueError("model must call its head, got a model that returned without; name another module")
        if not self._was_called:
            self._was_called = True
            if entered and entered[-1][1] is features:
                warn_of_wrapper(entered[-1][0], self._head[0], features)
        return features

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


def split_head(
    model: nn.Module, head: str, *, softcap: float | None = None, temperature: float = 1.0
) -> tuple[HeadInput, nn.Linear]:
    """``features, head`` of a model: ``head(features(x))`` is what ``model(x)`` makes of its logits.

    Args:
        model: any module that calls its head once, and what precedes it with autograd. At a second call it does not
            arrive; parameters that are used behind the head alone count, with zeros in every matrix. What
            ``torch.compile`` has made of it, or of a part around the head, runs as it was written.
        head: the dotted name of an ``nn.Linear`` in it, such as ``"lm_head"`` or ``"decoder.output"``.
        softcap, temperature: what the model does to its logits, which ``features`` and ``head`` leave out; the losses
            and operators need the same options, and operators refuse others.

    A weight that is tied to an embedding stays tied: it is a parameter of the features too.

    Warns (``UserWarning``) where the logits seem to be more than the head's output: a soft cap or a scale in the
    model's ``config`` that differs from the arguments, an adapter beside the head, a module around it.

    Raises:
        ValueError: there is no such module, or it has one class. TypeError: it is no ``nn.Linear``, computes something
            else than ``W e + b``, or stands in a wrapper for several processes (``DistributedDataParallel``, FSDP),
            whose forward, which would synchronise the training, does not end.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    LogitMap(temperature, softcap)
    path, compiled = _path_to(model, head)
    *ancestors, found = path
    if not isinstance(found, nn.Linear):
        raise TypeError(_not_linear(found, head))
    require_head(found)
    watched = tuple(ancestors)
    if ancestors and not require_nothing_beside(path, head):
        watched = ()
    warn_of_logit_maps(ancestors, softcap, temperature)
    cut = HeadInput(path[0], found, watched, softcap=softcap, temperature=temperature, compiled=compiled)
    return cut, found


def require_same_logits(features: nn.Module, temperature: float, softcap: float | None) -> None:
    """The options of the logits that ``split_head`` was given, if it was given any and made ``features``."""
    if not isinstance(features, HeadInput):
        return
    for name, wanted, found, neutral in (
        ("softcap", features.softcap, softcap, None),
        ("temperature", features.temperature, temperature, 1.0),
    ):
        if wanted not in (neutral, found):
            raise ValueError(f"{name} must be {wanted} as split_head was told of the model, got {found}")


def _path_to(model: nn.Module, head: str) -> tuple[tuple[nn.Module, ...], bool]:
    """The modules from the model down to its head, as they were written, and whether one of them is compiled."""
    module, compiled = model, False
    place: list[str] = []
    path: list[nn.Module] = []
    for part in ["", *(part for part in head.split(".") if part not in ("", COMPILED))]:
        if part:
            inner = module._modules.get(part)
            if inner is None:
                raise ValueError(
                    f"head must be the name of a Linear of the model, one of {_linear_names(model)}, got {head!r}"
                )
            module, place = inner, [*place, part]
        while COMPILED in module._modules and isinstance(written := module._modules[COMPILED], nn.Module):
            # The whole model is run as it was written; within it, the compiled part is still what is called.
            module, compiled = written, compiled or bool(part)
        compiled = compiled or module._compiled_call_impl is not None
        _require_one_process(module, ".".join(place))
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
    names = (name for name, module in model.named_modules() if isinstance(module, nn.Linear))
    return [".".join(part for part in name.split(".") if part != COMPILED) for name in names]


def _not_linear(found: nn.Module, head: str) -> str:
    """Why the module is none, and what to do about it."""
    said = f"head must name a torch.nn.Linear, got {class_name(found)} at {head!r}"
    if adapter_parts(found):
        return (
            f"{said}, a Linear with an adapter, whose logits are not those of one weight; merge the adapter into the "
            "weight first (model.merge_and_unload() in PEFT), not the Linear inside it, which would leave it out"
        )
    if inside := _linear_names(found):
        return f"{said}; inside it are {inside}, of which one may be named if nothing is done to its output"
    return said
