// A loop over a range on all cores.
#pragma once

#include <cstddef>
#include <functional>

namespace mlx_fused_optim::cpu {

/// Calls body(begin, end) for disjoint pieces that cover [0, size), on several
/// threads when each can have at least `grain` of it; returns when all are done.
/// Pieces have at least a quarter of `grain`, but for the last.
/// The number of threads is that of the cores this process may use, or the
/// environment variable MLX_FUSED_OPTIM_NUM_THREADS.
void parallel_for(size_t size, size_t grain, const std::function<void(size_t, size_t)>& body);

} // namespace mlx_fused_optim::cpu
