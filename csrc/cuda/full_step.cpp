// The launches of a full step.
#include "cuda/encoding.h"
#include "cuda/full_batches.h"
#include "cuda/launches.h"

namespace mlx_fused_optim::cuda {

namespace {

SlotArena slot_arena(const mx::array& in, const mx::array& out) {
  SlotArena arena{};
  arena.data = mx::gpu_ptr<void>(in);
  arena.out = mx::gpu_ptr<void>(out);
  arena.columns = in.shape(-1);
  arena.row_stride = in.ndim() == 1 ? 0 : in.strides(0);
  arena.column_stride = in.strides(-1);
  return arena;
}

FullCommon common_arguments(const SgdPlan& plan, const SgdInputs& in, const SgdOutputs& out) {
  FullCommon common{};
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

bool slots_contiguous(const SgdInputs& in) {
  for (auto* slot : in.slots) {
    if (slot && !slot->flags().row_contiguous) {
      return false;
    }
  }
  return true;
}

class FullLaunches : public Launches {
 public:
  FullLaunches(const SgdPlan& plan, const SgdInputs& in, int device)
      : plan_(plan), batches_(type_of(plan.arena->dtype), slots_contiguous(in)) {
    for (size_t i = 0; i < plan.tensor_count(); ++i) {
      prefetch(in.parameters, i, plan.parameter_inputs());
      prefetch(in.gradients, i, plan.tensor_count());
      auto& shape = plan.arena->shapes[i];
      batches_.add(
          shape.size(),
          shape.data(),
          {plan.arena->offsets[i],
           static_cast<uint32_t>(plan.arena->tensors[i]),
           plan.group(i),
           plan.tensor_flags(i)},
          source(in.parameter(i), plan.parameter_begin(i)),
          source(in.gradients[i]));
    }
    if (batches_.launches() == 0 && plan.writes_step) {
      batches_.add_nothing();
    }
    const auto tiled = variant(Kind::full_tiled), strided = variant(Kind::full_strided);
    tiled_ = kernels_for(batches_.tiled, tiled, tiled, device);
    strided_ = kernels_for(batches_.strided, strided, strided, device);
  }

  size_t count() const override { return batches_.launches(); }

  void launch(mx::cu::CommandEncoder& encoder, const SgdInputs& in, const SgdOutputs& out)
      override {
    auto common = common_arguments(plan_, in, out);
    auto counted = [&] { common.step_out = nullptr; }; // by the first launch
    launch_batches(encoder, tiled_, kThreads, batches_.tiled, common, counted);
    launch_batches(encoder, strided_, kThreads, batches_.strided, common, counted);
  }

 private:
  Variant variant(Kind kind) const {
    const Type type = type_of(plan_.arena->dtype);
    const bool has_momentum = plan_.flags() & fused_math::kMomentum;
    return {
        kind,
        type,
        has_momentum ? type_of(plan_.velocity_dtype) : type,
        batches_.gradients,
        plan_.flags() & ~fused_math::kMeasureNorm,
        parts_of(plan_.control)};
  }

  const SgdPlan& plan_;
  FullBatches batches_;
  KernelPair tiled_, strided_;
};

} // namespace

std::unique_ptr<Launches> full_launches(const SgdPlan& plan, const SgdInputs& in, int device) {
  return std::make_unique<FullLaunches>(plan, in, device);
}

} // namespace mlx_fused_optim::cuda
