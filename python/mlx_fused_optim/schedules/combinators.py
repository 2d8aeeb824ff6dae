"""Schedules made of other schedules."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import mlx.core as mx

from .. import _ext
from ._checks import as_boundaries, as_choice, as_float, as_integer, as_length
from ._of_mlx import as_schedule
from ._schedule import Schedule, ScheduleLike, first_value_of, joined, value_of
from .decays import linear_schedule


def join_schedules(schedules: Sequence[ScheduleLike], boundaries: Sequence[int]) -> Schedule:
    r"""Schedules one after the other, each counting from its own start.

    .. math:: \eta_t = S_i(t - b_i), \quad b_i \le t < b_{i + 1}, \quad b_0 = 0

    Args:
        schedules (list of Schedule or callable): The schedules :math:`S_i`; they may be
            joined themselves.
        boundaries (list of int): The steps :math:`b_1, b_2, \ldots`, one less than there
            are schedules, at which the next one takes over; increasing, at least 1.

    Returns:
        Schedule: A callable from the step to a float32 array. The kernel evaluates up to 8
        segments. With more, or with a Python function among the schedules, MLX operations
        evaluate it before the step; ``repr`` and ``in_kernel`` say so.

    Raises:
        ValueError: The numbers do not fit, or boundaries do not increase.
        TypeError: A member is not a schedule.

    Reference: ``mlx.optimizers.join_schedules``, ``optax.join_schedules``, and
    ``torch.optim.lr_scheduler.SequentialLR``. It departs where a boundary is 0 or comes
    twice: there a schedule is never seen, here that is an error.

    Example:
        >>> from mlx_fused_optim import constant, linear_schedule
        >>> schedule = join_schedules([linear_schedule(0.0, 1.0, 4), constant(0.5)], [4])
        >>> [schedule(t).item() for t in (0, 3, 4, 1000)]
        [0.0, 0.75, 0.5, 0.5]
        >>> join_schedules([lambda step: 0.1, constant(0.5)], [4]).in_kernel
        False
    """
    op = "join_schedules"
    members = tuple(as_schedule(op, "each member", schedule) for schedule in schedules)
    if not members:
        raise ValueError(f"[{op}] there is nothing to join: got no schedule, allowed 1 or more.")
    if len(boundaries) != len(members) - 1:
        raise ValueError(
            f"[{op}] the number of boundaries does not fit: got {len(boundaries)}, "
            f"allowed {len(members) - 1} for {len(members)} schedules."
        )
    starts = as_boundaries(op, boundaries)
    return joined(op, {"schedules": members, "boundaries": starts}, members, starts)


def warmup(schedule: ScheduleLike, steps: int, start: float = 0.0) -> Schedule:
    r"""A line up to the first value of a schedule, then the schedule from its step 0.

    .. math::

        \eta_t = \begin{cases}
            \eta_s (1 - t / W) + S(0) \, t / W & t < W \\
            S(t - W) & t \ge W
        \end{cases}

    Args:
        schedule (Schedule or callable): The schedule :math:`S` to warm up to.
        steps (int): The number of steps :math:`W`; with 0, the schedule alone.
        start (float): The value :math:`\eta_s` at step 0. Default: ``0.0``.

    Returns:
        Schedule: A callable from the step to a float32 array. A Python function is
        evaluated by MLX operations, before the step.

    Raises:
        ValueError: An argument is out of range, or not finite.
        TypeError: ``schedule`` is not a schedule.

    Reference: with ``cosine_decay``, ``optax.warmup_cosine_decay_schedule`` (whose
    ``decay_steps`` includes the warm-up) and ``get_cosine_schedule_with_warmup`` of
    transformers up to its end; with ``linear_schedule``,
    ``get_linear_schedule_with_warmup``.

    Example:
        >>> from mlx_fused_optim import constant
        >>> schedule = warmup(constant(1.0), 4)
        >>> [schedule(t).item() for t in (0, 1, 4, 5)]
        [0.0, 0.25, 1.0, 1.0]
    """
    op = "warmup"
    schedule = as_schedule(op, "schedule", schedule)
    steps = as_integer(op, "steps", steps, at_least=0)
    start = as_float(op, "start", start)
    arguments = {"schedule": schedule, "steps": steps, "start": start}
    if steps == 0:
        return schedule if isinstance(schedule, Schedule) else joined(op, arguments, [schedule], [])
    peak = as_float(op, "the first value of the schedule", first_value_of(op, schedule))
    return joined(op, arguments, [linear_schedule(start, peak, steps), schedule], [steps])


def scaled(schedule: ScheduleLike, factor: float) -> Schedule:
    r"""A schedule times a number.

    .. math:: \eta_t = f \, S(t)

    Args:
        schedule (Schedule or callable): The schedule :math:`S`.
        factor (float): The factor :math:`f`; 0 or more.

    Returns:
        Schedule: A callable from the step to a float32 array.

    Raises:
        ValueError: ``factor`` is negative or not finite, or carries a value out of float32's
            range.
        TypeError: ``schedule`` is not a schedule.

    Reference: the factors of ``torch.optim.lr_scheduler`` (``LinearLR``, ``ConstantLR``),
    whose factor times the optimizer's rate is ``scaled(schedule, rate)``.

    Example:
        >>> from mlx_fused_optim import linear_schedule
        >>> scaled(linear_schedule(0.0, 1.0, 4), 0.5)(2)
        array(0.25, dtype=float32)
    """
    op = "scaled"
    schedule = as_schedule(op, "schedule", schedule)
    factor = as_float(op, "factor", factor)
    if factor < 0:
        raise ValueError(f"[{op}] factor must not be negative: got {factor}, allowed 0 or more.")
    arguments = {"schedule": schedule, "factor": factor}
    if not isinstance(schedule, Schedule):
        return Schedule(op, arguments, None, [(0, _Scaled(schedule, factor))])
    if schedule._device is not None:
        return Schedule(op, arguments, _ext.scaled(schedule._device, factor))
    members = [(start, scaled(member, factor)) for start, member in schedule._members]
    return Schedule(op, arguments, None, members)


def warmup_stable_decay(
    peak_value: float,
    warmup_steps: int,
    stable_steps: int,
    decay_steps: int,
    *,
    init_value: float = 0.0,
    end_value: float = 0.0,
    warmup_type: str = "linear",
    decay_type: str = "cosine",
) -> Schedule:
    r"""A rise to the peak, a plateau, and a fall at the end (WSD).

    .. math::

        \eta_t = \begin{cases}
            \eta_0 + (\eta - \eta_0) \, r(t / W) & t < W \\
            \eta & W \le t < W + S \\
            \eta - (\eta - \eta_D) \, d(\min((t - W - S) / D, 1)) & t \ge W + S
        \end{cases}

    The rise and the fall, as functions of the progress :math:`x`, are :math:`x` for
    ``"linear"`` and :math:`(1 - \cos \pi x) / 2` for ``"cosine"``. For ``"1-sqrt"`` the rise
    is :math:`1 - \sqrt{1 - x}` and the fall :math:`\sqrt{x}`.

    Args:
        peak_value (float): The value :math:`\eta` of the plateau.
        warmup_steps (int): The number of steps :math:`W` of the rise; 0 for none.
        stable_steps (int): The number of steps :math:`S` of the plateau; 0 for none.
        decay_steps (int): The number of steps :math:`D` of the fall; at least 1.
        init_value (float): The value :math:`\eta_0` at step 0, if there is a rise.
            Default: ``0.0``.
        end_value (float): The value :math:`\eta_D` from step :math:`W + S + D` on, reached
            exactly. Default: ``0.0``.
        warmup_type (str): ``"linear"``, ``"cosine"`` or ``"1-sqrt"``. Default: ``"linear"``.
        decay_type (str): ``"linear"``, ``"cosine"`` or ``"1-sqrt"``. Default: ``"cosine"``.

    Returns:
        Schedule: A callable from the step to a float32 array.

    Raises:
        ValueError: An argument is out of range, or not finite.

    Reference: ``get_wsd_schedule`` of transformers, whose ``min_lr_ratio`` times the peak is
    both ``init_value`` and ``end_value``. It departs where a fall has no step, and has no
    ``num_cycles`` but one half. Hu et al., 2024, https://arxiv.org/abs/2404.06395; 1 - sqrt:
    Haegele et al., 2024, https://arxiv.org/abs/2405.18392.

    Example:
        >>> schedule = warmup_stable_decay(1.0, 4, 10, 4, decay_type="1-sqrt")
        >>> [schedule(t).item() for t in (0, 1, 4, 14, 15, 18, 19)]
        [0.0, 0.25, 1.0, 1.0, 0.5, 0.0, 0.0]
    """
    op = "warmup_stable_decay"
    types = ("linear", "cosine", "1-sqrt")
    arguments: dict[str, Any] = {
        "peak_value": as_float(op, "peak_value", peak_value),
        "warmup_steps": as_integer(op, "warmup_steps", warmup_steps, at_least=0),
        "stable_steps": as_integer(op, "stable_steps", stable_steps, at_least=0),
        "decay_steps": as_length(op, "decay_steps", decay_steps),
        "init_value": as_float(op, "init_value", init_value),
        "end_value": as_float(op, "end_value", end_value),
        "warmup_type": as_choice(op, "warmup_type", warmup_type, types),
        "decay_type": as_choice(op, "decay_type", decay_type, types),
    }
    peak, rise, stable, fall, init, end, rise_type, fall_type = arguments.values()
    # 1 - sqrt(1 - x) of the way up leaves sqrt(1 - x); sqrt(x) of the way down is a
    # weight that rises, so there the ends change places.
    if fall_type == "1-sqrt":
        device = _ext.blend(end, peak, fall, stable, rising=True, power=0.5)
    else:
        device = _ext.blend(peak, end, fall, stable, cosine=fall_type == "cosine")
    if rise == 0:
        return Schedule(op, arguments, device)
    power = 0.5 if rise_type == "1-sqrt" else 1.0
    up = _ext.blend(init, peak, rise, cosine=rise_type == "cosine", power=power)
    return Schedule(op, arguments, _ext.join([up, device], [rise]))


class _Scaled:
    """A Python function of the step, times a factor."""

    def __init__(self, schedule: ScheduleLike, factor: float):
        self.schedule = schedule
        self.factor = factor

    def __call__(self, step: mx.array) -> mx.array:
        return value_of(self.schedule, step) * self.factor
