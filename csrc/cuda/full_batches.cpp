#include "cuda/full_batches.h"

namespace mlx_fused_optim::cuda {

namespace {

/// How the gradient of a tensor whose parameter is contiguous lies.
struct Matrix {
  uint64_t rows;
  uint32_t columns;
  int64_t row_stride;
  int64_t column_stride;
};

Matrix as_matrix(const Collapsed& c, uint64_t size) {
  if (c.dimensions == 2) {
    return {
        static_cast<uint64_t>(c.shape[0]),
        static_cast<uint32_t>(c.shape[1]),
        c.gradient_strides[0],
        c.gradient_strides[1]};
  }
  const int64_t stride = c.dimensions == 1 ? c.gradient_strides[0] : 1;
  return {divide_up(size, kTileColumns), kTileColumns, kTileColumns * stride, stride};
}

} // namespace

void FullBatches::add(
    int dimensions,
    const int32_t* shape,
    const Member& member,
    const Source& parameter,
    const Source& gradient) {
  const uint64_t size = element_count(dimensions, shape);
  if (size == 0) {
    return;
  }
  gradients |= bit_of(gradient.type);
  const FullTensor tensor{
      {parameter.data, gradient.data, size, member.offset, 0, gradient.type},
      member.number,
      member.group,
      member.flags};
  const bool flat = gradient.contiguous && parameter.contiguous;
  const auto c = flat ? Collapsed{} : collapse(dimensions, shape, parameter, gradient);
  if (!parameter.contiguous || !slots_contiguous_ || c.dimensions > 2) {
    auto& any = append(strided, tensor, divide_up(size, kFullTile));
    set_dimensions(any, flat ? collapse(dimensions, shape, parameter, gradient) : c);
    return;
  }

  const auto m = as_matrix(c, size);
  auto& tiled_tensor =
      append(tiled, tensor, divide_up(m.rows, kTileRows) * divide_up(m.columns, kTileColumns));
  tiled_tensor.columns = m.columns;
  tiled_tensor.row_stride = m.row_stride;
  tiled_tensor.column_stride = m.column_stride;
  const bool wide_arenas =
      m.columns % kQuad == 0 && is_aligned(parameter.data, kQuad * size_of(type_));
  const bool wide_gradient = m.column_stride == 1 && m.columns % kQuad == 0 &&
      m.row_stride % kQuad == 0 && is_aligned(gradient.data, kQuad * size_of(gradient.type));
  tiled_tensor.wide =
      (wide_arenas ? uint32_t(kWideArenas) : 0) | (wide_gradient ? uint32_t(kWideGradient) : 0);
}

} // namespace mlx_fused_optim::cuda
