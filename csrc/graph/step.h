// The fused step: the operation (checks, graph) and its primitive.
#pragma once

#include <algorithm>
#include <array>
#include <variant>
#include <vector>

#include "graph/layout.h"
#include "graph/rules.h"
#include "graph/schedule.h"
#include "graph/view.h"
#include "math/frame.h"

namespace mlx_fused_optim {

using fused_math::StepControl;

using enum fused_math::StepSlot;

/// The tensors of a layout that differ from the others. Made once for a layout.
struct StepGroups {
  std::vector<uint32_t> group_of; // of each tensor of the layout: its row of numbers
  std::vector<uint32_t> flags_of; // of each group: which of kTensorFlags it has
};

/// What is kept of the elements of an arena.
struct ArenaSlots {
  uint32_t rule;
  uint32_t flags; // those that its dtype has a use for
  uint32_t parameter_format; // fused_math::Format
  uint32_t state_format; // likewise, of the rule's slots
  bool has_tensors;

  bool has(int slot) const { return has_tensors && fused_math::has_slot(rule, flags, slot); }
  uint32_t format(int slot) const {
    return fused_math::slot_format(rule, flags, slot, parameter_format, state_format);
  }
  bool has_bytes() const { return has(0) && state_format == fused_math::kBytes; }
  mx::Dtype dtype(int slot) const;
  /// That of the arena, or rows of bytes.
  mx::Shape shape(const Arena& arena, int slot) const;
};

/// As arrays have them: moments in bytes are rows of uint8.
mx::Dtype dtype_of(uint32_t format);
uint32_t format_of(mx::Dtype dtype);

/// Where a gradient is: in which of the inputs, and where that has it (elements).
struct GradientPlace {
  uint32_t input;
  size_t begin;
};

/// What a step of one arena does, apart from its arrays. Constant inside a
/// compiled graph; whatever changes from step to step is an array.
struct StepPlan {
  std::shared_ptr<const Arena> arena;
  std::shared_ptr<const StepGroups> groups; // null without kGroups
  std::shared_ptr<const StepControl> shared; // by all arenas of a step: they are large
  ArenaSlots kept;
  bool writes_step; // the next counter and the numbers used are outputs too; needs reads_step()
  bool whole; // the parameters come as one array, which is the arena
  // Of each tensor, where some gradients are views that need not be made; else there are none,
  // and each gradient is an array.
  std::vector<GradientPlace> places;
  size_t gradient_inputs = 0; // arrays

  /// With what is this arena's own. (Here because CUDA's backend is another library.)
  StepControl control() const {
    StepControl own = *shared;
    own.flags = kept.flags;
    own.place = arena->fingerprint;
    own.begin = arena->begin;
    own.parameter_format = kept.parameter_format;
    own.state_format = kept.state_format;
    return own;
  }
  size_t tensor_count() const { return arena->tensors.size(); }
  /// What packs arrays has them for gradients, and reads nothing else.
  bool packs() const { return flags() & fused_math::kPack; }
  size_t parameter_inputs() const { return packs() ? 0 : whole ? 1 : tensor_count(); }
  size_t slot_inputs() const;
  size_t array_inputs() const { return parameter_inputs() + gradient_inputs + slot_inputs(); }
  /// Where the arena's tensor `i` begins in its StepInputs::parameter (elements).
  size_t parameter_begin(size_t i) const {
    return packs() ? gradient_begin(i) : whole ? arena->offsets[i] : 0;
  }
  size_t gradient_begin(size_t i) const { return places.empty() ? 0 : places[i].begin; }
  size_t tensor_size(size_t i) const { return element_count(arena->shapes[i]); }
  uint32_t flags() const { return kept.flags; }
  bool is_measured() const { return flags() & fused_math::kMeasuredFlags; }
  /// Whether something depends on the step counter: a number, a random bit, or the next
  /// counter on what was measured. A kernel for which nothing does is not given it, so that
  /// nobody has to know it: a compiled step need not capture it then, as with mlx.optimizers.
  bool reads_step() const;
  mx::Dtype parameter_out_dtype() const {
    return dtype_of(fused_math::parameter_out_format(flags(), kept.parameter_format));
  }
  bool has(int slot) const { return kept.has(slot); }
  mx::Dtype slot_dtype(int slot) const { return kept.dtype(slot); }
  /// Of the arena's tensor `i`: its row of numbers, and its flags.
  uint32_t group(size_t i) const { return groups ? groups->group_of[arena->tensors[i]] : 0; }
  uint32_t tensor_flags(size_t i) const {
    return flags() & (groups ? groups->flags_of[group(i)] | ~fused_math::kTensorFlags : ~0u);
  }
  /// Calls give(shape, dtype) for each output.
  template <typename Give>
  void each_output(Give give) const {
    if (tensor_count() > 0) {
      give(arena_shape(*arena), parameter_out_dtype());
    }
    for (int slot = 0; slot < kSlots; ++slot) {
      if (has(slot)) {
        give(kept.shape(*arena, slot), slot_dtype(slot));
      }
    }
    if (writes_step) {
      give(mx::Shape(), mx::uint64);
      give(mx::Shape{fused_math::kScalars}, mx::float32);
    }
  }
  std::vector<mx::Shape> output_shapes() const;
  size_t outputs() const { return (tensor_count() > 0) + slot_inputs() + 2 * writes_step; }
};

/// Names for the positions in what a primitive has of inputs and outputs for a plan:
/// arrays  = [parameters...] (or one arena), [gradients...] (or flat arrays that have them),
///           [slots...]: plan.array_inputs()
/// numbers = [step], [given scalars], [measured], [group numbers]: of all plans of a node
/// outputs = [parameter arena, slots...], [step, used scalars]; the next plan's begin at `end`
struct StepInputs {
  StepInputs(const StepPlan& plan, const mx::array* arrays, const mx::array* numbers);
  /// The array with the arena's tensor `i`, which begins at parameter_begin(i); and its gradient's.
  const mx::array& parameter(size_t i) const {
    return plan->packs() ? gradient(i) : parameters[plan->whole ? 0 : i];
  }
  const mx::array& gradient(size_t i) const {
    return gradients[plan->places.empty() ? i : plan->places[i].input];
  }
  const StepPlan* plan;
  const mx::array* gradients;
  const mx::array* parameters; // where a plan packs, what it packs
  std::array<const mx::array*, kSlots> slots; // null where the arena has none
  const mx::array* step; // uint64; null unless plan.reads_step()
  const mx::array* given; // float32, see StepControl; null when nothing is given
  const mx::array* measured; // float32, see StepMeasured; null without kMeasuredFlags
  const mx::array* groups; // float32 {groups, kGroupNumbers}; null without kGroups
};
struct StepOutputs {
  StepOutputs(const StepPlan& plan, mx::array* arrays);
  mx::array* begin;
  mx::array* parameters; // null when the arena has no tensors
  std::array<mx::array*, kSlots> slots;
  mx::array* step; // null unless plan.writes_step
  mx::array* used; // likewise; float32 {kScalars}
  mx::array* end;
};

/// A number of the step: a constant or a schedule, or an array that has it.
using StepScalarSource = std::variant<mx::array, Schedule, double>;

/// The options of a step.
struct StepOptions {
  std::string op; // who asked for the step, for errors
  uint32_t rule; // its place in fused_math::Rules
  std::vector<StepScalarSource> scalars; // by StepScalar; of the rule's, those that it has
  uint32_t flags; // fused_math::StepFlags
  float clip_value; // used with kClipValue, as the next ones with theirs
  float clip_norm;
  float trust_coefficient;
  double ema_decay;
  uint64_t seed;
  std::optional<mx::Dtype> state_dtype; // of the rule's slots; by default the parameter's
  std::shared_ptr<const StepGroups> groups;
  std::optional<mx::array> group_numbers; // float32 {groups, kGroupNumbers}
  std::optional<mx::array> skipped; // uint64 scalar: steps skipped so far
  // What measure_step has measured for this step, of these gradients and maybe of others;
  // empty where the step is to measure its own.
  std::vector<mx::array> measured;
};

/// The state's arenas, for each slot one for each of the layout's arenas that has it.
using StepSlots = std::array<std::vector<mx::array>, kSlots>;

/// One step of a whole layout.
struct StepResult {
  // Views into the new arenas; of kDirection these themselves, one for each of the layout's.
  std::vector<mx::array> parameters;
  StepSlots slots;
  std::optional<mx::array> next; // the counter, uint64
  std::optional<mx::array> used; // the scalars, float32 {kScalars}; none if all are constant
  // With kMeasuredFlags: see StepMeasured, and steps skipped so far (uint64).
  std::vector<mx::array> measured;
};

/// The update of every tensor of `layout`, by one rule of csrc/math/rules in the frame of
/// csrc/math/frame.h. Parameters have the layout's shapes and dtypes and keep them; a
/// gradient has its parameter's shape and is float32, float16 or bfloat16: Tree has seen to
/// that. The maths is float32, rounded once on the store. `step` is a uint64 scalar, at which
/// schedules are evaluated. Parameters and slots are updated in place when
/// nobody else holds them. Throws std::invalid_argument before any change.
StepResult fused_step(
    const Layout& layout,
    const std::vector<mx::array>& parameters,
    const std::vector<mx::array>& gradients,
    const StepSlots& slots,
    const mx::array& step,
    const StepOptions& options,
    mx::StreamOrDevice s = {});

/// With kMeasuredFlags, what StepResult has under `measured`, of all these tensors.
std::vector<mx::array> measure_step(
    const std::vector<mx::array>& parameters,
    const std::vector<mx::array>& gradients,
    const mx::array& step,
    const StepOptions& options,
    mx::StreamOrDevice s = {});

/// The arrays of each arena in one flat array, in new memory: a step that puts out what it
/// reads. They have the layout's dtypes. With `skips_single` an array that is alone in its
/// arena stays as it is.
std::vector<mx::array> pack_arrays(
    const Layout& layout,
    const std::vector<mx::array>& arrays,
    bool skips_single,
    mx::StreamOrDevice s = {});

/// Arenas that one node steps. Each output has all others as siblings, and an evaluation visits
/// them with each; and all are to fit the arguments of a CUDA launch.
constexpr size_t kMostArenas = 8;

/// What a node does, arena by arena, and the arrays that it holds.
struct StepNode {
  // Of arenas of one dtype. The first may write the step, and begin within a whole arena.
  std::vector<StepPlan> plans;
  // The plans' arrays, where all are there; else they are inputs of the graph, before the numbers.
  std::vector<mx::array> held;

  /// The names for each plan.
  std::vector<StepInputs> inputs(const std::vector<mx::array>& arrays) const;
  std::vector<StepOutputs> outputs(std::vector<mx::array>& arrays) const;
};

/// Calls leave(array) for what a node holds and no output has taken the memory of: a backend holds
/// that until the device has read it, as MLX holds inputs. (Here because CUDA's is another
/// library.)
template <typename Leave>
void each_left(
    const StepNode& node,
    const std::vector<StepInputs>& inputs,
    const std::vector<StepOutputs>& outputs,
    Leave leave) {
  for (size_t p = 0; !node.held.empty() && p < inputs.size(); ++p) {
    auto& plan = node.plans[p];
    auto& in = inputs[p];
    auto& out = outputs[p];
    auto leave_unless_taken = [&](const mx::array& a, const mx::array* output) {
      if (!output || a.data_shared_ptr() != output->data_shared_ptr()) {
        leave(a);
      }
    };
    for (size_t i = 0; i < plan.parameter_inputs(); ++i) {
      leave_unless_taken(in.parameters[i], out.parameters);
    }
    std::for_each(in.gradients, in.gradients + plan.gradient_inputs, leave);
    for (int slot = 0; slot < kSlots; ++slot) {
      if (in.slots[slot]) {
        leave_unless_taken(*in.slots[slot], out.slots[slot]);
      }
    }
  }
}

/// The step of one arena, or of several that wait for the same: then it takes the device one
/// launch. Evaluation is in csrc/{cpu,metal,cuda}/step.cpp.
///
/// Arrays that are there are no inputs of the graph but the primitive's own: each output has
/// a copy of all inputs, and several arenas have dozens of outputs. What is there needs no order;
/// but its memory is the backend's to hold until the device is done, as MLX holds that of inputs.
class FusedStep : public mx::Primitive {
 public:
  FusedStep(mx::Stream stream, StepNode node) : mx::Primitive(stream), node_(std::move(node)) {}
  const StepNode& node() const { return node_; }

  void eval_cpu(const std::vector<mx::array>& inputs, std::vector<mx::array>& outputs) override;
  void eval_gpu(const std::vector<mx::array>& inputs, std::vector<mx::array>& outputs) override;

  std::vector<mx::array> jvp(
      const std::vector<mx::array>& primals,
      const std::vector<mx::array>& tangents,
      const std::vector<int>& argnums) override;
  std::vector<mx::array> vjp(
      const std::vector<mx::array>& primals,
      const std::vector<mx::array>& cotangents,
      const std::vector<int>& argnums,
      const std::vector<mx::array>& outputs) override;
  std::pair<std::vector<mx::array>, std::vector<int>> vmap(
      const std::vector<mx::array>& inputs,
      const std::vector<int>& axes) override;

  DEFINE_NAME(FusedStep)
  std::vector<mx::Shape> output_shapes(const std::vector<mx::array>& inputs) override;

 private:
  /// The only one, of a node that is transformed: see the definition.
  const StepPlan& traced_plan() const;

  StepNode node_;
};

/// A tensor of a flat arena, without a copy; in MLX's operations where those are asked for.
mx::array arena_tensor(
    const mx::array& arena,
    const mx::Shape& shape,
    size_t offset,
    mx::StreamOrDevice s = {},
    bool paced = false);

/// All of them.
std::vector<mx::array> arena_tensors(
    const mx::array& arena,
    const std::shared_ptr<const Arena>& layout,
    mx::StreamOrDevice s = {});

} // namespace mlx_fused_optim
