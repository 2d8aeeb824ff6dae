"""Gradients of several batches, and of several processes."""

from __future__ import annotations

from typing import Any

import mlx.core as mx

from . import _ext
from ._checks import checked_number, checked_scalar
from ._layout import Layout, layout_of, layout_of_gradients, layout_of_rows
from ._rules import DTYPES, FRAME_SLOTS, RULE_PLACES

__all__ = ["accumulate_gradients", "average_gradients"]

_SGD = next(number for number, row in enumerate(_ext.RULES) if row["name"] == "sgd")
_NOTHING_KEPT: list[list[mx.array]] = [[] for _ in range(RULE_PLACES + len(FRAME_SLOTS))]


def accumulate_gradients(
    total: Any,
    gradients: Any,
    scale: float | mx.array = 1.0,
    *,
    dtype: mx.Dtype | None = None,
) -> Any:
    r"""Add the gradients of one more batch, the whole tree in one launch.

    .. math:: T \leftarrow T + c \, G

    The first call gives the gradients as they are. What comes of the following ones lies in a few
    flat arrays, and is written in place where nobody else holds the total: in a loop like the
    example's the sum of any number of batches takes the memory of one. An array that somebody
    holds keeps its values.

    The sum is computed in float32 and rounded to the total's dtype: with a ``scale`` of 1 it has
    the bits of ``tree_map(mx.add, total, gradients)``. It is for any optimizer, also in a
    function that ``mx.compile`` traces.

    Args:
        total (tree): What was accumulated before, or None to begin.
        gradients (tree): A tree of arrays: float32, float16 or bfloat16, of the total's shapes.
        scale (float or array): The factor :math:`c` of these gradients, for instance one over the
            number of batches. Default: ``1.0``.
        dtype (Dtype, optional): That of a total that begins; float32 to sum half gradients
            without their roundings. Default: each gradient's own.

    Returns:
        The new total, a tree of the structure of ``gradients``.

    Raises:
        ValueError, TypeError: The trees differ, an array is none of the three dtypes, or the
            scale is no number.

    Example:
        >>> from mlx_fused_optim import SGD, accumulate_gradients
        >>> optimizer, parameters = SGD(learning_rate=1.0), {"w": mx.zeros(2)}
        >>> total = None
        >>> for batch in range(4):
        ...     gradients = {"w": mx.array([1.0, 2.0]) * batch}
        ...     total = accumulate_gradients(total, gradients, scale=1 / 4)
        ...     mx.eval(total)
        >>> optimizer.apply_gradients(total, parameters)["w"]
        array([-1.5, -3], dtype=float32)
    """
    op = "accumulate_gradients"
    is_array = isinstance(scale, mx.array)
    scale = checked_scalar(op, "scale", scale) if is_array else checked_number(op, "scale", scale)
    if dtype is not None and dtype not in DTYPES.values():
        raise ValueError(
            f"[{op}] the dtype of a total is unknown: got {dtype}, allowed None, "
            f"{', '.join('mlx.core.' + name for name in DTYPES)}."
        )
    tree = _ext.Tree(gradients, gradients if total is None else total, op, exact=True)
    if total is None:
        is_kept = dtype is None or all(a.dtype == dtype for a in tree.parameters)
        if is_kept and isinstance(scale, float) and scale == 1:
            return tree.unflatten(tree.parameters)
        tree = _ext.Tree(gradients, tree.unflatten(_beginning(layout_of(tree), dtype)), op)
    # An SGD step with the rate -c, for which nothing reads the counter.
    options = _ext.Options(rule=_SGD, scalars=[-scale, *_NO_NUMBERS], flags=0, op=op)
    counter = mx.array(0, mx.uint64)
    return _ext.fused_step(tree, layout_of(tree).made, _NOTHING_KEPT, counter, options)[0]


def average_gradients(
    gradients: Any,
    group: mx.distributed.Group | None = None,
    all_reduce_size: int = 32 * 1024**2,
    communication_stream: mx.Stream | None = None,
) -> Any:
    r"""The mean of the gradients of all processes, as ``mlx.nn.average_gradients`` gives it.

    .. math:: G_i \leftarrow \frac{1}{N} \sum_{j=1}^{N} G_j

    Gradients are packed into flat arrays by one launch for each, which is one communication; what
    comes back are views of them. Gradients of several dtypes are an array a dtype, where MLX
    communicates each tensor alone. The sums are those of MLX's backend and the bits those of
    ``mlx.nn.average_gradients``, wherever the order of the sum does not depend on where a number
    lies: with two processes always; with more, the ring adds each part of an array in an order
    of its own, so that the last bit may differ.

    Every process must call it with a tree of the same structure, shapes and dtypes.

    Args:
        gradients (tree): A tree of arrays: float32, float16 or bfloat16. Arrays of integers
            are left as they are.
        group (mlx.core.distributed.Group, optional): The processes. Default: all of them.
        all_reduce_size (int): At most so many bytes are communicated at once, if several
            tensors are. At 0 or less each tensor is communicated alone. Default: 32 MiB.
        communication_stream (Stream, optional): Where to communicate. Default: the backend's.

    Returns:
        The mean, a tree of the structure of ``gradients``; of a single process the gradients.

    Raises:
        ValueError: An array is complex or float64.

    Example:
        >>> from mlx_fused_optim import average_gradients
        >>> average_gradients({"w": mx.array([1.0, 2.0])})  # of one process
        {'w': array([1, 2], dtype=float32)}
    """
    group = group or mx.distributed.init()
    if group.size() == 1:
        return gradients
    tree = _ext.Tree(gradients, gradients, "average_gradients")
    layout = layout_of_gradients(tree, max(all_reduce_size, 1))
    averages: list[Any] = [None] * len(tree)
    for number, packed in enumerate(_ext.pack_gradients(tree, layout.made)):
        total = mx.distributed.all_sum(packed, group=group, stream=communication_stream)
        tensors = layout.arenas[number].tensors
        average = total / group.size()
        is_one = len(tensors) == 1  # then it was not packed
        views = [average] if is_one else _ext.arena_views(average, layout.made, number)
        for tensor, view in zip(tensors, views, strict=True):
            averages[tensor] = view
    return tree.unflatten(averages)


_NO_NUMBERS = [0.0, 1.0, *[0.0] * len(_ext.RULES[_SGD]["scalars"])]  # weight decay, scale, SGD's


def _beginning(layout: Layout, dtype: mx.Dtype | None) -> list[mx.array]:
    """What any number can be added to without a change: -0.0."""
    rows = [(path, shape, dtype or own) for path, shape, own in layout.tensors]
    layout = layout_of_rows(rows)
    begun: list[Any] = [None] * len(rows)
    for number, arena in enumerate(layout.arenas):
        views = _ext.arena_views(mx.full(arena.shape, -0.0, arena.dtype), layout.made, number)
        for tensor, view in zip(arena.tensors, views, strict=True):
            begun[tensor] = view
    return begun
