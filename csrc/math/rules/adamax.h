// Adamax (Kingma and Ba, 2015, https://arxiv.org/abs/1412.6980, section 7.1), without bias
// correction, as mlx.optimizers.Adamax. Slots and scalars are Adam's.
#pragma once

#include "adam.h"

namespace fused_math {

template <typename T>
MATH_FN RuleStep<T> adamax(T gradient, RuleSlots<T> slots, RuleNumbers n) {
  const T m = moved(slots.of[kFirstMoment], gradient, n.scalar[kBeta1], n.rest[kBeta1]);
  const T v = larger(n.scalar[kBeta2] * slots.of[kSecondMoment], magnitude_of(gradient));
  slots.of[kFirstMoment] = m;
  slots.of[kSecondMoment] = v;
  return {quotient(n.learning_rate * m, v + n.scalar[kAdamEps]), slots};
}

} // namespace fused_math
