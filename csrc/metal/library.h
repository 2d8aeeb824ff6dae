// The compiled Metal kernels, by name.
#pragma once

#include <string>

#include "mlx/array.h"
#include "mlx/backend/metal/device.h"

namespace mlx_fused_optim::metal {

namespace mx = mlx::core;

/// A kernel of metal/. The first call compiles the source, which takes a moment; throws
/// std::runtime_error with the compiler's message and the way round it when that fails.
MTL::ComputePipelineState* kernel(mx::metal::Device& device, const std::string& name);

/// A kernel of the plain step, specialised for its options (fused_math::SgdFlags).
MTL::ComputePipelineState* step_kernel(
    mx::metal::Device& device,
    const std::string& name,
    uint32_t flags,
    uint32_t tile_columns);

/// The kernel of the full step, specialised for its options and for what is in memory
/// (fused_math::Format).
MTL::ComputePipelineState* full_kernel(
    mx::metal::Device& device,
    uint32_t flags,
    uint32_t parameter_format,
    uint32_t gradient_format,
    uint32_t velocity_format,
    uint32_t tile_columns);

/// How wide the tiles of transposed gradients are: MLX_FUSED_OPTIM_METAL_TILE, for
/// benchmarks, or kTileColumns.
uint32_t tile_columns();

/// How many threads a threadgroup of it has. Throws where a GPU has too few.
size_t threads_for(MTL::ComputePipelineState* kernel);

/// "float32", "float16" or "bfloat16", as in the kernels' names.
std::string name_of(mx::Dtype dtype);
/// The same as a fused_math::Format.
uint32_t format_of(mx::Dtype dtype);

} // namespace mlx_fused_optim::metal
