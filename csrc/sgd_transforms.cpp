// Differentiation and vectorisation of the step: through the same step written
// in MLX operations, which MLX can transform.
#include <algorithm>

#include "mlx/transforms.h"
#include "sgd.h"

namespace mlx_fused_optim {

namespace {

mx::array tensor_of(const mx::array& arena, const mx::Shape& shape, size_t offset, mx::Stream s) {
  return arena_view(mx::contiguous(arena, false, s), shape, offset, s);
}

mx::array pack(const std::vector<mx::array>& tensors, const Arena& arena, mx::Stream s) {
  return mx::reshape(pack_arena(tensors, arena.offsets, arena.size, s), arena_shape(arena), s);
}

} // namespace

std::vector<mx::array> sgd_step_composed(
    const SgdPlan& plan,
    const std::vector<mx::array>& inputs,
    mx::Stream s) {
  SgdInputs in(plan, inputs);
  using namespace fused_math;
  auto& control = plan.control;
  auto& arena = *plan.arena;
  auto number = [&](SgdScalar i) {
    if (!(control.given >> i & 1)) {
      return evaluate_schedule(control.schedules[i], in.step, s);
    }
    // A scalar alone, or one of several.
    return in.given->ndim() == 0 ? *in.given : mx::take(*in.given, int(i), 0, s);
  };
  const auto learning_rate = number(kLearningRate);
  const auto momentum = number(kMomentumFactor);
  const auto weight_decay = number(kWeightDecayFactor);
  const auto gradient_weight = mx::array(control.gradient_weight);

  std::vector<mx::array> parameters, velocities;
  for (size_t i = 0; i < plan.tensor_count(); ++i) {
    auto parameter = mx::astype(in.parameters[i], mx::float32, s);
    auto update = mx::astype(in.gradients[i], mx::float32, s);
    if (control.flags & kWeightDecay) {
      update = mx::add(update, mx::multiply(weight_decay, parameter, s), s);
    }
    if (plan.has_momentum()) {
      auto old = tensor_of(*in.momentum, arena.shapes[i], arena.offsets[i], s);
      auto velocity = mx::add(
          mx::multiply(momentum, mx::astype(old, mx::float32, s), s),
          mx::multiply(gradient_weight, update, s),
          s);
      update = control.flags & kNesterov ? mx::add(update, mx::multiply(momentum, velocity, s), s)
                                         : velocity;
      velocities.push_back(mx::astype(velocity, arena.dtype, s));
    }
    auto updated = mx::subtract(parameter, mx::multiply(learning_rate, update, s), s);
    parameters.push_back(mx::astype(updated, arena.dtype, s));
  }

  std::vector<mx::array> outputs;
  if (plan.tensor_count() > 0) {
    outputs.push_back(pack(parameters, arena, s));
    if (plan.has_momentum()) {
      outputs.push_back(pack(velocities, arena, s));
    }
  }
  if (plan.writes_step) {
    outputs.push_back(mx::add(in.step, mx::array(uint64_t(1), mx::uint64), s));
    outputs.push_back(mx::stack({learning_rate, momentum, weight_decay}, 0, s));
  }
  return outputs;
}

namespace {

/// The step as a function of the inputs numbered `argnums` alone, and without
/// its counter, which has no derivative.
struct DifferentiableStep {
  const SgdPlan& plan;
  std::vector<mx::array> inputs;
  std::vector<int> argnums;
  mx::Stream stream;

  int step_input() const { return 2 * plan.tensor_count() + plan.has_momentum(); }
  /// Position of the counter among the outputs; -1 if it is not one.
  int step_output() const {
    return plan.writes_step ? (plan.tensor_count() > 0 ? 1 + plan.has_momentum() : 0) : -1;
  }
  std::vector<mx::array> operator()(const std::vector<mx::array>& values) const {
    auto all = inputs;
    for (size_t i = 0; i < values.size(); ++i) {
      all[argnums[i]] = values[i];
    }
    return without(step_output(), sgd_step_composed(plan, all, stream));
  }
  static std::vector<mx::array> without(int position, std::vector<mx::array> arrays) {
    if (position >= 0) {
      arrays.erase(arrays.begin() + position);
    }
    return arrays;
  }
};

} // namespace

std::vector<mx::array> FusedSGD::jvp(
    const std::vector<mx::array>& primals,
    const std::vector<mx::array>& tangents,
    const std::vector<int>& argnums) {
  DifferentiableStep function{plan_, primals, {}, stream()};
  std::vector<mx::array> values, directions;
  for (size_t i = 0; i < argnums.size(); ++i) {
    if (argnums[i] != function.step_input()) {
      function.argnums.push_back(argnums[i]);
      values.push_back(primals[argnums[i]]);
      directions.push_back(tangents[i]);
    }
  }
  auto result = mx::jvp(function, values, directions).second;
  if (function.step_output() >= 0) {
    result.insert(result.begin() + function.step_output(), mx::array(uint64_t(0), mx::uint64));
  }
  return result;
}

std::vector<mx::array> FusedSGD::vjp(
    const std::vector<mx::array>& primals,
    const std::vector<mx::array>& cotangents,
    const std::vector<int>& argnums,
    const std::vector<mx::array>&) {
  DifferentiableStep function{plan_, primals, {}, stream()};
  std::vector<mx::array> values;
  for (int argnum : argnums) {
    if (argnum != function.step_input()) {
      function.argnums.push_back(argnum);
      values.push_back(primals[argnum]);
    }
  }
  auto gradients =
      mx::vjp(function, values, DifferentiableStep::without(function.step_output(), cotangents))
          .second;
  auto step_at = std::find(argnums.begin(), argnums.end(), function.step_input());
  if (step_at != argnums.end()) {
    gradients.insert(
        gradients.begin() + (step_at - argnums.begin()), mx::array(uint64_t(0), mx::uint64));
  }
  return gradients;
}

std::pair<std::vector<mx::array>, std::vector<int>> FusedSGD::vmap(
    const std::vector<mx::array>& inputs,
    const std::vector<int>& axes) {
  auto composed = [this](const std::vector<mx::array>& arrays) {
    return sgd_step_composed(plan_, arrays, stream());
  };
  auto outputs = mx::vmap(composed, axes)(inputs);
  // An output that depends on no vectorised input has no batch axis.
  auto shapes = plan_.output_shapes();
  std::vector<int> output_axes;
  for (size_t i = 0; i < outputs.size(); ++i) {
    output_axes.push_back(outputs[i].ndim() > shapes[i].size() ? 0 : -1);
  }
  return {std::move(outputs), std::move(output_axes)};
}

} // namespace mlx_fused_optim
