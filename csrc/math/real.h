// A real number as the sum of two float32, about 48 bits: enough to carry
// step * log2(rate) for steps up to 2^48 and still know the result to the last
// bit of float32. The algorithms are Dekker's and Knuth's error-free
// transformations (T. J. Dekker, Numer. Math. 18, 1971).
#pragma once

#include "portability.h"

namespace fused_math {

struct Real {
  float hi, lo;
};

/// a + b exactly, when |a| >= |b| or a is 0.
MATH_FN Real fast_two_sum(float a, float b) {
  float sum = a + b;
  return {sum, b - (sum - a)};
}

/// a + b exactly.
MATH_FN Real two_sum(float a, float b) {
  float sum = a + b;
  float b_seen = sum - a;
  return {sum, (a - (sum - b_seen)) + (b - b_seen)};
}

/// a * b exactly, while nothing overflows or underflows.
MATH_FN Real two_product(float a, float b) {
  float product = a * b;
  return {product, fma_float(a, b, -product)};
}

MATH_FN Real multiply(Real a, Real b) {
  Real p = two_product(a.hi, b.hi);
  return fast_two_sum(p.hi, p.lo + (a.hi * b.lo + a.lo * b.hi));
}

/// An integer step, exactly; steps from 2^48 on count as 2^48 - 1.
MATH_FN Real real_from_step(uint64_t step) {
  constexpr uint64_t kMaxExactStep = (uint64_t(1) << 48) - 1;
  if (step > kMaxExactStep) {
    step = kMaxExactStep;
  }
  float high = float(uint32_t(step >> 24)) * 16777216.0f; // 2^24
  return fast_two_sum(high, float(uint32_t(step & 0xffffff)));
}

/// scale * 2^exponent, rounded to float32 once (twice where the result is
/// subnormal). Error below 0.6 ulp, checked against float64 in the tests.
MATH_FN float scaled_exp2(Real scale, Real exponent) {
  // Beyond +-300 every float32 scale has become 0 or infinity.
  float clamped = exponent.hi > 300.0f ? 300.0f : exponent.hi < -300.0f ? -300.0f : exponent.hi;
  if (clamped != exponent.hi) {
    exponent = {clamped, 0.0f};
  }
  float whole = rint_float(exponent.hi);
  // y = ln(2) * fraction, |y| <= 0.35; the subtraction is exact.
  Real fraction = two_sum(exponent.hi - whole, exponent.lo);
  Real y = multiply(fraction, {0.693147182464599609375f, -1.904654299957767e-9f});
  // e^y = 1 + y + tail. The tail is below 0.07, so its float32 roundings cost
  // 2^-27 of the result at most; Taylor's series to y^9 leaves 2^-33.
  float x = y.hi;
  float tail = 2.7557319e-6f; // 1/9!
  tail = tail * x + 2.4801587e-5f;
  tail = tail * x + 1.9841270e-4f;
  tail = tail * x + 1.3888889e-3f;
  tail = tail * x + 8.3333333e-3f;
  tail = tail * x + 4.1666668e-2f;
  tail = tail * x + 1.6666667e-1f;
  tail = tail * x + 0.5f;
  tail = tail * (x * x);
  Real power = two_sum(1.0f, y.hi);
  power = fast_two_sum(power.hi, power.lo + (y.lo + tail));
  Real result = multiply(scale, power);
  // 2^whole in three factors, each a normal float32, so that neither a huge
  // scale nor a subnormal result is lost on the way.
  int n = int(whole);
  int third = n / 3;
  float factor = bits_to_float(uint32_t(third + 127) << 23);
  float last = bits_to_float(uint32_t(n - 2 * third + 127) << 23);
  float rounded = result.hi + result.lo;
  return ((rounded * factor) * factor) * last;
}

} // namespace fused_math
