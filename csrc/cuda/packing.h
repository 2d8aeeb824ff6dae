// What all kinds of launches are packed with. No CUDA and no MLX here: tested without
// a GPU.
#pragma once

#include <algorithm>
#include <memory>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <vector>

#include "cuda/launch.h"

namespace mlx_fused_optim::cuda {

/// An array, as the host sees it.
struct Source {
  const void* data;
  Type type;
  bool contiguous; // in row-major order
  const int64_t* strides; // elements
};

/// Some tensors of one kind, and the blocks of threads that they take.
/// `arguments.common` but for its count is the caller's to fill.
template <typename T>
struct Batch {
  Launch<T> arguments;
  uint32_t blocks;
};
template <typename T>
using BatchList = std::vector<std::unique_ptr<Batch<T>>>;

/// A grid's first dimension holds 2^31 - 1 blocks.
constexpr uint64_t kMaxBlocks = (uint64_t(1) << 31) - 1;

constexpr uint64_t divide_up(uint64_t a, uint64_t b) { return (a + b - 1) / b; }

inline bool is_aligned(const void* data, size_t bytes) {
  return reinterpret_cast<uintptr_t>(data) % bytes == 0;
}

inline uint64_t element_count(int dimensions, const int32_t* shape) {
  uint64_t size = 1;
  for (int d = 0; d < dimensions; ++d) {
    size *= shape[d];
  }
  return size;
}

/// Appends a tensor that takes `blocks` blocks; begins a new launch where the
/// last one is full. Leaves its members beyond Base's to the caller.
template <typename T, typename Base>
T& append(BatchList<T>& batches, const Base& tensor, uint64_t blocks) {
  if (blocks > kMaxBlocks) {
    throw std::invalid_argument(
        "[fused_step] a tensor is too large for CUDA: got " + std::to_string(tensor.size) +
        " elements, allowed what " + std::to_string(kMaxBlocks) + " tiles hold.");
  }
  if (batches.empty() || batches.back()->arguments.common.count == Launch<T>::kCapacity ||
      batches.back()->blocks + blocks > kMaxBlocks) {
    // Not zeroed: 32 KB, and often one tensor.
    batches.emplace_back(new Batch<T>);
    batches.back()->arguments.common.count = 0;
    batches.back()->blocks = 0;
  }
  auto& batch = *batches.back();
  auto& added = batch.arguments.tensors[batch.arguments.common.count++];
  static_cast<Base&>(added) = tensor;
  added.first_block = batch.blocks;
  batch.blocks += static_cast<uint32_t>(blocks);
  return added;
}

/// Fewest dimensions in which both arrays have strides: neighbours that run on
/// in both become one, dimensions of length 1 none.
struct Collapsed {
  int dimensions = 0;
  int64_t shape[kMaxDimensions];
  int64_t parameter_strides[kMaxDimensions];
  int64_t gradient_strides[kMaxDimensions];
};

/// Throws std::invalid_argument where kMaxDimensions do not hold them.
Collapsed collapse(
    int dimensions,
    const int32_t* shape,
    const Source& parameter,
    const Source& gradient);

/// A collapsed tensor's way to lie, in a table.
template <typename Base>
void set_dimensions(AnyWay<Base>& tensor, const Collapsed& c) {
  tensor.dimensions = c.dimensions;
  for (int d = 0; d < c.dimensions; ++d) {
    tensor.shape[d] = static_cast<int32_t>(c.shape[d]);
    tensor.parameter_strides[d] = c.parameter_strides[d];
    tensor.gradient_strides[d] = c.gradient_strides[d];
  }
}

} // namespace mlx_fused_optim::cuda
