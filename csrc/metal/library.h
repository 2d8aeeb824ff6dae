// The compiled Metal kernels, by name.
#pragma once

#include <string>

#include "graph/step.h"
#include "mlx/array.h"
#include "mlx/backend/metal/device.h"

namespace mlx_fused_optim::metal {

namespace mx = mlx::core;

/// A kernel of metal/. The first call compiles the source, which takes a moment; throws
/// std::runtime_error with the compiler's message and the way round it when that fails.
MTL::ComputePipelineState* kernel(mx::metal::Device& device, const std::string& name);

/// The kernel of a step, specialised for its rule and options, and for what is in memory.
MTL::ComputePipelineState* step_kernel(
    mx::metal::Device& device,
    const ArenaSlots& kept,
    mx::Dtype gradient,
    uint32_t tile_columns);

/// How wide the tiles of transposed gradients are: MLX_FUSED_OPTIM_METAL_TILE, for
/// benchmarks, or kTileColumns.
uint32_t tile_columns();

/// How many threads a threadgroup of it has. Throws where a GPU has too few.
size_t threads_for(MTL::ComputePipelineState* kernel);

} // namespace mlx_fused_optim::metal
