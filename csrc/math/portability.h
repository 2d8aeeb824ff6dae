// The one place where the three compilers of csrc/math differ: g++ or clang
// (CPU), NVRTC (CUDA) and Apple's Metal compiler. Everything here works on plain
// values in float32 and 32/64-bit integers, because Metal has no double.
//
// Addition, multiplication, division, square root and fma round correctly in all three.
// Contraction must be off in all of them (-ffp-contract=off, --fmad=false,
// Metal's math mode "safe"): the formulas name each rounding.
#pragma once

#if defined(__METAL_VERSION__)
#include <metal_stdlib>
using namespace metal;
#if __METAL_VERSION__ >= 320
#pragma METAL fp math_mode(safe)
#pragma METAL fp contract(off)
#else
#pragma STDC FP_CONTRACT OFF
#endif
// Inlined, so that structs by value are in registers.
#define MATH_FN inline __attribute__((always_inline))
#define MATH_MEMBER static MATH_FN
#define MATH_CONSTANT constant
#elif defined(__CUDACC__)
#include <cstdint>
#define MATH_FN __device__ inline
#define MATH_MEMBER static __device__ inline
#define MATH_CONSTANT const
#else
#include <cstdint>
// Inlined before the vectoriser looks: structs by value must have become registers.
#define MATH_FN static inline __attribute__((always_inline))
#define MATH_MEMBER MATH_FN
#define MATH_CONSTANT const
#endif

namespace fused_math {

#if defined(__METAL_VERSION__)
// Metal promises of `/` and of sqrt what the caller's options say; of these, what they are.
MATH_FN float fma_float(float a, float b, float c) { return precise::fma(a, b, c); }
MATH_FN float rint_float(float x) { return precise::rint(x); }
MATH_FN float divide_float(float a, float b) { return precise::divide(a, b); }
MATH_FN float sqrt_float(float x) { return precise::sqrt(x); }
MATH_FN float bits_to_float(uint32_t bits) { return as_type<float>(bits); }
MATH_FN uint32_t float_to_bits(float x) { return as_type<uint32_t>(x); }
#elif defined(__CUDA_ARCH__)
MATH_FN float fma_float(float a, float b, float c) { return __fmaf_rn(a, b, c); }
MATH_FN float rint_float(float x) { return rintf(x); }
MATH_FN float divide_float(float a, float b) { return __fdiv_rn(a, b); }
MATH_FN float sqrt_float(float x) { return __fsqrt_rn(x); }
MATH_FN float bits_to_float(uint32_t bits) { return __uint_as_float(bits); }
MATH_FN uint32_t float_to_bits(float x) { return __float_as_uint(x); }

// What rounding.h has for every T, for float in fewer instructions: preferred as no
// templates. Of half types the hardware knows one NaN only.
MATH_FN float nearest_bfloat16(float x) {
  uint32_t pair;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(x), "f"(0.0f));
  return __uint_as_float(x != x ? (__float_as_uint(x) & 0xffff0000u) | 0x400000u : pair);
}
MATH_FN float random_bfloat16(float x, uint32_t random) {
  const uint32_t bits = __float_as_uint(x);
  return __uint_as_float((x != x ? bits | 0x400000u : bits + (random & 0xffffu)) & 0xffff0000u);
}
MATH_FN float nearest_float16(float x) {
  float rounded;
  asm("{ .reg .b16 half; cvt.rn.f16.f32 half, %1; cvt.f32.f16 %0, half; }"
      : "=f"(rounded)
      : "f"(x));
  return x != x ? __uint_as_float((__float_as_uint(x) & 0xffffe000u) | 0x400000u) : rounded;
}
#else
MATH_FN float fma_float(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
MATH_FN float rint_float(float x) { return __builtin_rintf(x); }
MATH_FN float divide_float(float a, float b) { return a / b; }
MATH_FN float sqrt_float(float x) { return __builtin_sqrtf(x); }
MATH_FN float bits_to_float(uint32_t bits) {
  float x;
  __builtin_memcpy(&x, &bits, sizeof(x));
  return x;
}
MATH_FN uint32_t float_to_bits(float x) {
  uint32_t bits;
  __builtin_memcpy(&bits, &x, sizeof(bits));
  return bits;
}
#endif

} // namespace fused_math
