#include "graph/donation.h"

#include <atomic>

namespace mlx_fused_optim {

namespace {

// An array is a shared handle to a descriptor, and only the count of handles
// tells whether somebody else (a Python variable, another graph) has the same
// one. MLX shows it through is_donatable(), which also wants the buffer to have
// a single user and so never holds for tensors that share an arena. The name is
// private; an explicit instantiation may use it, and MLX's version is pinned.
template <auto Member>
struct HandleCount {
  friend long handle_count(const mx::array& a) { return (a.*Member).use_count(); }
};
template struct HandleCount<&mx::array::array_desc_>;
long handle_count(const mx::array& a);

/// Where an arena would begin in the buffer of its tensors (bytes), if they lie as it
/// wants them. parameter(i) is that of its tensor `i`.
template <typename Parameter>
std::optional<int64_t> arena_begin(const Arena& arena, Parameter parameter) {
  const mx::array& first = parameter(0);
  const auto& data = first.data_shared_ptr();
  if (!data) {
    return {};
  }
  const auto itemsize = static_cast<int64_t>(arena.dtype.size());
  const int64_t begin = first.offset() - arena.offsets[0] * itemsize;
  const int64_t end = begin + arena.size * itemsize;
  if (begin < 0 || begin % kArenaAlignment || end > int64_t(first.buffer_size())) {
    return {};
  }
  for (size_t i = 0; i < arena.tensors.size(); ++i) {
    const mx::array& p = parameter(i);
    if (p.data_shared_ptr() != data || p.offset() != begin + int64_t(arena.offsets[i]) * itemsize ||
        !p.flags().row_contiguous) {
      return {};
    }
  }
  return begin;
}

/// Likewise, if nobody else holds them; otherwise nothing.
std::optional<int64_t> donatable_arena(const StepPlan& plan, const mx::array* parameters) {
  const size_t n = plan.tensor_count();
  const auto& data = parameters[0].data_shared_ptr();
  // One use each: a gradient, a view or a pending operation on the same buffer
  // would be one more. Memory that MLX only borrows (a mapped file) is not ours.
  if (!data || data.use_count() != static_cast<long>(n) || !data->is_owned()) {
    return {};
  }
  for (size_t i = 0; i < n; ++i) {
    if (handle_count(parameters[i]) != 1) {
      return {};
    }
  }
  return arena_begin(*plan.arena, [&](size_t i) -> const mx::array& { return parameters[i]; });
}

/// The output shares the memory of an input from `begin` on (bytes).
void share(mx::array& output, const mx::array& input, int64_t begin) {
  output.copy_shared_buffer(
      input,
      output.strides(),
      {true, true, output.ndim() == 1},
      output.size(),
      (begin - input.offset()) / static_cast<int64_t>(output.itemsize()));
}

// What this rests on. A count of uses is a count of readers only because whoever is to read
// later holds the memory until it has: MLX's graph, its scheduler's tasks, and on Metal the
// completion handler of the command buffer, which keeps each operation's inputs and outputs
// but for the one output that took over an input (mlx/backend/metal/eval.cpp, 0.32.4). Nothing
// else would order a step's write after an earlier read: an output that is registered in a
// concurrent group is not compared with what earlier commands read
// (mlx/backend/metal/device.cpp). tests/test_metal.py has both promises.

/// The memory of one array, where MLX would give it away.
void set_output(
    mx::array& output,
    const mx::array& input,
    const std::function<mx::allocator::Data(size_t)>& allocate) {
  // In rows of bytes are numbers of four.
  if (input.is_donatable() && input.flags().row_contiguous && input.offset() % 4 == 0) {
    output.copy_shared_buffer(input);
  } else {
    output.set_data(allocate(output.nbytes()));
  }
}

/// As if nothing had happened: with its inputs, an output can be evaluated again.
void restore(std::vector<mx::array>& outputs, const std::vector<mx::array>& inputs) {
  for (auto& output : outputs) {
    output.set_data(mx::allocator::Data(mx::allocator::Buffer(nullptr), nullptr));
    if (output.inputs().empty()) {
      output.inputs() = inputs;
    }
  }
}

void give_memory(
    const StepPlan& plan,
    const StepInputs& in,
    const StepOutputs& out,
    bool is_only_use,
    const std::function<mx::allocator::Data(size_t)>& allocate) {
  if (!is_only_use) {
    for (auto* output = out.begin; output != out.end; ++output) {
      output->set_data(allocate(output->nbytes()));
    }
    return;
  }
  if (out.parameters && plan.flags() & fused_math::kDirection) {
    out.parameters->set_data(allocate(out.parameters->nbytes())); // the parameters are read again
  } else if (out.parameters && plan.whole) {
    set_output(*out.parameters, in.parameters[0], allocate);
  } else if (out.parameters) {
    if (auto begin = donatable_arena(plan, in.parameters)) {
      share(*out.parameters, in.parameters[0], *begin);
    } else {
      out.parameters->set_data(allocate(out.parameters->nbytes()));
    }
  }
  for (int slot = 0; slot < kSlots; ++slot) {
    if (out.slots[slot]) {
      set_output(*out.slots[slot], *in.slots[slot], allocate);
    }
  }
  for (auto* scalar : {out.step, out.used}) {
    if (scalar) {
      scalar->set_data(allocate(scalar->nbytes()));
    }
  }
}

} // namespace

std::optional<mx::array> whole_arena(const Arena& arena, const std::vector<mx::array>& parameters) {
  if (arena.tensors.size() < 2) {
    return {}; // nothing to save
  }
  for (int t : arena.tensors) {
    auto& p = parameters[t];
    if (p.is_tracer() || !p.is_available()) {
      return {};
    }
  }
  auto parameter = [&](size_t i) -> const mx::array& { return parameters[arena.tensors[i]]; };
  const auto begin = arena_begin(arena, parameter);
  if (!begin) {
    return {};
  }
  mx::array whole(arena_shape(arena), arena.dtype, nullptr, {});
  share(whole, parameter(0), *begin);
  whole.set_status(mx::array::Status::available);
  return whole;
}

void set_outputs(
    const StepNode& node,
    const std::vector<mx::array>& inputs,
    std::vector<mx::array>& outputs,
    const std::function<mx::allocator::Data(size_t)>& allocate) {
  // Every output of a primitive has its own copy of the inputs, so none of them
  // would ever look donatable. MLX drops these copies right after the evaluation
  // (array::detach); the redundant ones go now. A tracer keeps its graph.
  for (auto& output : outputs) {
    if (!output.is_tracer() && &output.inputs() != &inputs) {
      output.inputs().clear();
    }
  }

  // What a node holds has no holder but the node, which each of its outputs has. Where other arrays
  // have it too (a compiled function that has captured it makes some with each call), it is
  // evaluated again, from the same.
  const bool is_only_use = node.held.empty() ||
      outputs[0].primitive_ptr().use_count() == static_cast<long>(outputs.size());
  try {
    const auto in = node.inputs(inputs);
    const auto out = node.outputs(outputs);
    for (size_t p = 0; p < in.size(); ++p) {
      give_memory(node.plans[p], in[p], out[p], is_only_use, allocate);
    }
  } catch (...) { // no memory left
    restore(outputs, inputs);
    throw;
  }
  // The counts above were read without order; whoever let go of a buffer last
  // (an operation on another stream) has finished with it.
  std::atomic_thread_fence(std::memory_order_acquire);
}

} // namespace mlx_fused_optim
