// The boundary between the CUDA host code and the kernels: what a launch gets,
// by value. Compiled by g++ and NVRTC alike, and free of MLX.
#pragma once

#include <cstddef>
#include <cstdint>

#include "math/sgd.h"

namespace mlx_fused_optim::cuda {

enum class Type : uint32_t { float32, float16, bfloat16 };

constexpr size_t size_of(Type type) { return type == Type::float32 ? 4 : 2; }

/// Types in a set, a bit each.
constexpr uint32_t bit_of(Type type) { return uint32_t(1) << static_cast<uint32_t>(type); }
constexpr uint32_t kAnyType = 7;

/// A block of threads updates one tile of one tensor. Measured on an H200: see
/// docs/cuda.md.
constexpr uint32_t kThreads = 256;

/// Elements of a tile: each thread has this many vectors of 16 bytes.
constexpr uint32_t kVectors = 2;
constexpr uint32_t tile_elements(size_t itemsize) {
  return static_cast<uint32_t>(kThreads * kVectors * 16 / itemsize);
}

/// Side of the square tiles of a transposed tensor, in elements, and how many of
/// them a thread reads at a time where everything is a multiple of that.
constexpr uint32_t kSquare = 64;
constexpr int kSquareVector = 4;
constexpr uint32_t kSquareThreads = 512;

/// Tensors start at multiples of this in their arena (bytes), and what lies
/// between their end and the next start is kept at zero.
constexpr uint32_t kGranule = 256;

/// What all tensors of a step share. Outputs may be the memory of the inputs:
/// element i is read and written by one thread, in this order.
struct Common {
  fused_math::SgdControl control;
  const uint64_t* step; // null when no number depends on it
  const float* given; // null when nothing is given
  uint64_t* step_out; // null but in one launch of a step
  float* used_out;
  void* parameters_out; // the arena
  const void* velocity; // the arena; null without momentum, as the next
  void* velocity_out;
  // Element e of a velocity that is not contiguous lies at
  // e / columns * row_stride + e % columns * column_stride.
  uint64_t velocity_columns;
  int64_t velocity_row_stride;
  int64_t velocity_column_stride;
  uint32_t aligned; // the three arenas start at multiples of 16 bytes
  uint32_t count; // of tensors
};

/// What every tensor has.
struct Tensor {
  using Shared = Common;
  const void* parameter;
  const void* gradient;
  uint64_t size; // elements
  uint64_t offset; // in the arenas, elements
  uint32_t first_block; // of the launch's blocks, the first that works on it
  Type gradient_type;
};

/// Parameter and gradient are contiguous.
struct Flat : Tensor {
  uint32_t parameter_aligned; // to 16 bytes
  uint32_t gradient_aligned; // to the vector that a thread loads, at most 16 bytes
};

/// The parameter is contiguous; the gradient's element (r, c) lies at
/// r + c * stride, as the gradient of `x @ W.T` does.
struct Transposed : Tensor {
  uint64_t rows;
  uint64_t columns;
  int64_t stride;
  uint32_t aligned; // in kSquareVector elements, all of it
};

/// Parameter and gradient lie in any way.
constexpr int kMaxDimensions = 10;
template <typename Base>
struct AnyWay : Base {
  int32_t dimensions;
  int32_t shape[kMaxDimensions];
  int64_t parameter_strides[kMaxDimensions]; // elements
  int64_t gradient_strides[kMaxDimensions];
};
using Strided = AnyWay<Tensor>;

/// The arguments of one launch: as many tensors as 32764 bytes hold, which is
/// what a kernel may be given by value from sm_70 on.
constexpr size_t kArgumentBytes = 32764;
template <typename T>
constexpr uint32_t kMost = (kArgumentBytes - sizeof(typename T::Shared)) / sizeof(T);
template <typename T, uint32_t capacity = kMost<T>>
struct Launch {
  using Shared = typename T::Shared;
  static constexpr uint32_t kCapacity = capacity;
  Shared common;
  T tensors[kCapacity];
};

/// Kernels for few tensors declare less: the driver copies what is declared, several
/// times (20 to 45 us a launch, docs/cuda.md). They read the same struct.
constexpr uint32_t kFew = 8;
template <typename T>
using FewLaunch = Launch<T, kFew>;
static_assert(sizeof(Launch<Flat>) <= kArgumentBytes && Launch<Flat>::kCapacity >= 512);
static_assert(sizeof(FewLaunch<Flat>) <= 4096);
static_assert(sizeof(Launch<Transposed>) <= kArgumentBytes);
static_assert(sizeof(Launch<Strided>) <= kArgumentBytes);

/// The arguments of the kernel that evaluates a schedule.
struct ScheduleLaunch {
  fused_math::Schedule schedule;
  const uint64_t* steps;
  float* rates;
  uint64_t size;
};

} // namespace mlx_fused_optim::cuda
