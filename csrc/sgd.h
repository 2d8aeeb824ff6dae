// The fused SGD step: the operation (checks, graph) and its primitive.
#pragma once

#include <variant>
#include <vector>

#include "layout.h"
#include "math/sgd.h"
#include "schedule.h"
#include "view.h"

namespace mlx_fused_optim {

using fused_math::SgdControl;

/// What a step of one arena does, apart from its arrays. Constant inside a
/// compiled graph; whatever changes from step to step is an array.
struct SgdPlan {
  std::shared_ptr<const Arena> arena;
  SgdControl control;
  bool writes_step; // the next counter and the numbers used are outputs too

  size_t tensor_count() const { return arena->tensors.size(); }
  /// Whether this arena has momentum: one without tensors has none.
  bool has_momentum() const { return control.flags & fused_math::kMomentum && tensor_count() > 0; }
  std::vector<mx::Shape> output_shapes() const;
  std::vector<mx::Dtype> output_dtypes() const;
};

/// Names for the positions in a primitive's inputs and outputs:
/// inputs  = parameters..., gradients..., [momentum], step, [given scalars]
/// outputs = [parameter arena], [momentum], [step, used scalars]
struct SgdInputs {
  SgdInputs(const SgdPlan& plan, const std::vector<mx::array>& arrays);
  const mx::array* parameters;
  const mx::array* gradients;
  const mx::array* momentum; // null without momentum
  const mx::array& step; // uint64
  const mx::array* given; // float32, see SgdControl; null when nothing is given
};
struct SgdOutputs {
  SgdOutputs(const SgdPlan& plan, std::vector<mx::array>& arrays);
  mx::array* parameters; // null when the arena has no tensors
  mx::array* momentum;
  mx::array* step; // null unless plan.writes_step
  mx::array* used; // likewise; float32 {kScalars}
};

/// A number of the step: a constant or a schedule, or an array that has it.
using SgdScalarSource = std::variant<Schedule, mx::array>;

/// The options of a step.
struct SgdOptions {
  SgdScalarSource learning_rate;
  SgdScalarSource momentum; // used with kMomentum
  SgdScalarSource weight_decay; // used with kWeightDecay
  double dampening;
  uint32_t flags; // fused_math::SgdFlags
};

/// One step of a whole layout.
struct SgdStep {
  std::vector<mx::array> parameters; // views into the new arenas
  std::vector<mx::array> momentum; // one flat array an arena; none without momentum
  std::vector<mx::array> counters; // step + 1 (uint64) and the scalars used (float32 {3})
};

/// The update of every tensor of `layout`:
///   g         = gradient + weight_decay * parameter
///   velocity  = momentum * velocity + (1 - dampening) * g
///   parameter = parameter - lr * (nesterov ? g + momentum * velocity : velocity)
/// where `flags` leave out velocity and weight decay. Each parameter keeps its
/// shape and dtype (float32, float16 or bfloat16); a gradient has the parameter's
/// shape and any of these dtypes; momentum has the parameter's dtype. The maths
/// is float32, rounded once on the store. `step` is a uint64 scalar, at which
/// schedules are evaluated. Parameters and momentum are updated in place when
/// nobody else holds them. Throws std::invalid_argument before any change.
SgdStep sgd_step(
    const Layout& layout,
    const std::vector<mx::array>& parameters,
    const std::vector<mx::array>& gradients,
    const std::vector<mx::array>& momentum,
    const mx::array& step,
    const SgdOptions& options,
    mx::StreamOrDevice s = {});

/// The step of one arena. Evaluation is in csrc/{cpu,metal,cuda}/sgd.cpp.
class FusedSGD : public mx::Primitive {
 public:
  FusedSGD(mx::Stream stream, SgdPlan plan) : mx::Primitive(stream), plan_(std::move(plan)) {}

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

  DEFINE_NAME(FusedSGD)
  std::vector<mx::Shape> output_shapes(const std::vector<mx::array>& inputs) override;

 private:
  SgdPlan plan_;
};

/// The same step in MLX operations: what FusedSGD differentiates and vectorises.
std::vector<mx::array> sgd_step_composed(
    const SgdPlan& plan,
    const std::vector<mx::array>& inputs,
    mx::Stream stream);

} // namespace mlx_fused_optim
