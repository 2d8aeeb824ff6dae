// csrc/math/rules in MLX operations.
#pragma once

#include <array>
#include <optional>

#include "math/frame.h"
#include "mlx/mlx.h"

namespace mlx_fused_optim {

namespace mx = mlx::core;

/// As fused_math::RuleNumbers, scalars each.
struct ComposedNumbers {
  mx::array learning_rate;
  std::array<mx::array, fused_math::kRuleScalars> scalar, rest;
  mx::array corrected_rate, corrected_root;
};

/// In float32; those that the rule has.
using ComposedSlots = std::array<std::optional<mx::array>, fused_math::kRuleSlots>;

struct ComposedRuleStep {
  mx::array change;
  ComposedSlots slots;
};

ComposedRuleStep rule_composed(
    uint32_t rule,
    const mx::array& gradient,
    ComposedSlots slots,
    const ComposedNumbers& numbers,
    uint32_t flags,
    mx::Stream s);

/// At update `t` (uint64 scalar, 1 or more); `low` are the second parts of the factors.
ComposedNumbers bias_corrected_composed(
    ComposedNumbers numbers,
    const mx::array& low0,
    const mx::array& low1,
    const mx::array& t);

} // namespace mlx_fused_optim
