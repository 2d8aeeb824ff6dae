// Sorts the arrays of a measurement into launches. No CUDA and no MLX here.
#pragma once

#include "cuda/measure_launch.h"
#include "cuda/packing.h"

namespace mlx_fused_optim::cuda {

class MeasureBatches {
 public:
  /// Adds the next array; `fills_memory` as csrc/graph/memory_order.h has it. Throws
  /// std::invalid_argument where no kernel can read it.
  void add(
      int dimensions,
      const int32_t* shape,
      const Source& array,
      bool is_gradient,
      bool fills_memory);

  size_t launches() const { return dense.size() + sparse.size(); }
  uint64_t chunks() const { return first_chunk.back(); }
  size_t arrays() const { return first_chunk.size() - 1; }

  /// The dtypes of all arrays, as Variant has those of gradients.
  uint32_t types = 0;

  BatchList<Dense> dense;
  BatchList<Sparse> sparse;
  std::vector<uint32_t> first_chunk = {0}; // of each array, and the number of all
};

} // namespace mlx_fused_optim::cuda
