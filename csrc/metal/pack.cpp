#include "metal/pack.h"

#include <algorithm>

#include "metal/library.h"
#include "mlx/allocator.h"

namespace mlx_fused_optim::metal {

void dispatch_elements(
    mx::metal::CommandEncoder& encoder,
    MTL::ComputePipelineState* kernel,
    size_t size) {
  constexpr size_t kMostGridThreads = size_t(1) << 20;
  encoder.dispatch_threads(
      MTL::Size(std::min(size, kMostGridThreads), 1, 1), MTL::Size(threads_for(kernel), 1, 1));
}

const mx::array& Packer::packed(const mx::array& a) {
  mx::array copy(a.shape(), a.dtype(), nullptr, std::vector<mx::array>{});
  copy.set_data(mx::allocator::malloc(copy.nbytes()));
  const size_t size = a.itemsize();
  auto* kernel = metal::kernel(device_, size == 4 ? "pack_4" : size == 2 ? "pack_2" : "pack_1");
  encoder_.set_compute_pipeline_state(kernel);
  encoder_.set_input_array(a, 0);
  encoder_.set_output_array(copy, 1);
  encoder_.set_vector_bytes(a.shape(), 2);
  encoder_.set_vector_bytes(a.strides(), 3);
  encoder_.set_bytes(uint32_t(a.ndim()), 4);
  encoder_.set_bytes(uint64_t(a.size()), 5);
  dispatch_elements(encoder_, kernel, a.size());
  encoder_.add_temporary(copy);
  return copies_.emplace(&a, std::move(copy)).first->second;
}

} // namespace mlx_fused_optim::metal
