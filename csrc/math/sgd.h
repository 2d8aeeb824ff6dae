// One element of one SGD step, in the operations and the order of
// mlx.optimizers.SGD, so that float32 has its bits on every backend; and the
// numbers that all elements of a step share.
#pragma once

#include "schedule.h"

namespace fused_math {

/// What a step consists of. Fixed for a compiled graph: kernels may be
/// specialised on it.
enum SgdFlags : uint32_t {
  kMomentum = 1,
  kNesterov = 2,
  kWeightDecay = 4,
};

/// The numbers of one step.
struct SgdHyper {
  float learning_rate;
  float momentum;
  float weight_decay;
  float gradient_weight; // 1 - dampening, formed in float64 and rounded once
};

/// The numbers that may change from step to step, and their positions in the
/// arrays of given and of used values.
enum SgdScalar : int {
  kLearningRate = 0,
  kMomentumFactor = 1,
  kWeightDecayFactor = 2,
  kScalars = 3,
};

/// Where the numbers of a step come from. Each of the three is either given as
/// an array (its bit in `given` is set), or a schedule of the step counter.
struct SgdControl {
  Schedule schedules[kScalars];
  float gradient_weight;
  uint32_t flags; // SgdFlags
  uint32_t given; // bit i: scalar i is read from the array of given values
  uint32_t reserved;
};
static_assert(sizeof(SgdControl) <= 4096, "Metal takes at most 4 KiB by value");

/// `given` is the array of given values, one for each SgdScalar up to the last
/// that is given.
template <typename Given>
MATH_FN SgdHyper sgd_hyper(MATH_CONSTANT SgdControl& control, uint64_t step, Given given) {
  float values[kScalars];
  for (int i = 0; i < kScalars; ++i) {
    values[i] = control.given >> i & 1 ? given[i] : schedule_value(control.schedules[i], step);
  }
  return {
      values[kLearningRate],
      values[kMomentumFactor],
      values[kWeightDecayFactor],
      control.gradient_weight};
}

/// An element, or a vector of elements: T is float, or a type of the compiler's
/// with the arithmetic of one (a vector extension of g++ and clang, Metal's float4).
template <typename T>
struct SgdElements {
  T parameter;
  T velocity;
};
using SgdElement = SgdElements<float>;

/// Values in and out, so that no address space, vector width or launch shape
/// shows. Terms that the step does not have are left out, not multiplied by
/// zero: that keeps the sign of -0.0 and the bits of mlx.optimizers.
template <typename T>
MATH_FN SgdElements<T> sgd_element(SgdElements<T> e, T gradient, SgdHyper hyper, uint32_t flags) {
  if (flags & kWeightDecay) {
    gradient = gradient + hyper.weight_decay * e.parameter;
  }
  if (flags & kMomentum) {
    e.velocity = hyper.momentum * e.velocity + hyper.gradient_weight * gradient;
    if (flags & kNesterov) {
      gradient = gradient + hyper.momentum * e.velocity;
    } else {
      gradient = e.velocity;
    }
  }
  e.parameter = e.parameter - hyper.learning_rate * gradient;
  return e;
}

} // namespace fused_math
