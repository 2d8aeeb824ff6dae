// Adam (Kingma and Ba, 2015, https://arxiv.org/abs/1412.6980), as mlx.optimizers.Adam;
// with AMSGrad (Reddi, Kale and Kumar, 2018, https://arxiv.org/abs/1904.09237).
#pragma once

#include "rule.h"

namespace fused_math {

struct Adam : PlainRule {
  enum Flag : uint32_t { kBiasCorrection = 1, kAmsgrad = 2, kFlags = 3, kCorrection = 1 };
  enum Slot : int { kFirstMoment, kSecondMoment, kLargestMoment }; // the last with kAmsgrad
  enum : uint32_t { kUnsigned = 1 << kSecondMoment | 1 << kLargestMoment };
  enum Scalar : int { kBeta1, kBeta2, kEps };

  MATH_MEMBER constexpr int slots(uint32_t flags) { return flags & kAmsgrad ? 3 : 2; }

  RULE_NAMES(
      "adam",
      {"m", "v", "largest_v"},
      {"beta1", "beta2", "eps"},
      {{"bias_correction", kBiasCorrection}, {"amsgrad", kAmsgrad}})

  template <typename T, typename N>
  MATH_MEMBER RuleStep<T> step(T gradient, RuleSlots<T> slots, RuleNumbers<N> n, uint32_t flags) {
    const T m = moved(slots.of[kFirstMoment], gradient, n.scalar[kBeta1], n.rest[kBeta1]);
    const T v =
        moved(slots.of[kSecondMoment], gradient * gradient, n.scalar[kBeta2], n.rest[kBeta2]);
    slots.of[kFirstMoment] = m;
    slots.of[kSecondMoment] = v;
    T second = v;
    if (flags & kAmsgrad) {
      second = larger(slots.of[kLargestMoment], v);
      slots.of[kLargestMoment] = second;
    }
    const bool corrected = flags & kBiasCorrection;
    const T scale = corrected ? root(second) * n.corrected_root : root(second);
    const N rate = corrected ? n.corrected_rate : n.learning_rate;
    return {quotient(rate * m, scale + n.scalar[kEps]), slots};
  }
};

} // namespace fused_math
