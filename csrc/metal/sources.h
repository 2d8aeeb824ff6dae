// The buffers of one dispatch in which its arrays lie: see metal/sources.h.
#pragma once

#include <vector>

#include "mlx/array.h"
#include "mlx/backend/metal/device.h"

namespace mlx_fused_optim::metal {

namespace mx = mlx::core;

/// Each buffer once, however many arrays are in it. The slot of a source begins where
/// its buffer begins.
class BufferSources {
 public:
  /// The number of the array's buffer, which joins the others if it is new.
  uint32_t of(const mx::array& a);
  size_t size() const { return arrays_.size(); }
  /// Forgets all but the first `size`.
  void shrink(size_t size) { arrays_.resize(size); }

  /// Binds `count` slots, as every slot must have a buffer even if no tensor uses it.
  void bind(mx::metal::CommandEncoder& encoder, int first_slot, size_t count) const;

 private:
  std::vector<const mx::array*> arrays_; // one of each buffer
};

} // namespace mlx_fused_optim::metal
