"""Schedules that rise and fall: once (one_cycle) or for ever."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

from .. import _ext
from ._checks import as_choice, as_float, as_integer, as_length, as_positive
from ._schedule import Schedule

_ANNEAL = ("cosine", "linear")


def one_cycle(
    transition_steps: int,
    peak_value: float,
    pct_start: float = 0.3,
    pct_final: float | None = None,
    div_factor: float = 25.0,
    final_div_factor: float = 1e4,
    *,
    anneal: str = "cosine",
) -> Schedule:
    r"""Up to a peak and down to almost nothing, in two or three phases.

    With two phases, where :math:`\eta` is the peak, :math:`d` the ``div_factor`` and
    :math:`f` the ``final_div_factor``:

    .. math::

        \eta / d \;\to\; \eta \text{ at } \lfloor p_s T \rfloor
        \;\to\; \eta / (d f) \text{ at } T

    With ``pct_final`` there are three: :math:`\eta / d` is passed again at
    :math:`\lfloor p_f T \rfloor`. Between these points runs half a cosine wave or a line.

    Args:
        transition_steps (int): The number of steps :math:`T`; at least 1.
        peak_value (float): The largest value :math:`\eta`.
        pct_start (float): The fraction :math:`p_s` of the steps that rise, 0 to 1; where
            it amounts to no step, step 0 has the peak. Default: ``0.3``.
        pct_final (float, optional): The fraction :math:`p_f` of the steps after which the
            value is back where it started. Default: none, two phases.
        div_factor (float): :math:`d`; above 0. Default: ``25.0``.
        final_div_factor (float): :math:`f`; above 0. Default: ``1e4``.
        anneal (str): ``"cosine"`` or ``"linear"``. Default: ``"cosine"``.

    Returns:
        Schedule: A callable from the step to a float32 array. From step :math:`T` on it
        stays at :math:`\eta / (d f)`.

    Raises:
        ValueError: An argument is out of range or not finite, or a phase has no step.

    Reference: ``optax.cosine_onecycle_schedule``, and with ``anneal="linear",
    pct_final=0.85`` ``optax.linear_onecycle_schedule``. It departs where a product like
    ``0.29 * 100`` is a whole number but for its rounding (optax has the peak a step early),
    and raises where optax drops a phase without a word.
    ``torch.optim.lr_scheduler.OneCycleLR(total_steps=N, pct_start=p)`` ends at step N - 1:
    it is ``one_cycle(N - 1, pct_start=(p * N - 1) / (N - 1))``, with ``three_phase`` also
    ``pct_final=(2 * p * N - 2) / (N - 1)``, if ``p * N`` is a whole number; a step further
    torch goes on past its end, where the linear one is negative. Smith and Topin, 2019,
    https://arxiv.org/abs/1708.07120.

    Example:
        >>> schedule = one_cycle(10, 1.0, 0.5, div_factor=4, final_div_factor=2)
        >>> [schedule(t).item() for t in (0, 5, 10, 11)]
        [0.25, 1.0, 0.125, 0.125]
    """
    op = "one_cycle"
    transition_steps = as_length(op, "transition_steps", transition_steps)
    peak_value = as_float(op, "peak_value", peak_value)
    pct_start = _as_fraction(op, "pct_start", pct_start)
    if pct_final is not None:
        pct_final = _as_fraction(op, "pct_final", pct_final)
    div_factor = as_positive(op, "div_factor", div_factor)
    final_div_factor = as_positive(op, "final_div_factor", final_div_factor)
    anneal = as_choice(op, "anneal", anneal, _ANNEAL)
    arguments: dict[str, Any] = {
        "transition_steps": transition_steps,
        "peak_value": peak_value,
        "pct_start": pct_start,
        "pct_final": pct_final,
        "div_factor": div_factor,
        "final_div_factor": final_div_factor,
        "anneal": anneal,
    }
    start = as_float(op, "peak_value / div_factor", peak_value / div_factor)
    final = as_float(op, "the final value", peak_value / (div_factor * final_div_factor))
    points = [(0, start), (_steps(pct_start, transition_steps), peak_value)]
    if pct_final is not None:
        points.append((_steps(pct_final, transition_steps), start))
    points.append((transition_steps, final))
    if points[1][0] == 0:
        del points[0]
    segments = []
    for (begin, value), (end, next_value) in pairwise(points):
        if end <= begin:
            raise ValueError(
                f"[{op}] a phase has no step: got one from step {begin} to step {end} "
                f"(transition_steps={transition_steps}, pct_start={pct_start}, "
                f"pct_final={pct_final}), allowed at least one step each."
            )
        segments.append(_ext.blend(value, next_value, end - begin, cosine=anneal == "cosine"))
    device = _ext.join(segments, [begin for begin, _ in points[1:-1]])
    return Schedule(op, arguments, device)


def cosine_restarts(
    init_value: float, decay_steps: int, end_value: float = 0.0, *, cycle_multiplier: int = 1
) -> Schedule:
    r"""Half a cosine wave from ``init_value`` to ``end_value``, over and over.

    .. math::

        \eta_t = \eta_T + (\eta_0 - \eta_T) \frac{1 + \cos(\pi u / T_k)}{2},
        \quad T_k = T m^k

    where :math:`u` counts from the start of cycle :math:`k`, which has :math:`T_k` steps.
    The first step of a cycle has ``init_value``; ``end_value`` itself is never reached.

    Args:
        init_value (float): The value :math:`\eta_0` at each restart.
        decay_steps (int): The number of steps :math:`T` of the first cycle; at least 1.
        end_value (float): The value :math:`\eta_T` that each cycle runs to.
            Default: ``0.0``.
        cycle_multiplier (int): How many times as long as the one before a cycle is, the
            factor :math:`m`; 1 to 65535. Default: ``1``.

    Returns:
        Schedule: A callable from the step to a float32 array. It never ends.

    Raises:
        ValueError: An argument is out of range, or not finite.

    Reference: ``torch.optim.lr_scheduler.CosineAnnealingWarmRestarts`` (``T_0``, ``T_mult``,
    ``eta_min``) when stepped. Followed by ``constant(0)`` it is
    ``get_cosine_with_hard_restarts_schedule_with_warmup`` of transformers where the cycles
    are whole steps. Loshchilov and Hutter, 2017, https://arxiv.org/abs/1608.03983.

    Example:
        >>> schedule = cosine_restarts(1.0, 2, cycle_multiplier=2)
        >>> [round(schedule(t).item(), 4) for t in range(7)]
        [1.0, 0.5, 1.0, 0.8536, 0.5, 0.1464, 1.0]
    """
    op = "cosine_restarts"
    arguments: dict[str, Any] = {
        "init_value": as_float(op, "init_value", init_value),
        "decay_steps": as_length(op, "decay_steps", decay_steps),
        "end_value": as_float(op, "end_value", end_value),
        "cycle_multiplier": as_integer(
            op, "cycle_multiplier", cycle_multiplier, at_least=1, at_most=_ext.MAX_CYCLE_FACTOR
        ),
    }
    device = _ext.cosine_restarts(
        arguments["init_value"],
        arguments["end_value"],
        arguments["decay_steps"],
        arguments["cycle_multiplier"],
    )
    return Schedule(op, arguments, device)


def triangular(
    init_value: float,
    peak_value: float,
    up_steps: int,
    down_steps: int | None = None,
    *,
    decay_rate: float = 1.0,
    decay_every: str = "cycle",
) -> Schedule:
    r"""A line up, a line down, over and over; each peak may be lower.

    .. math::

        \eta_t = \eta_0 + (\eta_1 - \eta_0) \, h(t) \, r^n

    where :math:`h` goes from 0 to 1 in :math:`U` steps and back in :math:`D`, and :math:`n`
    counts cycles of :math:`U + D` steps, or steps.

    Args:
        init_value (float): The value :math:`\eta_0` at the start of each cycle.
        peak_value (float): The value :math:`\eta_1` of the first peak, at step :math:`U`;
            it may be below ``init_value``.
        up_steps (int): The number of steps :math:`U`; at least 1.
        down_steps (int, optional): The number of steps :math:`D`; at least 1. Default:
            ``up_steps``.
        decay_rate (float): The factor :math:`r` of the height; above 0, at most 1.
            Default: ``1.0``.
        decay_every (str): ``"cycle"`` or ``"step"``: what :math:`n` counts. Default:
            ``"cycle"``.

    Returns:
        Schedule: A callable from the step to a float32 array. It never ends.

    Raises:
        ValueError: An argument is out of range, or not finite.

    Reference: ``torch.optim.lr_scheduler.CyclicLR``: ``"triangular"`` as it is,
    ``"triangular2"`` with ``decay_rate=0.5``, ``"exp_range"`` with ``decay_rate=gamma,
    decay_every="step"``. It departs from cycle 1025 of ``"triangular2"`` on, where torch
    raises OverflowError. Smith, 2017, https://arxiv.org/abs/1506.01186.

    Example:
        >>> schedule = triangular(0.0, 1.0, 2, decay_rate=0.5)
        >>> [schedule(t).item() for t in (0, 1, 2, 3, 4, 6)]
        [0.0, 0.5, 1.0, 0.5, 0.0, 0.5]
    """
    op = "triangular"
    init_value = as_float(op, "init_value", init_value)
    peak_value = as_float(op, "peak_value", peak_value)
    up_steps = as_length(op, "up_steps", up_steps)
    if down_steps is not None:
        down_steps = as_length(op, "down_steps", down_steps)
    decay_rate = as_positive(op, "decay_rate", decay_rate)
    if decay_rate > 1:
        raise ValueError(f"[{op}] decay_rate must not grow: got {decay_rate}, allowed up to 1.")
    decay_every = as_choice(op, "decay_every", decay_every, ("cycle", "step"))
    arguments: dict[str, Any] = {
        "init_value": init_value,
        "peak_value": peak_value,
        "up_steps": up_steps,
        "down_steps": down_steps,
        "decay_rate": decay_rate,
        "decay_every": decay_every,
    }
    device = _ext.triangular(
        init_value,
        peak_value,
        up_steps,
        down_steps or up_steps,
        decay_rate,
        decay_every == "cycle",
    )
    return Schedule(op, arguments, device)


def _as_fraction(op: str, name: str, value: float) -> float:
    number = as_float(op, name, value)
    if not 0 <= number <= 1:
        raise ValueError(f"[{op}] {name} is out of range: got {number}, allowed 0 to 1.")
    return number


def _steps(fraction: float, total: int) -> int:
    """A fraction of the steps, rounded down but for the rounding of the product."""
    return math.floor(fraction * total * (1 + 2**-50))
