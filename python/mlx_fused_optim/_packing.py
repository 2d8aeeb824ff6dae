"""The optimizer state: momentum of all tensors in a few flat arenas.

A state is a plain tree of arrays::

    {"step": uint64, "learning_rate": float32,
     "arenas": {"layout_<fingerprint>": {"table": uint8, "momentum": [flat, ...]}},
     ...}

The fingerprint names the tensors of the arenas (paths, shapes, dtypes, in order); the
table lists them as JSON, so that a saved state explains itself. A scheduled
hyperparameter is an array beside them, ``state["momentum"]`` or ``state["weight_decay"]``
(no module can have its place: that of a module is a dict). Everything else in the state is
momentum where ``mlx.optimizers.SGD`` keeps it, ``state[...path...]["v"]``: of
tensors that no current layout holds (frozen ones), or a whole state of MLX's. The first
step that needs such a tensor moves it into an arena.
"""

from __future__ import annotations

import math
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten, tree_unflatten

from . import _ext

State = dict[str, Any]

_DTYPES = {"float32": mx.float32, "float16": mx.float16, "bfloat16": mx.bfloat16}
_layouts: dict[str, _ext.Layout] = {}


def layout_key(tree: _ext.Tree) -> str:
    # The prefix keeps tree_unflatten from taking a number for a list index.
    return f"layout_{tree.fingerprint}"


def layout_of(tree: _ext.Tree) -> _ext.Layout:
    key = layout_key(tree)
    layout = _layouts.get(key)
    if layout is None:
        layout = _layouts[key] = _ext.Layout(tree)
    return layout


def momentum_arenas(state: State, tree: _ext.Tree, op: str) -> list[mx.array] | None:
    """The arenas of exactly these tensors, if the state has them.

    Their number, shapes and dtypes are checked by the step itself.
    """
    key = layout_key(tree)
    entry = state.get("arenas", {}).get(key)
    if entry is None:
        return None
    momentum = entry.get("momentum") if isinstance(entry, dict) else None
    if not isinstance(momentum, (list, tuple)) or not all(
        isinstance(arena, mx.array) for arena in momentum
    ):
        raise ValueError(
            f"[{op}] state['arenas']['{key}']['momentum'] is missing or of the wrong type: "
            f"got {_described(momentum)}, allowed a list of arrays."
        )
    return list(momentum)


def with_momentum(state: State, arenas: list[mx.array], tree: _ext.Tree) -> State:
    key = layout_key(tree)
    entries = state["arenas"]
    return {**state, "arenas": {**entries, key: {**entries[key], "momentum": arenas}}}


def packed(state: State, tree: _ext.Tree, op: str) -> State:
    """A state that has momentum arenas for the tensors of ``tree``.

    Momentum is taken by path from wherever the state has it, else it is zero. Arenas
    that share no tensor with the new ones stay as they are.
    """
    if momentum_arenas(state, tree, op) is not None:
        return state
    layout = layout_of(tree)
    wanted = {path: (shape, dtype) for path, shape, dtype in layout.tensors}
    if len(wanted) != len(layout.tensors):
        paths = [path for path, _, _ in layout.tensors]
        twice = next(path for path in paths if paths.count(path) > 1)
        raise ValueError(
            f"[{op}] two tensors have the same path: got '{twice}' twice, allowed once."
        )

    entries, found = {}, _loose_velocities(state, op)
    for key, entry in state.get("arenas", {}).items():
        velocities = _arena_velocities(key, entry, op)
        if wanted.keys().isdisjoint(velocities):
            entries[key] = entry
        else:
            found.update(velocities)

    velocities = {}
    for path, (shape, dtype) in wanted.items():
        velocity = found.pop(path, None)
        if velocity is None:
            velocity = mx.zeros(shape, dtype)
        elif velocity.shape != shape:
            raise ValueError(
                f"[{op}] the state is of another model: got momentum of shape "
                f"{velocity.shape} for '{path}', the parameter has {shape}."
            )
        velocities[path] = velocity.astype(dtype)

    entries[layout_key(tree)] = {
        "table": _encode(layout),
        "momentum": _fill_arenas(layout, list(velocities.values())),
    }
    # Copies: a view would keep the old arena, of which it may be a small part.
    left = {path: velocity * mx.array(1, velocity.dtype) for path, velocity in found.items()}
    return _with_loose({**_scalars(state), "arenas": entries}, left, op)


def unpacked(state: State, op: str) -> State:
    """The state in the layout of ``mlx.optimizers.SGD``: no arenas, only views of them."""
    velocities = _loose_velocities(state, op)
    for key, entry in state.get("arenas", {}).items():
        velocities.update(_arena_velocities(key, entry, op))
    return _with_loose(_scalars(state), velocities, op)


def check_state(state: State, parameters: Any, op: str) -> None:
    """Raise ValueError unless a state that was loaded fits these parameters.

    It may know tensors that the model no longer has, such as a layer that an adapter has
    wrapped since, but not only such.
    """
    check_scalars(state, op)
    velocities = _loose_velocities(state, op)
    for key, entry in state.get("arenas", {}).items():
        velocities.update(_arena_velocities(key, entry, op))
    leaves = dict(tree_flatten(parameters))
    known = [path for path in velocities if isinstance(leaves.get(path), mx.array)]
    if velocities and not known:
        raise ValueError(
            f"[{op}] the state is of another model: got momentum for "
            f"'{next(iter(velocities))}', allowed paths that the parameters have."
        )
    for path in known:
        if velocities[path].shape != leaves[path].shape:
            raise ValueError(
                f"[{op}] the state is of another model: got momentum of shape "
                f"{velocities[path].shape} for '{path}', the parameter has {leaves[path].shape}."
            )


def check_scalars(state: State, op: str) -> None:
    """Raise ValueError unless step and learning rate are what a step needs."""
    if not isinstance(state, dict):
        raise ValueError(
            f"[{op}] the state is of the wrong type: got {_described(state)}, allowed a dict."
        )
    if not isinstance(state.get("arenas", {}), dict):
        raise ValueError(
            f"[{op}] state['arenas'] is of the wrong type: got {_described(state['arenas'])}, "
            "allowed a dict."
        )
    step = state.get("step")
    if not isinstance(step, mx.array) or step.dtype != mx.uint64 or step.ndim != 0:
        raise ValueError(
            f"[{op}] state['step'] is missing or of the wrong type: got {_described(step)}, "
            "allowed a uint64 scalar array."
        )
    rate = state.get("learning_rate")
    if not isinstance(rate, mx.array) or rate.ndim != 0:
        raise ValueError(
            f"[{op}] state['learning_rate'] is missing or of the wrong type: got "
            f"{_described(rate)}, allowed a scalar array."
        )


# ---- Parts ---------------------------------------------------------------------


def _described(value: Any) -> str:
    if isinstance(value, mx.array):
        return f"{value.dtype} of shape {value.shape}"
    return "nothing" if value is None else type(value).__name__


def _loose_velocities(state: State, op: str) -> dict[str, mx.array]:
    """Momentum that lies where mlx.optimizers.SGD keeps it, by path."""
    velocities = {}
    own = {"arenas", *_scalars(state)}
    leaves: Any = tree_flatten({k: v for k, v in state.items() if k not in own})
    for name, leaf in leaves:
        path, _, key = name.rpartition(".")
        if key != "v" or not isinstance(leaf, mx.array):
            raise ValueError(
                f"[{op}] the state has a leaf that is not SGD's: got {_described(leaf)} at "
                f"'{name}', allowed only momentum arrays 'v'."
            )
        if leaf.dtype not in _DTYPES.values():
            raise ValueError(
                f"[{op}] the state has momentum of the wrong type: got {_described(leaf)} at "
                f"'{name}', allowed {', '.join(_DTYPES)}."
            )
        velocities[path] = leaf
    return velocities


def _arena_velocities(key: str, entry: Any, op: str) -> dict[str, mx.array]:
    """Momentum that lies in the arenas of one entry, as views."""
    layout = _checked_layout(key, entry, op)
    velocities = {}
    for (_, _, tensors, offsets), arena in zip(layout.arenas, entry["momentum"], strict=True):
        for tensor, offset in zip(tensors, offsets, strict=True):
            path, shape, _ = layout.tensors[tensor]
            velocities[path] = _ext.arena_view(mx.contiguous(arena), shape, offset)
    return velocities


def _checked_layout(key: str, entry: Any, op: str) -> _ext.Layout:
    if not isinstance(entry, dict) or not {"table", "momentum"} <= entry.keys():
        raise ValueError(
            f"[{op}] state['arenas']['{key}'] is incomplete: got {_described(entry)}, "
            "allowed a dict with 'table' and 'momentum'."
        )
    layout = _layouts.get(key)
    if layout is None:
        layout = _layouts[key] = _decode(key, entry["table"], op)
    momentum = entry["momentum"]
    expected = [(dtype, shape) for dtype, shape, _, _ in layout.arenas]
    if not isinstance(momentum, (list, tuple)) or len(momentum) != len(expected):
        raise ValueError(
            f"[{op}] state['arenas']['{key}']['momentum'] is incomplete: got "
            f"{_described(momentum)}, allowed a list of {len(expected)} arrays."
        )
    for number, (arena, (dtype, shape)) in enumerate(zip(momentum, expected, strict=True)):
        if not isinstance(arena, mx.array) or arena.dtype != dtype or arena.shape != shape:
            raise ValueError(
                f"[{op}] momentum arena {number} of the state does not fit its layout: got "
                f"{_described(arena)}, expected {dtype} of shape {shape}."
            )
    return layout


def _fill_arenas(layout: _ext.Layout, velocities: list[mx.array]) -> list[mx.array]:
    arenas = []
    for dtype, shape, tensors, offsets in layout.arenas:
        size = math.prod(shape)
        if size == velocities[tensors[0]].size:  # flat would be too long for one axis
            arenas.append(velocities[tensors[0]].reshape(shape))
            continue
        pieces, at = [], 0
        for tensor, offset in zip(tensors, offsets, strict=True):
            if offset > at:
                pieces.append(mx.zeros(offset - at, dtype))
            pieces.append(velocities[tensor].flatten())
            at = offset + velocities[tensor].size
        pieces.append(mx.zeros(size - at, dtype))
        arenas.append(mx.concatenate(pieces).reshape(shape))
    return arenas


def _scalars(state: State) -> State:
    """Step, learning rate, and what else is scheduled or was put beside them. Modules of
    these names are dicts; an array 'v' is the momentum of a tree that is one array."""
    return {k: v for k, v in state.items() if isinstance(v, mx.array) and k != "v"}


def _with_loose(own: State, velocities: dict[str, mx.array], op: str) -> State:
    """A state with momentum of tensors that are in no arena."""
    loose = _placed(velocities)
    for key in sorted((own.keys() | {"arenas"}) & loose.keys()):
        raise ValueError(
            f"[{op}] a module has the name of an entry of the state: got momentum of "
            f"'{key}', allowed other names for modules that are frozen or unpacked."
        )
    return {**own, **loose}


def _placed(velocities: dict[str, mx.array]) -> State:
    """By path, as mlx.optimizers.SGD nests it."""
    # The path of a tree that is one array is empty.
    flat = [(f"{path}.v" if path else "v", v) for path, v in velocities.items()]
    tree = tree_unflatten(flat) if flat else {}
    if isinstance(tree, list):  # of a tree that is a list: a dict has the same paths
        tree = {str(i): node for i, node in enumerate(tree) if node}
    return tree


def _encode(layout: _ext.Layout) -> mx.array:
    import json

    rows = [[path, list(shape), _name(dtype)] for path, shape, dtype in layout.tensors]
    return mx.array(list(json.dumps(rows).encode()), mx.uint8)


def _decode(key: str, table: Any, op: str) -> _ext.Layout:
    import json

    try:
        rows = json.loads(bytes(table.tolist()))
        layout = _ext.Layout([(path, tuple(shape), _DTYPES[name]) for path, shape, name in rows])
    except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
        raise ValueError(
            f"[{op}] state['arenas']['{key}']['table'] cannot be read: got "
            f"{_described(table)} ({error}), allowed the table that was saved with the state. "
            "Inside mx.compile it has no value yet: call optimizer.init(parameters) first."
        ) from error
    if f"layout_{layout.fingerprint}" != key:
        raise ValueError(
            f"[{op}] state['arenas']['{key}'] does not match its table: got the tensors of "
            f"'layout_{layout.fingerprint}', allowed those of the key."
        )
    return layout


def _name(dtype: mx.Dtype) -> str:
    return next(name for name, value in _DTYPES.items() if value == dtype)
