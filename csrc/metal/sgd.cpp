// Evaluation on Metal: buffers are bound and dispatches encoded now; MLX's command
// encoder runs them in order with everything else on the stream.
#include "sgd.h"

#include <algorithm>
#include <map>
#include <stdexcept>

#include "donation.h"
#include "metal/dispatch.h"
#include "metal/library.h"
#include "mlx/allocator.h"
#include "mlx/backend/metal/device.h"

namespace mlx_fused_optim {

namespace {

using namespace fused_metal;
using mx::metal::CommandEncoder;

// What Metal takes by value.
constexpr size_t kMaxBytes = 4096;
static_assert(sizeof(SgdControl) <= kMaxBytes);
static_assert(sizeof(SgdTable) <= kMaxBytes);
static_assert(sizeof(Schedule) <= kMaxBytes);

// A multiple of every tile's lanes and of the SIMD width, and small enough that
// several threadgroups share a core and hide each other's loads.
constexpr size_t kThreads = 256;
constexpr size_t kSimdWidth = 32;

size_t threads_for(MTL::ComputePipelineState* kernel) {
  const size_t most = kernel->maxTotalThreadsPerThreadgroup();
  if (most < kSimdWidth) {
    throw std::runtime_error(
        "[fused_sgd_step] this GPU cannot run the Metal kernels: got threadgroups of at most " +
        std::to_string(most) + " threads, needed " + std::to_string(kSimdWidth) +
        ". Set the environment variable MLX_FUSED_OPTIM_COMPOSED=1 to make the step of plain "
        "MLX operations.");
  }
  return std::min(kThreads, most / kSimdWidth * kSimdWidth);
}

/// One thread an element, up to a number that fills any GPU; the kernels loop.
void dispatch_elements(CommandEncoder& encoder, MTL::ComputePipelineState* kernel, size_t size) {
  constexpr size_t kMostThreads = size_t(1) << 20;
  encoder.dispatch_threads(
      MTL::Size(std::min(size, kMostThreads), 1, 1), MTL::Size(threads_for(kernel), 1, 1));
}

/// The array itself, or a copy in row-major order if the step kernel could not
/// read it. `copies` owns what it refers to until the step is encoded.
class Packer {
 public:
  Packer(mx::metal::Device& device, CommandEncoder& encoder, size_t most)
      : device_(device), encoder_(encoder) {
    copies_.reserve(most); // references into it are handed out
  }

  const mx::array& flat(const mx::array& a) {
    return a.size() == 0 || metal::is_contiguous(a) ? a : packed(a);
  }
  const mx::array& flat_or_matrix(const mx::array& a) {
    return a.size() == 0 || metal::matrix_view(a) ? a : packed(a);
  }

 private:
  const mx::array& packed(const mx::array& a);

  mx::metal::Device& device_;
  CommandEncoder& encoder_;
  std::vector<mx::array> copies_;
};

const mx::array& Packer::packed(const mx::array& a) {
  auto& copy = copies_.emplace_back(a.shape(), a.dtype(), nullptr, std::vector<mx::array>{});
  copy.set_data(mx::allocator::malloc(copy.nbytes()));
  auto* kernel = metal::kernel(device_, a.itemsize() == 4 ? "pack_4" : "pack_2");
  encoder_.set_compute_pipeline_state(kernel);
  encoder_.set_input_array(a, 0);
  encoder_.set_output_array(copy, 1);
  encoder_.set_vector_bytes(a.shape(), 2);
  encoder_.set_vector_bytes(a.strides(), 3);
  encoder_.set_bytes(uint32_t(a.ndim()), 4);
  encoder_.set_bytes(uint64_t(a.size()), 5);
  dispatch_elements(encoder_, kernel, a.size());
  encoder_.add_temporary(copy);
  return copy;
}

/// The kernels of a step, compiled, and threadgroups that suit all of them.
struct StepKernels {
  StepKernels(mx::metal::Device& device, const SgdPlan& plan, const SgdInputs& in);

  std::map<mx::Dtype::Val, MTL::ComputePipelineState*> step; // by the gradient's dtype
  MTL::ComputePipelineState* counters = nullptr; // if the plan writes the step
  size_t threads = kThreads;
};

StepKernels::StepKernels(mx::metal::Device& device, const SgdPlan& plan, const SgdInputs& in) {
  for (size_t i = 0; i < plan.tensor_count(); ++i) {
    const auto gradient = in.gradients[i].dtype();
    auto*& kernel = step[gradient.val()];
    if (!kernel) {
      const auto types = metal::name_of(plan.arena->dtype) + "_" + metal::name_of(gradient);
      kernel = metal::kernel(device, "sgd_step_" + types, plan.control.flags);
      threads = std::min(threads, threads_for(kernel));
    }
  }
  if (plan.writes_step) {
    counters = metal::kernel(device, "sgd_counters");
  }
}

/// The inputs as the step kernel can read them.
struct Readable {
  Readable(Packer& packer, CommandEncoder& encoder, const SgdPlan& plan, const SgdInputs& in) {
    auto together = encoder.start_concurrent(); // the copies, if there are any
    for (size_t i = 0; i < plan.tensor_count(); ++i) {
      parameters.push_back(&packer.flat(in.parameters[i]));
      gradients.push_back(&packer.flat_or_matrix(in.gradients[i]));
    }
    momentum = in.momentum ? &packer.flat(*in.momentum) : nullptr;
  }

  std::vector<const mx::array*> parameters, gradients;
  const mx::array* momentum;
};

std::vector<metal::Dispatch> dispatches_of(
    const SgdPlan& plan,
    const SgdInputs& in,
    const SgdOutputs& out,
    const Readable& readable,
    size_t threads) {
  if (plan.tensor_count() == 0) {
    return {};
  }
  auto is_aligned = [](const mx::array* a) {
    return !a || a->offset() % (kQuad * a->itemsize()) == 0;
  };
  auto is_fresh = [](const mx::array* output, const mx::array* input) {
    return output && output->data_shared_ptr() != input->data_shared_ptr();
  };
  const bool aligned =
      is_aligned(out.parameters) && is_aligned(out.momentum) && is_aligned(readable.momentum);
  const bool gaps = is_fresh(out.parameters, in.parameters) || is_fresh(out.momentum, in.momentum);
  return metal::make_dispatches(
      *plan.arena, readable.parameters, readable.gradients, aligned, gaps, threads);
}

void bind_numbers(CommandEncoder& encoder, const SgdControl& control, const SgdInputs& in) {
  encoder.set_bytes(control, kControlBuffer);
  encoder.set_input_array(in.step, kStepBuffer);
  if (in.given) {
    encoder.set_input_array(*in.given, kGivenBuffer);
  } else {
    encoder.set_bytes(0.0f, kGivenBuffer); // never read
  }
}

void bind_arenas(
    CommandEncoder& encoder,
    const metal::Dispatch& dispatch,
    const mx::array* momentum,
    const SgdOutputs& out) {
  encoder.set_bytes(dispatch.table, kTableBuffer);
  encoder.set_output_array(*out.parameters, kParameterOutBuffer);
  if (momentum) {
    encoder.set_input_array(*momentum, kVelocityBuffer);
    encoder.set_output_array(*out.momentum, kVelocityOutBuffer);
  }
  for (size_t i = 0; i < kSources; ++i) {
    // A slot must have a buffer even if no tensor uses it.
    auto& source = *dispatch.sources[i < dispatch.sources.size() ? i : 0];
    encoder.set_input_array(source, kFirstSourceBuffer + i, -source.offset());
  }
}

} // namespace

void FusedSGD::eval_gpu(const std::vector<mx::array>& inputs, std::vector<mx::array>& outputs) {
  auto& device = mx::metal::device(stream().device);
  SgdInputs in(plan_, inputs);
  SgdOutputs out(plan_, outputs);
  // Kernels first: if they do not compile, nothing has changed.
  const StepKernels kernels(device, plan_, in);
  set_outputs(plan_, inputs, outputs, [](size_t bytes) { return mx::allocator::malloc(bytes); });

  auto& encoder = mx::metal::get_command_encoder(stream());
  Packer packer(device, encoder, 2 * plan_.tensor_count() + 1);
  const Readable readable(packer, encoder, plan_, in);

  // They write disjoint parts of one arena: side by side, not one after another.
  auto together = encoder.start_concurrent();
  for (auto& dispatch : dispatches_of(plan_, in, out, readable, kernels.threads)) {
    encoder.set_compute_pipeline_state(kernels.step.at(dispatch.gradient_dtype.val()));
    bind_numbers(encoder, plan_.control, in);
    bind_arenas(encoder, dispatch, readable.momentum, out);
    encoder.dispatch_threadgroups(
        MTL::Size(dispatch.blocks, 1, 1), MTL::Size(kernels.threads, 1, 1));
  }
  if (kernels.counters) {
    encoder.set_compute_pipeline_state(kernels.counters);
    bind_numbers(encoder, plan_.control, in);
    encoder.set_output_array(*out.step, kStepOutBuffer);
    encoder.set_output_array(*out.used, kUsedOutBuffer);
    encoder.dispatch_threads(MTL::Size(1, 1, 1), MTL::Size(1, 1, 1));
  }
}

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
  dispatch_elements(encoder, kernel, output.size());
}

} // namespace mlx_fused_optim
