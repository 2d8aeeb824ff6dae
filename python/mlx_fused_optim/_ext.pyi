"""The compiled part of mlx_fused_optim; its interface is internal."""

from collections.abc import Sequence
from typing import Any, overload

import mlx.core as mx

# To a tensor: keys of dicts, (number,) where that is an integer; a number for a place in a list.
Path = tuple[str | int | tuple[int], ...]

MAX_SEGMENTS: int
MAX_CYCLE_FACTOR: int
# Of a step: name -> bit, see StepFlags in csrc/math/frame.h; and the length of a group's row.
FLAGS: dict[str, int]
GROUP_NUMBERS: int
# The table of csrc/graph/rules.cpp; a rule is known by its place.
RULES: list[dict[str, Any]]

class Schedule:
    """A schedule in the form that the kernels evaluate."""

    def __call__(
        self,
        steps: mx.array,
        *,
        stream: mx.Stream | mx.ThreadLocalStream | mx.Device | mx.DeviceType | None = None,
    ) -> mx.array: ...
    @property
    def first_value(self) -> float: ...
    @property
    def natural_length(self) -> int: ...
    @property
    def segments(self) -> int: ...

def constant(value: float) -> Schedule: ...
def exponential_decay(
    init: float,
    decay_rate: float,
    transition_steps: int,
    transition_begin: int,
    staircase: bool,
    end: float | None,
) -> Schedule: ...
def blend(
    one: float,
    zero: float,
    steps: int,
    begin: int = 0,
    cosine: bool = False,
    rising: bool = False,
    power: float = 1.0,
) -> Schedule: ...
def inverse_power(peak: float, timescale: int, power: float) -> Schedule: ...
def cosine_restarts(init: float, end: float, first_cycle: int, factor: int) -> Schedule: ...
def triangular(
    base: float, peak: float, up: int, down: int, decay: float, decay_per_cycle: bool
) -> Schedule: ...
def join(schedules: Sequence[Schedule], boundaries: Sequence[int]) -> Schedule | None: ...
def scaled(schedule: Schedule, factor: float) -> Schedule: ...

class Outline:
    """What a tree is made of: see csrc/binding/outline.h."""

class Tree:
    """Gradients and their parameters, flattened in one pass."""

    def __init__(
        self,
        gradients: object | None,
        parameters: object | None,
        op: str,
        exact: bool = False,
        like: Outline | None = None,
    ) -> None: ...
    def __len__(self) -> int: ...
    def part(self, numbers: Sequence[int], layout: object) -> Tree: ...
    def with_gradients(self, gradients: Sequence[mx.array]) -> Tree: ...
    def unflatten(self, leaves: Sequence[mx.array]) -> object: ...
    @property
    def parameters(self) -> list[mx.array]: ...
    @property
    def gradients(self) -> list[mx.array]: ...
    @property
    def fingerprint(self) -> str: ...
    @property
    def outline(self) -> Outline | None: ...
    @property
    def layout_name(self) -> str: ...
    @property
    def has_placeholders(self) -> bool: ...

def is_tracing() -> bool: ...
def has_placeholders(arrays: Sequence[mx.array]) -> bool: ...

class Layout:
    """Where each tensor lives: see csrc/graph/layout.h."""

    @overload
    def __init__(self, tree: Tree, least_of_bytes: int = 0, limit: int = 0) -> None: ...
    @overload
    def __init__(
        self, rows: list[tuple[Path, tuple[int, ...], mx.Dtype]], least_of_bytes: int = 0
    ) -> None: ...
    @overload
    def __init__(
        self,
        rows: list[tuple[Path, tuple[int, ...], mx.Dtype]],
        arenas: list[tuple[mx.Dtype, int, list[int], list[int], bool, int, int]],
        name: str = "",
    ) -> None: ...
    @property
    def fingerprint(self) -> str: ...
    @property
    def tensors(self) -> list[tuple[Path, tuple[int, ...], mx.Dtype]]: ...
    @property
    def arenas(self) -> list[tuple[mx.Dtype, tuple[int, ...], list[int], list[int], bool]]: ...
    @property
    def places(self) -> list[tuple[int, int]]: ...

def is_available(array: mx.array) -> bool: ...
def arena_view(
    arena: mx.array,
    shape: Sequence[int],
    offset: int,
    *,
    paced: bool = False,
    stream: mx.Stream | mx.ThreadLocalStream | mx.Device | mx.DeviceType | None = None,
) -> mx.array: ...
def arena_views(arena: mx.array, layout: Layout, number: int) -> list[mx.array]: ...
def tensors_of(arenas: Sequence[mx.array], layout: Layout) -> list[mx.array]: ...
def batch_views(
    arena: mx.array, shape: Sequence[int], count: int, offset: int, pitch: int
) -> list[mx.array]: ...
def norms(
    tensors: Sequence[mx.array],
    *,
    stream: mx.Stream | mx.ThreadLocalStream | mx.Device | mx.DeviceType | None = None,
) -> mx.array: ...
def pack_slot(
    tensors: Sequence[mx.array | None], layout: Layout, number: int, dtype: mx.Dtype | None
) -> mx.array: ...

BYTE_GROUP: int
BYTE_ROW: int

def as_bytes(x: mx.array, is_unsigned: bool) -> mx.array: ...
def of_bytes(rows: mx.array, shape: Sequence[int], is_unsigned: bool) -> mx.array: ...
def rule_slots(rule: int, flags: int) -> int: ...

class Groups:
    """Tensors that differ from the others: see csrc/graph/step.h."""

    def __init__(self, group_of: Sequence[int], flags_of: Sequence[int]) -> None: ...

class Options:
    """What a step does: see csrc/graph/step.h."""

    def __init__(
        self,
        *,
        rule: int,
        scalars: Sequence[mx.array | Schedule | float],
        flags: int,
        clip_value: float = 0.0,
        clip_norm: float = 0.0,
        trust_coefficient: float = 0.0,
        ema_decay: float = 0.0,
        seed: int = 0,
        state_dtype: mx.Dtype | None = None,
        groups: Groups | None = None,
        group_numbers: mx.array | None = None,
        skipped: mx.array | None = None,
        measured: Sequence[mx.array] = ...,
        op: str = "fused_step",
    ) -> None: ...

def fused_step(
    tree: Tree,
    layout: Layout,
    slots: Sequence[Sequence[mx.array]],
    step: mx.array,
    options: Options,
    *,
    stream: mx.Stream | mx.ThreadLocalStream | mx.Device | mx.DeviceType | None = None,
) -> tuple[
    Any,
    list[list[mx.array]],
    mx.array,
    mx.array | None,
    mx.array | None,
    mx.array | None,
]: ...
def measure_step(
    tree: Tree,
    step: mx.array,
    options: Options,
    *,
    stream: mx.Stream | mx.ThreadLocalStream | mx.Device | mx.DeviceType | None = None,
) -> list[mx.array]: ...
def pack_arrays(
    arrays: Sequence[mx.array],
    layout: Layout,
    skips_single: bool = False,
    *,
    stream: mx.Stream | mx.ThreadLocalStream | mx.Device | mx.DeviceType | None = None,
) -> list[mx.array]: ...
def after(x: mx.array, other: mx.array) -> mx.array: ...

class PreparedStep:
    """A step that is taken again: see csrc/binding/prepared.h."""

    def __init__(self, layout: object, key: str, entries: int, options: Options) -> None: ...
    def __call__(
        self,
        tree: Tree,
        state: object | None,
        learning_rate: object | None,
        stream: mx.Stream | mx.ThreadLocalStream | mx.Device | mx.DeviceType | None = None,
    ) -> tuple[object, dict[str, object]] | None: ...
