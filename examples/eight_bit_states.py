"""AdamW's moments in one byte each: what the state weighs, and what it does to the loss.

    python examples/eight_bit_states.py

The model is bfloat16. Its masters have 24 bits, of which the parameter is the first 16, and every
64 elements of a moment share a scale. Tensors of fewer than `min_8bit_size` elements, norms and
biases, keep float32 moments.
"""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn
import mlx_fused_optim as optim
from mlx.utils import tree_flatten

STEPS = 60
WAYS = {
    "float32 masters and moments": {"master_weights": True},
    "24-bit masters, 8-bit moments": {"master_weights": "24bit", "state_dtype": "8bit"},
}


def train(**options: object) -> tuple[float, float]:
    """Bytes of the state for a parameter, and the last loss."""
    mx.random.seed(0)
    model = nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 64))
    model.set_dtype(mx.bfloat16)
    x = mx.random.normal((256, 64)).astype(mx.bfloat16)
    y = mx.sin(3 * x)
    optimizer = optim.AdamW(optim.cosine_decay(3e-3, STEPS), bias_correction=True, **options)

    def loss_fn(model: nn.Module) -> mx.array:
        return mx.mean(mx.square((model(x) - y).astype(mx.float32)))

    loss_and_grad = nn.value_and_grad(model, loss_fn)
    for _ in range(STEPS):
        loss, gradients = loss_and_grad(model)
        optimizer.update(model, gradients)
        mx.eval(loss, model.parameters(), optimizer.state)
    count = sum(array.size for _, array in tree_flatten(model.parameters()))
    state = sum(array.nbytes for _, array in tree_flatten(optimizer.state))
    return state / count, loss.item()


def main() -> dict[str, tuple[float, float]]:
    results = {name: train(**options) for name, options in WAYS.items()}
    for name, (size, loss) in results.items():
        print(f"{name:30} {size:5.2f} bytes a parameter, loss {loss:.4f}")
    return results


if __name__ == "__main__":
    main()
