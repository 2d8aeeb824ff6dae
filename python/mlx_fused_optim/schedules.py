"""Learning-rate schedules that the kernel evaluates itself.

A schedule is a value: it prints itself, compares, pickles, and is a callable
``step -> learning rate`` like the schedules of ``mlx.optimizers``. It also has a
device form, a few numbers from which the fused step computes the rate at its
own step counter, with no host in between.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Mapping
from typing import Any, SupportsFloat, SupportsIndex

import mlx.core as mx

from . import _ext


class Schedule:
    """A learning rate as a function of the step, made by the functions below.

    Calling it evaluates the same code as the fused step, on the default device.

    Args:
        step (int or array): The step :math:`t`, 0 at the first update; an integer, or
            an array of integers of any shape. Negative steps count as 0, steps from
            :math:`2^{48}` on as :math:`2^{48} - 1`.

    Returns:
        array: The float32 learning rate, of the shape of ``step``.

    Example:
        >>> schedule = exponential_decay(1.0, 0.5)
        >>> schedule(3)
        array(0.125, dtype=float32)
        >>> schedule(mx.array([0, 1, 2]))
        array([1, 0.5, 0.25], dtype=float32)
        >>> schedule
        exponential_decay(1.0, 0.5)
        >>> schedule == exponential_decay(1.0, 0.5)
        True
    """

    __slots__ = ("_arguments", "_device", "_name")

    def __init__(self, name: str, arguments: Mapping[str, Any], device: _ext.Schedule):
        self._name = name
        self._arguments = dict(arguments)
        self._device = device

    def __call__(self, step: int | mx.array) -> mx.array:
        if not isinstance(step, mx.array):
            index = as_integer(self._name, "step", step, at_least=0)
            return self._device(mx.array(index, mx.uint64))
        if not mx.issubdtype(step.dtype, mx.integer):
            raise ValueError(
                f"[{self._name}] step must be an integer: got an array of {step.dtype}, "
                "allowed any integer dtype."
            )
        if mx.issubdtype(step.dtype, mx.signedinteger):
            step = mx.maximum(step, 0)
        return self._device(step)

    def __repr__(self) -> str:
        return f"{self._name}({', '.join(self._shown_arguments())})"

    def _shown_arguments(self) -> list[str]:
        """Required arguments by position, the others by name where not the default."""
        required, defaults = _SIGNATURES[self._name]
        shown = [repr(self._arguments[key]) for key in required]
        for key, default in defaults.items():
            if self._arguments[key] != default:
                shown.append(f"{key}={self._arguments[key]!r}")
        return shown

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Schedule):
            return NotImplemented
        return self._name == other._name and self._arguments == other._arguments

    def __hash__(self) -> int:
        return hash((self._name, tuple(self._arguments.items())))

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuild, (self._name, self._arguments)


# What repr leaves out: an argument that has its default.
_SIGNATURES: dict[str, tuple[tuple[str, ...], dict[str, Any]]] = {
    "exponential_decay": (
        ("init", "decay_rate"),
        {"transition_steps": 1, "transition_begin": 0, "staircase": False, "end": None},
    ),
}


def _rebuild(name: str, arguments: dict[str, Any]) -> Schedule:
    schedule: Schedule = globals()[name](**arguments)
    return schedule


def exponential_decay(
    init: float,
    decay_rate: float,
    *,
    transition_steps: int = 1,
    transition_begin: int = 0,
    staircase: bool = False,
    end: float | None = None,
) -> Schedule:
    r"""Exponential decay, exact at every step.

    .. math::

        \eta_t = \eta_0 \, r^{\max(t - B,\, 0) / T}

    With ``staircase`` the exponent is rounded down to a whole number. With ``end``
    the value is never below it where :math:`r < 1`, and never above it otherwise.

    The result is within 2 ulp (float32) of the float64 value for every step up to
    :math:`2^{32}`. ``mlx.optimizers.exponential_decay`` rounds the rate to float32
    first, which is 12 % off for ``exponential_decay(0.1, 0.999999)`` at step 1e7.

    Args:
        init (float): The value :math:`\eta_0` at step 0; finite, in float32's range.
        decay_rate (float): The factor :math:`r` over ``transition_steps``; above 0.
        transition_steps (int): The number of steps :math:`T`; at least 1. Default: ``1``.
        transition_begin (int): The step :math:`B` up to which the value stays
            ``init``; at least 0. Default: ``0``.
        staircase (bool): Decay only every ``transition_steps`` steps. Default: ``False``.
        end (float, optional): Bound of the decay. Default: none.

    Returns:
        Schedule: A callable from the step to a float32 array. Without ``end`` it has no
        last step: it tends to 0 (or, for :math:`r > 1`, to infinity).

    Raises:
        ValueError: An argument is out of range, or not finite.

    Reference: with two arguments ``mlx.optimizers.exponential_decay``; the keywords are
    those of ``optax.exponential_decay`` (``end_value`` there).

    Example:
        >>> schedule = exponential_decay(1.0, 0.5, transition_steps=2, end=0.25)
        >>> [schedule(t).item() for t in (0, 2, 4, 6)]
        [1.0, 0.5, 0.25, 0.25]
    """
    op = "exponential_decay"
    init = as_float32_range(op, "init", init)
    decay_rate = as_float(op, "decay_rate", decay_rate)
    if decay_rate <= 0:
        raise ValueError(f"[{op}] decay_rate must be positive: got {decay_rate}, allowed above 0.")
    transition_steps = as_integer(op, "transition_steps", transition_steps, at_least=1)
    transition_begin = as_integer(op, "transition_begin", transition_begin, at_least=0)
    end = None if end is None else as_float32_range(op, "end", end)
    staircase = bool(staircase)
    device = _ext.exponential_decay(
        init, decay_rate, transition_steps, transition_begin, staircase, end
    )
    arguments = {
        "init": init,
        "decay_rate": decay_rate,
        "transition_steps": transition_steps,
        "transition_begin": transition_begin,
        "staircase": staircase,
        "end": end,
    }
    return Schedule(op, arguments, device)


# ---- Checks of arguments -----------------------------------------------------

_LARGEST_FLOAT32 = 3.4028234663852886e38
_LARGEST_UINT64 = 2**64 - 1


def as_float(op: str, name: str, value: SupportsFloat) -> float:
    """A finite float, or an error that names the argument."""
    try:
        number = float(value)
    except (TypeError, ValueError):
        raise TypeError(
            f"[{op}] {name} must be a number: got {type(value).__name__}, allowed a float."
        ) from None
    if not math.isfinite(number):
        raise ValueError(f"[{op}] {name} must be finite: got {number}, allowed a finite float.")
    return number


def as_float32_range(op: str, name: str, value: SupportsFloat) -> float:
    number = as_float(op, name, value)
    if abs(number) > _LARGEST_FLOAT32:
        raise ValueError(
            f"[{op}] {name} is too large for float32: got {number}, "
            f"allowed up to {_LARGEST_FLOAT32}."
        )
    return number


def as_integer(op: str, name: str, value: SupportsIndex, *, at_least: int) -> int:
    try:
        number = operator.index(value)
    except TypeError:
        raise TypeError(
            f"[{op}] {name} must be an integer: got {type(value).__name__}, allowed an int."
        ) from None
    if not at_least <= number <= _LARGEST_UINT64:
        raise ValueError(
            f"[{op}] {name} is out of range: got {number}, allowed {at_least} to {_LARGEST_UINT64}."
        )
    return number
