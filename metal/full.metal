// The full step: all that csrc/math/frame.h can do to an element. One function, in which
// function constants say what a step has and what is in its memory, so that Metal
// compiles the combinations in use and none is written out here.
#include "math/frame.h"
#include "quads.h"
#include "sources.h"
#include "table.h"

using namespace fused_math;
using namespace fused_metal;

constant uint32_t full_flags [[function_constant(3)]]; // SgdFlags
constant uint32_t parameter_format [[function_constant(4)]]; // Format, as the next two
constant uint32_t gradient_format [[function_constant(5)]];
constant uint32_t velocity_format [[function_constant(6)]];
constant bool has_velocity = (full_flags & kMomentum) != 0;
constant bool has_master = (full_flags & kMaster) != 0;
constant bool has_compensation = (full_flags & kCompensated) != 0;
constant bool has_average = (full_flags & kAverage) != 0;

/// The full update of the tensors in `table`. Buffers are bytes, read by their formats;
/// measured and groups are read only by steps that have them. As in sgd_step, an output
/// may be its own input.
[[kernel]] void sgd_full(
    constant SgdControl& control [[buffer(kControlBuffer)]],
    constant SgdTable& table [[buffer(kTableBuffer)]],
    device const uint64_t* step [[buffer(kStepBuffer)]],
    device const float* given [[buffer(kGivenBuffer)]],
    device const float* measured [[buffer(kMeasuredBuffer)]],
    device const float* groups [[buffer(kGroupsBuffer)]],
    device char* parameters_out [[buffer(kFullParameterOutBuffer)]],
    // clang-format off
    device const char* velocities [[buffer(7), function_constant(has_velocity)]],
    device char* velocities_out [[buffer(8), function_constant(has_velocity)]],
    device const char* masters [[buffer(9), function_constant(has_master)]],
    device char* masters_out [[buffer(10), function_constant(has_master)]],
    device const char* compensations [[buffer(11), function_constant(has_compensation)]],
    device char* compensations_out [[buffer(12), function_constant(has_compensation)]],
    device const char* averages [[buffer(13), function_constant(has_average)]],
    device char* averages_out [[buffer(14), function_constant(has_average)]],
    FULL_SOURCES(SOURCE_ARGUMENT)
    // clang-format on
    uint32_t block [[threadgroup_position_in_grid]],
    uint32_t lane [[thread_position_in_threadgroup]],
    uint32_t lanes [[threads_per_threadgroup]]) {
  threadgroup float scalars[kScalars];
  const SgdScalars all = scalars_of_threadgroup(control, step[0], given, scalars, lane);

  constant SgdTensor& tensor = table.tensors[tensor_of_block(table, block)];
  block -= tensor.first_block;

  device const char* parameters = source0;
  device const char* gradients = source0;
  switch (tensor.parameter_source) { FULL_SOURCES(TAKE_PARAMETER) }
  switch (tensor.gradient_source) { FULL_SOURCES(TAKE_GRADIENT) }
  parameters += tensor.parameter;
  gradients += tensor.gradient;

  // With groups, a tensor may be without some of what the step has.
  const uint32_t flags = full_flags & kGroups ? uint32_t(tensor.flags) : full_flags;
  const SgdHyper hyper = sgd_tensor_hyper(
      sgd_full_hyper_of(control, step[0], all, measured),
      control.trust_coefficient,
      flags,
      groups + uint64_t(tensor.group) * kGroupNumbers,
      measured + kMeasuredTensors + uint64_t(tensor.number) * 2);

  for (uint32_t pass = 0; pass < kPasses; ++pass) {
    const Piece piece = piece_of_thread(tensor, block, pass, lane, lanes);
    if (piece.count == 0) {
      break; // later passes lie further on
    }
    const uint32_t count = piece.count;
    const bool wide = count == kQuad && (tensor.wide & kWideArena);
    const bool wide_gradient = count == kQuad && (tensor.wide & kWideGradient);
    const uint64_t at = tensor.offset + piece.first; // in every arena
    float4 p = load_quad_of(parameter_format, parameters, piece.first, 1, count, wide);
    const float4 g = load_quad_of(
        gradient_format, gradients, piece.gradient, tensor.column_stride, count, wide_gradient);
    float4 v = float4(0.0f), m = float4(0.0f), c = float4(0.0f), a = float4(0.0f);
    if (has_velocity) {
      v = load_quad_of(velocity_format, velocities, at, 1, count, wide);
    }
    if (has_master) {
      m = load_quad_of(kFloat32, masters, at, 1, count, wide);
    }
    if (has_compensation) {
      c = load_quad_of(parameter_format, compensations, at, 1, count, wide);
    }
    if (has_average) {
      a = load_quad_of(kFloat32, averages, at, 1, count, wide);
    }
    UNROLLED for (uint32_t i = 0; i < kQuad; ++i) {
      const SgdFullElement before = {p[i], v[i], m[i], c[i], a[i]};
      const SgdFullElement e = sgd_full_element(
          before, g[i], uint32_t(at) + i, hyper, flags, parameter_format, velocity_format);
      p[i] = e.parameter;
      v[i] = e.velocity;
      m[i] = e.master;
      c[i] = e.compensation;
      a[i] = e.average;
    }
    store_quad_of(parameter_format, parameters_out, at, p, count, wide);
    if (has_velocity) {
      store_quad_of(velocity_format, velocities_out, at, v, count, wide);
    }
    if (has_master) {
      store_quad_of(kFloat32, masters_out, at, m, count, wide);
    }
    if (has_compensation) {
      store_quad_of(parameter_format, compensations_out, at, c, count, wide);
    }
    if (has_average) {
      store_quad_of(kFloat32, averages_out, at, a, count, wide);
    }
  }

  // Memory between tensors is saved with the state: it must not be garbage.
  if (block == 0) {
    const float4 zero = float4(0.0f);
    for (uint64_t i = lane; i < tensor.gap; i += lanes) {
      const uint64_t at = tensor.offset + tensor.size + i;
      store_quad_of(parameter_format, parameters_out, at, zero, 1, false);
      if (has_velocity) {
        store_quad_of(velocity_format, velocities_out, at, zero, 1, false);
      }
      if (has_master) {
        store_quad_of(kFloat32, masters_out, at, zero, 1, false);
      }
      if (has_compensation) {
        store_quad_of(parameter_format, compensations_out, at, zero, 1, false);
      }
      if (has_average) {
        store_quad_of(kFloat32, averages_out, at, zero, 1, false);
      }
    }
  }
}
