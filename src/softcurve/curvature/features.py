"""The features' forward pass under fixed conditions, and the same conditions for its derivatives.

A product evaluates the features once and differentiates them several times. A checkpoint that is not reentrant runs a
part of the forward again in each of these derivatives, so that all of them need what the forward had: the same kernels
of attention (``CheckpointError`` otherwise), the same values of the buffers, and no compiled code, which has no second
derivatives.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

WRAPPERS = ("DistributedDataParallel", "DataParallel", "FullyShardedDataParallel", "FSDPModule", "DeepSpeedEngine")


class FeatureMap:
    """``features`` as a function of a batch and a seed; the module's buffers and torch's generators are not changed."""

    def __init__(self, module: nn.Module) -> None:
        if not isinstance(module, nn.Module):
            raise TypeError(
                f"features must be a torch.nn.Module, got {type(module).__name__}; for no features at all use "
                "torch.nn.Identity()"
            )
        for name, part in module.named_modules():
            if (wrapper := parallel_wrapper(part)) is not None:
                raise TypeError(
                    f"features must not hold a {wrapper}, got one{f' as {name}' if name else ''}, whose forward "
                    "prepares a training step; give the module inside it, and process_group= for several processes"
                )
        self.module = module

    def __call__(self, x: Any, seed: int, *, device: torch.device, graph: bool) -> Any:
        """Return ``features(x)``, or ``features(**x)`` of a mapping, in the module's present mode.

        Of a record, as the models of transformers return, it is the ``last_hidden_state``.
        """
        devices = [] if device.type == "cpu" else [device]
        with torch.inference_mode(False), torch.set_grad_enabled(graph), torch.random.fork_rng(devices):
            torch.default_generator.manual_seed(seed)
            if devices:
                torch.cuda.manual_seed(seed)
            with self.conditions():
                if isinstance(x, Mapping):
                    e = self.module(**{name: _recordable(part) for name, part in x.items()})
                else:
                    e = self.module(_recordable(x))
        e = getattr(e, "last_hidden_state", e)
        if graph and isinstance(e, Tensor):
            _require_no_reentrant_checkpoint(e)
        return e

    @contextmanager
    def conditions(self) -> Iterator[None]:
        """The conditions of the forward and of every derivative of it."""
        # The mathematical attention has second derivatives; batch normalisation writes to buffers.
        with eager(), sdpa_kernel(SDPBackend.MATH), _copied_buffers(self.module):
            yield


def parallel_wrapper(module: nn.Module) -> str | None:
    """Return the name of torch's wrapper for several processes or devices that the module is an instance of."""
    names = (kind.__name__ for kind in type(module).__mro__ if kind.__module__.startswith(("torch.", "deepspeed.")))
    return next((name for name in names if name in WRAPPERS), None)


def eager() -> Any:
    """Return a context in which compiled modules run uncompiled."""
    # Where torch.compile has not been used there is no need to import it, which takes seconds.
    return torch.compiler.set_stance("force_eager") if "torch._dynamo" in sys.modules else nullcontext()


@contextmanager
def _copied_buffers(module: nn.Module) -> Iterator[None]:
    """Replace the module's buffers by copies; a buffer that is shared stays shared."""
    tables = [part._buffers for part in module.modules()]
    owners = [(table, name, buffer) for table in tables for name, buffer in table.items() if buffer is not None]
    copies = {id(buffer): buffer.clone() for _, _, buffer in owners}
    try:
        for table, name, buffer in owners:
            table[name] = copies[id(buffer)]
        yield
    finally:
        for table, name, buffer in owners:
            table[name] = buffer


def _recordable(value: Any) -> Any:
    """Clone a tensor of the inference mode, which autograd cannot record."""
    return value.clone() if isinstance(value, Tensor) and value.is_inference() else value


def _require_no_reentrant_checkpoint(e: Tensor) -> None:
    """The graph of a reentrant checkpoint ends at its input: the parameters within would count as unused."""
    seen, pending = set(), [e.grad_fn]
    while pending:
        node = pending.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if node.name() == "CheckpointFunctionBackward":
            raise ValueError(
                "features must not use reentrant checkpoints, whose parameters torch.autograd.grad does not reach; "
                "give torch.utils.checkpoint.checkpoint use_reentrant=False"
            )
        pending.extend(before for before, _ in node.next_functions)
