// All rules behind one name. `rule` is known where a kernel is compiled, as `flags` are.
#pragma once

#include "rules/adadelta.h"
#include "rules/adam.h"
#include "rules/adamax.h"
#include "rules/lion.h"
#include "rules/rmsprop.h"
#include "rules/sgd.h"

namespace fused_math {

/// How many slots a rule has with these flags; they are the first ones.
MATH_FN constexpr int rule_slots(uint32_t rule, uint32_t flags) {
  return rule == kSgd                        ? (flags & kMomentum ? 1 : 0)
      : rule == kAdam                        ? (flags & kAmsgrad ? 3 : 2)
      : rule == kAdamax || rule == kAdadelta ? 2
                                             : 1;
}

/// Whether a rule's numbers depend on how many steps there were.
MATH_FN bool is_bias_corrected(uint32_t rule, uint32_t flags) {
  return rule == kAdam && (flags & kBiasCorrection);
}

template <typename T>
MATH_FN RuleStep<T> rule_step(
    uint32_t rule,
    T gradient,
    RuleSlots<T> slots,
    RuleNumbers n,
    uint32_t flags) {
  switch (rule) {
    case kAdam:
      return adam(gradient, slots, n, flags);
    case kAdamax:
      return adamax(gradient, slots, n);
    case kLion:
      return lion(gradient, slots, n);
    case kRmsprop:
      return rmsprop(gradient, slots, n);
    case kAdagrad:
      return adagrad(gradient, slots, n);
    case kAdadelta:
      return adadelta(gradient, slots, n);
    default:
      return sgd(gradient, slots, n, flags);
  }
}

} // namespace fused_math
