#include "graph/rules.h"

namespace mlx_fused_optim {

using namespace fused_math;

const std::vector<RuleDescription>& rules() {
  static const std::vector<RuleDescription> table = {
      {"sgd",
       {"momentum"},
       {"momentum", "dampening"},
       {{"momentum", kMomentum}, {"nesterov", kNesterov}}},
      {"adam",
       {"m", "v", "largest_v"},
       {"beta1", "beta2", "eps"},
       {{"bias_correction", kBiasCorrection}, {"amsgrad", kAmsgrad}}},
      {"adamax", {"m", "v"}, {"beta1", "beta2", "eps"}, {}},
      {"lion", {"m"}, {"beta1", "beta2"}, {}},
      {"rmsprop", {"v"}, {"alpha", "eps"}, {}},
      {"adagrad", {"v"}, {"eps"}, {}},
      {"adadelta", {"v", "u"}, {"rho", "eps"}, {}},
  };
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
