"""Train a small transformer on characters with several processes, each on its own batches.

    mlx.launch -n 2 examples/data_parallel.py                        two processes here
    mlx.launch -n 2 examples/data_parallel.py --average --steps 50   each with a whole state
    mlx.launch --hosts a,b examples/data_parallel.py                 two machines
    python examples/data_parallel.py                                 one process

The text is the source of Python's own library. By default the optimizer's state is spread over the
processes, which come to the same model. The first process tells how it goes.
"""

from __future__ import annotations

import argparse
import os
import time
from functools import partial
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import mlx_fused_optim as optim
import numpy as np
from mlx.utils import tree_flatten

WIDTH, HEADS, LAYERS, CONTEXT, BATCH = 64, 4, 2, 64, 16
SYMBOLS = 128


class Layer(nn.Module):
    """Attention to what came before, then a network of each place."""

    def __init__(self):
        super().__init__()
        self.norms = [nn.RMSNorm(WIDTH), nn.RMSNorm(WIDTH)]
        self.attention = nn.MultiHeadAttention(WIDTH, HEADS)
        self.network = nn.Sequential(
            nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH)
        )

    def __call__(self, x: mx.array, mask: mx.array) -> mx.array:
        y = self.norms[0](x)
        x = x + self.attention(y, y, y, mask)
        return x + self.network(self.norms[1](x))


class Transformer(nn.Module):
    """From characters to the logits of the next ones."""

    def __init__(self):
        super().__init__()
        self.characters = nn.Embedding(SYMBOLS, WIDTH)
        self.places = nn.Embedding(CONTEXT, WIDTH)
        self.layers = [Layer() for _ in range(LAYERS)]
        self.norm = nn.RMSNorm(WIDTH)
        self.head = nn.Linear(WIDTH, SYMBOLS)

    def __call__(self, text: mx.array) -> mx.array:
        x = self.characters(text) + self.places(mx.arange(text.shape[1]))
        mask = nn.MultiHeadAttention.create_additive_causal_mask(text.shape[1])
        for layer in self.layers:
            x = layer(x, mask)
        return self.head(self.norm(x))


def text_of_python(characters: int = 1 << 20) -> np.ndarray:
    """The same on processes of the same Python; what is not ASCII is left out."""
    files = sorted(Path(os.__file__).parent.glob("*.py"))
    data = np.frombuffer(b"".join(path.read_bytes() for path in files), np.uint8)
    return data[data < SYMBOLS][:characters]


def loss_of(model: Transformer, text: mx.array) -> mx.array:
    return nn.losses.cross_entropy(model(text[:, :-1]), text[:, 1:], reduction="mean")


def train(group: mx.distributed.Group, steps: int, average: bool) -> tuple[list[float], mx.array]:
    """The mean losses of all processes, and a number that tells models apart."""
    mx.random.seed(0)  # the same model everywhere
    model = Transformer()
    rate = optim.warmup(optim.cosine_decay(3e-3, steps), max(steps // 10, 1))
    optimizer = optim.AdamW(rate, weight_decay=0.1, clip_norm=1.0)
    if not average:
        optimizer = optim.Sharded(optimizer, group)

    text = text_of_python()
    random = np.random.default_rng(group.rank())  # other batches
    gradients_of = nn.value_and_grad(model, loss_of)
    optimizer.init(model.trainable_parameters())
    state = [model.state, optimizer.state]

    @partial(mx.compile, inputs=state, outputs=state)
    def step(batch: mx.array) -> mx.array:
        loss, gradients = gradients_of(model, batch)
        if average:
            gradients = optim.average_gradients(gradients, group)
        optimizer.update(model, gradients)
        return loss

    losses, begin = [], time.perf_counter()
    for number in range(steps):
        starts = random.integers(0, len(text) - CONTEXT - 1, BATCH)
        batch = np.stack([text[at : at + CONTEXT + 1] for at in starts])
        loss = step(mx.array(batch.astype(np.int32)))
        mx.eval(loss, state)
        mean = mx.distributed.all_sum(loss, group=group) / group.size()
        losses.append(mean.item())
        if group.rank() == 0 and (number % 10 == 9 or number == 0):
            seconds = time.perf_counter() - begin
            print(f"step {number + 1:4}  loss {losses[-1]:.3f}  {seconds:6.1f} s", flush=True)
    weights = [parameter.square().sum() for _, parameter in tree_flatten(model.parameters())]
    return losses, mx.stack(weights).sum()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument(
        "--average", action="store_true", help="average gradients; each keeps a whole state"
    )
    arguments = parser.parse_args()
    group = mx.distributed.init()
    losses, weight = train(group, arguments.steps, arguments.average)
    others = mx.distributed.all_gather(weight.reshape(1), group=group)
    assert (others == weight).all(), "the processes have other models"
    if group.rank() == 0:
        print(f"{group.size()} processes, loss {losses[0]:.3f} -> {losses[-1]:.3f}")


if __name__ == "__main__":
    main()
