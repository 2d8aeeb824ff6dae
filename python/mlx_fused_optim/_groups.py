"""Groups of tensors that differ from the others: which tensor is in which, and their numbers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any, NamedTuple

import mlx.core as mx

from . import _ext
from ._checks import checked_factor, checked_positive, checked_scalar, least_of
from ._layout import Layout
from ._paths import leaves, name_of
from ._recent import Recent
from ._rules import ANY, RULE_PLACES, Rule
from .schedules import Schedule
from .schedules._of_mlx import as_ours

Predicate = Callable[[str, mx.array], Any]
GroupList = Sequence[tuple[Predicate, dict[str, Any]]]

# Overrides of any rule; beside them those that are named like its scalars, and LARS's ratio.
KEYS = ("learning_rate", "learning_rate_factor", "weight_decay")
# A row of numbers, see StepGroup in csrc/math/frame.h: what the step's own is multiplied with,
# then what is added.
COLUMNS = {"learning_rate": 0, "weight_decay": 2}
TRUST_COEFFICIENT = 4
FIRST_SCALAR, SCALAR_NUMBERS = 5, 4
SGD_FLAGS = next(row["flags"] for row in _ext.RULES if row["name"] == "sgd")
# Overrides that decide whether a tensor has a term at all, and the bit of that term.
TERMS = {
    "momentum": SGD_FLAGS["momentum"],
    "weight_decay": _ext.FLAGS["weight_decay"],
    "trust_coefficient": _ext.FLAGS["trust_ratio"],
}


RULE_FLAGS = max(sum(row["flags"].values()) for row in _ext.RULES)  # two bits, each rule's own


class Member(NamedTuple):
    """One group: checked overrides."""

    predicate: Predicate
    overrides: dict[str, Any]


class Groups:
    """All groups. A tensor that no predicate takes is in row 0, which changes nothing."""

    def __init__(self, members: tuple[Member, ...] = ()):
        self.members = members
        # What is found once: the row of each tensor, by layout; what the kernel is given, by
        # layout and flags; the numbers, where no group has a scheduled one.
        self.rows: Recent[list[int]] = Recent(16)
        self.made: Recent[_ext.Groups] = Recent(16)
        self.numbers: dict[float | None, mx.array] = {}

    def given(self) -> GroupList:
        """As somebody wrote them."""
        return [(predicate, dict(overrides)) for predicate, overrides in self.members]

    def __reduce__(self) -> tuple[Any, ...]:
        """Copied and pickled without what is found again."""
        return _groups_of, (self.members,)

    @cached_property
    def added_flags(self) -> int:
        """Terms that a group has, whatever the other tensors have."""
        bits = 0
        for member in self.members:
            for key, term in TERMS.items():
                if _is_term(member.overrides.get(key)):
                    bits |= term
        return bits


def _is_term(value: Any) -> bool:
    """Whether an override is there and is not a constant 0: a scheduled one is a term even
    where its value is 0, and so is an array, whose value nobody knows yet."""
    return value is not None and (isinstance(value, mx.array) or callable(value) or value != 0)


NO_GROUPS = Groups()


def _groups_of(members: tuple[Member, ...]) -> Groups:
    return Groups(members) if members else NO_GROUPS


def checked_groups(op: str, rule: Rule, groups: Any) -> Groups:
    """``[(predicate, overrides), ...]`` checked."""
    if isinstance(groups, Groups):
        return groups
    if not isinstance(groups, (list, tuple)):
        raise TypeError(
            f"[{op}] groups is of the wrong type: got {type(groups).__name__}, allowed a list of "
            "(predicate, overrides)."
        )
    members = tuple(_checked_member(op, rule, number, group) for number, group in enumerate(groups))
    return _groups_of(members)


# The functions are given their groups at each step; what was found for them stays here.
_known: Recent[Groups] = Recent(16)


def known_groups(rule: Rule, groups: Groups) -> Groups:
    """Equal groups that were here before, or these."""
    key = (rule.name, *(_identity(member) for member in groups.members))
    return _known.find(key) or _known.keep(key, groups)


def _identity(member: Member) -> tuple[Any, ...]:
    """Equal for equal groups only: numbers by value, and the rest by the identity of what the
    known groups keep alive."""
    overrides = (
        (key, value if value is None or isinstance(value, float) else id(value))
        for key, value in member.overrides.items()
    )
    return (id(member.predicate), *overrides)


def _checked_member(op: str, rule: Rule, number: int, group: Any) -> Member:
    if not isinstance(group, (list, tuple)) or len(group) != 2:
        raise TypeError(
            f"[{op}] group {number} is of the wrong type: got {group!r}, allowed a pair "
            "(predicate, overrides)."
        )
    predicate, overrides = group
    if not callable(predicate):
        raise TypeError(
            f"[{op}] the predicate of group {number} cannot be called: got "
            f"{type(predicate).__name__}, allowed a function of path and array."
        )
    if not isinstance(overrides, dict):
        raise TypeError(
            f"[{op}] the overrides of group {number} are of the wrong type: got "
            f"{type(overrides).__name__}, allowed a dict."
        )
    pair = ("betas",) if "beta1" in rule.scalars else ()
    ratio = ("trust_coefficient",) if rule.name == "sgd" else ()
    allowed = (*KEYS, *pair, *rule.scalars, *ratio)
    if pair and "betas" in overrides:
        named = named_betas(op, overrides["betas"], f"betas of group {number}")
        overrides = {**overrides, **named}
        del overrides["betas"]
    for key in overrides:
        if key not in allowed:
            raise ValueError(
                f"[{op}] group {number} overrides what no group can: got {key!r}, allowed "
                f"{', '.join(allowed)}."
            )
    if "learning_rate" in overrides and "learning_rate_factor" in overrides:
        raise ValueError(
            f"[{op}] group {number} has two learning rates: got learning_rate and "
            "learning_rate_factor, allowed one of them."
        )
    checked = {key: _checked_override(op, rule, number, key, v) for key, v in overrides.items()}
    return Member(predicate, checked)


def _checked_override(op: str, rule: Rule, number: int, key: str, value: Any) -> Any:
    name = f"{key} of group {number}"
    if key == "trust_coefficient":
        return None if value is None else checked_positive(op, name, value)
    if key == "learning_rate_factor":
        return checked_factor(op, name, value, "a float", least_of(key))
    if callable(value):
        return as_ours(value)
    if isinstance(value, mx.array):
        return checked_scalar(op, name, value)
    return rule.ranges.get(key, ANY).checked(op, name, value)


def rows_of(groups: Groups, layout: Layout, tree: _ext.Tree, whole: Any, op: str) -> list[int]:
    """The row of each tensor of the layout, found once for it. ``whole`` is the tree that has
    these tensors and maybe more; of the first one each group must have a tensor, because a
    predicate that takes none is most likely misspelt."""
    rows = groups.rows.find(layout.key)
    if rows is not None:
        return rows
    paths = [name_of(path) for path, _, _ in layout.tensors]
    rows = [_row(groups, path, p) for path, p in zip(paths, tree.parameters, strict=True)]
    if not groups.rows:
        arrays = ((path, a) for path, a in leaves(whole) if isinstance(a, mx.array))
        others = (_row(groups, name_of(path), a) for path, a in arrays)
        taken = {*rows, *others}
        for number in range(len(groups.members)):
            if number + 1 not in taken:
                raise ValueError(
                    f"[{op}] group {number} has no tensor: got a predicate that takes none of "
                    f"those that no group before it takes, such as "
                    f"'{paths[0] if paths else ''}', allowed one that takes a tensor."
                )
    return groups.rows.keep(layout.key, rows)


def _row(groups: Groups, path: str, array: mx.array) -> int:
    for number, member in enumerate(groups.members):
        if member.predicate(path, array):
            return number + 1
    return 0


def for_kernel(groups: Groups, key: str, rows: list[int], flags: int) -> _ext.Groups:
    """The rows, and which terms the tensors of each row have. ``flags`` are those of the step
    without groups."""
    made = groups.made.find((key, flags))
    return made or groups.made.keep((key, flags), _ext.Groups(rows, _flags_of(groups, flags)))


def _flags_of(groups: Groups, flags: int) -> list[int]:
    # All that a tensor may be without; bits of the rule mean nothing without their term.
    own = flags & (RULE_FLAGS | sum(list(TERMS.values())[1:]))
    result = [own]
    for _, overrides in groups.members:
        row = own
        for key, term in TERMS.items():
            if key in overrides:
                row &= ~term
                row |= term if _is_term(overrides[key]) else 0
        result.append(row)
    return result


def numbers_of(
    groups: Groups,
    rule: Rule,
    trust_coefficient: float | None,
    step: mx.array,
    op: str,
    stream: Any,
) -> mx.array:
    """A row for each group."""
    numbers = groups.numbers.get(trust_coefficient)
    if numbers is not None:
        return numbers
    usual = [1.0, 0.0, 1.0, 0.0, trust_coefficient or 0.0]
    usual += [1.0, 0.0, 0.0, 0.0] * RULE_PLACES
    rows: list[list[Any]] = [usual]
    for number, (_, overrides) in enumerate(groups.members):
        row = list(usual)
        row[0] = overrides.get("learning_rate_factor", 1.0)
        for key, value in overrides.items():
            if key in COLUMNS or key in rule.scalars:
                if isinstance(value, Schedule):
                    value = value(step)
                elif callable(value):
                    value = rule.value_at(step, op, key, value, f"{key} of group {number}")
            if key in COLUMNS:
                row[COLUMNS[key] : COLUMNS[key] + 2] = [0.0, value]
            elif key in rule.scalars:
                at = FIRST_SCALAR + SCALAR_NUMBERS * rule.scalars.index(key)
                row[at : at + SCALAR_NUMBERS] = _own_scalar(value, stream)
        if "trust_coefficient" in overrides:
            row[TRUST_COEFFICIENT] = overrides["trust_coefficient"] or 0.0
        rows.append(row)
    flat = [value for row in rows for value in row]
    if not any(isinstance(value, mx.array) for value in flat):
        groups.numbers[trust_coefficient] = mx.array(rows, mx.float32)
        return groups.numbers[trust_coefficient]
    scalars = [
        value.astype(mx.float32, stream=stream) if isinstance(value, mx.array) else mx.array(value)
        for value in flat
    ]
    return mx.stack(scalars, stream=stream).reshape(len(rows), -1, stream=stream)


def found(
    groups: Groups, trust_coefficient: float | None, key: str, flags: int
) -> dict[str, Any] | None:
    """What the extension was given of the groups in the last step, where the next one is given
    the same; None where a group has a number on a schedule or in an array."""
    if not groups.members:
        return {}
    rows, numbers = groups.rows.find(key), groups.numbers.get(trust_coefficient)
    if rows is None or numbers is None:
        return None
    return {"groups": for_kernel(groups, key, rows, flags), "group_numbers": numbers}


def _own_scalar(value: Any, stream: Any) -> list[Any]:
    """What the rule's scalar is multiplied with, what is added to it in two parts, and to
    1 - scalar."""
    if isinstance(value, mx.array):
        value = value.astype(mx.float32, stream=stream)
        return [0.0, value, 0.0, mx.subtract(1.0, value, stream=stream)]
    single = mx.array(value).item()
    return [0.0, value, value - single, 1 - value]


def named_betas(op: str, betas: Any, name: str = "betas") -> dict[str, Any]:
    """A pair of factors by their names."""
    try:
        beta1, beta2 = betas
    except (TypeError, ValueError):
        raise ValueError(
            f"[{op}] {name} is not a pair: got {betas!r}, allowed two numbers."
        ) from None
    return {"beta1": beta1, "beta2": beta2}
