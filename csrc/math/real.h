// A real number as the sum of two float32, about 48 bits: enough to carry
// step * log2(rate) for steps up to 2^48 and still know the result to the last
// bit of float32. The algorithms are Dekker's and Knuth's error-free
// transformations (T. J. Dekker, Numer. Math. 18, 1971).
#pragma once

#include "portability.h"

namespace fused_math {

struct Real {
  float hi, lo; // hi is the sum rounded to float32
};

/// Out of constant memory, which has no references to plain values in Metal.
MATH_FN Real load(MATH_CONSTANT Real& x) { return {x.hi, x.lo}; }

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

// The relative error of each operation is below 2^-44, also where add cancels.

MATH_FN Real add(Real a, Real b) {
  Real high = two_sum(a.hi, b.hi);
  Real low = two_sum(a.lo, b.lo);
  high = fast_two_sum(high.hi, high.lo + low.hi);
  return fast_two_sum(high.hi, high.lo + low.lo);
}

MATH_FN Real negate(Real a) { return {-a.hi, -a.lo}; }

MATH_FN Real multiply(Real a, Real b) {
  Real p = two_product(a.hi, b.hi);
  return fast_two_sum(p.hi, p.lo + (a.hi * b.lo + a.lo * b.hi));
}

MATH_FN Real divide(Real a, Real b) {
  float quotient = divide_float(a.hi, b.hi);
  Real rest = add(a, negate(multiply(b, {quotient, 0.0f})));
  return fast_two_sum(quotient, divide_float(rest.hi, b.hi));
}

/// An integer: exactly below 2^48, else rounded to about 48 bits.
MATH_FN Real real_from_integer(uint64_t n) {
  float high = float(uint32_t(n >> 40)) * 1099511627776.0f; // 2^40
  float middle = float(uint32_t(n >> 16) & 0xffffff) * 65536.0f; // 2^16
  Real sum = fast_two_sum(high, middle);
  return fast_two_sum(sum.hi, sum.lo + float(uint32_t(n & 0xffff)));
}

/// 2^n, for n from -126 to 127.
MATH_FN float power_of_two(int n) { return bits_to_float(uint32_t(n + 127) << 23); }

/// value * 2^exponent, so that tiny factors keep their bits until the end.
struct Scaled {
  Real value;
  int exponent;
};

/// Rounded to float32 once (twice where the result is subnormal).
MATH_FN float rounded(Scaled x) {
  // Beyond +-300 every float32 has become 0 or infinity.
  int n = x.exponent > 300 ? 300 : x.exponent < -300 ? -300 : x.exponent;
  // In three factors, each a normal float32, so that neither a huge value nor a
  // subnormal result is lost on the way.
  int third = n / 3;
  float factor = power_of_two(third);
  return (((x.value.hi + x.value.lo) * factor) * factor) * power_of_two(n - 2 * third);
}

} // namespace fused_math
