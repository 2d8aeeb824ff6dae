// Tensors of an arena, without a copy.
#pragma once

#include <optional>
#include <vector>

#include "graph/layout.h"
#include "mlx/mlx.h"
#include "mlx/primitives.h"

namespace mlx_fused_optim {

/// A step in rounds calls it at the beginning of each, on a GPU that lets the host run ahead: waits
/// until the round before the last is done, and so its memory free. Of csrc/{metal,cuda,no_gpu}.
void pace(mx::Stream stream);

/// `count` tensors of a row-contiguous arena, from the tensor `first` on. Several a node,
/// because MLX evaluates and queues node by node; only a few, because it also visits every
/// output of a node for each of them.
class ArenaViews : public mx::Primitive {
 public:
  ArenaViews(
      mx::Stream stream,
      std::shared_ptr<const Arena> layout,
      size_t first,
      size_t count,
      bool paced = false)
      : mx::Primitive(stream),
        layout_(std::move(layout)),
        first_(first),
        count_(count),
        paced_(paced) {}

  void eval_cpu(const std::vector<mx::array>& inputs, std::vector<mx::array>& outputs) override {
    eval(inputs, outputs);
  }
  void eval_gpu(const std::vector<mx::array>& inputs, std::vector<mx::array>& outputs) override {
    if (paced_) {
      pace(stream());
    }
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
  std::vector<mx::Shape> output_shapes(const std::vector<mx::array>&) override { return shapes(); }
  bool is_equivalent(const mx::Primitive& other) const override;
  size_t offset(size_t i) const { return layout_->offsets[first_ + i]; }

 private:
  void eval(const std::vector<mx::array>& inputs, std::vector<mx::array>& outputs);
  const mx::Shape& shape(size_t i) const { return layout_->shapes[first_ + i]; }
  std::vector<mx::Shape> shapes() const;
  std::shared_ptr<const Arena> layout_; // only shapes and offsets count
  size_t first_;
  size_t count_;
  bool paced_;
};

/// Makes the arrays from `first` on the outputs of one node. As mx::array::make_arrays does, but
/// with the memory that they need and no more: a step makes hundreds.
void make_siblings(std::vector<mx::array>& arrays, size_t first);

/// Nodes that so many views of an arena are.
size_t view_nodes(size_t views, mx::Stream stream);

/// All tensors of a row-contiguous arena.
std::vector<mx::array> arena_views(
    const mx::array& arena,
    std::shared_ptr<const Arena> layout,
    mx::StreamOrDevice s = {});

/// One, at an offset (elements).
mx::array arena_view(
    const mx::array& arena,
    const mx::Shape& shape,
    size_t offset,
    mx::StreamOrDevice s = {},
    bool paced = false);

/// A tensor in a row-contiguous array.
struct FlatPlace {
  const mx::array* flat; // the view's
  size_t begin; // elements
};

/// Of a view that is a node of the graph still, and that so need not be made.
std::optional<FlatPlace> flat_place(const mx::array& view);

/// Its first input, without a copy, once the second is there.
class After : public mx::Primitive {
 public:
  explicit After(mx::Stream stream) : mx::Primitive(stream) {}
  void eval_cpu(const std::vector<mx::array>& inputs, std::vector<mx::array>& outputs) override {
    outputs[0].copy_shared_buffer(inputs[0]);
  }
  void eval_gpu(const std::vector<mx::array>& inputs, std::vector<mx::array>& outputs) override {
    outputs[0].copy_shared_buffer(inputs[0]);
  }
  std::vector<mx::array> vjp(
      const std::vector<mx::array>& primals,
      const std::vector<mx::array>& cotangents,
      const std::vector<int>& argnums,
      const std::vector<mx::array>& outputs) override;
  std::vector<mx::array> jvp(
      const std::vector<mx::array>& primals,
      const std::vector<mx::array>& tangents,
      const std::vector<int>& argnums) override;
  std::pair<std::vector<mx::array>, std::vector<int>> vmap(
      const std::vector<mx::array>& inputs,
      const std::vector<int>& axes) override;

  DEFINE_NAME(After)
  DEFINE_DEFAULT_IS_EQUIVALENT()
  std::vector<mx::Shape> output_shapes(const std::vector<mx::array>& inputs) override {
    return {inputs[0].shape()};
  }
};

/// `x` for what has to come after `other`: collectives, which every process must take in the
/// same order, whatever of their inputs is there already; batches whose products are not to be
/// there all at once. On the other's stream. As mx::depends, which has no transformations.
mx::array after(const mx::array& x, const mx::array& other);

/// The way back: the tensors in one flat array of `size` elements, with zeros
/// between them. All have the dtype of the arena. New memory, even of one tensor.
mx::array pack_arena(
    const std::vector<mx::array>& tensors,
    const std::vector<size_t>& offsets,
    size_t size,
    mx::StreamOrDevice s = {});

/// An arena of a slot: zeros for tensors that are not given. Without a dtype, that which all
/// of them can be promoted to.
mx::array pack_slot(
    const std::vector<std::optional<mx::array>>& tensors,
    const Arena& layout,
    std::optional<mx::Dtype> dtype,
    mx::StreamOrDevice s = {});

} // namespace mlx_fused_optim
