// Adam (Kingma and Ba, 2015, https://arxiv.org/abs/1412.6980), as mlx.optimizers.Adam;
// with AMSGrad (Reddi, Kale and Kumar, 2018, https://arxiv.org/abs/1904.09237).
#pragma once

#include "rule.h"

namespace fused_math {

enum AdamNames : int {
  kFirstMoment = 0, // slots
  kSecondMoment = 1,
  kLargestMoment = 2, // with kAmsgrad
  kBeta1 = 0, // scalars
  kBeta2 = 1,
  kAdamEps = 2,
};

template <typename T>
MATH_FN RuleStep<T> adam(T gradient, RuleSlots<T> slots, RuleNumbers n, uint32_t flags) {
  const T m = moved(slots.of[kFirstMoment], gradient, n.scalar[kBeta1], n.rest[kBeta1]);
  const T v = moved(slots.of[kSecondMoment], gradient * gradient, n.scalar[kBeta2], n.rest[kBeta2]);
  slots.of[kFirstMoment] = m;
  slots.of[kSecondMoment] = v;
  T second = v;
  if (flags & kAmsgrad) {
    second = larger(slots.of[kLargestMoment], v);
    slots.of[kLargestMoment] = second;
  }
  const bool corrected = flags & kBiasCorrection;
  const T scale = corrected ? root(second) * n.corrected_root : root(second);
  const float rate = corrected ? n.corrected_rate : n.learning_rate;
  return {quotient(rate * m, scale + n.scalar[kAdamEps]), slots};
}

} // namespace fused_math
