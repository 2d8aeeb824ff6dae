"""Arrays as bit patterns, between NumPy and MLX, without either's conversions.

NumPy has no bfloat16, and a test of rounding should not rest on the rounding of the
library under test: every narrow number here is made by integer arithmetic or by NumPy.
"""

import functools

import mlx.core as mx
import numpy as np
from byte_references import BYTE_FORMATS, as_rows, of_rows

DTYPES = {"float32": mx.float32, "float16": mx.float16, "bfloat16": mx.bfloat16}
# Of what a state keeps; rows of bytes are their own bits.
NAMED = {**DTYPES, "int8": mx.int8, "bytes": mx.uint8, "squares": mx.uint8}

# Distance from 1 to the next number, and the smallest positive number.
EPSILON = {"float32": 2.0**-23, "float16": 2.0**-10, "bfloat16": 2.0**-7}
TINIEST = {"float32": 2.0**-149, "float16": 2.0**-24, "bfloat16": 2.0**-133}


def dtype_name(dtype: mx.Dtype) -> str:
    return next(name for name, value in NAMED.items() if value == dtype)


def narrowed(values: np.ndarray, dtype: str) -> np.ndarray:
    """float32 numbers rounded to ``dtype``, to nearest even, as bits (uint32 or uint16);
    int8 is of integers, and numbers in a row become rows of bytes."""
    values = np.asarray(values, np.float32)
    if dtype in BYTE_FORMATS:
        return as_rows(values, dtype)
    if dtype == "int8":
        return values.astype(np.int8).view(np.uint8)
    if dtype == "float32":
        return values.view(np.uint32)
    if dtype == "float16":
        with np.errstate(over="ignore"):
            return values.astype(np.float16).view(np.uint16)
    bits = values.view(np.uint32).astype(np.uint64)
    rounded = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16
    return np.where(np.isnan(values), bits >> 16 | 0x40, rounded).astype(np.uint16)


def widened(bits: np.ndarray, dtype: str) -> np.ndarray:
    """Bits of ``dtype`` as the float32 numbers that they stand for; exact. Of rows of bytes
    whole groups, flat."""
    if dtype in BYTE_FORMATS:
        return of_rows(bits, dtype)
    if dtype == "float32":
        return bits.view(np.float32)
    if dtype == "int8":
        return bits.view(np.int8).astype(np.float32)
    if dtype == "float16":
        return bits.view(np.float16).astype(np.float32)
    return (bits.astype(np.uint32) << 16).view(np.float32)


SMALLEST_NORMAL = 2.0**-126


def flushed(values: np.ndarray) -> np.ndarray:
    """float32 numbers as Apple's GPUs see them: zeros of the same sign for subnormals."""
    return np.where(np.abs(values) < SMALLEST_NORMAL, np.copysign(np.float32(0), values), values)


@functools.cache
def keeps_subnormals() -> bool:
    """Whether the default device's kernels know float32's subnormal numbers: asked of a step
    that changes nothing. A test that assumes gradual underflow asks first."""
    import mlx_fused_optim as optim

    tree = {"w": mx.array([1e-40])}
    return optim.SGD(1.0).apply_gradients({"w": mx.zeros(1)}, tree)["w"].item() != 0


def one_nan(bits: np.ndarray, dtype: str) -> np.ndarray:
    """The same numbers with one pattern for NaN: its sign and payload are nobody's promise."""
    if bits.dtype == np.uint8:
        return bits
    nan = narrowed(np.float32(np.nan), dtype).astype(bits.dtype)
    return np.where(np.isnan(widened(bits, dtype)), nan, bits)


def to_mlx(bits: np.ndarray, dtype: str) -> mx.array:
    return mx.array(bits).view(NAMED[dtype]).reshape(bits.shape)


def of_mlx(array: mx.array) -> np.ndarray:
    """The bits of an array: uint32 for float32, uint16 for the half types, uint8 for int8."""
    unsigned = {1: mx.uint8, 2: mx.uint16, 4: mx.uint32, 8: mx.uint64}[array.dtype.size]
    # Flat first: view() does not take scalars.
    return np.array(array.reshape(-1).view(unsigned)).reshape(array.shape)


def same(a: mx.array, b: mx.array) -> bool:
    """Equal bit for bit, NaN and the sign of zero included."""
    return a.dtype == b.dtype and a.shape == b.shape and bool((of_mlx(a) == of_mlx(b)).all())
