"""Train in float16: a scaled loss, steps that skip infinities, and masters in float32.

    python examples/mixed_precision.py

Small gradients of float16 vanish, so `GradScaler` multiplies the loss and the step divides in its
kernel. A gradient that is infinite then skips the step and halves the scale; the first scale here
is too large, so that it happens. bfloat16 has float32's range and needs no scaler.
"""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn
import mlx_fused_optim as optim

STEPS = 60


def main() -> tuple[float, float, int]:
    """The first loss, the last, and how many steps were skipped."""
    mx.random.seed(0)
    model = nn.Sequential(nn.Linear(8, 64), nn.GELU(), nn.Linear(64, 1))
    model.set_dtype(mx.float16)
    x = mx.random.normal((64, 8)).astype(mx.float16)
    y = 100 * mx.sin(x.sum(axis=1, keepdims=True))

    optimizer = optim.AdamW(
        optim.warmup(optim.cosine_decay(1e-1, STEPS), 10),
        master_weights=True,
        skip_nonfinite=True,
        clip_norm=10.0,
    )
    scaler = optim.GradScaler()

    def scaled_loss(model: nn.Module, x: mx.array, y: mx.array) -> mx.array:
        error = (model(x) - y).astype(mx.float32)
        return scaler.scale(mx.mean(mx.square(error)))

    loss_and_grad = nn.value_and_grad(model, scaled_loss)
    losses = []
    for _ in range(STEPS):
        scaled, gradients = loss_and_grad(model, x, y)
        loss = scaled / scaler.state["scale"]
        scaler.step(optimizer, model, gradients)
        scaler.update()
        mx.eval(loss, model.parameters(), optimizer.state, scaler.state)
        losses.append(loss.item())

    skipped = optimizer.skipped.item()
    print(f"loss {losses[0]:.2f} to {losses[-1]:.2f}; {skipped} steps skipped, "
          f"{optimizer.step.item()} taken, scale {scaler.state['scale'].item():g}")  # fmt: skip
    return losses[0], losses[-1], skipped


if __name__ == "__main__":
    main()
