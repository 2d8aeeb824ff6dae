// The learning rate at a step: the device form of a schedule, and its value.
// A schedule is plain data, passed to the kernels by value.
#pragma once

#include "real.h"

namespace fused_math {

enum ScheduleKind : uint32_t {
  kConstant = 0,
  kExponential = 1, // init * 2^(log2_rate * transitions)
};

enum SegmentFlags : uint32_t {
  kStaircase = 1, // count whole transitions only
  kFloor = 2, // never below `end`
  kCeiling = 4, // never above `end`
};

struct Segment {
  uint64_t start; // step at which the segment takes over; it counts from there
  uint64_t transition_begin; // steps before it leave the value at init
  uint64_t transition_steps;
  Real init;
  Real end;
  Real log2_rate; // per step, or per transition when staircase
  uint32_t kind;
  uint32_t flags;
};

enum ScheduleLimits : uint32_t {
  kMaxSegments = 8,
};

struct Schedule {
  uint32_t count; // at least 1
  uint32_t reserved;
  Segment segments[kMaxSegments];
};

MATH_FN float exponential_value(MATH_CONSTANT Segment& s, uint64_t t) {
  // Compared before subtracting: below the beginning, unsigned would wrap.
  uint64_t elapsed = t > s.transition_begin ? t - s.transition_begin : 0;
  if (s.flags & kStaircase) {
    elapsed = elapsed / s.transition_steps;
  }
  Real log2_rate = {s.log2_rate.hi, s.log2_rate.lo};
  Real init = {s.init.hi, s.init.lo};
  float value = scaled_exp2(init, multiply(real_from_step(elapsed), log2_rate));
  if ((s.flags & kFloor) && value < s.end.hi) {
    value = s.end.hi;
  }
  if ((s.flags & kCeiling) && value > s.end.hi) {
    value = s.end.hi;
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
  if (segment.kind == kExponential) {
    return exponential_value(segment, step - segment.start);
  }
  return segment.init.hi;
}

} // namespace fused_math
