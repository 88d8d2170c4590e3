"""The features' forward pass under fixed conditions, and the same conditions for whatever autograd runs of it later.

A product evaluates the features once and differentiates them several times. A checkpoint that is not reentrant runs a
part of the forward again in each of these derivatives, so that all of them need what the forward had: the same kernels
of attention (``CheckpointError`` otherwise), the same values of the buffers, and no compiled code, which has no second
derivatives.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

__all__ = ["FeatureMap", "eager", "parallel_wrapper"]

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
        """``features(x)``, or ``features(**x)`` of a mapping, in its present mode."""
        devices = [] if device.type == "cpu" else [device]
        with (
            torch.inference_mode(False),
            torch.set_grad_enabled(graph),
            torch.random.fork_rng(devices),
            self.conditions(),
        ):
            torch.default_generator.manual_seed(seed)
            if devices:
                torch.cuda.manual_seed(seed)
            if isinstance(x, Mapping):
                e = self.module(**{name: _recordable(part) for name, part in x.items()})
            else:
                e = self.module(_recordable(x))
        if graph and isinstance(e, Tensor):
            _refuse_reentrant(e)
        return e

    @contextmanager
    def conditions(self) -> Iterator[None]:
        """Under which the forward, and every derivative of it, runs."""
        with ExitStack() as stack:
            stack.enter_context(eager())
            stack.enter_context(sdpa_kernel(SDPBackend.MATH))  # the one that has second derivatives
            stack.enter_context(_copied_buffers(self.module))  # which batch normalisation writes to
            yield


def parallel_wrapper(module: nn.Module) -> str | None:
    """The name of torch's wrapper for several processes or devices that the module is an instance of."""
    names = (kind.__name__ for kind in type(module).__mro__ if kind.__module__.startswith(("torch.", "deepspeed.")))
    return next((name for name in names if name in WRAPPERS), None)


@contextmanager
def eager() -> Iterator[None]:
    """Compiled modules run as they were written."""
    # Where torch.compile has not been used there is no need to import it, which takes seconds.
    if "torch._dynamo" not in sys.modules:
        yield
        return
    with torch.compiler.set_stance("force_eager"):
        yield


@contextmanager
def _copied_buffers(module: nn.Module) -> Iterator[None]:
    """The module has copies of its buffers; a buffer that is shared stays shared."""
    own = [
        (part, name, buffer)
        for part in module.modules()
        for name, buffer in part._buffers.items()
        if buffer is not None
    ]
    copies: dict[int, Tensor] = {}
    try:
        for part, name, buffer in own:
            if id(buffer) not in copies:
                copies[id(buffer)] = buffer.clone()
            part._buffers[name] = copies[id(buffer)]
        yield
    finally:
        for part, name, buffer in own:
            part._buffers[name] = buffer


def _recordable(value: Any) -> Any:
    """Not a tensor of the inference mode, which no graph can hold."""
    return value.clone() if isinstance(value, Tensor) and value.is_inference() else value


def _refuse_reentrant(e: Tensor) -> None:
    """The graph of a reentrant checkpoint ends at its input: the parameters within would count as unused."""
    seen, open_ = set(), [e.grad_fn]
    while open_:
        node = open_.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if node.name() == "CheckpointFunctionBackward":
            raise ValueError(
                "features must not use reentrant checkpoints, whose parameters torch.autograd.grad does not reach; "
                "give torch.utils.checkpoint.checkpoint use_reentrant=False"
            )
        open_.extend(before for before, _ in node.next_functions)
