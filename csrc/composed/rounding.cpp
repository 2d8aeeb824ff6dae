#include "composed/rounding.h"

#include "graph/layout.h"

namespace mlx_fused_optim {

namespace {

mx::array word(uint32_t value) { return mx::array(value, mx::uint32); }
mx::array long_word(uint64_t value) { return mx::array(value, mx::uint64); }

mx::array mix64(mx::array x, mx::Stream s) {
  auto spread = [&](const mx::array& x, uint64_t shift) {
    return mx::bitwise_xor(x, mx::right_shift(x, long_word(shift), s), s);
  };
  x = mx::multiply(spread(x, 30), long_word(0xbf58476d1ce4e5b9u), s);
  x = mx::multiply(spread(x, 27), long_word(0x94d049bb133111ebu), s);
  return spread(x, 31);
}

mx::array bits_of(const mx::array& x, mx::Stream s) {
  return mx::view(mx::stop_gradient(x, s), mx::uint32, s);
}
/// Of the bits, so that no derivative goes this way.
mx::array is_nan(const mx::array& bits, mx::Stream s) {
  return mx::greater(mx::bitwise_and(bits, word(0x7fffffffu), s), word(0x7f800000u), s);
}
mx::array float_of(const mx::array& bits, mx::Stream s) { return mx::view(bits, mx::float32, s); }

/// `rounded`, with the derivative of x.
mx::array straight_through(const mx::array& x, const mx::array& rounded, mx::Stream s) {
  // Minus zero: adding it would take the sign of -0.0. Infinities have no difference.
  const auto zero = mx::subtract(mx::stop_gradient(x, s), x, s);
  return mx::where(mx::isfinite(x, s), mx::subtract(rounded, zero, s), rounded, s);
}

} // namespace

mx::array mix32_composed(mx::array x, mx::Stream s) {
  auto spread = [&](const mx::array& x, uint32_t shift) {
    return mx::bitwise_xor(x, mx::right_shift(x, word(shift), s), s);
  };
  x = mx::multiply(spread(x, 16), word(0x85ebca6bu), s);
  x = mx::multiply(spread(x, 13), word(0xc2b2ae35u), s);
  return spread(x, 16);
}

mx::array nearest_composed(const mx::array& x, mx::Dtype dtype, mx::Stream s) {
  return mx::astype(mx::astype(x, dtype, s), mx::float32, s);
}

mx::array random_composed(
    const mx::array& x,
    mx::Dtype dtype,
    const mx::array& random,
    mx::Stream s) {
  if (dtype == mx::float32) {
    return x;
  }
  const auto value = mx::stop_gradient(x, s);
  const auto bits = mx::view(value, mx::uint32, s);
  const auto low = mx::bitwise_and(random, word(0xffffu), s);
  auto rounded = value;
  if (dtype == mx::bfloat16) {
    rounded =
        mx::view(mx::bitwise_and(mx::add(bits, low, s), word(0xffff0000u), s), mx::float32, s);
  } else {
    const auto magnitude = mx::abs(value, s);
    const auto normal_bits = mx::bitwise_and(
        mx::add(mx::view(magnitude, mx::uint32, s), mx::bitwise_and(random, word(0x1fffu), s), s),
        word(0xffffe000u),
        s);
    auto normal = mx::view(normal_bits, mx::float32, s);
    normal = mx::where(
        mx::greater_equal(normal, mx::array(65536.0f), s),
        mx::array(std::numeric_limits<float>::infinity()),
        normal,
        s);
    const auto units = mx::multiply(magnitude, mx::array(0x1p24f), s);
    const auto whole = mx::floor(units, s);
    const auto fraction = mx::multiply(mx::astype(low, mx::float32, s), mx::array(0x1p-16f), s);
    const auto up = mx::greater(mx::subtract(units, whole, s), fraction, s);
    const auto subnormal = mx::multiply(
        mx::where(up, mx::add(whole, mx::array(1.0f), s), whole, s), mx::array(0x1p-24f), s);
    const auto unsigned_result =
        mx::where(mx::less(magnitude, mx::array(0x1p-14f), s), subnormal, normal, s);
    // The sign by its bit: zero has one.
    rounded = mx::view(
        mx::bitwise_or(
            mx::view(unsigned_result, mx::uint32, s),
            mx::bitwise_and(bits, word(0x80000000u), s),
            s),
        mx::float32,
        s);
  }
  // Infinity and NaN have no neighbours.
  return straight_through(x, mx::where(mx::isfinite(value, s), rounded, value, s), s);
}

mx::array as_master24_composed(
    const mx::array& x,
    const std::optional<mx::array>& random,
    mx::Stream s) {
  const auto bits = bits_of(x, s);
  const auto odd = mx::bitwise_and(mx::right_shift(bits, word(8), s), word(1), s);
  const auto more =
      random ? mx::bitwise_and(*random, word(0xffu), s) : mx::add(odd, word(0x7fu), s);
  const auto rounded = mx::bitwise_and(mx::add(bits, more, s), word(0xffffff00u), s);
  const auto nan = mx::bitwise_and(mx::bitwise_or(bits, word(0x400000u), s), word(0xffff0000u), s);
  return straight_through(x, float_of(mx::where(is_nan(bits, s), nan, rounded, s), s), s);
}

std::pair<mx::array, mx::array> parts_of_master24_composed(const mx::array& master, mx::Stream s) {
  const auto bits = bits_of(master, s);
  const auto half = word(0x8000u);
  const auto rounded = mx::where(is_nan(bits, s), bits, mx::add(bits, half, s), s);
  const auto parameter = mx::bitwise_and(rounded, word(0xffff0000u), s);
  const auto units =
      mx::right_shift(mx::add(mx::subtract(bits, parameter, s), half, s), word(8), s);
  const auto byte = mx::astype(mx::subtract(units, word(128), s), mx::int8, s);
  return {straight_through(master, float_of(parameter, s), s), byte};
}

mx::array master24_composed(const mx::array& parameter, const mx::array& byte, mx::Stream s) {
  const auto bits = bits_of(parameter, s);
  const auto units = mx::astype(mx::astype(byte, mx::int32, s), mx::uint32, s);
  const auto magnitude =
      mx::add(mx::bitwise_and(bits, word(0x7fffffffu), s), mx::left_shift(units, word(8), s), s);
  const auto sign = mx::bitwise_and(bits, word(0x80000000u), s);
  const auto valid = mx::less_equal(magnitude, word(0x7f800000u), s);
  const auto master = mx::where(valid, mx::bitwise_or(magnitude, sign, s), bits, s);
  return straight_through(parameter, float_of(master, s), s);
}

mx::array random_bits_composed(
    const mx::Shape& shape,
    size_t first,
    uint64_t seed,
    const mx::array& step,
    uint64_t place,
    mx::Stream s) {
  const uint64_t start = fused_math::mix64(seed + 0x9e3779b97f4a7c15u);
  const auto key = mix64(
      mx::bitwise_xor(mix64(mx::bitwise_xor(long_word(start), step, s), s), long_word(place), s),
      s);
  const auto low = mx::astype(mx::bitwise_and(key, long_word(0xffffffffu), s), mx::uint32, s);
  const auto high = mx::astype(mx::right_shift(key, long_word(32), s), mx::uint32, s);
  const auto size = static_cast<double>(element_count(shape));
  auto position = mx::add(
      mx::astype(mx::arange(0.0, size, mx::int64, s), mx::uint32, s),
      word(static_cast<uint32_t>(first)),
      s);
  auto random =
      mix32_composed(mx::bitwise_xor(mix32_composed(mx::add(position, low, s), s), high, s), s);
  return mx::reshape(random, shape, s);
}

} // namespace mlx_fused_optim
