// The value of a schedule at a step. A schedule is plain data, passed to the
// kernels by value: up to eight joined segments of a few kinds. What is not a
// kind of its own (warm-up, one cycle, milestones) the host builds by joining.
//
// Progress comes from integers and enters as a pair of weights that sum to 1,
// both known relative to themselves, so a value between two ends never suffers
// from cancellation: one * weight + zero * (1 - weight).
#pragma once

#include "elementary.h"

namespace fused_math {

enum ScheduleKind : uint32_t {
  kConstant = 0, // one
  kExponential = 1, // one * 2^(rate * transitions); `zero` may bound it
  kBlend = 2, // from one to zero over `steps`, then zero
  kInversePower = 3, // one * (steps / (steps + elapsed))^rate
  kRestarts = 4, // a cosine from one to zero, in cycles
  kTriangle = 5, // zero up to one in `steps`, down in `second`, and again
};

enum SegmentFlags : uint32_t {
  kStaircase = 1, // count whole transitions (exponential) or cycles (triangle) only
  kFloor = 2, // exponential: never below `zero`
  kCeiling = 4, // exponential: never above `zero`
  kCosine = 8, // blend: half a cosine wave instead of a line
  kPower = 16, // blend: the weight to the power of `rate`
  kRising = 32, // blend: the weight rises instead, from zero to one
  kDamped = 64, // triangle: its height is multiplied by 2^(rate * transitions)
};

struct Segment {
  uint64_t start; // step at which the segment takes over; it counts from there
  uint64_t begin; // steps before it leave the value where it starts
  uint64_t steps; // length of the transition, the first cycle, or the way up
  uint64_t second; // restarts: factor of the lengths; triangle: steps down
  Real one; // the value where the weight is 1
  Real zero; // the value where the weight is 0
  Real rate; // log2 of a factor, or a power
  uint32_t kind; // ScheduleKind
  uint32_t flags; // SegmentFlags
};
static_assert(sizeof(Segment) == 64, "no padding: schedules are compared as bytes");

enum ScheduleLimits : uint32_t {
  kMaxSegments = 8,
  kMaxCycleFactor = 65535, // a cycle of 2^48 steps, times this, fits 64 bits
};

struct Schedule {
  uint32_t count; // at least 1
  uint32_t reserved;
  Segment segments[kMaxSegments];
};

// Kernels that are compiled for a step know what its schedules consist of, and leave the rest
// out: the kinds of all their segments, bit by bit, and all their flags.
#ifndef SCHEDULE_KINDS
#define SCHEDULE_KINDS ~0u
#define SCHEDULE_FLAGS ~0u
#endif
MATH_FN bool is_kind(MATH_CONSTANT Segment& s, uint32_t kind) {
  return ((SCHEDULE_KINDS) >> kind & 1u) && s.kind == kind;
}
MATH_FN bool has_flag(MATH_CONSTANT Segment& s, uint32_t flag) {
  return ((SCHEDULE_FLAGS)&flag) && (s.flags & flag);
}

/// `part` * 2^exponent, and what it lacks to 1.
struct Weight {
  Real part;
  Real rest;
  int exponent;
};

/// done / total, for done <= total.
MATH_FN Weight linear_weight(uint64_t done, uint64_t total) {
  Real all = real_from_integer(total);
  return {divide(real_from_integer(done), all), divide(real_from_integer(total - done), all), 0};
}

/// (1 - cos(pi * done / total)) / 2, for done <= total.
MATH_FN Weight cosine_weight(uint64_t done, uint64_t total) {
  // As a squared sine of at most pi / 4, counted from the nearer end.
  bool late = done > total - done;
  Real progress = divide(real_from_integer(late ? total - done : done), real_from_integer(total));
  Real sine = sine_of_quarter_turns(progress);
  Real small = multiply(sine, sine);
  Real large = add({1.0f, 0.0f}, negate(small));
  return {late ? large : small, late ? small : large, 0};
}

MATH_FN Weight other_way(Weight w) { return {w.rest, w.part, 0}; }

/// 2^log2, for log2 <= 0.
MATH_FN Weight exponential_weight(Real log2) {
  PowerOfTwo power = exp2_parts(log2);
  Real mantissa = add({1.0f, 0.0f}, power.excess);
  Real rest = negate(power.excess);
  if (power.whole != 0) {
    // Below 0.71: nothing is lost in the difference.
    float scale = power.whole < -126 ? 0.0f : power_of_two(power.whole);
    rest = add({1.0f, 0.0f}, {-mantissa.hi * scale, -mantissa.lo * scale});
  }
  return {mantissa, rest, power.whole};
}

/// A weight to a positive power.
MATH_FN Weight to_power(Weight w, Real power) {
  if (w.part.hi <= 0.0f || w.rest.hi <= 0.0f) {
    return w;
  }
  return exponential_weight(multiply(power, log2_of(w.part, w.rest)));
}

/// Transitions since `begin`; compared before subtracting, for unsigned would wrap.
MATH_FN uint64_t elapsed_since(uint64_t begin, uint64_t t) { return t > begin ? t - begin : 0; }

MATH_FN Weight blend_weight(MATH_CONSTANT Segment& s, uint64_t t) {
  uint64_t elapsed = elapsed_since(s.begin, t);
  uint64_t done = elapsed < s.steps ? elapsed : s.steps;
  Weight w = has_flag(s, kCosine) ? cosine_weight(done, s.steps) : linear_weight(done, s.steps);
  if (!(s.flags & kRising)) {
    w = other_way(w);
  }
  return has_flag(s, kPower) ? to_power(w, load(s.rate)) : w;
}

MATH_FN Weight inverse_power_weight(MATH_CONSTANT Segment& s, uint64_t t) {
  // The sum stays below 2^64, so that nothing wraps.
  uint64_t room = ~uint64_t(0) - s.steps;
  uint64_t elapsed = elapsed_since(s.begin, t);
  uint64_t total = s.steps + (elapsed < room ? elapsed : room);
  return to_power(linear_weight(s.steps, total), load(s.rate));
}

MATH_FN Weight restarts_weight(MATH_CONSTANT Segment& s, uint64_t t) {
  uint64_t length = s.steps;
  if (s.second == 1) {
    t = t % length;
  } else {
    while (t >= length && length >> 48 == 0) {
      t -= length;
      length *= s.second;
    }
  }
  return other_way(cosine_weight(t < length ? t : length, length));
}

MATH_FN Weight triangle_weight(MATH_CONSTANT Segment& s, uint64_t t) {
  uint64_t period = s.steps + s.second;
  uint64_t cycle = t / period;
  uint64_t within = t - cycle * period;
  Weight w =
      within <= s.steps ? linear_weight(within, s.steps) : linear_weight(period - within, s.second);
  if (has_flag(s, kDamped)) {
    uint64_t transitions = s.flags & kStaircase ? cycle : t;
    Weight height = exponential_weight(multiply(load(s.rate), real_from_integer(transitions)));
    // 1 - part * height = (1 - part) + part * (1 - height), both positive.
    Real rest = add(w.rest, multiply(w.part, height.rest));
    w = {multiply(w.part, height.part), rest, height.exponent};
  }
  return w;
}

/// one * weight + zero * (1 - weight).
MATH_FN Scaled blended(MATH_CONSTANT Segment& s, Weight w) {
  Real share = multiply(load(s.one), w.part);
  if (s.zero.hi == 0.0f) {
    return {share, w.exponent}; // however small
  }
  float scale = w.exponent < -126 ? 0.0f : power_of_two(w.exponent);
  share = {share.hi * scale, share.lo * scale};
  return {add(share, multiply(load(s.zero), w.rest)), 0};
}

/// The value `t` steps after the start of a segment, before the last rounding.
MATH_FN Scaled segment_value(MATH_CONSTANT Segment& s, uint64_t t) {
  if (is_kind(s, kExponential)) {
    uint64_t transitions = elapsed_since(s.begin, t);
    if (s.flags & kStaircase) {
      transitions = transitions / s.steps;
    }
    PowerOfTwo power = exp2_parts(multiply(load(s.rate), real_from_integer(transitions)));
    Real mantissa = add({1.0f, 0.0f}, power.excess);
    return {multiply(load(s.one), mantissa), power.whole};
  }
  if (is_kind(s, kBlend)) {
    return blended(s, blend_weight(s, t));
  }
  if (is_kind(s, kInversePower)) {
    return blended(s, inverse_power_weight(s, t));
  }
  if (is_kind(s, kRestarts)) {
    return blended(s, restarts_weight(s, t));
  }
  if (is_kind(s, kTriangle)) {
    return blended(s, triangle_weight(s, t));
  }
  return {load(s.one), 0};
}

/// No rounding may carry a value past the ends of its segment.
MATH_FN float clamped(MATH_CONSTANT Segment& s, float value) {
  float one = s.one.hi;
  float zero = s.zero.hi;
  if (s.kind == kExponential) {
    value = s.flags & kFloor && value < zero ? zero : value;
    return s.flags & kCeiling && value > zero ? zero : value;
  }
  if (s.kind != kConstant) {
    float low = one < zero ? one : zero;
    float high = one < zero ? zero : one;
    value = value < low ? low : value;
    value = value > high ? high : value;
  }
  return value;
}

/// The value at `step`, 0 being the first update.
MATH_FN float schedule_value(MATH_CONSTANT Schedule& schedule, uint64_t step) {
  uint32_t i = schedule.count - 1;
  while (i > 0 && step < schedule.segments[i].start) {
    --i;
  }
  MATH_CONSTANT Segment& segment = schedule.segments[i];
  return clamped(segment, rounded(segment_value(segment, step - segment.start)));
}

} // namespace fused_math
