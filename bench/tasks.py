"""What is learnt: small tasks, on data that is on the machine already.

The 1797 handwritten digits that scikit-learn ships; characters of the Python manual that every
Python ships; and its topics, by the pretrained word vectors of passages.py, where those are.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from passages import Passages

UNSEEN_DIGITS = 360  # a fifth of them, which the recorded runs did not learn


class Task(NamedTuple):
    """A model to make, batches to learn from, and held-out ones for the final loss."""

    name: str
    model: Callable[[], nn.Module]
    batch: Callable[[int], tuple[mx.array, mx.array]]
    held_out: list[tuple[mx.array, mx.array]]


def loss_of(model: nn.Module, x: mx.array, y: mx.array) -> mx.array:
    return nn.losses.cross_entropy(model(x).astype(mx.float32), y, reduction="mean")


# ---- Models ----------------------------------------------------------------------


class Network(nn.Module):
    """Blocks of a layer normalisation and a linear layer, each added to its input."""

    def __init__(self, pixels: int = 64, width: int = 128, blocks: int = 6, classes: int = 10):
        super().__init__()
        self.first = nn.Linear(pixels, width)
        self.blocks = [
            nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width), nn.ReLU())
            for _ in range(blocks)
        ]
        self.last = nn.Linear(width, classes)

    def __call__(self, x: mx.array) -> mx.array:
        x = self.first(x)
        for block in self.blocks:
            x = x + block(x)
        return self.last(x)


class Block(nn.Module):
    """A transformer's layer, normalised first."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.attention_norm = nn.LayerNorm(width)
        self.attention = nn.MultiHeadAttention(width, heads)
        self.mlp_norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, 4 * width)
        self.down = nn.Linear(4 * width, width)

    def __call__(self, x: mx.array, mask: mx.array) -> mx.array:
        y = self.attention_norm(x)
        x = x + self.attention(y, y, y, mask)
        return x + self.down(nn.gelu(self.up(self.mlp_norm(x))))


class Transformer(nn.Module):
    """Characters in, the next characters out."""

    def __init__(self, symbols: int, context: int, width: int, layers: int):
        super().__init__()
        self.symbols = nn.Embedding(symbols, width)
        self.places = nn.Embedding(context, width)
        self.blocks = [Block(width, 4) for _ in range(layers)]
        self.norm = nn.LayerNorm(width)
        self.last = nn.Linear(width, symbols)

    def __call__(self, x: mx.array) -> mx.array:
        length = x.shape[1]
        h = self.symbols(x) + self.places(mx.arange(length))
        mask = nn.MultiHeadAttention.create_additive_causal_mask(length, h.dtype)
        for block in self.blocks:
            h = block(h, mask)
        return self.last(self.norm(h))


# ---- Tasks -----------------------------------------------------------------------


def digits() -> Task:
    from sklearn.datasets import load_digits

    data = load_digits()
    order = np.random.default_rng(0).permutation(len(data.target))[UNSEEN_DIGITS:]
    images = mx.array((data.data[order] / 16.0).astype(np.float32))
    labels = mx.array(data.target[order].astype(np.uint32))
    random = np.random.default_rng(1)
    numbers = random.integers(0, len(labels), (100_000, 64)).astype(np.uint32)

    def batch(step: int) -> tuple[mx.array, mx.array]:
        chosen = mx.array(numbers[step])
        return images[chosen], labels[chosen]

    # The loss on all images that were learnt from: what the optimizer works on.
    return Task("digits", Network, batch, [(images, labels)])


def characters(context: int = 64, size: int = 16, width: int = 64, layers: int = 2) -> Task:
    from pydoc_data.topics import topics

    text = "".join(topics[name] for name in sorted(topics))
    symbols = sorted(set(text))
    number = {symbol: i for i, symbol in enumerate(symbols)}
    encoded = np.array([number[symbol] for symbol in text], np.uint32)
    random = np.random.default_rng(2)
    train, rest = encoded[: -len(encoded) // 10], encoded[-len(encoded) // 10 :]

    def cut(source: np.ndarray, starts: np.ndarray) -> tuple[mx.array, mx.array]:
        rows = source[starts[:, None] + np.arange(context + 1)]
        return mx.array(rows[:, :-1]), mx.array(rows[:, 1:])

    starts = random.integers(0, len(train) - context - 1, (100_000, size))
    held_out = [cut(rest, random.integers(0, len(rest) - context - 1, 64)) for _ in range(8)]
    return Task(
        "characters",
        lambda: Transformer(len(symbols), context, width, layers),
        lambda step: cut(train, starts[step]),
        held_out,
    )


def topics(size: int = 64) -> Task:
    source = Passages()
    batches = [source.draw(size, held_out=False) for _ in range(2000)]
    held_out = [source.draw(256, held_out=True) for _ in range(8)]
    return Task("passages", source.model, lambda step: batches[step % len(batches)], held_out)
