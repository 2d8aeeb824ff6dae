// Rows of bytes (csrc/math/bytes.h) to float32 and back, whole groups at a time.
#pragma once

#include "cpu/blocks.h"

namespace mlx_fused_optim::cpu {
namespace {

using fused_math::kByteGroup;
using fused_math::kByteRow;
using fused_math::kByteScale;

bool is_bytes(Type type) { return type == Type::bytes || type == Type::byte_squares; }

/// The row of the group that begins at element `at`.
uint8_t* row_at(const void* rows, size_t at) {
  return static_cast<uint8_t*>(const_cast<void*>(rows)) + at / kByteGroup * kByteRow;
}

template <uint32_t format>
void read_group(const uint8_t* row, float* values) {
  float scale;
  memcpy(&scale, row, sizeof(scale));
  for (size_t i = 0; i < kByteGroup; ++i) {
    const uint8_t byte = row[kByteScale + i];
    values[i] = format == fused_math::kByteSquares ? float(byte) : float(int8_t(byte));
  }
  for (size_t i = 0; i < kByteGroup; i += kWidth) {
    Vector value;
    load(value, values, i);
    store(values, i, fused_math::byte_value(value, scale, format));
  }
}

/// Of a group's magnitudes, as bits.
struct Ends {
  uint32_t least, largest;
};

/// Numbers without a sign have none: one with a sign is above all that are finite.
template <uint32_t format>
Ends ends_of_group(const float* values) {
  VectorBits least = VectorBits{} - 1u, largest{};
  for (size_t i = 0; i < kByteGroup; i += kWidth) {
    Vector value;
    load(value, values, i);
    const VectorBits bits =
        VectorBits(value) & (format == fused_math::kByteSquares ? 0xffffffffu : 0x7fffffffu);
    least = bits < least ? bits : least;
    largest = bits > largest ? bits : largest;
  }
  Ends ends = {~0u, 0};
  for (size_t i = 0; i < kWidth; ++i) {
    ends.least = least[i] < ends.least ? least[i] : ends.least;
    ends.largest = largest[i] > ends.largest ? largest[i] : ends.largest;
  }
  return ends;
}

template <uint32_t format>
uint32_t peak_of_group(const float* values) {
  uint32_t peak = 0;
  for (size_t i = 0; i < kByteGroup; ++i) {
    const uint32_t own = fused_math::byte_peak(values[i], format);
    peak = own > peak ? own : peak;
  }
  return peak;
}

template <uint32_t format>
void write_group(
    float* values,
    uint8_t* row,
    uint32_t position,
    int slot,
    fused_math::RandomKey key,
    uint32_t flags) {
  const Ends ends = ends_of_group<format>(values);
  const bool is_finite = ends.largest < 0x7f800000u;
  const fused_math::ByteScale scale =
      fused_math::byte_scale(is_finite ? ends.largest : peak_of_group<format>(values), format);
  const bool is_usual = is_finite && ends.least >= 0x00800000u && scale.coder > 0;
  for (size_t i = 0; i < kByteGroup; i += kWidth) {
    Vector value;
    load(value, values, i);
    const Vector dither = fused_math::slot_dither<Vector>(
        positions<Vector>(position + uint32_t(i)), slot, key, flags);
    store(
        values,
        i,
        is_usual
            ? fused_math::usual_byte_code(
                  value, fused_math::root(fused_math::magnitude_of(value)), scale, dither, format)
            : fused_math::byte_code(value, scale, dither, format));
  }
  memcpy(row, &scale.scale, sizeof(scale.scale));
  for (size_t i = 0; i < kByteGroup; ++i) {
    row[kByteScale + i] = uint8_t(fused_math::float_to_bits(values[i]));
  }
}

/// The elements from `at` on, the last group whole: `buffer` has room for that.
const float* read_bytes(const Source& source, size_t at, size_t n, float* buffer) {
  const auto read = source.type == Type::bytes ? read_group<fused_math::kBytes>
                                               : read_group<fused_math::kByteSquares>;
  for (size_t i = 0; i < n; i += kByteGroup) {
    read(row_at(source.data, at + i), buffer + i);
  }
  return buffer;
}

/// The way back; `values` are codes then. What is missing of the last group is zeros.
void write_bytes(
    Type type,
    void* rows,
    size_t at,
    size_t n,
    float* values,
    int slot,
    fused_math::RandomKey key,
    uint32_t flags) {
  const auto write =
      type == Type::bytes ? write_group<fused_math::kBytes> : write_group<fused_math::kByteSquares>;
  for (size_t i = n; i % kByteGroup != 0; ++i) {
    values[i] = 0.0f;
  }
  for (size_t i = 0; i < n; i += kByteGroup) {
    write(values + i, row_at(rows, at + i), uint32_t(at + i), slot, key, flags);
  }
}

void copy_rows(const void* from, void* to, size_t at, size_t n) {
  if (from != to) {
    memcpy(row_at(to, at), row_at(from, at), (n + kByteGroup - 1) / kByteGroup * kByteRow);
  }
}

} // namespace
} // namespace mlx_fused_optim::cpu
