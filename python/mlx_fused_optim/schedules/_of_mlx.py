"""Schedules that ``mlx.optimizers`` made, as the schedules of ours that they are."""

from __future__ import annotations

from types import CodeType, FunctionType
from typing import Any
from weakref import WeakKeyDictionary

from mlx.optimizers import schedulers

from ._schedule import Schedule, ScheduleLike, maker_of

# The functions of MLX that make one, and the names that the function they return has for
# their arguments: those of ours, too.
MADE_BY_MLX = {
    "exponential_decay": {"init", "decay_rate"},
    "step_decay": {"init", "decay_rate", "step_size"},
    "cosine_decay": {"init", "decay_steps", "end"},
    "linear_schedule": {"init", "end", "steps"},
    "join_schedules": {"schedules", "boundaries"},
}


def _code_of(maker: str) -> CodeType | None:
    """The code of what ``maker`` returns, if it is MLX's still."""
    outer = getattr(getattr(schedulers, maker), "__code__", None)
    if outer is None or outer.co_filename != schedulers.__file__:
        return None
    inner = [constant for constant in outer.co_consts if isinstance(constant, CodeType)]
    known = [code for code in inner if set(code.co_freevars) == MADE_BY_MLX[maker]]
    return known[0] if len(inner) == len(known) == 1 else None


_CODES = {maker: _code_of(maker) for maker in MADE_BY_MLX}
# The same object for the same function: steps are prepared, and groups known, by identity.
_ours: WeakKeyDictionary[FunctionType, Schedule] = WeakKeyDictionary()


def as_ours(schedule: ScheduleLike) -> ScheduleLike:
    """What ``mlx.optimizers`` made, as our schedule of that name, which the kernel evaluates;
    anything else as it is.

    Nothing is guessed. The function has to be the one in MLX's source, by identity of its
    code, and what it was made with numbers of Python that ours takes too. It is the same
    schedule without MLX's roundings: within 2 ulp of the float64 value. What is joined is
    what the list has at this time.

    Example:
        >>> import mlx.optimizers
        >>> as_ours(mlx.optimizers.cosine_decay(0.1, 1000))
        cosine_decay(0.1, 1000)
    """
    if type(schedule) is not FunctionType:
        return schedule
    known = _ours.get(schedule)
    if known is None:
        known = _recognised(schedule)
        if known is None:
            return schedule
        _ours[schedule] = known
    return known


def as_schedule(op: str, name: str, value: Any) -> ScheduleLike:
    if not callable(value):
        raise TypeError(
            f"[{op}] {name} must be a schedule: got {type(value).__name__}, allowed a Schedule "
            "or a function of the step; for a number write constant(number)."
        )
    return as_ours(value)


def _recognised(function: FunctionType) -> Schedule | None:
    name = next((name for name, code in _CODES.items() if code is function.__code__), None)
    if name is None or function.__globals__ is not vars(schedulers):
        return None
    cells = [cell.cell_contents for cell in function.__closure__ or ()]
    arguments: dict[str, Any] = dict(zip(function.__code__.co_freevars, cells, strict=True))
    numbers = arguments["boundaries"] if name == "join_schedules" else arguments.values()
    if not all(type(number) in (int, float) for number in numbers):
        return None
    try:
        ours = maker_of(name)(**arguments)
    except (TypeError, ValueError):  # a rate of 0, a fractional length, a boundary given twice
        return None
    return ours if ours.in_kernel else None
