// What the CPU kernels share: blocks that fit the first-level cache go through float32,
// and the vector of the instruction set that the file is compiled for.
#pragma once

#include "cpu/half.h"
#include "cpu/kernel.h"
#if defined(__SSE__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

namespace mlx_fused_optim::cpu {
namespace {

// Eight buffers of this many float32 are 16 KiB.
constexpr size_t kBlock = 512;

float read_at(const Source& source, int64_t at) {
  if (source.type == Type::float32) {
    return static_cast<const float*>(source.data)[at];
  }
  if (source.type == Type::int8) {
    return static_cast<const int8_t*>(source.data)[at];
  }
  const uint16_t half = static_cast<const uint16_t*>(source.data)[at];
  return source.type == Type::float16 ? widen_float16(half) : widen_bfloat16(half);
}

/// The elements [begin, begin + n) of a strided array into `buffer`, a run along
/// its last axis at a time.
void gather(const Source& source, size_t begin, size_t n, float* buffer) {
  const Strided& s = *source.strided;
  const size_t last = s.dimensions - 1;
  for (size_t done = 0; done < n;) {
    size_t rest = s.first + begin + done;
    int64_t at = 0;
    size_t run = n - done;
    for (size_t d = last + 1; d-- > 0;) {
      const size_t length = s.shape[d];
      const size_t index = rest % length;
      if (d == last && length - index < run) {
        run = length - index;
      }
      at += int64_t(index) * s.strides[d];
      rest /= length;
    }
    for (size_t i = 0; i < run; ++i) {
      buffer[done + i] = read_at(source, at + int64_t(i) * s.strides[last]);
    }
    done += run;
  }
}

/// The elements [begin, begin + n) of `source` as float32: in place if they
/// already are, else in `buffer`.
const float* read(const Source& source, size_t begin, size_t n, float* buffer) {
  if (source.strided) {
    gather(source, begin, n, buffer);
    return buffer;
  }
  if (source.type == Type::float32) {
    return static_cast<const float*>(source.data) + begin;
  }
  if (source.type == Type::int8) {
    widen_int8(static_cast<const int8_t*>(source.data) + begin, buffer, n);
    return buffer;
  }
  auto* half = static_cast<const uint16_t*>(source.data) + begin;
  source.type == Type::float16 ? widen_float16(half, buffer, n) : widen_bfloat16(half, buffer, n);
  return buffer;
}

void write(Type type, void* data, size_t begin, size_t n, const float* values) {
  if (type == Type::int8) {
    narrow_int8(values, static_cast<int8_t*>(data) + begin, n);
    return;
  }
  auto* half = static_cast<uint16_t*>(data) + begin;
  type == Type::float16 ? narrow_float16(values, half, n) : narrow_bfloat16(values, half, n);
}

// The widest vector of this instruction set, spelled in the compiler's vector
// extension: g++'s own vectoriser gave up on this loop, at half the speed.
#if defined(__AVX512F__)
constexpr size_t kVectorBytes = 64;
#elif defined(__AVX2__)
constexpr size_t kVectorBytes = 32;
#else
constexpr size_t kVectorBytes = 16;
#endif
typedef float Vector __attribute__((vector_size(kVectorBytes)));
typedef uint32_t VectorBits __attribute__((vector_size(kVectorBytes)));
constexpr size_t kWidth = kVectorBytes / sizeof(float);

/// Of neighbours, the positions.
template <typename T>
typename fused_math::Bits<T>::type positions(uint32_t first);
template <>
inline uint32_t positions<float>(uint32_t first) {
  return first;
}

template <typename T>
__attribute__((always_inline)) inline void load(T& value, const float* from, size_t i) {
  memcpy(&value, from + i, sizeof(T));
}

template <typename T>
__attribute__((always_inline)) inline void store(float* to, size_t i, const T& value) {
  memcpy(to + i, &value, sizeof(T));
}

} // namespace
} // namespace mlx_fused_optim::cpu

namespace fused_math {

template <>
struct Bits<mlx_fused_optim::cpu::Vector> {
  using Vector = mlx_fused_optim::cpu::Vector;
  using type = mlx_fused_optim::cpu::VectorBits;
  MATH_MEMBER type of(Vector x) { return (type)x; }
  MATH_MEMBER Vector to(type bits) { return (Vector)bits; }
  MATH_MEMBER Vector quotient(Vector a, Vector b) { return a / b; }
  MATH_MEMBER Vector root(Vector x) {
#if defined(__AVX512F__)
    return (Vector)_mm512_sqrt_ps((__m512)x);
#elif defined(__AVX2__)
    return (Vector)_mm256_sqrt_ps((__m256)x);
#elif defined(__SSE__)
    return (Vector)_mm_sqrt_ps((__m128)x);
#elif defined(__aarch64__)
    return (Vector)vsqrtq_f32((float32x4_t)x);
#else
    for (size_t i = 0; i < mlx_fused_optim::cpu::kWidth; ++i) {
      x[i] = sqrt_float(x[i]);
    }
    return x;
#endif
  }
};

} // namespace fused_math

namespace mlx_fused_optim::cpu {
namespace {

template <>
inline VectorBits positions<Vector>(uint32_t first) {
  VectorBits result;
  for (uint32_t i = 0; i < kWidth; ++i) {
    result[i] = first + i;
  }
  return result;
}

} // namespace
} // namespace mlx_fused_optim::cpu
