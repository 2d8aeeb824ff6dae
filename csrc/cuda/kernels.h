// The compiled kernels, loaded once for each device.
#pragma once

#include <cuda.h>

#include "cuda/launch.h"

namespace mlx_fused_optim::cuda {

/// Kernels of a step: one for each dtype of parameters.
enum class Kind { flat, transposed, strided, full_tiled, full_strided };

/// All others.
enum class Other { schedule, measure_dense, measure_sparse, measure_fold, measure_finish };

/// The kernel for the device whose context is current.
CUfunction step_kernel(Kind kind, Type type, int device);
CUfunction other_kernel(Other kernel, int device);

/// One of kFullVariants, of Kind::full_tiled.
CUfunction variant_kernel(int variant, int device);

/// Throws std::runtime_error with the driver's words unless `result` is success.
void check(CUresult result, const char* what);

} // namespace mlx_fused_optim::cuda
