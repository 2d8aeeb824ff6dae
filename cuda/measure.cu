// The kernels that measure gradients: sums of squares in the order of csrc/math/norm.h.
#pragma once

#include "cuda/measure_launch.h"

#include "quad.cuh"

namespace mlx_fused_optim::cuda {
namespace {

using namespace fused_math;

constexpr uint32_t kRows = kChunk / kLanes; // of a chunk: an element for each lane
constexpr uint32_t kRowsAtATime = 8; // that are loaded before the first is used
static_assert(kRows % kRowsAtATime == 0 && kLanes == kWarp * kQuad);

/// One thread computes the gradients' scale. Not to be used before the next barrier.
__device__ void compute_numbers(const MeasureCommon& common, SgdHyper& shared) {
  if (threadIdx.x == 0) {
    shared = sgd_gradient_hyper(common.control, *common.step, common.given);
  }
}

/// A thread's lanes 4 t to 4 t + 3 of a chunk.
struct Lanes {
  float sums[kQuad];
  uint32_t peak;
};

__device__ void add_square(Lanes& lanes, int k, float x, const SgdHyper& hyper, uint32_t flags) {
  lanes.peak = peak_of(lanes.peak, x);
  x = sgd_gradient(x, hyper, flags);
  lanes.sums[k] = lanes.sums[k] + x * x;
}

/// How many of the quad at element `at` are in the array: the others are not scaled,
/// as the scale of a zero may be infinite, but left out.
__device__ uint32_t count_at(const Dense& array, uint64_t at) {
  const uint64_t left = at < array.size ? array.size - at : 0;
  return left < kQuad ? static_cast<uint32_t>(left) : kQuad;
}

/// The lanes of a warp are added in halves, the last two of them in a thread.
__device__ void finish_chunk(const MeasureCommon& common, uint32_t chunk, Lanes lanes) {
#pragma unroll
  for (uint32_t half = kWarp / 2; half > 0; half /= 2) {
#pragma unroll
    for (int k = 0; k < kQuad; ++k) {
      lanes.sums[k] = lanes.sums[k] + __shfl_down_sync(~0u, lanes.sums[k], half);
    }
    lanes.peak = max(lanes.peak, __shfl_down_sync(~0u, lanes.peak, half));
  }
  if (threadIdx.x % kWarp == 0) {
    const float even = lanes.sums[0] + lanes.sums[2];
    const float odd = lanes.sums[1] + lanes.sums[3];
    common.chunks[chunk] = {even + odd, lanes.peak};
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

template <typename Known>
__device__ void run(const Launch<Dense>& launch) {
  __shared__ SgdHyper shared;
  const MeasureCommon& common = launch.common;
  const Dense& array = find_tensor(launch);
  compute_numbers(common, shared);
  __syncthreads();
  const SgdHyper hyper = shared;
  const Chunk chunk = find_chunk(array);
  if (chunk.first >= array.size) {
    return; // all of the warp
  }
  const uint32_t format = format_of<Known::kGradients>(array.type);
  const uint32_t flags = array.is_gradient ? Known::kFlags : 0;
  Lanes lanes = {};
#pragma unroll 1
  for (uint32_t row = 0; row < kRows; row += kRowsAtATime) {
    Quad quads[kRowsAtATime] = {};
    const uint64_t first = chunk.first + row * kLanes + chunk.thread * kQuad;
    const uint64_t last = chunk.first + (row + kRowsAtATime) * kLanes;
    if (last <= array.size && array.aligned) {
#pragma unroll
      for (uint32_t i = 0; i < kRowsAtATime; ++i) {
        load<true>(quads[i], array.data, format, first + i * kLanes);
      }
    } else {
#pragma unroll
      for (uint32_t i = 0; i < kRowsAtATime; ++i) {
        const uint64_t at = first + i * kLanes;
        load<false>(quads[i], array.data, format, at, 1, count_at(array, at));
      }
    }
#pragma unroll
    for (uint32_t i = 0; i < kRowsAtATime; ++i) {
      float x[kQuad];
      widen(quads[i], format, x);
      const uint32_t count = count_at(array, first + i * kLanes);
#pragma unroll
      for (int k = 0; k < kQuad; ++k) {
        if (k < count) {
          add_square(lanes, k, x[k], hyper, flags);
        }
      }
    }
  }
  finish_chunk(common, array.first_chunk + chunk.number, lanes);
}

template <typename Known>
__device__ void run(const Launch<Sparse>& launch) {
  __shared__ SgdHyper shared;
  const MeasureCommon& common = launch.common;
  const Sparse& array = find_tensor(launch);
  compute_numbers(common, shared);
  __syncthreads();
  const SgdHyper hyper = shared;
  const Chunk chunk = find_chunk(array);
  if (chunk.first >= array.size) {
    return;
  }
  const uint32_t flags = array.is_gradient ? Known::kFlags : 0;
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
      for (int d = array.dimensions - 1; d >= 0; --d) {
        at += int64_t(i % array.shape[d]) * array.strides[d];
        i /= array.shape[d];
      }
      with_type<Known::kGradients>(array.type, [&](auto type) {
        const float x = to_float(static_cast<const decltype(type)*>(array.data)[at]);
        add_square(lanes, k, x, hyper, flags);
      });
    }
  }
  finish_chunk(common, array.first_chunk + chunk.number, lanes);
}

// ---- Folding --------------------------------------------------------------------

__device__ ArraySum join(ArraySum a, ArraySum b) {
  return {fold(a.sum, b.sum), max(a.peak, b.peak)};
}

/// Of kFoldLanes lanes, one a thread; those from `n` on have nothing but zeros. The
/// result is thread 0's.
__device__ ArraySum fold_lanes(ArraySum mine, uint32_t n) {
  __shared__ ArraySum lanes[kFoldLanes];
  const uint32_t lane = threadIdx.x;
  lanes[lane] = mine;
  for (uint32_t half = kFoldLanes / 2; half > 0; half /= 2) {
    if (half < n) { // else only zeros would be added
      __syncthreads();
      if (lane < half) {
        lanes[lane] = join(lanes[lane], lanes[lane + half]);
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
  ArraySum mine = {};
  for (uint32_t i = threadIdx.x; i < n; i += kFoldLanes) {
    const ChunkSum chunk = launch.chunks[begin + i];
    mine = join(mine, {{chunk.sum, 0.0f}, chunk.peak});
  }
  mine = fold_lanes(mine, n);
  if (threadIdx.x == 0) {
    const uint32_t array = launch.first_array + blockIdx.x;
    launch.sums[array] = mine;
    if (launch.norms) {
      const bool is_parameter = array >= launch.gradient_count;
      const uint64_t tensor = is_parameter ? array - launch.gradient_count : array;
      launch.norms[2 * tensor + is_parameter] = sgd_norm(mine.sum);
    }
  }
}

/// One block.
template <typename Known>
__device__ void run(const FinishLaunch& launch) {
  ArraySum mine = {};
  for (uint32_t i = threadIdx.x; i < launch.gradient_count; i += kFoldLanes) {
    mine = join(mine, launch.sums[i]);
  }
  mine = fold_lanes(mine, launch.gradient_count);
  if (threadIdx.x == 0) {
    const float norm = sgd_norm(mine.sum);
    const bool apply = sgd_applies(launch.flags, mine.peak, norm);
    launch.measured[kMeasuredNorm] = norm;
    launch.measured[kMeasuredApply] = apply ? 1.0f : 0.0f;
    *launch.skipped_out = *launch.skipped + !apply;
  }
}

} // namespace
} // namespace mlx_fused_optim::cuda
