"""Checks of numbers that a step is given: each returns the value in one type, or raises."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from typing import Any

import mlx.core as mx

from .schedules import Schedule
from .schedules._checks import LARGEST_FLOAT32

Scheduled = Schedule | Callable[[mx.array], Any]
LearningRate = float | mx.array | Scheduled
Hyperparameter = float | Scheduled

SMALLEST_FLOAT32 = 2.0**-149


def least_of(name: str) -> float:
    """The least value of a number of the step. A learning rate below 0 climbs, a weight decay
    below 0 grows, as in mlx.optimizers."""
    return 0.0 if name.startswith(("momentum", "grad_scale")) else -LARGEST_FLOAT32


def as_float(value: Any) -> float | None:
    """A number as a float; None for what is not one, text and truth values included."""
    if isinstance(value, (bool, str, bytes)):
        return None
    try:
        return float(value)
    except OverflowError:  # an integer beyond float64: in no range, and not infinite
        return sys.float_info.max if value > 0 else -sys.float_info.max
    except (TypeError, ValueError):
        return None


def checked_number(op: str, name: str, value: Any, allowed: str = "a float") -> float:
    number = as_float(value)
    if number is None:
        raise TypeError(
            f"[{op}] {name} must be a number: got {type(value).__name__}, allowed {allowed}."
        )
    return number


def checked_factor(
    op: str,
    name: str,
    value: Any,
    allowed: str = "a float, a schedule or a callable",
    at_least: float = 0.0,
    at_most: float = LARGEST_FLOAT32,
) -> float:
    """A float from 0 on, or from a smaller number."""
    number = checked_number(op, name, value, allowed)
    if not at_least <= number <= at_most:
        raise ValueError(
            f"[{op}] {name} is out of range: got {number}, allowed {at_least:g} to {at_most:g}, "
            "finite."
        )
    return number


def checked_positive(
    op: str, name: str, value: Any, infinite: bool = False, at_least: float = SMALLEST_FLOAT32
) -> float:
    """A float above 0 that float32 has too; ``infinite`` allows infinity."""
    number = checked_number(op, name, value)
    if not (at_least <= number <= LARGEST_FLOAT32 or (infinite and number == math.inf)):
        also = ", or inf" if infinite else ", finite"
        raise ValueError(
            f"[{op}] {name} is out of range: got {number}, allowed {at_least:.3g} to "
            f"{LARGEST_FLOAT32:g}{also}."
        )
    return number


def checked_flag(op: str, name: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise TypeError(
            f"[{op}] {name} must be a truth value: got {type(value).__name__}, allowed True or "
            "False."
        )
    return value


def checked_choice(op: str, name: str, value: Any) -> bool:
    """A truth value, or None or a number that is one, as mlx.optimizers takes them."""
    if isinstance(value, (int, float, type(None))) and value in (None, 0, 1):
        value = bool(value)
    return checked_flag(op, name, value)


def checked_scalar(op: str, name: str, value: Any) -> mx.array:
    """A hyperparameter that is not a schedule, as a scalar array."""
    if not isinstance(value, mx.array):
        if as_float(value) is None:
            raise TypeError(
                f"[{op}] {name} must be a scalar: got {type(value).__name__}, allowed a "
                "float, a scalar array, a schedule or a callable."
            )
        return mx.array(checked_factor(op, name, value, at_least=least_of(name)))
    if value.size != 1:
        raise ValueError(
            f"[{op}] {name} must be a scalar: got an array of shape {value.shape}, "
            "allowed one element."
        )
    if not mx.issubdtype(value.dtype, mx.floating) and not mx.issubdtype(value.dtype, mx.integer):
        raise ValueError(
            f"[{op}] {name} must be a real number: got {value.dtype}, "
            "allowed a floating or integer dtype."
        )
    return value if value.ndim == 0 else value.reshape(())
