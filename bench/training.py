"""The optimizer's share of a training step: gradients come lazily, from a backward pass."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

import mlx.core as mx
import mlx.optimizers
import mlx_fused_optim
from mlx.utils import tree_flatten, tree_unflatten
from peers import Options, mlx_optimizer, values
from shapes import LORA_TRAINING, Work

# Name -> the package of the optimizer (None: gradients alone) and whether it is compiled.
CANDIDATES: dict[str, tuple[Any, bool]] = {
    "gradients alone": (None, False),
    "gradients alone compiled": (None, True),
    "ours": (mlx_fused_optim, False),
    "ours compiled": (mlx_fused_optim, True),
    "mlx": (mlx.optimizers, False),
    "mlx compiled": (mlx.optimizers, True),
}


def add_shares(times: dict) -> None:
    """What the optimizer adds to the gradients (ms): eager to eager, compiled to compiled, and
    turn by turn, as a host's speed changes more in a run than an optimizer takes."""
    for name, time in times.items():
        module, compiled = CANDIDATES[name]
        if module is None:
            continue
        alone = times["gradients alone compiled" if compiled else "gradients alone"]
        differences = [a - b for a, b in zip(time["turns_ms"], alone["turns_ms"], strict=True)]
        low, median, high = statistics.quantiles(differences, n=4)
        time["share"] = {"median_ms": median, "low_ms": low, "high_ms": high}


class Training:
    """Training of some parameters, all in one ``mx.eval`` a step."""

    def __init__(
        self,
        parameters: Any,
        loss: Callable[[Any], mx.array],
        optimizer: mlx.optimizers.Optimizer | None,
        compiled: bool,
    ):
        self.parameters, self.optimizer, self.state = parameters, optimizer, {}
        if optimizer is not None:
            optimizer.init(parameters)
            self.state = optimizer.state
        self.value_and_grad = mx.value_and_grad(loss)
        self.run = self._run
        if compiled:
            self.run = mx.compile(self._run, inputs=self.state, outputs=self.state)
        mx.eval(self.parameters, self.state)

    def _run(self, parameters: Any) -> tuple[mx.array, Any]:
        loss, gradients = self.value_and_grad(parameters)
        if self.optimizer is None:
            return loss, gradients
        return loss, self.optimizer.apply_gradients(gradients, parameters)

    def step(self) -> None:
        if self.optimizer is None:
            mx.eval(self.run(self.parameters))
        else:
            loss, self.parameters = self.run(self.parameters)
            mx.eval(loss, self.parameters, self.state)


def lora_work(quick: bool, device: str) -> tuple[Work, int]:
    """192 linear layers with adapters of rank 8, and the rows of a batch.

    Narrow on a CPU, where the products would else hide everything else.
    """
    layers = 8 if quick else 192
    width, rows = (512, 256) if device == "gpu" else (64, 16)
    parameters = tuple(
        row
        for i in range(layers)
        for row in ((f"layers.{i}.lora_a", (width, 8)), (f"layers.{i}.lora_b", (8, width)))
    )
    title = f"LoRA training step, {2 * layers} tensors of width {width} and rank 8, {rows} rows"
    return Work(LORA_TRAINING, title, parameters), rows


def lora_loss(work: Work, rows: int, dtype: mx.Dtype) -> Callable[[Any], mx.array]:
    """A residual chain of frozen linear layers with adapters."""
    layers, width = len(work.parameters) // 2, work.parameters[0][1][0]
    mx.random.seed(0)
    frozen = [(mx.random.normal((width, width)) / width).astype(dtype) for _ in range(layers)]
    x = mx.random.normal((rows, width)).astype(dtype)
    y = mx.random.normal((rows, width)).astype(dtype)
    mx.eval(frozen, x, y)

    def loss(parameters: Any) -> mx.array:
        h = x
        for weight, adapter in zip(frozen, parameters["layers"], strict=True):
            h = h + h @ weight + (h @ adapter["lora_a"]) @ adapter["lora_b"]
        return mx.mean(mx.square(h - y))

    return loss


def quadratic_loss(parameters: Any) -> mx.array:
    """The cheapest loss with a gradient for every tensor: what remains is the optimizer."""
    return sum(1e-3 * mx.sum(mx.square(array)) for _, array in tree_flatten(parameters))


def candidates(
    work: Work, options: Options, loss: Callable[[Any], mx.array]
) -> dict[str, Training]:
    dtype = getattr(mx, options.dtype)
    made = {}
    for name, (module, compiled) in CANDIDATES.items():
        arrays = [(0.01 * mx.array(a)).astype(dtype) for a in values(work, 1)]
        names = [name for name, _ in work.parameters]
        parameters = tree_unflatten(list(zip(names, arrays, strict=True)))
        optimizer = None if module is None else mlx_optimizer(module, options)
        made[name] = Training(parameters, loss, optimizer, compiled)
    return made
