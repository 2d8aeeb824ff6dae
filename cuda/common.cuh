// What the kernels share: types, and how a block finds its tensor.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "cuda/launch.h"

namespace mlx_fused_optim::cuda {
namespace {

__device__ inline float to_float(float x) { return x; }
__device__ inline float to_float(__half x) { return __half2float(x); }
__device__ inline float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }

template <typename T>
__device__ inline T from_float(float x);
template <>
__device__ inline float from_float(float x) {
  return x;
}
template <>
__device__ inline __half from_float(float x) {
  return __float2half_rn(x);
}
template <>
__device__ inline __nv_bfloat16 from_float(float x) {
  return __float2bfloat16_rn(x);
}

/// Calls function(x) with x of this type.
template <typename Function>
__device__ inline void with_type(Type type, Function function) {
  if (type == Type::float32) {
    function(float());
  } else if (type == Type::float16) {
    function(__half());
  } else {
    function(__nv_bfloat16());
  }
}

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
