// What the kernels share: types, what a kernel knows of its step when it is compiled, and how
// a block finds its tensor. NVRTC compiles them (csrc/cuda/compiler.h): there are no headers
// of CUDA's here, nor any of C++ but <cstdint> and <cstddef>.
#pragma once

#include "cuda/launch.h"

namespace mlx_fused_optim::cuda {
namespace {

// ---- Types ------------------------------------------------------------------------

// As memory has them, under the names by which csrc/cuda calls dtypes.
using float32 = float;
struct float16 {
  uint16_t bits;
};
struct bfloat16 {
  uint16_t bits;
};
struct bytes; // rows of csrc/math/bytes.h

constexpr uint32_t kLeastUsual = 0x0d000000u; // 2^-101, as bits

#ifdef __CUDACC__ // else tests/cuda/emulation.h has them
__device__ inline float float_of_half(uint16_t bits) {
  float x;
  asm("cvt.f32.f16 %0, %1;" : "=f"(x) : "h"(bits));
  return x;
}
__device__ inline uint16_t half_of_float(float x) {
  uint16_t bits;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(x));
  return bits;
}
/// Two at once: `x` in the low half. Of NaN the hardware knows one only.
__device__ inline uint32_t bfloat16_pair(float x, float y) {
  uint32_t pair;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(y), "f"(x));
  return pair;
}
/// The root, rounded to nearest, of what is finite and at least kLeastUsual: as the compiler has
/// it, without its question for each.
__device__ inline float root_of_usual(float x) {
  float inverse;
  asm("rsqrt.approx.ftz.f32 %0, %1;" : "=f"(inverse) : "f"(x));
  const float root = x * inverse;
  return __fmaf_rn(__fmaf_rn(-root, root, x), 0.5f * inverse, root);
}
#endif

__device__ inline float to_float(float x) { return x; }
__device__ inline float to_float(float16 x) { return float_of_half(x.bits); }
__device__ inline float to_float(bfloat16 x) {
  return fused_math::bits_to_float(uint32_t(x.bits) << 16);
}

template <typename T>
__device__ inline T from_float(float x);
template <>
__device__ inline float from_float(float x) {
  return x;
}
template <>
__device__ inline float16 from_float(float x) {
  return {half_of_float(x)};
}
template <>
__device__ inline bfloat16 from_float(float x) {
  return {static_cast<uint16_t>(bfloat16_pair(x, 0.0f))};
}

template <uint32_t types>
struct OnlyType;
template <>
struct OnlyType<bit_of(Type::float32)> {
  using type = float32;
};
template <>
struct OnlyType<bit_of(Type::float16)> {
  using type = float16;
};
template <>
struct OnlyType<bit_of(Type::bfloat16)> {
  using type = bfloat16;
};

/// Calls function(x) with x of this type, which is one of `types` (see bit_of). Where these
/// are one, nothing is asked.
template <uint32_t types, typename Function>
__device__ inline void with_type(Type type, Function function) {
  constexpr uint32_t others = types & (types - 1);
  if constexpr (others == 0) {
    function(typename OnlyType<types>::type());
  } else if (bit_of(type) & others) {
    with_type<others>(type, function);
  } else {
    with_type<types ^ others>(type, function);
  }
}

/// The fused_math::Format of this type, likewise.
template <uint32_t types>
__device__ inline uint32_t format_of(Type type) {
  constexpr bool is_one = (types & (types - 1)) == 0;
  return static_cast<uint32_t>(
      !is_one                              ? type
          : types == bit_of(Type::float32) ? Type::float32
          : types == bit_of(Type::float16) ? Type::float16
                                           : Type::bfloat16);
}

/// What a kernel knows of its step when it is compiled: the rule, the dtypes of parameters and
/// of the rule's slots, the set of dtypes that gradients have, and StepFlags.
template <uint32_t rule, typename P, typename S, uint32_t gradients, uint32_t flags>
struct Known {
  using Parameter = P;
  using State = S;
  static constexpr uint32_t kRule = rule;
  static constexpr uint32_t kGradients = gradients;
  static constexpr uint32_t kFlags = flags;
};

// ---- Where a block works -------------------------------------------------------------

/// The tensor that this block works on: the last that begins at or before it.
template <typename T, uint32_t capacity>
__device__ inline const T& find_tensor(const Launch<T, capacity>& launch) {
  uint32_t low = 0;
  uint32_t high = launch.common.count - 1;
  while (low < high) {
    const uint32_t middle = (low + high + 1) / 2;
    if (launch.tensors[middle].first_block <= blockIdx.x) {
      low = middle;
    } else {
      high = middle - 1;
    }
  }
  return launch.tensors[low];
}

/// Where element i, in row-major order, of parameter and gradient lies.
struct Place {
  int64_t parameter;
  int64_t gradient;
};
template <typename Base>
__device__ inline Place find_element(const AnyWay<Base>& tensor, uint64_t i) {
  Place place = {0, 0};
// Unrolled, its divisions would be most of what NVRTC has to compile.
#pragma unroll 1
  for (int d = tensor.dimensions - 1; d >= 0; --d) {
    const int64_t index = i % tensor.shape[d];
    i /= tensor.shape[d];
    place.parameter += index * tensor.parameter_strides[d];
    place.gradient += index * tensor.gradient_strides[d];
  }
  return place;
}

} // namespace
} // namespace mlx_fused_optim::cuda
