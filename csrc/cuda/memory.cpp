#include "cuda/memory.h"

#include <cuda.h>

#include <algorithm>
#include <array>
#include <atomic>
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
std::vector<mx::array> concatenation_of_nothing(mx::array output, mx::Stream stream) {
  static thread_local std::unordered_map<int, std::shared_ptr<mx::Primitive>> primitives;
  auto& primitive = primitives[stream.index];
  if (!primitive) {
    const mx::array some({0.0f});
    primitive = mx::concatenate({some, some}, 0, stream).primitive_ptr();
  }
  std::vector<mx::array> outputs = {std::move(output)};
  primitive->eval_gpu({}, outputs);
  return outputs;
}

size_t free_memory() {
  size_t free = 0, total = 0;
  check(cuMemGetInfo(&free, &total), "cuMemGetInfo");
  return free;
}

/// Throws if the device has no room. MLX would throw as well, but the failed call
/// leaves an error in its CUDA runtime that every later mx.eval trips over.
void require_room(size_t bytes, mx::Stream stream) {
  // The most that MLX has held when there was room: asking the driver each time
  // would cost more than the allocation. One for each device.
  static std::array<std::atomic<size_t>, 64> known{};
  auto& most = known[stream.device.index % known.size()];
  const size_t wanted = mx::get_active_memory() + mx::get_cache_memory() + bytes;
  if (wanted <= most.load(std::memory_order_relaxed)) {
    return;
  }
  // The driver hands out memory in coarse pieces.
  const size_t needed = bytes + (size_t(64) << 20);
  size_t free = free_memory();
  if (free < needed) {
    // Everything that MLX can let go of: what pending work holds, then its cache.
    mx::cu::get_command_encoder(stream).synchronize();
    mx::clear_cache();
    check(cuCtxSynchronize(), "cuCtxSynchronize");
    free = free_memory();
  }
  if (free < needed) {
    throw std::runtime_error(
        "[fused_sgd_step] out of device memory: needed " + std::to_string(bytes >> 20) +
        " MiB for new parameters or momentum, the device has " + std::to_string(free >> 20) +
        " MiB left; nothing has been changed.");
  }
  size_t seen = most.load(std::memory_order_relaxed);
  while (seen < wanted && !most.compare_exchange_weak(seen, wanted)) {
  }
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
  require_room(bytes, stream);
  auto outputs = concatenation_of_nothing(mx::array(shape, mx::uint8, nullptr, {}), stream);
  return std::move(*outputs[0].data_shared_ptr());
}

} // namespace mlx_fused_optim::cuda
