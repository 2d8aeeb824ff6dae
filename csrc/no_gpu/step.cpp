// A build for machines where MLX has no GPU backend.
#include <stdexcept>

#include "graph/measure.h"
#include "graph/step.h"
#include "graph/view.h"

namespace mlx_fused_optim {

void FusedStep::eval_gpu(const std::vector<mx::array>&, std::vector<mx::array>&) {
  throw std::runtime_error(
      "[fused_step] no GPU implementation in this build: got a GPU stream, "
      "pass stream=mx.cpu or set mx.set_default_device(mx.cpu).");
}

void MeasureGradients::eval_gpu(const std::vector<mx::array>&, std::vector<mx::array>&) {
  throw std::runtime_error(
      "[fused_step] no GPU implementation in this build: got a GPU stream, "
      "pass stream=mx.cpu or set mx.set_default_device(mx.cpu).");
}

void EvaluateSchedule::eval_gpu(const std::vector<mx::array>&, mx::array&) {
  throw std::runtime_error(
      "[Schedule] no GPU implementation in this build: got a GPU stream, "
      "call the schedule on the CPU.");
}

void pace(mx::Stream) {} // never called

} // namespace mlx_fused_optim
