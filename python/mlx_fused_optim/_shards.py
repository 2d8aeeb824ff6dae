"""What each of several processes has of a model, and how it is communicated."""

from __future__ import annotations

from typing import Any, NamedTuple

import mlx.core as mx

from . import _ext
from ._layout import Layout, layout_of_part
from ._recent import Recent

# Bytes of an array that is communicated, if several tensors are. Of at least 8 MiB, a step of 448
# tensors of (16, 4096), AdamW, took 6.6 ms with NCCL on two GPUs; of at least 64 MiB 3.3
# (docs/architecture.md).
SHARE, SMALLEST, LARGEST = 16, 64 << 20, 128 << 20
_ALIGNMENT = 256  # bytes, at which a tensor begins


class Rounds(NamedTuple):
    """What is communicated at once: of each process a slice, all of one size."""

    arenas: _ext.Layout  # of all tensors, each of slices in the order of the processes
    slices: _ext.Layout  # of the own tensors, those of this process


class Shards:
    """The tensors of a layout in runs, one a process, of about the same bytes. Everything is the
    same on every process, but for ``own``."""

    def __init__(self, whole: Layout, rank: int, size: int):
        self.whole = whole
        self._rank = rank
        self._padded = _padded(whole)
        weights = [self._padded[i] * row[2].size for i, row in enumerate(whole.tensors)]
        self._runs = _runs(weights, size)
        self.own = self._runs[rank]  # the numbers of this process' tensors
        self.layouts = [layout_of_part(whole, numbers) for numbers in self._runs]
        self.layout = self.layouts[rank]
        # Of the arenas of each of them the number of the whole arena that they are parts of.
        number_of = {place: i for i, (place, _) in enumerate(whole.made.places)}
        self.origins = [[number_of[place] for place, _ in o.made.places] for o in self.layouts]
        self.parameters = self.rounds([row[2] for row in whole.tensors])
        self._of_gradients: Recent[Rounds] = Recent(4)

    def gradients(self, dtypes: list[mx.Dtype]) -> Rounds:
        """Of gradients, whose dtypes may be others."""
        key = tuple(dtypes)
        return self._of_gradients.find(key) or self._of_gradients.keep(key, self.rounds(dtypes))

    def rounds(self, dtypes: list[mx.Dtype]) -> Rounds:
        tensors = zip(self.whole.tensors, dtypes, strict=True)
        rows = [(path, shape, dtype) for (path, shape, _), dtype in tensors]
        places = {number: place for place, number in enumerate(self.own)}
        # A kernel zeroes the gap behind a tensor: of smaller elements it has more.
        units = [_ALIGNMENT // dtype.size for dtype in dtypes]
        padded = {t: -(-n // units[t]) * units[t] for t, n in self._padded.items()}
        arenas: list[Any] = []
        slices: list[Any] = []
        for dtype in dict.fromkeys(dtypes):
            runs = [[t for t in run if dtypes[t] == dtype] for run in self._runs]
            for parts in _rounds(runs, padded, dtype.size):
                length = max(sum(padded[t] for t in part) for part in parts)
                offsets = {}
                for rank, part in enumerate(parts):
                    at = rank * length
                    for t in part:
                        offsets[t] = at
                        at += padded[t]
                first, mine = self._rank * length, parts[self._rank]
                of_slice = [places[t] for t in mine], [offsets[t] - first for t in mine]
                arenas.append((dtype, len(parts) * length, [*offsets], [*offsets.values()], *_END))
                slices.append((dtype, length, *of_slice, *_END))
        own_rows = [rows[number] for number in self.own]
        return Rounds(_ext.Layout(rows, arenas), _ext.Layout(own_rows, slices))


_END = False, 0, 0  # of an arena that is no state's


def _padded(whole: Layout) -> dict[int, int]:
    """Elements of each tensor, with the gap behind it."""
    padded = {}
    for arena in whole.arenas:
        ends = [*arena.offsets[1:], arena.elements]
        for tensor, begin, end in zip(arena.tensors, arena.offsets, ends, strict=True):
            padded[tensor] = end - begin
    return padded


def _runs(weights: list[int], parts: int) -> list[list[int]]:
    """Numbers in order, in runs of about the same weight: each is where its middle falls."""
    runs: list[list[int]] = [[] for _ in range(parts)]
    total, before = sum(weights), 0
    for number, weight in enumerate(weights):
        runs[min((2 * before + weight) * parts // (2 * total), parts - 1) if total else 0].append(
            number
        )
        before += weight
    return runs


def _rounds(runs: list[list[int]], padded: dict[int, int], item: int) -> list[list[list[int]]]:
    """For each round the tensors of each process that go with it. A large tensor makes slices
    large, and so rounds few: none is to be mostly gaps."""
    sizes = [[padded[t] * item for t in run] for run in runs]
    total = sum(map(sum, sizes))
    largest = max((size for own in sizes for size in own), default=0) * len(runs)
    limit = max(min(max(total // SHARE, SMALLEST), LARGEST), largest)
    count = max(total // limit, 1)
    parts = [
        [[run[i] for i in part] for part in _runs(own, count)]
        for run, own in zip(runs, sizes, strict=True)
    ]  # of each process, then of each round
    rounds = [list(tensors) for tensors in zip(*parts, strict=True)]
    return [tensors for tensors in rounds if any(tensors)]


def broadcast(x: mx.array, is_mine: bool, group: mx.distributed.Group) -> mx.array:
    """That of the one process whose it is, to the bit, evaluated."""
    words = mx.uint32 if x.dtype.size == 4 else mx.uint8  # NCCL knows no others
    bits = mx.view(mx.contiguous(x), words)
    bits = bits if is_mine else mx.zeros_like(bits)
    received = mx.view(mx.distributed.all_sum(bits, group=group), x.dtype)
    mx.eval(received)
    return received
