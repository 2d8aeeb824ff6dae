// The launches of one step: where the plain and the full one differ.
#pragma once

#include <memory>

#include "mlx/backend/cuda/device.h"
#include "sgd.h"

namespace mlx_fused_optim::cuda {

class Launches {
 public:
  virtual ~Launches() = default;

  virtual size_t count() const = 0;

  /// Gives them to the encoder, which knows inputs and outputs by now.
  virtual void launch(
      mx::cu::CommandEncoder& encoder,
      const SgdInputs& in,
      const SgdOutputs& out) = 0;
};

/// The tensors, sorted and packed. Throws std::invalid_argument where no kernel can read
/// one, std::runtime_error where the kernels cannot be loaded.
std::unique_ptr<Launches> plain_launches(const SgdPlan& plan, const SgdInputs& in, int device);
std::unique_ptr<Launches> full_launches(const SgdPlan& plan, const SgdInputs& in, int device);

/// Hundreds of arrays are read through three pointers each: descriptor, data and
/// buffer. Asks for what the next ones need, a pointer further at a time.
inline void prefetch(const mx::array* arrays, size_t i, size_t n) {
  if (i + 12 < n) {
    __builtin_prefetch(reinterpret_cast<const void*>(arrays[i + 12].id()));
  }
  if (i + 8 < n) {
    __builtin_prefetch(arrays[i + 8].data_shared_ptr().get());
  }
  if (i + 4 < n) {
    __builtin_prefetch(arrays[i + 4].buffer().ptr());
  }
}

} // namespace mlx_fused_optim::cuda
