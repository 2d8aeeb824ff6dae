// What the rules of csrc/math/rules are called and what they have, as a table.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "math/frame.h"

namespace mlx_fused_optim {

struct RuleFlag {
  const char* name;
  uint32_t bit;
};

/// A rule of csrc/math/rules, as its RULE_NAMES have it.
struct RuleDescription {
  const char* name;
  std::vector<const char*> slots; // as mlx.optimizers calls them, but for the momentum of SGD
  std::vector<const char*> scalars;
  std::vector<RuleFlag> flags;
};

/// By number: in the order of fused_math::Rules.
const std::vector<RuleDescription>& rules();

/// Of a slot or a scalar, the frame's among them.
const char* slot_name(uint32_t rule, int slot);
const char* scalar_name(uint32_t rule, std::size_t scalar);

} // namespace mlx_fused_optim
