// A step on a CUDA device: pointers are gathered, launches go to MLX's encoder of the
// stream, which makes a CUDA graph of them or not.
#include "sgd.h"

#include "cuda/encoding.h"
#include "cuda/launches.h"
#include "cuda/memory.h"
#include "cuda/operations.h"

namespace mlx_fused_optim::cuda {

namespace {

/// MLX lets go of the buffers of finished work on a thread of its own, and mx.eval
/// does not wait for that. A step that follows at once would find its arenas held
/// and move to fresh ones. Waits, but only where nothing else is to be done.
void let_go_of_finished_work(
    mx::cu::CommandEncoder& encoder,
    const SgdPlan& plan,
    const SgdInputs& in) {
  auto uses = [](const mx::array& a) {
    return static_cast<size_t>(a.data_shared_ptr().use_count());
  };
  bool held = plan.tensor_count() > 0 && uses(in.parameters[0]) > plan.parameter_inputs();
  for (auto* slot : in.slots) {
    held |= slot && uses(*slot) > 1;
  }
  if (held && has_nothing_to_do(encoder)) {
    encoder.synchronize();
  }
}

/// Fewer bytes than these take less time on the device than a launch of their own.
constexpr size_t kWorthALaunch = size_t(4) << 20;

} // namespace

void step(const Step& step) {
  auto& plan = step.plan;
  auto& in = step.inputs;
  auto& encoder = mx::cu::get_command_encoder(step.stream);
  encoder.device().make_current();
  const int device = encoder.device().cuda_device();
  const auto launches =
      plan.is_plain() ? plain_launches(plan, in, device) : full_launches(plan, in, device);

  let_go_of_finished_work(encoder, plan, in);
  const auto out = step.set_outputs([&](size_t bytes) { return allocate(bytes, step.stream); });
  set_inputs(encoder, in.parameters, plan.parameter_inputs() + plan.tensor_count());
  set_inputs(encoder, {in.step, in.given, in.measured, in.groups});
  set_outputs(encoder, {out.parameters, out.step, out.used});
  for (int slot = 0; slot < kSlots; ++slot) {
    set_inputs(encoder, {in.slots[slot]});
    set_outputs(encoder, {out.slots[slot]});
  }
  side_by_side(encoder, launches->count(), [&] { launches->launch(encoder, in, out); });

  // The device has nothing to do: it starts while the host goes on to the views.
  if (plan.arena->size * plan.arena->dtype.size() >= kWorthALaunch && is_idle(encoder)) {
    encoder.commit();
  }
}

constexpr Backend kBackend = {step, measure, evaluate_schedule};

extern "C" __attribute__((visibility("default"))) const Backend* mlx_fused_optim_cuda_backend() {
  return &kBackend;
}

} // namespace mlx_fused_optim::cuda
