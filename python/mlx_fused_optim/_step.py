"""One step, shared by the optimizer and the function: checks, then the kernel."""

from __future__ import annotations

from typing import Any, NamedTuple

import mlx.core as mx

from . import _ext, _groups, _packing
from ._checks import Hyperparameter, LearningRate, checked_factor, checked_scalar, least_of
from ._layout import layout_of
from ._options import Options, checked_scale
from .schedules import Schedule
from .schedules._of_mlx import as_ours


class Hyperparameters(NamedTuple):
    """What mlx.optimizers.SGD has besides the learning rate. A scheduled one counts as present
    even where its value is 0: what a step consists of does not change from step to step."""

    momentum: Hyperparameter
    weight_decay: Hyperparameter
    dampening: float
    nesterov: bool

    @property
    def flags(self) -> int:
        """Bits of _ext.FLAGS."""
        bits = _ext.FLAGS["nesterov"] if self.nesterov else 0
        if self.momentum != 0:
            bits |= _ext.FLAGS["momentum"]
        if self.weight_decay != 0:
            bits |= _ext.FLAGS["weight_decay"]
        return bits


def checked_hyperparameters(
    op: str,
    momentum: Hyperparameter,
    weight_decay: Hyperparameter,
    dampening: float,
    nesterov: bool,
) -> Hyperparameters:
    """The options as floats or schedules, or ValueError where they make no sense."""
    hyper = Hyperparameters(
        as_ours(momentum) if callable(momentum) else checked_factor(op, "momentum", momentum),
        as_ours(weight_decay)
        if callable(weight_decay)
        else checked_factor(op, "weight_decay", weight_decay, at_least=least_of("weight_decay")),
        checked_factor(op, "dampening", dampening, "a float", at_most=1.0),
        bool(nesterov),
    )
    if nesterov and (hyper.momentum == 0 or hyper.dampening != 0):
        raise ValueError(
            f"[{op}] nesterov requires a momentum and zero dampening: got "
            f"momentum={hyper.momentum}, dampening={hyper.dampening}, "
            "allowed momentum above 0 and dampening 0."
        )
    return hyper


def wanted_slots(hyper: Hyperparameters, options: Options) -> _packing.Wanted:
    """What the state keeps for these options."""
    slots = options.slots
    if hyper.momentum != 0 or options.groups.added_flags & _ext.FLAGS["momentum"]:
        slots = ("momentum", *slots)
    return _packing.Wanted(_packing.SGD, slots, options.momentum_dtype)


def begun(
    op: str,
    tree: _ext.Tree,
    parameters: Any,
    state: _packing.State,
    hyper: Hyperparameters,
    options: Options,
) -> _packing.State:
    """A state that has everything a step of these tensors needs, and nothing to be taken in."""
    wanted = wanted_slots(hyper, options)
    state = _packing.with_step(state)
    state = _packing.packed(state, tree, layout_of(tree), wanted, parameters, op)
    if options.is_measured:
        state = _packing.with_counters(state, options.skip_nonfinite, op)
    return state


def never_changes(value: Any) -> bool:
    """Whether the same object is the same value: arrays, of MLX or numpy, and lists change."""
    return (
        type(value) in (float, int, bool, str, type(None), mx.Dtype)
        or isinstance(value, Schedule)
        or (type(value) is tuple and not value)
    )


def prepared_step(
    tree: _ext.Tree,
    state: _packing.State,
    learning_rate: LearningRate,
    hyper: Hyperparameters,
    options: Options,
) -> _ext.PreparedStep | None:
    """The steps after this ``state`` without a look at each option; None where every step needs
    one, for a number that Python makes, for groups and for what is measured."""
    rate = learning_rate._device if isinstance(learning_rate, Schedule) else learning_rate
    if (
        not isinstance(rate, (mx.array, _ext.Schedule))
        or not isinstance(hyper.momentum, float)
        or not isinstance(hyper.weight_decay, float)
        or not isinstance(options.grad_scale, float)
        or options.groups.members
        or options.is_measured
    ):
        return None
    layout = layout_of(tree)
    return _ext.PreparedStep(
        layout.made,
        layout.key,
        len(state.get("arenas", ())),
        learning_rate=rate,
        momentum=hyper.momentum,
        weight_decay=hyper.weight_decay,
        grad_scale=options.grad_scale,
        dampening=hyper.dampening,
        flags=flags_of(hyper, options, options.grad_scale),
        clip_value=options.clip_value or 0.0,
        ema_decay=options.ema_decay or 0.0,
        seed=options.seed,
        momentum_dtype=options.momentum_dtype,
    )


def uses_of_state(
    learning_rate: LearningRate,
    hyper: Hyperparameters,
    options: Options,
    grad_scale: LearningRate | None,
) -> list[str]:
    """What a step reads in the state or leaves there, but for the bare counter."""
    scale = options.grad_scale if grad_scale is None else grad_scale
    scalars = {
        "learning_rate": learning_rate,
        "momentum": hyper.momentum,
        "weight_decay": hyper.weight_decay,
        "grad_scale": scale,
    }
    uses = [f"a scheduled {name}" for name, value in scalars.items() if callable(value)]
    overrides = (member.overrides.values() for member in options.groups.members)
    if any(callable(value) for values in overrides for value in values):
        uses.append("a scheduled number of a group")
    uses += wanted_slots(hyper, options).slots
    if options.rounding == "stochastic":
        uses.append("stochastic rounding")
    if options.is_measured:
        uses.append("grad_norm")
    return uses


def flags_of(hyper: Hyperparameters, options: Options, scale: LearningRate) -> int:
    """Everything that a step of these options may consist of: bits of _ext.FLAGS."""
    flags = hyper.flags | options.flags | options.groups.added_flags
    if not isinstance(scale, float) or scale != 1:
        flags |= _ext.FLAGS["grad_scale"]
    return flags


def take_step(
    op: str,
    tree: _ext.Tree,
    parameters: Any,
    state: _packing.State,
    learning_rate: LearningRate,
    hyper: Hyperparameters,
    options: Options,
    grad_scale: LearningRate | None,
    stream: Any,
    packs: bool,
) -> tuple[Any, _packing.State, dict[str, mx.array]]:
    """The updated tree of parameters, the next state, and the values of this step of the
    hyperparameters that are scheduled; ``state`` is left as it is. With ``packs``, what it
    lacks for these tensors begins; else it is an error.

    The kernel evaluates schedules that it can; other callables are called with the step.
    """
    state = _packing.with_step(state)
    decay = hyper.weight_decay
    if options.trust_coefficient is not None and isinstance(decay, float) and decay < 0:
        raise ValueError(
            f"[{op}] a trust ratio divides by a sum with the weight decay: got "
            f"weight_decay={decay} and a trust_coefficient, allowed a weight_decay from 0 on."
        )
    scale = options.grad_scale if grad_scale is None else checked_scale(op, grad_scale)
    scalars: dict[str, Any] = {
        "learning_rate": learning_rate,
        "momentum": hyper.momentum,
        "weight_decay": hyper.weight_decay,
        "grad_scale": scale,
    }
    scheduled: dict[str, mx.array] = {}
    in_kernel: list[tuple[str, int, _ext.Schedule]] = []
    for position, (name, value) in enumerate(scalars.items()):
        if isinstance(value, Schedule) and value.in_kernel:
            scalars[name] = value._device
            in_kernel.append((name, position, scalars[name]))
        elif callable(value):
            scalars[name] = scheduled[name] = checked_scalar(op, name, value(state["step"]))

    layout = layout_of(tree)
    groups = numbers = None
    if options.groups.members:
        rows = _groups.rows_of(options.groups, layout, tree, parameters, op)
        groups = _groups.for_kernel(options.groups, layout.key, rows, hyper.flags | options.flags)
        numbers = _groups.numbers_of(
            options.groups, options.trust_coefficient, state["step"], op, stream
        )
    wanted = wanted_slots(hyper, options)
    arenas = _packing.arenas_of(state, layout, wanted, op)
    if arenas is None or not _packing.is_settled(state, layout, wanted, op):
        if arenas is None and not packs:
            raise ValueError(
                f"[{op}] the state has no {' or '.join(wanted.slots)} for these parameters: got "
                "the state of other parameters, or of steps with other options; allowed one "
                "from fused_sgd_init(parameters, state=..., and the options of the step)."
            )
        state = _packing.packed(state, tree, layout, wanted, parameters, op)
        arenas = _packing.arenas_of(state, layout, wanted, op) or []
    if options.is_measured:
        state = _packing.with_counters(state, options.skip_nonfinite, op)

    updated, slots, step, used, measured, skipped = _ext.sgd_step(
        tree,
        layout.made,
        arenas,
        state["step"],
        **scalars,
        dampening=hyper.dampening,
        flags=flags_of(hyper, options, scale),
        clip_value=options.clip_value or 0.0,
        clip_norm=options.clip_norm or 0.0,
        trust_coefficient=options.trust_coefficient or 0.0,
        ema_decay=options.ema_decay or 0.0,
        seed=options.seed,
        momentum_dtype=options.momentum_dtype,
        groups=groups,
        group_numbers=numbers,
        skipped=state.get("skipped") if options.skip_nonfinite else None,
        stream=stream,
    )
    state = _packing.with_arenas(state, slots, layout, wanted.rule)
    for name, position, schedule in in_kernel:
        if used is None:
            scheduled[name] = mx.array(schedule.first_value)
        else:
            scheduled[name] = _ext.arena_view(used, [], position, stream=stream)
    scheduled.pop("grad_scale", None)
    rate = scheduled.pop("learning_rate", scalars["learning_rate"])
    state = {**state, "step": step, "learning_rate": rate}
    if measured is not None:
        state["grad_norm"] = _ext.arena_view(measured, [], 0, stream=stream)
        if options.skip_nonfinite:
            state["skipped"] = skipped
    return updated, state, scheduled
