#include "composed/bytes.h"

#include <limits>

#include "composed/operators.h"

namespace mlx_fused_optim {

namespace {

using namespace fused_math;

/// In groups, one a row.
mx::array grouped(const mx::array& x, mx::StreamOrDevice s) {
  const int group = kByteGroup, size = static_cast<int>(x.size());
  const auto flat = mx::reshape(x, {size}, s);
  const int missing = (group - size % group) % group;
  return mx::reshape(
      missing ? mx::pad(flat, {{0, missing}}, mx::array(0, x.dtype()), "constant", s) : flat,
      {-1, group},
      s);
}

} // namespace

mx::array as_bytes_composed(
    const mx::array& given,
    uint32_t format,
    const std::optional<mx::array>& random,
    mx::StreamOrDevice s) {
  const bool is_squares = format == kByteSquares;
  const Composed x{grouped(mx::stop_gradient(wide({given, s}).array, s), s), s};
  const auto has_value = is_squares ? is_finite(x) & (x >= 0.0f) : is_finite(x);
  const auto magnitude = choose(has_value, magnitude_of(x), 0.0f);
  const Composed largest{mx::max(magnitude.array, 1, true, s), s};
  const auto scale = choose(
      largest < (is_squares ? 0x1p-100f : 0x1p-110f), 0.0f, is_squares ? root(largest) : largest);
  Composed dither = 0.0f;
  if (random) {
    const auto low = mx::bitwise_and(grouped(*random, s), mx::array(0xffffu, mx::uint32), s);
    dither = (wide({low, s}) + 0.5f) * 0x1p-16f - 0.5f;
  }
  const Composed some = choose(scale > 0.0f, scale, 1.0f);
  auto rounded = [&](const Composed& code) -> Composed { return {mx::round(code.array, s), s}; };
  Composed code;
  if (is_squares) {
    const auto nearest = rounded(root(magnitude) * quotient(254.0f, some) + dither);
    const auto least = choose(magnitude >= 0x1p-126f, 1.0f, 0.0f);
    code = choose(scale > 0.0f, choose(nearest > least, nearest, least), 0.0f);
  } else {
    const auto companded = quotient(choose(has_value, x, 0.0f), 0.5f * some + 0.5f * magnitude);
    code = choose(scale > 0.0f, rounded(companded * 127.0f + dither), 0.0f);
  }
  code = choose(has_value, code, is_squares ? 255.0f : -128.0f);
  const auto bytes = mx::bitwise_and(cast(code, mx::int32).array, mx::array(0xff, mx::int32), s);
  return mx::concatenate(
      {mx::view(mx::contiguous(scale.array, false, s), mx::uint8, s),
       mx::astype(bytes, mx::uint8, s)},
      1,
      s);
}

mx::array of_bytes_composed(
    const mx::array& rows,
    const mx::Shape& shape,
    uint32_t format,
    mx::StreamOrDevice s) {
  const int groups = rows.shape(0), first = kByteScale, end = kByteRow;
  const auto scales = mx::contiguous(mx::slice(rows, {0, 0}, {groups, first}, s), false, s);
  const Composed scale{mx::view(scales, mx::float32, s), s};
  const Composed byte = wide({mx::slice(rows, {0, first}, {groups, end}, s), s});
  const Composed nan = std::numeric_limits<float>::quiet_NaN();
  Composed value;
  if (format == kByteSquares) {
    const auto part = (byte * 0.003937007874015748f) * scale;
    value = choose(byte > 254.0f, nan, part * part);
  } else {
    const auto code = choose(byte > 127.0f, byte - 256.0f, byte);
    const auto whole = quotient(code, 254.0f - magnitude_of(code)) * scale;
    value = choose(code < -127.0f, nan, whole);
  }
  int size = 1;
  for (auto length : shape) {
    size *= length;
  }
  const auto flat = mx::reshape(value.array, {-1}, s);
  return mx::reshape(mx::slice(flat, {0}, {size}, s), shape, s);
}

} // namespace mlx_fused_optim
