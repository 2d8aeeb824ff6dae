"""One step, shared by the optimizer and the function: checks, then the kernel."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import mlx.core as mx

from . import _ext, _groups, _packing
from ._bytes import DTYPE
from ._checks import Hyperparameter, LearningRate, checked_scalar
from ._layout import Layout, layout_of
from ._options import Options, checked_scale
from ._paths import leaves, name_of
from ._rules import FRAME_SLOTS, RULE_PLACES, Rule
from .schedules import Schedule
from .schedules._of_mlx import as_ours


class Hyper(NamedTuple):
    """A rule and its numbers beside the learning rate, checked. A scheduled one counts as
    present even where its value is 0: what a step consists of does not change from step to
    step."""

    rule: Rule
    scalars: tuple[Hyperparameter, ...]  # weight_decay, and the rule's in its order
    flags: int  # bits of the rule's flags, and of weight_decay

    @property
    def named(self) -> dict[str, Hyperparameter]:
        return dict(zip(("weight_decay", *self.rule.scalars), self.scalars, strict=True))


def checked_hyper(
    op: str, rule: Rule, numbers: Mapping[str, Any], flags: Mapping[str, bool]
) -> Hyper:
    """Numbers as floats or schedules, or ValueError where they make no sense."""
    scalars = tuple(
        as_ours(numbers[name])
        if callable(numbers[name])
        else rule.ranges[name].checked(op, name, numbers[name])
        for name in ("weight_decay", *rule.scalars)
    )
    bits = sum(bit for name, bit in rule.flags.items() if flags.get(name))
    if scalars[0] != 0:
        bits |= _ext.FLAGS["weight_decay"]
    return Hyper(rule, scalars, bits)


def kernel_dtype(hyper: Hyper, options: Options) -> mx.Dtype | None:
    """Of the rule's own slots; None for each parameter's."""
    dtype = options.state_dtype
    return DTYPE if isinstance(dtype, str) else dtype or hyper.rule.state_dtype


def wanted_slots(hyper: Hyper, options: Options) -> _packing.Wanted:
    """What the state keeps for these options."""
    rule = hyper.rule
    own = rule.kept(hyper.flags | options.groups.added_flags)
    return _packing.Wanted(
        rule.slots,
        (*own, *options.slots),
        kernel_dtype(hyper, options),
        mx.int8 if options.has_master24 else mx.float32,
    )


def check_masters(op: str, layout: Layout, parameters: Any, options: Options) -> None:
    """Raise ValueError where masters of 24 bits are asked of parameters that have none: of
    float16, and of a model without any bfloat16."""
    if not options.has_master24:
        return
    dtypes = {arena.dtype for arena in layout.arenas}
    others = [row for row in layout.tensors if row[2] != mx.bfloat16]
    is_mixed = mx.bfloat16 in dtypes or any(
        isinstance(leaf, mx.array) and leaf.dtype == mx.bfloat16 for _, leaf in leaves(parameters)
    )
    if mx.float16 in dtypes or (others and not is_mixed):
        path, _, dtype = next((row for row in others if row[2] == mx.float16), others[0])
        raise ValueError(
            f"[{op}] masters of 24 bits are those of bfloat16 parameters: got {dtype} for "
            f"'{name_of(path)}', allowed bfloat16, and float32 beside it; or master_weights=True."
        )


def begun(
    op: str,
    tree: _ext.Tree,
    parameters: Any,
    state: _packing.State,
    hyper: Hyper,
    options: Options,
) -> _packing.State:
    """A state that has everything a step of these tensors needs, and nothing to be taken in."""
    wanted = wanted_slots(hyper, options)
    layout = layout_of(tree, options.least_of_bytes)
    check_masters(op, layout, parameters, options)
    state = _packing.with_step(state)
    state = _packing.packed(state, tree, layout, wanted, parameters, op)
    if options.is_measured:
        state = _packing.with_counters(state, options.skip_nonfinite, op)
    return state


def never_changes(value: Any) -> bool:
    """Whether the same object is the same value: arrays, of MLX or numpy, and lists change."""
    return (
        type(value) in (float, int, bool, str, type(None), mx.Dtype)
        or isinstance(value, Schedule)
        or (type(value) is tuple and all(map(never_changes, value)))
    )


def prepared_step(
    tree: _ext.Tree,
    state: _packing.State,
    learning_rate: LearningRate,
    hyper: Hyper,
    options: Options,
) -> _ext.PreparedStep | None:
    """The steps after this ``state``, which has taken one, without a look at each option; None
    where every step needs one, for a number that Python makes."""
    rate = learning_rate._device if isinstance(learning_rate, Schedule) else learning_rate
    if (
        not isinstance(rate, (mx.array, _ext.Schedule))
        or not all(isinstance(value, float) for value in hyper.scalars)
        or not isinstance(options.grad_scale, float)
    ):
        return None
    layout = layout_of(tree, options.least_of_bytes)
    of_groups = _groups.found(
        options.groups, options.trust_coefficient, layout.key, hyper.flags | options.flags
    )
    if of_groups is None:
        return None
    scalars = [rate, hyper.scalars[0], options.grad_scale, *hyper.scalars[1:]]
    return _ext.PreparedStep(
        layout.made,
        layout.key,
        len(state.get("arenas", ())),
        options_of(hyper, options, scalars, options.grad_scale, **of_groups),
    )


def options_of(
    hyper: Hyper, options: Options, scalars: list[Any], scale: Any, **more: Any
) -> _ext.Options:
    """As the extension takes them: the scalars are learning rate, weight decay, scale of the
    gradients and the rule's own."""
    return _ext.Options(
        rule=hyper.rule.number,
        scalars=scalars,
        flags=flags_of(hyper, options, scale),
        clip_value=options.clip_value or 0.0,
        clip_norm=options.clip_norm or 0.0,
        trust_coefficient=options.trust_coefficient or 0.0,
        ema_decay=options.ema_decay or 0.0,
        seed=options.seed,
        state_dtype=kernel_dtype(hyper, options),
        **more,
    )


def uses_of_state(
    learning_rate: LearningRate,
    hyper: Hyper,
    options: Options,
    grad_scale: LearningRate | None,
) -> list[str]:
    """What a step reads in the state or leaves there, but for the bare counter."""
    scale = options.grad_scale if grad_scale is None else grad_scale
    scalars = {"learning_rate": learning_rate, "grad_scale": scale, **hyper.named}
    uses = [f"a scheduled {name}" for name, value in scalars.items() if callable(value)]
    overrides = (member.overrides.values() for member in options.groups.members)
    if any(callable(value) for values in overrides for value in values):
        uses.append("a scheduled number of a group")
    uses += wanted_slots(hyper, options).slots
    if hyper.flags & hyper.rule.flags.get("bias_correction", 0):
        uses.append("bias correction")
    if options.rounding == "stochastic":
        uses.append("stochastic rounding")
    if options.is_measured:
        uses.append("grad_norm")
    return uses


def flags_of(hyper: Hyper, options: Options, scale: LearningRate) -> int:
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
    hyper: Hyper,
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
    decay = hyper.scalars[0]
    if options.trust_coefficient is not None and isinstance(decay, float) and decay < 0:
        raise ValueError(
            f"[{op}] a trust ratio divides by a sum with the weight decay: got "
            f"weight_decay={decay} and a trust_coefficient, allowed a weight_decay from 0 on."
        )
    scale = options.grad_scale if grad_scale is None else checked_scale(op, grad_scale)
    named = hyper.named
    scalars: dict[str, Any] = {
        "learning_rate": learning_rate,
        "weight_decay": named.pop("weight_decay"),
        "grad_scale": scale,
        **named,
    }
    scheduled: dict[str, mx.array] = {}
    in_kernel: list[tuple[str, int, _ext.Schedule]] = []
    for position, (name, value) in enumerate(scalars.items()):
        if isinstance(value, Schedule) and value.in_kernel:
            scalars[name] = value._device
            in_kernel.append((name, position, scalars[name]))
        elif callable(value):
            scalars[name] = scheduled[name] = checked_scalar(op, name, value(state["step"]))

    layout = layout_of(tree, options.least_of_bytes)
    groups = numbers = None
    if options.groups.members:
        rows = _groups.rows_of(options.groups, layout, tree, parameters, op)
        groups = _groups.for_kernel(options.groups, layout.key, rows, hyper.flags | options.flags)
        numbers = _groups.numbers_of(
            options.groups, hyper.rule, options.trust_coefficient, state["step"], op, stream
        )
    check_masters(op, layout, parameters, options)
    wanted = wanted_slots(hyper, options)
    arenas = _packing.arenas_of(state, layout, wanted, op)
    if arenas is None or not _packing.is_settled(state, layout, wanted, op):
        if arenas is None and not packs:
            raise ValueError(
                f"[{op}] the state has no {' or '.join(wanted.slots)} for these parameters: got "
                "the state of other parameters, or of steps with other options; allowed one "
                f"from {op.removesuffix('_step')}_init(parameters, state=..., and the options of "
                "the step)."
            )
        state = _packing.packed(state, tree, layout, wanted, parameters, op)
        arenas = _packing.arenas_of(state, layout, wanted, op) or []
    if options.is_measured:
        state = _packing.with_counters(state, options.skip_nonfinite, op)

    kernel_slots: list[list[mx.array]] = [[] for _ in range(RULE_PLACES + len(FRAME_SLOTS))]
    for place, arrays in zip(hyper.rule.places, arenas, strict=True):
        kernel_slots[place] = arrays
    updated, slots, step, used, measured, skipped = _ext.fused_step(
        tree,
        layout.made,
        kernel_slots,
        state["step"],
        options_of(
            hyper,
            options,
            list(scalars.values()),
            scale,
            groups=groups,
            group_numbers=numbers,
            skipped=state.get("skipped") if options.skip_nonfinite else None,
            op=op,
        ),
        stream=stream,
    )
    slots = [slots[place] for place in hyper.rule.places]
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
