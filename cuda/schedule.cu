// The kernel of a schedule at many steps.
#pragma once

#include "common.cuh"

namespace mlx_fused_optim::cuda {
namespace {

template <typename Known>
__device__ void run(const ScheduleLaunch& launch) {
  const uint64_t stride = uint64_t(gridDim.x) * blockDim.x;
  for (uint64_t i = uint64_t(blockIdx.x) * blockDim.x + threadIdx.x; i < launch.size; i += stride) {
    launch.rates[i] = fused_math::schedule_value(launch.schedule, launch.steps[i]);
  }
}

} // namespace
} // namespace mlx_fused_optim::cuda
