#include "cuda/batches.h"

namespace mlx_fused_optim::cuda {

void Batches::add(
    int dimensions,
    const int32_t* shape,
    uint64_t offset,
    const Source& parameter,
    const Source& gradient) {
  const uint64_t size = element_count(dimensions, shape);
  if (size == 0) {
    return;
  }
  gradients |= bit_of(gradient.type);
  const Tensor tensor{parameter.data, gradient.data, size, offset, 0, gradient.type};
  const uint64_t tiles = divide_up(size, tile_elements(size_of(type_)));

  if (parameter.contiguous && gradient.contiguous && velocity_contiguous_) {
    auto& flat_tensor = append(flat, tensor, tiles);
    // A thread loads as many gradients as parameters: 16 bytes of these.
    const size_t vector = 16 / size_of(type_) * size_of(gradient.type);
    flat_tensor.parameter_aligned = is_aligned(parameter.data, 16);
    flat_tensor.gradient_aligned = is_aligned(gradient.data, vector < 16 ? vector : 16);
    return;
  }

  const auto c = collapse(dimensions, shape, parameter, gradient);
  if (parameter.contiguous && velocity_contiguous_ && c.dimensions == 2 &&
      c.gradient_strides[0] == 1) {
    const uint64_t squares = divide_up(c.shape[0], kSquare) * divide_up(c.shape[1], kSquare);
    auto& turned = append(transposed, tensor, squares);
    turned.rows = c.shape[0];
    turned.columns = c.shape[1];
    turned.stride = c.gradient_strides[1];
    turned.aligned = (c.shape[0] | c.shape[1] | turned.stride) % kSquareVector == 0 &&
        is_aligned(parameter.data, kSquareVector * size_of(type_)) &&
        is_aligned(gradient.data, kSquareVector * size_of(gradient.type));
    return;
  }

  set_dimensions(append(strided, tensor, tiles), c);
}

} // namespace mlx_fused_optim::cuda
