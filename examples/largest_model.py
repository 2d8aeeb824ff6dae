"""The largest model that trains in a given memory, with AdamW kept wide and kept small.

    python examples/largest_model.py [MEMORY_IN_MIB]

The model is a stack of square layers in bfloat16. A layer is added as long as a training step
(loss, gradients, update) of the model needs no more memory than is given, by MLX's own count
of its peak. Wide: masters and both moments in float32, 16 bytes a parameter with its gradient.
Small: masters of 24 bits and moments of 8, about 7. Both need 2 more in the first step, which
brings the parameters into arenas.
"""

from __future__ import annotations

import sys

import mlx.core as mx
import mlx.nn as nn
import mlx_fused_optim as optim

WIDTH = 512
WAYS = {
    "float32 masters and moments": {"master_weights": True},
    "24-bit masters, 8-bit moments": {"master_weights": "24bit", "state_dtype": "8bit"},
}


def peak_of_training(layers: int, **options: object) -> int:
    """Bytes at most while three steps are taken; what somebody else holds is not counted."""
    mx.clear_cache()
    before = mx.get_active_memory()
    model = nn.Sequential(*(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(layers)))
    model.set_dtype(mx.bfloat16)
    optimizer = optim.AdamW(1e-4, bias_correction=True, **options)
    x = mx.ones((8, WIDTH), mx.bfloat16)
    loss_and_gradients = nn.value_and_grad(model, lambda m: m(x).square().mean())
    optimizer.init(model.trainable_parameters())
    mx.eval(model.parameters(), optimizer.state)
    mx.reset_peak_memory()
    for _ in range(3):
        loss, gradients = loss_and_gradients(model)
        mx.eval(loss, gradients)  # then nothing but the step holds the old parameters
        optimizer.update(model, gradients)
        del gradients
        mx.eval(model.parameters(), optimizer.state)
    return mx.get_peak_memory() - before


def largest(memory: int, **options: object) -> int:
    """Layers of the largest model whose training fits, by bisection."""
    fits, fails = 0, 1
    while peak_of_training(fails, **options) <= memory:
        fits, fails = fails, 2 * fails
    while fails - fits > 1:
        middle = (fits + fails) // 2
        if peak_of_training(middle, **options) <= memory:
            fits = middle
        else:
            fails = middle
    return fits


def main(mib: int = 64) -> dict[str, int]:
    parameters = {}
    for name, options in WAYS.items():
        parameters[name] = largest(mib << 20, **options) * WIDTH * WIDTH
        print(f"{name:30} {parameters[name] / 1e6:6.1f}M parameters in {mib} MiB")
    return parameters


if __name__ == "__main__":
    main(*map(int, sys.argv[1:2]))
