#include "view.h"

#include <algorithm>

namespace mlx_fused_optim {

namespace {

// Measured on 448 tensors of (64,), ms a step on two cores: 1.02 with one view a
// node, 0.81 with 4, 0.75 with 8, 0.84 with 16. One a node also makes MLX block in
// the middle of the views: it lets ten tasks of ten nodes be under way.
constexpr size_t kViewsPerNode = 8;

} // namespace

std::vector<mx::array> arena_views(
    const mx::array& arena,
    const std::vector<mx::Shape>& shapes,
    const std::vector<size_t>& offsets,
    mx::StreamOrDevice s) {
  auto stream = mx::to_stream(s);
  std::vector<mx::array> views;
  views.reserve(shapes.size());
  for (size_t begin = 0; begin < shapes.size(); begin += kViewsPerNode) {
    const size_t end = std::min(begin + kViewsPerNode, shapes.size());
    std::vector<mx::Shape> node_shapes(shapes.begin() + begin, shapes.begin() + end);
    std::vector<size_t> node_offsets(offsets.begin() + begin, offsets.begin() + end);
    auto node = mx::array::make_arrays(
        node_shapes,
        std::vector<mx::Dtype>(end - begin, arena.dtype()),
        std::make_shared<ArenaViews>(stream, node_shapes, std::move(node_offsets)),
        {arena});
    std::move(node.begin(), node.end(), std::back_inserter(views));
  }
  return views;
}

mx::array arena_view(
    const mx::array& arena,
    const mx::Shape& shape,
    size_t offset,
    mx::StreamOrDevice s) {
  return arena_views(arena, {shape}, {offset}, s)[0];
}

mx::array pack_arena(
    const std::vector<mx::array>& tensors,
    const std::vector<size_t>& offsets,
    size_t size,
    mx::StreamOrDevice s) {
  std::vector<mx::array> pieces;
  size_t at = 0;
  auto skip_to = [&](size_t next) {
    if (next > at) {
      pieces.push_back(mx::zeros({static_cast<int>(next - at)}, tensors[0].dtype(), s));
    }
  };
  for (size_t i = 0; i < tensors.size(); ++i) {
    skip_to(offsets[i]);
    pieces.push_back(mx::flatten(tensors[i], s));
    at = offsets[i] + tensors[i].size();
  }
  skip_to(size);
  return mx::concatenate(pieces, 0, s);
}

void ArenaViews::eval(const std::vector<mx::array>& inputs, std::vector<mx::array>& outputs) {
  for (size_t i = 0; i < outputs.size(); ++i) {
    auto& view = outputs[i];
    // Row-contiguous, and column-contiguous too where at most one axis is longer than 1.
    const bool is_vector = std::count_if(shapes_[i].begin(), shapes_[i].end(), [](auto length) {
                             return length > 1;
                           }) <= 1;
    view.copy_shared_buffer(
        inputs[0],
        view.strides(),
        {true, true, is_vector || view.size() == 0},
        view.size(),
        static_cast<int64_t>(offsets_[i]));
  }
}

std::vector<mx::array> ArenaViews::jvp(
    const std::vector<mx::array>&,
    const std::vector<mx::array>& tangents,
    const std::vector<int>&) {
  return arena_views(mx::contiguous(tangents[0], false, stream()), shapes_, offsets_, stream());
}

std::vector<mx::array> ArenaViews::vjp(
    const std::vector<mx::array>& primals,
    const std::vector<mx::array>& cotangents,
    const std::vector<int>&,
    const std::vector<mx::array>&) {
  auto flat = pack_arena(cotangents, offsets_, primals[0].size(), stream());
  return {mx::reshape(flat, primals[0].shape(), stream())};
}

std::pair<std::vector<mx::array>, std::vector<int>> ArenaViews::vmap(
    const std::vector<mx::array>& inputs,
    const std::vector<int>& axes) {
  // Several arenas at once are no longer flat: slice them like any array.
  auto arenas = mx::flatten(mx::moveaxis(inputs[0], axes[0], 0, stream()), 1, -1, stream());
  const int batch = arenas.shape(0);
  std::vector<mx::array> views;
  for (size_t i = 0; i < shapes_.size(); ++i) {
    const int begin = offsets_[i];
    const int end = begin + static_cast<int>(element_count(shapes_[i]));
    auto shape = shapes_[i];
    shape.insert(shape.begin(), batch);
    views.push_back(
        mx::reshape(mx::slice(arenas, {0, begin}, {batch, end}, stream()), shape, stream()));
  }
  return {std::move(views), std::vector<int>(shapes_.size(), 0)};
}

bool ArenaViews::is_equivalent(const mx::Primitive& other) const {
  auto& that = static_cast<const ArenaViews&>(other);
  return shapes_ == that.shapes_ && offsets_ == that.offsets_;
}

} // namespace mlx_fused_optim
