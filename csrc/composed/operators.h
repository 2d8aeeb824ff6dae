// MLX's arithmetic in the place of a float's, for csrc/math/rules and the frame around them.
#pragma once

#include <variant>

#include "mlx/mlx.h"

namespace mlx_fused_optim {

namespace mx = mlx::core;

/// An array as a number of a formula. What is computed of it has its stream; a constant has none.
struct Composed {
  Composed(float constant = 0.0f) : array(constant) {}
  Composed(mx::array array, mx::StreamOrDevice s) : array(std::move(array)), s(s) {}

  mx::array array;
  mx::StreamOrDevice s = {};
};

using ComposedBinary = mx::array (*)(const mx::array&, const mx::array&, mx::StreamOrDevice);

inline Composed composed(ComposedBinary operation, const Composed& a, const Composed& b) {
  const auto s = std::holds_alternative<std::monostate>(a.s) ? b.s : a.s;
  return {operation(a.array, b.array, s), s};
}

// clang-format off
inline Composed operator+(const Composed& a, const Composed& b) { return composed(mx::add, a, b); }
inline Composed operator-(const Composed& a, const Composed& b) { return composed(mx::subtract, a, b); }
inline Composed operator*(const Composed& a, const Composed& b) { return composed(mx::multiply, a, b); }
inline Composed operator>(const Composed& a, const Composed& b) { return composed(mx::greater, a, b); }
inline Composed operator<(const Composed& a, const Composed& b) { return composed(mx::less, a, b); }
inline Composed operator!=(const Composed& a, const Composed& b) { return composed(mx::not_equal, a, b); }
inline Composed operator==(const Composed& a, const Composed& b) { return composed(mx::equal, a, b); }
inline Composed operator>=(const Composed& a, const Composed& b) { return composed(mx::greater_equal, a, b); }
inline Composed operator|(const Composed& a, const Composed& b) { return composed(mx::logical_or, a, b); }
inline Composed operator&(const Composed& a, const Composed& b) { return composed(mx::logical_and, a, b); }
// clang-format on
inline Composed operator-(const Composed& x) { return {mx::negative(x.array, x.s), x.s}; }

// Those of csrc/math that are no operators.
inline Composed quotient(const Composed& a, const Composed& b) {
  return composed(mx::divide, a, b);
}
inline Composed root(const Composed& x) { return {mx::sqrt(x.array, x.s), x.s}; }
inline Composed magnitude_of(const Composed& x) { return {mx::abs(x.array, x.s), x.s}; }
inline Composed sign_of(const Composed& x) { return {mx::sign(x.array, x.s), x.s}; }
inline Composed choose(const Composed& condition, const Composed& a, const Composed& b) {
  return {mx::where(condition.array, a.array, b.array, condition.s), condition.s};
}
inline Composed is_finite(const Composed& x) { return {mx::isfinite(x.array, x.s), x.s}; }
inline Composed cast(const Composed& x, mx::Dtype dtype) {
  return {mx::astype(x.array, dtype, x.s), x.s};
}
inline Composed wide(const Composed& x) { return cast(x, mx::float32); }

} // namespace mlx_fused_optim
