// The kernels that measure gradients: sums of squares in the order of csrc/math/norm.h.
#pragma once

#include "cuda/measure_launch.h"

#include "quad.cuh"

namespace mlx_fused_optim::cuda {
namespace {

using namespace fused_math;

constexpr uint32_t kRows = kChunk / kLanes; // of a chunk: an element for each lane
constexpr uint32_t kRowsAtATime = 8; // that are loaded before the first is used
constexpr uint32_t kRowsAgain = 2; // likewise, of a chunk in the cache: few registers
static_assert(kRows % kRowsAtATime == 0 && kRows % kRowsAgain == 0 && kLanes == kWarp * kQuad);

/// One thread computes the gradients' scale. Not to be used before the next barrier.
__device__ void compute_numbers(const MeasureCommon& common, StepHyper& shared) {
  if (threadIdx.x == 0) {
    shared = step_gradient_hyper(common.control, *common.step, common.given);
  }
}

/// A thread's lanes 4 t to 4 t + 3 of a chunk.
struct Lanes {
  float sums[kQuad];
  uint32_t peak;
};

/// What happens to an element before it is squared.
struct Scaling {
  StepHyper hyper;
  uint32_t flags;
  float factor; // of the chunk's peak; 1 as long as nobody knows it
};

template <bool again>
__device__ void add_square(Lanes& lanes, int k, float x, const Scaling& scaling) {
  x = step_unscaled(x, scaling.hyper, scaling.flags);
  if (!again) {
    lanes.peak = peak_of(lanes.peak, x);
  }
  x = step_clipped(x, scaling.hyper, scaling.flags);
  if (again) {
    x = x * scaling.factor;
  }
  lanes.sums[k] = lanes.sums[k] + x * x;
}

/// How many of the quad at element `at` are in the array: the others are not scaled,
/// as the scale of a zero may be infinite, but left out.
__device__ uint32_t count_at(const Dense& array, uint64_t at) {
  const uint64_t left = at < array.size ? array.size - at : 0;
  return left < kQuad ? static_cast<uint32_t>(left) : kQuad;
}

/// The lanes of a warp are added in halves, the last two of them in a thread. Every
/// thread knows the chunk's peak.
__device__ void finish_chunk(Squares& chunk, Lanes lanes, const Scaling& scaling) {
#pragma unroll
  for (uint32_t half = kWarp / 2; half > 0; half /= 2) {
#pragma unroll
    for (int k = 0; k < kQuad; ++k) {
      lanes.sums[k] = lanes.sums[k] + __shfl_down_sync(~0u, lanes.sums[k], half);
    }
  }
  if (threadIdx.x % kWarp == 0) {
    const float even = lanes.sums[0] + lanes.sums[2];
    const float odd = lanes.sums[1] + lanes.sums[3];
    const uint32_t peak = step_clipped_peak(lanes.peak, scaling.hyper, scaling.flags);
    chunk = {{even + odd, 0.0f}, scale_of(peak), lanes.peak};
  }
}

/// What a warp works on.
struct Chunk {
  uint32_t number; // in its array
  uint64_t first; // element
  uint32_t thread; // of the warp
};

__device__ Chunk find_chunk(const Dense& array) {
  const uint32_t number = (blockIdx.x - array.first_block) * kChunksPerBlock + threadIdx.x / kWarp;
  return {number, uint64_t(number) * kChunk, threadIdx.x % kWarp};
}

/// The elements of a chunk, in a thread's lanes.
template <typename Known, bool again>
__device__ Lanes add_elements(const Dense& array, const Chunk& chunk, const Scaling& scaling) {
  const uint32_t format = format_of<Known::kGradients>(array.type);
  constexpr uint32_t kAtATime = again ? kRowsAgain : kRowsAtATime;
  Lanes lanes = {};
#pragma unroll 1
  for (uint32_t row = 0; row < kRows; row += kAtATime) {
    Quad quads[kAtATime] = {};
    const uint64_t first = chunk.first + row * kLanes + chunk.thread * kQuad;
    const uint64_t last = chunk.first + (row + kAtATime) * kLanes;
    if (last <= array.size && array.aligned) {
#pragma unroll
      for (uint32_t i = 0; i < kAtATime; ++i) {
        load<true>(quads[i], array.data, format, first + i * kLanes);
      }
    } else {
#pragma unroll
      for (uint32_t i = 0; i < kAtATime; ++i) {
        const uint64_t at = first + i * kLanes;
        load<false>(quads[i], array.data, format, at, 1, count_at(array, at));
      }
    }
#pragma unroll
    for (uint32_t i = 0; i < kAtATime; ++i) {
      float x[kQuad];
      widen(quads[i], format, x);
      const uint32_t count = count_at(array, first + i * kLanes);
#pragma unroll
      for (int k = 0; k < kQuad; ++k) {
        if (k < count) {
          add_square<again>(lanes, k, x[k], scaling);
        }
      }
    }
  }
  return lanes;
}

template <typename Known, bool again>
__device__ Lanes add_elements(const Sparse& array, const Chunk& chunk, const Scaling& scaling) {
  Lanes lanes = {};
#pragma unroll 1
  for (uint32_t row = 0; row < kRows; ++row) {
#pragma unroll
    for (int k = 0; k < kQuad; ++k) {
      uint64_t i = chunk.first + row * kLanes + chunk.thread * kQuad + k;
      if (i >= array.size) {
        continue;
      }
      int64_t at = 0;
#pragma unroll 1 // see find_element
      for (int d = array.dimensions - 1; d >= 0; --d) {
        at += int64_t(i % array.shape[d]) * array.strides[d];
        i /= array.shape[d];
      }
      with_type<Known::kGradients>(array.type, [&](auto type) {
        const float x = to_float(static_cast<const decltype(type)*>(array.data)[at]);
        add_square<again>(lanes, k, x, scaling);
      });
    }
  }
  return lanes;
}

template <typename Known, typename Array, uint32_t capacity>
__device__ void measure(const Launch<Array, capacity>& launch) {
  __shared__ StepHyper shared;
  const MeasureCommon& common = launch.common;
  const Array& array = find_tensor(launch);
  compute_numbers(common, shared);
  __syncthreads();
  const Chunk chunk = find_chunk(array);
  if (chunk.first >= array.size) {
    return; // all of the warp
  }
  Scaling scaling = {shared, array.is_gradient ? Known::kFlags : 0, 1.0f};
  Lanes lanes = add_elements<Known, false>(array, chunk, scaling);
#pragma unroll
  for (uint32_t half = kWarp / 2; half > 0; half /= 2) {
    lanes.peak = max(lanes.peak, __shfl_xor_sync(~0u, lanes.peak, half));
  }
  scaling.factor = factor_of(step_clipped_peak(lanes.peak, scaling.hyper, scaling.flags));
  if (scaling.factor != 1.0f) { // for all of the warp, and rarely
    const uint32_t peak = lanes.peak;
    lanes = add_elements<Known, true>(array, chunk, scaling);
    lanes.peak = peak;
  }
  finish_chunk(common.chunks[array.first_chunk + chunk.number], lanes, scaling);
}

template <typename Known, uint32_t capacity>
__device__ void run(const Launch<Dense, capacity>& launch) {
  measure<Known>(launch);
}

template <typename Known, uint32_t capacity>
__device__ void run(const Launch<Sparse, capacity>& launch) {
  measure<Known>(launch);
}

// ---- Folding --------------------------------------------------------------------

/// Of kFoldLanes lanes, one a thread; those from `n` on have nothing but zeros. The
/// result is thread 0's.
__device__ Squares fold_lanes(Squares mine, uint32_t n) {
  __shared__ Squares lanes[kFoldLanes];
  const uint32_t lane = threadIdx.x;
  lanes[lane] = mine;
  for (uint32_t half = kFoldLanes / 2; half > 0; half /= 2) {
    if (half < n) { // else only zeros would be added
      __syncthreads();
      if (lane < half) {
        lanes[lane] = fold(lanes[lane], lanes[lane + half]);
      }
    }
  }
  return lanes[lane];
}

/// A block for each array.
template <typename Known>
__device__ void run(const FoldLaunch& launch) {
  const uint32_t begin = launch.first_chunk[blockIdx.x];
  const uint32_t n = launch.first_chunk[blockIdx.x + 1] - begin;
  Squares mine = {};
  for (uint32_t i = threadIdx.x; i < n; i += kFoldLanes) {
    mine = fold(mine, launch.chunks[begin + i]);
  }
  mine = fold_lanes(mine, n);
  if (threadIdx.x == 0) {
    const uint32_t array = launch.first_array + blockIdx.x;
    launch.sums[array] = mine;
    if (launch.norms) {
      const bool is_parameter = array >= launch.gradient_count;
      const uint64_t tensor = is_parameter ? array - launch.gradient_count : array;
      launch.norms[2 * tensor + is_parameter] = norm_of(mine);
    }
  }
}

/// One block.
template <typename Known>
__device__ void run(const FinishLaunch& launch) {
  Squares mine = {};
  for (uint32_t i = threadIdx.x; i < launch.gradient_count; i += kFoldLanes) {
    mine = fold(mine, launch.sums[i]);
  }
  mine = fold_lanes(mine, launch.gradient_count);
  if (threadIdx.x == 0) {
    const float norm = norm_of(mine);
    const bool apply = step_applies(launch.flags, mine, norm);
    launch.measured[kMeasuredNorm] = norm;
    launch.measured[kMeasuredApply] = apply ? 1.0f : 0.0f;
    *launch.skipped_out = *launch.skipped + !apply;
  }
}

} // namespace
} // namespace mlx_fused_optim::cuda
