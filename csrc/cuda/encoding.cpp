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

void set_inputs(mx::cu::CommandEncoder& encoder, const mx::array* arrays, size_t count) {
  const void* last = nullptr;
  for (size_t i = 0; i < count; ++i) {
    if (arrays[i].buffer().ptr() != last) {
      last = arrays[i].buffer().ptr();
      encoder.set_input_array(arrays[i]);
    }
  }
}

void set_inputs(mx::cu::CommandEncoder& encoder, std::initializer_list<const mx::array*> arrays) {
  for (auto* array : arrays) {
    if (array) {
      encoder.set_input_array(*array);
    }
  }
}

void set_outputs(mx::cu::CommandEncoder& encoder, std::initializer_list<const mx::array*> arrays) {
  for (auto* array : arrays) {
    if (array) {
      encoder.set_output_array(*array);
    }
  }
}

bool is_idle(mx::cu::CommandEncoder& encoder) {
  return cuStreamQuery(static_cast<cudaStream_t>(encoder.stream())) == CUDA_SUCCESS;
}

bool has_nothing_to_do(mx::cu::CommandEncoder& encoder) {
  return pending_kernels(encoder) == 0 && is_idle(encoder);
}

} // namespace mlx_fused_optim::cuda
