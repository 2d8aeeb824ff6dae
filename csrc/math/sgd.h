// One element of one SGD step, in the operations and the order of
// mlx.optimizers.SGD, so that float32 has its bits on every backend; and the
// numbers that all elements of a step share.
//
// There are two elements. The plain one is all that mlx.optimizers.SGD does. The full
// one adds what training needs around it: scaled, clipped and skipped gradients,
// masters, compensation, rounding at random, averages. Kernels of the plain one stay
// small and fast.
#pragma once

#include "norm.h"
#include "rounding.h"
#include "schedule.h"

namespace fused_math {

/// What a step consists of. Fixed for a compiled graph: kernels may be
/// specialised on it.
enum SgdFlags : uint32_t {
  kMomentum = 1 << 0,
  kNesterov = 1 << 1,
  kWeightDecay = 1 << 2,
  // From here on only the full element.
  kMaximize = 1 << 3,
  kGradScale = 1 << 4,
  kClipValue = 1 << 5,
  kClipNorm = 1 << 6,
  kSkipNonfinite = 1 << 7,
  kTrustRatio = 1 << 8,
  kGroups = 1 << 9,
  kDecoupled = 1 << 10,
  kMaster = 1 << 11,
  kCompensated = 1 << 12,
  kStochastic = 1 << 13,
  kAverage = 1 << 14,
  kMeasureNorm = 1 << 15, // only told

  kPlainFlags = kMomentum | kNesterov | kWeightDecay,
  /// Steps that first measure all gradients.
  kMeasuredFlags = kClipNorm | kMeasureNorm | kSkipNonfinite | kTrustRatio,
  /// What a group of tensors may be without.
  kTensorFlags = kMomentum | kNesterov | kWeightDecay | kTrustRatio,
};

/// The numbers of one step, for one tensor.
struct SgdHyper {
  float learning_rate;
  float momentum;
  float weight_decay;
  float gradient_weight; // 1 - dampening, formed in float64 and rounded once
  // Of the full element:
  float unscale; // 1 / grad_scale
  float clip_value;
  float clip_factor; // of the global norm
  float trust_ratio;
  float average_weight; // 1 - ema_decay, formed in float64 and rounded once
  uint32_t apply; // 0: this step is skipped
  RandomKey key;
};

/// What the state keeps of every element, each in arenas of its own that are laid
/// out like the parameters'.
enum SgdSlot : int {
  kVelocity = 0, // with kMomentum; any of the three dtypes
  kMasterCopy = 1, // with kMaster; float32, of half types only
  kCompensation = 2, // with kCompensated; the parameter's dtype, of half types only
  kMovingAverage = 3, // with kAverage; float32
  kSlots = 4,
};

/// The numbers that may change from step to step, and their positions in the
/// arrays of given and of used values.
enum SgdScalar : int {
  kLearningRate = 0,
  kMomentumFactor = 1,
  kWeightDecayFactor = 2,
  kGradScaleFactor = 3,
  kScalars = 4,
};

/// Where the numbers of a step come from. Each scalar is either given as
/// an array (its bit in `given` is set), or a schedule of the step counter.
struct SgdControl {
  Schedule schedules[kScalars];
  uint64_t seed; // of rounding at random
  uint64_t place; // likewise: the arena
  float gradient_weight;
  float clip_value;
  float clip_norm;
  float trust_coefficient;
  float average_weight;
  uint32_t flags; // SgdFlags
  uint32_t given; // bit i: scalar i is read from the array of given values
  uint32_t parameter_format; // Format
  uint32_t velocity_format; // Format
  uint32_t reserved;
};
static_assert(sizeof(SgdControl) <= 4096, "Metal takes at most 4 KiB by value");

/// What was measured of a step's gradients before it, as an array of float32: the
/// global norm of the unscaled (and by value clipped) gradients; 1 where the step is
/// to be done, else 0; and with kTrustRatio the norms of every tensor's gradient and
/// parameter, in the order of the layout.
enum SgdMeasured : uint32_t {
  kMeasuredNorm = 0,
  kMeasuredApply = 1,
  kMeasuredTensors = 2,
};

/// Whether the step is to be done: `total` is of all gradients, `norm` its norm. Its peak
/// is of the unscaled gradients, before clipping by value hides an infinity.
MATH_FN bool sgd_applies(uint32_t flags, Squares total, float norm) {
  return !(flags & kSkipNonfinite) ||
      (is_finite_peak(total.peak) && (!(flags & kClipNorm) || is_finite_peak(peak_of(0, norm))));
}

/// The numbers of a group of tensors, a row of float32: each scalar of the step times
/// its factor plus its own number.
enum SgdGroup : uint32_t {
  kLearningRateTimes = 0,
  kLearningRatePlus = 1,
  kMomentumTimes = 2,
  kMomentumPlus = 3,
  kWeightDecayTimes = 4,
  kWeightDecayPlus = 5,
  kTrustCoefficient = 6,
  kGroupNumbers = 7,
};

/// `given` is the array of given values, one for each SgdScalar up to the last
/// that is given.
template <typename Given>
MATH_FN float sgd_scalar(MATH_CONSTANT SgdControl& control, int i, uint64_t step, Given given) {
  return control.given >> i & 1 ? given[i] : schedule_value(control.schedules[i], step);
}

/// The scalars of one step. A struct, because Metal passes no array of a thread.
struct SgdScalars {
  float of[kScalars];
};

/// The numbers of a plain step, of its scalars.
MATH_FN SgdHyper sgd_hyper_of(MATH_CONSTANT SgdControl& control, SgdScalars scalars) {
  SgdHyper hyper = {};
  hyper.learning_rate = scalars.of[kLearningRate];
  hyper.momentum = scalars.of[kMomentumFactor];
  hyper.weight_decay = scalars.of[kWeightDecayFactor];
  hyper.gradient_weight = control.gradient_weight;
  hyper.apply = 1;
  return hyper;
}

/// The numbers of a plain step.
template <typename Given>
MATH_FN SgdHyper sgd_hyper(MATH_CONSTANT SgdControl& control, uint64_t step, Given given) {
  // In a loop: one copy of a schedule's code, where three cost the CUDA kernels registers.
  SgdScalars scalars = {};
  for (int i = 0; i <= kWeightDecayFactor; ++i) {
    scalars.of[i] = sgd_scalar(control, i, step, given);
  }
  return sgd_hyper_of(control, scalars);
}

/// The next counter, and the scalars that were used: by one thread, once a step.
template <typename Given, typename StepOut, typename UsedOut>
MATH_FN void sgd_counters(
    MATH_CONSTANT SgdControl& control,
    SgdHyper hyper,
    uint64_t step,
    Given given,
    StepOut step_out,
    UsedOut used_out) {
  step_out[0] = step + hyper.apply;
  used_out[kLearningRate] = hyper.learning_rate;
  used_out[kMomentumFactor] = hyper.momentum;
  used_out[kWeightDecayFactor] = hyper.weight_decay;
  used_out[kGradScaleFactor] =
      control.flags & kGradScale ? sgd_scalar(control, kGradScaleFactor, step, given) : 1.0f;
}

/// What gradients of this scale are multiplied by. NaN where it cannot be inverted: 0,
/// negative, infinite, NaN, or subnormal, which a GPU may take for 0. So the gradients
/// of such a scale are NaN too, and not finite.
MATH_FN float sgd_unscale(float scale) {
  const bool inverts = scale >= power_of_two(-126) && is_finite_peak(float_to_bits(scale));
  return inverts ? divide_float(1.0f, scale) : bits_to_float(0x7fc00000u);
}

/// What the measurement of the gradients needs: their scale.
template <typename Given>
MATH_FN SgdHyper sgd_gradient_hyper(MATH_CONSTANT SgdControl& control, uint64_t step, Given given) {
  SgdHyper hyper = {};
  hyper.unscale = control.flags & kGradScale
      ? sgd_unscale(sgd_scalar(control, kGradScaleFactor, step, given))
      : 1.0f;
  hyper.clip_value = control.clip_value;
  return hyper;
}

/// As mlx.optimizers.clip_grad_norm has it; NaN stays NaN.
MATH_FN float sgd_clip_factor(float clip_norm, float norm) {
  const float factor = divide_float(clip_norm, norm + 1e-6f);
  return factor > 1.0f ? 1.0f : factor;
}

/// A scalar of a full step: that of the gradients is 1 where they are not scaled.
template <typename Given>
MATH_FN float sgd_full_scalar(
    MATH_CONSTANT SgdControl& control,
    int i,
    uint64_t step,
    Given given) {
  return i == kGradScaleFactor && !(control.flags & kGradScale)
      ? 1.0f
      : sgd_scalar(control, i, step, given);
}

/// The numbers of a full step but for those of a tensor, of its scalars. `measured` is
/// read only with kMeasuredFlags.
template <typename Measured>
MATH_FN SgdHyper sgd_full_hyper_of(
    MATH_CONSTANT SgdControl& control,
    uint64_t step,
    SgdScalars scalars,
    Measured measured) {
  SgdHyper hyper = sgd_hyper_of(control, scalars);
  hyper.unscale = sgd_unscale(scalars.of[kGradScaleFactor]);
  hyper.clip_value = control.clip_value;
  hyper.clip_factor = control.flags & kClipNorm
      ? sgd_clip_factor(control.clip_norm, measured[kMeasuredNorm])
      : 1.0f;
  hyper.trust_ratio = 1.0f;
  hyper.average_weight = control.average_weight;
  hyper.apply = control.flags & kSkipNonfinite ? measured[kMeasuredApply] != 0.0f : 1;
  hyper.key = random_key(control.seed, step, control.place);
  return hyper;
}

template <typename Given, typename Measured>
MATH_FN SgdHyper
sgd_full_hyper(MATH_CONSTANT SgdControl& control, uint64_t step, Given given, Measured measured) {
  SgdScalars scalars = {};
  for (int i = 0; i < kScalars; ++i) {
    scalars.of[i] = sgd_full_scalar(control, i, step, given);
  }
  return sgd_full_hyper_of(control, step, scalars, measured);
}

/// The numbers of one tensor of a full step. `flags` are the tensor's own. `group` is
/// its row of SgdGroup (read with kGroups), `norms` the norms of its gradient and its
/// parameter (read with kTrustRatio).
template <typename Group, typename Norms>
MATH_FN SgdHyper sgd_tensor_hyper(
    SgdHyper hyper,
    float trust_coefficient,
    uint32_t flags,
    Group group,
    Norms norms) {
  if (flags & kGroups) {
    hyper.learning_rate =
        group[kLearningRateTimes] * hyper.learning_rate + group[kLearningRatePlus];
    hyper.momentum = group[kMomentumTimes] * hyper.momentum + group[kMomentumPlus];
    hyper.weight_decay = group[kWeightDecayTimes] * hyper.weight_decay + group[kWeightDecayPlus];
    trust_coefficient = group[kTrustCoefficient];
  }
  if (flags & kTrustRatio) {
    // You, Gitman and Ginsburg, 2017: the ratio of the norms of parameter and update.
    const float gradient = norms[0] * hyper.clip_factor;
    const float parameter = norms[1];
    const float decay =
        (flags & kWeightDecay) && !(flags & kDecoupled) ? hyper.weight_decay * parameter : 0.0f;
    // What has vanished, or was clipped from infinity, has no direction to scale; nor has
    // what is so small that the ratio is beyond float32.
    const float ratio = divide_float(trust_coefficient * parameter, gradient + decay);
    if (gradient > 0.0f && parameter > 0.0f && is_finite_peak(peak_of(0, ratio))) {
      hyper.trust_ratio = ratio;
    }
  }
  return hyper;
}

// ---- The plain element -------------------------------------------------------

/// An element, or a vector of elements: T is float, or a type of the compiler's
/// with the arithmetic of one (a vector extension of g++ and clang, Metal's float4).
template <typename T>
struct SgdElements {
  T parameter;
  T velocity;
};
using SgdElement = SgdElements<float>;

/// The new velocity, and in the parameter's place the update, which the learning
/// rate is to multiply.
template <typename T>
MATH_FN SgdElements<T> sgd_update(T velocity, T gradient, SgdHyper hyper, uint32_t flags) {
  if (flags & kMomentum) {
    velocity = hyper.momentum * velocity + hyper.gradient_weight * gradient;
    if (flags & kNesterov) {
      gradient = gradient + hyper.momentum * velocity;
    } else {
      gradient = velocity;
    }
  }
  return {gradient, velocity};
}

/// Values in and out, so that no address space, vector width or launch shape
/// shows. Terms that the step does not have are left out, not multiplied by
/// zero: that keeps the sign of -0.0 and the bits of mlx.optimizers.
template <typename T>
MATH_FN SgdElements<T> sgd_element(SgdElements<T> e, T gradient, SgdHyper hyper, uint32_t flags) {
  if (flags & kWeightDecay) {
    gradient = gradient + hyper.weight_decay * e.parameter;
  }
  const SgdElements<T> update = sgd_update(e.velocity, gradient, hyper, flags);
  return {e.parameter - hyper.learning_rate * update.parameter, update.velocity};
}

// ---- The full element --------------------------------------------------------

/// The gradient whose peak is measured: an infinity in it counts.
template <typename T>
MATH_FN T sgd_unscaled(T gradient, SgdHyper hyper, uint32_t flags) {
  return flags & kGradScale ? gradient * hyper.unscale : gradient;
}

/// An unscaled gradient that is squared: clipped by value.
template <typename T>
MATH_FN T sgd_clipped(T gradient, SgdHyper hyper, uint32_t flags) {
  if (flags & kClipValue) {
    const T limit = T() + hyper.clip_value;
    gradient = gradient > limit ? limit : gradient; // NaN stays
    gradient = gradient < -limit ? -limit : gradient;
  }
  return gradient;
}

/// The peak of what is squared, from that of the unscaled gradients.
MATH_FN uint32_t sgd_clipped_peak(uint32_t peak, SgdHyper hyper, uint32_t flags) {
  const uint32_t limit = float_to_bits(hyper.clip_value);
  const bool clips = (flags & kClipValue) && peak > limit && peak <= 0x7f800000u;
  return clips ? limit : peak; // NaN stays
}

/// Everything that is kept of an element. What a step does not have is left as it is.
template <typename T>
struct SgdFullElements {
  T parameter;
  T velocity;
  T master; // the parameter in float32
  T compensation; // what the parameter's rounding has lost
  T average;
};
using SgdFullElement = SgdFullElements<float>;

/// One element of a full step, rounded to the formats of its memory: what comes out is
/// stored without another rounding. `position` is the element's in its arena.
template <typename T>
MATH_FN SgdFullElements<T> sgd_full_element(
    SgdFullElements<T> e,
    T gradient,
    typename Bits<T>::type position,
    SgdHyper hyper,
    uint32_t flags,
    uint32_t parameter_format,
    uint32_t velocity_format) {
  using U = typename Bits<T>::type;
  if (!hyper.apply) {
    return e;
  }
  T w = e.parameter;
  if (flags & kMaster) {
    // A parameter that is not its master's rounding was set by somebody else.
    w = round_nearest(e.master, parameter_format) == e.parameter ? e.master : e.parameter;
  }
  if (flags & kMaximize) {
    gradient = -gradient;
  }
  gradient = sgd_clipped(sgd_unscaled(gradient, hyper, flags), hyper, flags);
  if (flags & kClipNorm) {
    gradient = gradient * hyper.clip_factor;
  }
  if ((flags & kWeightDecay) && !(flags & kDecoupled)) {
    gradient = gradient + hyper.weight_decay * w;
  }
  if (flags & kTrustRatio) {
    gradient = gradient * hyper.trust_ratio;
  }
  const SgdElements<T> next = sgd_update(e.velocity, gradient, hyper, flags);
  T update = next.parameter;
  if ((flags & kWeightDecay) && (flags & kDecoupled)) {
    update = update + hyper.weight_decay * w;
  }

  // Two numbers of 16 random bits an element: what is stored twice is rounded twice.
  U random = position & 0u;
  if (flags & kStochastic) {
    random = random_bits(position, hyper.key);
  }
  e.velocity = flags & kStochastic ? round_random(next.velocity, velocity_format, random >> 16)
                                   : round_nearest(next.velocity, velocity_format);
  T exact = w - hyper.learning_rate * update;
  if (flags & kCompensated) {
    // Kahan: the part that the last rounding lost joins this update.
    const T change = e.compensation - hyper.learning_rate * update;
    exact = w + change;
    e.parameter = round_nearest(exact, parameter_format);
    e.compensation = round_nearest(change - (e.parameter - w), parameter_format);
  } else if (flags & kMaster) {
    e.master = exact;
    e.parameter = round_nearest(exact, parameter_format);
  } else {
    e.parameter = flags & kStochastic ? round_random(exact, parameter_format, random)
                                      : round_nearest(exact, parameter_format);
    exact = e.parameter;
  }
  if (flags & kAverage) {
    e.average = e.average + hyper.average_weight * (exact - e.average);
  }
  return e;
}

} // namespace fused_math
