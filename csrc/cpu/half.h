// float16, bfloat16 and int8 to float32 and back, a block at a time, rounding to
// nearest even. The loops are written to be vectorised.
#pragma once

#include <stddef.h>
#include <stdint.h>
#include <string.h>
#if defined(__F16C__)
#include <immintrin.h>
#endif

namespace mlx_fused_optim::cpu {
namespace {

inline uint32_t float_bits(float x) {
  uint32_t bits;
  memcpy(&bits, &x, sizeof(bits));
  return bits;
}

inline float bits_float(uint32_t bits) {
  float x;
  memcpy(&x, &bits, sizeof(x));
  return x;
}

inline float widen_bfloat16(uint16_t x) { return bits_float(uint32_t(x) << 16); }

inline uint16_t narrow_bfloat16(float x) {
  const uint32_t bits = float_bits(x);
  const uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  const bool is_nan = (bits & 0x7fffffff) > 0x7f800000;
  return uint16_t(is_nan ? (bits >> 16) | 0x40 : rounded);
}

inline float widen_float16(uint16_t x) {
  // The exponent's bias differs by 112: a multiplication by 2^112 also makes
  // subnormals normal. Infinity and NaN need the largest exponent instead.
  const uint32_t magnitude = uint32_t(x & 0x7fff) << 13;
  const uint32_t special = magnitude | 0x7f800000;
  const uint32_t scaled = float_bits(bits_float(magnitude) * 0x1p112f);
  return bits_float((magnitude >= 0x0f800000 ? special : scaled) | uint32_t(x & 0x8000) << 16);
}

inline uint16_t narrow_float16(float x) {
  const uint32_t sign = float_bits(x) >> 16 & 0x8000;
  const uint32_t magnitude = float_bits(x) & 0x7fffffff;
  // Normal results: rebias, round to nearest even in the integers. A carry out
  // of the mantissa is the right answer, up to infinity.
  const uint32_t normal = (magnitude - (112u << 23) + 0xfff + ((magnitude >> 13) & 1)) >> 13;
  // Subnormal results: adding 0.5 puts their unit, 2^-24, at the last bit.
  const uint32_t subnormal = float_bits(bits_float(magnitude) + 0.5f) - float_bits(0.5f);
  uint32_t result = magnitude < 0x38800000 ? subnormal : normal;
  result = magnitude >= 0x477ff000 ? 0x7c00 : result;
  result = magnitude > 0x7f800000 ? 0x7e00 | ((magnitude >> 13) & 0x3ff) : result;
  return uint16_t(sign | result);
}

void widen_float16(const uint16_t* from, float* to, size_t n) {
  size_t i = 0;
#if defined(__F16C__)
  for (; i + 8 <= n; i += 8) {
    _mm256_storeu_ps(to + i, _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)(from + i))));
  }
#endif
  for (; i < n; ++i) {
    to[i] = widen_float16(from[i]);
  }
}

void narrow_float16(const float* from, uint16_t* to, size_t n) {
  size_t i = 0;
#if defined(__F16C__)
  for (; i + 8 <= n; i += 8) {
    _mm_storeu_si128(
        (__m128i*)(to + i), _mm256_cvtps_ph(_mm256_loadu_ps(from + i), _MM_FROUND_TO_NEAREST_INT));
  }
#endif
  for (; i < n; ++i) {
    to[i] = narrow_float16(from[i]);
  }
}

void widen_bfloat16(const uint16_t* from, float* to, size_t n) {
  for (size_t i = 0; i < n; ++i) {
    to[i] = widen_bfloat16(from[i]);
  }
}

void narrow_bfloat16(const float* from, uint16_t* to, size_t n) {
  for (size_t i = 0; i < n; ++i) {
    to[i] = narrow_bfloat16(from[i]);
  }
}

void widen_int8(const int8_t* from, float* to, size_t n) {
  for (size_t i = 0; i < n; ++i) {
    to[i] = from[i];
  }
}

/// Of integers from -128 to 127.
void narrow_int8(const float* from, int8_t* to, size_t n) {
  for (size_t i = 0; i < n; ++i) {
    to[i] = int8_t(int32_t(from[i]));
  }
}

} // namespace
} // namespace mlx_fused_optim::cpu
