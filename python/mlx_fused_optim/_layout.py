"""Where each tensor lives: layouts as Python sees them, and the tables that saved states have."""

from __future__ import annotations

from typing import Any

import mlx.core as mx

from . import _ext
from ._options import DTYPES, dtype_name

# In the order of the kernel (SgdSlot in csrc/sgd.h).
SLOTS = ("momentum", "master", "compensation", "ema")
# Of float32 parameters nothing is lost that these could keep.
_OF_HALF_TYPES = ("master", "compensation")


class Layout:
    """Where each tensor lives, in the shapes that Python needs."""

    def __init__(self, key: str, made: _ext.Layout):
        self.key = key
        self.made = made
        self.tensors = made.tensors
        self.arenas = made.arenas
        self._halves = [i for i, (dtype, *_) in enumerate(self.arenas) if dtype != mx.float32]
        self._all = list(range(len(self.arenas)))

    def arenas_of(self, slot: str) -> list[int]:
        """The numbers of the arenas that have a slot."""
        return self._halves if slot in _OF_HALF_TYPES else self._all


_layouts: dict[str, Layout] = {}


def layout_of(tree: _ext.Tree) -> Layout:
    # The prefix keeps tree_unflatten from taking a number for a list index.
    key = f"layout_{tree.fingerprint}"
    layout = _layouts.get(key)
    if layout is None:
        layout = _layouts[key] = Layout(key, _ext.Layout(tree))
    return layout


def described(value: Any) -> str:
    if isinstance(value, mx.array):
        return f"{value.dtype} of shape {value.shape}"
    return "nothing" if value is None else type(value).__name__


def encoded(layout: Layout) -> mx.array:
    import json

    rows = [[path, list(shape), dtype_name(dtype)] for path, shape, dtype in layout.tensors]
    return mx.array(list(json.dumps(rows).encode()), mx.uint8)


def layout_of_table(key: str, table: Any, op: str) -> Layout:
    """The layout of a saved entry: one that this process knows, or what its table says."""
    layout = _layouts.get(key)
    if layout is None:
        layout = _layouts[key] = _decoded(key, table, op)
    return layout


def _decoded(key: str, table: Any, op: str) -> Layout:
    import json

    try:
        rows = json.loads(bytes(table.tolist()))
        made = _ext.Layout([(path, tuple(shape), DTYPES[name]) for path, shape, name in rows])
    except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
        raise ValueError(
            f"[{op}] state['arenas']['{key}']['table'] cannot be read: got "
            f"{described(table)} ({error}), allowed the table that was saved with the state. "
            "Inside mx.compile it has no value yet: call optimizer.init(parameters) first."
        ) from error
    if f"layout_{made.fingerprint}" != key:
        raise ValueError(
            f"[{op}] state['arenas']['{key}'] does not match its table: got the tensors of "
            f"'layout_{made.fingerprint}', allowed those of the key."
        )
    return Layout(key, made)
