#include "donation.h"

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

/// Where the arena would begin in the buffer of the parameters (bytes), if they
/// are the arena and nobody else holds them; otherwise nothing.
std::optional<int64_t> donatable_arena(const SgdPlan& plan, const mx::array* parameters) {
  const size_t n = plan.tensor_count();
  const auto& data = parameters[0].data_shared_ptr();
  // One use each: a gradient, a view or a pending operation on the same buffer
  // would be one more. Memory that MLX only borrows (a mapped file) is not ours.
  if (!data || data.use_count() != static_cast<long>(n) || !data->is_owned()) {
    return {};
  }
  const auto itemsize = static_cast<int64_t>(plan.arena->dtype.size());
  const int64_t begin = parameters[0].offset() - plan.arena->offsets[0] * itemsize;
  const int64_t end = begin + plan.arena->size * itemsize;
  if (begin < 0 || begin % kArenaAlignment || end > int64_t(parameters[0].buffer_size())) {
    return {};
  }
  for (size_t i = 0; i < n; ++i) {
    auto& p = parameters[i];
    if (p.data_shared_ptr() != data ||
        p.offset() != begin + int64_t(plan.arena->offsets[i]) * itemsize ||
        !p.flags().row_contiguous || handle_count(p) != 1) {
      return {};
    }
  }
  return begin;
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
    const SgdPlan& plan,
    const std::vector<mx::array>& inputs,
    std::vector<mx::array>& outputs,
    const std::function<mx::allocator::Data(size_t)>& allocate) {
  SgdInputs in(plan, inputs);
  SgdOutputs out(plan, outputs);
  if (out.parameters) {
    auto& arena = *out.parameters;
    if (auto begin = donatable_arena(plan, in.parameters)) {
      const auto itemsize = static_cast<int64_t>(arena.itemsize());
      const bool flat = arena.ndim() == 1;
      arena.copy_shared_buffer(
          in.parameters[0],
          arena.strides(),
          {true, true, flat},
          arena.size(),
          (*begin - in.parameters[0].offset()) / itemsize);
    } else {
      arena.set_data(allocate(arena.nbytes()));
    }
  }
  for (int slot = 0; slot < kSlots; ++slot) {
    if (!out.slots[slot]) {
      continue;
    }
    auto& old = *in.slots[slot];
    if (old.is_donatable() && old.flags().row_contiguous) {
      out.slots[slot]->copy_shared_buffer(old);
    } else {
      out.slots[slot]->set_data(allocate(out.slots[slot]->nbytes()));
    }
  }
  for (auto* scalar : {out.step, out.used}) {
    if (scalar) {
      scalar->set_data(allocate(scalar->nbytes()));
    }
  }
}

} // namespace

void set_outputs(
    const SgdPlan& plan,
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

  try {
    give_memory(plan, inputs, outputs, allocate);
  } catch (...) { // no memory left
    restore(outputs, inputs);
    throw;
  }
  // The counts above were read without order; whoever let go of a buffer last
  // (an operation on another stream) has finished with it.
  std::atomic_thread_fence(std::memory_order_acquire);
}

} // namespace mlx_fused_optim
