// A schedule at many steps, on a CUDA device.
#include "graph/schedule.h"

#include <algorithm>

#include "cuda/encoding.h"
#include "cuda/memory.h"
#include "cuda/operations.h"

namespace mlx_fused_optim::cuda {

void evaluate_schedule(
    const Schedule& schedule,
    const mx::array& steps,
    mx::array& rates,
    mx::Stream stream) {
  auto& encoder = mx::cu::get_command_encoder(stream);
  encoder.device().make_current();
  Variant variant{Kind::schedule};
  variant.schedules = parts_of(schedule);
  const auto function = kernel(variant, encoder.device().cuda_device());
  rates.set_data(allocate(rates.nbytes(), stream));
  if (rates.size() == 0) {
    return;
  }
  ScheduleLaunch arguments{
      schedule, mx::gpu_ptr<uint64_t>(steps), mx::gpu_ptr<float>(rates), rates.size()};
  Submission submission(encoder, 1);
  submission.reads({&steps});
  submission.writes({&rates});
  // The kernel loops: more blocks than this would not run at once on any GPU.
  const auto blocks = std::min<uint64_t>(divide_up(rates.size(), kThreads), 4096);
  submission.launch(function, static_cast<uint32_t>(blocks), kThreads, arguments);
}

} // namespace mlx_fused_optim::cuda
