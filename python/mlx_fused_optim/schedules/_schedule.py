"""What a schedule is: a value with a device form, and a callable."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import mlx.core as mx

from .. import _ext
from ._checks import LARGEST_UINT64, as_integer

# What may stand where a schedule is expected: from the step to a scalar.
ScheduleLike = Callable[[mx.array], Any]


class Schedule:
    """A number as a function of the step, made by the functions of this module.

    Calling it evaluates the same code as the fused step, on the default device. It
    compares equal to a schedule made with the same arguments, hashes, pickles, and its
    ``repr`` is the call that makes it.

    Args:
        step (int or array): The step :math:`t`, 0 at the first update; an integer, or
            an array of integers of any shape. Negative steps of an array count as 0.
            Steps from :math:`2^{48}` on are rounded to 48 bits.

    Returns:
        array: The float32 value, of the shape of ``step``; within 2 ulp of the float64
        value.

    Raises:
        TypeError, ValueError: ``step`` is not an integer, or is a negative int.

    Example:
        >>> from mlx_fused_optim import exponential_decay
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

    __slots__ = ("_arguments", "_device", "_members", "_name")

    def __init__(
        self,
        name: str,
        arguments: Mapping[str, Any],
        device: _ext.Schedule | None,
        members: Sequence[tuple[int, ScheduleLike]] = (),
    ):
        """``name(**arguments)`` makes an equal one. Without a device form, ``members``
        are what MLX operations join: (first step, schedule), in order."""
        self._name = name
        self._arguments = dict(arguments)
        self._device = device
        self._members = tuple(members)

    @property
    def in_kernel(self) -> bool:
        """Whether the fused step evaluates it; else MLX operations do, before the step."""
        return self._device is not None

    def __call__(self, step: int | mx.array) -> mx.array:
        if not isinstance(step, mx.array):
            index = as_integer(self._name, "step", step, at_least=0, at_most=LARGEST_UINT64)
            return self._evaluate(mx.array(index, mx.uint64))
        if not mx.issubdtype(step.dtype, mx.integer):
            raise ValueError(
                f"[{self._name}] step must be an integer: got an array of {step.dtype}, "
                "allowed any integer dtype."
            )
        if mx.issubdtype(step.dtype, mx.signedinteger):
            step = mx.maximum(step, 0)
        return self._evaluate(step.astype(mx.uint64))

    def _evaluate(self, step: mx.array) -> mx.array:
        if self._device is not None:
            return self._device(step)
        value = mx.zeros(step.shape)
        for number, (start, member) in enumerate(self._members):
            first = mx.array(start, mx.uint64)
            # Clamped, because unsigned steps before the start would wrap.
            part = value_of(member, mx.maximum(step, first) - first)
            value = mx.where(step < first, value, part) if number else part
        return value

    def _first_value(self) -> float:
        """The value at step 0, in float64 where the device form has it."""
        if self._device is not None:
            return float(self._device.first_value)
        value: Any = self(0).item()
        return float(value)

    def _natural_length(self) -> int:
        """A number of steps in which its shape shows; a guess where it never ends."""
        if self._device is not None:
            return int(self._device.natural_length)
        start, member = self._members[-1]
        length = member._natural_length() if isinstance(member, Schedule) else 1000
        return start + length

    def plot(self, steps: int, ax: Any = None) -> Any:
        """Draw the schedule with matplotlib (``pip install 'mlx-fused-optim[plot]'``).

        Args:
            steps (int): How many steps to draw, from step 0.
            ax (matplotlib.axes.Axes, optional): Where to draw. Default: a new figure.

        Returns:
            matplotlib.axes.Axes: Where it was drawn.

        Raises:
            ImportError: matplotlib is not installed.
            ValueError: ``steps`` is not at least 1.
        """
        from .drawing import plot

        return plot(self, steps, ax)

    def __repr__(self) -> str:
        call = f"{self._name}({', '.join(self._shown_arguments())})"
        if self.in_kernel:
            return call
        return f"<{call}, evaluated by MLX operations because {self._why_not_in_kernel()}>"

    def _shown_arguments(self) -> Iterator[str]:
        """Required arguments by position, the others by name where not the default."""
        defaults = _defaults(self._name)
        for key, value in self._arguments.items():
            shown = repr(list(value)) if isinstance(value, tuple) else repr(value)
            if key not in defaults:
                yield shown
            elif value != defaults[key]:
                yield f"{key}={shown}"

    def _why_not_in_kernel(self) -> str:
        count = 0
        for _, member in self._members:
            if not isinstance(member, Schedule):
                return getattr(member, "why_not_in_kernel", "a member is a Python function")
            if member._device is None:
                return member._why_not_in_kernel()
            count += member._device.segments
        return f"it has {count} segments, and the kernel takes {_ext.MAX_SEGMENTS}"

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Schedule):
            return NotImplemented
        return self._name == other._name and self._arguments == other._arguments

    def __hash__(self) -> int:
        return hash((self._name, tuple(self._arguments.items())))

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuild, (self._name, self._arguments)


def value_of(schedule: ScheduleLike, step: mx.array) -> mx.array:
    """The float32 value of a schedule, or of any callable, at each step."""
    if isinstance(schedule, Schedule):
        return schedule._evaluate(step)
    value = schedule(step)
    if not isinstance(value, mx.array):
        value = mx.array(value)
    return mx.broadcast_to(value.astype(mx.float32), step.shape)


def first_value_of(op: str, schedule: ScheduleLike) -> float:
    """The value at step 0, which a warm-up leads to."""
    if isinstance(schedule, Schedule):
        return schedule._first_value()
    value: Any = value_of(schedule, mx.array(0, mx.uint64)).item()
    return float(value)


def joined(
    name: str,
    arguments: Mapping[str, Any],
    schedules: Sequence[ScheduleLike],
    boundaries: Sequence[int],
) -> Schedule:
    """A schedule whose parts take over at the boundaries, and count from there."""
    devices = [s._device if isinstance(s, Schedule) else None for s in schedules]
    in_kernel = [device for device in devices if device is not None]
    if len(in_kernel) == len(schedules):
        device = _ext.join(in_kernel, boundaries)
        if device is not None:
            return Schedule(name, arguments, device)
    members = list(zip([0, *boundaries], schedules, strict=True))
    return Schedule(name, arguments, None, members)


def maker_of(name: str) -> Callable[..., Schedule]:
    """The function of this package that makes a schedule of this name."""
    from .. import schedules

    maker: Callable[..., Schedule] = getattr(schedules, name)
    return maker


def _defaults(name: str) -> dict[str, Any]:
    """The default of each argument that has one."""
    maker = maker_of(name)
    code = maker.__code__
    positional = code.co_varnames[: code.co_argcount]
    defaults = maker.__defaults__ or ()
    shown = dict(zip(positional[len(positional) - len(defaults) :], defaults, strict=True))
    return {**shown, **(maker.__kwdefaults__ or {})}


def _rebuild(name: str, arguments: dict[str, Any]) -> Schedule:
    return maker_of(name)(**arguments)
