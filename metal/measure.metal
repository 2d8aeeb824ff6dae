// The norms of all gradients, in the order of sums of csrc/math/norm.h, in three
// dispatches: the sum of every chunk, of every array, of all.
#include "math/frame.h"
#include "measure_table.h"
#include "quads.h"
#include "sources.h"
#include "table.h"

using namespace fused_math;
using namespace fused_metal;

// Field by field, whatever address space a pointer is of.
template <typename Pointer>
inline Squares load_squares(Pointer from) {
  return {{from->sum.hi, from->sum.lo}, from->scale, from->peak};
}
template <typename Pointer>
inline void store_squares(Pointer to, Squares from) {
  to->sum.hi = from.sum.hi;
  to->sum.lo = from.sum.lo;
  to->scale = from.scale;
  to->peak = from.peak;
}

/// The last array that starts at or before `block`.
inline uint32_t array_of_block(constant MeasureTable& table, uint32_t block) {
  uint32_t found = 0;
  for (uint32_t stride = 64; stride > 0; stride /= 2) {
    const uint32_t next = found + stride;
    if (next < table.count && table.arrays[next].first_block <= block) {
      found = next;
    }
  }
  return found;
}

/// The sum of a chunk from what its threads have left: lane l of 32 in quad l / 4.
inline float sum_of_lanes(threadgroup float4* quads) {
  float4 sums[kChunkThreads];
  for (uint32_t i = 0; i < kChunkThreads; ++i) {
    sums[i] = quads[i];
  }
  for (uint32_t half_count = kChunkThreads / 2; half_count > 0; half_count /= 2) {
    for (uint32_t i = 0; i < half_count; ++i) {
      sums[i] = sums[i] + sums[i + half_count];
    }
  }
  return (sums[0][0] + sums[0][2]) + (sums[0][1] + sums[0][3]);
}

/// What a thread leaves of its lanes of a chunk.
struct ThreadSum {
  float4 quad;
  uint32_t peak;
};

/// The chunk's elements from `begin` to `end`, a thread's lanes of them. Before it is
/// squared an element is multiplied by `factor`.
inline ThreadSum sum_of_thread(
    constant MeasuredArray& array,
    device const char* elements,
    uint64_t begin,
    uint64_t end,
    uint32_t lane,
    StepHyper hyper,
    uint32_t flags,
    float factor) {
  float4 sums[kChunkQuads];
  for (uint32_t quad = 0; quad < kChunkQuads; ++quad) {
    sums[quad] = float4(0.0f);
  }
  uint32_t peak = 0;
  for (uint64_t row = begin; row < end; row += kLanes) {
    UNROLLED for (uint32_t quad = 0; quad < kChunkQuads; ++quad) {
      const uint64_t first = row + (quad * kChunkThreads + lane % kChunkThreads) * kQuad;
      const uint64_t left = first < end ? end - first : 0;
      const uint32_t count = left < kQuad ? uint32_t(left) : uint32_t(kQuad);
      const bool wide = array.wide && count == kQuad;
      const float4 x = load_quad_of(array.format, elements, first, 1, count, wide);
      float4 squares = float4(0.0f);
      UNROLLED for (uint32_t i = 0; i < kQuad; ++i) {
        if (i < count) {
          const float unscaled = step_unscaled(x[i], hyper, flags);
          const float g = step_clipped(unscaled, hyper, flags) * factor;
          squares[i] = g * g;
          peak = peak_of(peak, unscaled);
        }
      }
      sums[quad] = sums[quad] + squares;
    }
  }
  // Lanes l and l + 64, then l and l + 32.
  return {(sums[0] + sums[2]) + (sums[1] + sums[3]), peak};
}

/// The sum and the peak of each chunk.
[[kernel]] void measure_chunks(
    constant StepControl& control [[buffer(kControlBuffer)]],
    constant MeasureTable& table [[buffer(kTableBuffer)]],
    device const uint64_t* step [[buffer(kStepBuffer)]],
    device const float* given [[buffer(kGivenBuffer)]],
    device Squares* chunk_sums [[buffer(kChunkSumsBuffer)]],
    // clang-format off
    LATER_BUFFERS(SOURCE_ARGUMENT)
    // clang-format on
    uint32_t block [[threadgroup_position_in_grid]],
    uint32_t lane [[thread_position_in_threadgroup]],
    uint32_t lanes [[threads_per_threadgroup]]) {
  threadgroup float4 quads[kMostThreads];
  threadgroup uint32_t peaks[kMostThreads];

  constant MeasuredArray& array = table.arrays[array_of_block(table, block)];
  device const char* elements = buffer1;
  switch (array.source) { LATER_BUFFERS(TAKE_ELEMENTS) }
  elements += array.begin;

  const StepHyper hyper = step_gradient_hyper(control, step[0], given);
  const uint32_t flags = array.is_gradient ? control.flags : 0;
  const uint32_t chunks = lanes / kChunkThreads; // of a threadgroup
  const uint64_t chunk = uint64_t(block - array.first_block) * chunks + lane / kChunkThreads;
  const uint64_t begin = chunk * kChunk;
  const uint64_t end = begin + kChunk < array.size ? begin + kChunk : array.size;

  ThreadSum own = sum_of_thread(array, elements, begin, end, lane, hyper, flags, 1.0f);
  peaks[lane] = own.peak;
  threadgroup_barrier(mem_flags::mem_threadgroup);

  uint32_t peak = 0;
  const uint32_t first_lane = lane - lane % kChunkThreads; // of the chunk
  for (uint32_t i = 0; i < kChunkThreads; ++i) {
    peak = max(peak, peaks[first_lane + i]);
  }
  const uint32_t clipped = step_clipped_peak(peak, hyper, flags);
  const float factor = factor_of(clipped);
  if (factor != 1.0f) { // rarely
    own = sum_of_thread(array, elements, begin, end, lane, hyper, flags, factor);
  }
  quads[lane] = own.quad;
  threadgroup_barrier(mem_flags::mem_threadgroup);

  if (lane == first_lane && begin < end) {
    const Real sum = {sum_of_lanes(quads + lane), 0.0f};
    store_squares(chunk_sums + array.first_chunk + chunk, {sum, scale_of(clipped), peak});
  }
}

/// The sum of `count` values, and the largest peak, in lanes[0], for thread 0. Every
/// thread of the threadgroup calls it.
inline void fold_all(
    device const Squares* values,
    uint64_t count,
    threadgroup Squares* lanes,
    uint32_t thread_number,
    uint32_t threads) {
  // Lanes without a value are zero, and halves of zeros need not be added.
  uint32_t width = 1;
  while (width < kFoldLanes && width < count) {
    width *= 2;
  }
  for (uint32_t lane = thread_number; lane < width; lane += threads) {
    Squares sum = {{0.0f, 0.0f}, 0, 0};
    for (uint64_t i = lane; i < count; i += kFoldLanes) {
      sum = fold(sum, load_squares(values + i));
    }
    store_squares(lanes + lane, sum);
  }
  while (width > 1) {
    width /= 2;
    threadgroup_barrier(mem_flags::mem_threadgroup);
    for (uint32_t lane = thread_number; lane < width; lane += threads) {
      store_squares(
          lanes + lane, fold(load_squares(lanes + lane), load_squares(lanes + lane + width)));
    }
  }
}

/// A threadgroup an array: its sum, from its chunks'. Array i has the chunks from
/// first_chunks[i] to before first_chunks[i + 1].
[[kernel]] void measure_arrays(
    device const uint32_t* first_chunks [[buffer(kFirstChunksBuffer)]],
    device Squares* array_sums_out [[buffer(kArraySumsOutBuffer)]],
    device const Squares* chunk_sums [[buffer(kChunkSumsBuffer)]],
    uint32_t array [[threadgroup_position_in_grid]],
    uint32_t lane [[thread_position_in_threadgroup]],
    uint32_t lanes [[threads_per_threadgroup]]) {
  threadgroup Squares sums[kFoldLanes];
  const uint32_t first = first_chunks[array];
  fold_all(chunk_sums + first, first_chunks[array + 1] - first, sums, lane, lanes);
  if (lane == 0) {
    store_squares(array_sums_out + array, load_squares(sums));
  }
}

/// One threadgroup: what the step reads, see StepMeasured. The sums of all gradients
/// come first, then, if there are any, those of their parameters.
[[kernel]] void measure_finish(
    constant StepControl& control [[buffer(kControlBuffer)]],
    device const Squares* array_sums [[buffer(kArraySumsBuffer)]],
    device const uint64_t* skipped [[buffer(kSkippedBuffer)]],
    constant uint32_t& gradient_count [[buffer(kGradientCountBuffer)]],
    constant uint32_t& has_parameters [[buffer(kHasParametersBuffer)]],
    device float* measured_out [[buffer(kMeasuredOutBuffer)]],
    device uint64_t* skipped_out [[buffer(kSkippedOutBuffer)]],
    uint32_t lane [[thread_position_in_threadgroup]],
    uint32_t lanes [[threads_per_threadgroup]]) {
  threadgroup Squares sums[kFoldLanes];
  fold_all(array_sums, gradient_count, sums, lane, lanes);
  if (lane == 0) {
    const Squares total = load_squares(sums);
    const float norm = norm_of(total);
    const bool applies = step_applies(control.flags, total, norm);
    measured_out[kMeasuredNorm] = norm;
    measured_out[kMeasuredApply] = applies ? 1.0f : 0.0f;
    skipped_out[0] = skipped[0] + (applies ? 0 : 1);
  }
  if (has_parameters) {
    for (uint32_t i = lane; i < 2 * gradient_count; i += lanes) {
      const uint32_t from = i % 2 * gradient_count + i / 2;
      measured_out[kMeasuredTensors + i] = norm_of(load_squares(array_sums + from));
    }
  }
}
