"""The head of a model whose logits are not made: which module it is, its weight, and what is reported of it."""

from __future__ import annotations

import functools
from types import TracebackType
from typing import Any, Literal, TypeAlias
from weakref import WeakSet

import torch
from torch import Tensor, nn
from torch.autograd.graph import increment_version
from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook

from softcurve import checks
from softcurve.head.problem import require_budget
from softcurve.head.sharded import lies_over_processes
from softcurve.lazy.record import LinearRecord, require_unchanged
from softcurve.lazy.tensor import lazy_logits_of
from softcurve.lazy.transforms import innermost_is_vmap
from softcurve.losses.low_rank import PEFT_ATTRIBUTES, LowRankWeight, matrix_of
from softcurve.typing import Integer
from softcurve.warn import warn_caller

OnMaterialize: TypeAlias = Literal["count", "warn", "raise"]


class LazyHead:
    """The handle of :func:`softcurve.lazy_logits`, and a context manager that removes itself at its end.

    ``materialized`` is how often logits were made since it was created.
    """

    def __init__(self, module: nn.Module, on_materialize: OnMaterialize, memory_budget: Integer | None) -> None:
        require_linear(module)
        checks.require_choice("on_materialize", on_materialize, ("count", "warn", "raise"))
        self.module, self.on_materialize, self.memory_budget = module, on_materialize, require_budget(memory_budget)
        self.materialized = 0
        module.forward = self.forward
        _ACTIVE.add(self)
        _watch_optimizers()

    def __enter__(self) -> LazyHead:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.remove()

    def __repr__(self) -> str:
        state = "active" if self._is_active() else "removed"
        return f"LazyHead({type(self.module).__name__}, {state}, materialized={self.materialized})"

    def remove(self) -> None:
        """Give the head its own forward back; unmade logits that exist stay valid."""
        _ACTIVE.discard(self)
        if self._is_active():
            del self.module.forward

    def _is_active(self) -> bool:
        return getattr(self.module.__dict__.get("forward"), "__self__", None) is self

    def forward(self, input: Tensor) -> Tensor:
        """Return the unmade logits of features ``(..., d)``, as the head's forward."""
        weight, bias = weight_of(self.module)
        checks.require_floating("the input of the head", input, "(..., d)")
        matrix, device = matrix_of(weight), input.device.type
        if input.device != matrix.device:
            raise ValueError(
                f"the input of the head must be on {matrix.device}, as its weight, got {input.device}; in replicas of "
                "DataParallel lazy_logits does not work, use DistributedDataParallel"
            )
        if input.shape[-1] != matrix.shape[1]:
            raise ValueError(
                f"the input of the head must have {matrix.shape[1]} features, as its weight {tuple(matrix.shape)}, "
                f"got {checks.describe(input)}"
            )
        lowered = None
        if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
            lowered = torch.get_autocast_dtype(device)
        dtype = lowered if lowered is not None and input.dtype != torch.float64 else input.dtype
        record = LinearRecord(
            input, weight, bias, dtype=dtype, dim=input.ndim - 1, lowered=lowered, memory_budget=self.memory_budget
        )
        if not torch.compiler.is_compiling() and innermost_is_vmap():
            self.report(record, "vmap")
            return record.materialize()
        return lazy_logits_of(record, self)

    def report(self, record: LinearRecord, reason: str) -> None:
        """Count that logits are made, and say so where the user wants to know.

        Raises:
            RuntimeError: If ``on_materialize`` is ``"raise"``, or a tensor is no longer what it was.
        """
        self.materialized += 1
        if self.on_materialize != "count":
            size = record.shape.numel() * record.dtype.itemsize / 2**20
            message = (
                f"lazy_logits: {reason} needs the entries of logits {tuple(record.shape)}, which take {size:.4g} MiB; "
                "the losses, log-probabilities and top classes that the documentation of lazy_logits lists do not"
            )
            if self.on_materialize == "raise":
                raise RuntimeError(message)
            warn_caller(message)
        require_unchanged(record)


_ACTIVE: WeakSet[LazyHead] = WeakSet()


@functools.cache
def _watch_optimizers() -> None:
    """Let the steps of all optimizers be seen in the versions of the parameters of active heads."""
    register_optimizer_step_post_hook(_count_step)


def _count_step(optimizer: Optimizer, *_: Any) -> None:
    """Count a step as a change in place of a head's parameters, which fused steps and those by ``.data`` are not."""
    if torch.compiler.is_compiling():
        return
    for head in list(_ACTIVE):
        of_head = set(map(id, head.module.parameters()))
        increment_version([p for group in optimizer.param_groups for p in group["params"] if id(p) in of_head])


def is_lazy(module: nn.Module) -> bool:
    """Return whether a head answers with unmade logits at present."""
    return isinstance(getattr(module.__dict__.get("forward"), "__self__", None), LazyHead)


# --- finding the head ------------------------------------------------------------------------------------------------


def head_of(model: nn.Module, head: nn.Module | str | None) -> nn.Module:
    """Return the module that makes a model's logits.

    Raises:
        TypeError, ValueError: If ``head`` is neither a module of the model nor the name of one, or is None and the
            model does not name its head by ``get_output_embeddings()``.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    if isinstance(head, str):
        names = [name for name, _ in model.named_modules() if name == head or name.endswith(f".{head}")]
        if len(names) != 1:
            linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
            raise ValueError(
                f"head must be the name of one module of the model, got {head!r}, which names {names or 'none'}; its "
                f"last linear layers are {linear[-3:]}"
            )
        return model.get_submodule(names[0])
    if head is not None:
        if not any(module is head for module in model.modules()):
            raise ValueError(f"head must be a module of the model or its name, got a {type(head).__name__} outside it")
        return head
    inner: Any = model
    while not hasattr(inner, "get_output_embeddings"):
        wrapped = getattr(inner, "module", None) or getattr(inner, "_orig_mod", None)
        if not isinstance(wrapped, nn.Module):
            raise ValueError(
                f"head must be given for a {type(model).__name__}, which has no get_output_embeddings(): pass the "
                'linear layer that makes the logits or its name, such as head="classifier"'
            )
        inner = wrapped
    output = inner.get_output_embeddings()
    if not isinstance(output, nn.Module):
        raise ValueError(
            f"head must be given for a {type(inner).__name__}, whose get_output_embeddings() returns {output!r}: pass "
            "the linear layer that makes the logits or its name"
        )
    return output


def require_linear(module: nn.Module) -> None:
    """Raise ``TypeError`` or ``ValueError`` unless a module's forward is ``linear(input, weight, bias)``."""
    if "forward" in module.__dict__:
        raise ValueError(
            f"head must have its own forward, got a {type(module).__name__} whose forward was replaced, by lazy_logits "
            "or a library that moves weights; remove that first"
        )
    inner = _inner(module)
    if getattr(type(inner), "forward", None) is not nn.Linear.forward:
        raise TypeError(
            f"head must be a torch.nn.Linear, or one with a LoRA adapter of peft, whose output is the logits, got "
            f"{type(inner).__module__}.{type(inner).__name__}; pass the linear layer itself, or merge its adapter"
        )
    weight = getattr(inner, "weight", None)
    checks.require_floating("the weight of the head", weight, "(C, d)")
    is_group = hasattr(module, "_get_fsdp_state")  # of FSDP2, whose hooks make the weight whole
    if lies_over_processes(weight) and module._forward_hooks and not is_group:
        raise ValueError(
            "head must leave its output to the loss where its weight is a DTensor, got a head whose hooks convert it; "
            "leave the head out of the parallel plan and shard its weight by distribute_tensor, with Shard(0)"
        )


def _inner(module: Any) -> Any:
    """Return the linear layer inside what peft puts around a head."""
    saved = getattr(module, "modules_to_save", None)
    if isinstance(saved, nn.ModuleDict):
        active = getattr(module, "active_adapter", None)
        names = [active] if isinstance(active, str) else list(active or ())
        off = getattr(module, "disable_adapters", False) or not names or names[0] not in saved
        module = module.original_module if off else saved[names[0]]
    return module.base_layer if all(hasattr(module, name) for name in PEFT_ATTRIBUTES) else module


def weight_of(module: Any) -> tuple[Tensor | LowRankWeight, Tensor | None]:
    """Return the weight and the bias with which a head multiplies, and an adapter adds to."""
    inner = _inner(module)
    has_adapter = all(hasattr(module, name) for name in PEFT_ATTRIBUTES)
    if has_adapter and not getattr(module, "merged", False) and not getattr(module, "disable_adapters", False):
        return LowRankWeight.from_peft(module), inner.bias
    return inner.weight, inner.bias
