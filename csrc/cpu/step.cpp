// Evaluation on the CPU: pointers are gathered now, the work is queued on the
// stream's thread.
#include "graph/step.h"

#include <algorithm>
#include <cstring>
#include <memory>

#include "cpu/isa.h"
#include "cpu/parallel.h"
#include "cpu/sources.h"
#include "graph/donation.h"
#include "mlx/backend/cpu/encoder.h"

namespace mlx_fused_optim {

namespace {

using fused_math::kSgd;
using fused_math::StepHyper;

// Elements a thread must have to be worth waking: about 30 us of memory traffic.
constexpr size_t kGrain = 32768;

/// Groups that hold as many elements.
size_t units(size_t elements, size_t group) { return (elements + group - 1) / group; }

/// A tensor's share, and where its own numbers come from.
struct TaskTensor : cpu::Tensor {
  uint32_t arena;
  uint32_t flags;
  uint32_t group, norms; // where they begin
};

struct TaskArena : cpu::Arenas {
  StepControl control;
};

/// Everything the queued work needs, by pointer: MLX keeps the buffers alive
/// until the stream has passed this step. Of all arenas of a node: threads wait for each other
/// once.
struct Task {
  Task(
      const StepNode& node,
      const std::vector<StepInputs>& in,
      const std::vector<StepOutputs>& out);

  void run() const;

 private:
  void add(const StepPlan& plan, const StepInputs& in, const StepOutputs& out);
  /// Memory between tensors is saved with the state: it must not be garbage.
  void clear_gaps(const Arena& arena, mx::array* output, const mx::array& input);
  uint64_t counter() const { return step ? *step : 0; }
  /// The elements [begin, end) of a tensor.
  void update(const TaskTensor& tensor, size_t begin, size_t end, const StepHyper& hyper) const;

  cpu::Sources sources;
  std::vector<TaskArena> arenas;
  std::vector<TaskTensor> tensors;
  std::vector<size_t> ends; // running sum of the tensors' sizes
  std::vector<std::pair<char*, size_t>> gaps; // fresh memory between tensors
  const uint64_t* step;
  const float* given;
  const float* measured;
  const float* groups;
  uint64_t* step_out;
  float* used_out;
};

Task::Task(
    const StepNode& node,
    const std::vector<StepInputs>& in,
    const std::vector<StepOutputs>& out)
    : step(in[0].step ? in[0].step->data<uint64_t>() : nullptr),
      given(in[0].given ? in[0].given->data<float>() : nullptr),
      measured(in[0].measured ? in[0].measured->data<float>() : nullptr),
      groups(in[0].groups ? in[0].groups->data<float>() : nullptr),
      step_out(out[0].step ? out[0].step->data<uint64_t>() : nullptr),
      used_out(out[0].used ? out[0].used->data<float>() : nullptr) {
  size_t n = 0;
  for (auto& plan : node.plans) {
    n += plan.tensor_count();
  }
  ends.reserve(n);
  tensors.reserve(n);
  arenas.reserve(node.plans.size());
  for (size_t p = 0; p < node.plans.size(); ++p) {
    add(node.plans[p], in[p], out[p]);
  }
}

void Task::add(const StepPlan& plan, const StepInputs& in, const StepOutputs& out) {
  auto& arena = arenas.emplace_back(TaskArena{{}, plan.control()});
  for (size_t i = 0; i < plan.tensor_count(); ++i) {
    TaskTensor tensor{};
    tensor.arena = static_cast<uint32_t>(arenas.size() - 1);
    tensor.size = plan.tensor_size(i);
    tensor.position = plan.arena->offsets[i];
    tensor.parameter = sources.of(in.parameter(i), plan.parameter_begin(i));
    tensor.gradient = sources.of(in.gradient(i), plan.gradient_begin(i));
    tensor.flags = plan.tensor_flags(i);
    tensor.group = plan.group(i) * fused_math::kGroupNumbers;
    tensor.norms = fused_math::kMeasuredTensors + 2 * plan.arena->tensors[i];
    tensors.push_back(tensor);
    ends.push_back((ends.empty() ? 0 : ends.back()) + tensor.size);
  }
  if (out.parameters) {
    arena.parameter_out = out.parameters->data<void>();
    arena.parameter_out_type = cpu::type_of(out.parameters->dtype());
    clear_gaps(*plan.arena, out.parameters, in.parameters[0]);
  }
  for (int slot = 0; slot < kSlots; ++slot) {
    if (out.slots[slot]) {
      arena.slots[slot] = sources.arena(*in.slots[slot], plan.kept.format(slot));
      arena.slots_out[slot] = out.slots[slot]->data<void>();
      clear_gaps(*plan.arena, out.slots[slot], *in.slots[slot]);
    }
  }
}

void Task::clear_gaps(const Arena& arena, mx::array* output, const mx::array& input) {
  if (output->data_shared_ptr() == input.data_shared_ptr()) {
    return;
  }
  // Rows of bytes: a group that is not whole is written whole.
  using namespace fused_math;
  const bool is_bytes = output->dtype() == mx::uint8;
  const size_t unit = is_bytes ? size_t(kByteGroup) : 1;
  const size_t bytes = is_bytes ? size_t(kByteRow) : output->itemsize();
  const size_t n = arena.offsets.size();
  for (size_t i = 0; i < n; ++i) {
    const size_t end = units(arena.offsets[i] + element_count(arena.shapes[i]), unit);
    const size_t next = (i + 1 < n ? arena.offsets[i + 1] : arena.size) / unit;
    if (next > end) {
      gaps.emplace_back(output->data<char>() + end * bytes, (next - end) * bytes);
    }
  }
}

void Task::run() const {
  const uint64_t t = counter();
  const auto scalars = fused_math::step_scalars(arenas[0].control, t, given);
  std::vector<StepHyper> hyper; // of each arena, which differ in where their random bits are
  for (auto& arena : arenas) {
    auto& control = arena.control;
    hyper.push_back(
        fused_math::step_hyper_of(control, control.rule, control.flags, t, scalars, measured));
  }
  if (step_out) {
    fused_math::step_counters(scalars, hyper[0], t, step_out, used_out);
  }
  for (auto [begin, bytes] : gaps) {
    std::memset(begin, 0, bytes);
  }
  if (ends.empty()) {
    return;
  }
  // Two threads do not share a group of bytes: both end at the next one.
  auto rounded = [](size_t elements) {
    return units(elements, fused_math::kByteGroup) * fused_math::kByteGroup;
  };
  cpu::parallel_for(ends.back(), kGrain, [&](size_t begin, size_t end) {
    size_t t = std::upper_bound(ends.begin(), ends.end(), begin) - ends.begin();
    for (; begin < end; ++t) {
      const size_t first = t ? ends[t - 1] : 0;
      const size_t last = std::min(end, ends[t]);
      const size_t from = rounded(begin - first);
      const size_t to = std::min(rounded(last - first), ends[t] - first);
      if (to > from) {
        update(tensors[t], from, to, hyper[tensors[t].arena]);
      }
      begin = last;
    }
  });
}

void Task::update(const TaskTensor& tensor, size_t begin, size_t end, const StepHyper& hyper)
    const {
  constexpr uint32_t kOnlyPacked = fused_math::kDirection | fused_math::kPack;
  const TaskArena& arena = arenas[tensor.arena];
  const StepControl& control = arena.control;
  if (control.rule == kSgd && tensor.flags == kOnlyPacked && !tensor.gradient.strided &&
      tensor.gradient.type == arena.parameter_out_type) {
    const size_t item = tensor.gradient.type == cpu::Type::float32 ? 4 : 2;
    std::memcpy(
        static_cast<char*>(arena.parameter_out) + (tensor.position + begin) * item,
        static_cast<const char*>(tensor.gradient.data) + begin * item,
        (end - begin) * item);
    return;
  }
  const auto own = fused_math::step_tensor_hyper(
      control,
      hyper,
      control.rule,
      counter(),
      tensor.flags,
      groups + tensor.group,
      measured + tensor.norms);
  cpu::kernels().update(
      arena,
      tensor,
      begin,
      end,
      own,
      {control.rule, tensor.flags, control.parameter_format, control.state_format});
}

} // namespace

void FusedStep::eval_cpu(const std::vector<mx::array>& inputs, std::vector<mx::array>& outputs) {
  set_outputs(node_, inputs, outputs, [](size_t bytes) { return mx::allocator::malloc(bytes); });
  const auto in = node_.inputs(inputs);
  const auto out = node_.outputs(outputs);
  auto& encoder = mx::cpu::get_command_encoder(stream());
  encoder.dispatch([task = std::make_shared<const Task>(node_, in, out)] { task->run(); });
  each_left(node_, in, out, [&](const mx::array& array) { encoder.add_temporary(array); });
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
