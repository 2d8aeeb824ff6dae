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
from bits import DTYPES, dtype_name

SLOTS = ("velocity", "master", "compensation", "average")


class Group(NamedTuple):
    """Of some tensors: a scalar is times * (the step's) + plus, and what they are without."""

    rate: tuple[float, float] = (1.0, 0.0)
    momentum: tuple[float, float] = (1.0, 0.0)
    weight_decay: tuple[float, float] = (1.0, 0.0)
    trust_coefficient: float = 0.0
    without: tuple[str, ...] = ()

    @property
    def row(self) -> tuple[float, ...]:
        return (*self.rate, *self.momentum, *self.weight_decay, self.trust_coefficient)


@dataclass(frozen=True)
class Full:
    """The options of a step; None and False are a step without. Tensor t is in the group
    t modulo their number."""

    momentum: float | None = None
    dampening: float = 0.0
    nesterov: bool = False
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
    master_weights: bool = False
    compensated: bool = False
    stochastic: bool = False
    seed: int = 0
    ema_decay: float | None = None
    momentum_dtype: str | None = None

    @property
    def flags(self) -> set[str]:
        """By the names of the extension's FLAGS."""
        present = {
            "momentum": self.momentum is not None,
            "nesterov": self.nesterov,
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
            "master_weights": self.master_weights,
            "compensated": self.compensated,
            "stochastic": self.stochastic,
            "ema": self.ema_decay is not None,
        }
        return {name for name, value in present.items() if value}

    @property
    def is_measured(self) -> bool:
        return bool(self.flags & {"clip_norm", "measure_norm", "skip_nonfinite", "trust_ratio"})

    def slot_dtype(self, slot: str, dtype: str) -> str | None:
        """The dtype of a slot of the tensors of ``dtype``; None where they have none."""
        half = dtype != "float32"
        if slot == "velocity":
            return None if self.momentum is None else self.momentum_dtype or dtype
        if slot == "master":
            return "float32" if self.master_weights and half else None
        if slot == "compensation":
            return dtype if self.compensated and half else None
        return None if self.ema_decay is None else "float32"


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
    slots: list[list[mx.array]] = [[] for _ in SLOTS]
    for dtype, shape, tensors, offsets in layout_of(parameters).arenas:
        for number, slot in enumerate(SLOTS):
            name = options.slot_dtype(slot, dtype_name(dtype))
            if name is None:
                continue
            flat = np.zeros(int(np.prod(shape)), np.float32)
            if slot in ("master", "average"):
                for tensor, offset in zip(tensors, offsets, strict=True):
                    values = np.array(parameters[tensor].astype(mx.float32)).reshape(-1)
                    flat[offset : offset + values.size] = values
            slots[number].append(mx.array(flat).astype(DTYPES[name]).reshape(shape))
    # From NumPy: MLX takes no number above 2^63 - 1.
    return State(slots, mx.array(np.array(step, np.uint64)), mx.array(0, mx.uint64))


def full_step(
    options: Full,
    parameters: Sequence[mx.array],
    gradients: Sequence[mx.array],
    state: State,
    learning_rate: Any,
    *,
    momentum: Any = None,
    weight_decay: Any = None,
    grad_scale: Any = None,
    stream: Any = None,
) -> tuple[list[mx.array], State]:
    """One step. The scalars by keyword (arrays, schedules) are in place of the options'."""
    from mlx_fused_optim import _ext

    tree = _ext.Tree({"w": list(gradients)}, {"w": list(parameters)}, "test")
    flags = sum(_ext.FLAGS[name] for name in options.flags)
    groups = numbers = None
    if options.groups is not None:
        own = ("momentum", "nesterov", "weight_decay", "trust_ratio")
        groups = _ext.Groups(
            [t % len(options.groups) for t in range(len(parameters))],
            [
                sum(_ext.FLAGS[name] for name in own if name not in group.without)
                for group in options.groups
            ],
        )
        numbers = mx.array([group.row for group in options.groups], mx.float32)

    def number(given: Any, own: float | None, absent: float) -> Any:
        return given if given is not None else absent if own is None else own

    stepped, slots, step, used, measured, skipped = _ext.sgd_step(
        tree,
        _ext.Layout(tree),
        state.slots,
        state.step,
        learning_rate=learning_rate,
        momentum=number(momentum, options.momentum, 0.0),
        weight_decay=number(weight_decay, options.weight_decay, 0.0),
        grad_scale=number(grad_scale, options.grad_scale, 1.0),
        dampening=options.dampening,
        flags=flags,
        clip_value=options.clip_value or 0.0,
        clip_norm=options.clip_norm or 0.0,
        trust_coefficient=options.trust_coefficient or 0.0,
        ema_decay=options.ema_decay or 0.0,
        seed=options.seed,
        momentum_dtype=DTYPES[options.momentum_dtype] if options.momentum_dtype else None,
        groups=groups,
        group_numbers=numbers,
        skipped=state.skipped,
        stream=stream,
    )
    return stepped["w"], State(slots, step, skipped, used, measured)
