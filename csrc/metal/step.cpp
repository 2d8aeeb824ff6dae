// Evaluation on Metal: buffers are bound and dispatches encoded now; MLX's command
// encoder runs them in order with everything else on the stream.
#include "graph/step.h"

#include <algorithm>
#include <map>

#include "graph/donation.h"
#include "graph/view.h"
#include "metal/dispatch.h"
#include "metal/library.h"
#include "metal/pack.h"
#include "mlx/allocator.h"
#include "mlx/backend/metal/device.h"

namespace mlx_fused_optim {

namespace {

using namespace fused_metal;
using mx::metal::CommandEncoder;

// What Metal takes by value.
constexpr size_t kMaxBytes = 4096;
static_assert(sizeof(StepControl) <= kMaxBytes);
static_assert(sizeof(StepTable) <= kMaxBytes);
static_assert(sizeof(Schedule) <= kMaxBytes);
static_assert(fused_math::kMeasureNorm <= UINT16_MAX, "a tensor's flags have 16 bits");
static_assert(size_t(fused_math::kScalars) <= kSimdWidth, "a thread each scalar");

/// The kernels of a step, compiled, and threadgroups that suit all of them.
struct StepKernels {
  StepKernels(mx::metal::Device& device, const StepPlan& plan, const StepInputs& in);

  std::map<mx::Dtype::Val, MTL::ComputePipelineState*> step; // by the gradient's dtype
  MTL::ComputePipelineState* finish = nullptr; // if the plan writes the step
  metal::Threadgroups groups{kMostThreads, metal::tile_columns()};
};

StepKernels::StepKernels(mx::metal::Device& device, const StepPlan& plan, const StepInputs& in) {
  if (plan.kept.has_bytes()) {
    groups.tile_columns = std::max<uint32_t>(groups.tile_columns, fused_math::kByteGroup);
  }
  for (size_t i = 0; i < plan.tensor_count(); ++i) {
    const auto gradient = in.gradient(i).dtype();
    auto*& kernel = step[gradient.val()];
    if (!kernel) {
      kernel = metal::step_kernel(device, plan.kept, gradient, groups.tile_columns);
      groups.threads = std::min(groups.threads, metal::threads_for(kernel));
    }
  }
  if (plan.writes_step) {
    finish = metal::kernel(device, "step_finish");
  }
}

/// Copies what the step kernel cannot read.
void make_readable(
    metal::Packer& packer,
    CommandEncoder& encoder,
    const StepPlan& plan,
    const StepInputs& in) {
  auto together = encoder.start_concurrent(); // the copies, if there are any
  for (size_t i = 0; i < plan.parameter_inputs(); ++i) {
    packer.readable(in.parameters[i], metal::is_contiguous(in.parameters[i]));
  }
  // A group of bytes is in a row of a gradient that is a matrix.
  const bool is_bytes = plan.kept.has_bytes();
  for (size_t i = 0; i < plan.gradient_inputs; ++i) {
    const auto view = metal::matrix_view(in.gradients[i]);
    const bool is_readable = view && (!is_bytes || view->columns % fused_math::kByteGroup == 0);
    packer.readable(in.gradients[i], is_readable);
  }
  for (int slot = 0; slot < kSlots; ++slot) {
    if (auto* kept = in.slots[slot]) {
      const bool has_scales = fused_math::is_byte_format(plan.kept.format(slot));
      const bool is_aligned = !has_scales || kept->offset() % fused_math::kByteScale == 0;
      packer.readable(*kept, metal::is_contiguous(*kept) && is_aligned);
    }
  }
}

std::vector<metal::Dispatch> dispatches_of(
    const StepPlan& plan,
    const StepInputs& in,
    const StepOutputs& out,
    const metal::Packer& readable,
    metal::Threadgroups groups) {
  if (plan.tensor_count() == 0) {
    return {};
  }
  auto is_aligned = [](const mx::array& a) { return a.offset() % (kQuad * a.itemsize()) == 0; };
  auto is_fresh = [](const mx::array& output, const mx::array& input) {
    return output.data_shared_ptr() != input.data_shared_ptr();
  };
  bool aligned = is_aligned(*out.parameters);
  bool gaps = is_fresh(*out.parameters, in.parameters[0]);
  for (int slot = 0; slot < kSlots; ++slot) {
    if (out.slots[slot]) {
      aligned &= is_aligned(*out.slots[slot]) && is_aligned(readable(*in.slots[slot]));
      gaps |= is_fresh(*out.slots[slot], *in.slots[slot]);
    }
  }
  return metal::make_dispatches(
      plan,
      in,
      readable,
      aligned,
      gaps,
      kBuffers - source_place(plan.kept.rule, plan.flags()),
      groups);
}

/// An array that a step may be without; where it is, the kernel does not read it.
void bind_optional(CommandEncoder& encoder, const mx::array* a, int slot) {
  if (a) {
    encoder.set_input_array(*a, slot);
  } else {
    encoder.set_bytes(0.0f, slot);
  }
}

void bind_numbers(CommandEncoder& encoder, const StepControl& control, const StepInputs& in) {
  encoder.set_bytes(control, kControlBuffer);
  if (in.step) {
    encoder.set_input_array(*in.step, kStepBuffer);
  } else {
    encoder.set_bytes(uint64_t(0), kStepBuffer); // no number depends on it
  }
  bind_optional(encoder, in.given, kGivenBuffer);
}

/// What a dispatch has of buffers: see the places in metal/table.h.
void bind_buffers(
    CommandEncoder& encoder,
    const StepPlan& plan,
    const metal::Dispatch& dispatch,
    const StepInputs& in,
    const metal::Packer& readable,
    const StepOutputs& out) {
  const uint32_t rule = plan.kept.rule, flags = plan.flags();
  encoder.set_output_array(*out.parameters, int(kFirstBuffer) + kParameterOutPlace);
  for (int slot = 0; slot < kSlots; ++slot) {
    if (out.slots[slot]) {
      const int at = kFirstBuffer + slot_place(rule, flags, slot);
      encoder.set_input_array(readable(*in.slots[slot]), at);
      encoder.set_output_array(*out.slots[slot], at + 1);
    }
  }
  if (in.measured) {
    encoder.set_input_array(*in.measured, kFirstBuffer + measured_place(rule, flags));
  }
  if (in.groups) {
    encoder.set_input_array(*in.groups, kFirstBuffer + groups_place(rule, flags));
  }
  const uint32_t first = source_place(rule, flags);
  dispatch.sources.bind(encoder, kFirstBuffer + first, kBuffers - first);
}

void encode(
    CommandEncoder& encoder,
    const StepPlan& plan,
    const StepKernels& kernels,
    const StepInputs& in,
    const metal::Packer& readable,
    const StepOutputs& out) {
  const auto control = plan.control();
  for (auto& dispatch : dispatches_of(plan, in, out, readable, kernels.groups)) {
    encoder.set_compute_pipeline_state(kernels.step.at(dispatch.gradient_dtype.val()));
    bind_numbers(encoder, control, in);
    encoder.set_bytes(dispatch.table, kTableBuffer);
    bind_buffers(encoder, plan, dispatch, in, readable, out);
    encoder.dispatch_threadgroups(
        MTL::Size(dispatch.blocks, 1, 1), MTL::Size(kernels.groups.threads, 1, 1));
  }
  if (kernels.finish) {
    encoder.set_compute_pipeline_state(kernels.finish);
    bind_numbers(encoder, control, in);
    bind_optional(encoder, in.measured, kMeasuredBuffer);
    encoder.set_output_array(*out.step, kStepOutBuffer);
    encoder.set_output_array(*out.used, kUsedOutBuffer);
    const MTL::Size size(fused_math::kScalars, 1, 1); // a thread each scalar
    encoder.dispatch_threads(size, size);
  }
}

} // namespace

void FusedStep::eval_gpu(const std::vector<mx::array>& inputs, std::vector<mx::array>& outputs) {
  auto& device = mx::metal::device(stream().device);
  const auto in = node_.inputs(inputs);
  // Kernels first: if they do not compile, nothing has changed.
  std::vector<StepKernels> kernels;
  for (size_t p = 0; p < in.size(); ++p) {
    kernels.emplace_back(device, node_.plans[p], in[p]);
  }
  auto& encoder = mx::metal::get_command_encoder(stream());
  metal::Packer packer(device, encoder);
  for (size_t p = 0; p < in.size(); ++p) {
    make_readable(packer, encoder, node_.plans[p], in[p]);
  }
  set_outputs(node_, inputs, outputs, [](size_t bytes) { return mx::allocator::malloc(bytes); });
  const auto out = node_.outputs(outputs);
  each_left(node_, in, out, [&](const mx::array& array) { encoder.add_temporary(array); });

  // They write disjoint parts of their arenas: side by side, not one after another.
  auto together = encoder.start_concurrent();
  for (size_t p = 0; p < in.size(); ++p) {
    encode(encoder, node_.plans[p], kernels[p], in[p], packer, out[p]);
  }
}

void pace(mx::Stream) {} // MLX commits after 40 or 50 MB, and waits where ten are under way

void EvaluateSchedule::eval_gpu(const std::vector<mx::array>& inputs, mx::array& output) {
  auto& device = mx::metal::device(stream().device);
  auto* kernel = metal::kernel(device, "schedule_values");
  output.set_data(mx::allocator::malloc(output.nbytes()));
  if (output.size() == 0) {
    return;
  }
  auto& encoder = mx::metal::get_command_encoder(stream());
  encoder.set_compute_pipeline_state(kernel);
  encoder.set_bytes(schedule_, 0);
  encoder.set_input_array(inputs[0], 1);
  encoder.set_output_array(output, 2);
  encoder.set_bytes(uint64_t(output.size()), 3);
  metal::dispatch_elements(encoder, kernel, output.size());
}

} // namespace mlx_fused_optim
