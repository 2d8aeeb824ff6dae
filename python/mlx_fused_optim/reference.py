"""The fused step in plain MLX operations: the maths to read, and an oracle for tests.

It is slow, allocates freely and keeps momentum as one array a tensor; apart from that
it gives the fused step's results, bit for bit on one device.
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx
from mlx.utils import tree_map


def sgd_init(parameters: Any) -> Any:
    """Momentum before the first step: zeros, in each parameter's shape and dtype.

    Example:
        >>> sgd_init({"w": mx.ones(2)})
        {'w': array([0, 0], dtype=float32)}
    """
    return tree_map(mx.zeros_like, parameters)


def sgd_step(
    parameters: Any,
    gradients: Any,
    velocities: Any,
    *,
    learning_rate: float | mx.array,
    momentum: float = 0.0,
    weight_decay: float = 0.0,
    dampening: float = 0.0,
    nesterov: bool = False,
) -> tuple[Any, Any]:
    """One step for each tensor of the trees: (parameters, velocities).

    All arithmetic is float32, in the order of ``mlx.optimizers.SGD``; each result is
    rounded once, to the parameter's dtype. The velocity that enters the update is the one
    before that rounding.

    Example:
        >>> w, v = sgd_step(mx.array(1.0), mx.array(2.0), mx.array(0.0), learning_rate=0.25)
        >>> w
        array(0.5, dtype=float32)
    """
    rate = mx.array(learning_rate, mx.float32)

    def one(
        parameter: mx.array, gradient: mx.array, velocity: mx.array
    ) -> tuple[mx.array, mx.array]:
        w, g, v = (a.astype(mx.float32) for a in (parameter, gradient, velocity))
        if weight_decay != 0:
            g = g + weight_decay * w
        update = g
        if momentum != 0:
            v = momentum * v + (1 - dampening) * g
            update = g + momentum * v if nesterov else v
        w = w - rate * update
        return w.astype(parameter.dtype), v.astype(parameter.dtype)

    pairs = tree_map(one, parameters, gradients, velocities)

    def is_pair(node: Any) -> bool:
        return isinstance(node, tuple) and len(node) == 2 and isinstance(node[0], mx.array)

    first = tree_map(lambda pair: pair[0], pairs, is_leaf=is_pair)
    second = tree_map(lambda pair: pair[1], pairs, is_leaf=is_pair)
    return first, second
