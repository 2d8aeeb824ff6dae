"""One step, shared by the optimizer and the function: checks, then the kernel."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import mlx.core as mx

from . import _ext, _packing
from .schedules import Schedule
from .schedules._checks import LARGEST_FLOAT32

Scheduled = Schedule | Callable[[mx.array], Any]
LearningRate = float | mx.array | Scheduled
Hyperparameter = float | Scheduled


class Hyperparameters(NamedTuple):
    """The options of SGD besides the learning rate. A scheduled one counts as present
    even where its value is 0: what a step consists of does not change from step to step."""

    momentum: Hyperparameter
    weight_decay: Hyperparameter
    dampening: float
    nesterov: bool

    @property
    def has_momentum(self) -> bool:
        return self.momentum != 0

    @property
    def has_weight_decay(self) -> bool:
        return self.weight_decay != 0


def _as_float(value: Any) -> float | None:
    """A number as a float; None for what is not one, text and truth values included."""
    if isinstance(value, (bool, str, bytes)):
        return None
    try:
        return float(value)
    except OverflowError:  # an integer beyond float64
        return math.inf
    except (TypeError, ValueError):
        return None


def checked_hyperparameters(
    op: str,
    momentum: Hyperparameter,
    weight_decay: Hyperparameter,
    dampening: float,
    nesterov: bool,
) -> Hyperparameters:
    """The options as floats or schedules, or ValueError where they make no sense."""
    hyper = Hyperparameters(
        momentum if callable(momentum) else _checked_factor(op, "momentum", momentum),
        weight_decay
        if callable(weight_decay)
        else _checked_factor(op, "weight_decay", weight_decay),
        _checked_factor(op, "dampening", dampening, at_most=1.0),
        bool(nesterov),
    )
    if nesterov and (not hyper.has_momentum or hyper.dampening != 0):
        raise ValueError(
            f"[{op}] nesterov requires a momentum and zero dampening: got "
            f"momentum={hyper.momentum}, dampening={hyper.dampening}, "
            "allowed momentum above 0 and dampening 0."
        )
    return hyper


def _checked_factor(op: str, name: str, value: Any, at_most: float = LARGEST_FLOAT32) -> float:
    number = _as_float(value)
    if number is None:
        allowed = "a float" if name == "dampening" else "a float, a schedule or a callable"
        raise TypeError(
            f"[{op}] {name} must be a number: got {type(value).__name__}, allowed {allowed}."
        )
    if not 0 <= number <= at_most:
        raise ValueError(
            f"[{op}] {name} is out of range: got {number}, allowed 0 to {at_most:g}, finite."
        )
    return number


def checked_scalar(op: str, name: str, value: Any) -> mx.array:
    """A hyperparameter that is not a schedule, as a scalar array."""
    if not isinstance(value, mx.array):
        number = _as_float(value)
        if number is None:
            raise TypeError(
                f"[{op}] {name} must be a scalar: got {type(value).__name__}, allowed a "
                "float, a scalar array, a schedule or a callable."
            )
        if not 0 <= number <= LARGEST_FLOAT32:
            raise ValueError(
                f"[{op}] {name} is out of range: got {number}, allowed 0 to "
                f"{LARGEST_FLOAT32:g}, finite."
            )
        return mx.array(number)
    if value.ndim != 0:
        raise ValueError(
            f"[{op}] {name} must be a scalar: got an array of shape {value.shape}, "
            "allowed shape ()."
        )
    if not mx.issubdtype(value.dtype, mx.floating) and not mx.issubdtype(value.dtype, mx.integer):
        raise ValueError(
            f"[{op}] {name} must be a real number: got {value.dtype}, "
            "allowed a floating or integer dtype."
        )
    return value


def take_step(
    op: str,
    tree: _ext.Tree,
    state: _packing.State,
    learning_rate: LearningRate,
    hyper: Hyperparameters,
    stream: Any,
) -> tuple[Any, _packing.State, dict[str, mx.array]]:
    """The updated tree of parameters, the next state, and the values of this step of the
    hyperparameters that are scheduled; ``state`` is left as it is.

    The kernel evaluates schedules that it can; other callables are called with the step.
    """
    options: dict[str, Any] = {
        "learning_rate": learning_rate,
        "momentum": hyper.momentum,
        "weight_decay": hyper.weight_decay,
    }
    scheduled: dict[str, mx.array] = {}
    in_kernel = []
    for position, (name, value) in enumerate(options.items()):
        if isinstance(value, Schedule) and value.in_kernel:
            options[name] = value._device
            in_kernel.append((name, position))
        elif callable(value):
            options[name] = scheduled[name] = checked_scalar(op, name, value(state["step"]))

    layout = _packing.layout_of(tree)
    arenas: list[mx.array] = []
    if hyper.has_momentum and len(tree) > 0:
        state = _packing.packed(state, tree, op)
        arenas = _packing.momentum_arenas(state, tree, op) or []
    flags = _ext.FLAGS
    parameters, slots, step, used, _, _ = _ext.sgd_step(
        tree,
        layout,
        [arenas, [], [], []],
        state["step"],
        **options,
        grad_scale=1.0,
        dampening=hyper.dampening,
        flags=hyper.has_momentum * flags["momentum"]
        | hyper.nesterov * flags["nesterov"]
        | hyper.has_weight_decay * flags["weight_decay"],
        clip_value=0.0,
        clip_norm=0.0,
        trust_coefficient=0.0,
        ema_decay=0.0,
        seed=0,
        momentum_dtype=None,
        groups=None,
        group_numbers=None,
        skipped=None,
        stream=stream,
    )
    arenas = slots[0]
    if arenas:
        state = _packing.with_momentum(state, arenas, tree)
    for name, position in in_kernel:
        scheduled[name] = _ext.arena_view(used, [], position, stream=stream)
    rate = scheduled.pop("learning_rate", options["learning_rate"])
    return parameters, {**state, "step": step, "learning_rate": rate}, scheduled
