// The kernels, compiled when they are first asked for, and loaded once for each device.
#pragma once

#include <cuda.h>

#include "cuda/variants.h"

namespace mlx_fused_optim::cuda {

/// The kernel for the device whose context is current. Throws std::runtime_error where it
/// cannot be compiled or loaded.
CUfunction kernel(const Variant& variant, int device);

/// Throws std::runtime_error with the driver's words unless `result` is success.
void check(CUresult result, const char* what);

} // namespace mlx_fused_optim::cuda
