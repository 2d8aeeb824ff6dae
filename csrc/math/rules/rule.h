// What every rule has in common: a rule is what an optimizer does between the gradient
// that the frame gives it and the change of the parameter that it gives back.
//
// A rule is a struct in a header beside this one, and its row in rules.h. All else is derived
// from it: the kernels, the step in MLX's operations, and the table that Python reads.
#pragma once

#include "../rounding.h"

namespace fused_math {

enum RuleSizes : int {
  kRuleSlots = 3, // arrays that a rule may keep
  kRuleScalars = 3, // numbers that it may have beside the learning rate
};

/// The bits of a step's flags that are its rule's own, and mean something else to each.
enum RuleFlags : uint32_t { kRuleFlags = 3 };

/// The numbers of a step that a rule sees; N is float, or an array where the step is
/// composed of MLX's operations.
template <typename N>
struct RuleNumbers {
  N learning_rate;
  N scalar[kRuleScalars]; // as the rule numbers them
  N rest[kRuleScalars]; // 1 - scalar; of a constant formed in float64 and rounded once
  // Of a rule whose bias is corrected:
  N corrected_rate; // learning_rate / (1 - scalar[0]^t)
  N corrected_root; // 1 / sqrt(1 - scalar[1]^t)
};

/// What a rule keeps of an element, or of a vector of elements: T is float, a type of the
/// compiler's with the arithmetic of one, or an array.
template <typename T>
struct RuleSlots {
  T of[kRuleSlots];
};

/// What comes out: the parameter loses `change`, in which the learning rate is.
template <typename T>
struct RuleStep {
  T change;
  RuleSlots<T> slots;
};

/// What a rule is that does not say otherwise. Each also has
///   slots(flags)      how many slots it has with these flags; they are the first ones
///   RULE_NAMES(...)   what a user calls it, its slots, its scalars and its flags
///   step(...)         what it does, in the functions below: T may be a vector, so nothing branches
struct PlainRule {
  enum : uint32_t {
    kFlags = 0, // all of its flags
    kCorrection = 0, // the one with which the bias is corrected
    kUnsigned = 0, // a bit each slot: its numbers have no sign, and their root is what counts
  };
};

// Where there are no strings, as on a GPU, nobody asks for names.
#if defined(__METAL_VERSION__) || defined(__CUDACC__)
#define RULE_NAMES(...)
#else
#define RULE_NAMES(...)     \
  template <typename Names> \
  static Names names() {    \
    return {__VA_ARGS__};   \
  }
#endif

/// x * x of a moving average: old * factor + rest * x.
template <typename T, typename N>
MATH_FN T moved(T average, T x, N factor, N rest) {
  return factor * average + rest * x;
}

/// The larger one; NaN if either is.
template <typename T>
MATH_FN T larger(T a, T b) {
  return choose((a > b) | (a != a), a, b);
}

/// -1, 0 or 1; 0 of NaN.
template <typename T>
MATH_FN T sign_of(T x) {
  const T zero = T(), one = zero + 1.0f;
  return choose(x > zero, one, choose(x < zero, -one, zero));
}

} // namespace fused_math
