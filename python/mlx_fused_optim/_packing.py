"""The optimizer state: what is kept of each element, in a few flat arenas.

A state is a plain tree of arrays::

    {"step": uint64, "learning_rate": float32,
     "arenas": {"layout_<fingerprint>": {"table": uint8, "momentum": [flat, ...]}, ...},
     ...}

The fingerprint names the tensors of an entry (paths, shapes, dtypes, in order); its table
lists them as JSON, so that a saved state explains itself. Beside ``momentum`` are the other
**slots** that the options ask for, each with an array for each arena that has a use for it.
An entry has every slot of every tensor it names; tensors that were trained once and are not
in this step have entries of their own.

Other arrays at the top are no tensor's: what is scheduled, counted or was put beside them.
So is the whole state of an optimizer of other tensors, if there is one.
Dicts and lists there are **loose**: what somebody has put in as ``mlx.optimizers`` keeps it,
``state[...path...]["v"]``. The next step takes them into arenas, and they win.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import mlx.core as mx
from mlx.utils import tree_map

from . import _ext
from ._bytes import DTYPE, Bytes, joined_rows, numbers_of, rows_shape, split_rows
from ._dtypes import DTYPES
from ._layout import ArenaRow, Layout, described, encoded, layout_of_rows, layout_of_table
from ._masters import byte_of, master_of
from ._paths import Path, built, leaves, name_of
from ._rules import Slot, Slots

State = dict[str, Any]
# Where a state has that of a second optimizer, which steps the other tensors.
OTHERS = "others_state"
# What a state keeps of one tensor, by the name of the slot.
Kept = dict[str, mx.array | Bytes]


def arena_numbers(slot: Slot, layout: Layout) -> Iterable[int]:
    """The numbers of the arenas that have a slot."""
    return layout.halves if slot.of_halves else range(len(layout.arenas))


class Wanted(NamedTuple):
    """The slots that a step keeps."""

    rule: Slots
    slots: tuple[str, ...]
    own_dtype: mx.Dtype | None = None  # of the rule's own slots
    master_dtype: mx.Dtype | None = None

    def dtype(self, slot: Slot, arena: ArenaRow) -> mx.Dtype:
        chosen = self.master_dtype if slot.name == "master" else self.own_dtype
        if arena.is_small and chosen is not None and chosen == DTYPE:
            chosen = mx.float32
        return (chosen if slot.dtypes else None) or slot.dtype or arena.dtype


def arenas_of(state: State, layout: Layout, wanted: Wanted, op: str) -> list[list[mx.array]] | None:
    """The arenas of exactly these tensors for each slot of the rule, if the state has all that
    are wanted in their dtypes; [] for a slot that is not wanted.

    Their number, shapes and other dtypes are checked by the step itself.
    """
    entry = state.get("arenas", {}).get(layout.key)
    kept = {} if entry is None else _slots_of(entry, layout, wanted.rule, op)
    found: list[list[mx.array]] = []
    for name, slot in wanted.rule.items():
        numbers = arena_numbers(slot, layout) if name in wanted.slots else ()
        arenas = kept.get(name) if numbers else []
        if arenas is None:
            return None
        if slot.dtypes:
            for number, arena in zip(numbers, arenas, strict=False):
                # One that no slot can have is refused by the step.
                if arena.dtype != wanted.dtype(slot, layout.arenas[number]):
                    if arena.dtype in slot.dtypes:
                        return None
        found.append(arenas)
    return found


def is_settled(state: State, layout: Layout, wanted: Wanted, op: str) -> bool:
    """Whether a step may leave alone what else the state has: nothing is loose, and a step that
    keeps nothing leaves nothing of its tensors that would no longer be true."""
    if _has_loose(state, wanted.rule):
        return False
    if wanted.slots:
        return True
    fleeting = {name for name, slot in wanted.rule.items() if not slot.lasts}
    return all(
        key == layout.key
        or not isinstance(entry, dict)
        or fleeting.isdisjoint(entry)
        or layout.shapes.keys().isdisjoint(_layout(key, entry, wanted.rule, op).shapes)
        for key, entry in state.get("arenas", {}).items()
    )


def with_arenas(state: State, arenas: list[list[mx.array]], layout: Layout, rule: Slots) -> State:
    """The state after a step. What a step does not keep it forgets, but for what lasts."""
    entries = state.get("arenas", {})
    old = entries.get(layout.key)
    if old is None:
        return state
    entry = {name: old[name] for name, slot in rule.items() if slot.lasts and name in old}
    entry.update((name, new) for name, new in zip(rule, arenas, strict=True) if new)
    if entry:
        entry = {"table": old["table"], **entry} if "table" in old else entry
        return {**state, "arenas": {**entries, layout.key: entry}}
    entries = {key: other for key, other in entries.items() if key != layout.key}
    return _with_entries({k: v for k, v in state.items() if k != "arenas"}, entries)


def packed(
    state: State, tree: _ext.Tree, layout: Layout, wanted: Wanted, parameters: Any, op: str
) -> State:
    """A state that has the wanted arenas for the tensors of ``tree``, and nothing loose.

    What a tensor has is taken by its path from wherever the state has it, first from what is
    loose, then from the latest entry. What it lacks begins. Entries that share no tensor with
    this step or with what is loose stay as they are. ``parameters`` may have more tensors.
    """
    if len(layout.shapes) != len(layout.tensors):
        rows = [path for path, _, _ in layout.tensors]
        twice = next(path for path in rows if rows.count(path) > 1)
        raise ValueError(
            f"[{op}] two tensors have the same path: got '{name_of(twice)}' twice, allowed once."
        )
    rule = wanted.rule
    loose = _loose(state, parameters, rule, op)
    paths = layout.shapes.keys() | loose.keys()
    touched = {
        key: own
        for key, own in _layouts(state, rule, op).items()
        if not paths.isdisjoint(own.shapes)
    }
    is_alone = touched.keys() == {layout.key} and not loose
    if is_alone and arenas_of(state, layout, wanted, op) is not None:
        return state
    found, dtypes = _found(state, touched, loose, rule)
    for path in loose:
        _check_together(found[path], f"'{name_of(path)}'", rule, op)

    mine = [found.pop(path, {}) for path in layout.shapes]
    for kept, (path, shape) in zip(mine, layout.shapes.items(), strict=True):
        _check_shapes(kept, path, shape, op)
    lasting = {name for kept in mine for name in kept if rule[name].lasts}
    slots = [slot for name, slot in rule.items() if name in lasting or name in wanted.slots]
    entries = {key: e for key, e in state.get("arenas", {}).items() if key not in touched}
    entries.update(_left(found, dtypes, rule, op))
    entry = _entry(layout, slots, wanted, mine, tree.parameters)
    if entry:
        entries[layout.key] = entry
    return _with_entries(scalars(state, rule), entries)


def views(state: State, rule: Slots, op: str) -> State:
    """What the state keeps of tensors, as mlx.optimizers nests it."""
    return _as_tree(everything(state, rule, op), rule, op)


def unpacked(state: State, rule: Slots, op: str) -> State:
    """The state in the layout of ``mlx.optimizers``: no arenas, only views of them."""
    own = scalars(state, rule)
    tree = views(state, rule, op)
    for key in sorted((own.keys() | {"arenas"}) & tree.keys()):
        raise ValueError(
            f"[{op}] a module has the name of an entry of the state: got what is kept of "
            f"'{key}', allowed other names for modules whose state is unpacked."
        )
    return {**own, **tree}


def averages(states: Iterable[tuple[State, Slots]], dtype: mx.Dtype | None, op: str) -> Any:
    """The tree of moving averages, in the parameters' dtypes if none is given."""
    if dtype is not None and dtype not in _DTYPES:
        raise ValueError(
            f"[{op}] the dtype of averages is unknown: got {dtype}, allowed None, "
            f"{', '.join('mlx.core.' + name for name in DTYPES)}."
        )
    flat = []
    for state, rule in states:
        dtypes = _dtypes(_layouts(state, rule, op))
        for path, kept in everything(state, rule, op).items():
            if "ema" in kept:
                average = numbers_of(kept["ema"])
                flat.append((path, average.astype(dtype or dtypes.get(path, mx.float32))))
    if not flat:
        raise ValueError(
            f"[{op}] the state has no moving average: got none, allowed a state of steps with "
            "ema_decay, after the first step or init()."
        )
    return built(flat, op)


def without(state: State, slots: Iterable[str], rule: Slots, op: str) -> State:
    """The state without these slots, of all tensors."""
    slots = set(slots)
    if unknown := sorted(slots - rule.keys()):
        raise ValueError(
            f"[{op}] a slot is unknown: got {unknown[0]!r}, allowed {', '.join(map(repr, rule))}."
        )
    loose = {
        path: _without(kept, slots, rule) for path, kept in _loose(state, None, rule, op).items()
    }
    entries = {key: _without(entry, slots, rule) for key, entry in state.get("arenas", {}).items()}
    entries = {key: entry for key, entry in entries.items() if entry.keys() - {"table"}}
    return _with_entries({**scalars(state, rule), **_as_tree(loose, rule, op)}, entries)


def of_parameters(state: State, parameters: Any, rule: Slots, op: str) -> State:
    """The state of these parameters alone."""
    paths = {path for path, leaf in leaves(parameters) if isinstance(leaf, mx.array)}
    loose = _loose(state, parameters, rule, op)
    layouts = _layouts(state, rule, op)
    split = {key: own for key, own in layouts.items() if not own.shapes.keys() <= paths}
    found, dtypes = _found(state, split, loose, rule)
    entries = {key: entry for key, entry in state.get("arenas", {}).items() if key not in split}
    found = {path: kept for path, kept in found.items() if path in paths}
    entries.update(_left(found, dtypes, rule, op))
    return _with_entries(scalars(state, rule), entries)


def check_state(state: State, parameters: Any, rule: Slots, op: str) -> None:
    """Raise ValueError unless a state that was loaded fits these parameters.

    It may know tensors that the model no longer has, such as a layer that an adapter has
    wrapped since, but not only such.
    """
    check_scalars(state, op)
    shapes: dict[Path, dict[str, tuple[int, ...]]] = {}
    for key, layout in _layouts(state, rule, op).items():
        names = [name for name in rule if name in state["arenas"][key]]
        for path, shape in layout.shapes.items():
            shapes[path] = dict.fromkeys(names, shape)
    for path, kept in _loose(state, parameters, rule, op).items():
        shapes.setdefault(path, {}).update((name, a.shape) for name, a in kept.items())
    arrays = {path: a for path, a in leaves(parameters) if isinstance(a, mx.array)}
    known = [path for path in shapes if path in arrays]
    if shapes and not known:
        path = next(iter(shapes))
        raise ValueError(
            f"[{op}] the state is of another model: got {next(iter(shapes[path]))} for "
            f"'{name_of(path)}', allowed paths that the parameters have."
        )
    for path in known:
        _check_shapes(shapes[path], path, arrays[path].shape, op)


def is_edited(state: State, known: Iterable[str], rule: Slots) -> bool:
    """Whether somebody has put something in: what is loose, or arenas that are not ``known``."""
    entries = state.get("arenas", {})
    return (
        not isinstance(entries, dict) or not entries.keys() <= set(known) or _has_loose(state, rule)
    )


def check_is_state(state: Any, op: str) -> None:
    """Raise ValueError unless it is a dict, with a dict of arenas or none."""
    if not isinstance(state, dict):
        raise ValueError(
            f"[{op}] the state is of the wrong type: got {described(state)}, allowed a dict."
        )
    if not isinstance(state.get("arenas", {}), dict):
        raise ValueError(
            f"[{op}] state['arenas'] is of the wrong type: got {described(state['arenas'])}, "
            "allowed a dict."
        )


def check_scalars(state: State, op: str) -> None:
    """Raise ValueError unless step and learning rate are what a step needs."""
    check_is_state(state, op)
    step = state.get("step")
    if isinstance(step, mx.array):
        is_signed = mx.issubdtype(step.dtype, mx.signedinteger)  # then it was put in, see with_step
        is_step = step.ndim == 0 and (is_signed or mx.issubdtype(step.dtype, mx.unsignedinteger))
        if is_step and is_signed and not _ext.has_placeholders([step]) and bool(step < 0):
            raise ValueError(
                f"[{op}] state['step'] is out of range: got {step.item()}, allowed an integer "
                "scalar of 0 or more."
            )
    else:
        is_step = type(step) is int and 0 <= step < 2**64
    if not is_step:
        raise ValueError(
            f"[{op}] state['step'] is missing or of the wrong type: got {described(step)}, "
            "allowed an integer scalar of 0 or more."
        )
    rate = state.get("learning_rate")
    if not isinstance(rate, mx.array) or rate.size != 1:
        raise ValueError(
            f"[{op}] state['learning_rate'] is missing or of the wrong type: got "
            f"{described(rate)}, allowed a scalar array."
        )


def with_step(state: State) -> State:
    """The state with a step as the kernel counts it, whatever integer it was set to."""
    step = state["step"]
    if isinstance(step, mx.array) and step.dtype == mx.uint64:
        return state
    is_array = isinstance(step, mx.array)
    return {**state, "step": step.astype(mx.uint64) if is_array else mx.array(step, mx.uint64)}


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
                f"a scalar array of {dtype}."
            )
    return state


# ---- Parts ---------------------------------------------------------------------


def _is_loose(key: str, value: Any, rule: Slots) -> bool:
    """Modules are containers; of a tree that is one array, the slots are arrays at the top."""
    is_place = isinstance(value, (dict, list, tuple)) and key != "arenas"
    return (is_place and not _is_of_others(key, value)) or key in rule.names


def _is_of_others(key: str, value: Any) -> bool:
    return key == OTHERS and isinstance(value, dict) and {"step", "learning_rate"} <= value.keys()


def _has_loose(state: State, rule: Slots) -> bool:
    for key, value in state.items():  # at each step, so nothing is called for an array
        if key in rule.names or (not isinstance(value, mx.array) and _is_loose(key, value, rule)):
            return True
    return False


def scalars(state: State, rule: Slots) -> State:
    return {k: v for k, v in state.items() if k != "arenas" and not _is_loose(k, v, rule)}


def _with_entries(state: State, entries: State) -> State:
    return {**state, "arenas": entries} if entries else state


def _loose(state: State, parameters: Any, rule: Slots, op: str) -> dict[Path, Kept]:
    """By path, what lies where mlx.optimizers keeps it."""
    loose = {k: v for k, v in state.items() if _is_loose(k, v, rule)}
    if not loose:
        return {}
    arrays = {path: leaf for path, leaf in leaves(parameters) if isinstance(leaf, mx.array)}
    own_paths = _own_paths({where[:-1] for where, _ in leaves(loose)}, arrays)
    tensors: dict[Path, Kept] = {}
    for where, leaf in leaves(loose):
        path, key = own_paths[where[:-1]], where[-1]
        name = rule.names.get(key) if isinstance(key, str) else None
        allowed = (*_DTYPES, mx.int8) if name == "master" else _DTYPES
        is_data = path not in arrays or _is_integer(arrays[path])
        if _is_integer(leaf) and is_data and not (name and leaf.dtype in allowed):
            continue  # MLX has momentum of data, too
        if name is None or not isinstance(leaf, mx.array):
            raise ValueError(
                f"[{op}] the state has a leaf that is not {op}'s: got {described(leaf)} at "
                f"'{name_of(where)}', allowed only arrays {', '.join(map(repr, rule.names))}."
            )
        if leaf.dtype not in allowed:
            raise ValueError(
                f"[{op}] the state has {name} of the wrong type: got {described(leaf)} at "
                f"'{name_of(where)}', allowed "
                f"{', '.join(str(dtype).removeprefix('mlx.core.') for dtype in allowed)}."
            )
        tensors.setdefault(path, {})[name] = leaf
    return tensors


def _is_integer(leaf: Any) -> bool:
    return isinstance(leaf, mx.array) and not mx.issubdtype(leaf.dtype, mx.inexact)


def _own_paths(paths: set[Path], known: Iterable[Path]) -> dict[Path, Path]:
    """A tree that was flattened and unflattened has lost its kinds of keys: a path that nobody
    knows is that of the only known one of its name, if the state has none of that."""
    by_name: dict[str, list[Path]] = {}
    for path in known:
        by_name.setdefault(name_of(path), []).append(path)
    own = {}
    for path in paths:
        candidates = by_name.get(name_of(path), [])
        is_clear = len(candidates) == 1 and candidates[0] not in paths
        own[path] = candidates[0] if is_clear else path
    return own


def _layouts(state: State, rule: Slots, op: str) -> dict[str, Layout]:
    return {key: _layout(key, e, rule, op) for key, e in state.get("arenas", {}).items()}


def _layout(key: str, entry: Any, rule: Slots, op: str) -> Layout:
    """The layout of an entry, which has all that it says."""
    if not isinstance(entry, dict) or "table" not in entry:
        raise ValueError(
            f"[{op}] an entry of state['arenas'] is incomplete: got {described(entry)} without "
            f"'table', allowed a dict with 'table' and slots ({', '.join(rule)})."
        )
    layout = layout_of_table(key, entry["table"], op)
    slots = _slots_of(entry, layout, rule, op)
    _check_together(slots, str(layout), rule, op)
    for name, arenas in slots.items():
        numbers = list(arena_numbers(rule[name], layout))
        if len(arenas) != len(numbers):
            raise ValueError(
                f"[{op}] the state's {name} of {layout} is incomplete: got {len(arenas)} "
                f"arrays, allowed a list of {len(numbers)}."
            )
        for number, arena in zip(numbers, arenas, strict=True):
            row, slot = layout.arenas[number], rule[name]
            allowed = slot.dtypes or (slot.dtype or row.dtype,)
            shape = rows_shape(row.elements) if arena.dtype == DTYPE else row.shape
            if arena.dtype not in allowed or arena.shape != shape:
                dtypes = " or ".join(map(str, allowed))
                raise ValueError(
                    f"[{op}] {name} of {layout} does not fit: got {described(arena)}, "
                    f"expected {dtypes} of shape {shape}."
                )
    return layout


def _slots_of(entry: Any, layout: Layout, rule: Slots, op: str) -> dict[str, list[mx.array]]:
    """The arrays of each slot of an entry."""
    slots = {} if not isinstance(entry, dict) else {k: v for k, v in entry.items() if k != "table"}
    if not slots or not slots.keys() <= rule.keys():
        got = ", ".join(map(repr, slots)) if slots else described(entry) + " without slots"
        raise ValueError(
            f"[{op}] what the state keeps of {layout} is not {op}'s: got {got}, allowed "
            f"{', '.join(map(repr, rule))}, and at least one of them."
        )
    for name, arenas in slots.items():
        is_list = isinstance(arenas, (list, tuple))
        if not is_list or not all(isinstance(a, mx.array) for a in arenas):
            raise ValueError(
                f"[{op}] the state's {name} of {layout} is of the wrong type: got "
                f"{described(arenas)}, allowed a list of arrays."
            )
    return {name: list(arenas) for name, arenas in slots.items()}


def _dtypes(layouts: dict[str, Layout]) -> dict[Path, mx.Dtype]:
    return {path: dtype for own in layouts.values() for path, _, dtype in own.tensors}


def _found(
    state: State, layouts: dict[str, Layout], loose: dict[Path, Kept], rule: Slots
) -> tuple[dict[Path, Kept], dict[Path, mx.Dtype]]:
    """By path, what entries keep of each tensor, as views, and what is loose instead; and the
    dtypes of the parameters."""
    found: dict[Path, Kept] = {path: {} for own in layouts.values() for path in own.shapes}
    for key, layout in layouts.items():
        for name, slot in rule.items():
            arenas = state["arenas"][key].get(name, ())
            for number, arena in zip(arena_numbers(slot, layout), arenas, strict=False):
                views: Sequence[mx.array | Bytes] = (
                    split_rows(arena, layout, number, slot.is_unsigned)
                    if arena.dtype == DTYPE
                    else _ext.arena_views(mx.contiguous(arena), layout.made, number)
                )
                for tensor, view in zip(layout.arenas[number].tensors, views, strict=True):
                    found[layout.tensors[tensor][0]][name] = view
    for path, kept in loose.items():
        found.setdefault(path, {}).update(kept)
    return found, _dtypes(layouts)


def everything(state: State, rule: Slots, op: str) -> dict[Path, Kept]:
    return _found(state, _layouts(state, rule, op), _loose(state, None, rule, op), rule)[0]


def _left(found: dict[Path, Kept], dtypes: dict[Path, mx.Dtype], rule: Slots, op: str) -> State:
    """Entries of tensors that are not in the step: one for each set of slots."""
    # Masters of 24 bits, and moments in bytes, are apart from wide ones.
    sets: dict[tuple[tuple[str, bool], ...], dict[Path, Kept]] = {}
    for path, kept in found.items():
        if kept:
            is_narrow = {name: x.dtype in (mx.int8, DTYPE) for name, x in kept.items()}
            sets.setdefault(tuple(sorted(is_narrow.items())), {})[path] = kept
    entries = {}
    for names, tensors in sets.items():
        rows = []
        for path, kept in tensors.items():
            shape = next(iter(kept.values())).shape
            _check_shapes(kept, path, shape, op)
            rows.append((path, shape, dtypes.get(path) or _dtype_of(kept, rule)))
        layout = layout_of_rows(rows)
        slots = [slot for name, slot in rule.items() if name in dict(names)]
        entry = _entry(layout, slots, Wanted(rule, ()), list(tensors.values()), [])
        if entry:
            entries[layout.key] = entry
    return entries


def _dtype_of(kept: Kept, rule: Slots) -> mx.Dtype:
    """Of a parameter that nobody has seen, as far as what is kept of it tells."""
    halves = [x.dtype for x in kept.values() if x.dtype in (mx.float16, mx.bfloat16)]
    is_half = any(rule[name].of_halves for name in kept)
    return halves[0] if halves else mx.bfloat16 if is_half else mx.float32


def _entry(
    layout: Layout, slots: list[Slot], wanted: Wanted, kept: list[Kept], parameters: list[mx.array]
) -> State:
    """The arenas of these tensors; {} if there is nothing to keep."""
    entry: State = {}
    for slot in slots:
        arenas = []
        for number in arena_numbers(slot, layout):
            row = layout.arenas[number]
            values = [kept[tensor].get(slot.name) for tensor in row.tensors]
            # What only lasts keeps the dtype it has.
            is_kept = slot.name in wanted.slots or not slot.dtypes
            dtype = wanted.dtype(slot, row) if is_kept else None
            is_in_bytes = all(isinstance(value, Bytes) for value in values)
            if is_in_bytes if dtype is None else dtype == DTYPE:
                arenas.append(joined_rows(values, layout, number, slot.is_unsigned))
                continue
            numbers = [None if value is None else numbers_of(value) for value in values]
            if slot.begins_at_weights and parameters:
                # The master is the weights where there is one.
                with_master = "master" in wanted.slots
                begin = [
                    _master_as(kept[t].get("master") if with_master else None, parameters[t], dtype)
                    for t in row.tensors
                ]
                is_master = slot.name == "master"
                numbers = [
                    first if number is None or is_master else number
                    for number, first in zip(numbers, begin, strict=True)
                ]
            arenas.append(_ext.pack_slot(numbers, layout.made, number, dtype))
        if arenas:
            entry[slot.name] = arenas
    return {"table": encoded(layout), **entry} if entry else {}


def _master_as(master: Any, parameter: mx.array, dtype: mx.Dtype | None) -> mx.array | None:
    """The master in this dtype, or as it begins; None for zeros."""
    if master is None:
        return None if dtype == mx.int8 else parameter
    if dtype == mx.int8:
        is_byte = master.dtype == mx.int8
        return master if is_byte else byte_of(master.astype(mx.float32), parameter)
    return master_of(master, parameter) if master.dtype == mx.int8 else master


def _check_together(kept: Iterable[str], tensors: str, rule: Slots, op: str) -> None:
    """A state with one moment of two is another optimizer's."""
    got = [name for name in rule.together if name in kept]
    if got and len(got) < len(rule.together):
        raise ValueError(
            f"[{op}] the state of {tensors} is incomplete: got {', '.join(got)}, "
            f"allowed {', '.join(rule.together)} or none of them."
        )


def _without(kept: State, slots: set[str], rule: Slots) -> State:
    """What is kept, without these slots. One moment of two begins at once, as zeros."""
    is_part = not slots.issuperset(rule.together)
    return {
        name: tree_map(mx.zeros_like, value) if name in slots else value
        for name, value in kept.items()
        if name not in slots or (is_part and name in rule.together)
    }


def _check_shapes(kept: dict[str, Any], path: Path, shape: tuple[int, ...], op: str) -> None:
    for slot, value in kept.items():
        own = value.shape if isinstance(value, (mx.array, Bytes)) else value
        if own != shape:
            raise ValueError(
                f"[{op}] the state is of another model: got {slot} of shape {own} for "
                f"'{name_of(path)}', the parameter has {shape}."
            )


def _as_tree(tensors: dict[Path, Kept], rule: Slots, op: str) -> State:
    """By path, as mlx.optimizers nests it."""
    items = (
        ((*path, rule[name].key), numbers_of(value))
        for path, kept in tensors.items()
        for name, value in kept.items()
    )
    tree: State | list[Any] = built(items, op)
    if isinstance(tree, list):  # of a tree that is a list: a dict has the same names
        return {str(place): node for place, node in enumerate(tree) if node}
    return tree


_DTYPES = tuple(DTYPES.values())
