// Lion (Chen et al., 2023, https://arxiv.org/abs/2302.06675), as mlx.optimizers.Lion. Slot
// and scalars have the names of Adam's.
#pragma once

#include "adam.h"

namespace fused_math {

template <typename T>
MATH_FN RuleStep<T> lion(T gradient, RuleSlots<T> slots, RuleNumbers n) {
  const T old = slots.of[kFirstMoment];
  const T direction = moved(old, gradient, n.scalar[kBeta1], n.rest[kBeta1]);
  slots.of[kFirstMoment] = moved(old, gradient, n.scalar[kBeta2], n.rest[kBeta2]);
  const T zero = T(), one = zero + 1.0f;
  const T below = direction < zero ? -one : zero;
  return {n.learning_rate * (direction > zero ? one : below), slots};
}

} // namespace fused_math
