// The step in MLX operations: csrc/math/frame.h once more, for what MLX can transform. The rules
// are those of csrc/math/rules.
#include <bit>

#include "composed/operators.h"
#include "composed/rounding.h"
#include "composed/step.h"
#include "composed/transforms.h"
#include "mlx/transforms.h"

namespace mlx_fused_optim {

namespace {

using namespace fused_math;

mx::array pack(const std::vector<mx::array>& tensors, const Arena& arena, mx::Stream s) {
  return mx::reshape(pack_arena(tensors, arena.offsets, arena.size, s), arena_shape(arena), s);
}

mx::array number(float value) { return mx::array(value); }

/// The numbers of a step, as scalars.
struct Numbers {
  RuleNumbers<Composed> rule;
  mx::array weight_decay, unscale, clip_factor, trust_ratio;
  std::array<mx::array, kRuleScalars> low; // what is known of the rule's beyond float32
};

class ComposedStep : ComposedOperators {
 public:
  ComposedStep(const StepPlan& plan, const std::vector<mx::array>& inputs, mx::Stream s)
      : ComposedOperators(s), plan_(plan), control_(plan.control), in_(plan, inputs) {}

  std::vector<mx::array> outputs() const;

 private:
  struct Tensor {
    mx::array parameter;
    std::array<std::optional<mx::array>, kSlots> slots;
  };

  Composed of(mx::array x) const { return {std::move(x), s}; }
  mx::array scalar(int i) const;
  mx::array measured(int i) const { return mx::take(*in_.measured, i, 0, s); }
  mx::array applies() const { return mx::not_equal(measured(kMeasuredApply), number(0), s); }
  /// 1 where the step is skipped: infinities have no way into its derivatives.
  mx::array norm(int i) const {
    const bool skips = plan_.flags() & kSkipNonfinite;
    return skips ? mx::where(applies(), measured(i), number(1), s) : measured(i);
  }
  Numbers numbers() const;
  Numbers tensor_numbers(Numbers numbers, size_t i) const;
  void correct_bias(Numbers& numbers) const;
  Tensor update(size_t i, const Numbers& numbers) const;
  mx::array parameter(size_t i) const;
  mx::array gradient(size_t i, const Numbers& numbers) const;
  /// Rounded and stored: at random with the low bits of `random`, else to nearest.
  mx::array stored(const mx::array& x, mx::Dtype dtype, const std::optional<mx::array>& random)
      const;
  mx::array stored_slot(const mx::array& x, int slot, std::optional<mx::array> random) const;

  const StepPlan& plan_;
  const StepControl& control_;
  StepInputs in_;
};

mx::array ComposedStep::scalar(int i) const {
  return composed_scalar(control_, i, in_.step, in_.given, s);
}

Numbers ComposedStep::numbers() const {
  const auto zero = number(0), one = number(1);
  Numbers n{{}, scalar(kWeightDecayFactor), one, one, one, {zero, zero, zero}};
  n.rule.learning_rate = of(scalar(kLearningRate));
  for (int i = 0; i < kRuleScalars; ++i) {
    const int at = kFirstRuleScalar + i;
    const bool constant = is_constant(control_, at);
    n.rule.scalar[i] = of(scalar(at));
    n.rule.rest[i] = constant ? of(number(control_.rest[i])) : 1.0f - n.rule.scalar[i];
    n.low[i] = number(constant ? control_.constants[at].lo : 0.0f);
  }
  if (plan_.flags() & kGradScale) {
    n.unscale = composed_unscale(control_, in_.step, in_.given, s);
    if (plan_.flags() & kSkipNonfinite) {
      n.unscale = mx::where(applies(), n.unscale, one, s);
    }
  }
  if (plan_.flags() & kClipNorm) {
    const auto least = add(norm(kMeasuredNorm), number(1e-6f));
    n.clip_factor = mx::minimum(divide(number(control_.clip_norm), least), one, s);
  }
  return n;
}

Numbers ComposedStep::tensor_numbers(Numbers n, size_t i) const {
  const uint32_t flags = plan_.tensor_flags(i);
  auto coefficient = number(control_.trust_coefficient);
  if (flags & kGroups) {
    const auto row = mx::take(*in_.groups, int(plan_.group(i)), 0, s);
    auto own = [&](int i) { return mx::take(row, i, 0, s); };
    auto affine = [&](const mx::array& x, int times, int plus) {
      return add(multiply(own(times), x), own(plus));
    };
    auto own_number = [&](Composed& x, int times, int plus) {
      x = of(affine(x.array, times, plus));
    };
    own_number(n.rule.learning_rate, kLearningRateTimes, kLearningRatePlus);
    for (int i = 0; i < kRuleScalars; ++i) {
      const int times = kFirstScalarTimes + kGroupScalar * i;
      n.low[i] = affine(n.low[i], times, times + 2);
      own_number(n.rule.rest[i], times, times + 3);
      own_number(n.rule.scalar[i], times, times + 1);
    }
    n.weight_decay = affine(n.weight_decay, kWeightDecayTimes, kWeightDecayPlus);
    coefficient = own(kTrustCoefficient);
  }
  if (flags & kTrustRatio) {
    const int at = kMeasuredTensors + 2 * plan_.arena->tensors[i];
    const auto gradient = multiply(norm(at), n.clip_factor), parameter = norm(at + 1);
    const bool decays = (flags & kWeightDecay) && !(flags & kDecoupled);
    const auto both = mx::logical_and(
        mx::greater(gradient, number(0), s), mx::greater(parameter, number(0), s), s);
    const auto below = decays ? add(gradient, multiply(n.weight_decay, parameter)) : gradient;
    // What is not chosen must not divide by zero either: its derivative would be NaN.
    const auto ratio =
        mx::divide(multiply(coefficient, parameter), mx::where(both, below, number(1), s), s);
    const auto counts = mx::logical_and(both, mx::isfinite(ratio, s), s);
    n.trust_ratio = mx::where(counts, ratio, number(1), s);
  }
  if (Rules::is_bias_corrected(control_.rule, flags)) {
    correct_bias(n);
  }
  return n;
}

void ComposedStep::correct_bias(Numbers& n) const {
  // In float64, which MLX has on the CPU. It is as exact as csrc/math, not bit for bit.
  const auto cpu = mx::default_stream(mx::Device::cpu);
  auto exact = [&](const mx::array& x) { return mx::astype(x, mx::float64, cpu); };
  const auto t = exact(add(*in_.step, mx::array(uint64_t(1), mx::uint64)));
  auto bias = [&](int i) {
    const auto factor = mx::add(exact(n.rule.scalar[i].array), exact(n.low[i]), cpu);
    return mx::subtract(mx::array(1.0, mx::float64), mx::power(factor, t, cpu), cpu);
  };
  auto rounded = [&](const mx::array& x) { return of(mx::astype(x, mx::float32, cpu)); };
  n.rule.corrected_rate = rounded(mx::divide(exact(n.rule.learning_rate.array), bias(0), cpu));
  n.rule.corrected_root = rounded(mx::rsqrt(bias(1), cpu));
}

mx::array ComposedStep::parameter(size_t i) const {
  auto& arena = *plan_.arena;
  return in_.whole ? composed_tensor(in_.parameters[0], arena.shapes[i], arena.offsets[i], s)
                   : in_.parameters[i];
}

mx::array ComposedStep::gradient(size_t i, const Numbers& n) const {
  const uint32_t flags = plan_.flags();
  auto g = wide(in_.gradients[i]);
  if (flags & kSkipNonfinite) {
    g = mx::where(applies(), g, number(0), s);
  }
  if (flags & kMaximize) {
    g = mx::negative(g, s);
  }
  if (flags & kGradScale) {
    g = multiply(g, n.unscale);
  }
  if (flags & kClipValue) {
    const auto limit = number(control_.clip_value);
    g = mx::where(mx::greater(g, limit, s), limit, g, s);
    g = mx::where(mx::less(g, mx::negative(limit, s), s), mx::negative(limit, s), g, s);
  }
  return flags & kClipNorm ? multiply(g, n.clip_factor) : g;
}

mx::array ComposedStep::stored(
    const mx::array& x,
    mx::Dtype dtype,
    const std::optional<mx::array>& random) const {
  return mx::astype(random ? random_composed(x, dtype, *random, s) : x, dtype, s);
}

mx::array ComposedStep::stored_slot(const mx::array& x, int slot, std::optional<mx::array> random)
    const {
  if (random && slot > 0) {
    random = mix32_composed(*random, s);
  }
  if (random && slot < 2) {
    random = mx::right_shift(*random, mx::array(16u, mx::uint32), s);
  }
  return stored(x, plan_.state_dtype, random);
}

ComposedStep::Tensor ComposedStep::update(size_t i, const Numbers& step) const {
  const uint32_t flags = plan_.tensor_flags(i);
  const auto n = tensor_numbers(step, i);
  const auto& arena = *plan_.arena;
  std::array<std::optional<mx::array>, kSlots> old;
  for (int slot = 0; slot < kSlots; ++slot) {
    if (in_.slots[slot]) {
      old[slot] = composed_tensor(*in_.slots[slot], arena.shapes[i], arena.offsets[i], s);
    }
  }

  const auto given = this->parameter(i);
  const auto parameter = wide(given);
  auto w = parameter;
  if (flags & kMaster) {
    const auto rounded = nearest_composed(*old[kMasterCopy], arena.dtype, s);
    w = mx::where(mx::equal(rounded, parameter, s), *old[kMasterCopy], parameter, s);
  }
  auto u = gradient(i, n);
  if ((flags & kWeightDecay) && !(flags & kDecoupled)) {
    u = add(u, multiply(n.weight_decay, w));
  }
  if (flags & kTrustRatio) {
    u = multiply(u, n.trust_ratio);
  }
  RuleSlots<Composed> wide_slots;
  for (int slot = 0; slot < kRuleSlots; ++slot) {
    if (old[slot]) {
      wide_slots.of[slot] = of(wide(*old[slot]));
    }
  }
  const auto ruled = Rules::step(control_.rule, of(u), wide_slots, n.rule, flags);
  Tensor next{parameter, old};
  std::optional<mx::array> random;
  if (flags & kStochastic) {
    random = random_bits_composed(
        arena.shapes[i], arena.offsets[i], control_.seed, *in_.step, control_.place, s);
  }
  for (int slot = 0; slot < Rules::slots(control_.rule, flags); ++slot) {
    next.slots[slot] = stored_slot(ruled.slots.of[slot].array, slot, random);
  }
  if ((flags & kWeightDecay) && (flags & kDecoupled)) {
    const auto decay = multiply(n.rule.learning_rate.array, n.weight_decay);
    w = multiply(w, subtract(number(1), decay));
  }
  auto exact = subtract(w, ruled.change.array);
  if (flags & kCompensated) {
    const auto change = subtract(wide(*old[kCompensation]), ruled.change.array);
    exact = add(w, change);
    const auto rounded = nearest_composed(exact, arena.dtype, s);
    next.parameter = mx::astype(rounded, arena.dtype, s);
    next.slots[kCompensation] = mx::astype(subtract(change, subtract(rounded, w)), arena.dtype, s);
  } else {
    const bool at_random = (flags & kStochastic) && !(flags & kMaster);
    next.parameter = stored(exact, arena.dtype, at_random ? random : std::nullopt);
    if (flags & kMaster) {
      next.slots[kMasterCopy] = exact;
    } else {
      exact = wide(next.parameter);
    }
  }
  if (flags & kAverage) {
    const auto& average = *old[kMovingAverage];
    next.slots[kMovingAverage] =
        add(average, multiply(number(control_.average_weight), subtract(exact, average)));
  }

  if (flags & kSkipNonfinite) {
    const auto apply = applies();
    next.parameter = mx::where(apply, next.parameter, given, s);
    for (int slot = 0; slot < kSlots; ++slot) {
      if (old[slot]) {
        next.slots[slot] = mx::where(apply, *next.slots[slot], *old[slot], s);
      }
    }
  }
  return next;
}

std::vector<mx::array> ComposedStep::outputs() const {
  const auto step = numbers();
  std::vector<mx::array> parameters;
  std::array<std::vector<mx::array>, kSlots> slots;
  for (size_t i = 0; i < plan_.tensor_count(); ++i) {
    auto next = update(i, step);
    parameters.push_back(next.parameter);
    for (int slot = 0; slot < kSlots; ++slot) {
      if (next.slots[slot]) {
        slots[slot].push_back(*next.slots[slot]);
      }
    }
  }

  std::vector<mx::array> outputs;
  if (!parameters.empty()) {
    outputs.push_back(pack(parameters, *plan_.arena, s));
  }
  for (int slot = 0; slot < kSlots; ++slot) {
    if (plan_.has(slot)) {
      outputs.push_back(pack(slots[slot], *plan_.arena, s));
    }
  }
  if (plan_.writes_step) {
    auto one = mx::array(uint64_t(1), mx::uint64);
    if (plan_.flags() & kSkipNonfinite) {
      one = mx::astype(measured(kMeasuredApply), mx::uint64, s);
    }
    std::vector<mx::array> used;
    for (int i = 0; i < kScalars; ++i) {
      const bool absent = i == kGradScaleFactor && !(plan_.flags() & kGradScale);
      used.push_back(absent ? number(1) : scalar(i));
    }
    outputs.push_back(add(*in_.step, one));
    outputs.push_back(mx::stack(used, 0, s));
  }
  return outputs;
}

ComposedOperation composed_operation(const StepPlan& plan, mx::Stream s) {
  const int slots = [&] {
    int count = 0;
    for (int slot = 0; slot < kSlots; ++slot) {
      count += plan.has(slot);
    }
    return count;
  }();
  std::vector<int> step_in, step_out;
  if (plan.reads_step()) {
    step_in.push_back(int(plan.parameter_inputs() + plan.tensor_count()) + slots);
  }
  if (plan.writes_step) {
    step_out.push_back((plan.tensor_count() > 0) + slots);
  }
  return {
      [&plan, s](const std::vector<mx::array>& inputs) { return step_composed(plan, inputs, s); },
      step_in,
      step_out};
}

} // namespace

mx::array composed_scalar(
    const StepControl& control,
    int i,
    const mx::array* step,
    const mx::array* given,
    mx::Stream s) {
  if (control.given >> i & 1) { // a scalar alone, or one of several
    return given->ndim() == 0 ? *given : mx::take(*given, i, 0, s);
  }
  if (control.scheduled >> i & 1) {
    const int place = std::popcount(control.scheduled & ((1u << i) - 1));
    return evaluate_schedule(control.schedules[place], *step, s);
  }
  return number(control.constants[i].hi);
}

mx::array composed_unscale(
    const StepControl& control,
    const mx::array* step,
    const mx::array* given,
    mx::Stream s) {
  const auto scale = composed_scalar(control, kGradScaleFactor, step, given, s);
  const auto inverts =
      mx::logical_and(mx::greater_equal(scale, number(0x1p-126f), s), mx::isfinite(scale, s), s);
  const auto reciprocal = mx::divide(number(1), mx::where(inverts, scale, number(1), s), s);
  return mx::where(inverts, reciprocal, number(NAN), s);
}

mx::array composed_tensor(
    const mx::array& arena,
    const mx::Shape& shape,
    size_t offset,
    mx::Stream s) {
  // In slices, which MLX can also export.
  if (arena.ndim() > 1) { // too long for one axis: it has one tensor
    return mx::reshape(arena, shape, s);
  }
  const int begin = static_cast<int>(offset);
  const int end = static_cast<int>(offset + element_count(shape));
  return mx::reshape(mx::slice(arena, {begin}, {end}, s), shape, s);
}

std::vector<mx::array> composed_tensors(const mx::array& arena, const Arena& layout, mx::Stream s) {
  std::vector<mx::array> tensors;
  for (size_t i = 0; i < layout.shapes.size(); ++i) {
    tensors.push_back(composed_tensor(arena, layout.shapes[i], layout.offsets[i], s));
  }
  return tensors;
}

std::vector<mx::array> step_composed(
    const StepPlan& plan,
    const std::vector<mx::array>& inputs,
    mx::Stream s) {
  return ComposedStep(plan, inputs, s).outputs();
}

std::vector<mx::array> FusedStep::jvp(
    const std::vector<mx::array>& primals,
    const std::vector<mx::array>& tangents,
    const std::vector<int>& argnums) {
  return composed_jvp(composed_operation(plan_, stream()), primals, tangents, argnums);
}

std::vector<mx::array> FusedStep::vjp(
    const std::vector<mx::array>& primals,
    const std::vector<mx::array>& cotangents,
    const std::vector<int>& argnums,
    const std::vector<mx::array>&) {
  return composed_vjp(composed_operation(plan_, stream()), primals, cotangents, argnums);
}

std::pair<std::vector<mx::array>, std::vector<int>> FusedStep::vmap(
    const std::vector<mx::array>& inputs,
    const std::vector<int>& axes) {
  return composed_vmap(composed_operation(plan_, stream()), inputs, axes, plan_.output_shapes());
}

} // namespace mlx_fused_optim
