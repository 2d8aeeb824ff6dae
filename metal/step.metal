// The step on the GPU: indexing around csrc/math. The host gives each dispatch a
// table of tensors (metal/table.h); threadgroup b works on the tensor whose
// blocks contain b. One function for all rules: function constants say what a step has
// and what is in its memory, so that Metal compiles the combinations in use and none is
// written out here. This file joins the others.
#include "byte_quads.h"
#include "math/frame.h"
#include "measure.metal"
#include "pack.metal"
#include "quads.h"
#include "schedule.metal"
#include "sources.h"
#include "table.h"

using namespace fused_math;
using namespace fused_metal;

constant uint32_t step_rule [[function_constant(0)]]; // Rule
constant uint32_t step_flags [[function_constant(1)]]; // StepFlags
constant uint32_t parameter_format [[function_constant(2)]]; // Format, as the next two
constant uint32_t gradient_format [[function_constant(3)]];
constant uint32_t state_format [[function_constant(4)]];

inline bool keeps(int slot) { return has_slot(step_rule, step_flags, slot); }

inline uint32_t out_format() { return parameter_out_format(step_flags, parameter_format); }

inline uint32_t format_of_slot(int slot) {
  return slot_format(step_rule, step_flags, slot, parameter_format, state_format);
}

/// The update of the tensors in `table`. Its other buffers are bytes, read by their formats,
/// in the places that metal/table.h gives them. An output may be its own input: a thread
/// reads its elements before it writes them, and nobody else reads them.
[[kernel]] void fused_step(
    constant StepControl& control [[buffer(kControlBuffer)]],
    constant StepTable& table [[buffer(kTableBuffer)]],
    device const uint64_t* step [[buffer(kStepBuffer)]],
    device const float* given [[buffer(kGivenBuffer)]],
    // clang-format off
    BUFFERS(BUFFER_ARGUMENT)
    // clang-format on
    uint32_t block [[threadgroup_position_in_grid]],
    uint32_t lane [[thread_position_in_threadgroup]],
    uint32_t lanes [[threads_per_threadgroup]]) {
  threadgroup float scalars[kScalars];
  const StepScalars all = scalars_of_threadgroup(control, step[0], given, scalars, lane);

  constant StepTensor& tensor = table.tensors[tensor_of_block(table, block)];
  block -= tensor.first_block;

  const Buffers buffers = {BUFFERS(BUFFER_NAME)};
  const uint32_t first_source = source_place(step_rule, step_flags);
  device const char* parameters =
      buffer_of(buffers, first_source + tensor.parameter_source) + tensor.parameter;
  device const char* gradients =
      buffer_of(buffers, first_source + tensor.gradient_source) + tensor.gradient;
  device char* parameters_out = buffer_of(buffers, kParameterOutPlace);
  device const float* measured =
      (device const float*)buffer_of(buffers, measured_place(step_rule, step_flags));
  device const float* groups =
      (device const float*)buffer_of(buffers, groups_place(step_rule, step_flags));

  // With groups, a tensor may be without some of what the step has. What is kept of it stays.
  const uint32_t flags = step_flags & kGroups
      ? (step_flags & ~uint32_t(kTensorFlags)) | (tensor.flags & uint32_t(kTensorFlags))
      : step_flags;
  // Only the first thread corrects the bias, for all: its powers cost more than an element.
  const uint32_t corrected_rule = lane == 0 ? step_rule : uint32_t(Rules::kCount);
  StepHyper hyper = step_tensor_hyper(
      control,
      step_hyper_of(control, corrected_rule, step_flags, step[0], all, measured),
      corrected_rule,
      step[0],
      flags,
      groups + uint64_t(tensor.group) * kGroupNumbers,
      measured + kMeasuredTensors + uint64_t(tensor.number) * 2);
  threadgroup float corrected[2];
  if (Rules::is_bias_corrected(step_rule, step_flags)) {
    if (lane == 0) {
      corrected[0] = hyper.rule.corrected_rate;
      corrected[1] = hyper.rule.corrected_root;
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
    hyper.rule.corrected_rate = corrected[0];
    hyper.rule.corrected_root = corrected[1];
  }

  for (uint32_t pass = 0; pass < kPasses; ++pass) {
    const Piece piece = piece_of_thread(tensor, block, pass, lane, lanes);
    // Later passes lie further on. With bytes the threads of a group go on together: until
    // the first of all has nothing left.
    if (state_format == kBytes ? piece_of_thread(tensor, block, pass, 0, lanes).count == 0
                               : piece.count == 0) {
      break;
    }
    const uint32_t count = piece.count;
    const bool wide = count == kQuad && (tensor.wide & kWideArena);
    const bool wide_gradient = count == kQuad && (tensor.wide & kWideGradient);
    const uint64_t at = tensor.offset + piece.first; // in every arena
    float4 p = load_quad_of(parameter_format, parameters, piece.first, 1, count, wide);
    const float4 g = load_quad_of(
        gradient_format, gradients, piece.gradient, tensor.column_stride, count, wide_gradient);
    float4 kept[kSlots];
    ByteQuad bytes[kRuleSlots];
    UNROLLED for (int slot = 0; slot < kSlots; ++slot) {
      kept[slot] = float4(0.0f);
      if (keeps(slot)) {
        device const char* from = buffer_of(buffers, slot_place(step_rule, step_flags, slot));
        if (is_byte_format(format_of_slot(slot))) {
          bytes[slot] = load_bytes(format_of_slot(slot), from, at, count, wide, lane);
          kept[slot] = values_of_bytes(format_of_slot(slot), bytes[slot]);
        } else {
          kept[slot] = load_quad_of(format_of_slot(slot), from, at, 1, count, wide);
        }
      }
    }
    UNROLLED for (uint32_t i = 0; i < kQuad; ++i) {
      const StepElement e = step_element(
          StepElement{
              p[i],
              {{kept[0][i], kept[1][i], kept[2][i]}},
              kept[kMasterCopy][i],
              kept[kCompensation][i],
              kept[kMovingAverage][i]},
          g[i],
          uint32_t(at) + i,
          hyper,
          step_rule,
          flags,
          parameter_format,
          state_format);
      p[i] = e.parameter;
      kept[0][i] = e.slots.of[0];
      kept[1][i] = e.slots.of[1];
      kept[2][i] = e.slots.of[2];
      kept[kMasterCopy][i] = e.master;
      kept[kCompensation][i] = e.compensation;
      kept[kMovingAverage][i] = e.average;
    }
    store_quad_of(out_format(), parameters_out, at, p, count, wide);
    UNROLLED for (int slot = 0; slot < kSlots; ++slot) {
      if (keeps(slot)) {
        device char* to = buffer_of(buffers, slot_place(step_rule, step_flags, slot) + 1);
        const uint32_t format = format_of_slot(slot);
        if (!is_byte_format(format)) {
          store_quad_of(format, to, at, kept[slot], count, wide);
        } else {
          if (hyper.apply && has_slot(step_rule, flags, slot)) { // else to the bit
            bytes[slot] =
                bytes_of_values(format, kept[slot], count, uint32_t(at), slot, hyper.key, flags);
          }
          store_bytes(format, to, at, bytes[slot], count, wide);
        }
      }
    }
  }

  // Memory between tensors is saved with the state: it must not be garbage.
  if (block == 0) {
    const float4 zero = float4(0.0f);
    for (uint64_t i = lane; i < tensor.gap; i += lanes) {
      const uint64_t at = tensor.offset + tensor.size + i;
      store_quad_of(out_format(), parameters_out, at, zero, 1, false);
      UNROLLED for (int slot = 0; slot < kSlots; ++slot) {
        if (keeps(slot)) {
          device char* to = buffer_of(buffers, slot_place(step_rule, step_flags, slot) + 1);
          if (is_byte_format(format_of_slot(slot))) {
            clear_bytes(to, at);
          } else {
            store_quad_of(format_of_slot(slot), to, at, zero, 1, false);
          }
        }
      }
    }
  }
}

/// One threadgroup, once a step: the next counter, and the numbers used.
[[kernel]] void step_finish(
    constant StepControl& control [[buffer(kControlBuffer)]],
    device const uint64_t* step [[buffer(kStepBuffer)]],
    device const float* given [[buffer(kGivenBuffer)]],
    device const float* measured [[buffer(kMeasuredBuffer)]],
    device uint64_t* step_out [[buffer(kStepOutBuffer)]],
    device float* used_out [[buffer(kUsedOutBuffer)]],
    uint32_t lane [[thread_position_in_threadgroup]]) {
  threadgroup float scalars[kScalars];
  const StepScalars all = scalars_of_threadgroup(control, step[0], given, scalars, lane);
  if (lane == 0) {
    const StepHyper hyper =
        step_hyper_of(control, control.rule, control.flags, step[0], all, measured);
    step_counters(all, hyper, step[0], step_out, used_out);
  }
}
