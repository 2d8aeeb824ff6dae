"""Where each tensor lives: layouts as Python sees them, and the tables that saved states have."""

from __future__ import annotations

import math
from functools import cached_property
from typing import Any, NamedTuple

import mlx.core as mx

from . import _ext
from ._options import dtype_name
from ._paths import Path, name_of
from ._recent import Recent
from ._rules import DTYPES


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


class Layout:
    """Where each tensor lives, in the shapes that Python needs."""

    def __init__(self, key: str, made: _ext.Layout):
        self.key = key
        self.made = made

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


def _key(fingerprint: str, least_of_bytes: int) -> str:
    # The prefix keeps tree_unflatten from taking a number for a list index.
    return f"layout_{fingerprint}" + (f"_{least_of_bytes}" if least_of_bytes else "")


def described(value: Any) -> str:
    if isinstance(value, mx.array):
        return f"{value.dtype} of shape {value.shape}"
    return "nothing" if value is None else type(value).__name__


def encoded(layout: Layout) -> mx.array:
    import json

    rows = [[path, shape, dtype_name(dtype)] for path, shape, dtype in layout.tensors]
    data: Any = memoryview(json.dumps(rows).encode())
    return mx.array(data)  # uint8


def layout_of_table(key: str, table: Any, op: str) -> Layout:
    """The layout of a saved entry: one that this process knows, or what its table says."""
    return _layouts.find(key) or _decoded(key, table, op)


def _decoded(key: str, table: Any, op: str) -> Layout:
    import json

    try:
        rows = json.loads(bytes(table.tolist()))
        least = int(key.split("_")[2]) if key.count("_") == 2 else 0
        rows = [(path, tuple(shape), DTYPES[name]) for path, shape, name in rows]
        layout = layout_of_rows(rows, least)
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
