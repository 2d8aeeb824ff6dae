"""Checks of arguments: each returns the value in one type, or says what is wrong."""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, SupportsFloat

LARGEST_FLOAT32 = 3.4028234663852886e38
LARGEST_UINT64 = 2**64 - 1
# Sums of a few lengths must not pass 64 bits.
LARGEST_LENGTH = 2**60
_IN_WORDS = {LARGEST_LENGTH: "2**60", LARGEST_UINT64: "2**64 - 1"}


def as_float(op: str, name: str, value: SupportsFloat) -> float:
    """A finite float in float32's range."""
    try:
        if isinstance(value, (bool, str, bytes)):
            raise TypeError
        number = float(value)
    except OverflowError:  # an integer beyond float64
        number = math.inf
    except (TypeError, ValueError):
        raise TypeError(
            f"[{op}] {name} must be a number: got {type(value).__name__}, allowed a float."
        ) from None
    if not math.isfinite(number):
        raise ValueError(f"[{op}] {name} must be finite: got {number}, allowed a finite float.")
    if abs(number) > LARGEST_FLOAT32:
        raise ValueError(
            f"[{op}] {name} is too large for float32: got {number}, "
            f"allowed up to {LARGEST_FLOAT32}."
        )
    return number


def as_positive(op: str, name: str, value: SupportsFloat) -> float:
    number = as_float(op, name, value)
    if number <= 0:
        raise ValueError(f"[{op}] {name} must be positive: got {number}, allowed >0.")
    return number


def as_integer(
    op: str, name: str, value: Any, *, at_least: int, at_most: int = LARGEST_LENGTH
) -> int:
    """An int; a float counts where it is whole, as ``mlx.optimizers`` accepts it."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    try:
        if isinstance(value, bool):
            raise TypeError
        number = operator.index(value)
    except TypeError:
        error = ValueError if isinstance(value, float) else TypeError
        shown = value if isinstance(value, float) else type(value).__name__
        raise error(f"[{op}] {name} must be a whole number: got {shown}, allowed an int.") from None
    if not at_least <= number <= at_most:
        raise ValueError(
            f"[{op}] {name} is out of range: got {number}, allowed {at_least} to "
            f"{_IN_WORDS.get(at_most, at_most)}."
        )
    return number


def as_length(op: str, name: str, value: Any) -> int:
    """A number of steps that cannot be none."""
    return as_integer(op, name, value, at_least=1)


def as_fractional_length(op: str, name: str, value: Any) -> int | float:
    """A number of steps that need not be whole, as ``mlx.optimizers`` has it."""
    if isinstance(value, float) and math.isfinite(value) and not value.is_integer() and value > 1:
        return value
    return as_length(op, name, value)


def as_choice(op: str, name: str, value: str, allowed: Sequence[str]) -> str:
    if value not in allowed:
        names = ", ".join(repr(choice) for choice in allowed)
        raise ValueError(f"[{op}] {name} is unknown: got {value!r}, allowed {names}.")
    return value


def as_boundaries(op: str, values: Sequence[Any]) -> tuple[int, ...]:
    """Increasing steps, none of them 0: every part must be seen."""
    boundaries = tuple(as_integer(op, "a boundary", value, at_least=1) for value in values)
    for before, after in pairwise(boundaries):
        if after <= before:
            raise ValueError(
                f"[{op}] boundaries must increase: got {after} after {before}, "
                "allowed only larger ones."
            )
    return boundaries
