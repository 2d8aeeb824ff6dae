"""The full step through the extension itself, where every option can meet every other:
what options there are, what a state is, and one call.

The optimizer refuses some combinations and fixes others; the kernels know no such limits,
and these tests are about the kernels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np
from bits import DTYPES, dtype_name, narrowed, to_mlx
from byte_references import BYTE_FORMATS
from rules import RULES, SIGNED, slots_of

STATE_DTYPES = {None: None, **DTYPES, "8bit": mx.uint8}
# What the frame keeps of an element, behind the rule's own (rules.py).
FRAME_SLOTS = ("master", "compensation", "average")
RULE_PLACES = 3
# The scalars of every rule, before its own.
FRAME_SCALARS = ("learning_rate", "weight_decay", "grad_scale")


class Group(NamedTuple):
    """Of some tensors: a scalar is times * (the step's) + plus, and what they are without."""

    rate: tuple[float, float] = (1.0, 0.0)
    weight_decay: tuple[float, float] = (1.0, 0.0)
    trust_coefficient: float = 0.0
    rule: tuple[tuple[float, float], ...] = ()  # of the rule's own, in order
    without: tuple[str, ...] = ()

    def own(self, number: int) -> tuple[float, float]:
        return self.rule[number] if number < len(self.rule) else (1.0, 0.0)

    def row(self, rule: str) -> list[float]:
        """As _ext.GROUP_NUMBERS counts: a scalar of the rule with the second part of what is
        added, and with what is added to 1 - scalar."""
        row = [*self.rate, *self.weight_decay, self.trust_coefficient]
        for number in range(RULE_PLACES):
            times, plus = self.own(number) if number < len(RULES[rule].scalars) else (1.0, 0.0)
            row += [times, plus, plus - float(np.float32(plus)), 1 - times - plus]
        return row


@dataclass(frozen=True)
class Full:
    """The rule and the options of a step; None and False are a step without. Tensor t is in
    the group t modulo their number."""

    rule: str = "sgd"
    momentum: float | None = None
    dampening: float = 0.0
    nesterov: bool = False
    beta1: float = 0.9
    beta2: float = 0.999
    alpha: float = 0.99
    rho: float = 0.9
    eps: float = 1e-3
    bias_correction: bool = False
    amsgrad: bool = False
    weight_decay: float | None = None
    decoupled: bool = False
    maximize: bool = False
    grad_scale: float | None = None
    clip_value: float | None = None
    clip_norm: float | None = None
    skip_nonfinite: bool = False
    measure_norm: bool = False  # clip_norm=inf
    trust_coefficient: float | None = None
    groups: tuple[Group, ...] | None = None
    master_weights: bool | str = False  # or "24bit", of bfloat16 and float32 only
    compensated: bool = False
    stochastic: bool = False
    seed: int = 0
    ema_decay: float | None = None
    state_dtype: str | None = None
    direction: bool = False  # arenas of what the rule makes of the gradients, in float32
    pack: bool = False  # with direction: in the parameters' dtypes

    @property
    def flags(self) -> set[str]:
        """By the names of the extension's FLAGS, and of the rule's."""
        present = {
            "momentum": self.momentum is not None,
            "nesterov": self.nesterov,
            "bias_correction": self.bias_correction,
            "amsgrad": self.amsgrad,
            "weight_decay": self.weight_decay is not None,
            "maximize": self.maximize,
            "grad_scale": self.grad_scale is not None,
            "clip_value": self.clip_value is not None,
            "clip_norm": self.clip_norm is not None,
            "measure_norm": self.measure_norm,
            "skip_nonfinite": self.skip_nonfinite,
            "trust_ratio": self.trust_coefficient is not None,
            "groups": self.groups is not None,
            "decoupled": self.decoupled,
            "master_weights": bool(self.master_weights),
            "compensated": self.compensated or self.has_master24,
            "stochastic": self.stochastic,
            "ema": self.ema_decay is not None,
            "direction": self.direction,
            "pack": self.pack,
        }
        for other in RULES.values():
            for name in set(other.flags) - set(RULES[self.rule].flags):
                present.pop(name, None)
        return {name for name, value in present.items() if value}

    @property
    def has_master24(self) -> bool:
        return self.master_weights == "24bit"

    @property
    def is_measured(self) -> bool:
        return bool(self.flags & {"clip_norm", "measure_norm", "skip_nonfinite", "trust_ratio"})

    @property
    def places(self) -> tuple[str, ...]:
        """The names of the six slots of a step; those that a rule does not have are empty."""
        own = RULES[self.rule].slots
        return (*own, *[""] * (RULE_PLACES - len(own)), *FRAME_SLOTS)

    @property
    def scalar_names(self) -> tuple[str, ...]:
        return (*FRAME_SCALARS, *RULES[self.rule].scalars)

    @property
    def scalars(self) -> dict[str, float]:
        """What is constant, in the order of the kernel; the rate of a step is its argument."""
        absent = {"learning_rate": 0.0, "weight_decay": 0.0, "grad_scale": 1.0, "momentum": 0.0}
        values = {name: getattr(self, name, None) for name in self.scalar_names}
        return {k: absent[k] if value is None else value for k, value in values.items()}

    def out_dtype(self, dtype: str) -> str:
        """Of what a step puts out in the place of a parameter."""
        return "float32" if self.direction and not self.pack else dtype

    def slot_dtype(self, slot: str, dtype: str) -> str | None:
        """The dtype of a slot of the tensors of ``dtype``; None where they have none."""
        half = dtype != "float32"
        if slot == "master":
            kept = "int8" if self.has_master24 else "float32"
            return kept if self.master_weights and half else None
        if slot == "compensation":
            return dtype if self.compensated and half else None
        if slot == "average":
            return None if self.ema_decay is None else "float32"
        has = slot in slots_of(self.rule, self.flags)
        if has and self.state_dtype == "8bit":
            return "bytes" if slot in SIGNED else "squares"
        return self.state_dtype or dtype if has else None


class State(NamedTuple):
    """What a step gives besides the parameters. ``used`` and ``measured`` are of the last
    step only, ``used`` None where nothing depends on the step."""

    slots: list[list[mx.array]]
    step: mx.array
    skipped: mx.array | None = None
    used: mx.array | None = None
    measured: mx.array | None = None


def layout_of(parameters: Sequence[mx.array]) -> Any:
    from mlx_fused_optim import _ext

    return _ext.Layout([(("w", i), p.shape, p.dtype) for i, p in enumerate(parameters)])


def first_state(options: Full, parameters: Sequence[mx.array], step: int = 0) -> State:
    """Zeros, and masters and averages of the parameters."""
    slots: list[list[mx.array]] = [[] for _ in options.places]
    for dtype, shape, tensors, offsets, _ in layout_of(parameters).arenas:
        for number, slot in enumerate(options.places):
            name = options.slot_dtype(slot, dtype_name(dtype))
            if name is None:
                continue
            flat = np.zeros(int(np.prod(shape)), np.float32)
            if slot == "average" or (slot == "master" and name == "float32"):
                for tensor, offset in zip(tensors, offsets, strict=True):
                    values = np.array(parameters[tensor].astype(mx.float32)).reshape(-1)
                    flat[offset : offset + values.size] = values
            bits = to_mlx(narrowed(flat, name), name)
            slots[number].append(bits if name in BYTE_FORMATS else bits.reshape(shape))
    # From NumPy: MLX takes no number above 2^63 - 1.
    return State(slots, mx.array(np.array(step, np.uint64)), mx.array(0, mx.uint64))


def full_step(
    options: Full,
    parameters: Sequence[mx.array],
    gradients: Sequence[mx.array],
    state: State,
    learning_rate: Any,
    *,
    stream: Any = None,
    **scalars: Any,
) -> tuple[list[mx.array], State]:
    """One step. The scalars by keyword (arrays, schedules) are in place of the options'."""
    from mlx_fused_optim import _ext

    tree = _ext.Tree({"w": list(gradients)}, {"w": list(parameters)}, "test")
    number, rule = next((i, r) for i, r in enumerate(_ext.RULES) if r["name"] == options.rule)
    bits = {**_ext.FLAGS, **rule["flags"]}
    groups = numbers = None
    if options.groups is not None:
        own = ("weight_decay", "trust_ratio", *rule["flags"])
        groups = _ext.Groups(
            [t % len(options.groups) for t in range(len(parameters))],
            [
                sum(bits[name] for name in own if name not in group.without)
                for group in options.groups
            ],
        )
        numbers = mx.array([group.row(options.rule) for group in options.groups], mx.float32)

    values = {**options.scalars, "learning_rate": learning_rate, **scalars}
    assert values.keys() == options.scalars.keys()
    stepped, slots, step, used, measured, skipped = _ext.fused_step(
        tree,
        _ext.Layout(tree),
        state.slots,
        state.step,
        _ext.Options(
            rule=number,
            scalars=list(values.values()),
            flags=sum(bits[name] for name in options.flags),
            clip_value=options.clip_value or 0.0,
            clip_norm=options.clip_norm or 0.0,
            trust_coefficient=options.trust_coefficient or 0.0,
            ema_decay=options.ema_decay or 0.0,
            seed=options.seed,
            state_dtype=STATE_DTYPES[options.state_dtype],
            groups=groups,
            group_numbers=numbers,
            skipped=state.skipped,
        ),
        stream=stream,
    )
    if options.direction:
        stepped = {"w": _tensors(_ext.Layout(tree), stepped, options)}
    return stepped["w"], State(slots, step, skipped, used, measured)


def _tensors(layout: Any, arenas: Sequence[mx.array], options: Full) -> list[mx.array]:
    """In the dtype that the arenas must have."""
    from mlx_fused_optim import _ext

    for arena, row in zip(arenas, layout.arenas, strict=True):
        dtype = DTYPES[options.out_dtype(dtype_name(row[0]))]
        assert (arena.dtype, arena.shape) == (dtype, row[1])
    return _ext.tensors_of(arenas, layout)
