#include "cuda/batches.h"

namespace mlx_fused_optim::cuda {

namespace {

/// How the gradient of a tensor whose parameter is contiguous lies.
struct Form {
  uint64_t rows;
  uint64_t columns;
  int64_t row_stride;
  int64_t column_stride;
};

Form form_of(const Collapsed& c, uint64_t size) {
  if (c.dimensions == 2) {
    return {
        static_cast<uint64_t>(c.shape[0]),
        static_cast<uint64_t>(c.shape[1]),
        c.gradient_strides[0],
        c.gradient_strides[1]};
  }
  const int64_t stride = c.dimensions == 1 ? c.gradient_strides[0] : 1;
  return {divide_up(size, kTileColumns), kTileColumns, kTileColumns * stride, stride};
}

/// Whether the kernels' 32 bits hold it.
bool fits(const Form& m) {
  auto fits = [](int64_t stride) { return stride >= INT32_MIN && stride <= INT32_MAX; };
  return fits(m.row_stride) && fits(m.column_stride);
}

template <typename Kind>
void add_matrix(
    BatchList<Kind>& batches,
    const Tensor& tensor,
    uint64_t blocks,
    const Form& m,
    uint32_t wide) {
  Matrix& added = append(batches, tensor, blocks);
  added.wide = wide;
  added.columns = static_cast<uint32_t>(m.columns);
  added.row_stride = static_cast<int32_t>(m.row_stride);
  added.column_stride = static_cast<int32_t>(m.column_stride);
}

} // namespace

void Batches::begin_arena(const SlotWays& ways) {
  ++arenas_;
  ways_ = ways;
  slots_contiguous_ = std::all_of(ways.begin(), ways.end(), [](const SlotWay& way) {
    return way.columns == kContiguousWay.columns && way.row_stride == kContiguousWay.row_stride;
  });
}

bool Batches::add(
    int dimensions,
    const int32_t* shape,
    const Member& member,
    const Source& parameter,
    const Source& gradient) {
  const uint64_t size = element_count(dimensions, shape);
  if (size == 0) {
    return true;
  }
  const bool flat = gradient.contiguous && parameter.contiguous;
  const auto c = flat ? Collapsed{} : collapse(dimensions, shape, parameter, gradient);
  const auto m = form_of(c, size);
  const bool is_matrix = parameter.contiguous && slots_contiguous_ && c.dimensions <= 2 && fits(m);
  const bool wide_arenas =
      m.columns % kQuad == 0 && is_aligned(parameter.data, kQuad * size_of(type_));
  const bool aligned = is_aligned(gradient.data, kQuad * size_of(gradient.type));
  const bool is_turned = is_matrix && c.dimensions == 2 && m.row_stride == 1 && wide_arenas &&
      aligned && m.rows % kQuad == 0 && m.column_stride % kQuad == 0;
  const bool has_whole_groups =
      is_matrix && (c.dimensions < 2 || (is_turned && m.columns % fused_math::kByteGroup == 0));
  if (has_bytes_ && !has_whole_groups) {
    return false;
  }

  gradients |= bit_of(gradient.type);
  const Tensor tensor{
      parameter.data,
      gradient.data,
      size,
      static_cast<uint32_t>(member.offset / kPlace),
      0,
      member.number,
      static_cast<uint16_t>(member.group),
      static_cast<uint16_t>(member.flags),
      gradient.type,
      arenas_ - 1};
  if (!is_matrix) {
    auto& any = append(strided, tensor, divide_up(size, kTile));
    set_dimensions(any, flat ? collapse(dimensions, shape, parameter, gradient) : c);
    std::copy(ways_.begin(), ways_.end(), any.ways);
    return true;
  }
  if (is_turned) {
    const uint64_t squares = divide_up(m.rows, kSquare) * divide_up(m.columns, kSquare);
    add_matrix(turned, tensor, squares, m, kWideArenas | kWideGradient);
    return true;
  }
  const bool wide_gradient =
      aligned && m.column_stride == 1 && m.columns % kQuad == 0 && m.row_stride % kQuad == 0;
  const uint64_t tiles =
      divide_up(m.rows, tile_rows(has_bytes_)) * divide_up(m.columns, kTileColumns);
  add_matrix(
      tiled,
      tensor,
      tiles,
      m,
      (wide_arenas ? uint32_t(kWideArenas) : 0) | (wide_gradient ? uint32_t(kWideGradient) : 0));
  return true;
}

} // namespace mlx_fused_optim::cuda
