// The elementary functions that schedules need, in double-float arithmetic, so
// that every backend has the same bits: the libraries' own differ by some ulp.
#pragma once

#include "real.h"

namespace fused_math {

/// 2^x = (1 + excess) * 2^whole, with `excess` known relative to itself: where
/// the power is close to 1, it is what matters.
struct PowerOfTwo {
  Real excess; // -0.3 to 0.42
  int whole;
};

/// Relative error of `excess` below 2^-28.
MATH_FN PowerOfTwo exp2_parts(Real x) {
  // Beyond +-600 the power times any float32 has become 0 or infinity.
  if (x.hi > 600.0f || x.hi < -600.0f) {
    x = {x.hi > 0.0f ? 600.0f : -600.0f, 0.0f};
  }
  float whole = rint_float(x.hi);
  // y = ln(2) * fraction, |y| <= 0.35; the subtraction is exact.
  Real fraction = two_sum(x.hi - whole, x.lo);
  Real y = multiply(fraction, {0.693147182464599609375f, -1.904654299957767e-9f});
  // e^y - 1 = y + y^2/2 + tail. The tail is below 0.025 y, so its float32
  // roundings cost 2^-29; Taylor's series to y^9 leaves 2^-36.
  float z = y.hi;
  float tail = 2.7557319e-6f; // 1/9!
  tail = tail * z + 2.4801587e-5f;
  tail = tail * z + 1.9841270e-4f;
  tail = tail * z + 1.3888889e-3f;
  tail = tail * z + 8.3333333e-3f;
  tail = tail * z + 4.1666668e-2f;
  tail = tail * z + 1.6666667e-1f;
  tail = tail * (z * z * z);
  Real half_square = two_product(0.5f * z, z);
  half_square.lo += tail + z * y.lo;
  return {add(y, half_square), int(whole)};
}

/// log2(x) for 0 < x <= 1. `rest` is 1 - x, known relative to itself: where x is
/// close to 1, the logarithm is as exact as `rest`. Relative error below 2^-35.
MATH_FN Real log2_of(Real x, Real rest) {
  // x = m * 2^exponent with m from 0.7 to 1.42.
  int exponent = 0;
  Real m = x;
  Real m_minus_1 = negate(rest);
  if (x.hi < 0.7f) {
    exponent = int(float_to_bits(x.hi) >> 23) - 127;
    if (x.hi * power_of_two(-exponent) > 1.4f) {
      ++exponent;
    }
    float scale = power_of_two(-exponent);
    m = {x.hi * scale, x.lo * scale};
    m_minus_1 = add(m, {-1.0f, 0.0f});
  }
  // ln(m) = 2 atanh(z) = 2 z (1 + w/3 + w^2/5 + ...), w = z^2 <= 0.031. From w^2
  // on float32 suffices (2^-36); the series to w^7 leaves 2^-40.
  Real z = divide(m_minus_1, add(m, {1.0f, 0.0f}));
  Real w = multiply(z, z);
  float tail = 6.6666667e-2f; // 1/15
  tail = tail * w.hi + 7.6923077e-2f;
  tail = tail * w.hi + 9.0909094e-2f;
  tail = tail * w.hi + 1.1111111e-1f;
  tail = tail * w.hi + 1.4285715e-1f;
  tail = tail * w.hi + 0.2f;
  tail = tail * (w.hi * w.hi);
  Real series = multiply(w, {0.3333333432674407958984375f, -9.934107758624577e-9f});
  series.lo += tail;
  series = add({1.0f, 0.0f}, series);
  // 2 / ln(2)
  Real log2_m = multiply(multiply(z, series), {2.8853900432586669921875f, 3.851926067e-8f});
  return add({float(exponent), 0.0f}, log2_m);
}

/// 1 / sqrt(x), for normal x > 0. Relative error below 2^-44.
MATH_FN Real reciprocal_root(Real x) {
  const float y = divide_float(1.0f, sqrt_float(x.hi));
  // A step of Newton's: y + y (1 - x y^2) / 2, where the difference is small.
  const Real square = multiply(x, two_product(y, y));
  const Real rest = add({1.0f, 0.0f}, negate(square));
  return fast_two_sum(y, 0.5f * y * rest.hi);
}

/// sin(pi/2 * x) for 0 <= x <= 1/2. Relative error below 2^-31.
MATH_FN Real sine_of_quarter_turns(Real x) {
  Real angle = multiply(x, {1.57079637050628662109375f, -4.371139000186243e-8f});
  Real w = multiply(angle, angle);
  // sin(a) / a = 1 - w/6 + w^2 (1/120 - ...), w <= 0.62. The last term is below
  // 0.0032, so float32 suffices there (2^-32); the series to w^6 leaves 2^-41.
  float tail = 1.6059044e-10f; // 1/13!
  tail = tail * w.hi - 2.5052108e-8f;
  tail = tail * w.hi + 2.7557319e-6f;
  tail = tail * w.hi - 1.9841270e-4f;
  tail = tail * w.hi + 8.3333333e-3f;
  tail = tail * (w.hi * w.hi);
  Real series = multiply(w, {-0.16666667163372039794921875f, 4.967053879312289e-9f});
  series.lo += tail;
  return multiply(angle, add({1.0f, 0.0f}, series));
}

} // namespace fused_math
