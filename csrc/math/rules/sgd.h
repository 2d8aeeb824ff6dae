// Stochastic gradient descent with momentum, as mlx.optimizers.SGD.
#pragma once

#include "rule.h"

namespace fused_math {

enum SgdNames : int {
  kVelocity = 0, // slot, with kMomentum
  kMomentumFactor = 0, // scalar
  kDampening = 1, // scalar
};

template <typename T>
MATH_FN RuleStep<T> sgd(T gradient, RuleSlots<T> slots, RuleNumbers n, uint32_t flags) {
  if (flags & kMomentum) {
    const float momentum = n.scalar[kMomentumFactor];
    const T velocity = moved(slots.of[kVelocity], gradient, momentum, n.rest[kDampening]);
    gradient = flags & kNesterov ? gradient + momentum * velocity : velocity;
    slots.of[kVelocity] = velocity;
  }
  return {n.learning_rate * gradient, slots};
}

} // namespace fused_math
