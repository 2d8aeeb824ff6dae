// The launches of a plain step.
#include "cuda/batches.h"
#include "cuda/encoding.h"
#include "cuda/launches.h"

namespace mlx_fused_optim::cuda {

namespace {

Common common_arguments(const SgdPlan& plan, const SgdInputs& in, const SgdOutputs& out) {
  Common common{};
  common.control = plan.control;
  common.step = pointer<uint64_t>(in.step);
  common.given = pointer<float>(in.given);
  common.step_out = pointer<uint64_t>(out.step);
  common.used_out = pointer<float>(out.used);
  common.parameters_out = pointer<void>(out.parameters);
  common.velocity_out = pointer<void>(out.slots[kVelocity]);
  if (in.slots[kVelocity]) {
    auto& velocity = *in.slots[kVelocity];
    const bool flat = velocity.ndim() == 1;
    common.velocity = mx::gpu_ptr<void>(velocity);
    common.velocity_columns = velocity.shape(-1);
    common.velocity_row_stride = flat ? 0 : velocity.strides(0);
    common.velocity_column_stride = velocity.strides(-1);
  }
  common.aligned = is_aligned(common.parameters_out, 16) && is_aligned(common.velocity, 16) &&
      is_aligned(common.velocity_out, 16);
  return common;
}

class PlainLaunches : public Launches {
 public:
  PlainLaunches(const SgdPlan& plan, const SgdInputs& in, int device)
      : plan_(plan),
        batches_(
            type_of(plan.arena->dtype),
            !in.slots[kVelocity] || in.slots[kVelocity]->flags().row_contiguous) {
    for (size_t i = 0; i < plan.tensor_count(); ++i) {
      prefetch(in.parameters, i, plan.parameter_inputs());
      prefetch(in.gradients, i, plan.tensor_count());
      auto& shape = plan.arena->shapes[i];
      batches_.add(
          shape.size(),
          shape.data(),
          plan.arena->offsets[i],
          source(in.parameter(i), plan.parameter_begin(i)),
          source(in.gradients[i]));
    }
    if (batches_.launches() == 0 && plan.writes_step) {
      batches_.add_nothing();
    }
    flat_ = kernels_for(batches_.flat, variant(Kind::flat), variant(Kind::flat_few), device);
    transposed_ = kernels_for(
        batches_.transposed, variant(Kind::transposed), variant(Kind::transposed_few), device);
    strided_ =
        kernels_for(batches_.strided, variant(Kind::strided), variant(Kind::strided), device);
  }

  size_t count() const override { return batches_.launches(); }

  void launch(mx::cu::CommandEncoder& encoder, const SgdInputs& in, const SgdOutputs& out)
      override {
    auto common = common_arguments(plan_, in, out);
    auto counted = [&] { common.step_out = nullptr; }; // by the first launch
    launch_batches(encoder, flat_, kThreads, batches_.flat, common, counted);
    launch_batches(encoder, transposed_, kSquareThreads, batches_.transposed, common, counted);
    launch_batches(encoder, strided_, kThreads, batches_.strided, common, counted);
  }

 private:
  Variant variant(Kind kind) const {
    const Type type = type_of(plan_.arena->dtype);
    return {kind, type, type, batches_.gradients, plan_.flags(), parts_of(plan_.control)};
  }

  const SgdPlan& plan_;
  Batches batches_;
  KernelPair flat_, transposed_, strided_;
};

} // namespace

std::unique_ptr<Launches> plain_launches(const SgdPlan& plan, const SgdInputs& in, int device) {
  return std::make_unique<PlainLaunches>(plan, in, device);
}

} // namespace mlx_fused_optim::cuda
