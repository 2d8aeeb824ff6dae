"""Gradients of several batches, added before one step: the step of one large batch.

    python examples/gradient_accumulation.py

`grad_scale` is how many batches were added: the kernel divides by it before it clips, so the
mean needs no pass of its own. `mx.eval` after each batch frees what its backward pass held.
"""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn
import mlx_fused_optim as optim
from mlx.utils import tree_flatten

BATCHES, ROWS, STEPS = 4, 16, 20


def loss_fn(model: nn.Module, x: mx.array, y: mx.array) -> mx.array:
    return nn.losses.mse_loss(model(x), y)


def train(accumulate: bool) -> nn.Module:
    mx.random.seed(0)
    model = nn.Sequential(nn.Linear(8, 32), nn.Tanh(), nn.Linear(32, 1))
    x = mx.random.normal((BATCHES * ROWS, 8))
    y = mx.sin(x.sum(axis=1, keepdims=True))
    optimizer = optim.AdamW(1e-2, clip_norm=1.0, grad_scale=BATCHES if accumulate else 1)
    loss_and_grad = nn.value_and_grad(model, loss_fn)
    for _ in range(STEPS):
        if accumulate:
            total = None
            for i in range(BATCHES):
                rows = slice(ROWS * i, ROWS * (i + 1))
                _, gradients = loss_and_grad(model, x[rows], y[rows])
                total = optim.accumulate_gradients(total, gradients)
                mx.eval(total)
        else:
            _, total = loss_and_grad(model, x, y)
        optimizer.update(model, total)
        mx.eval(model.parameters(), optimizer.state)
    return model


def main() -> float:
    """How far the weights of the two ways are apart."""
    one, other = (dict(tree_flatten(train(way).parameters())) for way in (True, False))
    apart = max(mx.abs(one[name] - other[name]).max().item() for name in one)
    print(f"{BATCHES} batches of {ROWS}, and one of {BATCHES * ROWS}: {apart:.1e} apart")
    return apart


if __name__ == "__main__":
    main()
