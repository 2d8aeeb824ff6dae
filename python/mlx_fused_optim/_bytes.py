"""What is kept of a tensor in bytes: rows of csrc/math/bytes.h, of which it has whole ones."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import mlx.core as mx

from . import _ext
from ._layout import Layout

BYTES = "8bit"
DTYPE = mx.uint8  # of rows
# Tensors of fewer elements keep float32: they are no memory to save, and the most delicate.
LEAST_SIZE = 4096


class Bytes(NamedTuple):
    """In the place of an array of numbers."""

    rows: mx.array
    shape: tuple[int, ...]
    is_unsigned: bool

    @property
    def dtype(self) -> mx.Dtype:
        return DTYPE

    @property
    def nbytes(self) -> int:
        return self.rows.nbytes

    def numbers(self) -> mx.array:
        return _ext.of_bytes(self.rows, list(self.shape), self.is_unsigned)


def numbers_of(value: mx.array | Bytes) -> mx.array:
    return value.numbers() if isinstance(value, Bytes) else value


def rows_shape(elements: int) -> tuple[int, int]:
    """That of the rows of an arena, which has whole groups."""
    return elements // _ext.BYTE_GROUP, _ext.BYTE_ROW


def split_rows(rows: mx.array, layout: Layout, number: int, is_unsigned: bool) -> list[Bytes]:
    """Those of each tensor of an arena of a layout."""
    return [
        Bytes(rows[first:end], shape, is_unsigned) for first, end, shape in _places(layout, number)
    ]


def joined_rows(
    values: Sequence[mx.array | Bytes | None], layout: Layout, number: int, is_unsigned: bool
) -> mx.array:
    """The way back, with zeros for None and between tensors."""
    parts: list[mx.array] = []
    done = 0

    def zeros(end: int) -> None:
        if end > done:
            parts.append(mx.zeros((end - done, _ext.BYTE_ROW), DTYPE))

    for value, (first, end, _) in zip(values, _places(layout, number), strict=True):
        zeros(first if value is not None else end)
        done = end
        if isinstance(value, Bytes):
            parts.append(value.rows)
        elif value is not None and end > first:
            parts.append(_ext.as_bytes(value, is_unsigned))
    zeros(rows_shape(layout.arenas[number].elements)[0])
    return mx.contiguous(mx.concatenate(parts)) if parts else mx.zeros((0, _ext.BYTE_ROW), DTYPE)


def _places(layout: Layout, number: int) -> Iterator[tuple[int, int, tuple[int, ...]]]:
    """The first row of each tensor, the one behind its last, and its shape."""
    row = layout.arenas[number]
    for tensor, offset in zip(row.tensors, row.offsets, strict=True):
        shape = layout.tensors[tensor][1]
        first = offset // _ext.BYTE_GROUP
        yield first, first + -(-math.prod(shape) // _ext.BYTE_GROUP), shape
