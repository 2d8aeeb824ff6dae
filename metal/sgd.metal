// The step on the GPU: indexing around csrc/math. The host gives each dispatch a
// table of tensors (metal/table.h); threadgroup b works on the tensor whose
// blocks contain b.
#include "math/sgd.h"
#include "table.h"

using namespace fused_math;
using namespace fused_metal;

constant bool has_momentum [[function_constant(0)]];
constant bool has_nesterov [[function_constant(1)]];
constant bool has_weight_decay [[function_constant(2)]];

inline uint32_t sgd_flags() {
  return (has_momentum ? kMomentum : 0) | (has_nesterov ? kNesterov : 0) |
      (has_weight_decay ? kWeightDecay : 0);
}

// ---- Where a thread works ------------------------------------------------------

/// The last tensor that starts at or before `block`.
inline uint32_t tensor_of_block(constant SgdTable& table, uint32_t block) {
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
    constant SgdTensor& tensor,
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
  const uint32_t tiles = (tensor.columns + kTileColumns - 1) / kTileColumns;
  const uint32_t column = block % tiles * kTileColumns + lane % kTileLanes * kQuad;
  const uint64_t row =
      (uint64_t(block / tiles) * kPasses + pass) * (lanes / kTileLanes) + lane / kTileLanes;
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

// ---- Memory --------------------------------------------------------------------

/// `count` elements as float32, in one access where `wide`; the rest are zero.
template <typename T>
inline float4 load_quad(device const T* from, int64_t stride, uint32_t count, bool wide) {
  float4 values = float4(0.0f);
  if (wide) {
    const vec<T, 4> quad = *(device const vec<T, 4>*)from;
    for (uint32_t i = 0; i < kQuad; ++i) {
      values[i] = float(quad[i]);
    }
  } else {
    for (uint32_t i = 0; i < count; ++i) {
      values[i] = float(from[int64_t(i) * stride]);
    }
  }
  return values;
}

/// The one rounding.
template <typename T>
inline void store_quad(device T* to, float4 values, uint32_t count, bool wide) {
  if (wide) {
    vec<T, 4> quad;
    for (uint32_t i = 0; i < kQuad; ++i) {
      quad[i] = T(values[i]);
    }
    *(device vec<T, 4>*)to = quad;
  } else {
    for (uint32_t i = 0; i < count; ++i) {
      to[i] = T(values[i]);
    }
  }
}

// ---- Kernels -------------------------------------------------------------------

// The buffers of parameters and gradients, in whatever way they are spread: one
// arena and a buffer a gradient, or a buffer for each of both. (number, slot)
// clang-format off
#define SOURCES(X)                                                             \
  X(0, 7) X(1, 8) X(2, 9) X(3, 10) X(4, 11) X(5, 12) X(6, 13) X(7, 14)         \
  X(8, 15) X(9, 16) X(10, 17) X(11, 18) X(12, 19) X(13, 20) X(14, 21) X(15, 22) \
  X(16, 23) X(17, 24) X(18, 25) X(19, 26) X(20, 27) X(21, 28) X(22, 29) X(23, 30)
#define SOURCE_ARGUMENT(i, slot) device const char* source##i [[buffer(slot)]],
#define TAKE_PARAMETER(i, slot) case i: parameters = source##i; break;
#define TAKE_GRADIENT(i, slot) case i: gradients = source##i; break;
// clang-format on

/// The update of the tensors in `table`: parameters and momentum of type T,
/// gradients of type G. An output may be its own input: a thread reads its
/// elements before it writes them, and nobody else reads them.
template <typename T, typename G>
[[kernel]] void sgd_step(
    constant SgdControl& control [[buffer(kControlBuffer)]],
    constant SgdTable& table [[buffer(kTableBuffer)]],
    device const uint64_t* step [[buffer(kStepBuffer)]],
    constant float* given [[buffer(kGivenBuffer)]],
    device T* parameters_out [[buffer(kParameterOutBuffer)]],
    device const T* velocities [[buffer(kVelocityBuffer), function_constant(has_momentum)]],
    device T* velocities_out [[buffer(kVelocityOutBuffer), function_constant(has_momentum)]],
    // clang-format off
    SOURCES(SOURCE_ARGUMENT)
    // clang-format on
    uint32_t block [[threadgroup_position_in_grid]],
    uint32_t lane [[thread_position_in_threadgroup]],
    uint32_t lanes [[threads_per_threadgroup]]) {
  constant SgdTensor& tensor = table.tensors[tensor_of_block(table, block)];
  block -= tensor.first_block;

  // A switch, not an array: arrays of pointers that are indexed live in memory.
  device const char* parameters = source0;
  device const char* gradients = source0;
  switch (tensor.parameter_source) { SOURCES(TAKE_PARAMETER) }
  switch (tensor.gradient_source) { SOURCES(TAKE_GRADIENT) }
  device const T* parameter = (device const T*)(parameters + tensor.parameter);
  device const G* gradient = (device const G*)(gradients + tensor.gradient);
  device T* parameter_out = parameters_out + tensor.offset;

  const uint32_t flags = sgd_flags();
  const SgdHyper hyper = sgd_hyper(control, step[0], given);
  for (uint32_t pass = 0; pass < kPasses; ++pass) {
    const Piece piece = piece_of_thread(tensor, block, pass, lane, lanes);
    if (piece.count == 0) {
      break; // later passes lie further on
    }
    const bool full = piece.count == kQuad;
    const bool wide = full && (tensor.wide & kWideArena);
    const bool wide_gradient = full && (tensor.wide & kWideGradient);
    float4 p = load_quad(parameter + piece.first, 1, piece.count, wide);
    const float4 g =
        load_quad(gradient + piece.gradient, tensor.column_stride, piece.count, wide_gradient);
    float4 v = float4(0.0f);
    if (has_momentum) {
      v = load_quad(velocities + tensor.offset + piece.first, 1, piece.count, wide);
    }
    for (uint32_t i = 0; i < kQuad; ++i) {
      const SgdElement e = sgd_element({p[i], v[i]}, g[i], hyper, flags);
      p[i] = e.parameter;
      v[i] = e.velocity;
    }
    store_quad(parameter_out + piece.first, p, piece.count, wide);
    if (has_momentum) {
      store_quad(velocities_out + tensor.offset + piece.first, v, piece.count, wide);
    }
  }

  // Memory between tensors is saved with the state: it must not be garbage.
  if (block == 0) {
    for (uint64_t i = lane; i < tensor.gap; i += lanes) {
      parameter_out[tensor.size + i] = T(0.0f);
      if (has_momentum) {
        velocities_out[tensor.offset + tensor.size + i] = T(0.0f);
      }
    }
  }
}

/// One thread, once a step: the next counter, and the numbers that were used.
[[kernel]] void sgd_counters(
    constant SgdControl& control [[buffer(kControlBuffer)]],
    device const uint64_t* step [[buffer(kStepBuffer)]],
    constant float* given [[buffer(kGivenBuffer)]],
    device uint64_t* step_out [[buffer(kStepOutBuffer)]],
    device float* used_out [[buffer(kUsedOutBuffer)]]) {
  const SgdHyper hyper = sgd_hyper(control, step[0], given);
  step_out[0] = step[0] + 1;
  used_out[kLearningRate] = hyper.learning_rate;
  used_out[kMomentumFactor] = hyper.momentum;
  used_out[kWeightDecayFactor] = hyper.weight_decay;
}

/// A schedule at many steps.
[[kernel]] void schedule_values(
    constant Schedule& schedule [[buffer(0)]],
    device const uint64_t* steps [[buffer(1)]],
    device float* values [[buffer(2)]],
    constant uint64_t& size [[buffer(3)]],
    uint32_t position [[thread_position_in_grid]],
    uint32_t positions [[threads_per_grid]]) {
  for (uint64_t i = position; i < size; i += positions) {
    values[i] = schedule_value(schedule, steps[i]);
  }
}

/// A copy in row-major order of an array of any strides; T has its element's size.
template <typename T>
[[kernel]] void pack_elements(
    device const T* from [[buffer(0)]],
    device T* to [[buffer(1)]],
    constant int32_t* shape [[buffer(2)]],
    constant int64_t* strides [[buffer(3)]],
    constant uint32_t& dimensions [[buffer(4)]],
    constant uint64_t& size [[buffer(5)]],
    uint32_t position [[thread_position_in_grid]],
    uint32_t positions [[threads_per_grid]]) {
  for (uint64_t i = position; i < size; i += positions) {
    uint64_t rest = i;
    int64_t at = 0;
    for (uint32_t d = dimensions; d-- > 0;) {
      at += int64_t(rest % uint32_t(shape[d])) * strides[d];
      rest /= uint32_t(shape[d]);
    }
    to[i] = from[at];
  }
}

#define INSTANTIATE(name, ...) \
  template [[host_name(name)]] [[kernel]] decltype(__VA_ARGS__) __VA_ARGS__;
#define INSTANTIATE_STEP(name, T)                              \
  INSTANTIATE("sgd_step_" name "_float32", sgd_step<T, float>) \
  INSTANTIATE("sgd_step_" name "_float16", sgd_step<T, half>)  \
  INSTANTIATE("sgd_step_" name "_bfloat16", sgd_step<T, bfloat>)

INSTANTIATE_STEP("float32", float)
INSTANTIATE_STEP("float16", half)
INSTANTIATE_STEP("bfloat16", bfloat)
INSTANTIATE("pack_2", pack_elements<uint16_t>)
INSTANTIATE("pack_4", pack_elements<uint32_t>)
