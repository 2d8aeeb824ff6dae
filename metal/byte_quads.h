// Rows of bytes (csrc/math/bytes.h): kQuad neighbours of a group are a thread's, and 16 threads
// of a SIMD group have all of it.
#pragma once

#include "math/frame.h"
#include "quads.h"

constant constexpr uint32_t kGroupThreads = kByteGroup / kQuad;

inline device char* row_at(device char* rows, uint64_t at) {
  return rows + at / kByteGroup * kByteRow;
}

/// The codes of a quad, and the scale of its group.
struct ByteQuad {
  float4 codes;
  float scale;
};

inline ByteQuad load_bytes(
    uint32_t format,
    device const char* rows,
    uint64_t at,
    uint32_t count,
    bool wide) {
  device const char* row = rows + at / kByteGroup * kByteRow;
  device const char* codes = row + kByteScale + at % kByteGroup;
  // A thread with nothing to do is at no row of its own.
  const float scale = count > 0 ? *(device const float*)row : 0.0f;
  return format == kByteSquares
      ? ByteQuad{load_quad((device const uint8_t*)codes, 1, count, wide), scale}
      : ByteQuad{load_quad((device const int8_t*)codes, 1, count, wide), scale};
}

inline void store_bytes(
    uint32_t format,
    device char* rows,
    uint64_t at,
    ByteQuad quad,
    uint32_t count,
    bool wide) {
  device char* row = row_at(rows, at);
  device char* codes = row + kByteScale + at % kByteGroup;
  if (format == kByteSquares) {
    store_quad((device uint8_t*)codes, quad.codes, count, wide);
  } else {
    store_quad((device int8_t*)codes, quad.codes, count, wide);
  }
  if (count > 0 && at % kByteGroup == 0) {
    *(device float*)row = quad.scale;
  }
}

inline float4 values_of_bytes(uint32_t format, ByteQuad quad) {
  float4 values;
  UNROLLED for (uint32_t i = 0; i < kQuad; ++i) {
    values[i] = byte_value(quad.codes[i], quad.scale, format);
  }
  return values;
}

/// Of `count` values of each thread. Every thread of the SIMD group calls it.
inline ByteQuad bytes_of_values(
    uint32_t format,
    float4 values,
    uint32_t count,
    uint32_t position,
    int slot,
    RandomKey key,
    uint32_t flags) {
  uint32_t peak = 0;
  UNROLLED for (uint32_t i = 0; i < kQuad; ++i) {
    peak = max(peak, i < count ? byte_peak(values[i], format) : 0u);
  }
  UNROLLED for (uint32_t mask = 1; mask < kGroupThreads; mask *= 2) {
    peak = max(peak, simd_shuffle_xor(peak, ushort(mask)));
  }
  const ByteScale scale = byte_scale(peak, format);
  ByteQuad quad = {float4(0.0f), scale.scale};
  UNROLLED for (uint32_t i = 0; i < kQuad; ++i) {
    const float dither = slot_dither<float>(position + i, slot, key, flags);
    quad.codes[i] = byte_code(values[i], scale, dither, format);
  }
  return quad;
}

/// What was loaded, to be stored again: when all threads of the group have its scale.
inline ByteQuad bytes_as_they_were(ByteQuad quad) {
  quad.scale = bits_to_float(simd_shuffle_xor(float_to_bits(quad.scale), ushort(0)));
  return quad;
}

/// Zeroes an element of a gap, and the scale of a group that is nothing else.
inline void clear_bytes(device char* rows, uint64_t at) {
  store_bytes(kBytes, rows, at, ByteQuad{float4(0.0f), 0.0f}, 1, false);
}
