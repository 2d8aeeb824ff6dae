// Sums of squares in one order on every backend, so that a norm has the same bits
// everywhere and does not depend on threads.
//
// 1. A chunk of kChunk neighbours goes to kLanes lanes: lane l adds the squares of
//    the elements l, l + kLanes, ... one after another, and the lanes are added in
//    halves (lane l and lane l + 64, then l + 32, ...). Elements behind the end are 0.
// 2. The sums of an array's chunks, and then those of all arrays, are folded: lane l of
//    kFoldLanes adds the values l, l + kFoldLanes, ..., and again halves are added.
//    Folding is in two float32 (about 48 bits) and loses nothing that counts.
//
// An element's square is rounded once, then goes through at most kChunk / kLanes - 1 +
// log2(kLanes) = 22 additions in float32: the sum errs by at most 23 * 2^-24, its root
// by half of that and a rounding, 7.5e-7, however many elements there are.
#pragma once

#include "real.h"

namespace fused_math {

enum NormShape : uint32_t {
  kLanes = 128,
  kChunk = 2048,
  kFoldLanes = 1024,
};

/// A sum so far, and one more value or sum. Exact in the first part; a fold over
/// zeros changes nothing.
MATH_FN Real fold(Real sum, Real more) {
  const Real high = two_sum(sum.hi, more.hi);
  return {high.hi, (sum.lo + more.lo) + high.lo};
}

/// The sum as a float32. Infinity and NaN have no second part.
MATH_FN float folded(Real sum) {
  const float value = sum.hi + sum.lo;
  return (float_to_bits(sum.hi) & 0x7f800000u) == 0x7f800000u ? sum.hi : value;
}

/// The largest magnitude, as bits: above all numbers is infinity, above that NaN.
MATH_FN uint32_t peak_of(uint32_t peak, float x) {
  const uint32_t bits = float_to_bits(x) & 0x7fffffffu;
  return bits > peak ? bits : peak;
}

MATH_FN bool is_finite_peak(uint32_t peak) { return peak < 0x7f800000u; }

} // namespace fused_math
