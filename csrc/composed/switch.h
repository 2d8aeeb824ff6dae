// A switch for the user: plain MLX operations instead of our kernels.
#pragma once

namespace mlx_fused_optim {

/// Whether the environment variable MLX_FUSED_OPTIM_COMPOSED is 1: then steps
/// consist of MLX operations, on every device, and schedules are evaluated by the
/// CPU. It is the way on for a machine that cannot run the kernels, and it is
/// never taken silently. Throws std::invalid_argument for anything but 0 or 1.
bool composed_is_asked_for();

} // namespace mlx_fused_optim
