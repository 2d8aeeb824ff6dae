// The CUDA part is a library of its own, because it needs symbols that only an
// MLX with CUDA has: one wheel serves machines with and without. This is all that
// the extension knows of it.
#pragma once

#include <functional>

#include "graph/measure.h"
#include "graph/step.h"

namespace mlx_fused_optim::cuda {

/// Allocates device memory on behalf of set_outputs.
using Allocate = std::function<mx::allocator::Data(size_t bytes)>;

/// A step to evaluate, and what the backend needs the extension for.
struct Step {
  const StepNode& node;
  const std::vector<StepInputs>& inputs; // by plan, as the outputs
  /// To be called once everything else that can fail on these inputs has been done.
  std::function<std::vector<StepOutputs>(const Allocate&)> set_outputs;
  mx::Stream stream;
};

/// A measurement to evaluate.
struct Measurement {
  const MeasurePlan& plan;
  const MeasureInputs& inputs;
  mx::array& measured;
  mx::array& skipped;
  mx::Stream stream;
};

struct Backend {
  void (*step)(const Step& step);

  void (*measure)(const Measurement& measurement);

  void (*evaluate_schedule)(
      const Schedule& schedule,
      const mx::array& steps,
      mx::array& rates,
      mx::Stream stream);

  void (*pace)(mx::Stream stream); // see graph/view.h
};

/// The backend, loaded at the first call. Throws std::runtime_error, with the
/// loader's reason, where it cannot be: every time it is called, as nothing
/// about that can change within a process.
const Backend& backend();

/// The one symbol of the library, and its name.
constexpr const char* kLibrary = "libmlx_fused_optim_cuda.so";
constexpr const char* kEntry = "mlx_fused_optim_cuda_backend";
using Entry = const Backend* (*)();

} // namespace mlx_fused_optim::cuda
