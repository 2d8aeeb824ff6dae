// See emulation.h.
#pragma once

#include "math/rounding.h"

struct __nv_bfloat16 {
  uint16_t bits;
};

inline float __bfloat162float(__nv_bfloat16 x) {
  return fused_math::bits_to_float(uint32_t(x.bits) << 16);
}
inline __nv_bfloat16 __float2bfloat16_rn(float x) {
  const float rounded = fused_math::nearest_bfloat16(x);
  return {static_cast<uint16_t>(fused_math::float_to_bits(rounded) >> 16)};
}
struct alignas(4) __nv_bfloat162 {
  __nv_bfloat16 x, y;
};
/// As the instruction, which knows one NaN only.
inline __nv_bfloat162 __floats2bfloat162_rn(float x, float y) {
  auto half = [](float v) { return v == v ? __float2bfloat16_rn(v) : __nv_bfloat16{0x7fff}; };
  return {half(x), half(y)};
}
