"""Schedules that the kernel evaluates itself.

A schedule is a value: it prints itself, compares, pickles, and is a callable
``step -> number`` like the schedules of ``mlx.optimizers``. It also has a device form, a
few numbers from which the fused step computes the value at its own step counter, with
no host in between. On the command line, ``python -m mlx_fused_optim.schedules`` draws one.
"""

from ._schedule import Schedule
from .combinators import join_schedules, scaled, warmup, warmup_stable_decay
from .cycles import cosine_restarts, one_cycle, triangular
from .decays import (
    constant,
    cosine_decay,
    exponential_decay,
    inverse_sqrt,
    linear_schedule,
    multi_step,
    polynomial_decay,
    step_decay,
)
from .text import parse_schedule

__all__ = [
    "Schedule",
    "constant",
    "cosine_decay",
    "cosine_restarts",
    "exponential_decay",
    "inverse_sqrt",
    "join_schedules",
    "linear_schedule",
    "multi_step",
    "one_cycle",
    "parse_schedule",
    "polynomial_decay",
    "scaled",
    "step_decay",
    "triangular",
    "warmup",
    "warmup_stable_decay",
]
