"""No weight decay for norms and biases, a larger rate for a new head: one step, one kernel.

    python examples/parameter_groups.py

A group is a predicate of a parameter's path and array, and the numbers that differ. The first
group that takes a parameter has it, so the special ones come first.
"""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn
import mlx_fused_optim as optim
from mlx.utils import tree_flatten, tree_map


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(8, 32), nn.LayerNorm(32), nn.ReLU())
        self.head = nn.Linear(32, 1)

    def __call__(self, x: mx.array) -> mx.array:
        return self.head(self.body(x))


def main() -> dict[str, float]:
    """How far each parameter has moved in a step without a gradient: its weight decay alone."""
    model = Model()
    model.body.layers[1].weight = 2 * mx.ones(32)
    optimizer = optim.AdamW(
        learning_rate=0.1,
        weight_decay=0.1,
        groups=[
            (lambda path, array: array.ndim < 2, {"weight_decay": 0.0}),
            (lambda path, array: path.startswith("head"), {"learning_rate_factor": 10.0}),
        ],
    )
    before = dict(tree_flatten(model.trainable_parameters()))
    zeros = tree_map(mx.zeros_like, model.trainable_parameters())
    optimizer.update(model, zeros)
    mx.eval(model.parameters(), optimizer.state)
    after = dict(tree_flatten(model.trainable_parameters()))
    moved = {}
    for name, array in before.items():
        size = mx.maximum(mx.abs(array).sum(), 1e-6)
        moved[name] = (mx.abs(array - after[name]).sum() / size).item()
        print(f"{name:20} shrank by {moved[name]:.1%}")
    return moved


if __name__ == "__main__":
    main()
