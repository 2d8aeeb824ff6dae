"""Masters in 24 bits, from and to float32: csrc/math/rounding.h in MLX's operations."""

from __future__ import annotations

import mlx.core as mx

MASTER24 = "24bit"


def parts_of(master: mx.array) -> tuple[mx.array, mx.array]:
    """A float32 number to nearest, as a bfloat16 parameter and its byte."""
    bits = master.view(mx.uint32).astype(mx.int64)
    bits = mx.where(mx.isnan(master), bits, bits + 0x7F + (bits >> 8 & 1)) >> 8
    upper = mx.where(mx.isnan(master), bits, bits + 0x80) >> 8
    byte = mx.where(mx.isnan(master), 0, bits - (upper << 8)).astype(mx.int8)
    return upper.astype(mx.uint16).view(mx.bfloat16), byte


def byte_of(master: mx.array, parameter: mx.array) -> mx.array:
    """What tells a float32 master from its bfloat16 parameter, in 256ths of the parameter's last
    bit; 0 where the parameter is not its rounding: then somebody else has set it."""
    bits = master.view(mx.uint32).astype(mx.int64)
    bits = (bits + 0x7F + (bits >> 8 & 1)) >> 8
    units = bits - (_bits(parameter) << 8)
    # A float32 master rounds ties to even, also down.
    is_own = (units >= -128) & (units <= 128) & ~mx.isnan(master)
    return mx.where(is_own, mx.minimum(units, 127), 0).astype(mx.int8)


def master_of(byte: mx.array, parameter: mx.array) -> mx.array:
    """The float32 master of a parameter and its byte."""
    bits = _bits(parameter) << 16
    magnitude = (bits & 0x7FFFFFFF) + byte.astype(mx.int64) * 256
    is_number = (magnitude >= 0) & (magnitude <= 0x7F800000)
    master = mx.where(is_number, magnitude | (bits & 0x80000000), bits)
    return master.astype(mx.uint32).view(mx.float32)


def _bits(parameter: mx.array) -> mx.array:
    return parameter.view(mx.uint16).astype(mx.int64)
