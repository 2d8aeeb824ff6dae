"""Paths: where a tensor is in a tree, with keys as they are and not as ``tree_flatten`` has them.

A path is a tuple of keys: text, or ``(number,)`` for an integer, where a dict has it; a number
for a place in a list or tuple. So a key with dots, an empty one and an integer come back as
what they were, also from JSON, and "a.b" is not "b" in "a".
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Iterator
from typing import Any, Union

import mlx.core as mx

Key = Union[str, int, "tuple[int]"]
Path = tuple[Key, ...]


def leaves(tree: Any, path: Path = ()) -> Iterator[tuple[Path, Any]]:
    """The leaves of a tree, as the compiled walk names them."""
    if isinstance(tree, dict):
        for key, child in tree.items():
            yield from leaves(child, (*path, _of_dict(key)))
    elif isinstance(tree, (list, tuple)):
        for place, child in enumerate(tree):
            yield from leaves(child, (*path, place))
    else:
        yield path, tree


def _of_dict(key: Any) -> Key:
    if isinstance(key, str):
        return key
    try:
        return (operator.index(key),)
    except TypeError:
        return str(key)


def built(items: Iterable[tuple[Path, mx.array]], op: str) -> Any:
    """The tree of these leaves; a list has ``{}`` in places that no path has."""
    root: dict[Any, Any] = {}
    for path, leaf in items:
        node, key = root, None
        for following in path:
            node, key = node.setdefault(key, {}), following
            if not isinstance(node, dict):
                break
        if not isinstance(node, dict) or key in node:
            raise ValueError(
                f"[{op}] a tensor and a module have the same name: got '{name_of(path)}' besides a "
                "part of it, allowed one of them."
            )
        node[key] = leaf
    return _with_lists(root.get(None, {}))


def _with_lists(node: Any) -> Any:
    if not isinstance(node, dict):
        return node
    if node and all(isinstance(key, int) for key in node):
        return [_with_lists(node.get(place, {})) for place in range(max(node) + 1)]
    return {_key(key): _with_lists(child) for key, child in node.items()}


def _key(key: Key) -> str | int:
    # A place beside text: in a tree that was a list once.
    return key if isinstance(key, str) else key[0] if isinstance(key, tuple) else str(key)


def name_of(path: Path) -> str:
    """As ``mlx.utils.tree_flatten`` names it: what people read, and predicates are given."""
    return ".".join(str(key[0]) if isinstance(key, tuple) else str(key) for key in path)
