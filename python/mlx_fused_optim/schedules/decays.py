"""Schedules that fall or rise once: one segment each, or one a milestone."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import mlx.core as mx

from .. import _ext
from ._checks import (
    as_boundaries,
    as_float,
    as_fractional_length,
    as_integer,
    as_length,
    as_positive,
)
from ._schedule import Schedule, joined


class _Fraction:
    """A way from ``init`` to ``end`` in a number of steps that is not whole: the kernel
    counts progress in integers."""

    why_not_in_kernel = "its length is not a whole number"

    def __init__(self, init: float, end: float, steps: float, exponent: float | None = None):
        self.init, self.end, self.steps, self.exponent = init, end, steps, exponent

    def __call__(self, step: mx.array) -> mx.array:
        progress = mx.minimum(step.astype(mx.float32) / self.steps, 1.0)
        left = 1.0 - progress
        if self.exponent is not None:
            left = (0.5 * (1.0 + mx.cos(math.pi * progress))) ** self.exponent
        return self.init * left + self.end * (1.0 - left)


def constant(value: float) -> Schedule:
    r"""The same value at every step.

    .. math:: \eta_t = \eta

    Args:
        value (float): The value :math:`\eta`; finite, in float32's range.

    Returns:
        Schedule: A callable from the step to a float32 array.

    Raises:
        ValueError: ``value`` is not finite.

    Reference: ``optax.constant_schedule``.

    Example:
        >>> constant(0.5)(1000)
        array(0.5, dtype=float32)
    """
    op = "constant"
    value = as_float(op, "value", value)
    return Schedule(op, {"value": value}, _ext.constant(value))


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

    Reference: with two arguments ``mlx.optimizers.exponential_decay``, and
    ``torch.optim.lr_scheduler.ExponentialLR``; with the keywords
    ``optax.exponential_decay`` (``end_value`` there), also where ``end`` cuts off
    ``init`` itself. It departs where a rate or a length of 0 means "constant" there.

    Example:
        >>> schedule = exponential_decay(1.0, 0.5, transition_steps=2, end=0.25)
        >>> [schedule(t).item() for t in (0, 2, 4, 6)]
        [1.0, 0.5, 0.25, 0.25]
    """
    op = "exponential_decay"
    init = as_float(op, "init", init)
    decay_rate = as_positive(op, "decay_rate", decay_rate)
    transition_steps = as_length(op, "transition_steps", transition_steps)
    transition_begin = as_integer(op, "transition_begin", transition_begin, at_least=0)
    end = None if end is None else as_float(op, "end", end)
    staircase = bool(staircase)
    device = _ext.exponential_decay(
        init, decay_rate, transition_steps, transition_begin, staircase, end
    )
    arguments: dict[str, Any] = {
        "init": init,
        "decay_rate": decay_rate,
        "transition_steps": transition_steps,
        "transition_begin": transition_begin,
        "staircase": staircase,
        "end": end,
    }
    return Schedule(op, arguments, device)


def step_decay(init: float, decay_rate: float, step_size: int) -> Schedule:
    r"""Decay by a factor every ``step_size`` steps, exact at every step.

    .. math:: \eta_t = \eta_0 \, r^{\lfloor t / N \rfloor}

    The value changes at step :math:`N`, not after it.

    Args:
        init (float): The value :math:`\eta_0` at step 0.
        decay_rate (float): The factor :math:`r`; above 0.
        step_size (int): The number of steps :math:`N` between changes; at least 1.

    Returns:
        Schedule: A callable from the step to a float32 array. It has no last step.

    Raises:
        ValueError: An argument is out of range, or not finite.

    Reference: ``mlx.optimizers.step_decay``, ``torch.optim.lr_scheduler.StepLR``.

    Example:
        >>> schedule = step_decay(1.0, 0.5, 10)
        >>> [schedule(t).item() for t in (0, 9, 10, 20)]
        [1.0, 1.0, 0.5, 0.25]
    """
    op = "step_decay"
    arguments: dict[str, Any] = {
        "init": as_float(op, "init", init),
        "decay_rate": as_positive(op, "decay_rate", decay_rate),
        "step_size": as_length(op, "step_size", step_size),
    }
    init, decay_rate, step_size = arguments.values()
    device = _ext.exponential_decay(init, decay_rate, step_size, 0, True, None)
    return Schedule(op, arguments, device)


def linear_schedule(init: float, end: float, steps: float) -> Schedule:
    r"""A line from ``init`` to ``end``, then ``end``.

    .. math:: \eta_t = \eta_0 (1 - x) + \eta_N x, \quad x = \min(t / N, 1)

    Args:
        init (float): The value :math:`\eta_0` at step 0.
        end (float): The value :math:`\eta_N` from step :math:`N` on, reached exactly.
        steps (float): The number of steps :math:`N`; at least 1. MLX operations evaluate a
            schedule whose length is not whole, before the step.

    Returns:
        Schedule: A callable from the step to a float32 array.

    Raises:
        ValueError: An argument is out of range, or not finite.

    Reference: ``mlx.optimizers.linear_schedule``, ``optax.linear_schedule``; the factor of
    ``torch.optim.lr_scheduler.LinearLR``. It departs from the first at the end, which there
    misses ``end`` by a rounding: ``linear_schedule(1e-4, 0, 1000)`` ends at -7.3e-12 there,
    a negative rate for ever.

    Example:
        >>> schedule = linear_schedule(0.0, 1.0, 4)
        >>> [schedule(t).item() for t in (0, 1, 4, 5)]
        [0.0, 0.25, 1.0, 1.0]
    """
    op = "linear_schedule"
    arguments: dict[str, Any] = {
        "init": as_float(op, "init", init),
        "end": as_float(op, "end", end),
        "steps": as_fractional_length(op, "steps", steps),
    }
    init, end, steps = arguments.values()
    if isinstance(steps, float):
        return Schedule(op, arguments, None, [(0, _Fraction(init, end, steps))])
    return Schedule(op, arguments, _ext.blend(init, end, steps))


def cosine_decay(
    init: float, decay_steps: float, end: float = 0.0, *, exponent: float = 1.0
) -> Schedule:
    r"""Half a cosine wave from ``init`` to ``end``, then ``end``.

    .. math::

        \eta_t = \eta_N + (\eta_0 - \eta_N)
            \left(\frac{1 + \cos(\pi x)}{2}\right)^p, \quad x = \min(t / N, 1)

    Args:
        init (float): The value :math:`\eta_0` at step 0.
        decay_steps (float): The number of steps :math:`N`; at least 1. MLX operations
            evaluate a schedule whose length is not whole, before the step.
        end (float): The value :math:`\eta_N` from step :math:`N` on, reached exactly. It
            may be above ``init``. Default: ``0.0``.
        exponent (float): The power :math:`p` of the wave; above 0. Default: ``1.0``.

    Returns:
        Schedule: A callable from the step to a float32 array. Past the end it stays; the
        cosines of torch (``CosineAnnealingLR``) and transformers rise again.

    Raises:
        ValueError: An argument is out of range, or not finite.

    Reference: ``mlx.optimizers.cosine_decay``; with ``end = alpha * init``,
    ``optax.cosine_decay_schedule``; up to step :math:`N`,
    ``torch.optim.lr_scheduler.CosineAnnealingLR`` (``T_max``, ``eta_min``). Loshchilov and
    Hutter, 2017, https://arxiv.org/abs/1608.03983.

    Example:
        >>> schedule = cosine_decay(1.0, 10, end=0.5)
        >>> [schedule(t).item() for t in (0, 5, 10, 11)]
        [1.0, 0.75, 0.5, 0.5]
    """
    op = "cosine_decay"
    init = as_float(op, "init", init)
    length = as_fractional_length(op, "decay_steps", decay_steps)
    end = as_float(op, "end", end)
    exponent = as_positive(op, "exponent", exponent)
    arguments: dict[str, Any] = {
        "init": init,
        "decay_steps": length,
        "end": end,
        "exponent": exponent,
    }
    if isinstance(length, float):
        return Schedule(op, arguments, None, [(0, _Fraction(init, end, length, exponent))])
    device = _ext.blend(init, end, length, cosine=True, power=exponent)
    return Schedule(op, arguments, device)


def polynomial_decay(
    init_value: float,
    end_value: float,
    power: float,
    transition_steps: int,
    transition_begin: int = 0,
) -> Schedule:
    r"""A power of the remaining way, from ``init_value`` to ``end_value``.

    .. math::

        \eta_t = \eta_T + (\eta_0 - \eta_T) (1 - x)^p, \quad
        x = \operatorname{clip}((t - B) / T,\, 0,\, 1)

    Args:
        init_value (float): The value :math:`\eta_0` up to step :math:`B`.
        end_value (float): The value :math:`\eta_T` from step :math:`B + T` on, reached
            exactly. It may be above ``init_value``.
        power (float): The power :math:`p`, 1 for a line; above 0.
        transition_steps (int): The number of steps :math:`T`; at least 1.
        transition_begin (int): The step :math:`B` where the way begins; at least 0.
            Default: ``0``.

    Returns:
        Schedule: A callable from the step to a float32 array.

    Raises:
        ValueError: An argument is out of range, or not finite.

    Reference: ``optax.polynomial_schedule``; with ``end_value=0``
    ``torch.optim.lr_scheduler.PolynomialLR``; in ``warmup``,
    ``get_polynomial_decay_schedule_with_warmup`` of transformers. It departs from optax
    where a power is not positive (there 0 never reaches the end and -1 is infinite), or a
    length is (constant there).

    Example:
        >>> schedule = polynomial_decay(1.0, 0.0, 2, 4)
        >>> [schedule(t).item() for t in (0, 2, 4, 5)]
        [1.0, 0.25, 0.0, 0.0]
    """
    op = "polynomial_decay"
    init_value = as_float(op, "init_value", init_value)
    end_value = as_float(op, "end_value", end_value)
    power = as_positive(op, "power", power)
    transition_steps = as_length(op, "transition_steps", transition_steps)
    transition_begin = as_integer(op, "transition_begin", transition_begin, at_least=0)
    device = _ext.blend(init_value, end_value, transition_steps, transition_begin, power=power)
    arguments: dict[str, Any] = {
        "init_value": init_value,
        "end_value": end_value,
        "power": power,
        "transition_steps": transition_steps,
        "transition_begin": transition_begin,
    }
    return Schedule(op, arguments, device)


def inverse_sqrt(
    peak_value: float, warmup_steps: int = 0, timescale: int | None = None
) -> Schedule:
    r"""A linear warm-up from 0, then decay as one over the square root.

    .. math::

        \eta_t = \eta \cdot \begin{cases}
            t / W & t < W \\
            \sqrt{S / (S + t - W)} & t \ge W
        \end{cases}

    Args:
        peak_value (float): The largest value :math:`\eta`, at step :math:`W`.
        warmup_steps (int): The number of steps :math:`W` of the warm-up; 0 for none.
            Default: ``0``.
        timescale (int, optional): The number of steps :math:`S` that sets the pace: the
            value has halved :math:`3 S` steps after the warm-up; at least 1. Default:
            ``warmup_steps``, or 10000 without a warm-up.

    Returns:
        Schedule: A callable from the step to a float32 array. It has no last step.

    Raises:
        ValueError: An argument is out of range, or not finite.

    Reference: ``get_inverse_sqrt_schedule`` of transformers, at every step. Vaswani et
    al., 2017, https://arxiv.org/abs/1706.03762, section 5.3.

    Example:
        >>> schedule = inverse_sqrt(1.0, warmup_steps=4)
        >>> [schedule(t).item() for t in (0, 1, 4, 16)]
        [0.0, 0.25, 1.0, 0.5]
    """
    op = "inverse_sqrt"
    peak_value = as_float(op, "peak_value", peak_value)
    warmup_steps = as_integer(op, "warmup_steps", warmup_steps, at_least=0)
    if timescale is not None:
        timescale = as_length(op, "timescale", timescale)
    arguments: dict[str, Any] = {
        "peak_value": peak_value,
        "warmup_steps": warmup_steps,
        "timescale": timescale,
    }
    device = _ext.inverse_power(peak_value, timescale or warmup_steps or 10000, 0.5)
    if warmup_steps == 0:
        return Schedule(op, arguments, device)
    rise = _ext.blend(0.0, peak_value, warmup_steps)
    return Schedule(op, arguments, _ext.join([rise, device], [warmup_steps]))


def multi_step(
    init_value: float, boundaries: Sequence[int], scales: float | Sequence[float] = 0.1
) -> Schedule:
    r"""A constant between milestones, multiplied by a factor at each.

    .. math:: \eta_t = \eta_0 \prod_{i : b_i \le t} s_i

    The value changes at the boundary, not after it.

    Args:
        init_value (float): The value :math:`\eta_0` before the first boundary.
        boundaries (list of int): The steps :math:`b_i`; increasing, at least 1. From eight
            on, MLX operations evaluate the schedule, before the step.
        scales (float or list of float): The factor :math:`s_i` at each boundary, or one
            for all; 0 or more. Default: ``0.1``.

    Returns:
        Schedule: A callable from the step to a float32 array; past the last boundary it
        stays.

    Raises:
        ValueError: An argument is out of range, or not finite.

    Reference: ``torch.optim.lr_scheduler.MultiStepLR`` (``milestones``, ``gamma``) and
    ``optax.piecewise_constant_schedule``. It departs where a milestone is given twice
    (torch multiplies twice) or is 0.

    Example:
        >>> schedule = multi_step(1.0, [30, 60], 0.5)
        >>> [schedule(t).item() for t in (29, 30, 60, 1000)]
        [1.0, 0.5, 0.25, 0.25]
    """
    op = "multi_step"
    init_value = as_float(op, "init_value", init_value)
    boundaries = as_boundaries(op, boundaries)
    if isinstance(scales, Sequence):
        scales = tuple(as_float(op, "a scale", scale) for scale in scales)
        if len(scales) != len(boundaries):
            raise ValueError(
                f"[{op}] scales must be as many as boundaries: got {len(scales)}, "
                f"allowed {len(boundaries)} or a single number."
            )
    else:
        scales = as_float(op, "scales", scales)
    factors = scales if isinstance(scales, tuple) else (scales,) * len(boundaries)
    if any(factor < 0 for factor in factors):
        raise ValueError(f"[{op}] scales must not be negative: got {scales}, allowed 0 or more.")
    arguments: dict[str, Any] = {
        "init_value": init_value,
        "boundaries": boundaries,
        "scales": scales,
    }
    values = [init_value]
    for factor in factors:
        values.append(as_float(op, "a value after scaling", values[-1] * factor))
    return joined(op, arguments, [constant(value) for value in values], boundaries)
