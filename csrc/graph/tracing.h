// What is known of a function that MLX traces.
#pragma once

#include <vector>

#include "mlx/mlx.h"

namespace mlx_fused_optim {

namespace mx = mlx::core;

/// Whether a function is being traced: compiled, vectorised or differentiated.
bool is_tracing();

/// Whether arrays lead to a placeholder, an input of a function that is being compiled or
/// vectorised: they have no value, and never will have one outside of it. The arrays of a
/// function that is being differentiated have theirs.
bool has_placeholders(const std::vector<mx::array>& arrays);

} // namespace mlx_fused_optim
