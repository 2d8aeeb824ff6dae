// The measurement that clipping, skipping and trust ratios need before the step: norms
// of all gradients, without the host. See csrc/math/norm.h for the order of the sums.
#pragma once

#include "graph/memory_order.h"
#include "math/frame.h"
#include "mlx/mlx.h"
#include "mlx/primitives.h"

namespace mlx_fused_optim {

namespace mx = mlx::core;

/// What a measurement does, apart from its arrays.
struct MeasurePlan {
  fused_math::StepControl control; // flags, clip_value, the scale of the gradients
  size_t gradient_count; // gradients of the whole layout
  bool has_parameters; // with kTrustRatio: the norms of the parameters too

  size_t array_count() const { return gradient_count * (1 + has_parameters); }
  mx::Shape measured_shape() const {
    const size_t tensors = has_parameters ? 2 * gradient_count : 0;
    return {static_cast<int>(fused_math::kMeasuredTensors + tensors)};
  }
};

/// inputs  = gradients..., [parameters...], step, skipped, [given scalars]
/// outputs = measured (float32, see StepMeasured), skipped (uint64)
struct MeasureInputs {
  MeasureInputs(const MeasurePlan& plan, const std::vector<mx::array>& inputs)
      : arrays(inputs.data()),
        step(arrays + plan.array_count()),
        skipped(step + 1),
        given(plan.control.given ? step + 2 : nullptr) {}
  const mx::array* arrays; // plan.array_count() of them
  const mx::array* step;
  const mx::array* skipped;
  const mx::array* given; // null when nothing is given
};

/// Arrays that fill memory (see memory_order.h) are summed in memory's order, others in
/// that of their indices. Evaluation is in csrc/{cpu,metal,cuda}/measure.cpp.
class MeasureGradients : public mx::Primitive {
 public:
  MeasureGradients(mx::Stream stream, MeasurePlan plan)
      : mx::Primitive(stream), plan_(std::move(plan)) {}

  void eval_cpu(const std::vector<mx::array>& inputs, std::vector<mx::array>& outputs) override;
  void eval_gpu(const std::vector<mx::array>& inputs, std::vector<mx::array>& outputs) override;

  std::vector<mx::array> jvp(
      const std::vector<mx::array>& primals,
      const std::vector<mx::array>& tangents,
      const std::vector<int>& argnums) override;
  std::vector<mx::array> vjp(
      const std::vector<mx::array>& primals,
      const std::vector<mx::array>& cotangents,
      const std::vector<int>& argnums,
      const std::vector<mx::array>& outputs) override;
  std::pair<std::vector<mx::array>, std::vector<int>> vmap(
      const std::vector<mx::array>& inputs,
      const std::vector<int>& axes) override;

  DEFINE_NAME(MeasureGradients)
  std::vector<mx::Shape> output_shapes(const std::vector<mx::array>&) override {
    return {plan_.measured_shape(), {}};
  }

 private:
  MeasurePlan plan_;
};

/// {measured, skipped}: see MeasureInputs.
std::vector<mx::array> measure_gradients(
    const MeasurePlan& plan,
    const std::vector<mx::array>& inputs,
    mx::Stream stream);

/// The same in MLX operations; its sums may differ in the last bits.
std::vector<mx::array> measure_composed(
    const MeasurePlan& plan,
    const std::vector<mx::array>& inputs,
    mx::Stream stream);

/// The norm of each of at least one tensor.
mx::array norms_of(const std::vector<mx::array>& tensors, mx::Stream stream);

} // namespace mlx_fused_optim
