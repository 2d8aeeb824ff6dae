// The momentum of Muon (Jordan et al., 2024, https://kellerjordan.github.io/posts/muon/), as
// mlx.optimizers.Muon: a moving average. Of a matrix a step takes the direction alone
// (kDirection in frame.h), which is then orthogonalised; this is all of it for a vector.
#pragma once

#include "rule.h"

namespace fused_math {

struct Muon : PlainRule {
  enum Flag : uint32_t { kMomentum = 1, kNesterov = 2, kFlags = 3 };
  enum Slot : int { kMoment }; // with kMomentum
  enum Scalar : int { kMomentumFactor };

  MATH_MEMBER constexpr int slots(uint32_t flags) { return flags & kMomentum ? 1 : 0; }

  RULE_NAMES("muon", {"v"}, {"momentum"}, {{"momentum", kMomentum}, {"nesterov", kNesterov}})

  template <typename T, typename N>
  MATH_MEMBER RuleStep<T> step(T gradient, RuleSlots<T> slots, RuleNumbers<N> n, uint32_t flags) {
    if (flags & kMomentum) {
      const N momentum = n.scalar[kMomentumFactor], rest = n.rest[kMomentumFactor];
      const T v = moved(slots.of[kMoment], gradient, momentum, rest);
      gradient = flags & kNesterov ? moved(v, gradient, momentum, rest) : v;
      slots.of[kMoment] = v;
    }
    return {n.learning_rate * gradient, slots};
  }
};

} // namespace fused_math
