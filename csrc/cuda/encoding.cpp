#include "cuda/encoding.h"

namespace mlx_fused_optim::cuda {

namespace {

// What the encoder has that is not committed: kernels in its graph, and elements that kernels have
// read since the last commit. Launches of ours that are in no graph count too, so that MLX commits
// behind them when it would behind its own: then it lets go of what they have read, and the host
// waits if it is far ahead. Private; an explicit instantiation may name it, and MLX's version is
// pinned.
template <auto Kernels, auto Elements>
struct Uncommitted {
  friend int kernels_in_graph(mx::cu::CommandEncoder& encoder) { return encoder.*Kernels; }
  friend size_t& elements_read(mx::cu::CommandEncoder& encoder) { return encoder.*Elements; }
};
template struct Uncommitted<
    &mx::cu::CommandEncoder::node_count_,
    &mx::cu::CommandEncoder::bytes_in_graph_>; // it counts elements
int kernels_in_graph(mx::cu::CommandEncoder& encoder);
size_t& elements_read(mx::cu::CommandEncoder& encoder);

/// A commit costs the host 30 to 50 us, which the device has to gain by starting earlier.
constexpr size_t kWorthACommit = size_t(1) << 24;

bool is_idle(mx::cu::CommandEncoder& encoder) {
  return cuStreamQuery(static_cast<cudaStream_t>(encoder.stream())) == CUDA_SUCCESS;
}

} // namespace

Submission::Submission(mx::cu::CommandEncoder& encoder, size_t launches)
    : encoder_(encoder), is_direct_(kernels_in_graph(encoder) == 0) {
  if (!is_direct_ && launches > 1) {
    side_by_side_.emplace(encoder);
  }
}

void Submission::reads(const mx::array* arrays, size_t count) {
  const void* last = nullptr;
  for (size_t i = 0; i < count; ++i) {
    if (arrays[i].buffer().ptr() != last) {
      last = arrays[i].buffer().ptr();
      reads({&arrays[i]});
    }
  }
}

void Submission::reads(std::initializer_list<const mx::array*> arrays) {
  for (auto* array : arrays) {
    if (array && is_direct_) {
      elements_read(encoder_) += array->data_size();
    } else if (array) {
      encoder_.set_input_array(*array);
    }
  }
}

void Submission::writes(std::initializer_list<const mx::array*> arrays) {
  for (auto* array : arrays) {
    if (array && !is_direct_) {
      encoder_.set_output_array(*array);
    }
  }
}

void Submission::launch(CUfunction kernel, uint32_t blocks, uint32_t threads, void** arguments) {
  if (!is_direct_) {
    encoder_.add_kernel_node_raw(kernel, dim3(blocks), dim3(threads), dim3(), 0, arguments);
    return;
  }
  const auto stream = static_cast<cudaStream_t>(encoder_.stream());
  check(
      cuLaunchKernel(kernel, blocks, 1, 1, threads, 1, 1, 0, stream, arguments, nullptr),
      "cuLaunchKernel");
}

bool has_nothing_to_do(mx::cu::CommandEncoder& encoder) {
  return kernels_in_graph(encoder) == 0 && elements_read(encoder) == 0 && is_idle(encoder);
}

void start_if_idle(mx::cu::CommandEncoder& encoder) {
  if (kernels_in_graph(encoder) > 0 && elements_read(encoder) >= kWorthACommit &&
      is_idle(encoder)) {
    encoder.commit();
  }
}

} // namespace mlx_fused_optim::cuda
