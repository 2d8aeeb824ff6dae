"""The fused step in plain MLX operations: the maths to read, and an oracle for tests.

It is slow, allocates freely and keeps momentum as one array a tensor; apart from that
it gives the fused step's results, bit for bit on one device (norms but for their last
bits). ``sgd_step`` is the plain step, ``full_sgd_step`` the one with every option.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten, tree_map, tree_unflatten


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


def full_sgd_init(parameters: Any) -> dict[str, Any]:
    """What a full step keeps, before the first one: nothing yet.

    Example:
        >>> full_sgd_init({"w": mx.ones(2)})["step"]
        array(0, dtype=uint64)
    """
    return {
        "step": mx.array(0, mx.uint64),
        "skipped": mx.array(0, mx.uint64),
        "grad_norm": mx.array(0.0),
        "tensors": {path: {} for path, _ in _leaves(parameters)},
    }


def full_sgd_step(
    parameters: Any,
    gradients: Any,
    state: dict[str, Any],
    *,
    learning_rate: float,
    momentum: float = 0.0,
    weight_decay: float = 0.0,
    dampening: float = 0.0,
    nesterov: bool = False,
    momentum_dtype: mx.Dtype | None = None,
    master_weights: bool = False,
    compensated: bool = False,
    clip_norm: float | None = None,
    clip_value: float | None = None,
    grad_scale: float | mx.array = 1.0,
    skip_nonfinite: bool = False,
    decoupled: bool = False,
    maximize: bool = False,
    groups: Sequence[tuple[Callable[[str, mx.array], Any], dict[str, Any]]] = (),
    trust_coefficient: float | None = None,
    ema_decay: float | None = None,
) -> tuple[Any, dict[str, Any]]:
    """One step with the options of :class:`SGD`, rounded to nearest: (parameters, state).

    What is kept of a tensor is ``state["tensors"][path]``, a dict of ``"momentum"``,
    ``"master"``, ``"compensation"`` and ``"ema"``. Norms may differ from the fused step's in
    the last bits, because their sums are added in another order.

    Example:
        >>> w = {"w": mx.array([3.0, 4.0])}
        >>> w, state = full_sgd_step(w, w, full_sgd_init(w), learning_rate=1.0, clip_norm=2.5)
        >>> w["w"], state["grad_norm"]
        (array([1.5, 2], dtype=float32), array(5, dtype=float32))
    """
    old = dict(_leaves(parameters))
    raw = {path: gradient.astype(mx.float32) for path, gradient in _leaves(gradients)}

    # The gradient that is measured: unscaled, then clipped by value.
    scale = mx.array(grad_scale, mx.float32)
    inverts = (scale >= 2.0**-126) & mx.isfinite(scale)
    unscale = mx.where(inverts, 1 / scale, math.nan)
    g = {path: (-x if maximize else x) * unscale for path, x in raw.items()}
    finite = [mx.all(mx.isfinite(x)) for x in g.values()]
    if clip_value is not None:
        g = {path: mx.clip(x, -clip_value, clip_value) for path, x in g.items()}
    norms = {path: _norm(x.reshape(-1)) for path, x in g.items()}
    norm = _norm(mx.stack(list(norms.values()))) if norms else mx.array(0.0)
    applies = mx.array(True)
    if skip_nonfinite:
        applies = mx.all(mx.stack([*finite, mx.isfinite(norm) | (clip_norm in (None, math.inf))]))
    factor = mx.array(1.0)
    if clip_norm not in (None, math.inf):
        factor = clip_norm / (norm + 1e-6)
        factor = mx.where(factor > 1, 1.0, factor)

    new, tensors = {}, {}
    for path, parameter in old.items():
        own: dict[str, Any] = {
            "learning_rate": learning_rate,
            "momentum": momentum,
            "weight_decay": weight_decay,
            "trust_coefficient": trust_coefficient,
        }
        for predicate, overrides in groups:
            if predicate(path, parameter):
                own.update(overrides)
                own["learning_rate"] *= own.pop("learning_rate_factor", 1.0)
                break
        rate, mu, decay, trust = own.values()
        kept = state["tensors"][path]
        is_half = parameter.dtype != mx.float32

        w = parameter.astype(mx.float32)
        if master_weights and is_half:
            # A parameter that is not its master's rounding was set by somebody else.
            master = kept.get("master", w)
            w = mx.where(master.astype(parameter.dtype) == parameter, master, w)
        x = g[path] * factor
        if trust is not None:
            norm_w = _norm(parameter.astype(mx.float32).reshape(-1))
            norm_g = norms[path] * factor
            ratio = trust * norm_w / (norm_g + (0.0 if decoupled else decay) * norm_w)
            ratio = mx.where((norm_g > 0) & (norm_w > 0) & mx.isfinite(ratio), ratio, 1.0)
        if decay != 0 and not decoupled:
            x = x + decay * w
        if trust is not None:
            x = ratio * x
        update = x
        after = dict(kept)
        if mu != 0:
            v = kept.get("momentum", mx.zeros_like(w)).astype(mx.float32)
            v = mu * v + (1 - dampening) * x
            update = x + mu * v if nesterov else v
            after["momentum"] = v.astype(momentum_dtype or parameter.dtype)
        if decay != 0 and decoupled:
            update = update + decay * w

        exact = w - rate * update
        if compensated and is_half:
            # Kahan: the part that the last rounding lost joins this update.
            lost = kept.get("compensation", mx.zeros_like(w)).astype(mx.float32)
            change = lost - rate * update
            exact = w + change
            rounded = exact.astype(parameter.dtype).astype(mx.float32)
            after["compensation"] = (change - (rounded - w)).astype(parameter.dtype)
        elif master_weights and is_half:
            after["master"] = exact
        else:
            exact = exact.astype(parameter.dtype).astype(mx.float32)
        if ema_decay is not None:
            average = kept.get("ema", w)
            after["ema"] = average + (1 - ema_decay) * (exact - average)
        # A skipped step leaves everything as it was; what had not begun begins.
        begun = {"master": w, "ema": w}
        new[path] = mx.where(applies, exact.astype(parameter.dtype), parameter)
        tensors[path] = {
            slot: mx.where(applies, value, kept.get(slot, begun.get(slot, mx.zeros_like(value))))
            for slot, value in after.items()
        }
    counted = applies.astype(mx.uint64)
    next_state = {
        "step": state["step"] + counted,
        "skipped": state["skipped"] + 1 - counted,
        "grad_norm": norm,
        "tensors": tensors,
    }
    return _unflattened(new), next_state


def _norm(x: mx.array) -> mx.array:
    """Of a vector, divided by its largest magnitude: no square overflows or vanishes."""
    peak = mx.max(mx.abs(x)) if x.size else mx.array(0.0)
    divisor = mx.where((peak > 0) & mx.isfinite(peak), peak, 1.0)
    return divisor * mx.sqrt(mx.sum(mx.square(x / divisor)))


def _leaves(tree: Any) -> list[tuple[str, mx.array]]:
    leaves: Any = tree_flatten(tree)
    return [(path, leaf) for path, leaf in leaves if isinstance(leaf, mx.array)]


def _unflattened(flat: dict[str, mx.array]) -> Any:
    return flat[""] if list(flat) == [""] else tree_unflatten(list(flat.items()))
