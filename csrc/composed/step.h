// The step in MLX's operations.
#pragma once

#include "graph/step.h"

namespace mlx_fused_optim {

/// The same step in MLX operations: what FusedStep differentiates and vectorises.
std::vector<mx::array> step_composed(
    const StepPlan& plan,
    const std::vector<mx::array>& inputs,
    mx::Stream stream);

/// A tensor of an arena, all of them, and a number of the step, likewise.
mx::array composed_tensor(
    const mx::array& arena,
    const mx::Shape& shape,
    size_t offset,
    mx::Stream stream);
std::vector<mx::array> composed_tensors(
    const mx::array& arena,
    const Arena& layout,
    mx::Stream stream);
mx::array composed_scalar(
    const StepControl& control,
    int i,
    const mx::array* step,
    const mx::array* given,
    mx::Stream stream);
/// fused_math::step_unscale of the step's scale.
mx::array composed_unscale(
    const StepControl& control,
    const mx::array* step,
    const mx::array* given,
    mx::Stream stream);

} // namespace mlx_fused_optim
