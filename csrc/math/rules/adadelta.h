// AdaDelta (Zeiler, 2012, https://arxiv.org/abs/1212.5701), as mlx.optimizers.AdaDelta.
#pragma once

#include "rule.h"

namespace fused_math {

enum AdadeltaNames : int {
  kGradientSquares = 0, // slots
  kChangeSquares = 1,
  kRho = 0, // scalars
  kAdadeltaEps = 1,
};

template <typename T>
MATH_FN RuleStep<T> adadelta(T gradient, RuleSlots<T> slots, RuleNumbers n) {
  const float rho = n.scalar[kRho], rest = n.rest[kRho], eps = n.scalar[kAdadeltaEps];
  const T old = slots.of[kChangeSquares];
  const T v = moved(slots.of[kGradientSquares], gradient * gradient, rho, rest);
  const T change = quotient(root(old + eps), root(v + eps)) * gradient;
  slots.of[kGradientSquares] = v;
  slots.of[kChangeSquares] = moved(old, change * change, rho, rest);
  return {n.learning_rate * change, slots};
}

} // namespace fused_math
