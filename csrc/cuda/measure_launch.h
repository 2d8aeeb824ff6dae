// What the launches of a measurement get. Its three stages are in csrc/math/norm.h.
#pragma once

#include "cuda/launch.h"

namespace mlx_fused_optim::cuda {

/// A warp sums a chunk, four lanes a thread.
constexpr uint32_t kWarp = 32;
constexpr uint32_t kChunksPerBlock = kThreads / kWarp;
static_assert(fused_math::kLanes == 4 * kWarp);

using fused_math::Squares;

struct MeasureCommon {
  fused_math::StepControl control;
  const uint64_t* step;
  const float* given; // null when nothing is given
  Squares* chunks;
  uint32_t count; // of arrays
};

/// An array that fills memory.
struct Dense {
  using Shared = MeasureCommon;
  const void* data;
  uint64_t size; // elements
  uint32_t first_block; // of the launch's blocks
  uint32_t first_chunk; // of all arrays' chunks
  Type type;
  uint32_t is_gradient; // and no parameter: it is scaled, and its peak counts
  uint32_t aligned; // to four elements
};

/// One that does not: summed in the order of its indices.
struct Sparse : Dense {
  int32_t dimensions;
  int32_t shape[kMaxDimensions];
  int64_t strides[kMaxDimensions]; // elements
};

static_assert(sizeof(Launch<Dense>) <= kArgumentBytes);
static_assert(sizeof(Launch<Sparse>) <= kArgumentBytes);

/// A block for each array, which folds its chunks.
struct FoldLaunch {
  static constexpr uint32_t kCapacity = 8000;
  const Squares* chunks;
  Squares* sums; // of all arrays
  float* norms; // pairs, gradient and parameter; null where nobody asks for them
  uint32_t gradient_count; // the arrays behind these are parameters
  uint32_t first_array;
  uint32_t count;
  uint32_t first_chunk[kCapacity + 1]; // of `count` arrays, and the end of the last
};
static_assert(sizeof(FoldLaunch) <= kArgumentBytes);

/// One block, which folds the gradients.
struct FinishLaunch {
  const Squares* sums;
  const uint64_t* skipped;
  float* measured;
  uint64_t* skipped_out;
  uint32_t gradient_count;
  uint32_t flags;
};

} // namespace mlx_fused_optim::cuda
