"""Muon's orthogonalisation: matrices of one shape that lie beside each other are one batch."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from typing import Any, NamedTuple

import mlx.core as mx

from . import _ext
from ._checks import as_float
from ._dtypes import DTYPES, dtype_name
from ._layout import Layout
from ._recent import Recent
from .schedules._checks import LARGEST_FLOAT32, as_choice, as_integer

Triple = tuple[float, float, float]

COEFFICIENTS: dict[str, tuple[Triple, ...]] = {
    # Jordan et al., 2024, https://kellerjordan.github.io/posts/muon/: steep at 0, and then
    # anywhere between 0.68 and 1.13.
    "original": ((3.4445, -4.7750, 2.0315),),
    # Amsel et al., 2025, https://arxiv.org/abs/2505.16932: each the best odd polynomial of degree
    # 5 for what the ones before it leave of [0.001, 1], for arguments up to a hundredth larger:
    # roundings must not grow. tests/test_muon.py computes them. The last one converges.
    "polar_express": (
        (8.3865, -24.3696, 17.7251),
        (4.1414, -3.0173, 0.5524),
        (3.9226, -2.8672, 0.5357),
        (3.2540, -2.3922, 0.4827),
        (2.2512, -1.5963, 0.3960),
        (1.8700, -1.2279, 0.3582),
        (1.875, -1.25, 0.375),
    ),
}
SCALES = ("original", "match_rms_adamw")
# Batches of so many elements wait for each other: MLX evaluates breadth first, and where work is
# launched ahead would have the products of all of them at once. Of smaller ones that would be no
# harm.
_LARGE = 1 << 20


class NewtonSchulz(NamedTuple):
    """What is done to the directions of matrices, checked."""

    coefficients: tuple[Triple, ...]  # one triple an iteration
    scale: str
    dtype: str | None  # by its name, which can be pickled; None: that of the device

    def updates(self, directions: list[mx.array], layout: Layout, stream: Any) -> list[mx.array]:
        """An update for each tensor of the layout, of its shape; ``directions`` are its arenas.
        That of what is no matrix is its direction."""
        updates: list[Any] = [None] * len(layout.tensors)
        last = None
        with mx.stream(stream or mx.default_device()):
            for batch in batches_of(layout):
                arena = directions[batch.arena]
                place = batch.offset, batch.pitch
                if batch.is_matrix:
                    if last is not None and batch.is_large:
                        arena = _ext.after(arena, last)
                    # Of each matrix, without the powers of two that squares would lose.
                    stack, norms = _stacked(arena, batch), _ext.norms(batch.views(arena))
                    if _ext.is_tracing():
                        stack, norms = _near_one(stack, norms)
                    last = self._function(batch.shape)(stack, norms)
                    arena, place = last.reshape(-1), (0, batch.size)
                views = batch.views(arena, *place)
                for tensor, view in zip(batch.tensors, views, strict=True):
                    updates[tensor] = view
        return updates

    def _function(self, shape: tuple[int, ...]) -> Callable[[mx.array, mx.array], mx.array]:
        on_gpu = mx.default_device().type == mx.gpu
        dtype = self.dtype or ("bfloat16" if on_gpu else "float32")
        rows, columns = shape[0], math.prod(shape[1:])
        is_long = max(rows, columns) >= 2 * min(rows, columns)
        scale = scale_of(shape, self.scale)
        return _made(self.coefficients, scale, dtype, rows > columns, is_long, on_gpu)


class Batch(NamedTuple):
    """Tensors of one shape, one after another in an arena."""

    arena: int
    shape: tuple[int, ...]
    tensors: list[int]
    offset: int  # of the first, in elements
    pitch: int  # from one to the next

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def is_matrix(self) -> bool:
        return len(self.shape) > 1 and self.size > 0

    @property
    def is_large(self) -> bool:
        return self.size * len(self.tensors) >= _LARGE

    def views(self, arena: mx.array, offset: int | None = None, pitch: int = 0) -> list[mx.array]:
        """The tensors, where they lie, or at other places."""
        place = (self.offset, self.pitch) if offset is None else (offset, pitch)
        return _ext.batch_views(arena, self.shape, len(self.tensors), *place)


_batches: Recent[list[Batch]] = Recent(64)


def batches_of(layout: Layout) -> list[Batch]:
    """An arena bounds what a batch takes: a sixteenth of all, or its one matrix."""
    found = _batches.find(layout.key)
    return _batches.keep(layout.key, _found_batches(layout)) if found is None else found


def has_matrices(layout: Layout) -> bool:
    return any(batch.is_matrix for batch in batches_of(layout))


def _found_batches(layout: Layout) -> list[Batch]:
    batches: list[Batch] = []
    for number, arena in enumerate(layout.arenas):
        for tensor, offset in zip(arena.tensors, arena.offsets, strict=True):
            shape = layout.tensors[tensor][1]
            last = batches[-1] if batches else None
            if last and (last.arena, last.shape) == (number, shape):
                if len(last.tensors) == 1:
                    batches[-1] = last._replace(pitch=offset - last.offset)
                last.tensors.append(tensor)
            else:
                batches.append(Batch(number, shape, [tensor], offset, math.prod(shape)))
    return batches


def _stacked(arena: mx.array, batch: Batch) -> mx.array:
    """(matrices, rows, columns), without a copy unless there is memory between them."""
    count, rows, size = len(batch.tensors), batch.shape[0], batch.size
    view = partial(_ext.arena_view, arena, offset=batch.offset, paced=batch.is_large)
    if batch.pitch == size:
        return view((count, rows, size // rows))
    with_gaps = view((count, batch.pitch))
    # As `with_gaps[:, :size]`, whose shape MLX cannot infer in a compiled step that is shapeless.
    whole = mx.slice(with_gaps, mx.array([0]), axes=[1], slice_size=[count, size])
    return whole.reshape(count, rows, -1)


def scale_of(shape: tuple[int, ...], scale: str) -> float:
    """What an orthogonal matrix of this shape is multiplied with."""
    if scale == "original":
        return math.sqrt(max(1.0, shape[-2] / shape[-1]))  # as mlx.optimizers, of filters too
    return 0.2 * math.sqrt(max(shape[0], math.prod(shape[1:])))


@lru_cache(maxsize=256)
def _made(
    coefficients: tuple[Triple, ...],
    scale: float,
    dtype: str,
    is_tall: bool,
    is_long: bool,
    on_gpu: bool,
) -> Callable[[mx.array, mx.array], mx.array]:
    # Where products are exact to float32: on a CPU. MLX's CUDA multiplies float32 as TF32.
    through_gram = is_long and dtype == "float32" and not on_gpu
    iterate = _by_gram_matrices if through_gram else _by_products

    def function(stack: mx.array, norms: mx.array) -> mx.array:
        if not coefficients:
            return scale * _normalized(stack, norms)
        x = _normalized(stack.swapaxes(1, 2) if is_tall else stack, norms).astype(DTYPES[dtype])
        return iterate(x, coefficients, scale, is_tall)

    # On a CPU mx.compile would need a compiler of C++, and has little to fuse.
    return mx.compile(function) if on_gpu else function


# ``scale`` times matrices of about orthogonal rows, of a batch of matrices x that have at least as
# many columns as rows and singular values from 0 to 1: a s + b s^3 + c s^5 takes the place of
# each, for one triple after another. The transpose of it, in rows, where ``is_tall``.


def _by_products(
    x: mx.array, coefficients: tuple[Triple, ...], scale: float, is_tall: bool
) -> mx.array:
    """As mlx.optimizers.Muon: (a + b x x' + c (x x')^2) x, three products an iteration."""
    last = len(coefficients) - 1
    for i, (a, b, c) in enumerate(coefficients):
        gram = x @ x.swapaxes(1, 2)
        factor = mx.addmm(gram, gram, gram, alpha=c, beta=b)
        x = _applied(factor, x, a, *((scale, is_tall) if i == last else (1.0, False)))
    return x


# What a Gram matrix has of roundings, 2^-24, may grow this much: to a hundredth of the whole.
_MOST_GROWTH = 2.0**18


def _by_gram_matrices(
    x: mx.array, coefficients: tuple[Triple, ...], scale: float, is_tall: bool
) -> mx.array:
    """The same for long rows: all factors are polynomials of the first r = x x', and so is the next
    x x', so that x itself is multiplied only at the end, or where roundings have grown: a
    small singular value of r has grown by a^2 in an iteration, and its error too."""
    row = mx.arange(x.shape[1])
    identity = (row[:, None] == row).astype(mx.float32)  # as mx.eye, likewise
    while coefficients:
        gram = x @ x.swapaxes(1, 2)
        whole, growth = identity, 1.0
        for i, (a, b, c) in enumerate(coefficients):
            factor = a * identity + mx.addmm(gram, gram, gram, alpha=c, beta=b)
            whole = factor @ whole if i else factor
            growth *= max(a * a, 1.0)
            if i + 1 == len(coefficients) or growth > _MOST_GROWTH:
                break
            gram = factor @ gram @ factor
        coefficients = coefficients[i + 1 :]
        x = _applied(whole, x, 0.0, *((1.0, False) if coefficients else (scale, is_tall)))
    return x


def _applied(factor: mx.array, x: mx.array, a: float, scale: float, is_tall: bool) -> mx.array:
    """scale (a + factor) x, or its transpose: the factor is symmetric."""
    if is_tall:
        x = x.swapaxes(1, 2)
    left, right = (x, factor) if is_tall else (factor, x)
    if a == 0:
        return scale * factor @ x if not is_tall else x @ (scale * factor)
    return mx.addmm(x, left, right, alpha=scale, beta=scale * a)


def _near_one(x: mx.array, norms: mx.array) -> tuple[mx.array, mx.array]:
    """Both over a power of two, which is exact: a derivative divides by the square of a norm."""
    exponents = mx.clip(mx.floor(mx.log2(mx.stop_gradient(norms))), -126, 126)
    powers = mx.where(norms < 2.0**-126, 1.0, 2.0**exponents)
    return x / powers.reshape(-1, 1, 1), norms / powers


def _normalized(x: mx.array, norms: mx.array) -> mx.array:
    """Over the Frobenius norm; what has no normal number for one stays what it is, about zero."""
    norms = norms.reshape(-1, 1, 1)
    return x / mx.where(norms < 2.0**-126, 1.0, norms)


# ---- Checks ------------------------------------------------------------------------


def checked_newton_schulz(
    op: str, steps: Any, coefficients: Any, dtype: str | None, scale: Any
) -> NewtonSchulz:
    """What makes sense, or ValueError or TypeError."""
    count = as_integer(op, "ns_steps", steps, at_least=0, at_most=100)
    triples = _checked_coefficients(op, coefficients)
    return NewtonSchulz(
        tuple(triples[min(i, len(triples) - 1)] for i in range(count)),
        as_choice(op, "scale", scale, SCALES),
        dtype,
    )


def checked_dtype(op: str, dtype: Any) -> str | None:
    """The name of one for matrix products."""
    if dtype is None:
        return None
    if not isinstance(dtype, mx.Dtype) or dtype not in DTYPES.values():
        raise ValueError(
            f"[{op}] ns_dtype is unknown: got {dtype}, allowed None, "
            f"{', '.join('mlx.core.' + name for name in DTYPES)}."
        )
    return dtype_name(dtype)


def _checked_coefficients(op: str, given: Any) -> Sequence[Triple]:
    if isinstance(given, str):
        return COEFFICIENTS[as_choice(op, "ns_coefficients", given, tuple(COEFFICIENTS))]
    try:
        rows = [tuple(map(as_float, row)) for row in given]
    except TypeError:
        rows = []
    is_right = rows and all(
        len(row) == 3 and all(x is not None and abs(x) <= LARGEST_FLOAT32 for x in row)
        for row in rows
    )
    if not is_right:
        raise ValueError(
            f"[{op}] ns_coefficients are no triples: got {given!r}, allowed "
            f"{', '.join(map(repr, COEFFICIENTS))}, or a list of (a, b, c), three "
            "finite numbers of float32."
        )
    return rows  # type: ignore[return-value]
