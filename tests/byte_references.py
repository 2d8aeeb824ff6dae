"""Moments in bytes, in NumPy, as docs/precision.md defines them: rows of a scale and 64 codes."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

GROUP, ROW = 64, 68
SQUARES = "squares"
BYTE_FORMATS = ("bytes", SQUARES)
LEAST = 2.0**-110  # groups below it are zeros
SMALLEST_NORMAL = 2.0**-126
LARGEST_CODE = {"bytes": 127, SQUARES: 254}


@dataclass(frozen=True)
class ByteMistake:
    """What a coder could get wrong."""

    scale_of_the_tensor: bool = False
    not_companded: bool = False
    codes_cut_off: bool = False
    squares_become_zero: bool = False
    a_nan_for_all: bool = False


RIGHT = ByteMistake()


def grouped(values: np.ndarray) -> np.ndarray:
    flat = np.asarray(values).reshape(-1)
    return np.pad(flat, (0, -flat.size % GROUP)).reshape(-1, GROUP)


def as_rows(
    values: np.ndarray,
    form: str,
    random: np.ndarray | None = None,
    wrong: ByteMistake = RIGHT,
) -> np.ndarray:
    """float32 numbers as rows of bytes; at random with 15 bits for each of them."""
    x = grouped(np.asarray(values, np.float32))
    f = np.float32
    with np.errstate(all="ignore"):
        known = np.isfinite(x) & ((x >= 0) | (form == "bytes"))
        magnitude = np.where(known, np.abs(x), f(0))
        largest = magnitude.max(axis=1, keepdims=True, initial=0)
        if wrong.scale_of_the_tensor:
            largest = np.full_like(largest, largest.max(initial=0))
        if wrong.a_nan_for_all:
            known = np.broadcast_to(known.all(axis=1, keepdims=True), x.shape)
        is_some = largest >= f(LEAST)
        scale = np.where(is_some, np.sqrt(largest), f(0))
        dither = f(0)
        if random is not None:  # from -0.5 to 0.5, both apart
            dither = ((grouped(random) & 0x7FFF).astype(f) + f(0.5)) / f(32768) - f(0.5)
        rounded = np.floor if wrong.codes_cut_off else np.rint
        coder = np.where(is_some, f(LARGEST_CODE[form]) / np.where(is_some, scale, f(1)), f(0))
        normal = np.where(magnitude >= f(SMALLEST_NORMAL), magnitude, f(0))
        if wrong.not_companded:
            normal = normal * (normal / np.where(is_some, largest, f(1)))
        size = np.minimum(np.sqrt(normal) * coder, f(LARGEST_CODE[form]))
        code = rounded(np.copysign(size, x) + dither)
        if form == SQUARES and not wrong.squares_become_zero:
            code = np.maximum(code, (normal > 0) & is_some)
        code = np.where(known, code, 255 if form == SQUARES else -128)
    bytes_of = code.astype(np.int64).astype(np.uint8)
    return np.concatenate([scale.astype(f).view(np.uint8), bytes_of], axis=1)


def of_rows(rows: np.ndarray, form: str) -> np.ndarray:
    """The float32 numbers, flat."""
    scale = np.ascontiguousarray(rows[:, :4]).view(np.float32)
    code = np.ascontiguousarray(rows[:, 4:])
    f = np.float32
    with np.errstate(all="ignore"):
        if form == SQUARES:
            part = code.astype(f) * f(1 / 254) * scale
            return np.where(code == 255, f(np.nan), part * part).reshape(-1)
        q = code.view(np.int8).astype(f)
        part = q * f(1 / 127) * scale
        return np.where(q == -128, f(np.nan), part * np.abs(part)).reshape(-1)


def coding_error(values: np.ndarray, error: np.ndarray, form: str, at_random: bool) -> np.ndarray:
    """A bound on what coding changes of float64 numbers that are known within ``error``, for
    each: half a step of the code, or a whole one, at its place. It rises with the number and
    with the scale."""
    x = grouped(np.abs(np.nan_to_num(values)) + np.nan_to_num(error))
    scale = x.max(axis=1, keepdims=True, initial=0)
    some = np.where(scale > 0, scale, 1)
    step = (1.0 if at_random else 0.5) / LARGEST_CODE[form]
    root = np.sqrt(x / some)
    if form == SQUARES:  # what is not 0 has the code 1 at least
        step = np.maximum(step, np.where(root < 1 / 254, 1 / 254, 0))
    # Towards 0 a signed number may pass it.
    bound = ((root + step) ** 2 - root**2) * scale
    # float32's own roundings, a few ulps of the code; and groups that are zeros.
    bound = bound * (1 + 2.0**-10) + x * 2.0**-20 + np.where(scale < 2 * LEAST, x, 0)
    return bound.reshape(-1)[: np.size(values)].reshape(np.shape(values))
