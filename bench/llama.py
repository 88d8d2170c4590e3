"""A training step of a small model with the architecture of Llama: torch's loss on logits, and two changed lines.

A step is the forward pass, the backward pass and an update by AdamW. The embedding and the head are two parameters, as
in Llama. The stock step is that of transformers: logits are made in the dtype of the weights, converted to float32 and
passed to ``F.cross_entropy``; the labels of prompts are −100.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from statistics import median
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import softcurve as sc
from bench import measure
from bench.tables import Record, cell, print_head, print_row


class Size(NamedTuple):
    """The number and the length of the sequences of a step, and the sizes of the model."""

    sequences: int = 4
    length: int = 512
    classes: int = 32_000
    width: int = 256
    layers: int = 4
    head_width: int = 64

    @property
    def inner(self) -> int:
        """The width of the MLP: 8/3 of the model's, rounded up to a multiple of 16."""
        return -(-8 * self.width // 48) * 16


SIZE, SMALL = Size(), Size(2, 24, 1000, 32, 1, 16)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
MASKED = (0.5, 0.0)  # shares of the tokens that are prompts


class Block(nn.Module):
    """Causal attention with rotary positions, and an MLP with a gated SiLU, both after an RMS norm."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        width = size.width
        self.heads = width // size.head_width
        self.norms = nn.ModuleList([nn.RMSNorm(width), nn.RMSNorm(width)])
        self.qkv, self.out = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width, bias=False)
        self.gate, self.up = nn.Linear(width, size.inner, bias=False), nn.Linear(width, size.inner, bias=False)
        self.down = nn.Linear(size.inner, width, bias=False)

    def forward(self, x: Tensor, turn: tuple[Tensor, Tensor]) -> Tensor:
        """Return the residual stream ``(sequences, length, width)`` after both parts; ``turn``: cosines, sines."""
        q, k, v = self.qkv(self.norms[0](x)).unflatten(-1, (3, self.heads, -1)).transpose(1, 3).unbind(2)
        attended = F.scaled_dot_product_attention(_turned(q, turn), _turned(k, turn), v, is_causal=True)
        x = x + self.out(attended.transpose(1, 2).flatten(2))
        y = self.norms[1](x)
        return x + self.down(F.silu(self.gate(y)) * self.up(y))


def _turned(x: Tensor, turn: tuple[Tensor, Tensor]) -> Tensor:
    (a, b), (cosine, sine) = x.chunk(2, -1), turn
    return torch.cat([a * cosine - b * sine, a * sine + b * cosine], -1)


class Llama(nn.Module):
    """A decoder whose ``forward`` returns the logits ``(sequences, length, classes)``."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        self.embedding = nn.Embedding(size.classes, size.width)
        self.blocks = nn.ModuleList(Block(size) for _ in range(size.layers))
        self.norm = nn.RMSNorm(size.width)
        self.head = nn.Linear(size.width, size.classes, bias=False)
        angles = torch.outer(torch.arange(size.length), 1e-4 ** torch.linspace(0, 1, size.head_width // 2))
        self.register_buffer("cosine", angles.cos())
        self.register_buffer("sine", angles.sin())

    def features(self, tokens: Tensor) -> Tensor:
        """Return the features ``(sequences, length, width)`` that the head multiplies."""
        x, length = self.embedding(tokens), tokens.shape[1]
        for block in self.blocks:
            x = block(x, (self.cosine[:length], self.sine[:length]))
        return self.norm(x)

    def forward(self, tokens: Tensor) -> Tensor:
        """Return the logits."""
        return self.head(self.features(tokens))


# --- the losses -------------------------------------------------------------------------------------------------------


def stock(model: Llama, tokens: Tensor, labels: Tensor) -> Tensor:
    """Return the loss as transformers computes it."""
    return F.cross_entropy(model(tokens).float().flatten(0, 1), labels.flatten())


def lazy(model: Llama, tokens: Tensor, labels: Tensor) -> Tensor:
    """Return the stock loss, whose logits are not made."""
    with sc.lazy_logits(model, "head"):
        return stock(model, tokens, labels)


def on_features(model: Llama, tokens: Tensor, labels: Tensor) -> Tensor:
    """Return the loss of the features and the weight of the head."""
    return sc.linear_cross_entropy(model.features(tokens), model.head.weight, labels)


STOCK = "torch"
LOSSES: dict[str, Callable[[Llama, Tensor, Tensor], Tensor]] = {
    STOCK: stock,
    "lazy_logits": lazy,
    "linear_cross_entropy": on_features,
}

# --- a step -----------------------------------------------------------------------------------------------------------


def batch(size: Size, masked: float) -> tuple[Tensor, Tensor]:
    """Return tokens and labels; each sequence begins with a prompt of this share, whose labels are −100."""
    generator = torch.Generator().manual_seed(1)
    text = torch.randint(size.classes, (size.sequences, size.length + 1), generator=generator)
    labels = text[:, 1:].clone()
    labels[:, : round(masked * size.length)] = -100
    return text[:, :-1], labels


def model_of(size: Size, dtype: str) -> Llama:
    """Return the model with fixed random weights."""
    torch.manual_seed(0)
    return Llama(size).to(DTYPES[dtype])


class Training:
    """A model, its optimizer and a loss."""

    def __init__(self, model: Llama, who: str) -> None:
        self.model, self.loss = model, LOSSES[who]
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

    def __call__(self, tokens: Tensor, labels: Tensor) -> float:
        """Take a step and return the loss before it."""
        loss = self.loss(self.model, tokens, labels)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.item()


def print_memory(who: str, dtype: str, masked: float, size: Size) -> None:
    """Print one line of JSON: the peak of a step beyond model, optimizer and tokens; intended for a fresh process.

    A first, small step makes the state of the optimizer and loads everything that a step needs.
    """
    train = Training(model_of(size, dtype), who)
    train(*batch(size._replace(sequences=1, length=8), 0.0))
    tokens, labels = batch(size, masked)
    parameters = sum(parameter.nbytes for parameter in train.model.parameters())
    extra = measure.extra_peak_of(lambda: train(tokens, labels))
    print(json.dumps({"extra_mb": extra, "gradients_mb": parameters / 2**20}))


def figures(dtype: str, masked: float, size: Size, repeats: int) -> Iterator[Record]:
    """Yield the figures of each loss, the stock loss first."""
    model, (tokens, labels) = model_of(size, dtype), batch(size, masked)
    trainings = {who: Training(copy.deepcopy(model), who) for who in LOSSES}
    first = {who: train(tokens, labels) for who, train in trainings.items()}
    runs = {who: partial(train, tokens, labels) for who, train in trainings.items()}
    seconds = measure.interleaved(runs, repeats)
    for who in LOSSES:
        call = f"llama.print_memory({who!r}, {dtype!r}, {masked}, llama.Size(*{tuple(size)}))"
        memory = measure.in_fresh_process(f"from bench import llama\n{call}\n")
        yield {
            "dtype": dtype,
            "masked": masked,
            "who": who,
            "loss": first[who],
            "s": median(seconds[who]),
            "ratio": measure.median_ratio(seconds[who], seconds[STOCK]),
            **json.loads(memory),
        }


def print_llama(size: Size, repeats: int, masked: Sequence[float] = MASKED) -> list[Record]:
    """Print seconds and extra memory of a training step for each dtype and share of prompts."""
    print(f"\na training step of a Llama with random weights, {size.sequences * size.length} tokens: {size}\n")
    print(
        "Seconds are the median of all rounds, the ratio that of the rounds' own ratios. Extra memory is the peak\n"
        "beyond the model and the state of AdamW, in a fresh process; it includes the gradients. The loss is that of\n"
        "the first step.\n"
    )
    print_head("dtype", "prompts", "who", "s", "it / torch", "extra MB", "gradients MB", "loss")
    records = []
    for dtype in DTYPES:
        for share in masked:
            for record in figures(dtype, share, size, repeats):
                print_llama_row(record)
                records.append(record)
    return records


def print_llama_row(record: Record) -> None:
    """Print a row of the table, which docs/benchmarks.md repeats."""
    columns = {"s": ".3f", "ratio": ".2f", "extra_mb": ".0f", "gradients_mb": ".0f", "loss": ".4f"}
    entries = (cell(record, column, form) for column, form in columns.items())
    print_row(record["dtype"], f"{record['masked']:.0%}", record["who"], *entries)
