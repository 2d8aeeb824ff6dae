// A step on a CUDA device: pointers are gathered, launches go to MLX's encoder of the
// stream, which makes a CUDA graph of them or not.
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
    const StepPlan& plan,
    const StepInputs& in) {
  auto uses = [](const mx::array& a) {
    return static_cast<size_t>(a.data_shared_ptr().use_count());
  };
  bool held = plan.tensor_count() > 0 && uses(in.parameters[0]) > plan.parameter_inputs();
  for (auto* slot : in.slots) {
    held |= slot && uses(*slot) > 1;
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

bool slots_contiguous(const StepInputs& in) {
  for (auto* slot : in.slots) {
    if (slot && !slot->flags().row_contiguous) {
      return false;
    }
  }
  return true;
}

/// The tensors, sorted and packed. Throws std::invalid_argument where no kernel can read one.
Batches batches_of(const StepPlan& plan, const StepInputs& in) {
  Batches batches(type_of(plan.arena->dtype), slots_contiguous(in));
  for (size_t i = 0; i < plan.tensor_count(); ++i) {
    prefetch(in.parameters, i, plan.parameter_inputs());
    prefetch(in.gradients, i, plan.tensor_count());
    auto& shape = plan.arena->shapes[i];
    batches.add(
        shape.size(),
        shape.data(),
        {plan.arena->offsets[i],
         static_cast<uint32_t>(plan.arena->tensors[i]),
         plan.group(i),
         plan.tensor_flags(i)},
        source(in.parameter(i), plan.parameter_begin(i)),
        source(in.gradients[i]));
  }
  if (batches.launches() == 0 && plan.writes_step) {
    batches.add_nothing();
  }
  return batches;
}

struct StepKernels {
  KernelPair tiled, turned, strided;
};

/// Compiled and loaded, or an error now.
StepKernels kernels_of(const StepPlan& plan, const Batches& batches, int device) {
  const Type type = type_of(plan.arena->dtype);
  auto variant = [&](Kind kind) {
    return Variant{
        kind,
        plan.control.rule,
        type,
        // Where there is no slot of the rule, its type makes no kernel of its own.
        plan.has(0) ? static_cast<Type>(plan.kept.state_format) : type,
        batches.gradients,
        plan.flags() & ~fused_math::kMeasureNorm,
        parts_of(plan.control)};
  };
  return {
      kernels_for(batches.tiled, variant(Kind::tiled), variant(Kind::tiled_few), device),
      kernels_for(batches.turned, variant(Kind::turned), variant(Kind::turned_few), device),
      kernels_for(batches.strided, variant(Kind::strided), variant(Kind::strided), device)};
}

SlotArena slot_arena(const mx::array& in, const mx::array& out) {
  SlotArena arena{};
  arena.data = mx::gpu_ptr<void>(in);
  arena.out = mx::gpu_ptr<void>(out);
  arena.columns = in.shape(-1);
  arena.row_stride = in.ndim() == 1 ? 0 : in.strides(0);
  arena.column_stride = in.strides(-1);
  return arena;
}

Common common_arguments(const StepPlan& plan, const StepInputs& in, const StepOutputs& out) {
  Common common{};
  common.control = plan.control;
  common.step = pointer<uint64_t>(in.step);
  common.given = pointer<float>(in.given);
  common.measured = pointer<float>(in.measured);
  common.groups = pointer<float>(in.groups);
  common.step_out = pointer<uint64_t>(out.step);
  common.used_out = pointer<float>(out.used);
  common.parameters_out = pointer<void>(out.parameters);
  common.aligned = is_aligned(common.parameters_out, 16);
  for (int slot = 0; slot < kSlots; ++slot) {
    if (in.slots[slot]) {
      auto& arena = common.slots[slot];
      arena = slot_arena(*in.slots[slot], *out.slots[slot]);
      common.aligned &= is_aligned(arena.data, 16) && is_aligned(arena.out, 16);
    }
  }
  return common;
}

} // namespace

void step(const Step& step) {
  auto& plan = step.plan;
  auto& in = step.inputs;
  auto& encoder = mx::cu::get_command_encoder(step.stream);
  encoder.device().make_current();
  const int device = encoder.device().cuda_device();
  const auto batches = batches_of(plan, in);
  const auto kernels = kernels_of(plan, batches, device);

  let_go_of_finished_work(encoder, plan, in);
  const auto out = step.set_outputs([&](size_t bytes) { return allocate(bytes, step.stream); });
  set_inputs(encoder, in.parameters, plan.parameter_inputs() + plan.tensor_count());
  set_inputs(encoder, {in.step, in.given, in.measured, in.groups});
  set_outputs(encoder, {out.parameters, out.step, out.used});
  for (int slot = 0; slot < kSlots; ++slot) {
    set_inputs(encoder, {in.slots[slot]});
    set_outputs(encoder, {out.slots[slot]});
  }
  auto common = common_arguments(plan, in, out);
  auto counted = [&] { common.step_out = nullptr; }; // by the first launch
  side_by_side(encoder, batches.launches(), [&] {
    launch_batches(encoder, kernels.tiled, kThreads, batches.tiled, common, counted);
    launch_batches(encoder, kernels.turned, kSquareThreads, batches.turned, common, counted);
    launch_batches(encoder, kernels.strided, kThreads, batches.strided, common, counted);
  });
  start_if_idle(encoder);
}

constexpr Backend kBackend = {step, measure, evaluate_schedule};

extern "C" __attribute__((visibility("default"))) const Backend* mlx_fused_optim_cuda_backend() {
  return &kBackend;
}

} // namespace mlx_fused_optim::cuda
