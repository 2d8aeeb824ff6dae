// RMSprop (Tieleman and Hinton, 2012) and Adagrad (Duchi, Hazan and Singer, 2011,
// https://jmlr.org/papers/v12/duchi11a.html), as mlx.optimizers has them: the gradient over
// the root of a moving average, or of a sum, of its squares.
#pragma once

#include "rule.h"

namespace fused_math {

enum RmspropNames : int {
  kSquares = 0, // slot
  kAlpha = 0, // scalars
  kRmspropEps = 1,
  kAdagradEps = 0,
};

template <typename T>
MATH_FN RuleStep<T> over_root(T gradient, T squares, RuleSlots<T> slots, float rate, float eps) {
  slots.of[kSquares] = squares;
  return {quotient(rate * gradient, root(squares) + eps), slots};
}

template <typename T>
MATH_FN RuleStep<T> rmsprop(T gradient, RuleSlots<T> slots, RuleNumbers n) {
  const T v = moved(slots.of[kSquares], gradient * gradient, n.scalar[kAlpha], n.rest[kAlpha]);
  return over_root(gradient, v, slots, n.learning_rate, n.scalar[kRmspropEps]);
}

template <typename T>
MATH_FN RuleStep<T> adagrad(T gradient, RuleSlots<T> slots, RuleNumbers n) {
  const T v = slots.of[kSquares] + gradient * gradient;
  return over_root(gradient, v, slots, n.learning_rate, n.scalar[kAdagradEps]);
}

} // namespace fused_math
