"""The options of a full step: what SGD does beyond mlx.optimizers.SGD. One truth for their
checks, for the optimizer and the functions."""

from __future__ import annotations

import math
from functools import cached_property
from typing import Any, NamedTuple

import mlx.core as mx

from . import _ext
from ._checks import (
    LearningRate,
    checked_flag,
    checked_number,
    checked_positive,
    checked_scalar,
)
from ._groups import NO_GROUPS, Groups, checked_groups
from .schedules._checks import LARGEST_UINT64, as_choice, as_integer
from .schedules._of_mlx import as_ours

DTYPES = {"float32": mx.float32, "float16": mx.float16, "bfloat16": mx.bfloat16}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
# Below it the reciprocal is beyond float32.
SMALLEST_SCALE = 2.0**-126


def dtype_name(dtype: mx.Dtype) -> str:
    return _NAMES[dtype]


class _Fields(NamedTuple):
    momentum_dtype: mx.Dtype | None = None
    master_weights: bool = False
    rounding: str = "nearest"
    compensated: bool = False
    seed: int = 0
    clip_norm: float | None = None
    clip_value: float | None = None
    grad_scale: LearningRate = 1.0
    skip_nonfinite: bool = False
    decoupled: bool = False
    maximize: bool = False
    groups: Groups = NO_GROUPS
    trust_coefficient: float | None = None
    ema_decay: float | None = None


class Options(_Fields):
    """Checked options; without arguments those of the plain step."""

    def __reduce__(self) -> tuple[Any, ...]:
        """Copied and pickled with the name of a dtype, which itself cannot be."""
        dtype, *others = self
        return _copied, (dtype and dtype_name(dtype), *others)

    @cached_property
    def flags(self) -> int:
        """Bits of _ext.FLAGS, but for grad_scale, which a step may be given, and for the terms
        that only groups have."""
        present = {
            "maximize": self.maximize,
            "clip_value": self.clip_value is not None,
            # Infinite: told, and nothing is clipped.
            "clip_norm": self.clip_norm not in (None, math.inf),
            "measure_norm": self.clip_norm == math.inf,
            "skip_nonfinite": self.skip_nonfinite,
            "trust_ratio": self.trust_coefficient is not None,
            "groups": bool(self.groups.members),
            "decoupled": self.decoupled,
            "master_weights": self.master_weights,
            "compensated": self.compensated,
            "stochastic": self.rounding == "stochastic",
            "ema": self.ema_decay is not None,
        }
        return sum(_ext.FLAGS[name] for name, is_on in present.items() if is_on)

    @cached_property
    def is_measured(self) -> bool:
        """Whether a step needs the norms of the gradients first."""
        names = ("clip_norm", "measure_norm", "skip_nonfinite", "trust_ratio")
        flags = self.flags | self.groups.added_flags
        return bool(flags & sum(_ext.FLAGS[name] for name in names))

    @cached_property
    def slots(self) -> tuple[str, ...]:
        """What the state keeps besides momentum, in the order of _packing.SLOTS."""
        kept = {
            "master": self.master_weights,
            "compensation": self.compensated,
            "ema": self.ema_decay is not None,
        }
        return tuple(name for name, is_on in kept.items() if is_on)


def _copied(dtype: str | None, *others: Any) -> Options:
    return Options(DTYPES[dtype] if dtype else None, *others)


class Option:
    """An attribute of an optimizer that is one of its options: checked when it is set."""

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = name

    def __get__(self, instance: Any, owner: type) -> Any:
        if instance is None:
            return self
        value = getattr(instance._options, self._name)
        return value.given() if isinstance(value, Groups) else value

    def __set__(self, instance: Any, value: Any) -> None:
        options = {**instance._options._asdict(), self._name: value}
        instance._options = checked_options("SGD", **options)


def checked_options(op: str, **options: Any) -> Options:
    """Options that make sense, or ValueError or TypeError."""
    given = Options(**options)
    dtype = given.momentum_dtype
    if dtype is not None and dtype not in DTYPES.values():
        raise ValueError(
            f"[{op}] momentum_dtype is unknown: got {dtype}, allowed None, "
            f"{', '.join('mlx.core.' + name for name in DTYPES)}."
        )
    master_weights = checked_flag(op, "master_weights", given.master_weights)
    compensated = checked_flag(op, "compensated", given.compensated)
    if master_weights and compensated:
        raise ValueError(
            f"[{op}] master_weights and compensated both keep what rounding loses: got both, "
            "allowed one of them."
        )
    clip_norm = given.clip_norm
    if clip_norm is not None:
        clip_norm = checked_positive(op, "clip_norm", clip_norm, infinite=True)
    clip_value = given.clip_value
    if clip_value is not None:
        clip_value = checked_positive(op, "clip_value", clip_value, infinite=True)
    trust_coefficient = given.trust_coefficient
    if trust_coefficient is not None:
        trust_coefficient = checked_positive(op, "trust_coefficient", trust_coefficient)
    return Options(
        momentum_dtype=dtype,
        master_weights=master_weights,
        rounding=as_choice(op, "rounding", given.rounding, ("nearest", "stochastic")),
        compensated=compensated,
        seed=as_integer(op, "seed", given.seed, at_least=0, at_most=LARGEST_UINT64),
        clip_norm=clip_norm,
        clip_value=clip_value,
        grad_scale=checked_scale(op, given.grad_scale),
        skip_nonfinite=checked_flag(op, "skip_nonfinite", given.skip_nonfinite),
        decoupled=checked_flag(op, "decoupled", given.decoupled),
        maximize=checked_flag(op, "maximize", given.maximize),
        groups=checked_groups(op, given.groups),
        trust_coefficient=trust_coefficient,
        ema_decay=_checked_decay(op, given.ema_decay),
    )


def checked_scale(op: str, value: Any) -> LearningRate:
    """What gradients were multiplied with: a float, a scalar array or a callable."""
    if callable(value):
        return as_ours(value)
    if isinstance(value, mx.array):
        return checked_scalar(op, "grad_scale", value)
    checked_number(op, "grad_scale", value, "a float, a scalar array, a schedule or a callable")
    return checked_positive(op, "grad_scale", value, at_least=SMALLEST_SCALE)


def _checked_decay(op: str, value: Any) -> float | None:
    if value is None:
        return None
    number = checked_number(op, "ema_decay", value, "a float or None")
    if not 0 <= number < 1:
        stays = ", at which an average never moves" if number == 1 else ""
        raise ValueError(
            f"[{op}] ema_decay is out of range: got {number}{stays}, allowed 0 to below 1."
        )
    return number
