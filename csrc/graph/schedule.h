// The host side of a schedule: built in float64, evaluated by csrc/math.
#pragma once

#include <cstdint>
#include <optional>
#include <vector>

#include "math/schedule.h"
#include "mlx/mlx.h"
#include "mlx/primitives.h"

namespace mlx_fused_optim {

namespace mx = mlx::core;
using fused_math::Schedule;

/// A float64 as csrc/math has it.
fused_math::Real real_of(double x);

// The makers of one segment. Arguments must have been checked: lengths are at
// least 1, factors and powers positive, everything finite.

/// The same value at every step.
Schedule constant(double value);
inline bool is_constant(const Schedule& schedule) {
  return schedule.count == 1 && schedule.segments[0].kind == fused_math::kConstant;
}

/// init * decay_rate ^ (transitions), transitions = (step - transition_begin) /
/// transition_steps, as in optax.exponential_decay.
Schedule exponential_decay(
    double init,
    double decay_rate,
    uint64_t transition_steps,
    uint64_t transition_begin,
    bool staircase,
    std::optional<double> end);

/// From `one` to `zero` in `steps`, after `begin` steps; then `zero`:
///   one * w + zero * (1 - w),  w = falling(progress) ^ power
/// where falling(x) is 1 - x, or (1 + cos(pi x)) / 2 with `cosine`. With `rising`
/// it is x or (1 - cos(pi x)) / 2 instead: the way is from `zero` to `one`.
Schedule blend(
    double one,
    double zero,
    uint64_t steps,
    uint64_t begin,
    bool cosine,
    bool rising,
    double power);

/// peak * (timescale / (timescale + step)) ^ power
Schedule inverse_power(double peak, uint64_t timescale, double power);

/// Half a cosine wave from `init` to `end` in each cycle; a cycle is `factor`
/// (1 to kMaxCycleFactor) times as long as the one before.
Schedule cosine_restarts(double init, double end, uint64_t first_cycle, uint64_t factor);

/// From `base` up to `peak` and down again. The height is multiplied by `decay`
/// (at most 1) after every cycle, or after every step.
Schedule triangular(
    double base,
    double peak,
    uint64_t up,
    uint64_t down,
    double decay,
    bool decay_per_cycle);

// Schedules of schedules.

/// schedules[i + 1] takes over at boundaries[i] (increasing) and counts from there.
/// Nothing if that needs more than kMaxSegments.
std::optional<Schedule> join(
    const std::vector<Schedule>& schedules,
    const std::vector<uint64_t>& boundaries);

/// `factor` (not negative) times the schedule. Throws std::invalid_argument where
/// that leaves the range of float32.
Schedule scaled(const Schedule& schedule, double factor);

/// The value at step 0, to 2^-48 of it: where a warm-up ends.
double first_value(const Schedule& schedule);

/// About how many steps show its shape: to the end and a little more, the first
/// cycles, or a fall to a few percent.
uint64_t natural_length(const Schedule& schedule);

/// The value at each of `steps` (any shape, uint64), as float32.
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
