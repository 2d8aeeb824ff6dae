"""What a state has, to be read by people."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
from mlx.utils import tree_unflatten

from . import _packing
from ._bytes import BYTES, Bytes
from ._paths import name_of
from ._rules import all_slots


def describe(state: dict[str, Any]) -> str:
    """A table of what a state keeps of each tensor, and what else it has.

    Args:
        state (dict): ``optimizer.state``, that of the functions, one of
            ``mlx.optimizers``, or a saved one as ``mx.load`` gives it.

    Returns:
        str: A line for each tensor (path, shape, and the dtype of each slot), the bytes of
        each slot, and the scalars: arrays that have a value with it.

    Raises:
        ValueError: It is not a state of this optimizer.

    Example:
        >>> from mlx_fused_optim import SGD
        >>> optimizer = SGD(learning_rate=0.5, momentum=0.9, ema_decay=0.5)
        >>> optimizer.init({"layers": [{"w": mx.zeros((2, 3), mx.bfloat16)}, {"b": mx.zeros(3)}]})
        >>> print(describe(optimizer.state))
        tensor      shape   v         ema
        layers.0.w  (2, 3)  bfloat16  float32
        layers.1.b  (3,)    float32   float32
        2 tensors   bytes         24       36
        learning_rate: 0.5, float32
        step: 0, uint64
    """
    op = "describe"
    if isinstance(state, dict) and any(key.startswith("arenas.") for key in map(str, state)):
        state = tree_unflatten(list(state.items()))
    _packing.check_is_state(state, op)
    rule = all_slots()
    tensors = _packing.everything(state, rule, op)
    names = [name for name in rule if any(name in kept for kept in tensors.values())]
    rows = [["tensor", "shape", *(rule[name].key for name in names)]]
    for path, kept in tensors.items():
        shape = str(next(iter(kept.values())).shape) if kept else ""
        rows.append([name_of(path) or "(the tree)", shape, *(_dtype(kept, n) for n in names)])
    sizes = [sum(kept[n].nbytes for kept in tensors.values() if n in kept) for n in names]
    rows.append([f"{len(tensors)} tensors", "bytes", *(f"{size:,}" for size in sizes)])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows[:-1]]
    numbers = map(str.rjust, rows[-1][2:], widths[2:])
    lines.append("  ".join([*map(str.ljust, rows[-1][:2], widths), *numbers]))
    scalars = _packing.scalars(state, rule)
    others = scalars.pop(_packing.OTHERS, None)
    lines += (f"{key}: {_value(scalars[key])}" for key in sorted(scalars))
    return "\n".join([*lines, *([] if others is None else ["", "others:", describe(others)])])


def _dtype(kept: _packing.Kept, slot: str) -> str:
    if slot not in kept:
        return ""
    value = kept[slot]
    return BYTES if isinstance(value, Bytes) else str(value.dtype).rpartition(".")[2]


def _value(value: Any) -> str:
    if not isinstance(value, mx.array):
        return f"{value!r}"
    dtype = str(value.dtype).rpartition(".")[2]
    return f"{value.item():g}, {dtype}" if value.ndim == 0 else f"{dtype} of shape {value.shape}"
