#include "composed/rules.h"

#include "composed/operators.h"

namespace mlx_fused_optim {

using namespace fused_math;

namespace {

class ComposedRule : ComposedOperators {
 public:
  ComposedRule(const ComposedNumbers& numbers, uint32_t flags, mx::Stream s)
      : ComposedOperators(s), n(numbers), flags(flags) {}

  ComposedRuleStep sgd(const mx::array& gradient, ComposedSlots slots) const {
    auto update = gradient;
    if (flags & kMomentum) {
      const auto& momentum = n.scalar[kMomentumFactor];
      const auto velocity = moved(*slots[kVelocity], gradient, momentum, n.rest[kDampening]);
      update = flags & kNesterov ? add(gradient, multiply(momentum, velocity)) : velocity;
      slots[kVelocity] = velocity;
    }
    return {multiply(n.learning_rate, update), slots};
  }

  ComposedRuleStep adam(const mx::array& gradient, ComposedSlots slots) const {
    const auto m = moved(slots, kFirstMoment, gradient, kBeta1);
    auto second = moved(slots, kSecondMoment, square(gradient), kBeta2);
    if (flags & kAmsgrad) {
      second = mx::maximum(*slots[kLargestMoment], second, s);
      slots[kLargestMoment] = second;
    }
    const bool corrected = flags & kBiasCorrection;
    const auto scale = corrected ? multiply(root(second), n.corrected_root) : root(second);
    const auto& rate = corrected ? n.corrected_rate : n.learning_rate;
    return {divide(multiply(rate, m), add(scale, n.scalar[kAdamEps])), slots};
  }

  ComposedRuleStep adamax(const mx::array& gradient, ComposedSlots slots) const {
    const auto m = moved(slots, kFirstMoment, gradient, kBeta1);
    const auto decayed = multiply(n.scalar[kBeta2], *slots[kSecondMoment]);
    const auto v = mx::maximum(decayed, mx::abs(gradient, s), s);
    slots[kSecondMoment] = v;
    return {divide(multiply(n.learning_rate, m), add(v, n.scalar[kAdamEps])), slots};
  }

  ComposedRuleStep lion(const mx::array& gradient, ComposedSlots slots) const {
    const auto old = *slots[kFirstMoment];
    const auto direction = moved(old, gradient, n.scalar[kBeta1], n.rest[kBeta1]);
    moved(slots, kFirstMoment, gradient, kBeta2);
    return {multiply(n.learning_rate, mx::sign(direction, s)), slots};
  }

  ComposedRuleStep rmsprop(const mx::array& gradient, ComposedSlots slots) const {
    const auto v = moved(slots, kSquares, square(gradient), kAlpha);
    return over_root(gradient, v, slots, n.scalar[kRmspropEps]);
  }

  ComposedRuleStep adagrad(const mx::array& gradient, ComposedSlots slots) const {
    const auto v = add(*slots[kSquares], square(gradient));
    slots[kSquares] = v;
    return over_root(gradient, v, slots, n.scalar[kAdagradEps]);
  }

  ComposedRuleStep adadelta(const mx::array& gradient, ComposedSlots slots) const {
    const auto& eps = n.scalar[kAdadeltaEps];
    const auto v = moved(slots, kGradientSquares, square(gradient), kRho);
    const auto above = root(add(*slots[kChangeSquares], eps));
    const auto change = multiply(divide(above, root(add(v, eps))), gradient);
    moved(slots, kChangeSquares, square(change), kRho);
    return {multiply(n.learning_rate, change), slots};
  }

 private:
  mx::array moved(
      const mx::array& average,
      const mx::array& x,
      const mx::array& factor,
      const mx::array& rest) const {
    return add(multiply(factor, average), multiply(rest, x));
  }
  /// In its slot, by the rule's scalar.
  mx::array moved(ComposedSlots& slots, int slot, const mx::array& x, int scalar) const {
    slots[slot] = moved(*slots[slot], x, n.scalar[scalar], n.rest[scalar]);
    return *slots[slot];
  }
  ComposedRuleStep over_root(
      const mx::array& gradient,
      const mx::array& squares,
      const ComposedSlots& slots,
      const mx::array& eps) const {
    return {divide(multiply(n.learning_rate, gradient), add(root(squares), eps)), slots};
  }
  mx::array square(const mx::array& x) const { return mx::square(x, s); }
  mx::array root(const mx::array& x) const { return mx::sqrt(x, s); }

  const ComposedNumbers& n;
  uint32_t flags;
};

} // namespace

ComposedRuleStep rule_composed(
    uint32_t rule,
    const mx::array& gradient,
    ComposedSlots slots,
    const ComposedNumbers& numbers,
    uint32_t flags,
    mx::Stream s) {
  const ComposedRule composed(numbers, flags, s);
  switch (rule) {
    case kAdam:
      return composed.adam(gradient, std::move(slots));
    case kAdamax:
      return composed.adamax(gradient, std::move(slots));
    case kLion:
      return composed.lion(gradient, std::move(slots));
    case kRmsprop:
      return composed.rmsprop(gradient, std::move(slots));
    case kAdagrad:
      return composed.adagrad(gradient, std::move(slots));
    case kAdadelta:
      return composed.adadelta(gradient, std::move(slots));
    default:
      return composed.sgd(gradient, std::move(slots));
  }
}

ComposedNumbers bias_corrected_composed(
    ComposedNumbers n,
    const mx::array& low0,
    const mx::array& low1,
    const mx::array& t) {
  // In float64, which MLX has on the CPU. It is as exact as csrc/math, not bit for bit.
  const auto s = mx::default_stream(mx::Device::cpu);
  auto exact = [&](const mx::array& x) { return mx::astype(x, mx::float64, s); };
  auto bias = [&](const mx::array& factor, const mx::array& low) {
    const auto power = mx::power(mx::add(exact(factor), exact(low), s), exact(t), s);
    return mx::subtract(mx::array(1.0, mx::float64), power, s);
  };
  const auto rate = mx::divide(exact(n.learning_rate), bias(n.scalar[0], low0), s);
  n.corrected_rate = mx::astype(rate, mx::float32, s);
  n.corrected_root = mx::astype(mx::rsqrt(bias(n.scalar[1], low1), s), mx::float32, s);
  return n;
}

} // namespace mlx_fused_optim
