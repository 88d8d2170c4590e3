"""A decoder-only transformer with tied embeddings, which returns features instead of logits."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn


@dataclass(frozen=True)
class Shape:
    """The sizes of a model."""

    vocab: int
    width: int
    layers: int
    head_width: int = 32


Rotation = tuple[Float[Tensor, "context half"], Float[Tensor, "context half"]]  # cosines and sines


def rotation(context: int, head_width: int) -> Rotation:
    """Return the rotary position embedding; its frequencies decrease from 1 to 0.001 radians per position."""
    angles = torch.outer(torch.arange(context), 1e-3 ** torch.linspace(0, 1, head_width // 2))
    return angles.cos(), angles.sin()


def rotated(x: Float[Tensor, "batch heads context head_width"], by: Rotation) -> Tensor:
    """Apply the rotation to queries or keys, so that their inner products depend only on relative positions."""
    (a, b), (cosine, sine) = x.chunk(2, -1), by
    return torch.cat([a * cosine - b * sine, a * sine + b * cosine], -1)


class Block(nn.Module):
    """A pre-norm residual block of causal attention and an MLP."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.head_width = shape.head_width
        self.before_attention, self.before_mlp = nn.LayerNorm(shape.width), nn.LayerNorm(shape.width)
        self.query_key_value = nn.Linear(shape.width, 3 * shape.width)
        self.out = nn.Linear(shape.width, shape.width)
        self.up, self.down = nn.Linear(shape.width, 4 * shape.width), nn.Linear(4 * shape.width, shape.width)

    def forward(self, x: Float[Tensor, "batch context width"], by: Rotation) -> Float[Tensor, "batch context width"]:
        """Return features of the same shape."""
        split = self.query_key_value(self.before_attention(x)).unflatten(-1, (3, -1, self.head_width))
        query, key, value = split.permute(2, 0, 3, 1, 4)  # each (batch, heads, context, head width)
        mixed = nn.functional.scaled_dot_product_attention(rotated(query, by), rotated(key, by), value, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).flatten(-2))
        more: Tensor = self.down(nn.functional.gelu(self.up(self.before_mlp(x))))
        return x + more


class TinyLM(nn.Module):
    """Maps tokens to features; the logits ``features @ embedding.weight.T + bias`` are never computed as a whole.

    The bias is initialised to the log-frequencies of the tokens, so training starts from the unigram model.
    """

    def __init__(self, shape: Shape, log_frequencies: Float[Tensor, " vocab"]) -> None:
        super().__init__()
        self.head_width = shape.head_width
        self.bias = nn.Parameter(log_frequencies.clone())
        self.embedding = nn.Embedding(shape.vocab, shape.width)
        self.blocks = nn.ModuleList(Block(shape) for _ in range(shape.layers))
        self.norm = nn.LayerNorm(shape.width)
        for name, parameter in self.named_parameters():
            if parameter.ndim == 2:
                into_the_sum = name.endswith(("out.weight", "down.weight"))
                nn.init.normal_(parameter, std=0.02 / math.sqrt(2 * shape.layers) if into_the_sum else 0.02)

    @property
    def head(self) -> tuple[Float[Tensor, "vocab width"], Float[Tensor, " vocab"]]:
        """The tied weight and the bias."""
        return self.embedding.weight, self.bias

    def forward(self, tokens: Int[Tensor, "batch context"]) -> Float[Tensor, "batch context width"]:
        """Return the features of each position."""
        x, by = self.embedding(tokens), rotation(tokens.shape[-1], self.head_width)
        for block in self.blocks:
            x = block(x, by)
        features: Tensor = self.norm(x)
        return features

    def size(self) -> int:
        """Return the number of parameters; the tied weight counts once."""
        return sum(parameter.numel() for parameter in self.parameters())
