#include "composed/bytes.h"

#include <limits>

#include "composed/operators.h"
#include "graph/layout.h"

namespace mlx_fused_optim {

namespace {

using namespace fused_math;

/// In groups, one a row. Flat only where a group is not whole: int32 counts no longer axis.
mx::array grouped(mx::array x, mx::StreamOrDevice s) {
  constexpr int kGroup = kByteGroup;
  if (const int rest = x.size() % kGroup) {
    x = mx::pad(mx::flatten(x, s), {{0, kGroup - rest}}, mx::array(0, x.dtype()), "constant", s);
  }
  return mx::reshape(x, {-1, kGroup}, s);
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
  const auto scale = choose(largest < 0x1p-110f, 0.0f, root(largest));
  Composed dither = 0.0f;
  if (random) {
    const auto low = mx::bitwise_and(grouped(*random, s), mx::array(0x7fffu, mx::uint32), s);
    dither = (wide({low, s}) + 0.5f) * 0x1p-15f - 0.5f;
  }
  const float most = is_squares ? 254.0f : 127.0f;
  const auto coder = choose(scale > 0.0f, quotient(most, choose(scale > 0.0f, scale, 1.0f)), 0.0f);
  const auto normal = choose(magnitude >= 0x1p-126f, magnitude, 0.0f);
  const auto product = root(normal) * coder;
  const auto size = choose(product > most, most, product);
  const auto exact = is_squares ? size : choose(x < 0.0f, -size, size);
  Composed code{mx::round((exact + dither).array, s), s};
  if (is_squares) {
    const auto least = choose((normal > 0.0f) & (scale > 0.0f), 1.0f, 0.0f);
    code = choose(code > least, code, least);
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
    const auto part = (code * 0.007874015748031496f) * scale;
    value = choose(code < -127.0f, nan, part * magnitude_of(part));
  }
  if (value.array.size() == element_count(shape)) {
    return mx::reshape(value.array, shape, s);
  }
  const int size = static_cast<int>(element_count(shape));
  return mx::reshape(mx::slice(mx::flatten(value.array, s), {0}, {size}, s), shape, s);
}

} // namespace mlx_fused_optim
