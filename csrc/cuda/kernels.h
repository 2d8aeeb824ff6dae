// The compiled kernels, loaded once for each device.
#pragma once

#include <cuda.h>

#include "cuda/launch.h"

namespace mlx_fused_optim::cuda {

enum class Kind { flat, transposed, strided };

/// The kernel for the device whose context is current.
CUfunction step_kernel(Kind kind, Type type, int device);
CUfunction schedule_kernel(int device);

/// Throws std::runtime_error with the driver's words unless `result` is success.
void check(CUresult result, const char* what);

} // namespace mlx_fused_optim::cuda
