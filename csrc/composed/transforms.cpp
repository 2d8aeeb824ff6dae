#include "composed/transforms.h"

#include <algorithm>

#include "mlx/transforms.h"

namespace mlx_fused_optim {

namespace {

bool contains(const std::vector<int>& numbers, int number) {
  return std::find(numbers.begin(), numbers.end(), number) != numbers.end();
}

std::vector<mx::array> without(
    const std::map<int, mx::array>& integers,
    const std::vector<mx::array>& arrays) {
  std::vector<mx::array> rest;
  for (size_t i = 0; i < arrays.size(); ++i) {
    if (!integers.contains(static_cast<int>(i))) {
      rest.push_back(arrays[i]);
    }
  }
  return rest;
}

/// The operation as a function of some inputs alone, and without its integers.
struct Differentiable {
  Differentiable(
      const ComposedOperation& operation,
      const std::vector<mx::array>& primals,
      const std::vector<int>& asked)
      : operation(operation), inputs(primals) {
    for (size_t i = 0; i < asked.size(); ++i) {
      if (!contains(operation.input_integers, asked[i])) {
        argnums.push_back(asked[i]);
        positions.push_back(i);
        values.push_back(primals[asked[i]]);
      }
    }
  }

  std::vector<mx::array> operator()(const std::vector<mx::array>& replaced) const {
    auto all = inputs;
    for (size_t i = 0; i < replaced.size(); ++i) {
      all[argnums[i]] = replaced[i];
    }
    return without(operation.output_integers, operation.function(all));
  }

  const ComposedOperation& operation;
  std::vector<mx::array> inputs, values;
  std::vector<int> argnums;
  std::vector<int> positions; // of these among those that were asked for
};

} // namespace

std::vector<mx::array> composed_jvp(
    const ComposedOperation& operation,
    const std::vector<mx::array>& primals,
    const std::vector<mx::array>& tangents,
    const std::vector<int>& argnums) {
  Differentiable function(operation, primals, argnums);
  std::vector<mx::array> directions;
  for (int position : function.positions) {
    directions.push_back(tangents[position]);
  }
  auto result = mx::jvp(function, function.values, directions).second;
  for (auto& [place, zero] : operation.output_integers) { // in increasing order
    result.insert(result.begin() + place, zero);
  }
  return result;
}

std::vector<mx::array> composed_vjp(
    const ComposedOperation& operation,
    const std::vector<mx::array>& primals,
    const std::vector<mx::array>& cotangents,
    const std::vector<int>& argnums) {
  Differentiable function(operation, primals, argnums);
  auto found =
      mx::vjp(function, function.values, without(operation.output_integers, cotangents)).second;
  std::vector<mx::array> result;
  for (int argument : argnums) {
    result.push_back(mx::zeros_like(primals[argument]));
  }
  for (size_t i = 0; i < found.size(); ++i) {
    result[function.positions[i]] = found[i];
  }
  return result;
}

std::pair<std::vector<mx::array>, std::vector<int>> composed_vmap(
    const ComposedOperation& operation,
    const std::vector<mx::array>& inputs,
    const std::vector<int>& axes,
    const std::vector<mx::Shape>& shapes) {
  auto outputs = mx::vmap(operation.function, axes)(inputs);
  // An output that depends on no vectorised input has no batch axis.
  std::vector<int> output_axes;
  for (size_t i = 0; i < outputs.size(); ++i) {
    output_axes.push_back(outputs[i].ndim() > shapes[i].size() ? 0 : -1);
  }
  return {std::move(outputs), std::move(output_axes)};
}

} // namespace mlx_fused_optim
