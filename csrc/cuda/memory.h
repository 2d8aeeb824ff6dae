// Device memory for the outputs of a step, and copies.
#pragma once

#include "mlx/mlx.h"

namespace mlx_fused_optim::cuda {

namespace mx = mlx::core;

/// `bytes` of MLX's own device memory: from its cache, counted by its limits, and
/// given back by mx.clear_cache(). Throws std::runtime_error where the device has
/// no more; nothing has changed then.
mx::allocator::Data allocate(size_t bytes, mx::Stream stream);

/// A copy in row-major order, which the stream makes before what is launched next.
mx::array contiguous_copy(const mx::array& a, mx::Stream stream);

} // namespace mlx_fused_optim::cuda
