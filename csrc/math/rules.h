// All rules behind one name. `rule` is known where a kernel is compiled, as `flags` are.
#pragma once

#include "rules/adadelta.h"
#include "rules/adam.h"
#include "rules/adamax.h"
#include "rules/lion.h"
#include "rules/muon.h"
#include "rules/rmsprop.h"
#include "rules/sgd.h"

namespace fused_math {

/// Rules by number, which is their place.
template <typename... None>
struct RuleList { // none is left: no such rule
  enum : uint32_t { kCount = 0 };
  MATH_MEMBER constexpr uint32_t flags(uint32_t) { return 0; }
  MATH_MEMBER constexpr int slots(uint32_t, uint32_t) { return 0; }
  MATH_MEMBER constexpr bool is_bias_corrected(uint32_t, uint32_t) { return false; }
  MATH_MEMBER constexpr bool is_unsigned(uint32_t, int) { return false; }
  template <typename T, typename N>
  MATH_MEMBER RuleStep<T> step(uint32_t, T, RuleSlots<T> slots, RuleNumbers<N>, uint32_t) {
    return {T(), slots};
  }
};

template <typename First, typename... Others>
struct RuleList<First, Others...> {
  using Rest = RuleList<Others...>;
  enum : uint32_t { kCount = 1 + Rest::kCount };

  /// The place of a rule of the list.
  MATH_MEMBER constexpr uint32_t place(First) { return 0; }
  template <typename Rule>
  MATH_MEMBER constexpr uint32_t place(Rule rule) {
    return 1 + Rest::place(rule);
  }
  /// All flags of a rule.
  MATH_MEMBER constexpr uint32_t flags(uint32_t rule) {
    return rule == 0 ? uint32_t(First::kFlags) : Rest::flags(rule - 1);
  }
  /// How many slots it has with these flags; they are the first ones.
  MATH_MEMBER constexpr int slots(uint32_t rule, uint32_t flags) {
    return rule == 0 ? First::slots(flags) : Rest::slots(rule - 1, flags);
  }
  /// Whether its numbers depend on how many steps there were.
  MATH_MEMBER constexpr bool is_bias_corrected(uint32_t rule, uint32_t flags) {
    return rule == 0 ? (flags & First::kCorrection) != 0 : Rest::is_bias_corrected(rule - 1, flags);
  }
  /// Whether the numbers of a slot have no sign.
  MATH_MEMBER constexpr bool is_unsigned(uint32_t rule, int slot) {
    return rule == 0 ? (uint32_t(First::kUnsigned) >> slot & 1) != 0
                     : Rest::is_unsigned(rule - 1, slot);
  }
  template <typename T, typename N>
  MATH_MEMBER RuleStep<T> step(
      uint32_t rule,
      T gradient,
      RuleSlots<T> slots,
      RuleNumbers<N> n,
      uint32_t flags) {
    return rule == 0 ? First::step(gradient, slots, n, flags)
                     : Rest::step(rule - 1, gradient, slots, n, flags);
  }
};

using Rules = RuleList<Sgd, Adam, Adamax, Lion, Rmsprop, Adagrad, Adadelta, Muon>;

/// Without flags of its own, its change is the gradient.
enum : uint32_t { kSgd = Rules::place(Sgd()) };

} // namespace fused_math
