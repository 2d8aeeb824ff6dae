#include "cuda/encoding.h"

#include <algorithm>

namespace mlx_fused_optim::cuda {

namespace {

// What the encoder knows of the kernels that wait to be launched: their number, and the
// elements that they read. Private; an explicit instantiation may name it, and MLX's version
// is pinned.
template <auto Count, auto Elements>
struct Pending {
  friend int pending_kernels(mx::cu::CommandEncoder& encoder) { return encoder.*Count; }
  friend size_t pending_elements(mx::cu::CommandEncoder& encoder) { return encoder.*Elements; }
};
template struct Pending<
    &mx::cu::CommandEncoder::node_count_,
    &mx::cu::CommandEncoder::bytes_in_graph_>; // it counts elements
int pending_kernels(mx::cu::CommandEncoder& encoder);
size_t pending_elements(mx::cu::CommandEncoder& encoder);

/// A launch of its own costs the host 30 to 50 us, which the device has to gain by starting
/// earlier. So of a small step most is launched at once, and the rest with its end; but never less
/// than four of the smallest arenas, and of a large step what takes the device 0.1 ms.
constexpr size_t kLeastToLaunch = size_t(1) << 24;
constexpr size_t kEnoughToLaunch = size_t(1) << 26;

bool is_idle(mx::cu::CommandEncoder& encoder) {
  return cuStreamQuery(static_cast<cudaStream_t>(encoder.stream())) == CUDA_SUCCESS;
}

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

bool has_nothing_to_do(mx::cu::CommandEncoder& encoder) {
  return pending_kernels(encoder) == 0 && is_idle(encoder);
}

void start_if_idle(mx::cu::CommandEncoder& encoder, size_t elements) {
  const size_t enough = std::clamp(elements / 5 * 3, kLeastToLaunch, kEnoughToLaunch);
  if (pending_elements(encoder) >= enough && is_idle(encoder)) {
    encoder.commit();
  }
}

} // namespace mlx_fused_optim::cuda
