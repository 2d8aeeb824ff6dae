"""A small pretrained model to fine-tune: the word vectors that the package wordllama ships,
32,000 of 256 numbers, taught to say which topic of the Python manual a passage is from.

    pip install wordllama tokenizers

Only its two files are read.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np

TOKENS = 32  # of a passage
FILES = "weights/l2_supercat_256.safetensors", "tokenizers/l2_supercat_tokenizer_config.json"


def files() -> list[Path]:
    """Weights and tokenizer, or nothing where they are not installed."""
    package = find_spec("wordllama")
    if package is None or package.origin is None or find_spec("tokenizers") is None:
        return []
    return [Path(package.origin).parent / name for name in FILES]


class Classifier(nn.Module):
    """The mean of a passage's vectors, and a layer above it."""

    def __init__(self, vectors: mx.array, topics: int):
        super().__init__()
        self.words = nn.Embedding(*vectors.shape)
        self.words.weight = vectors
        self.last = nn.Linear(vectors.shape[1], topics)

    def __call__(self, tokens: mx.array) -> mx.array:
        return self.last(self.words(tokens).mean(axis=1))


class Passages:
    """Of every topic the last tenth is held out."""

    def __init__(self) -> None:
        from pydoc_data.topics import topics

        from tokenizers import Tokenizer

        weights, tokenizer_file = files()
        (vectors,) = mx.load(str(weights)).values()
        self.vectors = vectors.astype(mx.float32)
        tokenizer = Tokenizer.from_file(str(tokenizer_file))
        names = sorted(topics)
        encoded = [
            np.array(tokenizer.encode(topics[name], add_special_tokens=False).ids, np.uint32)
            for name in names
        ]
        # Of each topic that is long enough: begin and end of what is learnt, and of the rest.
        self.tokens = [ids for ids in encoded if len(ids) >= 20 * TOKENS]
        self.random = np.random.default_rng(3)

    def model(self) -> Classifier:
        return Classifier(self.vectors, len(self.tokens))

    def draw(self, count: int, held_out: bool) -> tuple[mx.array, mx.array]:
        chosen = self.random.integers(0, len(self.tokens), count)
        rows = []
        for topic in chosen:
            ids = self.tokens[topic]
            border = len(ids) * 9 // 10
            low, high = (border, len(ids)) if held_out else (0, border)
            start = self.random.integers(low, high - TOKENS + 1)
            rows.append(ids[start : start + TOKENS])
        return mx.array(np.stack(rows)), mx.array(chosen.astype(np.uint32))
