"""The optimizer state: what is kept of each element, in a few flat arenas.

A state is a plain tree of arrays::

    {"step": uint64, "learning_rate": float32,
     "arenas": {"layout_<fingerprint>": {"table": uint8, "momentum": [flat, ...]}},
     ...}

The fingerprint names the tensors of the arenas (paths, shapes, dtypes, in order); the
table lists them as JSON, so that a saved state explains itself. Beside ``momentum`` are
the other **slots** that the options ask for: ``master`` (the parameters in float32),
``compensation`` (what their rounding has lost), ``ema`` (their moving average), each with
an array for each arena that has a use for it.

A scheduled hyperparameter is an array beside the step, ``state["momentum"]`` or
``state["weight_decay"]``, and so are ``state["grad_norm"]`` and ``state["skipped"]`` where
gradients are measured (no module can have their place: that of a module is a dict).
Everything else in the state is a tensor's momentum where ``mlx.optimizers.SGD`` keeps it,
``state[...path...]["v"]``, with the other slots under their own names beside it: of tensors
that no current layout holds (frozen ones), or a whole state of MLX's. The first step that
needs such a tensor moves it into arenas.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import mlx.core as mx
from mlx.utils import tree_flatten, tree_unflatten

from . import _ext
from ._layout import SLOTS, Layout, described, encoded, layout_of_table
from ._options import DTYPES

State = dict[str, Any]

# The names at a tensor's path.
LOOSE = dict(zip(("v", *SLOTS[1:]), SLOTS, strict=True))
# What a step that does not keep it forgets.
_FORGOTTEN = frozenset(SLOTS[1:])
# What a state keeps of one tensor, by slot.
Kept = dict[str, mx.array]


class Wanted(NamedTuple):
    """The slots that a step keeps."""

    slots: tuple[str, ...]
    momentum_dtype: mx.Dtype | None = None  # by default the parameter's

    def dtype(self, slot: str, parameter: mx.Dtype) -> mx.Dtype:
        if slot == "momentum":
            return self.momentum_dtype or parameter
        return parameter if slot == "compensation" else mx.float32


def arenas_of(state: State, layout: Layout, wanted: Wanted, op: str) -> list[list[mx.array]] | None:
    """The arenas of exactly these tensors for each of SLOTS, if the state has all that are
    wanted and momentum in the wanted dtype; [] for a slot that is not wanted.

    Their number, shapes and other dtypes are checked by the step itself.
    """
    entry = state.get("arenas", {}).get(layout.key)
    found: list[list[mx.array]] = [[], [], [], []]
    complete = True
    for slot in wanted.slots:
        numbers = layout.arenas_of(slot)
        if not numbers:
            continue
        arenas = None if entry is None else _slot_arenas(layout.key, entry, slot, op)
        if arenas is None:
            complete = False
            continue
        if slot == "momentum":
            for number, arena in zip(numbers, arenas, strict=False):
                # One that no momentum can have is refused by the step.
                dtype = wanted.momentum_dtype or layout.arenas[number][0]
                complete = complete and (arena.dtype == dtype or arena.dtype not in _DTYPES)
        found[SLOTS.index(slot)] = arenas
    return found if complete else None


def with_arenas(state: State, arenas: list[list[mx.array]], layout: Layout) -> State:
    """The state after a step. What a step does not keep it forgets, because it would no
    longer be true, but for momentum, which mlx.optimizers.SGD keeps too."""
    entries = state.get("arenas", {})
    old = entries.get(layout.key)
    if not isinstance(old, dict):
        return state
    entry = {name: old[name] for name in ("table", "momentum") if name in old}
    for slot, arrays in zip(SLOTS, arenas, strict=True):
        if arrays:
            entry[slot] = arrays
    if entry.keys().isdisjoint(SLOTS):
        return {**state, "arenas": {k: v for k, v in entries.items() if k != layout.key}}
    return {**state, "arenas": {**entries, layout.key: entry}}


def packed(state: State, tree: _ext.Tree, layout: Layout, wanted: Wanted, op: str) -> State:
    """A state that has the wanted arenas for the tensors of ``tree``.

    What a tensor has is taken by its path from wherever the state has it. What it lacks
    begins: momentum and compensation as zeros, the master as the parameter, the moving
    average as the master or the parameter. Arenas that share no tensor with the new ones
    stay as they are.
    """
    arenas = arenas_of(state, layout, wanted, op)
    if arenas is not None and (any(arenas) or not _is_outdated(state, layout, op)):
        return state
    shapes = {path: shape for path, shape, _ in layout.tensors}
    if len(shapes) != len(layout.tensors):
        paths = [path for path, _, _ in layout.tensors]
        twice = next(path for path in paths if paths.count(path) > 1)
        raise ValueError(
            f"[{op}] two tensors have the same path: got '{twice}' twice, allowed once."
        )

    entries, found = {}, _loose(state, op)
    for key, entry in state.get("arenas", {}).items():
        tensors = _of_entry(key, entry, op)
        if shapes.keys().isdisjoint(tensors):
            entries[key] = entry
        else:
            for path, kept in tensors.items():
                found.setdefault(path, {}).update(kept)

    mine = [found.pop(path, {}) for path in shapes]
    for kept, (path, shape) in zip(mine, shapes.items(), strict=True):
        _check_shapes(kept, path, shape, op)
    entry = {"table": encoded(layout)}
    for slot in wanted.slots:
        if layout.arenas_of(slot):
            entry[slot] = _fill_arenas(layout, slot, wanted, mine, tree.parameters)
    if not entry.keys().isdisjoint(SLOTS):
        entries[layout.key] = entry

    # What these tensors had and the step does not keep is forgotten, but for momentum.
    if "momentum" not in wanted.slots:
        for path, kept in zip(shapes, mine, strict=True):
            if "momentum" in kept:
                found[path] = {"momentum": kept["momentum"]}
    # Copies: a view would keep the old arena, of which it may be a small part.
    left = {
        path: {slot: value * mx.array(1, value.dtype) for slot, value in kept.items()}
        for path, kept in found.items()
    }
    return _with_loose({**_scalars(state), "arenas": entries}, left, op)


def unpacked(state: State, op: str) -> State:
    """The state in the layout of ``mlx.optimizers.SGD``: no arenas, only views of them."""
    return _with_loose(_scalars(state), _everything(state, op), op)


def averages(state: State, dtype: mx.Dtype | None, op: str) -> Any:
    """The tree of moving averages, in the parameters' dtypes if none is given."""
    if dtype is not None and dtype not in _DTYPES:
        raise ValueError(
            f"[{op}] the dtype of averages is unknown: got {dtype}, allowed None, "
            f"{', '.join('mlx.core.' + name for name in DTYPES)}."
        )
    dtypes = {}
    for key, entry in state.get("arenas", {}).items():
        tensors = _checked_layout(key, entry, op).tensors
        dtypes.update({path: own for path, _, own in tensors})
    flat = [
        (path, kept["ema"].astype(dtype or dtypes.get(path, mx.float32)))
        for path, kept in _everything(state, op).items()
        if "ema" in kept
    ]
    if not flat:
        raise ValueError(
            f"[{op}] the state has no moving average: got none, allowed a state of steps with "
            "ema_decay, after the first step or init()."
        )
    return flat[0][1] if flat[0][0] == "" else tree_unflatten(flat)


def check_state(state: State, parameters: Any, op: str) -> None:
    """Raise ValueError unless a state that was loaded fits these parameters.

    It may know tensors that the model no longer has, such as a layer that an adapter has
    wrapped since, but not only such.
    """
    check_scalars(state, op)
    tensors = _everything(state, op)
    leaves = dict(tree_flatten(parameters))
    known = [path for path in tensors if isinstance(leaves.get(path), mx.array)]
    if tensors and not known:
        path = next(iter(tensors))
        raise ValueError(
            f"[{op}] the state is of another model: got {next(iter(tensors[path]))} for "
            f"'{path}', allowed paths that the parameters have."
        )
    for path in known:
        _check_shapes(tensors[path], path, leaves[path].shape, op)


def check_scalars(state: State, op: str) -> None:
    """Raise ValueError unless step and learning rate are what a step needs."""
    if not isinstance(state, dict):
        raise ValueError(
            f"[{op}] the state is of the wrong type: got {described(state)}, allowed a dict."
        )
    if not isinstance(state.get("arenas", {}), dict):
        raise ValueError(
            f"[{op}] state['arenas'] is of the wrong type: got {described(state['arenas'])}, "
            "allowed a dict."
        )
    step = state.get("step")
    if not isinstance(step, mx.array) or step.dtype != mx.uint64 or step.ndim != 0:
        raise ValueError(
            f"[{op}] state['step'] is missing or of the wrong type: got {described(step)}, "
            "allowed a uint64 scalar array."
        )
    rate = state.get("learning_rate")
    if not isinstance(rate, mx.array) or rate.size != 1:
        raise ValueError(
            f"[{op}] state['learning_rate'] is missing or of the wrong type: got "
            f"{described(rate)}, allowed a scalar array."
        )


def with_counters(state: State, skips: bool, op: str) -> State:
    """A state that has what a step measures: the norm, and the number of skipped steps."""
    counters = {"grad_norm": mx.float32, "skipped": mx.uint64}
    for name, dtype in counters.items():
        value = state.get(name)
        if value is None:
            if name == "grad_norm" or skips:
                state = {**state, name: mx.array(0, dtype)}
        elif not isinstance(value, mx.array) or value.dtype != dtype or value.ndim != 0:
            raise ValueError(
                f"[{op}] state['{name}'] is of the wrong type: got {described(value)}, allowed "
                f"a scalar array of {dtype}, and no frozen module of this name."
            )
    return state


# ---- Parts ---------------------------------------------------------------------


def _is_outdated(state: State, layout: Layout, op: str) -> bool:
    """Whether a state has more than momentum of these tensors outside their own arenas, from
    steps with other options. What is packed has not; of a step that keeps nothing nobody knows."""
    others = {
        key: entry
        for key, entry in state.get("arenas", {}).items()
        if key != layout.key and isinstance(entry, dict) and not _FORGOTTEN.isdisjoint(entry)
    }
    loose = {
        key: value
        for key, value in state.items()
        if key != "arenas" and (isinstance(value, (dict, list)) or key in _FORGOTTEN)
    }
    if not others and not loose:
        return False
    paths = {path for path, _, _ in layout.tensors}
    for key, entry in others.items():
        if any(path in paths for path, _, _ in _checked_layout(key, entry, op).tensors):
            return True
    leaves: Any = tree_flatten(loose)
    places = (name.rpartition(".") for name, _ in leaves)
    return any(name in _FORGOTTEN and path in paths for path, _, name in places)


def _everything(state: State, op: str) -> dict[str, Kept]:
    """By path, what the state keeps of each tensor, as views where it is in arenas."""
    tensors = _loose(state, op)
    for key, entry in state.get("arenas", {}).items():
        for path, kept in _of_entry(key, entry, op).items():
            tensors.setdefault(path, {}).update(kept)
    return tensors


def _check_shapes(kept: Kept, path: str, shape: tuple[int, ...], op: str) -> None:
    for slot, value in kept.items():
        if value.shape != shape:
            raise ValueError(
                f"[{op}] the state is of another model: got {slot} of shape {value.shape} for "
                f"'{path}', the parameter has {shape}."
            )


def _loose(state: State, op: str) -> dict[str, Kept]:
    """By path, what lies where mlx.optimizers.SGD keeps momentum."""
    tensors: dict[str, Kept] = {}
    own = {"arenas", *_scalars(state)}
    leaves: Any = tree_flatten({k: v for k, v in state.items() if k not in own})
    for name, leaf in leaves:
        path, _, key = name.rpartition(".")
        if key not in LOOSE or not isinstance(leaf, mx.array):
            raise ValueError(
                f"[{op}] the state has a leaf that is not SGD's: got {described(leaf)} at "
                f"'{name}', allowed only momentum arrays 'v' and arrays "
                f"{', '.join(map(repr, SLOTS[1:]))}."
            )
        if leaf.dtype not in _DTYPES:
            raise ValueError(
                f"[{op}] the state has {LOOSE[key]} of the wrong type: got {described(leaf)} at "
                f"'{name}', allowed {', '.join(DTYPES)}."
            )
        tensors.setdefault(path, {})[LOOSE[key]] = leaf
    return tensors


def _of_entry(key: str, entry: Any, op: str) -> dict[str, Kept]:
    """By path, what lies in the arenas of one entry, as views."""
    layout = _checked_layout(key, entry, op)
    tensors: dict[str, Kept] = {path: {} for path, _, _ in layout.tensors}
    for slot in SLOTS:
        if slot not in entry:
            continue
        for number, arena in zip(layout.arenas_of(slot), entry[slot], strict=True):
            arena = mx.contiguous(arena)
            for path, shape, offset in _places(layout, number):
                tensors[path][slot] = _ext.arena_view(arena, shape, offset)
    return tensors


def _places(layout: Layout, number: int) -> Iterator[tuple[str, tuple[int, ...], int]]:
    _, _, tensors, offsets = layout.arenas[number]
    for tensor, offset in zip(tensors, offsets, strict=True):
        path, shape, _ = layout.tensors[tensor]
        yield path, shape, offset


def _slot_arenas(key: str, entry: Any, slot: str, op: str) -> list[mx.array] | None:
    """The arrays of a slot of an entry; None if it has no such slot."""
    if not isinstance(entry, dict) or entry.keys().isdisjoint(SLOTS):
        raise ValueError(
            f"[{op}] state['arenas']['{key}'] is incomplete: got {described(entry)}, allowed a "
            f"dict with 'table' and at least one of {', '.join(map(repr, SLOTS))}."
        )
    if slot not in entry:
        return None
    arenas = entry[slot]
    if not isinstance(arenas, (list, tuple)) or not all(isinstance(a, mx.array) for a in arenas):
        raise ValueError(
            f"[{op}] state['arenas']['{key}']['{slot}'] is of the wrong type: got "
            f"{described(arenas)}, allowed a list of arrays."
        )
    return list(arenas)


def _checked_layout(key: str, entry: Any, op: str) -> Layout:
    if not isinstance(entry, dict) or "table" not in entry:
        raise ValueError(
            f"[{op}] state['arenas']['{key}'] is incomplete: got {described(entry)}, allowed a "
            f"dict with 'table' and at least one of {', '.join(map(repr, SLOTS))}."
        )
    layout = layout_of_table(key, entry["table"], op)
    for slot in SLOTS:
        arenas = _slot_arenas(key, entry, slot, op)
        if arenas is None:
            continue
        numbers = layout.arenas_of(slot)
        if len(arenas) != len(numbers):
            raise ValueError(
                f"[{op}] state['arenas']['{key}']['{slot}'] is incomplete: got {len(arenas)} "
                f"arrays, allowed a list of {len(numbers)}."
            )
        for number, arena in zip(numbers, arenas, strict=True):
            parameter, shape, _, _ = layout.arenas[number]
            allowed = _DTYPES if slot == "momentum" else (Wanted(()).dtype(slot, parameter),)
            if arena.dtype not in allowed or arena.shape != shape:
                names = " or ".join(map(str, allowed))
                raise ValueError(
                    f"[{op}] {slot} arena {number} of the state does not fit its layout: got "
                    f"{described(arena)}, expected {names} of shape {shape}."
                )
    return layout


def _fill_arenas(
    layout: Layout, slot: str, wanted: Wanted, kept: list[Kept], parameters: list[mx.array]
) -> list[mx.array]:
    arenas = []
    for number in layout.arenas_of(slot):
        parameter, shape, tensors, offsets = layout.arenas[number]
        dtype = wanted.dtype(slot, parameter)
        pieces: list[mx.array] = []
        at = 0
        for tensor, offset in zip(tensors, offsets, strict=True):
            value = kept[tensor].get(slot)
            if value is None:
                value = _beginning(slot, wanted, kept[tensor], parameters[tensor])
            value = value.astype(dtype)
            if value.size == math.prod(shape):  # flat would be too long for one axis
                pieces, at = [value], value.size
                break
            if offset > at:
                pieces.append(mx.zeros(offset - at, dtype))
            pieces.append(value.flatten())
            at = offset + value.size
        if at < math.prod(shape):
            pieces.append(mx.zeros(math.prod(shape) - at, dtype))
        whole = pieces[0] if len(pieces) == 1 else mx.concatenate(pieces)
        arenas.append(whole.reshape(shape))
    return arenas


def _beginning(slot: str, wanted: Wanted, kept: Kept, parameter: mx.array) -> mx.array:
    if slot in ("momentum", "compensation"):
        return mx.zeros_like(parameter)
    has_master = slot == "ema" and "master" in wanted.slots
    return kept.get("master", parameter) if has_master else parameter


def _scalars(state: State) -> State:
    """Step, learning rate, and what else is scheduled, counted or was put beside them.
    Modules of these names are dicts; an array 'v' is the momentum of a tree that is one
    array."""
    return {k: v for k, v in state.items() if isinstance(v, mx.array) and k not in LOOSE}


def _with_loose(own: State, tensors: dict[str, Kept], op: str) -> State:
    """A state with what is kept of tensors that are in no arena."""
    loose = _placed(tensors)
    for key in sorted((own.keys() | {"arenas"}) & loose.keys()):
        raise ValueError(
            f"[{op}] a module has the name of an entry of the state: got momentum of "
            f"'{key}', allowed other names for modules that are frozen or unpacked."
        )
    return {**own, **loose}


def _placed(tensors: dict[str, Kept]) -> State:
    """By path, as mlx.optimizers.SGD nests it."""
    names = {slot: name for name, slot in LOOSE.items()}
    # The path of a tree that is one array is empty.
    flat = [
        (f"{path}.{names[slot]}" if path else names[slot], value)
        for path, kept in tensors.items()
        for slot, value in kept.items()
    ]
    tree = tree_unflatten(flat) if flat else {}
    if isinstance(tree, list):  # of a tree that is a list: a dict has the same paths
        tree = {str(i): node for i, node in enumerate(tree) if node}
    return tree


_DTYPES = tuple(DTYPES.values())
