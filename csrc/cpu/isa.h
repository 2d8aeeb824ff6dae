// Which of the CPU kernels to use.
#pragma once

#include "cpu/kernel.h"

namespace mlx_fused_optim::cpu {

/// Those for this processor, or those that MLX_FUSED_OPTIM_CPU_ISA names.
const Kernels& kernels();

} // namespace mlx_fused_optim::cpu
