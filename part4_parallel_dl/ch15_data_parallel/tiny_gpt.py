"""TinyGPT: the transformer that Parts IV and V train, small enough for a laptop and cut wherever a chapter likes.

A byte-level decoder in GPT-2's shape (pre-norm, learned positions, GELU) without dropout, so that one seed gives one
loss curve. Its pieces stand in a row, `stages()`, because model parallelism cuts between them: an embedding, the
blocks, a head. Importing this module imports torch: scripts do so inside functions.

Source: Radford et al. (2019), Language models are unsupervised multitask learners; Vaswani et al. (2017).
"""
from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional


@dataclass(frozen=True)
class GPTConfig:
    """Sizes. `width` must be a multiple of `heads`; `context` is the longest sequence, in tokens."""

    vocabulary: int = 256
    context: int = 64
    width: int = 64
    heads: int = 4
    layers: int = 4

    def __post_init__(self) -> None:
        if min(self.vocabulary, self.context, self.width, self.heads, self.layers) < 1 or self.width % self.heads:
            raise ValueError(f"width {self.width} must be a multiple of heads {self.heads}, and every size at least 1")

    @property
    def parameters(self) -> int:
        """Weights of the whole model: 12 w^2 + 13 w a block, two embeddings, the last norm and the head."""
        w = self.width
        return self.layers * (12 * w * w + 13 * w) + (self.vocabulary + self.context) * w + 2 * w + w * self.vocabulary


class Embedding(nn.Module):
    """Tokens (batch, time) int64 -> activations (batch, time, width): token plus position."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.token = nn.Embedding(config.vocabulary, config.width)
        self.position = nn.Embedding(config.context, config.width)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.token(tokens) + self.position.weight[:tokens.shape[1]]


class Attention(nn.Module):
    """Causal self-attention, (batch, time, width) -> the same shape."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.heads = config.heads
        self.qkv = nn.Linear(config.width, 3 * config.width)
        self.out = nn.Linear(config.width, config.width)

    def forward(self, x: Tensor) -> Tensor:
        batch, time, width = x.shape
        q, k, v = (part.view(batch, time, self.heads, -1).transpose(1, 2) for part in self.qkv(x).chunk(3, dim=-1))
        mixed = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(mixed.transpose(1, 2).reshape(batch, time, width))


class Block(nn.Module):
    """Attention, then a two-layer perceptron, each on the normalised stream and added back to it."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.norm1, self.attention = nn.LayerNorm(config.width), Attention(config)
        self.norm2 = nn.LayerNorm(config.width)
        self.up, self.down = nn.Linear(config.width, 4 * config.width), nn.Linear(4 * config.width, config.width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.down(functional.gelu(self.up(self.norm2(x))))


class Head(nn.Module):
    """Activations (batch, time, width) -> logits (batch, time, vocabulary). Not tied to the embedding."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.norm, self.out = nn.LayerNorm(config.width), nn.Linear(config.width, config.vocabulary, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.norm(x))


class TinyGPT(nn.Module):
    """Tokens (batch, time) int64 -> logits (batch, time, vocabulary). The same seed gives the same weights anywhere."""

    def __init__(self, config: GPTConfig, seed: int = 0) -> None:
        super().__init__()
        self.config = config
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.embedding = Embedding(config)
            self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
            self.head = Head(config)
            self.apply(self._initialise)
            for block in self.blocks:  # GPT-2: the residual stream's variance must not grow with depth
                for linear in (block.attention.out, block.down):
                    nn.init.normal_(linear.weight, std=0.02 / (2 * config.layers) ** 0.5)

    @staticmethod
    def _initialise(module: nn.Module) -> None:
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, std=0.02)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)

    def stages(self) -> list[nn.Module]:
        """The pieces in their order; each takes what the one before it returns."""
        return [self.embedding, *self.blocks, self.head]

    def forward(self, tokens: Tensor) -> Tensor:
        x = tokens
        for stage in self.stages():
            x = stage(x)
        return x


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean over all positions of -log p(target), in nats: logits (batch, time, vocabulary), targets (batch, time)."""
    return functional.cross_entropy(logits.flatten(0, -2), targets.flatten())


def batches(steps: int, rows: int, context: int, seed: int = 0, corpus_bytes: int = 200_000) -> np.ndarray:
    """(steps, rows, context + 1) int64 bytes of Python's own documentation: [..., :-1] is input, [..., 1:] target.

    Row r of step s is the same for every world size: data parallelism shares out the rows of one global batch.
    """
    from shared.data import corpus

    text = np.frombuffer("\n".join(corpus(corpus_bytes)).encode(), np.uint8)
    starts = np.random.default_rng(seed).integers(0, len(text) - context - 1, (steps, rows, 1))
    return text[starts + np.arange(context + 1)].astype(np.int64)
