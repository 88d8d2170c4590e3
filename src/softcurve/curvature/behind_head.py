"""What a model does to the output of its head, as far as it can be seen without running it.

Features that end at the head leave out all of this: an adapter beside the head, a module around it, a scale or a soft
cap. What is certain is an error, what is a guess by names and shapes a warning.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from softcurve.curvature.linear_head import class_name
from softcurve.warn import warn_caller

__all__ = ["adapter_parts", "require_nothing_beside", "warn_of_logit_maps", "warn_of_wrapper"]

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
PROBES = 4  # rows on which a module around the head is compared with it


def adapter_parts(module: nn.Module) -> list[str]:
    """Names of children that hold parameters, and of parameters, that adapters have."""
    children = [
        name for name, child in module._modules.items() if child is not None and any(True for _ in child.parameters())
    ]
    parameters = [name for name, parameter in module._parameters.items() if parameter is not None]
    return [name for name in (*children, *parameters) if ADAPTER.match(name)]


def require_nothing_beside(path: Sequence[nn.Module], name: str) -> bool:
    """Refuse an adapter's inner Linear and one that is followed by other modules; warn of a pair of low rank.

    ``path`` leads from the model to its head. False: it has warned.

    Raises:
        TypeError: a module on the path is known to change the head's output.
    """
    *_, parent, head = path
    at_rest = getattr(parent, "merged", False) is True or getattr(parent, "disable_adapters", False) is True
    if (parts := adapter_parts(parent)) and not at_rest:
        raise TypeError(
            f"head must be a Linear whose output are the logits, got {name!r} inside a {class_name(parent)} with "
            f"{', '.join(parts)}: the adapter would be left out; merge it into the weight first "
            "(model.merge_and_unload() in PEFT)"
        )
    for outer, inner in pairwise(path):
        if isinstance(outer, nn.Sequential):
            modules = list(outer)
            place = next(i for i, each in enumerate(modules) if each is inner or inner in each.children())
            behind = [each for each in modules[place + 1 :] if not _keeps_logits(each)]
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


def _keeps_logits(module: nn.Module) -> bool:
    drops = isinstance(module, nn.modules.dropout._DropoutNd) and module.training
    return isinstance(module, (*KEEPS_LOGITS, nn.modules.dropout._DropoutNd)) and not drops


def _low_rank_pair(parent: nn.Module, head: nn.Linear) -> tuple[str, str] | None:
    """Two matrices beside the head that lead from its features to its classes by fewer dimensions."""
    if isinstance(parent, nn.Sequential | nn.ModuleList | nn.ModuleDict):
        return None
    own = {id(parameter) for parameter in head.parameters()}
    down: dict[int, str] = {}
    up: dict[int, str] = {}
    for place, module in parent.named_modules():
        if isinstance(module, nn.Embedding) or getattr(module, "bias", None) is not None:  # layers of a network
            continue
        for name, parameter in module._parameters.items():
            if parameter is None or id(parameter) in own or parameter.ndim != 2:
                continue
            full, shape = f"{place}.{name}".strip("."), tuple(parameter.shape)
            for side, wide in ((down, head.in_features), (up, head.out_features)):
                rank = shape[1] if shape[0] == wide else shape[0]
                if wide in shape and rank not in side:
                    side[rank] = full
                    break  # where both are as wide, the second of a pair is the other side
    limit = min(head.in_features, head.out_features)
    return next(((down[rank], up[rank]) for rank in down.keys() & up.keys() if rank < limit), None)


def warn_of_wrapper(wrapper: nn.Module, head: nn.Linear, features: Tensor) -> None:
    """Warn if a module that passes its own input to the head changes the logits, or has the parameters to do so."""
    own = {id(parameter) for parameter in head.parameters()}
    others = [name for name, parameter in wrapper.named_parameters() if id(parameter) not in own]
    rows = features.detach().reshape(-1, features.shape[-1])[:PROBES]
    with torch.no_grad(), torch.random.fork_rng([]):
        try:
            output, logits = wrapper(rows), head(rows)
        except Exception:
            return  # it needs more than the features, and nothing else is known to look at it
    if not isinstance(output, Tensor) or output.shape != logits.shape:
        return  # several heads side by side, for instance
    found = "another output than its head's"
    if _are_the_logits(output, logits):
        if not others:
            return
        found = f"other parameters on the same input: {', '.join(others[:4])}"
    warn_caller(
        f"the {class_name(wrapper)} around the head has {found}; features and head leave that out: put it into the "
        "head's weight, or into temperature= and softcap="
    )


def _are_the_logits(output: Tensor, logits: Tensor) -> bool:
    """Up to what a softmax does not see; or its result."""
    p = torch.softmax(logits.float(), -1)
    seen = (torch.softmax(output.float(), -1), output.float())
    return any(torch.allclose(found, p, rtol=1e-3, atol=1e-6, equal_nan=True) for found in seen)


# --- scales and soft caps --------------------------------------------------------------------------------------------


def warn_of_logit_maps(modules: Sequence[nn.Module], softcap: float | None, temperature: float) -> None:
    """Warn of scales and soft caps of logits that the modules around the head name and the arguments do not give."""
    for where, name, value in _logit_maps(modules):
        caps = "cap" in name.lower()
        if caps and value == softcap:
            continue
        if not caps and any(abs(temperature / each - 1) < 1e-6 for each in (value, 1 / value)):
            continue
        remedy = f"softcap={value:g}" if caps else f"temperature={1 / value:g} (of logits times it; {value:g}, over it)"
        warn_caller(
            f"{where}.{name} is {value:g}: the model seems to change the logits behind its head, which features and "
            f"head leave out; give {remedy} to split_head and to the losses and operators"
        )


def _logit_maps(modules: Sequence[nn.Module]) -> Iterator[tuple[str, str, float]]:
    """Where they stand, their names and values, each name once."""
    seen: set[str] = set()
    for module in modules:
        config = getattr(module, "config", None)
        places = [("model", module), ("model.config", config)]
        places += [(f"model.config.{name}", _items(config).get(name)) for name in TEXT_CONFIGS]
        for where, place in places:
            for name, value in _items(place).items():
                number = _number(value)
                if LOGITS.match(name) and name not in seen and number not in (None, 0.0, 1.0):
                    assert number is not None
                    seen.add(name)
                    yield where, name, number


def _items(place: object) -> dict[str, Any]:
    """The entries of a configuration or module that are of interest, be it a mapping or an object."""
    names = list(map(str, place)) if isinstance(place, Mapping) else dir(place)
    wanted = [name for name in names if LOGITS.match(name) or name in TEXT_CONFIGS]
    if isinstance(place, Mapping):
        return {name: place.get(name) for name in wanted}
    return {name: getattr(place, name, None) for name in wanted}


def _number(value: object) -> float | None:
    if isinstance(value, Tensor) and value.numel() == 1 and not value.is_meta:
        return float(value.detach())
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None
