#include "graph/schedule.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#include "graph/errors.h"

#include "composed/switch.h"

namespace mlx_fused_optim {

using namespace fused_math;

Real real_of(double x) {
  const auto hi = static_cast<float>(x);
  return {hi, static_cast<float>(x - hi)};
}

namespace {

double to_double(Real x) { return static_cast<double>(x.hi) + x.lo; }

Schedule one_segment(ScheduleKind kind, double one, double zero) {
  Schedule schedule{};
  schedule.count = 1;
  auto& segment = schedule.segments[0];
  segment.kind = kind;
  segment.one = real_of(one);
  segment.zero = real_of(zero);
  return schedule;
}

} // namespace

Schedule constant(double value) { return one_segment(kConstant, value, 0); }

Schedule exponential_decay(
    double init,
    double decay_rate,
    uint64_t transition_steps,
    uint64_t transition_begin,
    bool staircase,
    std::optional<double> end) {
  auto schedule = one_segment(kExponential, init, end.value_or(0));
  auto& segment = schedule.segments[0];
  segment.begin = transition_begin;
  segment.steps = transition_steps;
  // The logarithm is taken in float64: rounding the rate itself to float32
  // would be 12 % off after 1e7 steps of 0.999999.
  const double log2_rate = std::log2(decay_rate);
  segment.rate = real_of(staircase ? log2_rate : log2_rate / static_cast<double>(transition_steps));
  segment.flags = staircase * kStaircase;
  if (end) {
    segment.flags |= decay_rate < 1 ? kFloor : kCeiling;
  }
  return schedule;
}

Schedule blend(
    double one,
    double zero,
    uint64_t steps,
    uint64_t begin,
    bool cosine,
    bool rising,
    double power) {
  auto schedule = one_segment(kBlend, one, zero);
  auto& segment = schedule.segments[0];
  segment.begin = begin;
  segment.steps = steps;
  segment.rate = real_of(power);
  segment.flags = cosine * kCosine | rising * kRising | (power != 1) * kPower;
  return schedule;
}

Schedule inverse_power(double peak, uint64_t timescale, double power) {
  auto schedule = one_segment(kInversePower, peak, 0);
  schedule.segments[0].steps = timescale;
  schedule.segments[0].rate = real_of(power);
  return schedule;
}

Schedule cosine_restarts(double init, double end, uint64_t first_cycle, uint64_t factor) {
  auto schedule = one_segment(kRestarts, init, end);
  schedule.segments[0].steps = first_cycle;
  schedule.segments[0].second = factor;
  return schedule;
}

Schedule triangular(
    double base,
    double peak,
    uint64_t up,
    uint64_t down,
    double decay,
    bool decay_per_cycle) {
  auto schedule = one_segment(kTriangle, peak, base);
  auto& segment = schedule.segments[0];
  segment.steps = up;
  segment.second = down;
  segment.rate = real_of(std::log2(decay));
  segment.flags = (decay != 1) * kDamped | decay_per_cycle * kStaircase;
  return schedule;
}

std::optional<Schedule> join(
    const std::vector<Schedule>& schedules,
    const std::vector<uint64_t>& boundaries) {
  Schedule joined{};
  for (size_t i = 0; i < schedules.size(); ++i) {
    const uint64_t begin = i == 0 ? 0 : boundaries[i - 1];
    const uint64_t end = i < boundaries.size() ? boundaries[i] : ~uint64_t(0);
    for (uint32_t k = 0; k < schedules[i].count; ++k) {
      auto segment = schedules[i].segments[k];
      if (segment.start >= end - begin) {
        break; // the next schedule takes over before it is ever seen
      }
      if (joined.count == kMaxSegments) {
        return {};
      }
      segment.start += begin;
      joined.segments[joined.count++] = segment;
    }
  }
  return joined;
}

Schedule scaled(const Schedule& schedule, double factor) {
  auto times_factor = [factor](Real x) {
    const double value = factor * to_double(x);
    if (std::abs(value) > std::numeric_limits<float>::max()) {
      refuse(
          "scaled", "a value is too large for float32: got ", value, ", allowed a smaller factor.");
    }
    return real_of(value);
  };
  Schedule result = schedule;
  for (auto& segment : result.segments) {
    segment.one = times_factor(segment.one);
    segment.zero = times_factor(segment.zero);
  }
  return result;
}

double first_value(const Schedule& schedule) {
  auto& segment = schedule.segments[0];
  const auto scaled = segment_value(segment, 0);
  const double value = std::ldexp(to_double(scaled.value), scaled.exponent);
  const double bound = to_double(segment.zero);
  return segment.flags & kFloor  ? std::max(value, bound)
      : segment.flags & kCeiling ? std::min(value, bound)
                                 : value;
}

uint64_t natural_length(const Schedule& schedule) {
  auto& segment = schedule.segments[schedule.count - 1];
  const auto steps = static_cast<double>(segment.steps);
  const auto second = static_cast<double>(segment.second);
  double length = 0;
  switch (segment.kind) {
    case kExponential:
      // Five halvings, or doublings.
      length = 5 / std::max(std::abs(to_double(segment.rate)), 1e-15) *
          (segment.flags & kStaircase ? steps : 1);
      break;
    case kBlend:
      length = 1.1 * steps;
      break;
    case kInversePower:
      length = 15 * steps; // a quarter of the peak
      break;
    case kRestarts:
      length = steps * (1 + second + second * second);
      break;
    case kTriangle:
      length = 4 * (steps + second);
      break;
    default:
      length = std::max(0.25 * static_cast<double>(segment.start), 10.0);
  }
  length += static_cast<double>(segment.start) + static_cast<double>(segment.begin) + 1;
  return static_cast<uint64_t>(std::min(length, 1e18));
}

mx::array evaluate_schedule(
    const Schedule& schedule,
    const mx::array& steps,
    mx::StreamOrDevice s) {
  auto stream = mx::to_stream(composed_is_asked_for() ? mx::StreamOrDevice(mx::Device::cpu) : s);
  auto counted = mx::astype(steps, mx::uint64, stream);
  if (counted.ndim() > 0) { // a scalar is contiguous
    counted = mx::contiguous(counted, false, stream);
  }
  return mx::array(
      steps.shape(), mx::float32, std::make_shared<EvaluateSchedule>(stream, schedule), {counted});
}

std::vector<mx::array> EvaluateSchedule::jvp(
    const std::vector<mx::array>& primals,
    const std::vector<mx::array>&,
    const std::vector<int>&) {
  return {mx::zeros(primals[0].shape(), mx::float32, stream())};
}

std::vector<mx::array> EvaluateSchedule::vjp(
    const std::vector<mx::array>& primals,
    const std::vector<mx::array>&,
    const std::vector<int>&,
    const std::vector<mx::array>&) {
  return {mx::zeros_like(primals[0], stream())};
}

std::pair<std::vector<mx::array>, std::vector<int>> EvaluateSchedule::vmap(
    const std::vector<mx::array>& inputs,
    const std::vector<int>& axes) {
  return {{evaluate_schedule(schedule_, inputs[0], stream())}, axes};
}

bool EvaluateSchedule::is_equivalent(const mx::Primitive& other) const {
  auto& that = static_cast<const EvaluateSchedule&>(other);
  return std::memcmp(&schedule_, &that.schedule_, sizeof(Schedule)) == 0;
}

} // namespace mlx_fused_optim
