"""One step, shared by the optimizer and the function: checks, then the kernel."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import mlx.core as mx

from . import _ext, _groups, _packing
from ._bytes import DTYPE
from ._checks import Hyperparameter, LearningRate, checked_choice
from ._layout import Layout, layout_of, layout_of_rows
from ._newton_schulz import NewtonSchulz, has_matrices
from ._options import Options, checked_scale
from ._paths import leaves, name_of
from ._recent import Recent
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
    between: NewtonSchulz | None = None  # of the rule's direction and the frame's update

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
    flags = {name: checked_choice(op, name, value) for name, value in flags.items()}
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
    tree = arranged(tree, hyper).tree
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
        hyper.between is not None
        or not isinstance(rate, (mx.array, _ext.Schedule))
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
    hyper: Hyper,
    options: Options,
    scalars: list[Any],
    scale: Any,
    flags: int | None = None,
    **more: Any,
) -> _ext.Options:
    """As the extension takes them: the scalars are learning rate, weight decay, scale of the
    gradients and the rule's own; the flags all that the options ask for, or some of them."""
    return _ext.Options(
        rule=hyper.rule.number,
        scalars=scalars,
        flags=flags_of(hyper, options, scale) if flags is None else flags,
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


class Arranged(NamedTuple):
    """Tensors of a step in the order of its arenas."""

    tree: _ext.Tree
    numbers: list[int] | None = None  # in the tree that they are of; None if this is it

    def leaves(self, updated: list[mx.array]) -> list[mx.array]:
        """In the order of the tree that they are of."""
        if self.numbers is None:
            return updated
        places = dict(zip(self.numbers, updated, strict=True))
        return [places[number] for number in range(len(places))]

    def unflatten(self, whole: _ext.Tree, updated: Any) -> Any:
        return updated if self.numbers is None else whole.unflatten(self.leaves(updated))


# Numbers in their order, and its layout; None where they are in order already.
_orders: Recent[tuple[list[int], Layout | None]] = Recent(64)


def arranged(tree: _ext.Tree, hyper: Hyper) -> Arranged:
    """For a step of matrices those of one shape beside each other, and the vectors last."""
    if hyper.between is None:
        return Arranged(tree)
    layout = layout_of(tree)
    found = _orders.find(layout.key)
    if found is None:
        rows = layout.tensors
        first: dict[tuple[int, ...], int] = {}
        for number, (_, shape, _) in enumerate(rows):
            first.setdefault(shape, number)
        order = sorted(range(len(rows)), key=lambda i: (len(rows[i][1]) < 2, first[rows[i][1]], i))
        is_sorted = order == [*range(len(rows))]
        own = None if is_sorted else layout_of_rows([rows[i] for i in order])
        found = _orders.keep(layout.key, (order, own))
    numbers, own = found
    if own is None:  # of a part too, whose layout is not the usual one
        return Arranged(tree)
    return Arranged(tree.part(numbers, own.made), numbers)


# Of a step in two passes: what is the second's, and what both have.
_MASTERS = _ext.FLAGS["master_weights"] | _ext.FLAGS["compensated"]  # both: masters of 24 bits
_OF_UPDATE = _MASTERS | _ext.FLAGS["decoupled"] | _ext.FLAGS["ema"]
_OF_BOTH = sum(_ext.FLAGS[f] for f in ("groups", "skip_nonfinite", "stochastic"))


def _two_passes(
    take: Callable[..., Any],
    tree: _ext.Tree,
    slots: list[list[mx.array]],
    flags: int,
    measured: list[mx.array],
    between: Callable[[list[mx.array]], list[mx.array]],
) -> tuple[Any, ...]:
    """What one pass gives: the first makes directions of the gradients and keeps the rule's
    slots, the second takes for gradients what ``between`` makes of them."""
    decay, decoupled, master = map(
        _ext.FLAGS.__getitem__, ("weight_decay", "decoupled", "master_weights")
    )
    second = flags & (_OF_UPDATE | _OF_BOTH | (decay if flags & decoupled else 0))
    first = flags & ~second | flags & _OF_BOTH | _ext.FLAGS["direction"]
    if flags & master and first & decay:  # which is that of the masters
        first |= flags & _MASTERS
    last = RULE_PLACES + bool(first & master)
    none: list[list[mx.array]] = [[] for _ in slots]

    directions, own, _, _, *counts = take(tree, slots[:last] + none[last:], first, measured)
    slots = own[:last] + slots[last:]
    measured = [] if counts[0] is None else counts
    tree = tree.with_gradients(between(directions))
    kept = none[:RULE_PLACES] + slots[RULE_PLACES:]
    updated, kept, step, used, *_ = take(tree, kept, second, measured)
    return updated, slots[:RULE_PLACES] + kept[RULE_PLACES:], step, used, *counts


def measured_step(
    op: str,
    tree: _ext.Tree,
    state: _packing.State,
    hyper: Hyper,
    options: Options,
    scale: LearningRate,
) -> list[mx.array]:
    """What a step measures of its gradients, for steps of parts of the tree; ``scale`` is a
    number."""
    state = _packing.with_counters(_packing.with_step(state), options.skip_nonfinite, op)
    skipped = state["skipped"] if options.skip_nonfinite else None
    scalars: list[Any] = [0.0, 0.0, scale, *[0.0] * len(hyper.rule.scalars)]
    made = options_of(hyper, options, scalars, scale, skipped=skipped, op=op)
    return _ext.measure_step(tree, state["step"], made)


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
    measured: list[mx.array] | None = None,
) -> tuple[Any, _packing.State, dict[str, mx.array]]:
    """The updated tree of parameters, the next state, and the values of this step of the
    hyperparameters that are scheduled; ``state`` is left as it is. With ``packs``, what it
    lacks for these tensors begins; else it is an error. ``measured`` is of more gradients.

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
            value = hyper.rule.value_at(state["step"], op, name, value)
            scalars[name] = scheduled[name] = value

    whole, order = tree, arranged(tree, hyper)
    tree = order.tree
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
                f"[{op}] the state does not have {' and '.join(wanted.slots)} for these "
                "parameters: got the state of other parameters, or of steps with other options; "
                f"allowed one from {op.removesuffix('_step')}_init(parameters, state=..., and the "
                "options of the step)."
            )
        state = _packing.packed(state, tree, layout, wanted, parameters, op)
        arenas = _packing.arenas_of(state, layout, wanted, op) or []
    if options.is_measured:
        state = _packing.with_counters(state, options.skip_nonfinite, op)

    kernel_slots: list[list[mx.array]] = [[] for _ in range(RULE_PLACES + len(FRAME_SLOTS))]
    for place, arrays in zip(hyper.rule.places, arenas, strict=True):
        kernel_slots[place] = arrays

    def take(tree: _ext.Tree, slots: Any, flags: int, measured: list[mx.array]) -> Any:
        made = options_of(
            hyper,
            options,
            list(scalars.values()),
            scale,
            flags,
            groups=groups,
            group_numbers=numbers,
            skipped=state.get("skipped") if options.skip_nonfinite else None,
            measured=measured,
            op=op,
        )
        return _ext.fused_step(tree, layout.made, slots, state["step"], made, stream=stream)

    flags = flags_of(hyper, options, scale)
    if hyper.between is None or not has_matrices(layout):
        taken = take(tree, kernel_slots, flags, measured or [])
    else:
        between = partial(hyper.between.updates, layout=layout, stream=stream)
        taken = _two_passes(take, tree, kernel_slots, flags, measured or [], between)
    updated, slots, step, used, norm, skipped = taken
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
    if norm is not None:
        state["grad_norm"] = _ext.arena_view(norm, [], 0, stream=stream)
        if options.skip_nonfinite:
            state["skipped"] = skipped
    return order.unflatten(whole, updated), state, scheduled
