// The host side of a schedule: built in float64, evaluated by csrc/math.
#pragma once

#include <cstdint>
#include <optional>

#include "math/schedule.h"
#include "mlx/mlx.h"
#include "mlx/primitives.h"

namespace mlx_fused_optim {

namespace mx = mlx::core;
using fused_math::Schedule;

/// The same value at every step.
Schedule constant(double value);

/// init * decay_rate ^ ((step - transition_begin) / transition_steps), as in
/// optax.exponential_decay. The arguments must have been checked.
Schedule exponential_decay(
    double init,
    double decay_rate,
    uint64_t transition_steps,
    uint64_t transition_begin,
    bool staircase,
    std::optional<double> end);

/// The learning rate at each of `steps` (any shape, uint64), as float32.
mx::array evaluate_schedule(
    const Schedule& schedule,
    const mx::array& steps,
    mx::StreamOrDevice s = {});

/// steps -> schedule(steps), elementwise. Its derivative is zero: steps count.
class EvaluateSchedule : public mx::UnaryPrimitive {
 public:
  EvaluateSchedule(mx::Stream stream, const Schedule& schedule)
      : mx::UnaryPrimitive(stream), schedule_(schedule) {}

  void eval_cpu(const std::vector<mx::array>& inputs, mx::array& output) override;
  void eval_gpu(const std::vector<mx::array>& inputs, mx::array& output) override;

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

  DEFINE_NAME(EvaluateSchedule)
  std::vector<mx::Shape> output_shapes(const std::vector<mx::array>& inputs) override {
    return {inputs[0].shape()};
  }
  bool is_equivalent(const mx::Primitive& other) const override;

 private:
  Schedule schedule_;
};

} // namespace mlx_fused_optim
