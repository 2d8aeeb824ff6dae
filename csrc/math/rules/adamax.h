// Adamax (Kingma and Ba, 2015, https://arxiv.org/abs/1412.6980, section 7.1), without bias
// correction, as mlx.optimizers.Adamax.
#pragma once

#include "rule.h"

namespace fused_math {

struct Adamax : PlainRule {
  enum Slot : int { kFirstMoment, kInfinityNorm };
  enum : uint32_t { kUnsigned = 1 << kInfinityNorm };
  enum Scalar : int { kBeta1, kBeta2, kEps };

  MATH_MEMBER constexpr int slots(uint32_t) { return 2; }

  RULE_NAMES("adamax", {"m", "v"}, {"beta1", "beta2", "eps"}, {})

  template <typename T, typename N>
  MATH_MEMBER RuleStep<T> step(T gradient, RuleSlots<T> slots, RuleNumbers<N> n, uint32_t) {
    const T m = moved(slots.of[kFirstMoment], gradient, n.scalar[kBeta1], n.rest[kBeta1]);
    const T v = larger(n.scalar[kBeta2] * slots.of[kInfinityNorm], magnitude_of(gradient));
    slots.of[kFirstMoment] = m;
    slots.of[kInfinityNorm] = v;
    return {quotient(n.learning_rate * m, v + n.scalar[kEps]), slots};
  }
};

} // namespace fused_math
