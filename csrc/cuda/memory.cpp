#include "cuda/memory.h"

#include <cuda.h>

#include <algorithm>
#include <optional>
#include <stdexcept>
#include <string>
#include <unordered_map>

#include "cuda/kernels.h"
#include "mlx/backend/cuda/device.h"
#include "mlx/primitives.h"

namespace mlx_fused_optim::cuda {

namespace {

/// MLX does not export its allocation of device memory, and its public one gives
/// unified memory. But every operation that writes an output allocates it, and a
/// concatenation of no arrays does nothing else.
mx::array concatenation_of_nothing(const mx::Shape& shape, mx::Stream stream) {
  static thread_local std::unordered_map<int, std::shared_ptr<mx::Primitive>> primitives;
  auto& primitive = primitives[stream.index];
  if (!primitive) {
    const mx::array some({0.0f});
    primitive = mx::concatenate({some, some}, 0, stream).primitive_ptr();
  }
  std::vector<mx::array> outputs = {mx::array(shape, mx::uint8, nullptr, {})};
  primitive->eval_gpu({}, outputs);
  return outputs[0];
}

/// Device memory, if MLX has it. It answers with unified memory where the device
/// has no more, but also with what it finds in its cache, and that becomes unified
/// when the host has read it: such a buffer is held while another is asked for.
std::optional<mx::allocator::Data> device_memory(const mx::Shape& shape, mx::Stream stream) {
  std::vector<mx::array> unified;
  for (int tries = 0; tries < 3; ++tries) {
    auto block = concatenation_of_nothing(shape, stream);
    if (static_cast<const mx::cu::CudaBuffer*>(block.buffer().ptr())->device >= 0) {
      return std::move(*block.data_shared_ptr());
    }
    unified.push_back(std::move(block));
  }
  return {};
}

/// Everything that MLX can let go of: what finished work still holds, then its cache.
void free_what_can_be_freed(mx::Stream stream) {
  mx::cu::get_command_encoder(stream).synchronize();
  mx::clear_cache();
  check(cuCtxSynchronize(), "cuCtxSynchronize"); // MLX frees in the order of a stream
}

} // namespace

mx::allocator::Data allocate(size_t bytes, mx::Stream stream) {
  // MLX keeps 8 bytes or less in unified memory, across the bus.
  bytes = std::max<size_t>(bytes, 16);
  constexpr size_t kRow = 256;
  mx::Shape shape = {static_cast<int>(bytes)};
  if (bytes > kRow) { // two dimensions: int32 counts to 2 GiB only
    shape = {static_cast<int>((bytes + kRow - 1) / kRow), static_cast<int>(kRow)};
  }
  if (auto memory = device_memory(shape, stream)) {
    return std::move(*memory);
  }
  free_what_can_be_freed(stream);
  if (auto memory = device_memory(shape, stream)) {
    return std::move(*memory);
  }
  mx::clear_cache();
  size_t free = 0, total = 0;
  check(cuMemGetInfo(&free, &total), "cuMemGetInfo");
  throw std::runtime_error(
      "[fused_sgd_step] out of device memory: needed " + std::to_string(bytes >> 20) +
      " MiB for new parameters or momentum, the device has " + std::to_string(free >> 20) +
      " MiB left; nothing has been changed.");
}

} // namespace mlx_fused_optim::cuda
