// The step on the GPU: indexing around csrc/math. The host gives each dispatch a
// table of tensors (metal/table.h); threadgroup b works on the tensor whose
// blocks contain b. This file is the plain step's; it joins the others.
#include "full.metal"
#include "math/frame.h"
#include "measure.metal"
#include "quads.h"
#include "sources.h"
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

// ---- Kernels -------------------------------------------------------------------

/// The update of the tensors in `table`: parameters and momentum of type T,
/// gradients of type G. An output may be its own input: a thread reads its
/// elements before it writes them, and nobody else reads them.
template <typename T, typename G>
[[kernel]] void sgd_step(
    constant SgdControl& control [[buffer(kControlBuffer)]],
    constant SgdTable& table [[buffer(kTableBuffer)]],
    device const uint64_t* step [[buffer(kStepBuffer)]],
    device const float* given [[buffer(kGivenBuffer)]],
    device T* parameters_out [[buffer(kParameterOutBuffer)]],
    device const T* velocities [[buffer(kVelocityBuffer), function_constant(has_momentum)]],
    device T* velocities_out [[buffer(kVelocityOutBuffer), function_constant(has_momentum)]],
    // clang-format off
    SOURCES(SOURCE_ARGUMENT)
    // clang-format on
    uint32_t block [[threadgroup_position_in_grid]],
    uint32_t lane [[thread_position_in_threadgroup]],
    uint32_t lanes [[threads_per_threadgroup]]) {
  threadgroup float scalars[kScalars];
  const SgdHyper hyper =
      sgd_hyper_of(control, scalars_of_threadgroup(control, step[0], given, scalars, lane));

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
    UNROLLED for (uint32_t i = 0; i < kQuad; ++i) {
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

/// One threadgroup, once a step, plain or full: the next counter, and the numbers used.
[[kernel]] void sgd_finish(
    constant SgdControl& control [[buffer(kControlBuffer)]],
    device const uint64_t* step [[buffer(kStepBuffer)]],
    device const float* given [[buffer(kGivenBuffer)]],
    device const float* measured [[buffer(kMeasuredBuffer)]],
    device uint64_t* step_out [[buffer(kStepOutBuffer)]],
    device float* used_out [[buffer(kUsedOutBuffer)]],
    uint32_t lane [[thread_position_in_threadgroup]]) {
  threadgroup float scalars[kScalars];
  const SgdScalars all = scalars_of_threadgroup(control, step[0], given, scalars, lane);
  if (lane == 0) {
    const SgdHyper hyper = sgd_full_hyper_of(control, step[0], all, measured);
    sgd_counters(control, hyper, step[0], given, step_out, used_out);
  }
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
