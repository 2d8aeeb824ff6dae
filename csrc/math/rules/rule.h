// What every rule has in common: a rule is what an optimizer does between the gradient
// that the frame gives it and the change of the parameter that it gives back.
//
// A new rule is a header beside this one with one function of this form, a value in
// Rule, its lines in rules.h, csrc/graph/rules.cpp and csrc/cpu/kernel.cpp, its step in MLX
// operations in csrc/composed/rules.cpp, and what Python adds: _rules.py, and a class in
// optimizers/.
#pragma once

#include "../rounding.h"

namespace fused_math {

/// The rules. Kernels are specialised on it.
enum Rule : uint32_t {
  kSgd = 0,
  kAdam = 1,
  kAdamax = 2,
  kLion = 3,
  kRmsprop = 4,
  kAdagrad = 5,
  kAdadelta = 6,
  kRules = 7,
};

/// The flags that mean something to one rule only. They share their bits.
enum RuleFlags : uint32_t {
  kMomentum = 1 << 0, // SGD
  kNesterov = 1 << 1,
  kBiasCorrection = 1 << 0, // Adam
  kAmsgrad = 1 << 1,
  kRuleFlags = 3,
};

enum RuleSizes : int {
  kRuleSlots = 3, // arrays that a rule may keep
  kRuleScalars = 3, // numbers that it may have beside the learning rate
};

/// The numbers of a step that a rule sees.
struct RuleNumbers {
  float learning_rate;
  float scalar[kRuleScalars]; // as csrc/graph/rules.cpp names them
  float rest[kRuleScalars]; // 1 - scalar; of a constant formed in float64 and rounded once
  // With kBiasCorrection:
  float corrected_rate; // learning_rate / (1 - scalar[0]^t)
  float corrected_root; // 1 / sqrt(1 - scalar[1]^t)
};

/// What a rule keeps of an element, or of a vector of elements: T is float, or a type of
/// the compiler's with the arithmetic of one.
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

/// x * x of a moving average: old * factor + rest * x.
template <typename T>
MATH_FN T moved(T average, T x, float factor, float rest) {
  return factor * average + rest * x;
}

template <typename T>
MATH_FN T root(T x) {
  return Bits<T>::root(x);
}

template <typename T>
MATH_FN T quotient(T a, T b) {
  return Bits<T>::quotient(a, b);
}

/// The larger one; NaN if either is.
template <typename T>
MATH_FN T larger(T a, T b) {
  return ((a > b) | (a != a)) ? a : b;
}

} // namespace fused_math
