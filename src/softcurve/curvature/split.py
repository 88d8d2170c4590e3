"""Split a model into its features and its head, an ``nn.Linear`` that computes ``W e + b``.

Features that end at the head leave out an adapter beside the head, a module around it, a scale or a soft cap. What is
certain is an error; a guess by names and shapes is a warning.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from softcurve.curvature.features import eager, parallel_wrapper
from softcurve.head.sharded import lies_over_processes
from softcurve.lazy.heads import head_of, is_lazy
from softcurve.losses.spec import LogitMap
from softcurve.typing import Number
from softcurve.warn import warn_caller

# The names in PEFT, torchtune and others: LoRA, DoRA, LoHa, LoKr, IA3, VeRA, OFT, BOFT.
ADAPTER = re.compile(r"^(base_layer$|original_module$|(lora|dora|hada|lokr|ia3|vera|oft|boft)_)", re.IGNORECASE)
# Cohere's logit_scale, Granite's logits_scaling, Gemma 2's final_logit_softcapping, Falcon H1's lm_head_multiplier, ...
LOGITS = re.compile(
    r"^(?!.*(attn|attention|router|gate|expert|init)).*"
    r"(logits?_?(scal|mult|temp|soft_?cap|cap)|(scal|mult|soft_?cap)\w*logits?|soft_?cap|lm_head_(scal|mult))",
    re.IGNORECASE,
)
TEXT_CONFIGS = ("text_config", "llm_config", "language_config", "decoder")
KEEPS_LOGITS = (nn.Softmax, nn.LogSoftmax, nn.Identity, nn.Flatten, nn.Unflatten)
PROBES = 4  # rows on which a head with hooks, or a module around the head, is compared with W e + b
COMPILED = "_orig_mod"  # torch.compile's name for the module that it wraps


class HeadInput(nn.Module):
    """The input of a model's head. The model stops there: nothing of the head or behind it is computed."""

    def __init__(
        self, model: nn.Module, head: nn.Linear, ancestors: tuple[nn.Module, ...], softcap: Number | None,
        temperature: Number, compiled: bool,
    ) -> None:  # fmt: skip
        super().__init__()
        self.model = model
        self.softcap, self.temperature = softcap, temperature
        # In tuples, so that they are not registered as submodules twice.
        self._head, self._ancestors = (head,), ancestors
        self._is_compiled, self._was_called = compiled, False

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """Return the head's input when the model is called with these arguments."""
        entered: list[tuple[nn.Module, Tensor]] = []

        def enter(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            entered.extend((module, value) for value in (*args, *kwargs.values())[:1] if isinstance(value, Tensor))

        with ExitStack() as stack:
            for ancestor in () if self._was_called else self._ancestors:
                stack.enter_context(ancestor.register_forward_pre_hook(enter, with_kwargs=True))
            stack.enter_context(self._head[0].register_forward_pre_hook(_stop, with_kwargs=True))
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
        """Return all parameters of the model except those that belong to the head alone."""

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
    model: nn.Module, head: str | None = None, *, softcap: float | None = None, temperature: float = 1.0
) -> tuple[HeadInput, nn.Linear]:
    """Split a model into ``features, head`` such that ``head(features(x))`` are the logits of ``model(x)``.

    Args:
        model: any module that calls its head once, after differentiable computations. Only the first call is seen.
            Parameters that are used only behind the head count, with zeros in every matrix. Compiled modules around the
            head run uncompiled.
        head: the dotted name of an ``nn.Linear`` in it, such as ``"lm_head"`` or ``"decoder.output"``; by default that
            of ``model.get_output_embeddings()``, which the models of transformers have.
        softcap, temperature: the model's map of its logits, which ``features`` and ``head`` leave out; the losses and
            operators need the same options, and operators refuse others.

    A weight that is tied to an embedding stays tied and is a parameter of the features too.

    Warns (``UserWarning``) where the logits seem to be more than the head's output: a soft cap or a scale in the
    model's ``config`` that differs from the arguments, an adapter beside the head, a module around it.

    Raises:
        ValueError: there is no such module, or it has one class.
        TypeError: it is no ``nn.Linear``, computes something else than ``W e + b``, or is inside a wrapper for several
            processes (``DistributedDataParallel``, FSDP), whose forward must run to its end to synchronise gradients.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 3))
        >>> features, head = softcurve.curvature.split_head(model, "2")
        >>> features(torch.randn(5, 4)).shape
        torch.Size([5, 8])
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    LogitMap.of(temperature, softcap)
    if head is None:
        output = head_of(model, None)
        head = next(name for name, module in model.named_modules() if module is output)
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
    """Return the uncompiled modules from the model down to its head, and whether one of them is compiled."""
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
    if (wrapper := parallel_wrapper(module)) is None:
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
    """Return the error message for a module that is no ``nn.Linear``, with the remedy."""
    message = f"head must name a torch.nn.Linear, got {class_name(module)} at {head!r}"
    if adapter_parts(module):
        return (
            f"{message}, a Linear with an adapter, whose logits are not those of one weight; merge the adapter into "
            "the weight first (model.merge_and_unload() in PEFT), not the Linear inside it, which would leave it out"
        )
    if inside := _linear_names(module):
        return f"{message}; inside it are {inside}, of which one may be named if nothing is done to its output"
    return message


# --- which heads are accepted


def require_head(head: object) -> None:
    """Require a ``torch.nn.Linear`` of at least two classes that computes ``W e + b`` from its own parameters.

    Raises:
        TypeError: it is another module, computes its weight, or computes something else. ValueError: it has one class.
    """
    if not isinstance(head, nn.Linear):
        raise TypeError(
            f"head must be a torch.nn.Linear, got {class_name(head)}; curvature.split_head finds the one of a model"
        )
    if not {"weight", "bias"} <= head._parameters.keys():
        raise TypeError(
            "head must hold its weight and bias as parameters, got one that computes them (weight_norm, pruning, a "
            "parametrization); take that off first, as with torch.nn.utils.parametrize.remove_parametrizations"
        )
    if isinstance(head.weight, nn.UninitializedParameter):
        raise TypeError("head must be initialised, got a LazyLinear; call the model once before")
    kind = type(head)
    own_call = kind.__call__ is not nn.Module.__call__ or kind._call_impl is not nn.Module._call_impl
    if kind.forward is not nn.Linear.forward or own_call:
        raise TypeError(
            f"head must compute W e + b as torch.nn.Linear does, got a {class_name(head)} with its own forward; copy "
            "its weight and bias into a torch.nn.Linear, and put what its forward adds into features, or into "
            "temperature= and softcap="
        )
    require_classes("head.out_features", head.out_features)
    replaced = "forward" in vars(head) and not is_lazy(head)
    if (head._forward_hooks or head._forward_pre_hooks or replaced) and not _computes_linear(head):
        raise TypeError(
            "head must compute W e + b as torch.nn.Linear does, got hooks or a replaced forward that change its "
            "input or output; remove them, or move what they do into features"
        )


def require_classes(name: str, classes: int) -> None:
    """Require two classes: the softmax of one logit is 1 whatever the parameters, so that every matrix is 0."""
    if classes < 2:
        raise ValueError(
            f"{name} must be at least 2, got {classes}: the softmax of one logit is always 1, and its curvature 0; "
            "write a sigmoid as a softmax of two logits, by a head of two rows, 0 and the present weight and bias, "
            "and class indices 0 and 1"
        )


def _computes_linear(head: nn.Linear) -> bool:
    """Compare a head that has hooks, or a forward of this one instance, with ``W e + b`` on a few random rows."""
    if lies_over_processes(head.weight) or head.weight.is_meta:
        return True  # the hooks of a parallel plan change how tensors are placed, not their values
    with torch.inference_mode(False), torch.no_grad():
        probe = torch.randn(PROBES, head.in_features, generator=torch.Generator().manual_seed(0)).to(head.weight)
        output, expected = head(probe), nn.functional.linear(probe, head.weight, head.bias)
    close = 1e-4 if expected.dtype in (torch.float32, torch.float64) else 2e-2
    return isinstance(output, Tensor) and torch.allclose(
        output.to(expected), expected, rtol=close, atol=close, equal_nan=True
    )


def class_name(value: object) -> str:
    """Return the class, with its module where the name alone would be mistaken for torch's own."""
    kind = type(value)
    is_torch = kind.__module__.startswith("torch.nn.")
    return f"{kind.__module__}.{kind.__name__}" if kind.__name__ in vars(nn) and not is_torch else kind.__name__


def adapter_parts(module: nn.Module) -> list[str]:
    """Return names of children that hold parameters, and of parameters, that adapters have."""
    names = {name.partition(".")[0] for name, _ in module.named_parameters(remove_duplicate=False)}
    return [name for name in (*module._modules, *module._parameters) if name in names and ADAPTER.match(name)]


def require_nothing_beside(path: Sequence[nn.Module], name: str) -> bool:
    """Refuse an adapter's inner Linear and one that is followed by other modules; warn of a pair of low rank.

    ``path`` leads from the model to its head. Return whether nothing was found.

    Raises:
        TypeError: a module on the path is known to change the head's output.
    """
    *_, parent, head = path
    inactive = getattr(parent, "merged", False) is True or getattr(parent, "disable_adapters", False) is True
    if (parts := adapter_parts(parent)) and not inactive:
        raise TypeError(
            f"head must be a Linear whose output are the logits, got {name!r} inside a {class_name(parent)} with "
            f"{', '.join(parts)}: the adapter would be left out; merge it into the weight first "
            "(model.merge_and_unload() in PEFT)"
        )
    for outer, inner in pairwise(path):
        modules = list(outer) if isinstance(outer, nn.Sequential) else []
        place = next((i for i, each in enumerate(modules) if each is inner or inner in each.children()), 0)
        behind = [each for each in modules[place + 1 :] if not isinstance(each, KEEPS_LOGITS)]
        behind = [each for each in behind if each.training or not isinstance(each, nn.modules.dropout._DropoutNd)]
        if behind:
            raise TypeError(
                f"head must be the last Linear of the model, got {name!r} in front of a {class_name(behind[0])}, "
                "which features and head leave out; name the last one"
            )
    assert isinstance(head, nn.Linear)
    pair = _low_rank_pair(parent, head)
    if pair is not None:
        warn_caller(
            f"head {name!r} stands beside {pair[0]} and {pair[1]} in a {class_name(parent)}, which have the shapes of "
            "an adapter of low rank; features and head leave it out: merge it into the head's weight, if it is one"
        )
    return pair is None


def _low_rank_pair(parent: nn.Module, head: nn.Linear) -> tuple[str, str] | None:
    """Return two matrices beside the head that map its features to its classes by fewer dimensions."""
    if isinstance(parent, nn.Sequential | nn.ModuleList | nn.ModuleDict):
        return None
    down: dict[int, str] = {}
    up: dict[int, str] = {}
    for place, module in parent.named_modules():
        is_layer = isinstance(module, nn.Embedding) or getattr(module, "bias", None) is not None
        for name, parameter in module.named_parameters(place, recurse=False):
            if is_layer or parameter is head.weight or parameter.ndim != 2:
                continue
            for side, wide in ((down, head.in_features), (up, head.out_features)):
                rank = parameter.shape[1] if parameter.shape[0] == wide else parameter.shape[0]
                if wide in parameter.shape and rank not in side:
                    side[rank] = name
                    break  # where both are as wide, the second of a pair is the other side
    limit = min(head.in_features, head.out_features)
    return next(((down[rank], up[rank]) for rank in down.keys() & up.keys() if rank < limit), None)


def warn_of_wrapper(wrapper: nn.Module, head: nn.Linear, features: Tensor) -> None:
    """Warn if a module that passes its own input to the head changes the logits, or has the parameters to do so."""
    own = set(head.parameters())
    others = [name for name, parameter in wrapper.named_parameters() if parameter not in own]
    rows = features.detach().reshape(-1, features.shape[-1])[:PROBES]
    with torch.no_grad(), torch.random.fork_rng([]):
        try:
            output, logits = wrapper(rows), head(rows)
        except Exception:
            return  # the wrapper needs more than the features, and there is no other input to compare on
    if not isinstance(output, Tensor) or output.shape != logits.shape:
        return  # several heads side by side, for instance
    # The output may differ by what a softmax does not see, or be the softmax itself.
    p, seen = torch.softmax(logits.float(), -1), (torch.softmax(output.float(), -1), output.float())
    problem = "another output than its head's"
    if any(torch.allclose(each, p, rtol=1e-3, atol=1e-6, equal_nan=True) for each in seen):
        if not others:
            return
        problem = f"other parameters on the same input: {', '.join(others[:4])}"
    warn_caller(
        f"the {class_name(wrapper)} around the head has {problem}; features and head leave that out: put it into the "
        "head's weight, or into temperature= and softcap="
    )


def warn_of_logit_maps(modules: Sequence[nn.Module], softcap: float | None, temperature: float) -> None:
    """Warn of scales and soft caps of logits that the modules around the head name and the arguments do not give."""
    for name, (where, value) in _logit_maps(modules).items():
        caps = "cap" in name.lower()
        known = value == softcap if caps else min(abs(temperature / each - 1) for each in (value, 1 / value)) < 1e-6
        if known:
            continue
        remedy = f"softcap={value:g}" if caps else f"temperature={1 / value:g} (of logits times it; {value:g}, over it)"
        warn_caller(
            f"{where}.{name} is {value:g}: the model seems to change the logits behind its head, which features and "
            f"head leave out; give {remedy} to split_head and to the losses and operators"
        )


def _logit_maps(modules: Sequence[nn.Module]) -> dict[str, tuple[str, float]]:
    """Return place and value of each attribute or entry of a configuration that is named as a map of the logits."""
    maps: dict[str, tuple[str, float]] = {}
    for module in modules:
        config = getattr(module, "config", None)
        places = [("model", module), ("model.config", config)]
        places += [(f"model.config.{name}", _get(config, name)) for name in TEXT_CONFIGS]
        for where, place in places:
            for name in filter(LOGITS.match, map(str, place) if isinstance(place, Mapping) else dir(place)):
                value = _get(place, name)
                if isinstance(value, Tensor) and value.numel() == 1 and not value.is_meta:
                    value = value.item()
                if isinstance(value, int | float) and not isinstance(value, bool) and value not in (0, 1):
                    maps.setdefault(name, (where, float(value)))
    return maps


def _get(place: object, name: str) -> Any:
    return place.get(name) if isinstance(place, Mapping) else getattr(place, name, None)
