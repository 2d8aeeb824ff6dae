// Evaluation on the CPU: pointers are gathered now, the work is queued on the
// stream's thread.
#include "sgd.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <memory>
#include <string>

#include "cpu/kernel.h"
#include "cpu/parallel.h"
#include "donation.h"
#include "mlx/backend/cpu/encoder.h"

namespace mlx_fused_optim {

namespace {

using cpu::Source;
using cpu::Type;

// Elements a thread must have to be worth waking: about 30 us of memory traffic.
constexpr size_t kGrain = 32768;

Type type_of(mx::Dtype dtype) {
  return dtype == mx::float32 ? Type::float32
      : dtype == mx::float16  ? Type::float16
                              : Type::bfloat16;
}

/// The kernel for this processor, or the one that MLX_FUSED_OPTIM_CPU_ISA names.
cpu::UpdateFunction choose_update() {
#if defined(__x86_64__)
  const char* text = std::getenv("MLX_FUSED_OPTIM_CPU_ISA");
  const std::string wanted = text ? text : "avx512";
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("f16c");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") &&
      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl");
  if (avx512 && wanted == "avx512") {
    return cpu::update_avx512;
  }
  if (avx2 && wanted != "baseline") {
    return cpu::update_avx2;
  }
#endif
  return cpu::update_baseline;
}

/// Shape and strides outlive the array's descriptor, which MLX may drop first.
struct StridedArray {
  mx::Shape shape;
  mx::Strides strides;
  cpu::Strided form;
};

/// Everything the queued work needs, by pointer: MLX keeps the buffers alive
/// until the stream has passed this step.
struct Task {
  std::vector<cpu::Tensor> tensors;
  std::vector<size_t> ends; // running sum of the sizes
  std::deque<StridedArray> strided; // of the sources that are not contiguous
  std::vector<std::pair<char*, size_t>> gaps; // fresh memory between tensors
  SgdControl control;
  const uint64_t* step;
  const float* given;
  uint64_t* step_out;
  float* used_out;

  /// The array from element `first` on.
  Source source(const mx::array& a, size_t first = 0) {
    if (a.flags().row_contiguous || a.size() == 0) {
      return {a.data<char>() + first * a.itemsize(), nullptr, type_of(a.dtype())};
    }
    auto& s = strided.emplace_back(StridedArray{a.shape(), a.strides(), {}});
    s.form = {first, a.ndim(), s.shape.data(), s.strides.data()};
    return {a.data<void>(), &s.form, type_of(a.dtype())};
  }

  /// Memory between tensors is saved with the state: it must not be garbage.
  void clear_gaps(const SgdPlan& plan, char* arena) {
    const size_t itemsize = plan.arena->dtype.size();
    for (size_t i = 0; i < tensors.size(); ++i) {
      const size_t end = plan.arena->offsets[i] + tensors[i].size;
      const size_t next = i + 1 < tensors.size() ? plan.arena->offsets[i + 1] : plan.arena->size;
      if (next > end) {
        gaps.emplace_back(arena + end * itemsize, (next - end) * itemsize);
      }
    }
  }

  void run() const;
};

void Task::run() const {
  static const cpu::UpdateFunction update = choose_update();
  const auto hyper = fused_math::sgd_hyper(control, *step, given);
  if (step_out) {
    *step_out = *step + 1;
    used_out[fused_math::kLearningRate] = hyper.learning_rate;
    used_out[fused_math::kMomentumFactor] = hyper.momentum;
    used_out[fused_math::kWeightDecayFactor] = hyper.weight_decay;
  }
  for (auto [begin, bytes] : gaps) {
    std::memset(begin, 0, bytes);
  }
  if (tensors.empty()) {
    return;
  }
  cpu::parallel_for(ends.back(), kGrain, [&](size_t begin, size_t end) {
    size_t t = std::upper_bound(ends.begin(), ends.end(), begin) - ends.begin();
    for (; begin < end; ++t) {
      const size_t first = ends[t] - tensors[t].size;
      const size_t last = std::min(end, ends[t]);
      update(tensors[t], begin - first, last - first, hyper, control.flags);
      begin = last;
    }
  });
}

} // namespace

void FusedSGD::eval_cpu(const std::vector<mx::array>& inputs, std::vector<mx::array>& outputs) {
  set_outputs(plan_, inputs, outputs, [](size_t bytes) { return mx::allocator::malloc(bytes); });
  SgdInputs in(plan_, inputs);
  SgdOutputs out(plan_, outputs);

  auto task = std::make_shared<Task>();
  task->control = plan_.control;
  task->step = in.step.data<uint64_t>();
  task->given = in.given ? in.given->data<float>() : nullptr;
  task->step_out = out.step ? out.step->data<uint64_t>() : nullptr;
  task->used_out = out.used ? out.used->data<float>() : nullptr;

  const size_t n = plan_.tensor_count();
  const size_t itemsize = plan_.arena->dtype.size();
  task->tensors.reserve(n);
  task->ends.reserve(n);
  auto at = [&](mx::array& arena, size_t offset) { return arena.data<char>() + offset * itemsize; };
  for (size_t i = 0; i < n; ++i) {
    const size_t offset = plan_.arena->offsets[i];
    cpu::Tensor tensor{};
    tensor.size = in.parameters[i].size();
    tensor.parameter = task->source(in.parameters[i]);
    tensor.gradient = task->source(in.gradients[i]);
    tensor.parameter_out = at(*out.parameters, offset);
    if (plan_.has_momentum()) {
      tensor.velocity = task->source(*in.momentum, offset);
      tensor.velocity_out = at(*out.momentum, offset);
    }
    task->ends.push_back((i ? task->ends.back() : 0) + tensor.size);
    task->tensors.push_back(tensor);
  }
  if (out.parameters && out.parameters->data_shared_ptr() != in.parameters[0].data_shared_ptr()) {
    task->clear_gaps(plan_, out.parameters->data<char>());
  }
  if (out.momentum && out.momentum->data_shared_ptr() != in.momentum->data_shared_ptr()) {
    task->clear_gaps(plan_, out.momentum->data<char>());
  }

  auto& encoder = mx::cpu::get_command_encoder(stream());
  encoder.dispatch([task] { task->run(); });
}

void EvaluateSchedule::eval_cpu(const std::vector<mx::array>& inputs, mx::array& output) {
  output.set_data(mx::allocator::malloc(output.nbytes()));
  auto& encoder = mx::cpu::get_command_encoder(stream());
  encoder.dispatch([schedule = schedule_,
                    steps = inputs[0].data<uint64_t>(),
                    rates = output.data<float>(),
                    size = output.size()] {
    for (size_t i = 0; i < size; ++i) {
      rates[i] = fused_math::schedule_value(schedule, steps[i]);
    }
  });
}

} // namespace mlx_fused_optim
