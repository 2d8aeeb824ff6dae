// Rows of bytes (csrc/math/bytes.h): kQuad neighbours of a group are a thread's, and 16 threads
// of a SIMD group have all of it.
#pragma once

#include "math/frame.h"
#include "quads.h"

constant constexpr uint32_t kGroupThreads = kByteGroup / kQuad;

/// The codes of a quad, and the scale of its group.
struct ByteQuad {
  float4 codes;
  float scale;
};

/// A scale is memory of the group's first thread alone, which reads and writes it for all.
inline bool has_scale(uint64_t at, uint32_t count) { return count > 0 && at % kByteGroup == 0; }

/// `lane` is the thread's in its threadgroup. Every thread of the SIMD group calls it.
inline ByteQuad load_bytes(
    uint32_t format,
    device const char* rows,
    uint64_t at,
    uint32_t count,
    bool wide,
    uint32_t lane) {
  device const char* row = rows + at / kByteGroup * kByteRow;
  device const char* codes = row + kByteScale + at % kByteGroup;
  const uint32_t first = lane % kSimdWidth / kGroupThreads * kGroupThreads;
  const uint32_t own = has_scale(at, count) ? *(device const uint32_t*)row : 0u;
  const float scale = bits_to_float(simd_shuffle(own, ushort(first)));
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
  device char* row = rows + at / kByteGroup * kByteRow;
  device char* codes = row + kByteScale + at % kByteGroup;
  if (format == kByteSquares) {
    store_quad((device uint8_t*)codes, quad.codes, count, wide);
  } else {
    store_quad((device int8_t*)codes, quad.codes, count, wide);
  }
  if (has_scale(at, count)) {
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
    quad.codes[i] = byte_code(values[i], scale, dither, format) - integer_base();
  }
  return quad;
}

/// Zeroes an element of a gap, and the scale of a group that is nothing else.
inline void clear_bytes(device char* rows, uint64_t at) {
  store_bytes(kBytes, rows, at, ByteQuad{float4(0.0f), 0.0f}, 1, false);
}
