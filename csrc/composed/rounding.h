// csrc/math/rounding.h in MLX operations. The derivative of a rounding is taken to be 1.
#pragma once

#include "math/rounding.h"
#include "mlx/mlx.h"

namespace mlx_fused_optim {

namespace mx = mlx::core;

/// A float32 array rounded to the numbers of `dtype`, still float32.
mx::array nearest_composed(const mx::array& x, mx::Dtype dtype, mx::Stream s);
mx::array random_composed(
    const mx::array& x,
    mx::Dtype dtype,
    const mx::array& random, // uint32
    mx::Stream s);

/// fused_math::mix32.
mx::array mix32_composed(mx::array x, mx::Stream s);

/// fused_math::random_bits for `shape` elements from `first` on, with the key of a seed,
/// a step (uint64 scalar) and a place.
mx::array random_bits_composed(
    const mx::Shape& shape,
    size_t first,
    uint64_t seed,
    const mx::array& step,
    uint64_t place,
    mx::Stream s);

} // namespace mlx_fused_optim
