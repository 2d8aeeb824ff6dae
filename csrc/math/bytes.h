// Moments in one byte: kByteGroup neighbours share a scale in float32, and lie in memory as a
// row of kByteRow bytes, the scale before the codes. Rows run along the arena, whose tensors
// begin at whole groups.
//
//   signed     value = scale * q / (254 - |q|), q from -127 to 127; -128 is NaN
//   squares    value = (scale * q / 254)^2,     q from 0 to 254;     255 is NaN
//
// So the companding x -> 2x / (1 + |x|) of the one and the root of the other, as in FlashOptim
// (https://arxiv.org/abs/2602.23349), spend codes on what is small. The scale is the group's
// largest finite magnitude, or its root, exactly: with one of 16 bits a second moment of beta2
// 0.999 changes by less than its scale can tell, and stays at 0.6 of what it should become
// (docs/precision.md). What is infinite or NaN is NaN, alone. A square that is not 0 is never
// rounded to 0, since a step divides by its root.
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
  float coder; // signed: half the scale; squares: 254 / scale
};

/// A group of less than 2^-110, or 2^-100 of squares, is zeros. So no subnormal number counts,
/// which a GPU may take for 0.
MATH_FN ByteScale byte_scale(uint32_t peak, uint32_t format) {
  const float largest = bits_to_float(peak);
  if (format == kByteSquares) {
    const float scale = sqrt_float(largest);
    return largest < 7.888609052210118e-31f ? ByteScale{0.0f, 0.0f}
                                            : ByteScale{scale, divide_float(254.0f, scale)};
  }
  return largest < 7.703719777548943e-34f ? ByteScale{0.0f, bits_to_float(0x7f800000u)}
                                          : ByteScale{largest, 0.5f * largest};
}

/// 16 random bits as a number between -0.5 and 0.5, both apart: added before a code is rounded,
/// it makes the rounding one at random, and leaves what is a code already.
template <typename T>
MATH_FN T byte_dither(typename Bits<T>::type random) {
  const typename Bits<T>::type bits = ((random & 0xffffu) << 7) | 0x3f800040u; // from 1 to 2
  return Bits<T>::to(bits) - 1.5f;
}

/// The code of an element, an integer; `dither` is 0 to round to nearest even.
template <typename T>
MATH_FN T byte_code(T x, ByteScale scale, T dither, uint32_t format) {
  using U = typename Bits<T>::type;
  const U bits = Bits<T>::of(x);
  const T zero = T();
  if (format == kByteSquares) {
    const T code = ((root(x) * scale.coder + dither) + integer_base()) - integer_base();
    const T least = choose((x >= 1.17549435e-38f) & (zero + scale.coder > 0.0f), zero + 1.0f, zero);
    const T finite = choose(code > least, code, least);
    return choose((x >= 0.0f) & ((bits & 0x7fffffffu) < 0x7f800000u), finite, zero + 255.0f);
  }
  // 2x / (scale + |x|), of halves, whose sum is finite.
  const T companded = quotient(x, scale.coder + 0.5f * magnitude_of(x));
  const T code = ((companded * 127.0f + dither) + integer_base()) - integer_base();
  return choose((bits & 0x7fffffffu) < 0x7f800000u, code, zero - 128.0f);
}

template <typename T>
MATH_FN T byte_value(T code, float scale, uint32_t format) {
  const T nan = T() + bits_to_float(0x7fc00000u);
  if (format == kByteSquares) {
    const T part = (code * 0.003937007874015748f) * scale; // of 254 exactly the scale
    return choose(code > 254.0f, nan, part * part);
  }
  const T value = quotient(code, 254.0f - magnitude_of(code)) * scale;
  return choose(code < -127.0f, nan, value);
}

} // namespace fused_math
