// RMSprop (Tieleman and Hinton, 2012) and Adagrad (Duchi, Hazan and Singer, 2011,
// https://jmlr.org/papers/v12/duchi11a.html), as mlx.optimizers has them: the gradient over
// the root of a moving average, or of a sum, of its squares.
#pragma once

#include "rule.h"

namespace fused_math {

struct OverRoot : PlainRule {
  enum Slot : int { kSquares };
  enum : uint32_t { kUnsigned = 1 << kSquares };

  MATH_MEMBER constexpr int slots(uint32_t) { return 1; }

  template <typename T, typename N>
  MATH_MEMBER RuleStep<T> over_root(T gradient, T squares, RuleSlots<T> slots, N rate, N eps) {
    slots.of[kSquares] = squares;
    return {quotient(rate * gradient, root(squares) + eps), slots};
  }
};

struct Rmsprop : OverRoot {
  enum Scalar : int { kAlpha, kEps };

  RULE_NAMES("rmsprop", {"v"}, {"alpha", "eps"}, {})

  template <typename T, typename N>
  MATH_MEMBER RuleStep<T> step(T gradient, RuleSlots<T> slots, RuleNumbers<N> n, uint32_t) {
    const T v = moved(slots.of[kSquares], gradient * gradient, n.scalar[kAlpha], n.rest[kAlpha]);
    return over_root(gradient, v, slots, n.learning_rate, n.scalar[kEps]);
  }
};

struct Adagrad : OverRoot {
  enum Scalar : int { kEps };

  RULE_NAMES("adagrad", {"v"}, {"eps"}, {})

  template <typename T, typename N>
  MATH_MEMBER RuleStep<T> step(T gradient, RuleSlots<T> slots, RuleNumbers<N> n, uint32_t) {
    const T v = slots.of[kSquares] + gradient * gradient;
    return over_root(gradient, v, slots, n.learning_rate, n.scalar[kEps]);
  }
};

} // namespace fused_math
