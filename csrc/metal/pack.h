// Arrays that the kernels cannot read, in row-major order; and helpers to encode.
#pragma once

#include <unordered_map>

#include "mlx/array.h"
#include "mlx/backend/metal/device.h"

namespace mlx_fused_optim::metal {

namespace mx = mlx::core;

/// One thread an element, up to a number that fills any GPU; the kernels loop.
void dispatch_elements(
    mx::metal::CommandEncoder& encoder,
    MTL::ComputePipelineState* kernel,
    size_t size);

/// Copies in row-major order. It owns them until what uses them is encoded.
class Packer {
 public:
  Packer(mx::metal::Device& device, mx::metal::CommandEncoder& encoder)
      : device_(device), encoder_(encoder) {}

  /// The array itself where `readable` holds or it has no elements, else a copy.
  const mx::array& readable(const mx::array& a, bool readable) {
    return readable || a.size() == 0 ? a : packed(a);
  }

  /// What that has given for this very object.
  const mx::array& operator()(const mx::array& a) const {
    const auto copy = copies_.find(&a);
    return copy == copies_.end() ? a : copy->second;
  }

 private:
  const mx::array& packed(const mx::array& a);

  mx::metal::Device& device_;
  mx::metal::CommandEncoder& encoder_;
  std::unordered_map<const mx::array*, mx::array> copies_;
};

} // namespace mlx_fused_optim::metal
