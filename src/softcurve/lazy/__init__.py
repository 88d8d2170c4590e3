"""Logits that a model's own forward does not make, because what it computes from them needs none."""

from __future__ import annotations

from torch import nn

from softcurve.lazy.heads import LazyHead, OnMaterialize, head_of
from softcurve.lazy.tensor import LazyLogits
from softcurve.typing import Integer

__all__ = ["LazyHead", "LazyLogits", "lazy_logits"]


def lazy_logits(
    model: nn.Module, head: nn.Module | str | None = None, *, on_materialize: OnMaterialize = "count",
    memory_budget: Integer | None = None,
) -> LazyHead:  # fmt: skip
    """Let a model's head answer with unmade logits, so that its own loss is computed without them.

    The head's forward returns a :class:`torch.Tensor` without memory, which knows the features, the weight and the
    bias. Scaling, a tanh cap, casts, a bias, and indexing and reshaping of leading dimensions are recorded.
    ``F.cross_entropy``, ``F.nll_loss`` and ``F.kl_div`` of ``log_softmax``, ``gather``, ``logsumexp``, ``argmax``,
    ``max`` and ``topk``, and the sum or mean of a ``log_softmax`` over the classes, are computed a tile at a time by
    the ``linear_*`` functions. Every other function receives the logits themselves, which are then made as the head
    would have made them, and kept; so does each of these where the ``linear_*`` function refuses entries, as NaN on the
    CPU, so that its result is that of torch.

    Args:
        model: A model of transformers, or any module; it may be wrapped by DDP, FSDP, peft or ``torch.compile``.
        head: The ``torch.nn.Linear`` that makes the logits, or its name, such as ``"classifier"``. By default that of
            ``model.get_output_embeddings()``. It may have a LoRA adapter of peft.
        on_materialize: What happens where logits are made: ``"count"`` counts in the attribute ``materialized``,
            ``"warn"`` also warns, with the function that needed them, and ``"raise"`` raises ``RuntimeError``.
        memory_budget: Bytes for tiles and for copies of rows of the weight, as in
            :func:`softcurve.linear_cross_entropy`.

    Returns:
        A context manager, which is active at once, with ``materialized``, how often logits were made, and ``remove()``.

    Losses are float32 or wider, whatever the dtype of the model. Where the head runs under autocast, its factors are
    lowered, and the sums stay in float32. A masked class, of bias −inf, has no share of the label smoothing of
    ``F.cross_entropy``, whose loss is infinite in torch.

    The step of an optimizer counts as a change of the weight in place. Another change through ``.data`` between the
    head and the loss, as by ``merge_adapter`` of peft, is not noticed: the loss is that of the new weight. Directly
    inside of ``torch.vmap`` the head makes its logits.

    Raises:
        TypeError, ValueError: If the model has no such head, the head's forward is not that of ``nn.Linear``, or
            another argument is not as above.
        RuntimeError: If the features, weight or bias were changed or freed before the unmade logits are used, or these
            left compiled code before the loss.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1000))
        >>> with softcurve.lazy_logits(model, head="2") as lazy:
        ...     loss = torch.nn.functional.cross_entropy(model(torch.randn(3, 4)), torch.tensor([0, 41, 2]))
        ...     loss.backward()
        >>> lazy.materialized
        0
    """
    return LazyHead(head_of(model, head), on_materialize, memory_budget)
