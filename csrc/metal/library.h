// The compiled Metal kernels, by name.
#pragma once

#include <string>

#include "mlx/array.h"
#include "mlx/backend/metal/device.h"

namespace mlx_fused_optim::metal {

namespace mx = mlx::core;

/// A kernel of metal/sgd.metal. With `flags` (fused_math::SgdFlags) it is
/// specialised for the options of a step. The first call compiles the source,
/// which takes a moment; throws std::runtime_error with the compiler's message
/// and the way round it when that fails.
MTL::ComputePipelineState* kernel(mx::metal::Device& device, const std::string& name);
MTL::ComputePipelineState* kernel(
    mx::metal::Device& device,
    const std::string& name,
    uint32_t flags);

/// "float32", "float16" or "bfloat16", as in the kernels' names.
std::string name_of(mx::Dtype dtype);

} // namespace mlx_fused_optim::metal
