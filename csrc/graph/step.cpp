#include "graph/step.h"

#include <algorithm>

#include "composed/step.h"
#include "composed/switch.h"
#include "graph/donation.h"
#include "graph/errors.h"
#include "graph/measure.h"
#include "graph/rules.h"

#include "mlx/transforms.h"

namespace mlx_fused_optim {

namespace {

uint32_t format_of(mx::Dtype dtype) {
  return dtype == mx::float32 ? fused_math::kFloat32
      : dtype == mx::float16  ? fused_math::kFloat16
                              : fused_math::kBfloat16;
}

/// The flags that dtypes have a use for: float32 loses nothing that a master, a
/// compensation or rounding at random could keep.
uint32_t flags_for(mx::Dtype parameter, mx::Dtype state, uint32_t flags) {
  using namespace fused_math;
  if (parameter == mx::float32) {
    flags &= ~(kMaster | kCompensated);
    flags &= state == mx::float32 ? ~kStochastic : ~0u;
  }
  return flags;
}

ArenaSlots slots_of(const Arena& arena, const StepOptions& options) {
  const auto state = options.state_dtype.value_or(arena.dtype);
  const auto flags = flags_for(arena.dtype, state, options.flags);
  return {options.rule, flags, arena.dtype, state, !arena.tensors.empty()};
}

StepPlan make_plan(
    std::shared_ptr<const Arena> arena,
    const StepOptions& options,
    const StepControl& control,
    bool whole) {
  const auto kept = slots_of(*arena, options);
  StepPlan plan{std::move(arena), options.groups, control, kept, false, whole};
  plan.control.flags = kept.flags;
  plan.control.place = plan.arena->fingerprint;
  plan.control.parameter_format = format_of(kept.parameter);
  plan.control.state_format = format_of(kept.state);
  return plan;
}

void check_slots(const Layout& layout, const StepSlots& slots, const StepOptions& options) {
  for (int slot = 0; slot < kSlots; ++slot) {
    size_t count = 0;
    for (auto& arena : layout.arenas) {
      const auto kept = slots_of(*arena, options);
      if (!kept.has(slot)) {
        continue;
      }
      const auto shape = arena_shape(*arena);
      const auto dtype = kept.dtype(slot);
      if (count < slots[slot].size()) {
        auto& array = slots[slot][count];
        if (array.shape() != shape || array.dtype() != dtype) {
          refuse(
              options.op,
              slot_name(options.rule, slot),
              " of arena ",
              count,
              " does not fit the parameters: got ",
              array.dtype(),
              " of shape ",
              array.shape(),
              ", expected ",
              dtype,
              " of shape ",
              shape,
              ".");
        }
      }
      ++count;
    }
    if (slots[slot].size() != count) {
      refuse(
          options.op,
          slot_name(options.rule, slot),
          " has the wrong number of arenas: got ",
          slots[slot].size(),
          ", expected ",
          count,
          ".");
    }
  }
}

void check(
    const Layout& layout,
    const StepSlots& slots,
    const mx::array& step,
    const StepOptions& options) {
  check_slots(layout, slots, options);
  if (step.ndim() != 0 || step.dtype() != mx::uint64) {
    refuse(
        options.op,
        "step must be a uint64 scalar: got ",
        step.dtype(),
        " of shape ",
        step.shape(),
        ".");
  }
  for (size_t i = 0; i < options.scalars.size(); ++i) {
    auto* array = std::get_if<mx::array>(&options.scalars[i]);
    if (array && array->ndim() != 0) {
      refuse(
          options.op,
          scalar_name(options.rule, i),
          " must be a scalar: got an array of shape ",
          array->shape(),
          ", allowed ().");
    }
  }
  if (options.skipped && (options.skipped->ndim() != 0 || options.skipped->dtype() != mx::uint64)) {
    refuse(
        options.op,
        "skipped must be a uint64 scalar: got ",
        options.skipped->dtype(),
        " of shape ",
        options.skipped->shape(),
        ".");
  }
  if (!options.measured.empty() && options.flags & fused_math::kTrustRatio) {
    refuse(
        options.op,
        "what was measured before a step has no norms of its tensors: got a trust ratio, allowed a "
        "step that measures its own gradients.");
  }
  if (options.flags & fused_math::kGroups) {
    const auto rows = static_cast<int>(options.groups ? options.groups->flags_of.size() : 0);
    const mx::Shape expected{rows, fused_math::kGroupNumbers};
    if (!options.groups || options.groups->group_of.size() != layout.tensors.size() ||
        !options.group_numbers || options.group_numbers->shape() != expected ||
        options.group_numbers->dtype() != mx::float32) {
      refuse(
          options.op,
          "the groups do not fit: got other numbers of tensors or groups than the layout.");
    }
  }
}

/// The constants and schedules, and the given scalars as one array (none if none is given).
std::pair<StepControl, std::vector<mx::array>> make_control(
    const StepOptions& options,
    const mx::array& step,
    mx::Stream stream) {
  using namespace fused_math;
  StepControl control{};
  control.seed = options.seed;
  control.clip_value = options.clip_value;
  control.clip_norm = options.clip_norm;
  control.trust_coefficient = options.trust_coefficient;
  control.average_weight = static_cast<float>(1 - options.ema_decay);
  control.rule = options.rule;
  control.flags = options.flags;
  int schedules = 0;
  std::vector<mx::array> values;
  for (size_t i = 0; i < options.scalars.size(); ++i) {
    auto& source = options.scalars[i];
    std::optional<mx::array> given;
    if (auto* value = std::get_if<double>(&source)) {
      control.constants[i] = real_of(*value);
      if (i >= kFirstRuleScalar) {
        control.rest[i - kFirstRuleScalar] = static_cast<float>(1 - *value);
      }
    } else if (auto* array = std::get_if<mx::array>(&source)) {
      given = array->dtype() == mx::float32 ? *array : mx::astype(*array, mx::float32, stream);
    } else if (is_constant(std::get<Schedule>(source))) {
      const Real value = std::get<Schedule>(source).segments[0].one;
      control.constants[i] = value;
      if (i >= kFirstRuleScalar) {
        control.rest[i - kFirstRuleScalar] = static_cast<float>(1 - (double(value.hi) + value.lo));
      }
    } else if (schedules < kMostSchedules) {
      control.scheduled |= 1u << i;
      control.schedules[schedules++] = std::get<Schedule>(source);
    } else {
      given = evaluate_schedule(std::get<Schedule>(source), step, stream);
    }
    if (given) {
      control.given |= 1u << i;
      values.resize(i, mx::array(0.0f)); // those before it that are not given
      values.push_back(*given);
    }
  }
  // A scalar alone needs no copy, and is the usual case: a constant rate.
  if (values.size() > 1) {
    values = {mx::stack(values, 0, stream)};
  }
  return {control, values};
}

/// step + 1 where no kernel counts: on the host if it knows the step, so that a loop which
/// never looks at the counter builds no chain of sums.
mx::array next_counter(mx::array step, mx::Stream stream) {
  if (step.is_available() && !step.is_tracer()) {
    return mx::array(step.item<uint64_t>() + 1, mx::uint64);
  }
  return mx::add(step, mx::array(uint64_t(1), mx::uint64), stream);
}

std::vector<mx::array> measure(
    const StepControl& control,
    const std::vector<mx::array>& given,
    const std::vector<mx::array>& parameters,
    const std::vector<mx::array>& gradients,
    const mx::array& step,
    const std::optional<mx::array>& skipped,
    mx::Stream stream) {
  MeasurePlan plan{control, gradients.size(), (control.flags & fused_math::kTrustRatio) != 0};
  auto inputs = gradients;
  if (plan.has_parameters) {
    inputs.insert(inputs.end(), parameters.begin(), parameters.end());
  }
  inputs.push_back(step);
  inputs.push_back(skipped.value_or(mx::array(uint64_t(0), mx::uint64)));
  inputs.insert(inputs.end(), given.begin(), given.end());
  return measure_gradients(plan, inputs, stream);
}

} // namespace

StepInputs::StepInputs(const StepPlan& plan, const std::vector<mx::array>& arrays)
    : parameters(arrays.data()),
      whole(plan.whole),
      gradients(arrays.data() + plan.parameter_inputs()),
      slots{},
      step(nullptr),
      given(nullptr),
      measured(nullptr),
      groups(nullptr) {
  auto* next = gradients + plan.tensor_count();
  for (int slot = 0; slot < kSlots; ++slot) {
    slots[slot] = plan.has(slot) ? next++ : nullptr;
  }
  step = plan.reads_step() ? next++ : nullptr;
  given = plan.control.given ? next++ : nullptr;
  measured = plan.is_measured() ? next++ : nullptr;
  groups = plan.flags() & fused_math::kGroups ? next++ : nullptr;
}

StepOutputs::StepOutputs(const StepPlan& plan, std::vector<mx::array>& arrays)
    : parameters(nullptr), slots{}, step(nullptr), used(nullptr) {
  auto* next = arrays.data();
  if (plan.tensor_count() > 0) {
    parameters = next++;
  }
  for (int slot = 0; slot < kSlots; ++slot) {
    slots[slot] = plan.has(slot) ? next++ : nullptr;
  }
  if (plan.writes_step) {
    step = next++;
    used = next++;
  }
}

bool StepPlan::reads_step() const {
  using namespace fused_math;
  return control.scheduled || Rules::is_bias_corrected(control.rule, flags()) ||
      flags() & (kStochastic | kSkipNonfinite);
}

std::vector<mx::Shape> StepPlan::output_shapes() const {
  std::vector<mx::Shape> shapes;
  if (tensor_count() > 0) {
    shapes.push_back(arena_shape(*arena));
  }
  for (int slot = 0; slot < kSlots; ++slot) {
    if (has(slot)) {
      shapes.push_back(arena_shape(*arena));
    }
  }
  if (writes_step) {
    shapes.push_back({});
    shapes.push_back({fused_math::kScalars});
  }
  return shapes;
}

std::vector<mx::Dtype> StepPlan::output_dtypes() const {
  std::vector<mx::Dtype> dtypes;
  if (tensor_count() > 0) {
    dtypes.push_back(parameter_out_dtype());
  }
  for (int slot = 0; slot < kSlots; ++slot) {
    if (has(slot)) {
      dtypes.push_back(slot_dtype(slot));
    }
  }
  if (writes_step) {
    dtypes.push_back(mx::uint64);
    dtypes.push_back(mx::float32);
  }
  return dtypes;
}

StepResult fused_step(
    const Layout& layout,
    const std::vector<mx::array>& parameters,
    const std::vector<mx::array>& gradients,
    const StepSlots& slots,
    const mx::array& step,
    const StepOptions& options,
    mx::StreamOrDevice s) {
  check(layout, slots, step, options);
  auto stream = mx::to_stream(s);
  const bool composed = composed_is_asked_for();
  const auto [control, given] = make_control(options, step, stream);

  const bool gives_directions = options.flags & fused_math::kDirection;

  StepResult result;
  if (!gives_directions) {
    result.parameters = parameters; // each is replaced below
  }
  if (options.flags & fused_math::kMeasuredFlags) {
    result.measured = options.measured.empty()
        ? measure(control, given, parameters, gradients, step, options.skipped, stream)
        : options.measured;
  }

  // With no tensor at all, an empty arena still evaluates schedules.
  static const auto no_tensors = std::make_shared<const Arena>(Arena{mx::float32});
  const size_t arenas = std::max<size_t>(layout.arenas.size(), 1);
  std::array<size_t, kSlots> used_slots{};
  for (size_t a = 0; a < arenas; ++a) {
    const auto arena = a < layout.arenas.size() ? layout.arenas[a] : no_tensors;
    const auto whole = whole_arena(*arena, parameters);
    auto plan = make_plan(arena, options, control, whole.has_value());
    plan.writes_step = a == 0 && plan.reads_step();
    if (plan.output_shapes().empty()) {
      continue;
    }
    const auto& tensors = arena->tensors;

    std::vector<mx::array> inputs;
    inputs.reserve(2 * tensors.size() + kSlots + 4);
    if (whole) {
      inputs.push_back(*whole);
    } else {
      for (int t : tensors) {
        inputs.push_back(parameters[t]);
      }
    }
    for (int t : tensors) {
      inputs.push_back(gradients[t]);
    }
    for (int slot = 0; slot < kSlots; ++slot) {
      if (plan.has(slot)) {
        inputs.push_back(slots[slot][used_slots[slot]++]);
      }
    }
    if (plan.reads_step()) {
      inputs.push_back(step);
    }
    inputs.insert(inputs.end(), given.begin(), given.end());
    if (plan.is_measured()) {
      inputs.push_back(result.measured[0]);
    }
    if (plan.flags() & fused_math::kGroups) {
      inputs.push_back(*options.group_numbers);
    }

    auto outputs = composed ? step_composed(plan, inputs, stream)
                            : mx::array::make_arrays(
                                  plan.output_shapes(),
                                  plan.output_dtypes(),
                                  std::make_shared<FusedStep>(stream, plan),
                                  inputs);
    StepOutputs out(plan, outputs);
    if (out.parameters && gives_directions) {
      result.parameters.push_back(*out.parameters);
    } else if (out.parameters) {
      auto views = arena_tensors(*out.parameters, plan.arena, stream);
      for (size_t i = 0; i < tensors.size(); ++i) {
        result.parameters[tensors[i]] = std::move(views[i]);
      }
    }
    for (int slot = 0; slot < kSlots; ++slot) {
      if (out.slots[slot]) {
        result.slots[slot].push_back(*out.slots[slot]);
      }
    }
    if (plan.writes_step) {
      result.next = *out.step;
      result.used = *out.used;
    }
  }
  if (!result.next) {
    result.next = next_counter(step, stream);
  }
  return result;
}

std::vector<mx::array> measure_step(
    const std::vector<mx::array>& gradients,
    const mx::array& step,
    const StepOptions& options,
    mx::StreamOrDevice s) {
  auto stream = mx::to_stream(s);
  const auto [control, given] = make_control(options, step, stream);
  return measure(control, given, {}, gradients, step, options.skipped, stream);
}

mx::array arena_tensor(
    const mx::array& arena,
    const mx::Shape& shape,
    size_t offset,
    mx::StreamOrDevice s) {
  return composed_is_asked_for() ? composed_tensor(arena, shape, offset, mx::to_stream(s))
                                 : arena_view(arena, shape, offset, s);
}

std::vector<mx::array> arena_tensors(
    const mx::array& arena,
    const std::shared_ptr<const Arena>& layout,
    mx::StreamOrDevice s) {
  return composed_is_asked_for() ? composed_tensors(arena, *layout, mx::to_stream(s))
                                 : arena_views(arena, layout, s);
}

std::vector<mx::Shape> FusedStep::output_shapes(const std::vector<mx::array>& inputs) {
  // A shapeless compiled graph calls this with new inputs. The arena was laid
  // out for the shapes of the trace, so only the batch may have changed.
  auto check = [&](size_t input, size_t tensor) {
    if (inputs[input].shape() != plan_.arena->shapes[tensor]) {
      refuse(
          "fused_step",
          "a shapeless compiled step cannot change the shapes of its parameters: got ",
          inputs[input].shape(),
          ", traced with ",
          plan_.arena->shapes[tensor],
          ".");
    }
  };
  for (size_t i = 0; i < plan_.tensor_count(); ++i) {
    if (!plan_.whole) {
      check(i, i);
    }
    check(plan_.parameter_inputs() + i, i);
  }
  return plan_.output_shapes();
}

} // namespace mlx_fused_optim
