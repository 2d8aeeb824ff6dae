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

/// fused_math::nearest_master24, or with random bits random_master24.
mx::array as_master24_composed(
    const mx::array& x,
    const std::optional<mx::array>& random,
    mx::Stream s);
/// Such a master's parameter, as float32, and its byte, as int8; and the master of them.
std::pair<mx::array, mx::array> parts_of_master24_composed(const mx::array& master, mx::Stream s);
mx::array master24_composed(const mx::array& parameter, const mx::array& byte, mx::Stream s);

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
