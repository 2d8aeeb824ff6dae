#include "graph/rules.h"

namespace mlx_fused_optim {

using namespace fused_math;

namespace {

template <typename... Rule>
std::vector<RuleDescription> described(RuleList<Rule...>) {
  return {Rule::template names<RuleDescription>()...};
}

} // namespace

const std::vector<RuleDescription>& rules() {
  static const std::vector<RuleDescription> table = described(Rules());
  return table;
}

const char* slot_name(uint32_t rule, int slot) {
  constexpr const char* names[] = {"master", "compensation", "ema"};
  return slot < kRuleSlots ? rules().at(rule).slots.at(slot) : names[slot - kRuleSlots];
}

const char* scalar_name(uint32_t rule, size_t scalar) {
  constexpr const char* names[] = {"learning_rate", "weight_decay", "grad_scale"};
  return scalar < kFirstRuleScalar ? names[scalar]
                                   : rules().at(rule).scalars.at(scalar - kFirstRuleScalar);
}

} // namespace mlx_fused_optim
