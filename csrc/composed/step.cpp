// The step in MLX operations: csrc/math/frame.h once more, for what MLX can transform. The rules
// are those of csrc/math/rules.
#include <bit>

#include "composed/bytes.h"
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

/// Likewise, of rows of bytes.
mx::array pack_rows(const std::vector<mx::array>& tensors, const Arena& arena, mx::Stream s) {
  std::vector<size_t> offsets;
  for (auto offset : arena.offsets) {
    offsets.push_back(offset / kByteGroup * kByteRow);
  }
  const int rows = static_cast<int>(arena.size / kByteGroup), row = kByteRow;
  return mx::reshape(pack_arena(tensors, offsets, size_t(rows) * row, s), {rows, row}, s);
}

/// The numbers of a step, as scalars.
struct Numbers {
  RuleNumbers<Composed> rule;
  Composed weight_decay, unscale = 1.0f, clip_factor = 1.0f, trust_ratio = 1.0f;
  std::array<Composed, kRuleScalars> low; // what is known of the rule's beyond float32
};

class ComposedStep {
 public:
  ComposedStep(const StepPlan& plan, const std::vector<mx::array>& inputs, mx::Stream s)
      : s(s),
        plan_(plan),
        control_(plan.control()),
        in_(plan, inputs.data(), inputs.data() + plan.array_inputs()) {}

  std::vector<mx::array> outputs() const;

 private:
  using Random = std::optional<mx::array>; // bits of each element, or none
  struct Tensor {
    Composed parameter;
    std::array<std::optional<Composed>, kSlots> slots;
  };

  Composed of(mx::array x) const { return {std::move(x), s}; }
  Composed at(const mx::array& numbers, int i) const { return of(mx::take(numbers, i, 0, s)); }
  Composed scalar(int i) const { return of(composed_scalar(control_, i, in_.step, in_.given, s)); }
  Composed measured(int i) const { return at(*in_.measured, i); }
  Composed applies() const { return measured(kMeasuredApply) != 0.0f; }
  /// 1 where the step is skipped: infinities have no way into its derivatives.
  Composed norm(int i) const {
    const bool skips = plan_.flags() & kSkipNonfinite;
    return skips ? choose(applies(), measured(i), 1.0f) : measured(i);
  }
  Numbers numbers() const;
  Numbers tensor_numbers(Numbers numbers, size_t i) const;
  void correct_bias(Numbers& numbers) const;
  Tensor update(size_t i, const Numbers& numbers) const;
  Composed parameter(size_t i) const;
  Composed gradient(size_t i, const Numbers& numbers) const;
  /// Rounded and stored: at random with the low bits of `random`, else to nearest.
  Composed stored(const Composed& x, mx::Dtype dtype, const Random& random) const;
  Composed stored_slot(const Composed& x, int slot, Random random) const;
  /// What the state has of tensor `i`, as it is stored; and a slot of the rule as a number.
  Composed slot_of(int slot, size_t i) const;
  Composed wide_slot(const Composed& stored, int slot, size_t i) const;
  Composed nearest(const Composed& x, mx::Dtype dtype) const {
    return of(nearest_composed(x.array, dtype, s));
  }

  mx::Stream s;
  const StepPlan& plan_;
  const StepControl control_;
  StepInputs in_;
};

Numbers ComposedStep::numbers() const {
  Numbers n;
  n.weight_decay = scalar(kWeightDecayFactor);
  n.rule.learning_rate = scalar(kLearningRate);
  for (int i = 0; i < kRuleScalars; ++i) {
    const int at = kFirstRuleScalar + i;
    const bool constant = is_constant(control_, at);
    n.rule.scalar[i] = scalar(at);
    n.rule.rest[i] = constant ? control_.rest[i] : 1.0f - n.rule.scalar[i];
    n.low[i] = constant ? control_.constants[at].lo : 0.0f;
  }
  if (plan_.flags() & kGradScale) {
    n.unscale = of(composed_unscale(control_, in_.step, in_.given, s));
    if (plan_.flags() & kSkipNonfinite) {
      n.unscale = choose(applies(), n.unscale, 1.0f);
    }
  }
  if (plan_.flags() & kClipNorm) {
    const auto factor = quotient(control_.clip_norm, norm(kMeasuredNorm) + 1e-6f);
    n.clip_factor = of(mx::minimum(factor.array, mx::array(1.0f), s));
  }
  return n;
}

Numbers ComposedStep::tensor_numbers(Numbers n, size_t i) const {
  const uint32_t flags = plan_.tensor_flags(i);
  Composed coefficient = control_.trust_coefficient;
  if (flags & kGroups) {
    const auto row = mx::take(*in_.groups, int(plan_.group(i)), 0, s);
    auto affine = [&](Composed& x, int times, int plus) { x = at(row, times) * x + at(row, plus); };
    affine(n.rule.learning_rate, kLearningRateTimes, kLearningRatePlus);
    affine(n.weight_decay, kWeightDecayTimes, kWeightDecayPlus);
    for (int i = 0; i < kRuleScalars; ++i) {
      const int times = kFirstScalarTimes + kGroupScalar * i;
      affine(n.rule.scalar[i], times, times + 1);
      affine(n.low[i], times, times + 2);
      affine(n.rule.rest[i], times, times + 3);
    }
    coefficient = at(row, kTrustCoefficient);
  }
  if (flags & kTrustRatio) {
    const int first = kMeasuredTensors + 2 * plan_.arena->tensors[i];
    const auto gradient = norm(first) * n.clip_factor, parameter = norm(first + 1);
    const bool decays = (flags & kWeightDecay) && !(flags & kDecoupled);
    const auto both = (gradient > 0.0f) & (parameter > 0.0f);
    const auto below = decays ? gradient + n.weight_decay * parameter : gradient;
    // What is not chosen must not divide by zero either: its derivative would be NaN.
    const auto ratio = quotient(coefficient * parameter, choose(both, below, 1.0f));
    n.trust_ratio = choose(both & is_finite(ratio), ratio, 1.0f);
  }
  if (Rules::is_bias_corrected(control_.rule, flags)) {
    correct_bias(n);
  }
  return n;
}

void ComposedStep::correct_bias(Numbers& n) const {
  // In float64, which MLX has on the CPU. It is as exact as csrc/math, not bit for bit.
  const mx::StreamOrDevice cpu = mx::default_stream(mx::Device::cpu);
  auto exact = [&](const mx::array& x) { return cast({x, cpu}, mx::float64); };
  auto rounded = [&](const Composed& x) { return of(wide(x).array); };
  const Composed one{mx::array(1.0, mx::float64), cpu};
  const auto next = mx::add(*in_.step, mx::array(uint64_t(1), mx::uint64), s);
  auto bias = [&](int i) {
    const auto factor = exact(n.rule.scalar[i].array) + exact(n.low[i].array);
    return one - composed(mx::power, factor, exact(next));
  };
  n.rule.corrected_rate = rounded(quotient(exact(n.rule.learning_rate.array), bias(0)));
  n.rule.corrected_root = rounded({mx::rsqrt(bias(1).array, cpu), cpu});
}

Composed ComposedStep::parameter(size_t i) const {
  auto& arena = *plan_.arena;
  return of(
      plan_.whole ? composed_tensor(in_.parameters[0], arena.shapes[i], arena.offsets[i], s)
                  : in_.parameter(i));
}

Composed ComposedStep::gradient(size_t i, const Numbers& n) const {
  const uint32_t flags = plan_.flags();
  auto g = wide(of(in_.gradient(i)));
  if (flags & kSkipNonfinite) {
    g = choose(applies(), g, 0.0f);
  }
  if (flags & kMaximize) {
    g = -g;
  }
  if (flags & kGradScale) {
    g = g * n.unscale;
  }
  if (flags & kClipValue) {
    const Composed limit = control_.clip_value, least = -control_.clip_value;
    g = choose(g > limit, limit, g);
    g = choose(g < least, least, g);
  }
  return flags & kClipNorm ? g * n.clip_factor : g;
}

Composed ComposedStep::stored(const Composed& x, mx::Dtype dtype, const Random& random) const {
  return cast(random ? of(random_composed(x.array, dtype, *random, s)) : x, dtype);
}

Composed ComposedStep::stored_slot(const Composed& x, int slot, Random random) const {
  if (random && slot > 0) {
    random = mix32_composed(*random, s);
  }
  if (random && slot < 2) {
    random = mx::right_shift(*random, mx::array(16u, mx::uint32), s);
  }
  const uint32_t format = plan_.kept.format(slot);
  return is_byte_format(format) ? of(as_bytes_composed(x.array, format, random, s))
                                : stored(x, dtype_of(format), random);
}

Composed ComposedStep::slot_of(int slot, size_t i) const {
  auto& arena = *plan_.arena;
  auto& kept = *in_.slots[slot];
  if (!is_byte_format(plan_.kept.format(slot))) {
    return of(composed_tensor(kept, arena.shapes[i], arena.offsets[i], s));
  }
  const size_t first = arena.offsets[i] / kByteGroup;
  const size_t count = (element_count(arena.shapes[i]) + kByteGroup - 1) / kByteGroup;
  return of(mx::slice(kept, {int(first), 0}, {int(first + count), int(kByteRow)}, s));
}

Composed ComposedStep::wide_slot(const Composed& stored, int slot, size_t i) const {
  const uint32_t format = plan_.kept.format(slot);
  return is_byte_format(format)
      ? of(of_bytes_composed(stored.array, plan_.arena->shapes[i], format, s))
      : wide(stored);
}

ComposedStep::Tensor ComposedStep::update(size_t i, const Numbers& step) const {
  const uint32_t flags = plan_.tensor_flags(i);
  const auto n = tensor_numbers(step, i);
  const auto& arena = *plan_.arena;
  std::array<std::optional<Composed>, kSlots> old;
  for (int slot = 0; slot < kSlots; ++slot) {
    if (in_.slots[slot]) {
      old[slot] = slot_of(slot, i);
    }
  }

  const auto given = this->parameter(i);
  auto w = wide(given);
  if (is_master24(flags)) {
    w = of(master24_composed(w.array, old[kMasterCopy]->array, s));
  } else if (flags & kMaster) {
    w = choose(nearest(*old[kMasterCopy], arena.dtype) == w, *old[kMasterCopy], w);
  }
  auto u = gradient(i, n);
  if ((flags & kWeightDecay) && !(flags & kDecoupled)) {
    u = u + n.weight_decay * w;
  }
  if (flags & kTrustRatio) {
    u = u * n.trust_ratio;
  }
  RuleSlots<Composed> wide_slots;
  for (int slot = 0; slot < kRuleSlots; ++slot) {
    if (old[slot]) {
      wide_slots.of[slot] = wide_slot(*old[slot], slot, i);
    }
  }
  auto numbers = n.rule;
  if (flags & kDirection) {
    numbers.learning_rate = 1.0f;
  }
  const auto ruled = Rules::step(control_.rule, u, wide_slots, numbers, flags);
  Tensor next{given, old};
  Random random;
  if (flags & kStochastic) {
    random = random_bits_composed(
        arena.shapes[i],
        arena.begin + arena.offsets[i],
        control_.seed,
        *in_.step,
        control_.place,
        s);
  }
  for (int slot = 0; slot < Rules::slots(control_.rule, flags); ++slot) {
    next.slots[slot] = stored_slot(ruled.slots.of[slot], slot, random);
  }
  if ((flags & kWeightDecay) && (flags & kDecoupled)) {
    w = w * (1.0f - n.rule.learning_rate * n.weight_decay);
  }
  auto exact = w - ruled.change;
  if (flags & kDirection) {
    next.parameter = stored(ruled.change, plan_.parameter_out_dtype(), std::nullopt);
  } else if (is_master24(flags)) {
    exact = of(as_master24_composed(exact.array, random, s));
    const auto parts = parts_of_master24_composed(exact.array, s);
    next.parameter = cast(of(parts.first), arena.dtype);
    next.slots[kMasterCopy] = of(parts.second);
  } else if (flags & kCompensated) {
    const auto change = wide(*old[kCompensation]) - ruled.change;
    exact = w + change;
    const auto rounded = nearest(exact, arena.dtype);
    next.parameter = cast(rounded, arena.dtype);
    next.slots[kCompensation] = cast(change - (rounded - w), arena.dtype);
  } else {
    const bool at_random = (flags & kStochastic) && !(flags & kMaster);
    next.parameter = stored(exact, arena.dtype, at_random ? random : std::nullopt);
    if (flags & kMaster) {
      next.slots[kMasterCopy] = exact;
    } else {
      exact = wide(next.parameter);
    }
  }
  if ((flags & kAverage) && !(flags & kDirection)) {
    const auto& average = *old[kMovingAverage];
    next.slots[kMovingAverage] = average + control_.average_weight * (exact - average);
  }

  if (flags & kSkipNonfinite) {
    const auto apply = applies();
    next.parameter = choose(apply, next.parameter, cast(given, plan_.parameter_out_dtype()));
    for (int slot = 0; slot < kSlots; ++slot) {
      if (old[slot]) {
        next.slots[slot] = choose(apply, *next.slots[slot], *old[slot]);
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
    parameters.push_back(next.parameter.array);
    for (int slot = 0; slot < kSlots; ++slot) {
      if (next.slots[slot]) {
        slots[slot].push_back(next.slots[slot]->array);
      }
    }
  }

  std::vector<mx::array> outputs;
  if (!parameters.empty()) {
    outputs.push_back(pack(parameters, *plan_.arena, s));
  }
  for (int slot = 0; slot < kSlots; ++slot) {
    if (plan_.has(slot)) {
      const bool is_bytes = is_byte_format(plan_.kept.format(slot));
      outputs.push_back((is_bytes ? pack_rows : pack)(slots[slot], *plan_.arena, s));
    }
  }
  if (plan_.writes_step) {
    auto one = mx::array(uint64_t(1), mx::uint64);
    if (plan_.flags() & kSkipNonfinite) {
      one = cast(measured(kMeasuredApply), mx::uint64).array;
    }
    std::vector<mx::array> used;
    for (int i = 0; i < kScalars; ++i) {
      const bool absent = i == kGradScaleFactor && !(plan_.flags() & kGradScale);
      used.push_back(absent ? mx::array(1.0f) : scalar(i).array);
    }
    outputs.push_back(mx::add(*in_.step, one, s));
    outputs.push_back(mx::stack(used, 0, s));
  }
  return outputs;
}

ComposedOperation composed_operation(const StepPlan& plan, mx::Stream s) {
  int in = int(plan.parameter_inputs() + plan.gradient_inputs), out = plan.tensor_count() > 0;
  std::vector<std::pair<mx::Shape, mx::Dtype>> kinds; // of the outputs
  plan.each_output([&](mx::Shape shape, mx::Dtype dtype) { kinds.emplace_back(shape, dtype); });
  std::vector<int> inputs;
  std::map<int, mx::array> outputs;
  auto gives_integer = [&](int place) {
    outputs.emplace(place, mx::zeros(kinds[place].first, kinds[place].second, s));
  };
  for (int slot = 0; slot < kSlots; ++slot) {
    if (plan.has(slot)) {
      if (mx::issubdtype(plan.slot_dtype(slot), mx::integer)) {
        inputs.push_back(in);
        gives_integer(out);
      }
      ++in;
      ++out;
    }
  }
  if (plan.reads_step()) {
    inputs.push_back(in);
  }
  if (plan.writes_step) {
    gives_integer(out);
  }
  return {
      [&plan, s](const std::vector<mx::array>& inputs) { return step_composed(plan, inputs, s); },
      inputs,
      outputs};
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
  return mx::array(control.constants[i].hi);
}

mx::array composed_unscale(
    const StepControl& control,
    const mx::array* step,
    const mx::array* given,
    mx::Stream s) {
  const Composed scale{composed_scalar(control, kGradScaleFactor, step, given, s), s};
  const auto inverts = (scale >= 0x1p-126f) & is_finite(scale);
  return choose(inverts, quotient(1.0f, choose(inverts, scale, 1.0f)), float(NAN)).array;
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

const StepPlan& FusedStep::traced_plan() const {
  // While anything is traced, fused_step gives each arena a node with its gradients as inputs.
  // A node from before a trace has no input that is differentiated or vectorised, and is not
  // asked: what a trace captures of it is evaluated as it is.
  return node_.plans[0];
}

std::vector<mx::array> FusedStep::jvp(
    const std::vector<mx::array>& primals,
    const std::vector<mx::array>& tangents,
    const std::vector<int>& argnums) {
  return composed_jvp(composed_operation(traced_plan(), stream()), primals, tangents, argnums);
}

std::vector<mx::array> FusedStep::vjp(
    const std::vector<mx::array>& primals,
    const std::vector<mx::array>& cotangents,
    const std::vector<int>& argnums,
    const std::vector<mx::array>&) {
  return composed_vjp(composed_operation(traced_plan(), stream()), primals, cotangents, argnums);
}

std::pair<std::vector<mx::array>, std::vector<int>> FusedStep::vmap(
    const std::vector<mx::array>& inputs,
    const std::vector<int>& axes) {
  return composed_vmap(
      composed_operation(traced_plan(), stream()), inputs, axes, traced_plan().output_shapes());
}

} // namespace mlx_fused_optim
