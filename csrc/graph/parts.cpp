#include "graph/parts.h"

#include <algorithm>
#include <stdexcept>
#include <utility>

namespace mlx_fused_optim {

std::vector<mx::array>& Parts::put(const mx::array& token, std::vector<mx::array> made) {
  std::lock_guard lock(mutex_);
  made_.remove_if([](auto& earlier) { return earlier.token.expired(); });
  return made_.emplace_back(token.data_shared_ptr(), std::move(made)).arrays;
}

mx::array Parts::take(const mx::array& token, size_t number) {
  std::lock_guard lock(mutex_);
  const auto& data = token.data_shared_ptr();
  auto is_its = [&](auto& made) { return made.token.lock() == data; };
  const auto made = std::find_if(made_.begin(), made_.end(), is_its);
  if (made == made_.end()) {
    throw std::logic_error("[fused_step] a part of a step is not there.");
  }
  // The graph's array is to be the only holder, so that the next step writes in place.
  return std::exchange(made->arrays[number], mx::array({}, mx::uint8, nullptr, {}));
}

} // namespace mlx_fused_optim
