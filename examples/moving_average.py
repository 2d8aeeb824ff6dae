"""Evaluate with a moving average of the parameters, kept by the step's kernel.

    python examples/moving_average.py

With a constant learning rate and small batches the parameters jump around a minimum; their average
is nearer to it. The average is float32 whatever the model is, and costs 4 bytes a parameter.
"""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn
import mlx_fused_optim as optim

STEPS = 300


def main() -> tuple[float, float]:
    """The loss of the parameters, and of their average."""
    mx.random.seed(0)
    model = nn.Linear(16, 1)
    true = mx.random.normal((16, 1))

    def batch(rows: int) -> tuple[mx.array, mx.array]:
        x = mx.random.normal((rows, 16))
        return x, x @ true + mx.random.normal((rows, 1))

    def loss_fn(model: nn.Module, x: mx.array, y: mx.array) -> mx.array:
        return nn.losses.mse_loss(model(x), y)

    optimizer = optim.SGD(learning_rate=0.03, momentum=0.5, ema_decay=0.98)
    loss_and_grad = nn.value_and_grad(model, loss_fn)
    for _ in range(STEPS):
        _, gradients = loss_and_grad(model, *batch(4))
        optimizer.update(model, gradients)
        mx.eval(model.parameters(), optimizer.state)

    held_out = batch(4096)
    trained = model.parameters()
    last = loss_fn(model, *held_out).item()
    model.update(optimizer.ema_parameters())
    average = loss_fn(model, *held_out).item()
    model.update(trained)  # and training can go on
    print(f"held-out loss {last:.3f}, of the average {average:.3f} (1 is the noise)")
    return last, average


if __name__ == "__main__":
    main()
