// MLX has no GPU on Linux: in this build the CPU's streams take the GPU's path.
#include "graph/measure.h"
#include "graph/step.h"
#include "mlx/backend/metal/device.h"

namespace mlx_fused_optim {

void FusedStep::eval_cpu(const std::vector<mx::array>& inputs, std::vector<mx::array>& outputs) {
  eval_gpu(inputs, outputs);
  metal_on_cpu::hold_until_completed(inputs, outputs);
}

void MeasureGradients::eval_cpu(
    const std::vector<mx::array>& inputs,
    std::vector<mx::array>& outputs) {
  eval_gpu(inputs, outputs);
}

void EvaluateSchedule::eval_cpu(const std::vector<mx::array>& inputs, mx::array& output) {
  eval_gpu(inputs, output);
}

} // namespace mlx_fused_optim
