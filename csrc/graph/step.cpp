#include "graph/step.h"

#include <algorithm>
#include <iterator>
#include <numeric>
#include <string_view>
#include <typeinfo>

#include "composed/step.h"
#include "composed/switch.h"
#include "graph/donation.h"
#include "graph/errors.h"
#include "graph/measure.h"
#include "graph/rules.h"
#include "graph/tracing.h"

#include "mlx/transforms.h"

namespace mlx_fused_optim {

namespace {

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
  auto state = options.state_dtype.value_or(arena.dtype);
  if (arena.is_small && state == mx::uint8) {
    state = mx::float32;
  }
  const auto flags = flags_for(arena.dtype, state, options.flags);
  return {options.rule, flags, format_of(arena.dtype), format_of(state), !arena.tensors.empty()};
}

StepPlan make_plan(
    std::shared_ptr<const Arena> arena,
    const StepOptions& options,
    std::shared_ptr<const StepControl> shared,
    bool whole) {
  const auto kept = slots_of(*arena, options);
  return {std::move(arena), options.groups, std::move(shared), kept, false, whole};
}

void check_slots(const Layout& layout, const StepSlots& slots, const StepOptions& options) {
  for (int slot = 0; slot < kSlots; ++slot) {
    size_t count = 0;
    for (auto& arena : layout.arenas) {
      const auto kept = slots_of(*arena, options);
      if (!kept.has(slot)) {
        continue;
      }
      const auto shape = kept.shape(*arena, slot);
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
  if (!options.measured.empty() && options.flags & fused_math::kTrustRatio &&
      options.measured[0].size() != fused_math::kMeasuredTensors + 2 * layout.tensors.size()) {
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

/// What is kept beside moments in bytes, as the kernels read it. A step's own output is in a row.
mx::array in_a_row(const mx::array& rows, mx::Stream stream) {
  const bool is_known = rows.is_available() && !rows.is_tracer();
  const bool is_own =
      rows.has_primitive() && std::string_view(rows.primitive().name()) == "FusedStep";
  return (is_known ? rows.flags().row_contiguous : is_own) ? rows
                                                           : mx::contiguous(rows, false, stream);
}

/// What the gradients of an arena are read from: views that are not there yet from the array that
/// they are views of, so that hundreds of nodes are neither made nor waited for.
struct GradientInputs {
  /// Appends the arrays. A trace may evaluate a node again with other arrays: there each gradient
  /// is an input.
  GradientInputs(
      std::vector<mx::array>& arrays,
      const std::vector<mx::array>& gradients,
      const std::vector<int>& tensors,
      bool is_eager) {
    const size_t begin = arrays.size();
    std::vector<uint32_t> flats;
    for (int t : tensors) {
      const auto place = is_eager ? flat_place(gradients[t]) : std::nullopt;
      auto is_its = [&](uint32_t i) { return arrays[begin + i].id() == place->flat->id(); };
      auto known = place ? std::find_if(flats.begin(), flats.end(), is_its) : flats.end();
      if (known != flats.end()) {
        places.push_back({*known, place->begin});
        continue;
      }
      const auto next = static_cast<uint32_t>(arrays.size() - begin);
      places.push_back({next, place ? place->begin : 0});
      arrays.push_back(place ? *place->flat : gradients[t]);
      if (place) {
        flats.push_back(next);
      }
    }
    count = arrays.size() - begin;
    are_flat = flats.size() == count;
    are_totals = std::any_of(flats.begin(), flats.end(), [&](auto i) {
      auto& flat = arrays[begin + i];
      return flat.status() == mx::array::Status::unscheduled && flat.has_primitive() &&
          typeid(flat.primitive()) == typeid(FusedStep);
    });
    if (flats.empty()) {
      places.clear();
    }
  }

  size_t count; // of arrays
  std::vector<GradientPlace> places; // see StepPlan
  bool are_flat;
  bool are_totals; // which are yet to be summed
};

/// A node to be, and its arrays and numbers: see StepInputs.
struct Gathered {
  StepNode node;
  std::vector<mx::array> arrays, numbers;
  size_t bytes = 0; // of parameters
  bool is_open = false; // for arenas that wait for nothing else
  bool waits = false;
  bool is_of_totals = false;
  std::vector<std::uintptr_t> waits_for; // flat arrays of gradients

  /// Whether another arena joins those that are there.
  bool takes(const Arena& arena, const Gathered& own) const {
    const size_t more = arena.size * arena.dtype.size();
    return is_open && !node.plans.empty() && node.plans.size() < kMostArenas && arena.begin == 0 &&
        node.plans[0].arena->dtype == arena.dtype &&
        node.plans[0].arena->is_small == arena.is_small && bytes + more <= kLargestArenaLimit &&
        own.is_open && own.waits == waits &&
        std::all_of(
               own.waits_for.begin(),
               own.waits_for.end(),
               [&](auto id) {
                 return std::find(waits_for.begin(), waits_for.end(), id) != waits_for.end();
               });
  }
};

bool are_available(const std::vector<mx::array>& arrays) {
  return std::all_of(arrays.begin(), arrays.end(), [](auto& a) { return a.is_available(); });
}

/// A node, and its outputs.
struct Made {
  std::shared_ptr<FusedStep> step;
  std::vector<mx::array> outputs;
};

/// Makes the node; `last` is an output of that before.
Made make_node(Gathered gathered, std::optional<mx::array>& last, mx::Stream stream) {
  if (gathered.is_of_totals) {
    // MLX evaluates breadth first, and would have all totals at once.
    auto& gradient = gathered.arrays[gathered.node.plans[0].parameter_inputs()];
    gradient = last ? after(gradient, *last) : gradient;
  }
  auto inputs = std::move(gathered.numbers);
  auto& arrays = gathered.arrays;
  if (gathered.waits) {
    inputs.insert(inputs.begin(), arrays.begin(), arrays.end());
  } else {
    gathered.node.held = std::move(arrays);
  }
  const auto step = std::make_shared<FusedStep>(stream, std::move(gathered.node));
  auto& plans = step->node().plans;
  std::vector<mx::array> outputs;
  if (composed_is_asked_for()) {
    outputs = step_composed(plans[0], inputs, stream);
  } else {
    outputs.reserve(
        std::accumulate(plans.begin(), plans.end(), size_t(0), [](size_t n, auto& plan) {
          return n + plan.outputs();
        }));
    for (auto& plan : plans) {
      plan.each_output([&](mx::Shape shape, mx::Dtype dtype) {
        outputs.emplace_back(std::move(shape), dtype, step, inputs);
      });
    }
    make_siblings(outputs, 0);
  }
  if (gathered.is_of_totals) {
    last = outputs[0];
  }
  return {step, std::move(outputs)};
}

/// So many visits of siblings take as long as one node more.
constexpr size_t kManyVisits = 128;

/// Puts a node's outputs where they belong.
void put_outputs(Made& made, StepResult& result, mx::Stream stream) {
  const auto& plans = made.step->node().plans;
  auto* next = made.outputs.data();
  for (auto& plan : plans) {
    const StepOutputs out(plan, next);
    next = out.end;
    if (out.parameters && plan.flags() & fused_math::kDirection) {
      result.parameters.push_back(*out.parameters);
    } else if (out.parameters) {
      // For each use of an output MLX visits all of its siblings, twice. Where that is more than a
      // node takes, the output is used once, by a view that has no sibling.
      const size_t visits = made.outputs.size() * view_nodes(plan.tensor_count(), stream);
      const auto arena = plans.size() == 1 || visits < kManyVisits
          ? *out.parameters
          : arena_tensor(*out.parameters, out.parameters->shape(), 0, stream);
      auto views = arena_tensors(arena, plan.arena, stream);
      for (size_t i = 0; i < views.size(); ++i) {
        result.parameters[plan.arena->tensors[i]] = std::move(views[i]);
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
}

} // namespace

mx::Dtype dtype_of(uint32_t format) {
  using namespace fused_math;
  return format == kFloat32       ? mx::float32
      : format == kFloat16        ? mx::float16
      : format == kBfloat16       ? mx::bfloat16
      : format == uint32_t(kInt8) ? mx::int8
                                  : mx::uint8;
}

uint32_t format_of(mx::Dtype dtype) {
  using namespace fused_math;
  return dtype == mx::float32 ? kFloat32
      : dtype == mx::float16  ? kFloat16
      : dtype == mx::bfloat16 ? kBfloat16
      : dtype == mx::int8     ? kInt8
                              : kBytes;
}

mx::Dtype ArenaSlots::dtype(int slot) const { return dtype_of(format(slot)); }

mx::Shape ArenaSlots::shape(const Arena& arena, int slot) const {
  using namespace fused_math;
  return is_byte_format(format(slot)) ? mx::Shape{int(arena.size / kByteGroup), int(kByteRow)}
                                      : arena_shape(arena);
}

StepInputs::StepInputs(const StepPlan& plan, const mx::array* arrays, const mx::array* numbers)
    : plan(&plan),
      gradients(arrays + plan.parameter_inputs()),
      parameters(plan.packs() ? gradients : arrays),
      slots{} {
  auto* next = gradients + plan.gradient_inputs;
  for (int slot = 0; slot < kSlots; ++slot) {
    slots[slot] = plan.has(slot) ? next++ : nullptr;
  }
  next = numbers;
  step = plan.reads_step() ? next++ : nullptr;
  given = plan.shared->given ? next++ : nullptr;
  measured = plan.is_measured() ? next++ : nullptr;
  groups = plan.flags() & fused_math::kGroups ? next++ : nullptr;
}

StepOutputs::StepOutputs(const StepPlan& plan, mx::array* next)
    : begin(next), parameters(nullptr), slots{}, step(nullptr), used(nullptr) {
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
  end = next;
}

std::vector<StepInputs> StepNode::inputs(const std::vector<mx::array>& arrays) const {
  size_t count = 0;
  for (auto& plan : plans) {
    count += plan.array_inputs();
  }
  auto* next = held.empty() ? arrays.data() : held.data();
  auto* numbers = arrays.data() + (held.empty() ? count : 0);
  std::vector<StepInputs> all;
  all.reserve(plans.size());
  for (auto& plan : plans) {
    all.emplace_back(plan, next, numbers);
    next += plan.array_inputs();
  }
  return all;
}

std::vector<StepOutputs> StepNode::outputs(std::vector<mx::array>& arrays) const {
  std::vector<StepOutputs> all;
  all.reserve(plans.size());
  auto* next = arrays.data();
  for (auto& plan : plans) {
    next = all.emplace_back(plan, next).end;
  }
  return all;
}

size_t StepPlan::slot_inputs() const {
  size_t count = 0;
  for (int slot = 0; slot < kSlots; ++slot) {
    count += has(slot);
  }
  return count;
}

bool StepPlan::reads_step() const {
  using namespace fused_math;
  return shared->scheduled || Rules::is_bias_corrected(kept.rule, flags()) ||
      flags() & (kStochastic | kSkipNonfinite);
}

std::vector<mx::Shape> StepPlan::output_shapes() const {
  std::vector<mx::Shape> shapes;
  each_output([&](mx::Shape shape, mx::Dtype) { shapes.push_back(std::move(shape)); });
  return shapes;
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
  const auto [control, given] = make_control(options, step, stream);

  StepResult result;
  if (!(options.flags & fused_math::kDirection)) {
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
  const auto shared = std::make_shared<const StepControl>(control);
  // A trace may evaluate a node again, with other arrays, and transform it.
  const bool is_eager = !composed_is_asked_for() && !is_tracing();
  std::array<size_t, kSlots> used_slots{};
  std::vector<Gathered> all;
  std::vector<mx::array> arrays; // an arena's; its memory serves the next
  for (size_t a = 0; a < arenas; ++a) {
    const auto arena = a < layout.arenas.size() ? layout.arenas[a] : no_tensors;
    const auto& tensors = arena->tensors;
    const bool packs = options.flags & fused_math::kPack;
    const auto whole = packs ? std::nullopt : whole_arena(*arena, parameters);
    auto plan = make_plan(arena, options, shared, whole.has_value());
    plan.writes_step = a == 0 && plan.reads_step();
    if (plan.outputs() == 0) {
      continue;
    }
    Gathered own; // of this arena
    arrays.clear();
    if (whole) {
      arrays.push_back(*whole);
    } else if (!packs) {
      for (int t : tensors) {
        arrays.push_back(parameters[t]);
      }
    }
    const bool is_together = packs || whole || (tensors.size() == 1 && are_available(arrays));
    GradientInputs from(arrays, gradients, tensors, is_eager);
    plan.places = std::move(from.places);
    plan.gradient_inputs = from.count;
    bool has_slots = true;
    for (int slot = 0; slot < kSlots; ++slot) {
      if (plan.has(slot)) {
        const auto& kept = slots[slot][used_slots[slot]++];
        arrays.push_back(plan.kept.has_bytes() ? in_a_row(kept, stream) : kept);
        has_slots &= arrays.back().is_available();
      }
    }
    own.waits = !is_eager || !are_available(arrays);
    own.is_of_totals = from.are_totals;
    own.is_open = is_eager && is_together && has_slots && (!own.waits || from.are_flat);
    if (own.waits && own.is_open) {
      const auto flats = arrays.begin() + plan.parameter_inputs();
      std::transform(
          flats, flats + plan.gradient_inputs, std::back_inserter(own.waits_for), [](auto& flat) {
            return flat.id();
          });
    }
    if (all.empty() || !all.back().takes(*arena, own)) {
      all.push_back(std::move(own));
      auto& numbers = all.back().numbers;
      if (plan.reads_step()) {
        numbers.push_back(step);
      }
      numbers.insert(numbers.end(), given.begin(), given.end());
      if (plan.is_measured()) {
        numbers.push_back(result.measured[0]);
      }
      if (plan.flags() & fused_math::kGroups) {
        numbers.push_back(*options.group_numbers);
      }
    }
    all.back().arrays.insert(
        all.back().arrays.end(),
        std::make_move_iterator(arrays.begin()),
        std::make_move_iterator(arrays.end()));
    all.back().bytes += arena->size * arena->dtype.size();
    all.back().node.plans.push_back(std::move(plan));
  }
  // From the last on: in this order a backward pass gives gradients.
  std::optional<mx::array> last;
  std::vector<Made> made(all.size());
  for (size_t n = all.size(); n-- > 0;) {
    made[n] = make_node(std::move(all[n]), last, stream);
  }
  for (auto& node : made) {
    put_outputs(node, result, stream);
  }
  if (!result.next) {
    result.next = next_counter(step, stream);
  }
  return result;
}

std::vector<mx::array> measure_step(
    const std::vector<mx::array>& parameters,
    const std::vector<mx::array>& gradients,
    const mx::array& step,
    const StepOptions& options,
    mx::StreamOrDevice s) {
  auto stream = mx::to_stream(s);
  const auto [control, given] = make_control(options, step, stream);
  return measure(control, given, parameters, gradients, step, options.skipped, stream);
}

std::vector<mx::array> pack_arrays(
    const Layout& layout,
    const std::vector<mx::array>& arrays,
    bool skips_single,
    mx::StreamOrDevice s) {
  using fused_math::kSgd;
  auto stays = [&](const Arena& arena) { return skips_single && arena.tensors.size() == 1; };
  Layout packing;
  for (auto& arena : layout.arenas) {
    if (!stays(*arena) && !arena->tensors.empty()) {
      packing.arenas.push_back(arena);
    }
  }
  std::vector<mx::array> packed;
  if (!packing.arenas.empty()) {
    StepOptions options{"pack_arrays", kSgd, {0.0, 0.0, 1.0}};
    options.scalars.resize(fused_math::kFirstRuleScalar + rules()[kSgd].scalars.size(), 0.0);
    options.flags = fused_math::kDirection | fused_math::kPack;
    const mx::array step(uint64_t(0), mx::uint64);
    packed = fused_step(packing, arrays, arrays, {}, step, options, s).parameters;
  }
  std::vector<mx::array> all;
  size_t next = 0;
  for (auto& arena : layout.arenas) {
    all.push_back(
        stays(*arena)                ? arrays[arena->tensors[0]]
            : arena->tensors.empty() ? mx::zeros(arena_shape(*arena), arena->dtype, s)
                                     : std::move(packed[next++]));
  }
  return all;
}

mx::array arena_tensor(
    const mx::array& arena,
    const mx::Shape& shape,
    size_t offset,
    mx::StreamOrDevice s,
    bool paced) {
  return composed_is_asked_for() ? composed_tensor(arena, shape, offset, mx::to_stream(s))
                                 : arena_view(arena, shape, offset, s, paced);
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
  auto check = [&](const mx::array& input, const mx::Shape& traced) {
    if (input.shape() != traced) {
      refuse(
          "fused_step",
          "a shapeless compiled step cannot change the shapes of its parameters: got ",
          input.shape(),
          ", traced with ",
          traced,
          ".");
    }
  };
  const auto in = node_.inputs(inputs);
  for (size_t p = 0; p < in.size(); ++p) {
    auto& plan = node_.plans[p];
    for (size_t i = 0; i < plan.tensor_count(); ++i) {
      if (!plan.whole) {
        check(in[p].parameter(i), plan.arena->shapes[i]);
      }
      if (plan.places.empty()) { // else the node is from before the trace
        check(in[p].gradient(i), plan.arena->shapes[i]);
      }
    }
  }
  std::vector<mx::Shape> shapes;
  for (auto& plan : node_.plans) {
    const auto more = plan.output_shapes();
    shapes.insert(shapes.end(), more.begin(), more.end());
  }
  return shapes;
}

} // namespace mlx_fused_optim
