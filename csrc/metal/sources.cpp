#include "metal/sources.h"

#include <algorithm>

namespace mlx_fused_optim::metal {

uint32_t BufferSources::of(const mx::array& a) {
  const auto same = [&](const mx::array* source) {
    return source->buffer().ptr() == a.buffer().ptr();
  };
  const auto at = std::find_if(arrays_.begin(), arrays_.end(), same) - arrays_.begin();
  if (at == std::ptrdiff_t(arrays_.size())) {
    arrays_.push_back(&a);
  }
  return at;
}

void BufferSources::bind(mx::metal::CommandEncoder& encoder, int first_slot, size_t count) const {
  for (size_t i = 0; i < count; ++i) {
    auto& source = *arrays_[i < arrays_.size() ? i : 0];
    encoder.set_input_array(source, first_slot + i, -source.offset());
  }
}

} // namespace mlx_fused_optim::metal
