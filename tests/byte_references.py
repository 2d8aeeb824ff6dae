"""Moments in bytes, in NumPy, as docs/precision.md defines them: rows of a scale and 64 codes."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

GROUP, ROW = 64, 68
SQUARES = "squares"
BYTE_FORMATS = ("bytes", SQUARES)
# Groups below it are zeros.
LEAST = {"bytes": 2.0**-110, SQUARES: 2.0**-100}
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
    """float32 numbers as rows of bytes; at random with 16 bits for each of them."""
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
        is_some = largest >= f(LEAST[form])
        scale = np.where(is_some, np.sqrt(largest) if form == SQUARES else largest, f(0))
        dither = f(0)
        if random is not None:  # from -0.5 to 0.5, both apart
            dither = ((grouped(random) & 0xFFFF).astype(f) + f(0.5)) / f(65536) - f(0.5)
        rounded = np.floor if wrong.codes_cut_off else np.rint
        some = np.where(is_some, scale, f(1))
        if form == SQUARES:
            code = rounded(np.sqrt(magnitude) * (f(254) / some) + dither)
            if not wrong.squares_become_zero:
                code = np.maximum(code, magnitude >= f(2.0**-126))
        else:
            below = f(0.5) * some + f(0.5) * magnitude
            part = np.where(known, x, f(0)) / (some if wrong.not_companded else below)
            code = rounded(part * f(127) + dither)
        code = np.where(is_some, code, f(0))
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
        return np.where(q == -128, f(np.nan), q / (f(254) - np.abs(q)) * scale).reshape(-1)


def coding_error(values: np.ndarray, error: np.ndarray, form: str, at_random: bool) -> np.ndarray:
    """A bound on what coding changes of float64 numbers that are known within ``error``, for
    each: half a step of the code, or a whole one, at its place. It rises with the number and
    with the scale."""
    x = grouped(np.abs(np.nan_to_num(values)) + np.nan_to_num(error))
    scale = x.max(axis=1, keepdims=True, initial=0)
    some = np.where(scale > 0, scale, 1)
    step = (1.0 if at_random else 0.5) / LARGEST_CODE[form]
    if form == SQUARES:
        root = np.sqrt(x / some)
        # What is not 0 has the code 1 at least.
        step = np.maximum(step, np.where(root < 1 / 254, 1 / 254, 0))
        bound = ((root + step) ** 2 - root**2) * scale
    else:
        code = 2 * (x / some) / (1 + x / some)
        bound = ((code + step) / (2 - code - step) - code / (2 - code)) * scale
    # float32's own roundings, a few ulps of the code; and groups that are zeros.
    bound = bound * (1 + 2.0**-10) + x * 2.0**-20 + np.where(scale < 2 * LEAST[form], x, 0)
    return bound.reshape(-1)[: np.size(values)].reshape(np.shape(values))
