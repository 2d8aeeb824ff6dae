// When may a step write into the memory of its own inputs?
#pragma once

#include <functional>
#include <optional>

#include "graph/step.h"

namespace mlx_fused_optim {

/// The parameters of an arena as one array that shares their memory, if they are
/// evaluated and lie there as the arena wants them: hundreds of inputs less for the graph.
/// Whoever holds a parameter also holds that memory.
std::optional<mx::array> whole_arena(
    const Arena& arena,
    const std::vector<mx::array>& parameters); // of the layout

/// Gives every output of a node its memory: that of the inputs where nobody else
/// can ever look at it again, else fresh from `allocate`. Shared by all backends.
///
/// - Momentum, and each other slot, is one array: MLX's own test for donation serves.
/// - Parameters are many arrays in one buffer. They are written in place when
///   they lie in it exactly as the arena wants them, when each of them has no
///   other holder, and when the buffer has no holder besides them.
/// - The step counter and the learning rate, where the kernel writes them, are always
///   fresh: other dispatches of the same step still read the old counter.
void set_outputs(
    const StepNode& node,
    const std::vector<mx::array>& inputs,
    std::vector<mx::array>& outputs,
    const std::function<mx::allocator::Data(size_t)>& allocate);

} // namespace mlx_fused_optim
