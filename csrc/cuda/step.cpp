// A step on a CUDA device: pointers are gathered, launches go to the stream, or to MLX's graph of
// what waits for it.
#include "graph/step.h"

#include "cuda/batches.h"
#include "cuda/encoding.h"
#include "cuda/memory.h"
#include "cuda/operations.h"

namespace mlx_fused_optim::cuda {

namespace {

/// MLX lets go of the buffers of finished work on a thread of its own, and mx.eval
/// does not wait for that. A step that follows at once would find its arenas held
/// and move to fresh ones. Waits, but only where nothing else is to be done.
void let_go_of_finished_work(
    mx::cu::CommandEncoder& encoder,
    const std::vector<StepPlan>& plans,
    const std::vector<StepInputs>& inputs) {
  auto uses = [](const mx::array& a) {
    return static_cast<size_t>(a.data_shared_ptr().use_count());
  };
  bool held = false;
  for (size_t p = 0; p < plans.size(); ++p) {
    auto& in = inputs[p];
    const size_t own = plans[p].parameter_inputs();
    held |= own > 0 && uses(in.parameters[0]) > own;
    for (auto* slot : in.slots) {
      held |= slot && uses(*slot) > 1;
    }
  }
  if (held && has_nothing_to_do(encoder)) {
    encoder.synchronize();
  }
}

/// Hundreds of arrays are read through three pointers each: descriptor, data and
/// buffer. Asks for what the next ones need, a pointer further at a time.
void prefetch(const mx::array* arrays, size_t i, size_t n) {
  if (i + 12 < n) {
    __builtin_prefetch(reinterpret_cast<const void*>(arrays[i + 12].id()));
  }
  if (i + 8 < n) {
    __builtin_prefetch(arrays[i + 8].data_shared_ptr().get());
  }
  if (i + 4 < n) {
    __builtin_prefetch(arrays[i + 4].buffer().ptr());
  }
}

SlotWays slot_ways(const StepInputs& in) {
  SlotWays ways;
  for (int slot = 0; slot < kSlots; ++slot) {
    auto* a = in.slots[slot];
    const bool contiguous = !a || a->flags().row_contiguous;
    ways[slot] = contiguous ? kContiguousWay
                            : SlotWay{
                                  static_cast<uint64_t>(a->shape(-1)),
                                  a->ndim() == 1 ? 0 : a->strides(0),
                                  a->strides(-1)};
  }
  return ways;
}

/// The tensors, sorted and packed. Throws std::invalid_argument where no kernel can read one.
/// Of what has to be contiguous, `copies` are read.
Batches batches_of(
    const std::vector<StepPlan>& plans,
    const std::vector<StepInputs>& inputs,
    std::vector<mx::array>& copies,
    mx::Stream stream) {
  Batches batches(type_of(plans[0].arena->dtype), plans[0].kept.has_bytes());
  auto contiguous = [&](const mx::array& a, size_t begin) {
    return a.flags().row_contiguous
        ? source(a, begin)
        : source(copies.emplace_back(contiguous_copy(a, stream)), begin);
  };
  for (size_t p = 0; p < plans.size(); ++p) {
    auto& plan = plans[p];
    auto& in = inputs[p];
    batches.begin_arena(slot_ways(in));
    for (size_t i = 0; i < plan.tensor_count(); ++i) {
      prefetch(in.parameters, i, plan.parameter_inputs());
      prefetch(in.gradients, i, plan.gradient_inputs);
      auto& shape = plan.arena->shapes[i];
      const Member member{
          plan.arena->offsets[i],
          static_cast<uint32_t>(plan.arena->tensors[i]),
          plan.group(i),
          plan.tensor_flags(i)};
      auto add = [&](const Source& parameter, const Source& gradient) {
        return batches.add(shape.size(), shape.data(), member, parameter, gradient);
      };
      auto &parameter = in.parameter(i), &gradient = in.gradient(i);
      const size_t begin = plan.parameter_begin(i), first = plan.gradient_begin(i);
      if (!add(source(parameter, begin), source(gradient, first))) {
        add(contiguous(parameter, begin), contiguous(gradient, first));
      }
    }
  }
  if (batches.launches() == 0 && plans[0].writes_step) {
    batches.add_nothing();
  }
  return batches;
}

struct StepKernels {
  std::vector<CUfunction> tiled, turned, strided; // of each batch
};

/// Compiled and loaded, or an error now.
StepKernels kernels_of(const StepPlan& plan, const Batches& batches, int device) {
  const Type type = type_of(plan.arena->dtype);
  auto variant = [&](Kind kind) {
    return Variant{
        kind,
        plan.kept.rule,
        type,
        // Where there is no slot of the rule, its type makes no kernel of its own.
        plan.has(0) ? static_cast<Type>(plan.kept.state_format) : type,
        batches.gradients,
        plan.flags() & ~fused_math::kMeasureNorm,
        parts_of(*plan.shared)};
  };
  return {
      kernels_for(batches.tiled, variant(Kind::tiled), device),
      kernels_for(batches.turned, variant(Kind::turned), device),
      kernels_for(batches.strided, variant(Kind::strided), device)};
}

StepArena step_arena(const StepPlan& plan, const StepInputs& in, const StepOutputs& out) {
  StepArena arena{};
  arena.parameters_out = pointer<void>(out.parameters);
  arena.place = plan.arena->fingerprint;
  for (int slot = 0; slot < kSlots; ++slot) {
    arena.slots[slot] = {pointer<void>(in.slots[slot]), pointer<void>(out.slots[slot])};
  }
  return arena;
}

bool arena_is_aligned(const StepArena& arena) {
  bool all = is_aligned(arena.parameters_out, 16);
  for (auto& slot : arena.slots) {
    all &= is_aligned(slot.data, 16) && is_aligned(slot.out, 16);
  }
  return all;
}

static_assert(kMostArenas <= kArenas);

Common common_arguments(
    const std::vector<StepPlan>& plans,
    const std::vector<StepInputs>& in,
    const std::vector<StepOutputs>& out) {
  Common common{};
  common.control = plans[0].control();
  common.step = pointer<uint64_t>(in[0].step);
  common.given = pointer<float>(in[0].given);
  common.measured = pointer<float>(in[0].measured);
  common.groups = pointer<float>(in[0].groups);
  common.step_out = pointer<uint64_t>(out[0].step);
  common.used_out = pointer<float>(out[0].used);
  for (size_t p = 0; p < plans.size(); ++p) {
    common.arenas[p] = step_arena(plans[p], in[p], out[p]);
    common.aligned |= uint32_t(arena_is_aligned(common.arenas[p])) << p;
  }
  return common;
}

void submit(
    mx::cu::CommandEncoder& encoder,
    const std::vector<StepPlan>& plans,
    const std::vector<StepInputs>& in,
    const std::vector<StepOutputs>& out,
    const std::vector<mx::array>& copies,
    const Batches& batches,
    const StepKernels& kernels) {
  Submission submission(encoder, batches.launches());
  for (size_t p = 0; p < plans.size(); ++p) {
    submission.reads(in[p].parameters, plans[p].parameter_inputs());
    submission.reads(in[p].gradients, plans[p].gradient_inputs);
    submission.writes({out[p].parameters, out[p].step, out[p].used});
    for (int slot = 0; slot < kSlots; ++slot) {
      submission.reads({in[p].slots[slot]});
      submission.writes({out[p].slots[slot]});
    }
  }
  submission.reads({in[0].step, in[0].given, in[0].measured, in[0].groups});
  submission.reads(copies.data(), copies.size());
  auto common = common_arguments(plans, in, out);
  auto counted = [&] { common.step_out = nullptr; }; // by the first launch
  launch_batches(submission, kernels.tiled, kThreads, batches.tiled, common, counted);
  launch_batches(submission, kernels.turned, kSquareThreads, batches.turned, common, counted);
  launch_batches(submission, kernels.strided, kThreads, batches.strided, common, counted);
}

} // namespace

void step(const Step& step) {
  auto& plans = step.node.plans;
  auto& in = step.inputs;
  auto& encoder = mx::cu::get_command_encoder(step.stream);
  encoder.device().make_current();
  const int device = encoder.device().cuda_device();
  let_go_of_finished_work(encoder, plans, in);
  std::vector<mx::array> copies;
  const auto batches = batches_of(plans, in, copies, step.stream);
  const auto kernels = kernels_of(plans[0], batches, device);

  const auto out = step.set_outputs([&](size_t bytes) { return allocate(bytes, step.stream); });
  each_left(step.node, in, out, [&](const mx::array& array) { encoder.add_temporary(array); });
  for (auto& copy : copies) {
    encoder.add_temporary(copy);
  }
  submit(encoder, plans, in, out, copies, batches, kernels);
  start_if_idle(encoder);
}

constexpr Backend kBackend = {step, measure, evaluate_schedule, pace};

extern "C" __attribute__((visibility("default"))) const Backend* mlx_fused_optim_cuda_backend() {
  return &kBackend;
}

} // namespace mlx_fused_optim::cuda
