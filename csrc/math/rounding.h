// Rounding float32 to the numbers of a narrower format, in integers: to nearest
// even, or up or down at random with the mean of the number itself. The result is
// still a float32, which the backend then stores without another rounding.
#pragma once

#include "portability.h"

namespace fused_math {

enum Format : uint32_t {
  kFloat32 = 0,
  kFloat16 = 1,
  kBfloat16 = 2,
  kInt8 = 3, // -128 to 127; only of numbers that are such integers
  kBytes = 4, // of bytes.h: a byte and its share of a scale, as the next
  kByteSquares = 5,
};

/// What there is no operator for: the bits of a float, roots and quotients. The CPU kernel
/// adds those of its vectors.
template <typename T>
struct Bits;
template <>
struct Bits<float> {
  using type = uint32_t;
  MATH_MEMBER type of(float x) { return float_to_bits(x); }
  MATH_MEMBER float to(type bits) { return bits_to_float(bits); }
  MATH_MEMBER float root(float x) { return sqrt_float(x); }
  MATH_MEMBER float quotient(float a, float b) { return divide_float(a, b); }
};

template <typename T>
MATH_FN T root(T x) {
  return Bits<T>::root(x);
}

template <typename T>
MATH_FN T quotient(T a, T b) {
  return Bits<T>::quotient(a, b);
}

template <typename C, typename T>
MATH_FN T choose(C condition, T a, T b) {
  return condition ? a : b;
}

template <typename T>
MATH_FN T magnitude_of(T x) {
  return Bits<T>::to(Bits<T>::of(x) & 0x7fffffffu);
}

/// To nearest even.
template <typename T>
MATH_FN T nearest_bfloat16(T x) {
  using U = typename Bits<T>::type;
  const U bits = Bits<T>::of(x);
  const U rounded = bits + 0x7fffu + (bits >> 16 & 1u);
  const U nan = bits | 0x400000u;
  return Bits<T>::to(((bits & 0x7fffffffu) > 0x7f800000u ? nan : rounded) & 0xffff0000u);
}

/// Up with the probability of the part that is cut off: the low 16 bits decide,
/// against 16 random ones.
template <typename T>
MATH_FN T random_bfloat16(T x, typename Bits<T>::type random) {
  using U = typename Bits<T>::type;
  const U bits = Bits<T>::of(x);
  const U rounded = bits + (random & 0xffffu);
  const U nan = bits | 0x400000u;
  return Bits<T>::to(((bits & 0x7fffffffu) > 0x7f800000u ? nan : rounded) & 0xffff0000u);
}

/// float16 has 13 bits less than float32 down to 2^-14, and below that multiples
/// of 2^-24; from `infinite` on it has no more numbers.
template <typename T>
MATH_FN T as_float16(
    typename Bits<T>::type bits,
    typename Bits<T>::type rounded,
    T subnormal,
    uint32_t infinite) {
  using U = typename Bits<T>::type;
  const U magnitude = bits & 0x7fffffffu;
  const U sign = bits & 0x80000000u;
  const U zero = bits & 0u;
  U result = magnitude < 0x38800000u ? Bits<T>::of(subnormal) : (rounded & 0xffffe000u);
  result = magnitude >= infinite || result >= 0x47800000u ? zero + 0x7f800000u : result;
  const U nan = (magnitude | 0x400000u) & 0xffffe000u;
  result = magnitude > 0x7f800000u ? nan : result;
  return Bits<T>::to(result | sign);
}

template <typename T>
MATH_FN T nearest_float16(T x) {
  using U = typename Bits<T>::type;
  const U magnitude = Bits<T>::of(x) & 0x7fffffffu;
  // The last bit of 0.5 is 2^-24.
  const T subnormal = (magnitude_of(x) + 0.5f) - 0.5f;
  return as_float16<T>(
      Bits<T>::of(x), magnitude + 0xfffu + (magnitude >> 13 & 1u), subnormal, 0x477ff000u);
}

template <typename T>
MATH_FN T random_float16(T x, typename Bits<T>::type random) {
  using U = typename Bits<T>::type;
  const U magnitude = Bits<T>::of(x) & 0x7fffffffu;
  // In units of 2^-24, below 2^10: whole ones, and the rest against a random
  // fraction, made of 16 bits as a number in [1, 2). So the mean is right but for
  // 2^-16 of a unit.
  const T units = magnitude_of(x) * 16777216.0f;
  const T nearest = (units + 8388608.0f) - 8388608.0f;
  const T whole = nearest > units ? nearest - 1.0f : nearest;
  const T fraction = Bits<T>::to(((random & 0xffffu) << 7) | 0x3f800000u) - 1.0f;
  const T up = whole + 1.0f;
  const T subnormal = (units - whole > fraction ? up : whole) * 5.9604644775390625e-8f;
  return as_float16<T>(Bits<T>::of(x), magnitude + (random & 0x1fffu), subnormal, 0x47800000u);
}

/// To one of the halves; nothing else is rounded here.
template <typename T>
MATH_FN T round_nearest(T x, uint32_t format) {
  return format == kFloat16 ? nearest_float16(x) : format == kBfloat16 ? nearest_bfloat16(x) : x;
}

/// `random` has 16 bits that count.
template <typename T>
MATH_FN T round_random(T x, uint32_t format, typename Bits<T>::type random) {
  return format == kFloat16 ? random_float16(x, random)
      : format == kBfloat16 ? random_bfloat16(x, random)
                            : x;
}

// ---- A master in 24 bits -------------------------------------------------------
//
// A float32 without its last eight bits is a bfloat16, the nearest, and an integer of eight
// bits: their difference, as integers. That holds across powers of two, for subnormals and
// for infinity; so there is no scale. A tie goes away from zero, which the integer can tell.

/// What a master of 24 bits keeps of x: to nearest even, or against eight random bits.
template <typename T>
MATH_FN T as_master24(T x, typename Bits<T>::type rounded) {
  using U = typename Bits<T>::type;
  const U bits = Bits<T>::of(x);
  const U nan = (bits | 0x400000u) & 0xffff0000u;
  return Bits<T>::to((bits & 0x7fffffffu) > 0x7f800000u ? nan : rounded & 0xffffff00u);
}
template <typename T>
MATH_FN T nearest_master24(T x) {
  const typename Bits<T>::type bits = Bits<T>::of(x);
  return as_master24(x, bits + 0x7fu + (bits >> 8 & 1u));
}
template <typename T>
MATH_FN T random_master24(T x, typename Bits<T>::type random) {
  return as_master24(x, Bits<T>::of(x) + (random & 0xffu));
}

/// The parameter of a master of 24 bits.
template <typename T>
MATH_FN T parameter_of_master24(T master) {
  using U = typename Bits<T>::type;
  const U bits = Bits<T>::of(master);
  return Bits<T>::to(((bits & 0x7fffffffu) > 0x7f800000u ? bits : bits + 0x8000u) & 0xffff0000u);
}

/// Added to an integer of up to 22 bits, as a number, it leaves the integer's bits at the end.
MATH_FN float integer_base() { return 12582912.0f; } // 1.5 * 2^23
MATH_FN uint32_t integer_base_bits() { return 0x4b400000u; }

/// What tells a master of 24 bits from its parameter.
template <typename T>
MATH_FN T byte_of_master24(T master, T parameter) {
  using U = typename Bits<T>::type;
  // From -128 to 127 in units of 256: a base makes it positive, for the shift.
  const U difference = Bits<T>::of(master) - Bits<T>::of(parameter) + 0x8000u;
  return Bits<T>::to((difference >> 8) + (integer_base_bits() - 128u)) - integer_base();
}

/// The master again. A parameter that was set from outside may have a byte that no master
/// of its own has left: that of 0 or infinity would make it NaN, and counts as none.
template <typename T>
MATH_FN T master24_of(T parameter, T byte) {
  using U = typename Bits<T>::type;
  const U bits = Bits<T>::of(parameter);
  const U units = Bits<T>::of(byte + integer_base()) - integer_base_bits();
  const U magnitude = (bits & 0x7fffffffu) + (units << 8);
  return Bits<T>::to(magnitude > 0x7f800000u ? bits : magnitude | (bits & 0x80000000u));
}

// ---- Random bits from a counter ----------------------------------------------

/// Which random numbers a step uses.
struct RandomKey {
  uint32_t first, second;
};

/// The finaliser of SplitMix64 (Steele, Lea and Flood, OOPSLA 2014).
MATH_FN uint64_t mix64(uint64_t x) {
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
  return x ^ (x >> 31);
}

/// One key for a seed, a step and a place (the arena). The first position is `begin` of the
/// place, of which this may be a part.
MATH_FN RandomKey random_key(uint64_t seed, uint64_t step, uint64_t place, uint32_t begin) {
  const uint64_t key = mix64(mix64(mix64(seed + 0x9e3779b97f4a7c15u) ^ step) ^ place);
  return {uint32_t(key) + begin, uint32_t(key >> 32)};
}

/// The finaliser of MurmurHash3: a bijection that spreads every bit.
template <typename U>
MATH_FN U mix32(U x) {
  x = (x ^ (x >> 16)) * 0x85ebca6bu;
  x = (x ^ (x >> 13)) * 0xc2b2ae35u;
  return x ^ (x >> 16);
}

/// 32 random bits for the element at a position; one number for each position
/// below 2^32, so that over all of them none is more frequent than another.
template <typename U>
MATH_FN U random_bits(U position, RandomKey key) {
  return mix32(mix32(position + key.first) ^ key.second);
}

} // namespace fused_math
