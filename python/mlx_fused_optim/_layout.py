"""Where each tensor lives: layouts as Python sees them, and the tables that saved states have."""

from __future__ import annotations

import math
from functools import cached_property
from typing import Any, NamedTuple

import mlx.core as mx

from . import _ext
from ._dtypes import DTYPES, dtype_name
from ._paths import Path, name_of
from ._recent import Recent


class ArenaRow(NamedTuple):
    """An arena: its dtype, shape, tensors by number and where each begins (elements)."""

    dtype: mx.Dtype
    shape: tuple[int, ...]
    tensors: list[int]
    offsets: list[int]
    is_small: bool  # of tensors that have no moments in bytes

    @property
    def elements(self) -> int:
        return math.prod(self.shape)


class Cut(NamedTuple):
    """Which tensors of a whole layout a part has; their random bits are those that they have
    there."""

    whole: Layout
    numbers: list[int]


class Layout:
    """Where each tensor lives, in the shapes that Python needs."""

    def __init__(self, key: str, made: _ext.Layout, cut: Cut | None = None):
        self.key = key
        self.made = made
        self.cut = cut

    @cached_property
    def tensors(self) -> list[tuple[Path, tuple[int, ...], mx.Dtype]]:
        return self.made.tensors

    @cached_property
    def shapes(self) -> dict[Path, tuple[int, ...]]:
        return {path: shape for path, shape, _ in self.tensors}

    @cached_property
    def arenas(self) -> list[ArenaRow]:
        return [ArenaRow(*row) for row in self.made.arenas]

    @cached_property
    def halves(self) -> list[int]:
        """The numbers of the arenas of half types."""
        return [i for i, arena in enumerate(self.arenas) if arena.dtype != mx.float32]

    def __str__(self) -> str:
        names = [f"'{name_of(path)}'" for path, _, _ in self.tensors]
        return f"{names[0]} and {len(names) - 1} more" if len(names) > 1 else "".join(names)


# Enough for a few optimizers and what is frozen in turn; each is hundreds of bytes a tensor.
_layouts: Recent[Layout] = Recent(64)


def layout_of(tree: _ext.Tree, least_of_bytes: int = 0) -> Layout:
    """Of a tree of arrays. Tensors of fewer elements than ``least_of_bytes`` lie apart."""
    if name := tree.layout_name:
        return _layouts[name]  # whoever made such a part has it kept
    key = _key(tree.fingerprint, least_of_bytes)
    return _layouts.find(key) or _layouts.keep(key, Layout(key, _ext.Layout(tree, least_of_bytes)))


def layout_of_gradients(tree: _ext.Tree, limit: int) -> Layout:
    """Arenas of at most ``limit`` bytes, which are no state's."""
    key = f"{_key(tree.fingerprint, 0)} {limit}"
    return _layouts.find(key) or _layouts.keep(key, Layout(key, _ext.Layout(tree, 0, limit)))


def layout_of_rows(
    rows: list[tuple[Path, tuple[int, ...], mx.Dtype]], least_of_bytes: int = 0
) -> Layout:
    made = _ext.Layout(rows, least_of_bytes)
    key = _key(made.fingerprint, least_of_bytes)
    return _layouts.find(key) or _layouts.keep(key, Layout(key, made))


def layout_of_part(whole: Layout, numbers: list[int]) -> Layout:
    """Of some tensors of a layout, in arenas that are parts of its arenas."""
    rows = [whole.tensors[number] for number in numbers]
    own = {number: place for place, number in enumerate(numbers)}
    arenas = []
    for arena, (place, begin) in zip(whole.arenas, whole.made.places, strict=True):
        ends = [*arena.offsets[1:], arena.elements]
        mine = [i for i, number in enumerate(arena.tensors) if number in own]
        if mine:
            first = arena.offsets[mine[0]]
            arenas.append(
                (
                    arena.dtype,
                    ends[mine[-1]] - first,
                    [own[arena.tensors[i]] for i in mine],
                    [arena.offsets[i] - first for i in mine],
                    arena.is_small,
                    place,
                    begin + first,
                )
            )
    made = _ext.Layout(rows, arenas)
    name = f"{_key(made.fingerprint, 0)}_of_{whole.key.removeprefix('layout_')}"
    return Layout(name, _ext.Layout(rows, arenas, name), Cut(whole, numbers))


def kept(layout: Layout) -> Layout:
    """A layout that is found again by its key, for now."""
    return _layouts.find(layout.key) or _layouts.keep(layout.key, layout)


def _key(fingerprint: str, least_of_bytes: int) -> str:
    # The prefix keeps tree_unflatten from taking a number for a list index.
    return f"layout_{fingerprint}" + (f"_{least_of_bytes}" if least_of_bytes else "")


def described(value: Any) -> str:
    if isinstance(value, mx.array):
        return f"{value.dtype} of shape {value.shape}"
    return "nothing" if value is None else type(value).__name__


def encoded(layout: Layout) -> mx.array:
    import json

    whole = layout.cut.whole if layout.cut else layout
    table: Any = [[path, shape, dtype_name(dtype)] for path, shape, dtype in whole.tensors]
    if layout.cut:
        table = {"whole": table, "layout": whole.key, "part": layout.cut.numbers}
    data: Any = memoryview(json.dumps(table).encode())
    return mx.array(data)  # uint8


def layout_of_table(key: str, table: Any, op: str) -> Layout:
    """The layout of a saved entry: one that this process knows, or what its table says."""
    return _layouts.find(key) or _decoded(key, table, op)


def _decoded(key: str, table: Any, op: str) -> Layout:
    import json

    try:
        read = json.loads(bytes(table.tolist()))
        part = read if isinstance(read, dict) else {"whole": read, "layout": key}
        least = int(part["layout"].split("_")[2]) if part["layout"].count("_") == 2 else 0
        rows = [(path, tuple(shape), DTYPES[name]) for path, shape, name in part["whole"]]
        layout = layout_of_rows(rows, least)
        if part is read:
            layout = kept(layout_of_part(layout, part["part"]))
    except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
        raise ValueError(
            f"[{op}] the table of tensors in state['arenas'] cannot be read: got "
            f"{described(table)} ({error}), allowed the table that was saved with the state. "
            "Inside mx.compile it has no value yet: call optimizer.init(parameters) first."
        ) from error
    if layout.key != key:
        raise ValueError(
            f"[{op}] arenas in the state do not match their table: got the table of {layout} "
            f"('{layout.key}') in '{key}', allowed a state as it was saved."
        )
    return layout
