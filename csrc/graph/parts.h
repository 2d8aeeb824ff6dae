// What a node has made, without MLX's siblings.
#pragma once

#include <list>
#include <memory>
#include <mutex>
#include <vector>

#include "mlx/mlx.h"
#include "mlx/primitives.h"

namespace mlx_fused_optim {

namespace mx = mlx::core;

/// The arrays that a node has made, until the graph takes them. Many outputs are dear: MLX gives
/// each all others as siblings, and visits these for each use of it, twice. So a node of several
/// arenas has one output, a token that nobody reads, and each array is an operation on the token.
/// A node that a compiled function has captured is evaluated with each call, maybe several times
/// before anything is taken: then each evaluation has its own token.
class Parts {
 public:
  std::vector<mx::array>& put(const mx::array& token, std::vector<mx::array> made);
  mx::array take(const mx::array& token, size_t number);

 private:
  struct Made {
    std::weak_ptr<mx::array::Data> token;
    std::vector<mx::array> arrays;
  };
  std::mutex mutex_;
  std::list<Made> made_;
};

/// One of them.
class Part : public mx::Primitive {
 public:
  Part(mx::Stream stream, std::shared_ptr<Parts> parts, size_t number, mx::Shape shape)
      : mx::Primitive(stream),
        parts_(std::move(parts)),
        number_(number),
        shape_(std::move(shape)) {}

  void eval_cpu(const std::vector<mx::array>& inputs, std::vector<mx::array>& outputs) override {
    outputs[0].copy_shared_buffer(parts_->take(inputs[0], number_));
  }
  void eval_gpu(const std::vector<mx::array>& inputs, std::vector<mx::array>& outputs) override {
    eval_cpu(inputs, outputs);
  }

  DEFINE_NAME(Part)
  std::vector<mx::Shape> output_shapes(const std::vector<mx::array>&) override { return {shape_}; }

 private:
  std::shared_ptr<Parts> parts_;
  size_t number_;
  mx::Shape shape_;
};

} // namespace mlx_fused_optim
