// Where a thread works, and its loads and stores: kQuad neighbours of a tensor at once.
#pragma once

#include "math/frame.h"
#include "table.h"

using namespace fused_math;
using namespace fused_metal;

// Of a constant trip count: a vector or an array that no variable indexes stays in registers.
#define UNROLLED _Pragma("clang loop unroll(full)")

// ---- Where a thread works ------------------------------------------------------

constant uint32_t tile_columns [[function_constant(5)]];

/// The last tensor that starts at or before `block`.
inline uint32_t tensor_of_block(constant StepTable& table, uint32_t block) {
  uint32_t found = 0;
  for (uint32_t stride = 32; stride > 0; stride /= 2) {
    const uint32_t next = found + stride;
    if (next < table.count && table.tensors[next].first_block <= block) {
      found = next;
    }
  }
  return found;
}

/// Up to kQuad neighbours in a tensor.
struct Piece {
  uint64_t first; // in row-major order
  int64_t gradient; // where its first gradient is, in elements
  uint32_t count; // 0: nothing left for this thread
};

inline Piece piece_of_thread(
    constant StepTensor& tensor,
    uint32_t block,
    uint32_t pass,
    uint32_t lane,
    uint32_t lanes) {
  if (tensor.columns == 0) {
    const uint64_t first = ((uint64_t(block) * kPasses + pass) * lanes + lane) * kQuad;
    if (first >= tensor.size) {
      return {0, 0, 0};
    }
    const uint64_t left = tensor.size - first;
    return {
        first,
        int64_t(first) * tensor.column_stride,
        left < kQuad ? uint32_t(left) : uint32_t(kQuad)};
  }
  const uint32_t tile_lanes = tile_columns / kQuad; // threads for one row of a tile
  const uint32_t tiles = (tensor.columns + tile_columns - 1) / tile_columns;
  const uint32_t column = block % tiles * tile_columns + lane % tile_lanes * kQuad;
  const uint64_t row =
      (uint64_t(block / tiles) * kPasses + pass) * (lanes / tile_lanes) + lane / tile_lanes;
  const uint64_t first = row * tensor.columns + column;
  if (column >= tensor.columns || first >= tensor.size) {
    return {0, 0, 0};
  }
  const uint32_t left = tensor.columns - column;
  return {
      first,
      int64_t(row) * tensor.row_stride + int64_t(column) * tensor.column_stride,
      left < kQuad ? left : uint32_t(kQuad)};
}

// ---- The numbers of a step ------------------------------------------------------

/// The scalars of a step, which may be schedules: evaluated once a threadgroup, one by each
/// of its first threads, into `scalars`. Every thread calls it, once.
inline StepScalars scalars_of_threadgroup(
    constant StepControl& control,
    uint64_t step,
    device const float* given,
    threadgroup float* scalars,
    uint32_t lane) {
  if (lane < kScalars) {
    scalars[lane] = step_scalar(control, lane, step, given);
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  StepScalars all;
  UNROLLED for (int i = 0; i < kScalars; ++i) { all.of[i] = scalars[i]; }
  return all;
}

// ---- Memory --------------------------------------------------------------------
//
// Loops over a quad have kQuad turns, and conditions inside.

/// `count` elements as float32, in one access where `wide`; the rest are zero.
template <typename T>
inline float4 load_quad(device const T* from, int64_t stride, uint32_t count, bool wide) {
  float4 values = float4(0.0f);
  if (wide) {
    const vec<T, 4> quad = *(device const vec<T, 4>*)from;
    UNROLLED for (uint32_t i = 0; i < kQuad; ++i) { values[i] = float(quad[i]); }
  } else {
    UNROLLED for (uint32_t i = 0; i < kQuad; ++i) {
      if (i < count) {
        values[i] = float(from[int64_t(i) * stride]);
      }
    }
  }
  return values;
}

/// Rounds to T, unless the values are T's already.
template <typename T>
inline void store_quad(device T* to, float4 values, uint32_t count, bool wide) {
  if (wide) {
    vec<T, 4> quad;
    UNROLLED for (uint32_t i = 0; i < kQuad; ++i) { quad[i] = T(values[i]); }
    *(device vec<T, 4>*)to = quad;
  } else {
    UNROLLED for (uint32_t i = 0; i < kQuad; ++i) {
      if (i < count) {
        to[i] = T(values[i]);
      }
    }
  }
}

// The same, of memory whose type is known as a format only: `from` and `to` are where
// the array begins, `at` counts elements. The format is a function constant, or at least
// the same for a whole threadgroup.

inline float4 load_quad_of(
    uint32_t format,
    device const char* from,
    int64_t at,
    int64_t stride,
    uint32_t count,
    bool wide) {
  switch (format) {
    case kFloat16:
      return load_quad((device const half*)from + at, stride, count, wide);
    case kBfloat16:
      return load_quad((device const bfloat*)from + at, stride, count, wide);
    case kInt8:
      return load_quad((device const int8_t*)from + at, stride, count, wide);
    default:
      return load_quad((device const float*)from + at, stride, count, wide);
  }
}

inline void store_quad_of(
    uint32_t format,
    device char* to,
    uint64_t at,
    float4 values,
    uint32_t count,
    bool wide) {
  switch (format) {
    case kFloat16:
      return store_quad((device half*)to + at, values, count, wide);
    case kBfloat16:
      return store_quad((device bfloat*)to + at, values, count, wide);
    case kInt8:
      return store_quad((device int8_t*)to + at, values, count, wide);
    default:
      return store_quad((device float*)to + at, values, count, wide);
  }
}
