// Moments in one byte: kByteGroup neighbours share a scale in float32, and lie in memory as a
// row of kByteRow bytes, the scale before the codes. Rows run along the arena, whose tensors
// begin at whole groups.
//
//   signed     value = sign(q) (scale * q / 127)^2, q from -127 to 127; -128 is NaN
//   squares    value = (scale * q / 254)^2,         q from 0 to 254;     255 is NaN
//
// So codes are spent on what is small, as in FlashOptim (https://arxiv.org/abs/2602.23349), and
// neither way needs a quotient. The scale is the root of the group's largest finite magnitude,
// exactly: with one of 16 bits a second moment of beta2 0.999 changes by less than its scale can
// tell, and stays at 0.6 of what it should become (docs/precision.md). What is infinite or NaN is
// NaN, alone. A square that is not 0 is never rounded to 0, since a step divides by its root.
#pragma once

#include "rounding.h"

namespace fused_math {

enum ByteShape : uint32_t {
  kByteGroup = 64,
  kByteScale = 4, // bytes of the scale
  kByteRow = kByteScale + kByteGroup,
};

MATH_FN constexpr bool is_byte_format(uint32_t format) {
  return format == kBytes || format == kByteSquares;
}

/// The magnitude of an element, as bits, of which the largest of a group gives the scale: 0 of
/// what has no finite value.
template <typename T>
MATH_FN typename Bits<T>::type byte_peak(T x, uint32_t format) {
  using U = typename Bits<T>::type;
  const U bits = Bits<T>::of(x);
  // As a number without a sign, one with a sign is above all that are finite.
  const U magnitude = format == kByteSquares ? bits : bits & 0x7fffffffu;
  return magnitude < 0x7f800000u ? magnitude : bits & 0u;
}

/// What all elements of a group are coded with.
struct ByteScale {
  float scale; // as it is stored
  float coder; // the largest code / scale
};

/// Of a group that is not zeros, from the root of its largest magnitude.
MATH_FN ByteScale byte_scale_of(float root, uint32_t format) {
  return {root, divide_float(format == kByteSquares ? 254.0f : 127.0f, root)};
}

/// A group of less than 2^-110 is zeros, as its smallest codes would be subnormal numbers, which
/// a GPU may take for 0.
MATH_FN ByteScale byte_scale(uint32_t peak, uint32_t format) {
  const float largest = bits_to_float(peak);
  return largest < 7.703719777548943e-34f ? ByteScale{0.0f, 0.0f}
                                          : byte_scale_of(sqrt_float(largest), format);
}

/// 15 random bits as a number between -0.5 and 0.5, both apart: added before a code is rounded,
/// it makes the rounding one at random, and leaves what is a code already. (Of 16 bits, the sum
/// with a code above 128 would itself be rounded.)
template <typename T>
MATH_FN T byte_dither(typename Bits<T>::type random) {
  const typename Bits<T>::type bits = ((random & 0x7fffu) << 8) | 0x3f800080u; // from 1 to 2
  return Bits<T>::to(bits) - 1.5f;
}

/// The largest one's product with the coder may be a rounding above the largest code, and what
/// comes to it a code that means NaN.
template <typename T>
MATH_FN T at_most(T size, float most) {
  return choose(size > most, T() + most, size);
}

/// integer_base() and the code of an element that is normal and finite, and if it is a square
/// above 0, in a group that is not zeros. `root` is that of its magnitude; `dither` is 0 to round
/// to nearest even.
template <typename T>
MATH_FN T usual_byte_code(T x, T root, ByteScale scale, T dither, uint32_t format) {
  if (format == kByteSquares) {
    const T code = (at_most(root * scale.coder, 254.0f) + dither) + integer_base();
    const T least = T() + (integer_base() + 1.0f);
    return choose(code > least, code, least);
  }
  const T size = at_most(root * scale.coder, 127.0f);
  const T exact = Bits<T>::to(Bits<T>::of(size) | (Bits<T>::of(x) & 0x80000000u));
  return (exact + dither) + integer_base();
}

/// Likewise, of any element.
template <typename T>
MATH_FN T byte_code(T x, ByteScale scale, T dither, uint32_t format) {
  using U = typename Bits<T>::type;
  const U magnitude = Bits<T>::of(x) & 0x7fffffffu;
  const T zero = T() + integer_base();
  const auto is_normal = magnitude >= 0x00800000u; // as a GPU may take what is not for 0
  if (format == kByteSquares) { // whose root the rule has, too
    const T usual = usual_byte_code(x, root(x), scale, dither, format);
    const T code = choose(is_normal & (T() + scale.coder > T()), usual, zero);
    return choose((x >= T()) & (magnitude < 0x7f800000u), code, zero + 255.0f);
  }
  const T usual = usual_byte_code(x, root(Bits<T>::to(magnitude)), scale, dither, format);
  return choose(magnitude < 0x7f800000u, choose(is_normal, usual, zero), zero - 128.0f);
}

template <typename T>
MATH_FN T byte_value(T code, float scale, uint32_t format) {
  const T nan = T() + bits_to_float(0x7fc00000u);
  if (format == kByteSquares) {
    const T part = (code * 0.003937007874015748f) * scale; // of 254 exactly the scale
    return choose(code > 254.0f, nan, part * part);
  }
  const T part = (code * 0.007874015748031496f) * scale; // of 127
  return choose(code < -127.0f, nan, part * magnitude_of(part));
}

} // namespace fused_math
