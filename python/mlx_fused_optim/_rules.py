"""What each rule has: the extension's table, and what Python adds to it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import mlx.core as mx

from . import _ext
from ._bytes import DTYPE
from ._checks import checked_number, checked_scalar
from ._dtypes import DTYPES
from .schedules._checks import LARGEST_FLOAT32

# What a rule's own slots may have: numbers, or rows of bytes.
OWN_DTYPES = (*DTYPES.values(), DTYPE)


class Slot(NamedTuple):
    """Something that is kept of each element of a parameter."""

    name: str
    key: str  # at a tensor's path, where mlx.optimizers has it
    dtype: mx.Dtype | None = None  # by default the parameter's
    dtypes: tuple[mx.Dtype, ...] = ()  # those that an option chooses from, if one does
    of_halves: bool = False  # only half types lose what it could keep
    begins_at_weights: bool = False  # instead of zeros
    lasts: bool = False  # through steps that do not keep it; the others would no longer be true
    is_unsigned: bool = False  # in bytes, its format is that of numbers without a sign


class Range(NamedTuple):
    """Which numbers an option may be."""

    least: float = 0.0
    most: float = LARGEST_FLOAT32
    is_open: tuple[bool, bool] = (False, False)

    def checked(
        self, op: str, name: str, value: Any, allowed: str = "a float, a schedule or a callable"
    ) -> float:
        number = checked_number(op, name, value, allowed)
        above = number > self.least if self.is_open[0] else number >= self.least
        below = number < self.most if self.is_open[1] else number <= self.most
        if not (above and below and math.isfinite(number)):
            words = (">" if self.is_open[0] else "") + f"{self.least:g} to "
            words += ("<" if self.is_open[1] else "") + f"{self.most:g}"
            raise ValueError(
                f"[{op}] {name} is out of range: got {number}, allowed {words}, finite."
            )
        return number


class Slots(dict[str, Slot]):
    """What an optimizer may keep, by name, in the order of its kernel."""

    def __init__(self, *slots: Slot, together: tuple[str, ...] = ()):
        super().__init__((slot.name, slot) for slot in slots)
        self.names = {slot.key: slot.name for slot in slots}
        self.together = together  # no state of this rule has only some of these


# What the frame may keep of an element, behind the rule's own.
FRAME_SLOTS = (
    Slot(
        "master",
        "master",
        mx.float32,
        (mx.float32, mx.int8),
        of_halves=True,
        begins_at_weights=True,
    ),
    Slot("compensation", "compensation", of_halves=True),
    Slot("ema", "ema", mx.float32, begins_at_weights=True),
)
# A rule's own slots have these places before them, whether it needs all or not.
RULE_PLACES = 3

ANY = Range(-LARGEST_FLOAT32)
FROM_ZERO = Range()
ABOVE_ZERO = Range(is_open=(True, False))
UNIT = Range(0.0, 1.0)
BELOW_ONE = Range(0.0, 1.0, (False, True))


RULES: dict[str, Rule] = {}


class Rule:
    """One rule of csrc/math/rules, by its name there: the range of each of its scalars, and where
    mlx.optimizers keeps a slot that has another name. Each optimizer has one."""

    def __init__(
        self,
        name: str,
        state_dtype: mx.Dtype | None = mx.float32,
        keys: Mapping[str, str] = MappingProxyType({}),
        **ranges: Range,
    ):
        self.number = next(i for i, row in enumerate(_ext.RULES) if row["name"] == name)
        row = _ext.RULES[self.number]
        self.name = name
        self.scalars: tuple[str, ...] = tuple(row["scalars"])
        if self.scalars != tuple(ranges):
            raise TypeError(f"[{name}] has scalars: got {(*ranges,)}, allowed {self.scalars}.")
        self.ranges = {**ranges, "weight_decay": ANY}
        self.flags: dict[str, int] = row["flags"]
        # Those that are options; the others follow from a number.
        self.choices = tuple(name for name in self.flags if name not in self.scalars)
        # Of half parameters: below float32 a second moment does not decay.
        self.state_dtype = state_dtype
        own = [
            Slot(slot, keys.get(slot, slot), dtypes=OWN_DTYPES, lasts=True, is_unsigned=is_unsigned)
            for slot, is_unsigned in zip(row["slots"], row["is_unsigned"], strict=True)
        ]
        self.own_slots = tuple(slot.name for slot in own)
        self.slots = Slots(*own, *FRAME_SLOTS, together=self.kept(0))
        # Of each slot, among those of the kernel.
        self.places = (*range(len(own)), *range(RULE_PLACES, RULE_PLACES + len(FRAME_SLOTS)))
        RULES[name] = self

    def kept(self, flags: int) -> tuple[str, ...]:
        """The slots of its own that a step with these flags keeps."""
        return self.own_slots[: _ext.rule_slots(self.number, flags)]

    def value_at(
        self,
        step: mx.array,
        op: str,
        name: str,
        function: Callable[[mx.array], Any],
        label: str = "",
    ) -> mx.array:
        """What a callable gives at a step. A number of Python's is checked as a constant is; an
        array's value is not looked at, as nothing waits for the device."""
        value = function(step)
        if name in self.ranges and isinstance(value, (int, float)):
            value = self.ranges[name].checked(op, label or name, value)
        return checked_scalar(op, label or name, value)

    def __reduce__(self) -> tuple[Any, ...]:
        return rule_named, (self.name,)


def rule_named(name: str) -> Rule:
    return RULES[name]


def all_slots() -> Slots:
    """Of a state of which nobody says whose it is."""
    rules = sorted(RULES.values(), key=lambda rule: rule.number)
    own = {name: rule.slots[name] for rule in rules for name in rule.own_slots}
    return Slots(*own.values(), *FRAME_SLOTS)
