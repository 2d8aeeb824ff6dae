#include "cuda/measure_batches.h"

namespace mlx_fused_optim::cuda {

void MeasureBatches::add(
    int dimensions,
    const int32_t* shape,
    const Source& array,
    bool is_gradient,
    bool fills_memory) {
  const uint64_t size = element_count(dimensions, shape);
  const uint64_t count = divide_up(size, fused_math::kChunk);
  if (size > 0) {
    types |= bit_of(array.type);
    const uint64_t blocks = divide_up(count, kChunksPerBlock);
    const bool aligned = is_aligned(array.data, 4 * size_of(array.type));
    const Dense common{array.data, size, 0, first_chunk.back(), array.type, is_gradient, aligned};
    if (fills_memory) {
      append(dense, common, blocks);
    } else {
      const Source contiguous{nullptr, array.type, true, nullptr};
      const auto c = collapse(dimensions, shape, contiguous, array);
      auto& added = append(sparse, common, blocks);
      added.dimensions = c.dimensions;
      for (int d = 0; d < c.dimensions; ++d) {
        added.shape[d] = static_cast<int32_t>(c.shape[d]);
        added.strides[d] = c.gradient_strides[d];
      }
    }
  }
  first_chunk.push_back(first_chunk.back() + static_cast<uint32_t>(count));
}

} // namespace mlx_fused_optim::cuda
