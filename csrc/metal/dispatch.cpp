#include "metal/dispatch.h"

#include <algorithm>
#include <limits>

namespace mlx_fused_optim::metal {

using namespace fused_metal;

namespace {

size_t ceil_div(size_t a, size_t b) { return (a + b - 1) / b; }

/// The shape and strides without dimensions of length 1, neighbours merged where
/// one continues the other.
std::vector<std::pair<int64_t, int64_t>> merged_dimensions(const mx::array& a) {
  std::vector<std::pair<int64_t, int64_t>> merged; // length, stride
  for (int d = 0; d < int(a.ndim()); ++d) {
    const int64_t length = a.shape(d), stride = a.strides(d);
    if (length == 1) {
      continue;
    }
    if (!merged.empty() && merged.back().second == stride * length) {
      merged.back() = {merged.back().first * length, stride};
    } else {
      merged.emplace_back(length, stride);
    }
  }
  return merged;
}

/// Threadgroups that cover a tensor: see piece_of_thread in metal/quads.h.
size_t block_count(const StepTensor& tensor, Threadgroups groups) {
  if (tensor.columns == 0) {
    return ceil_div(tensor.size, groups.threads * kQuad * kPasses);
  }
  const size_t rows = tensor.size / tensor.columns;
  const size_t tile_rows = groups.threads / (groups.tile_columns / kQuad) * kPasses;
  return ceil_div(tensor.columns, groups.tile_columns) * ceil_div(rows, tile_rows);
}

} // namespace

std::optional<MatrixView> matrix_view(const mx::array& a) {
  const auto dimensions = merged_dimensions(a);
  if (dimensions.empty()) {
    return MatrixView{0, 1, 0};
  }
  if (dimensions.size() == 1) {
    return MatrixView{0, dimensions[0].second, 0};
  }
  if (dimensions.size() == 2 && dimensions[1].first <= std::numeric_limits<int32_t>::max()) {
    return MatrixView{
        dimensions[0].second, dimensions[1].second, static_cast<uint32_t>(dimensions[1].first)};
  }
  return {};
}

bool is_contiguous(const mx::array& a) {
  const auto view = matrix_view(a);
  return view && view->columns == 0 && view->column_stride == 1;
}

bool Dispatch::add(
    StepTensor tensor,
    const mx::array& parameter,
    const mx::array& gradient,
    size_t most_sources,
    Threadgroups groups) {
  const auto known = sources.size();
  tensor.parameter_source = sources.of(parameter);
  tensor.gradient_source = sources.of(gradient);
  if (sources.size() > most_sources || table.count == kMaxTensors) {
    sources.shrink(known);
    return false;
  }
  tensor.first_block = blocks;
  blocks += block_count(tensor, groups);
  table.tensors[table.count++] = tensor;
  return true;
}

std::vector<Dispatch> make_dispatches(
    const StepPlan& plan,
    const StepInputs& in,
    const Packer& readable,
    bool arena_is_aligned,
    bool gaps,
    size_t most_sources,
    Threadgroups groups) {
  const Arena& arena = *plan.arena;
  std::vector<Dispatch> dispatches;
  for (auto dtype : {mx::float32, mx::float16, mx::bfloat16}) {
    bool has_room = false; // in the latest dispatch, which is of this dtype
    for (size_t i = 0; i < plan.tensor_count(); ++i) {
      const size_t size = plan.tensor_size(i);
      auto& parameter = readable(in.parameter(i));
      auto& gradient = readable(in.gradient(i));
      if (gradient.dtype() != dtype || size == 0) {
        continue;
      }
      const auto view = *matrix_view(gradient);
      const size_t next = i + 1 < arena.offsets.size() ? arena.offsets[i + 1] : arena.size;
      StepTensor tensor{};
      tensor.size = size;
      tensor.gap = gaps ? next - arena.offsets[i] - size : 0;
      tensor.offset = arena.offsets[i];
      tensor.parameter = parameter.offset() + plan.parameter_begin(i) * parameter.itemsize();
      tensor.gradient = gradient.offset() + plan.gradient_begin(i) * gradient.itemsize();
      tensor.row_stride = view.row_stride;
      tensor.column_stride = view.column_stride;
      tensor.columns = view.columns;
      tensor.flags = plan.tensor_flags(i);
      tensor.group = plan.group(i);
      tensor.number = arena.tensors[i];
      // Rows of a matrix begin aligned only if they are whole quads long.
      const bool whole = view.columns % kQuad == 0;
      if (whole && arena_is_aligned && tensor.parameter % (kQuad * parameter.itemsize()) == 0) {
        tensor.wide |= kWideArena;
      }
      if (whole && view.column_stride == 1 && view.row_stride % kQuad == 0 &&
          tensor.gradient % (kQuad * gradient.itemsize()) == 0) {
        tensor.wide |= kWideGradient;
      }
      if (!has_room || !dispatches.back().add(tensor, parameter, gradient, most_sources, groups)) {
        dispatches.push_back(Dispatch(dtype));
        dispatches.back().add(tensor, parameter, gradient, most_sources, groups);
        has_room = true;
      }
    }
  }
  return dispatches;
}

} // namespace mlx_fused_optim::metal
