#include "cuda/encoding.h"

namespace mlx_fused_optim::cuda {

namespace {

// The encoder's number of kernels that wait to be launched. Private; an explicit
// instantiation may name it, and MLX's version is pinned.
template <auto Member>
struct PendingKernels {
  friend int pending_kernels(mx::cu::CommandEncoder& encoder) { return encoder.*Member; }
};
template struct PendingKernels<&mx::cu::CommandEncoder::node_count_>;
int pending_kernels(mx::cu::CommandEncoder& encoder);

} // namespace

Submission::Submission(mx::cu::CommandEncoder& encoder, size_t launches)
    : encoder_(encoder), is_direct_(launches == 1 && pending_kernels(encoder) == 0) {
  if (launches > 1) {
    side_by_side_.emplace(encoder);
  }
}

void Submission::reads(const mx::array* arrays, size_t count) {
  const void* last = nullptr;
  for (size_t i = 0; !is_direct_ && i < count; ++i) {
    if (arrays[i].buffer().ptr() != last) {
      last = arrays[i].buffer().ptr();
      encoder_.set_input_array(arrays[i]);
    }
  }
}

void Submission::reads(std::initializer_list<const mx::array*> arrays) {
  for (auto* array : arrays) {
    if (array) {
      reads(array, 1);
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

bool is_idle(mx::cu::CommandEncoder& encoder) {
  return cuStreamQuery(static_cast<cudaStream_t>(encoder.stream())) == CUDA_SUCCESS;
}

bool has_nothing_to_do(mx::cu::CommandEncoder& encoder) {
  return pending_kernels(encoder) == 0 && is_idle(encoder);
}

} // namespace mlx_fused_optim::cuda
