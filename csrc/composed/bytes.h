// csrc/math/bytes.h in MLX operations.
#pragma once

#include <optional>

#include "math/bytes.h"
#include "mlx/mlx.h"

namespace mlx_fused_optim {

namespace mx = mlx::core;

/// Rows of bytes, {groups, kByteRow} of uint8, of float32 numbers: to nearest, or with
/// random bits of each (fused_math::byte_dither). What is missing of the last group is zeros.
mx::array as_bytes_composed(
    const mx::array& x,
    uint32_t format,
    const std::optional<mx::array>& random,
    mx::StreamOrDevice s);

/// The float32 numbers of rows: as many as `shape` has, the first ones.
mx::array of_bytes_composed(
    const mx::array& rows,
    const mx::Shape& shape,
    uint32_t format,
    mx::StreamOrDevice s);

} // namespace mlx_fused_optim
