// AdaDelta (Zeiler, 2012, https://arxiv.org/abs/1212.5701), as mlx.optimizers.AdaDelta.
#pragma once

#include "rule.h"

namespace fused_math {

struct Adadelta : PlainRule {
  enum Slot : int { kGradientSquares, kChangeSquares };
  enum : uint32_t { kUnsigned = 1 << kGradientSquares | 1 << kChangeSquares };
  enum Scalar : int { kRho, kEps };

  MATH_MEMBER constexpr int slots(uint32_t) { return 2; }

  RULE_NAMES("adadelta", {"v", "u"}, {"rho", "eps"}, {})

  template <typename T, typename N>
  MATH_MEMBER RuleStep<T> step(T gradient, RuleSlots<T> slots, RuleNumbers<N> n, uint32_t) {
    const N rho = n.scalar[kRho], rest = n.rest[kRho], eps = n.scalar[kEps];
    const T old = slots.of[kChangeSquares];
    const T v = moved(slots.of[kGradientSquares], gradient * gradient, rho, rest);
    const T change = quotient(root(old + eps), root(v + eps)) * gradient;
    slots.of[kGradientSquares] = v;
    slots.of[kChangeSquares] = moved(old, change * change, rho, rest);
    return {n.learning_rate * change, slots};
  }
};

} // namespace fused_math
