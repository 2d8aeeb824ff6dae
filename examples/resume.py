"""Stop in the middle of a run, and go on from files as if nothing had happened, to the bit.

    python examples/resume.py

Model, optimizer and the random numbers are what a run is made of. The state has the step, so that
schedules go on where they were; options are not in it: make the optimizer as it was made.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import mlx_fused_optim as optim
from mlx.utils import tree_flatten, tree_unflatten

STEPS = 20


def make() -> tuple[nn.Module, optim.AdamW]:
    mx.random.seed(0)
    model = nn.Sequential(nn.Linear(8, 32), nn.Tanh(), nn.Linear(32, 1))
    schedule = optim.warmup(optim.cosine_decay(1e-2, STEPS), 5)
    return model, optim.AdamW(schedule, bias_correction=True, clip_norm=1.0, ema_decay=0.9)


def train(model: nn.Module, optimizer: optim.AdamW, steps: range) -> None:
    def loss_fn(model: nn.Module, x: mx.array) -> mx.array:
        return mx.mean(mx.square(model(x) - mx.sin(x.sum(axis=1, keepdims=True))))

    loss_and_grad = nn.value_and_grad(model, loss_fn)
    for step in steps:
        x = mx.random.normal((32, 8), key=mx.random.key(step))  # a step has its own numbers
        _, gradients = loss_and_grad(model, x)
        optimizer.update(model, gradients)
        mx.eval(model.parameters(), optimizer.state)


def save(folder: Path, model: nn.Module, optimizer: optim.AdamW) -> None:
    model.save_weights(str(folder / "model.safetensors"))
    state = dict(tree_flatten(optimizer.state))
    mx.save_safetensors(str(folder / "optimizer.safetensors"), state)


def load(folder: Path, model: nn.Module, optimizer: optim.AdamW) -> int:
    model.load_weights(str(folder / "model.safetensors"))
    state = mx.load(str(folder / "optimizer.safetensors"))
    optimizer.state = tree_unflatten(list(state.items()))
    return optimizer.step.item()


def main() -> bool:
    """Whether the run that was interrupted has the weights and the average of the other."""
    model, optimizer = make()
    train(model, optimizer, range(STEPS))
    whole = model, optimizer.ema_parameters()
    with tempfile.TemporaryDirectory() as name:
        model, optimizer = make()
        train(model, optimizer, range(STEPS // 2))
        save(Path(name), model, optimizer)
        model, optimizer = make()  # as in another process
        first = load(Path(name), model, optimizer)
        train(model, optimizer, range(first, STEPS))
    resumed = model, optimizer.ema_parameters()
    trees = [[(m.parameters(), average)] for m, average in (whole, resumed)]
    pairs = zip(*(tree_flatten(tree) for tree in trees), strict=True)
    equal = all(mx.array_equal(a, b).item() for (_, a), (_, b) in pairs)
    print(f"Resumed at step {first}: {'the same bits' if equal else 'other bits'} at {STEPS}")
    return equal


if __name__ == "__main__":
    main()
