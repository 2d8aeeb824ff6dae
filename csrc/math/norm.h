// Sums of squares in one order on every backend, so that a norm has the same bits
// everywhere and does not depend on threads.
//
// 1. A chunk of kChunk neighbours goes to kLanes lanes: lane l adds the squares of
//    the elements l, l + kLanes, ... one after another, and the lanes are added in
//    halves (lane l and lane l + 64, then l + 32, ...). Elements behind the end are 0.
//    Where the chunk's largest magnitude is not within 2^-40 to 2^41, its elements are
//    first divided by that one's power of two: no square of a number that counts
//    overflows or vanishes. It costs nothing where it is not needed: the peak is known
//    after a chunk was summed, and only then is a chunk that needs it read again.
// 2. The sums of an array's chunks, and then those of all arrays, are folded: lane l of
//    kFoldLanes adds the values l, l + kFoldLanes, ..., and again halves are added.
//    Folding is in two float32 (about 48 bits), at the larger scale of two sums, and
//    loses nothing that counts.
//
// An element's square is rounded once, then goes through at most kChunk / kLanes - 1 +
// log2(kLanes) = 22 additions in float32: the sum errs by at most 23 * 2^-24, its root
// by half of that and a rounding, 7.5e-7, however many elements there are. Squares below
// 2^-126, which may be flushed to zero, are 2^-46 of a chunk's sum or less; a chunk has
// 2^11. So the bound holds for every norm that is a normal number of float32, and only a
// norm beyond float32 is infinite.
#pragma once

#include "real.h"

namespace fused_math {

enum NormShape : uint32_t {
  kLanes = 128,
  kChunk = 2048,
  kFoldLanes = 1024,
};

/// The largest magnitude, as bits: above all numbers is infinity, above that NaN.
MATH_FN uint32_t peak_of(uint32_t peak, float x) {
  const uint32_t bits = float_to_bits(x) & 0x7fffffffu;
  return bits > peak ? bits : peak;
}

MATH_FN bool is_finite_peak(uint32_t peak) { return peak < 0x7f800000u; }

// ---- Scales --------------------------------------------------------------------

/// The scale of a sum of squares is the exponent e, as float32 has it, of the power of
/// two that the elements were divided by: the sum counts 2^(2 (e - 127)).
enum NormScale : uint32_t {
  kNoScale = 127,
  kLeastExponent = 87, // of peaks that need none: 2^-40
  kMostExponent = 167, // that is, below 2^41: 2^44 such squares are within float32
  kMostScale = 253, // the reciprocal of its power of two is the smallest normal number
};

/// Of a chunk with this peak. 0, and so the least, for zeros and subnormal numbers.
MATH_FN uint32_t scale_of(uint32_t peak) {
  const uint32_t exponent = peak >> 23;
  if (exponent >= kLeastExponent && exponent <= kMostExponent) {
    return kNoScale;
  }
  return exponent < kMostScale ? exponent : uint32_t(kMostScale);
}

/// What the elements of a chunk with this peak are multiplied by.
MATH_FN float factor_of(uint32_t peak) {
  return peak == 0 ? 1.0f : power_of_two(int(kNoScale) - int(scale_of(peak)));
}

// ---- Sums ----------------------------------------------------------------------

/// Of a chunk, of an array, of all. With zeros in all fields it is the sum of nothing.
struct Squares {
  Real sum;
  uint32_t scale;
  uint32_t peak; // the largest magnitude that was met
};

/// The sum at a larger scale. In two factors, as one could be too small for float32;
/// what then becomes subnormal does not count.
MATH_FN Real at_scale(Squares x, uint32_t scale) {
  const int down = int(x.scale) - int(scale);
  const float factor = power_of_two(down < -126 ? -126 : down);
  return {x.sum.hi * factor * factor, x.sum.lo * factor * factor};
}

/// A sum so far, and one more. Exact in the first part; a fold over zeros changes
/// nothing.
MATH_FN Squares fold(Squares sum, Squares more) {
  const uint32_t scale = sum.scale > more.scale ? sum.scale : more.scale;
  const Real a = at_scale(sum, scale);
  const Real b = at_scale(more, scale);
  const Real high = two_sum(a.hi, b.hi);
  return {{high.hi, (a.lo + b.lo) + high.lo}, scale, sum.peak > more.peak ? sum.peak : more.peak};
}

/// The root. Infinity and NaN have no second part.
MATH_FN float norm_of(Squares x) {
  const float sum =
      is_finite_peak(float_to_bits(x.sum.hi) & 0x7fffffffu) ? x.sum.hi + x.sum.lo : x.sum.hi;
  // Half of it and twice the power: 2^-127 is no normal number.
  return (sqrt_float(sum) * 0.5f) * power_of_two(int(x.scale) - int(kNoScale) + 1);
}

} // namespace fused_math
