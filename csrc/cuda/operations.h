// What the backend does: see cuda/backend.h.
#pragma once

#include "cuda/backend.h"

namespace mlx_fused_optim::cuda {

void step(const Step& step);
void measure(const Measurement& measurement);
void evaluate_schedule(
    const Schedule& schedule,
    const mx::array& steps,
    mx::array& rates,
    mx::Stream stream);
void pace(mx::Stream stream);

} // namespace mlx_fused_optim::cuda
