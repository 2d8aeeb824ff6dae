// Lion (Chen et al., 2023, https://arxiv.org/abs/2302.06675), as mlx.optimizers.Lion.
#pragma once

#include "rule.h"

namespace fused_math {

struct Lion : PlainRule {
  enum Slot : int { kMoment };
  enum Scalar : int { kBeta1, kBeta2 };

  MATH_MEMBER constexpr int slots(uint32_t) { return 1; }

  RULE_NAMES("lion", {"m"}, {"beta1", "beta2"}, {})

  template <typename T, typename N>
  MATH_MEMBER RuleStep<T> step(T gradient, RuleSlots<T> slots, RuleNumbers<N> n, uint32_t) {
    const T old = slots.of[kMoment];
    const T direction = moved(old, gradient, n.scalar[kBeta1], n.rest[kBeta1]);
    slots.of[kMoment] = moved(old, gradient, n.scalar[kBeta2], n.rest[kBeta2]);
    return {n.learning_rate * sign_of(direction), slots};
  }
};

} // namespace fused_math
