// The frame of a step: what happens to a gradient before the optimizer's own rule
// (rules.h) and to a parameter after it, and the numbers that all elements of a step
// share. Operations and their order are those of mlx.optimizers, so that float32 has its
// bits on every backend.
//
//   gradient   maximize, unscale, clip by value and by norm, coupled weight decay, trust ratio
//   rule       new slots of its own, and the change of the parameter
//   parameter  decoupled weight decay, master or compensation, rounding, moving average
//
// What a step does not have is left out where its kernel is compiled: a plain step is the
// frame with nothing in it.
#pragma once

#include "bytes.h"
#include "norm.h"
#include "rounding.h"
#include "rules.h"
#include "schedule.h"

namespace fused_math {

/// What a step consists of. Fixed for a compiled graph: kernels may be
/// specialised on it.
enum StepFlags : uint32_t {
  // Bits 0 and 1 are the rule's own.
  kWeightDecay = 1 << 2,
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
  // The first half of a step: the rule's change, without the learning rate and in float32, is
  // put out in the parameter's place. What the frame keeps of an element is for the second half.
  kDirection = 1 << 16,
  // With kDirection: in the parameter's format. Of a plain SGD it is a gradient that is packed.
  kPack = 1 << 17,

  /// Both: a master in 24 bits. The parameter is its upper part; what is kept is the rest.
  kMaster24 = kMaster | kCompensated,

  /// All that mlx.optimizers has.
  kPlainFlags = kRuleFlags | kWeightDecay | kDecoupled,
  /// Steps that first measure all gradients.
  kMeasuredFlags = kClipNorm | kMeasureNorm | kSkipNonfinite | kTrustRatio,
  /// What a group of tensors may be without.
  kTensorFlags = kRuleFlags | kWeightDecay | kTrustRatio,
};

/// The numbers of one step, for one tensor.
struct StepHyper {
  RuleNumbers<float> rule;
  float weight_decay;
  float unscale; // 1 / grad_scale
  float clip_value;
  float clip_factor; // of the global norm
  float trust_ratio;
  float average_weight; // 1 - ema_decay, formed in float64 and rounded once
  uint32_t apply; // 0: this step is skipped
  RandomKey key;
};

/// What the state keeps of every element, each in arenas of its own that are laid
/// out like the parameters'. The first ones are the rule's, of any of the three dtypes.
enum StepSlot : int {
  kMasterCopy = kRuleSlots, // with kMaster; float32, of half types only; of kMaster24 a byte
  kCompensation, // with kCompensated alone; the parameter's dtype, of half types only
  kMovingAverage, // with kAverage; float32
  kSlots,
};

MATH_FN constexpr bool is_master24(uint32_t flags) { return (flags & kMaster24) == kMaster24; }

/// Whether a step keeps a slot.
MATH_FN constexpr bool has_slot(uint32_t rule, uint32_t flags, int slot) {
  return slot < kRuleSlots    ? slot < Rules::slots(rule, flags)
      : slot == kMasterCopy   ? (flags & kMaster) != 0
      : slot == kCompensation ? (flags & kMaster24) == kCompensated
                              : (flags & kAverage) != 0;
}

/// The format of a slot. Of the rule's, kBytes says that each is one or the other in bytes.
MATH_FN constexpr uint32_t slot_format(
    uint32_t rule,
    uint32_t flags,
    int slot,
    uint32_t parameter_format,
    uint32_t state_format) {
  return slot < kRuleSlots
      ? (state_format == kBytes && Rules::is_unsigned(rule, slot) ? uint32_t(kByteSquares)
                                                                  : state_format)
      : slot == kCompensation                     ? parameter_format
      : slot == kMasterCopy && is_master24(flags) ? uint32_t(kInt8)
                                                  : uint32_t(kFloat32);
}

/// The format of what is put out in the parameter's place.
MATH_FN constexpr uint32_t parameter_out_format(uint32_t flags, uint32_t parameter_format) {
  return (flags & kDirection) && !(flags & kPack) ? uint32_t(kFloat32) : parameter_format;
}

/// The numbers that may change from step to step, and their positions in the
/// arrays of given and of used values.
enum StepScalar : int {
  kLearningRate = 0,
  kWeightDecayFactor = 1,
  kGradScaleFactor = 2,
  kFirstRuleScalar = 3,
  kScalars = kFirstRuleScalar + kRuleScalars,
};

enum StepLimits : int {
  kMostSchedules = 4, // that a kernel evaluates; the host gives further scalars as arrays
};

/// Where the numbers of a step come from. Each scalar is a constant, or given as an array
/// (its bit in `given` is set), or a schedule of the step counter (its bit in `scheduled`;
/// the schedules are in the order of their scalars).
struct StepControl {
  Real constants[kScalars];
  float rest[kRuleScalars]; // 1 - scalar of the rule's constant ones, see RuleNumbers
  float clip_value;
  float clip_norm;
  float trust_coefficient;
  float average_weight;
  uint32_t flags; // StepFlags
  uint32_t given;
  uint32_t scheduled;
  uint32_t rule; // its place in Rules
  uint32_t parameter_format; // Format
  uint32_t state_format; // likewise, of the rule's slots
  uint32_t begin; // in `place`, where this arena begins
  uint64_t seed; // of rounding at random
  uint64_t place; // likewise: the arena, or that of which it is a part
  Schedule schedules[kMostSchedules];
};
static_assert(sizeof(StepControl) <= 4096, "Metal takes at most 4 KiB by value");

/// What was measured of a step's gradients before it, as an array of float32: the
/// global norm of the unscaled (and by value clipped) gradients; 1 where the step is
/// to be done, else 0; and with kTrustRatio the norms of every tensor's gradient and
/// parameter, in the order of the layout.
enum StepMeasured : uint32_t {
  kMeasuredNorm = 0,
  kMeasuredApply = 1,
  kMeasuredTensors = 2,
};

/// Whether the step is to be done: `total` is of all gradients, `norm` its norm. Its peak
/// is of the unscaled gradients, before clipping by value hides an infinity.
MATH_FN bool step_applies(uint32_t flags, Squares total, float norm) {
  return !(flags & kSkipNonfinite) ||
      (is_finite_peak(total.peak) && (!(flags & kClipNorm) || is_finite_peak(peak_of(0, norm))));
}

/// The numbers of a group of tensors, a row of float32: learning rate and weight decay of
/// the step times a factor plus the group's own number, and each scalar of the rule likewise,
/// its own in two parts (Real) and with its rest.
enum StepGroup : uint32_t {
  kLearningRateTimes = 0,
  kLearningRatePlus = 1,
  kWeightDecayTimes = 2,
  kWeightDecayPlus = 3,
  kTrustCoefficient = 4,
  kFirstScalarTimes = 5, // of scalar i of the rule: + kGroupScalar * i, as the next ones
  kFirstScalarPlus = 6,
  kFirstScalarPlusLow = 7,
  kFirstScalarPlusRest = 8,
  kGroupScalar = 4,
  kGroupNumbers = kFirstScalarTimes + kGroupScalar * kRuleScalars,
};

MATH_FN bool is_constant(MATH_CONSTANT StepControl& control, int i) {
  return !((control.given | control.scheduled) >> i & 1);
}

/// `given` is the array of given values, one for each StepScalar up to the last
/// that is given. A scalar that is absent is never looked at: that of gradients which are
/// not scaled is 1.
template <typename Given>
MATH_FN float step_scalar(MATH_CONSTANT StepControl& control, int i, uint64_t step, Given given) {
  if (i == kGradScaleFactor && !(control.flags & kGradScale)) {
    return 1.0f;
  }
  if (control.given >> i & 1) {
    return given[i];
  }
  if (control.scheduled >> i & 1) {
    int place = 0;
    for (int before = 0; before < i; ++before) {
      place += control.scheduled >> before & 1;
    }
    return schedule_value(control.schedules[place], step);
  }
  return control.constants[i].hi;
}

/// The scalars of one step. A struct, because Metal passes no array of a thread.
struct StepScalars {
  float of[kScalars];
};

template <typename Given>
MATH_FN StepScalars step_scalars(MATH_CONSTANT StepControl& control, uint64_t step, Given given) {
  // In a loop: one copy of a schedule's code, where more cost the CUDA kernels registers.
  StepScalars scalars = {};
  for (int i = 0; i < kScalars; ++i) {
    scalars.of[i] = step_scalar(control, i, step, given);
  }
  return scalars;
}

/// The next counter, and the scalars that were used: by one thread, once a step.
template <typename StepOut, typename UsedOut>
MATH_FN void step_counters(
    StepScalars scalars,
    StepHyper hyper,
    uint64_t step,
    StepOut step_out,
    UsedOut used_out) {
  step_out[0] = step + hyper.apply;
  for (int i = 0; i < kScalars; ++i) {
    used_out[i] = scalars.of[i];
  }
}

/// What gradients of this scale are multiplied by. NaN where it cannot be inverted: 0,
/// negative, infinite, NaN, or subnormal, which a GPU may take for 0. So the gradients
/// of such a scale are NaN too, and not finite.
MATH_FN float step_unscale(float scale) {
  const bool inverts = scale >= power_of_two(-126) && is_finite_peak(float_to_bits(scale));
  return inverts ? divide_float(1.0f, scale) : bits_to_float(0x7fc00000u);
}

/// What the measurement of the gradients needs: their scale.
template <typename Given>
MATH_FN StepHyper
step_gradient_hyper(MATH_CONSTANT StepControl& control, uint64_t step, Given given) {
  StepHyper hyper = {};
  hyper.unscale = control.flags & kGradScale
      ? step_unscale(step_scalar(control, kGradScaleFactor, step, given))
      : 1.0f;
  hyper.clip_value = control.clip_value;
  return hyper;
}

/// As mlx.optimizers.clip_grad_norm has it; NaN stays NaN.
MATH_FN float clip_factor_of(float clip_norm, float norm) {
  const float factor = divide_float(clip_norm, norm + 1e-6f);
  return factor > 1.0f ? 1.0f : factor;
}

/// 1 - factor^t, for 0 <= factor <= 1.
MATH_FN Real bias_of(Real factor, uint64_t t) {
  if (factor.hi <= 0.0f) {
    return {1.0f, 0.0f};
  }
  const Real log2 = log2_of(factor, add({1.0f, 0.0f}, negate(factor)));
  return exponential_weight(multiply(log2, real_from_integer(t))).rest;
}

/// 1 - factor^t of both factors, one after the other. Threads of a GPU may share them.
struct BiasesInTurn {
  Real of[2];
  MATH_MEMBER BiasesInTurn at(Real first, Real second, uint64_t t) {
    return {{bias_of(first, t), bias_of(second, t)}};
  }
};

/// The two numbers of a bias correction at update `t`, counted from 1. `low` are the second
/// parts of the factors.
template <typename Biases>
MATH_FN RuleNumbers<float> bias_corrected(
    RuleNumbers<float> n,
    float low0,
    float low1,
    uint64_t t) {
  const Biases biases = Biases::at({n.scalar[0], low0}, {n.scalar[1], low1}, t);
  n.corrected_rate = divide({n.learning_rate, 0.0f}, biases.of[0]).hi;
  n.corrected_root = reciprocal_root(biases.of[1]).hi;
  return n;
}

/// The second part of a constant: what is known of it beyond float32.
MATH_FN float low_part(MATH_CONSTANT StepControl& control, int i) {
  return is_constant(control, i) ? control.constants[i].lo : 0.0f;
}

/// The numbers of a step but for those of a tensor, of its scalars. `measured` is
/// read only with kMeasuredFlags.
template <typename Biases = BiasesInTurn, typename Measured>
MATH_FN StepHyper step_hyper_of(
    MATH_CONSTANT StepControl& control,
    uint32_t rule,
    uint32_t flags,
    uint64_t step,
    StepScalars scalars,
    Measured measured) {
  StepHyper hyper = {};
  hyper.rule.learning_rate = scalars.of[kLearningRate];
  for (int i = 0; i < kRuleScalars; ++i) {
    const float scalar = scalars.of[kFirstRuleScalar + i];
    hyper.rule.scalar[i] = scalar;
    hyper.rule.rest[i] =
        is_constant(control, kFirstRuleScalar + i) ? control.rest[i] : 1.0f - scalar;
  }
  if (Rules::is_bias_corrected(rule, flags)) {
    hyper.rule = bias_corrected<Biases>(
        hyper.rule,
        low_part(control, kFirstRuleScalar),
        low_part(control, kFirstRuleScalar + 1),
        step + 1);
  }
  hyper.weight_decay = scalars.of[kWeightDecayFactor];
  hyper.unscale = step_unscale(scalars.of[kGradScaleFactor]);
  hyper.clip_value = control.clip_value;
  hyper.clip_factor =
      flags & kClipNorm ? clip_factor_of(control.clip_norm, measured[kMeasuredNorm]) : 1.0f;
  hyper.trust_ratio = 1.0f;
  hyper.average_weight = control.average_weight;
  hyper.apply = flags & kSkipNonfinite ? measured[kMeasuredApply] != 0.0f : 1;
  hyper.key = random_key(control.seed, step, control.place, control.begin);
  return hyper;
}

template <typename Given, typename Measured>
MATH_FN StepHyper
step_hyper(MATH_CONSTANT StepControl& control, uint64_t step, Given given, Measured measured) {
  return step_hyper_of(
      control, control.rule, control.flags, step, step_scalars(control, step, given), measured);
}

/// The numbers of one tensor. `flags` are the tensor's own. `group` is its row of
/// StepGroup (read with kGroups), `norms` the norms of its gradient and its parameter (read
/// with kTrustRatio).
template <typename Biases = BiasesInTurn, typename Group, typename Norms>
MATH_FN StepHyper step_tensor_hyper(
    MATH_CONSTANT StepControl& control,
    StepHyper hyper,
    uint32_t rule,
    uint64_t step,
    uint32_t flags,
    Group group,
    Norms norms) {
  float trust_coefficient = control.trust_coefficient;
  if (flags & kGroups) {
    RuleNumbers<float> n = hyper.rule;
    float low[kRuleScalars];
    n.learning_rate = group[kLearningRateTimes] * n.learning_rate + group[kLearningRatePlus];
    for (int i = 0; i < kRuleScalars; ++i) {
      const int at = kGroupScalar * i;
      const float times = group[kFirstScalarTimes + at];
      low[i] = times * low_part(control, kFirstRuleScalar + i) + group[kFirstScalarPlusLow + at];
      n.scalar[i] = times * n.scalar[i] + group[kFirstScalarPlus + at];
      n.rest[i] = times * n.rest[i] + group[kFirstScalarPlusRest + at];
    }
    if (Rules::is_bias_corrected(rule, flags)) {
      n = bias_corrected<Biases>(n, low[0], low[1], step + 1);
    }
    hyper.rule = n;
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

// ---- An element ----------------------------------------------------------------

/// The gradient whose peak is measured: an infinity in it counts.
template <typename T>
MATH_FN T step_unscaled(T gradient, StepHyper hyper, uint32_t flags) {
  return flags & kGradScale ? gradient * hyper.unscale : gradient;
}

/// An unscaled gradient that is squared: clipped by value.
template <typename T>
MATH_FN T step_clipped(T gradient, StepHyper hyper, uint32_t flags) {
  if (flags & kClipValue) {
    const T limit = T() + hyper.clip_value;
    gradient = gradient > limit ? limit : gradient; // NaN stays
    gradient = gradient < -limit ? -limit : gradient;
  }
  return gradient;
}

/// The peak of what is squared, from that of the unscaled gradients.
MATH_FN uint32_t step_clipped_peak(uint32_t peak, StepHyper hyper, uint32_t flags) {
  const uint32_t limit = float_to_bits(hyper.clip_value);
  const bool clips = (flags & kClipValue) && peak > limit && peak <= 0x7f800000u;
  return clips ? limit : peak; // NaN stays
}

/// Everything that is kept of an element, or of a vector of them. What a step does not have
/// is left as it is.
template <typename T>
struct StepElements {
  T parameter;
  RuleSlots<T> slots;
  T master; // the parameter in float32; of kMaster24 what tells it from the parameter
  T compensation; // what the parameter's rounding has lost
  T average;
};
using StepElement = StepElements<float>;

/// A number of the rule, as it is stored. Each of them has 16 random bits of its own, those at
/// the end of what slot_random gives; the parameter has the low ones of `random`.
template <typename U>
MATH_FN U slot_random(U random, int slot) {
  const U more = slot == 0 ? random : mix32(random);
  return slot == 2 ? more : more >> 16;
}
template <typename T>
MATH_FN T
stored_slot(T x, int slot, typename Bits<T>::type random, uint32_t flags, uint32_t format) {
  return flags & kStochastic ? round_random(x, format, slot_random(random, slot))
                             : round_nearest(x, format);
}
/// Of what is stored as bytes, with which step_element has nothing to do: what comes to a
/// number before it is rounded to a code.
template <typename T>
MATH_FN T slot_dither(typename Bits<T>::type position, int slot, RandomKey key, uint32_t flags) {
  return flags & kStochastic ? byte_dither<T>(slot_random(random_bits(position, key), slot)) : T();
}

/// One element of a step, rounded to the formats of its memory: what comes out is
/// stored without another rounding. `position` is the element's in its arena. Values in and
/// out, so that no address space, vector width or launch shape shows. Terms that the step
/// does not have are left out, not multiplied by zero: that keeps the sign of -0.0 and the
/// bits of mlx.optimizers.
template <typename T>
MATH_FN StepElements<T> step_element(
    StepElements<T> e,
    T gradient,
    typename Bits<T>::type position,
    StepHyper hyper,
    uint32_t rule,
    uint32_t flags,
    uint32_t parameter_format,
    uint32_t state_format) {
  using U = typename Bits<T>::type;
  if ((flags & kSkipNonfinite) && !hyper.apply) {
    return e;
  }
  T w = e.parameter;
  if (is_master24(flags)) {
    w = master24_of(e.parameter, e.master);
  } else if (flags & kMaster) {
    // A parameter that is not its master's rounding was set by somebody else.
    w = round_nearest(e.master, parameter_format) == e.parameter ? e.master : e.parameter;
  }
  if (flags & kMaximize) {
    gradient = -gradient;
  }
  gradient = step_clipped(step_unscaled(gradient, hyper, flags), hyper, flags);
  if (flags & kClipNorm) {
    gradient = gradient * hyper.clip_factor;
  }
  if ((flags & kWeightDecay) && !(flags & kDecoupled)) {
    gradient = gradient + hyper.weight_decay * w;
  }
  if (flags & kTrustRatio) {
    gradient = gradient * hyper.trust_ratio;
  }
  if (flags & kDirection) {
    hyper.rule.learning_rate = 1.0f;
  }
  const RuleStep<T> next = Rules::step(rule, gradient, e.slots, hyper.rule, flags);

  U random = position & 0u;
  if (flags & kStochastic) {
    random = random_bits(position, hyper.key);
  }
  for (int slot = 0; slot < kRuleSlots; ++slot) {
    if (slot < Rules::slots(rule, flags)) {
      e.slots.of[slot] = stored_slot(next.slots.of[slot], slot, random, flags, state_format);
    }
  }

  if (flags & kDirection) {
    e.parameter = flags & kPack ? round_nearest(next.change, parameter_format) : next.change;
    return e;
  }
  if ((flags & kWeightDecay) && (flags & kDecoupled)) {
    w = w * (1.0f - hyper.rule.learning_rate * hyper.weight_decay);
  }
  T exact = w - next.change;
  if (is_master24(flags)) {
    exact = flags & kStochastic ? random_master24(exact, random) : nearest_master24(exact);
    e.parameter = parameter_of_master24(exact);
    e.master = byte_of_master24(exact, e.parameter);
  } else if (flags & kCompensated) {
    // Kahan: the part that the last rounding lost joins this update.
    const T change = e.compensation - next.change;
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
