// MLX's arithmetic on one stream.
#pragma once

#include "mlx/mlx.h"

namespace mlx_fused_optim {

namespace mx = mlx::core;

struct ComposedOperators {
  explicit ComposedOperators(mx::Stream stream) : s(stream) {}

  mx::array add(const mx::array& a, const mx::array& b) const { return mx::add(a, b, s); }
  mx::array subtract(const mx::array& a, const mx::array& b) const { return mx::subtract(a, b, s); }
  mx::array multiply(const mx::array& a, const mx::array& b) const { return mx::multiply(a, b, s); }
  mx::array divide(const mx::array& a, const mx::array& b) const { return mx::divide(a, b, s); }
  mx::array wide(const mx::array& a) const { return mx::astype(a, mx::float32, s); }

  mx::Stream s;
};

} // namespace mlx_fused_optim
