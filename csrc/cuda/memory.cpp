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

/// MLX does not export its allocation of device memory, and its public one gives unified memory.
/// But every operation that writes an output allocates it, and a conversion takes as much as its
/// input says that it has in memory: this one says `bytes`, and has no elements to be converted.
/// (A concatenation of no arrays launches nothing either, but leaves an empty node in the encoder's
/// graph: docs/cuda.md, "Synchronisation", has what comes of it.)
mx::array conversion_of_nothing(size_t bytes, mx::Stream stream) {
  static thread_local std::unordered_map<int, std::shared_ptr<mx::Primitive>> primitives;
  auto& primitive = primitives[stream.index];
  if (!primitive) {
    primitive = mx::astype(mx::array(0.0f), mx::uint8, stream).primitive_ptr();
  }
  mx::array nothing({0}, mx::uint8, nullptr, {});
  nothing.set_data({mx::allocator::Buffer(nullptr), nullptr}, bytes, {1}, {true, true, true});
  std::vector<mx::array> outputs = {mx::array({0}, mx::uint8, primitive, {})};
  primitive->eval_gpu({nothing}, outputs); // held twice: nobody takes over its memory
  if (outputs[0].buffer_size() < bytes) {
    throw std::logic_error("[fused_step] this MLX allocates nothing for a conversion of nothing.");
  }
  return outputs[0];
}

/// Device memory, if MLX has it. It answers with unified memory where the device
/// has no more, but also with what it finds in its cache, and that becomes unified
/// when the host has read it: such a buffer is held while another is asked for.
std::optional<mx::allocator::Data> device_memory(size_t bytes, mx::Stream stream) {
  std::vector<mx::array> unified;
  for (int tries = 0; tries < 3; ++tries) {
    auto block = conversion_of_nothing(bytes, stream);
    if (static_cast<const mx::cu::CudaBuffer*>(block.buffer().ptr())->device >= 0) {
      return std::move(*block.data_shared_ptr());
    }
    unified.push_back(std::move(block));
  }
  return {};
}

/// Everything that MLX can let go of: what finished work still holds, then its cache.
void free_what_can_be_freed(mx::Stream stream) {
  auto& encoder = mx::cu::get_command_encoder(stream);
  encoder.commit(); // by itself, synchronize() returns before what is committed with it is let go
  encoder.synchronize();
  mx::clear_cache();
  check(cuCtxSynchronize(), "cuCtxSynchronize"); // MLX frees in the order of a stream
}

size_t free_memory() {
  size_t free = 0, total = 0;
  check(cuMemGetInfo_v2(&free, &total), "cuMemGetInfo");
  return free;
}

[[noreturn]] void refuse_memory(size_t bytes) {
  mx::clear_cache(); // what was tried
  throw std::runtime_error(
      "[fused_step] out of device memory: needed " + std::to_string(bytes >> 20) +
      " MiB for new parameters or state, the device has " + std::to_string(free_memory() >> 20) +
      " MiB left; nothing has been changed.");
}

/// Throws if the device has no room, before MLX asks it: a call that fails would
/// leave an error in MLX's CUDA runtime, where every later mx.eval finds it.
void require_room(size_t bytes, mx::Stream stream) {
  // The driver hands out memory in coarse pieces.
  constexpr size_t kSlack = size_t(64) << 20;
  // Asked only where MLX's cache cannot have the block: it costs a system call.
  if (mx::get_cache_memory() >= bytes || free_memory() >= bytes + kSlack) {
    return;
  }
  free_what_can_be_freed(stream);
  if (free_memory() < bytes + kSlack) {
    refuse_memory(bytes);
  }
}

/// Less than this is not worth a question to the driver.
constexpr size_t kLarge = size_t(16) << 20;

} // namespace

mx::allocator::Data allocate(size_t bytes, mx::Stream stream) {
  // MLX keeps 8 bytes or less in unified memory, across the bus.
  bytes = std::max<size_t>(bytes, 16);
  if (bytes >= kLarge) {
    require_room(bytes, stream);
  }
  if (auto memory = device_memory(bytes, stream)) {
    return std::move(*memory);
  }
  free_what_can_be_freed(stream);
  if (auto memory = device_memory(bytes, stream)) {
    return std::move(*memory);
  }
  refuse_memory(bytes);
}

mx::array contiguous_copy(const mx::array& a, mx::Stream stream) {
  static thread_local std::unordered_map<int, std::shared_ptr<mx::Primitive>> primitives;
  auto& primitive = primitives[stream.index];
  if (!primitive) {
    primitive = mx::contiguous(mx::array({0.0f}), false, stream).primitive_ptr();
  }
  std::vector<mx::array> outputs = {mx::array(a.shape(), a.dtype(), primitive, {})};
  primitive->eval_gpu({a}, outputs);
  return outputs[0];
}

} // namespace mlx_fused_optim::cuda
