// Stochastic gradient descent with momentum, as mlx.optimizers.SGD.
#pragma once

#include "rule.h"

namespace fused_math {

struct Sgd : PlainRule {
  enum Flag : uint32_t { kMomentum = 1, kNesterov = 2, kFlags = 3 };
  enum Slot : int { kVelocity }; // with kMomentum
  enum Scalar : int { kMomentumFactor, kDampening };

  MATH_MEMBER constexpr int slots(uint32_t flags) { return flags & kMomentum ? 1 : 0; }

  RULE_NAMES(
      "sgd",
      {"momentum"},
      {"momentum", "dampening"},
      {{"momentum", kMomentum}, {"nesterov", kNesterov}})

  template <typename T, typename N>
  MATH_MEMBER RuleStep<T> step(T gradient, RuleSlots<T> slots, RuleNumbers<N> n, uint32_t flags) {
    if (flags & kMomentum) {
      const N momentum = n.scalar[kMomentumFactor];
      const T velocity = moved(slots.of[kVelocity], gradient, momentum, n.rest[kDampening]);
      gradient = flags & kNesterov ? gradient + momentum * velocity : velocity;
      slots.of[kVelocity] = velocity;
    }
    return {n.learning_rate * gradient, slots};
  }
};

} // namespace fused_math
