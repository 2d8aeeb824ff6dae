// In which order the elements of an array lie in memory. Used by every backend.
#pragma once

#include <algorithm>
#include <utility>
#include <vector>

#include "mlx/array.h"

namespace mlx_fused_optim {

/// Whether the elements fill a stretch of memory, in any order of the axes: those of a
/// contiguous array or a transposed matrix do.
inline bool fills_memory(const mlx::core::array& a) {
  if (a.flags().row_contiguous) {
    return true;
  }
  std::vector<std::pair<int64_t, int64_t>> axes; // stride, length
  for (int d = 0; d < static_cast<int>(a.ndim()); ++d) {
    if (a.shape(d) != 1) {
      axes.emplace_back(a.strides(d), a.shape(d));
    }
  }
  std::sort(axes.begin(), axes.end());
  int64_t next = 1;
  for (auto [stride, length] : axes) {
    if (stride != next) {
      return false;
    }
    next *= length;
  }
  return true;
}

} // namespace mlx_fused_optim
