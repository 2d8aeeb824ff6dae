"""One step, shared by the optimizer and the function: checks, then the kernel."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import mlx.core as mx

from . import _ext, _packing
from .schedules import Schedule

LearningRate = float | mx.array | Schedule | Callable[[mx.array], mx.array]


class Hyperparameters(NamedTuple):
    """The options of SGD that are constants of a step."""

    momentum: float
    weight_decay: float
    dampening: float
    nesterov: bool


def checked_hyperparameters(
    op: str, momentum: float, weight_decay: float, dampening: float, nesterov: bool
) -> Hyperparameters:
    """The options as floats, or ValueError where they make no sense."""
    limits = {"momentum": math.inf, "weight_decay": math.inf, "dampening": 1.0}
    values = {"momentum": momentum, "weight_decay": weight_decay, "dampening": dampening}
    for name, value in values.items():
        if not isinstance(value, (int, float)) and not hasattr(value, "__float__"):
            raise TypeError(
                f"[{op}] {name} must be a number: got {type(value).__name__}, allowed a float."
            )
        number = values[name] = float(value)
        if not 0 <= number <= limits[name] or math.isinf(number):
            allowed = "0 to 1" if name == "dampening" else "0 or more, finite"
            raise ValueError(f"[{op}] {name} is out of range: got {number}, allowed {allowed}.")
    if nesterov and (values["momentum"] == 0 or values["dampening"] != 0):
        raise ValueError(
            f"[{op}] nesterov requires a momentum and zero dampening: got "
            f"momentum={values['momentum']}, dampening={values['dampening']}, "
            "allowed momentum above 0 and dampening 0."
        )
    return Hyperparameters(**values, nesterov=bool(nesterov))


def checked_rate(op: str, rate: Any) -> mx.array:
    """A learning rate that is not a schedule, as a scalar array."""
    if not isinstance(rate, mx.array):
        try:
            number = float(rate)
        except (TypeError, ValueError):
            raise TypeError(
                f"[{op}] learning_rate must be a scalar: got {type(rate).__name__}, allowed a "
                "float, a scalar array, a schedule or a callable."
            ) from None
        if not number >= 0 or math.isinf(number):
            raise ValueError(
                f"[{op}] learning_rate is out of range: got {number}, allowed 0 or more, finite."
            )
        return mx.array(rate if isinstance(rate, (int, float)) else number)
    if rate.ndim != 0:
        raise ValueError(
            f"[{op}] learning_rate must be a scalar: got an array of shape {rate.shape}, "
            "allowed shape ()."
        )
    if not mx.issubdtype(rate.dtype, mx.floating) and not mx.issubdtype(rate.dtype, mx.integer):
        raise ValueError(
            f"[{op}] learning_rate must be a real number: got {rate.dtype}, "
            "allowed a floating or integer dtype."
        )
    return rate


def take_step(
    op: str,
    tree: _ext.Tree,
    state: _packing.State,
    learning_rate: mx.array | Schedule,
    hyper: Hyperparameters,
    stream: Any,
) -> tuple[Any, _packing.State]:
    """The updated tree of parameters and the next state; ``state`` is left as it is."""
    layout = _packing.layout_of(tree)
    arenas: list[mx.array] = []
    if hyper.momentum != 0 and len(tree) > 0:
        state = _packing.packed(state, tree, op)
        arenas = _packing.momentum_arenas(state, tree) or []
    rate = learning_rate._device if isinstance(learning_rate, Schedule) else learning_rate
    parameters, arenas, step, used = _ext.sgd_step(
        tree,
        layout,
        arenas,
        state["step"],
        learning_rate=rate,
        momentum=hyper.momentum,
        weight_decay=hyper.weight_decay,
        dampening=hyper.dampening,
        has_momentum=hyper.momentum != 0,
        nesterov=hyper.nesterov,
        has_weight_decay=hyper.weight_decay != 0,
        stream=stream,
    )
    if arenas:
        state = _packing.with_momentum(state, arenas, tree)
    if isinstance(learning_rate, Schedule):
        learning_rate = _ext.arena_view(used, [], 0, stream=stream)
    return parameters, {**state, "step": step, "learning_rate": learning_rate}
