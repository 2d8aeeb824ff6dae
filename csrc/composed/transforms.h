// Differentiation and vectorisation of a primitive through the same operation composed
// of MLX's, which MLX can transform. Slow, and never on the way of a training step.
#pragma once

#include <functional>
#include <map>
#include <vector>

#include "mlx/mlx.h"

namespace mlx_fused_optim {

namespace mx = mlx::core;

/// An operation in MLX's operations, and which of its inputs and outputs are integers
/// (counters, bytes), which have no derivative.
struct ComposedOperation {
  std::function<std::vector<mx::array>(const std::vector<mx::array>&)> function;
  std::vector<int> input_integers;
  std::map<int, mx::array> output_integers; // zeros of their shapes and dtypes
};

std::vector<mx::array> composed_jvp(
    const ComposedOperation& operation,
    const std::vector<mx::array>& primals,
    const std::vector<mx::array>& tangents,
    const std::vector<int>& argnums);

std::vector<mx::array> composed_vjp(
    const ComposedOperation& operation,
    const std::vector<mx::array>& primals,
    const std::vector<mx::array>& cotangents,
    const std::vector<int>& argnums);

/// `shapes` are those of the outputs without a batch.
std::pair<std::vector<mx::array>, std::vector<int>> composed_vmap(
    const ComposedOperation& operation,
    const std::vector<mx::array>& inputs,
    const std::vector<int>& axes,
    const std::vector<mx::Shape>& shapes);

} // namespace mlx_fused_optim
