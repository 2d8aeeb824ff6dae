// Tensors of an arena, without a copy.
#pragma once

#include <vector>

#include "layout.h"
#include "mlx/mlx.h"
#include "mlx/primitives.h"

namespace mlx_fused_optim {

/// Some tensors of a row-contiguous arena. Several a node, because MLX evaluates
/// and queues node by node; only a few, because it also visits every output of a
/// node for each of them.
class ArenaViews : public mx::Primitive {
 public:
  ArenaViews(mx::Stream stream, std::vector<mx::Shape> shapes, std::vector<size_t> offsets)
      : mx::Primitive(stream), shapes_(std::move(shapes)), offsets_(std::move(offsets)) {}

  void eval_cpu(const std::vector<mx::array>& inputs, std::vector<mx::array>& outputs) override {
    eval(inputs, outputs);
  }
  void eval_gpu(const std::vector<mx::array>& inputs, std::vector<mx::array>& outputs) override {
    eval(inputs, outputs);
  }

  std::vector<mx::array> jvp(
      const std::vector<mx::array>& primals,
      const std::vector<mx::array>& tangents,
      const std::vector<int>& argnums) override;
  std::vector<mx::array> vjp(
      const std::vector<mx::array>& primals,
      const std::vector<mx::array>& cotangents,
      const std::vector<int>& argnums,
      const std::vector<mx::array>& outputs) override;
  std::pair<std::vector<mx::array>, std::vector<int>> vmap(
      const std::vector<mx::array>& inputs,
      const std::vector<int>& axes) override;

  DEFINE_NAME(ArenaViews)
  std::vector<mx::Shape> output_shapes(const std::vector<mx::array>&) override { return shapes_; }
  bool is_equivalent(const mx::Primitive& other) const override;

 private:
  void eval(const std::vector<mx::array>& inputs, std::vector<mx::array>& outputs);
  std::vector<mx::Shape> shapes_;
  std::vector<size_t> offsets_; // elements, increasing
};

/// The tensors of these shapes at these offsets (elements, increasing) of a
/// row-contiguous arena.
std::vector<mx::array> arena_views(
    const mx::array& arena,
    const std::vector<mx::Shape>& shapes,
    const std::vector<size_t>& offsets,
    mx::StreamOrDevice s = {});

/// One of them.
mx::array arena_view(
    const mx::array& arena,
    const mx::Shape& shape,
    size_t offset,
    mx::StreamOrDevice s = {});

/// The way back: the tensors in one flat array of `size` elements, with zeros
/// between them. All have the dtype of the arena.
mx::array pack_arena(
    const std::vector<mx::array>& tensors,
    const std::vector<size_t>& offsets,
    size_t size,
    mx::StreamOrDevice s = {});

} // namespace mlx_fused_optim
