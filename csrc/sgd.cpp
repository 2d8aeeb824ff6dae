#include "sgd.h"

#include <algorithm>

#include "composed.h"
#include "errors.h"

#include "mlx/transforms.h"

namespace mlx_fused_optim {

namespace {

constexpr const char* kOp = "fused_sgd_step";

bool is_supported(mx::Dtype dtype) {
  return dtype == mx::float32 || dtype == mx::float16 || dtype == mx::bfloat16;
}

void check(
    const Layout& layout,
    const std::vector<mx::array>& parameters,
    const std::vector<mx::array>& gradients,
    const std::vector<mx::array>& momentum,
    const mx::array& step,
    const SgdOptions& options) {
  const size_t n = layout.tensors.size();
  if (parameters.size() != n || gradients.size() != n) {
    refuse(
        kOp,
        "the number of tensors differs: got ",
        parameters.size(),
        " parameters and ",
        gradients.size(),
        " gradients, the layout has ",
        n,
        ".");
  }
  for (size_t i = 0; i < n; ++i) {
    auto& spec = layout.tensors[i];
    if (parameters[i].shape() != spec.shape || parameters[i].dtype() != spec.dtype) {
      refuse(
          kOp,
          "parameter '",
          spec.path,
          "' is not the layout's: got ",
          parameters[i].dtype(),
          " of shape ",
          parameters[i].shape(),
          ", the layout has ",
          spec.dtype,
          " of shape ",
          spec.shape,
          ".");
    }
  }
  const size_t arenas = options.flags & fused_math::kMomentum ? layout.arenas.size() : 0;
  if (momentum.size() != arenas) {
    refuse(
        kOp,
        "momentum has the wrong number of arenas: got ",
        momentum.size(),
        ", expected ",
        arenas,
        ".");
  }
  for (size_t a = 0; a < arenas; ++a) {
    auto shape = arena_shape(*layout.arenas[a]);
    if (momentum[a].shape() != shape || momentum[a].dtype() != layout.arenas[a]->dtype) {
      refuse(
          kOp,
          "momentum of arena ",
          a,
          " does not fit the parameters: got ",
          momentum[a].dtype(),
          " of shape ",
          momentum[a].shape(),
          ", expected ",
          layout.arenas[a]->dtype,
          " of shape ",
          shape,
          ".");
    }
  }
  if (step.ndim() != 0 || step.dtype() != mx::uint64) {
    refuse(
        kOp, "step must be a uint64 scalar: got ", step.dtype(), " of shape ", step.shape(), ".");
  }
  const SgdScalarSource* sources[] = {
      &options.learning_rate, &options.momentum, &options.weight_decay};
  const char* names[] = {"learning_rate", "momentum", "weight_decay"};
  for (int i = 0; i < fused_math::kScalars; ++i) {
    auto* array = std::get_if<mx::array>(sources[i]);
    if (array && array->ndim() != 0) {
      refuse(
          kOp,
          names[i],
          " must be a scalar: got an array of shape ",
          array->shape(),
          ", allowed ().");
    }
  }
}

/// The gradients, cast where their dtype is not one the kernels read.
mx::array readable_gradient(const mx::array& gradient, const TensorSpec& spec, mx::Stream stream) {
  if (gradient.shape() != spec.shape) {
    refuse(
        kOp,
        "the gradient of '",
        spec.path,
        "' has the wrong shape: got ",
        gradient.shape(),
        ", the parameter has ",
        spec.shape,
        ".");
  }
  return is_supported(gradient.dtype()) ? gradient : mx::astype(gradient, mx::float32, stream);
}

/// The schedules, and the given scalars as one array (none if none is given).
std::pair<SgdControl, std::vector<mx::array>> make_control(
    const SgdOptions& options,
    mx::Stream stream) {
  SgdControl control{};
  control.flags = options.flags;
  control.gradient_weight = static_cast<float>(1 - options.dampening);
  const SgdScalarSource* sources[] = {
      &options.learning_rate, &options.momentum, &options.weight_decay};
  std::vector<mx::array> values;
  for (int i = 0; i < fused_math::kScalars; ++i) {
    if (auto* array = std::get_if<mx::array>(sources[i])) {
      control.given |= 1u << i;
      values.resize(i, mx::array(0.0f)); // those before it that are not given
      values.push_back(
          array->dtype() == mx::float32 ? *array : mx::astype(*array, mx::float32, stream));
    } else {
      control.schedules[i] = std::get<Schedule>(*sources[i]);
    }
  }
  // A scalar alone needs no copy, and is the usual case: a constant rate.
  if (values.size() > 1) {
    values = {mx::stack(values, 0, stream)};
  }
  return {control, values};
}

} // namespace

SgdInputs::SgdInputs(const SgdPlan& plan, const std::vector<mx::array>& arrays)
    : parameters(arrays.data()),
      gradients(arrays.data() + plan.tensor_count()),
      momentum(plan.has_momentum() ? arrays.data() + 2 * plan.tensor_count() : nullptr),
      step(arrays[2 * plan.tensor_count() + plan.has_momentum()]),
      given(plan.control.given ? &step + 1 : nullptr) {}

SgdOutputs::SgdOutputs(const SgdPlan& plan, std::vector<mx::array>& arrays)
    : parameters(nullptr), momentum(nullptr), step(nullptr), used(nullptr) {
  auto* next = arrays.data();
  if (plan.tensor_count() > 0) {
    parameters = next++;
  }
  if (plan.has_momentum()) {
    momentum = next++;
  }
  if (plan.writes_step) {
    step = next++;
    used = next++;
  }
}

std::vector<mx::Shape> SgdPlan::output_shapes() const {
  std::vector<mx::Shape> shapes;
  if (tensor_count() > 0) {
    shapes.assign(1 + has_momentum(), arena_shape(*arena));
  }
  if (writes_step) {
    shapes.push_back({});
    shapes.push_back({fused_math::kScalars});
  }
  return shapes;
}

std::vector<mx::Dtype> SgdPlan::output_dtypes() const {
  std::vector<mx::Dtype> dtypes;
  if (tensor_count() > 0) {
    dtypes.assign(1 + has_momentum(), arena->dtype);
  }
  if (writes_step) {
    dtypes.push_back(mx::uint64);
    dtypes.push_back(mx::float32);
  }
  return dtypes;
}

SgdStep sgd_step(
    const Layout& layout,
    const std::vector<mx::array>& parameters,
    const std::vector<mx::array>& gradients,
    const std::vector<mx::array>& momentum,
    const mx::array& step,
    const SgdOptions& options,
    mx::StreamOrDevice s) {
  check(layout, parameters, gradients, momentum, step, options);
  auto stream = mx::to_stream(s);
  const bool composed = composed_is_asked_for();
  const auto [control, given] = make_control(options, stream);

  SgdStep result;
  result.parameters = parameters; // each is replaced below
  // With no tensor at all, an empty arena still counts the step.
  static const auto no_tensors = std::make_shared<const Arena>(Arena{mx::float32});
  const size_t arenas = std::max<size_t>(layout.arenas.size(), 1);
  for (size_t a = 0; a < arenas; ++a) {
    SgdPlan plan{a < layout.arenas.size() ? layout.arenas[a] : no_tensors, control, a == 0};
    const auto& tensors = plan.arena->tensors;

    std::vector<mx::array> inputs;
    inputs.reserve(2 * tensors.size() + 3);
    for (int t : tensors) {
      inputs.push_back(parameters[t]);
    }
    for (int t : tensors) {
      inputs.push_back(readable_gradient(gradients[t], layout.tensors[t], stream));
    }
    if (plan.has_momentum()) {
      inputs.push_back(momentum[a]);
    }
    inputs.push_back(step);
    inputs.insert(inputs.end(), given.begin(), given.end());

    auto outputs = composed ? sgd_step_composed(plan, inputs, stream)
                            : mx::array::make_arrays(
                                  plan.output_shapes(),
                                  plan.output_dtypes(),
                                  std::make_shared<FusedSGD>(stream, plan),
                                  inputs);
    SgdOutputs out(plan, outputs);
    if (out.parameters) {
      auto views = arena_views(*out.parameters, plan.arena->shapes, plan.arena->offsets, stream);
      for (size_t i = 0; i < tensors.size(); ++i) {
        result.parameters[tensors[i]] = std::move(views[i]);
      }
    }
    if (out.momentum) {
      result.momentum.push_back(*out.momentum);
    }
    if (plan.writes_step) {
      result.counters = {*out.step, *out.used};
    }
  }
  return result;
}

std::vector<mx::Shape> FusedSGD::output_shapes(const std::vector<mx::array>& inputs) {
  // A shapeless compiled graph calls this with new inputs. The arena was laid
  // out for the shapes of the trace, so only the batch may have changed.
  const size_t n = plan_.tensor_count();
  for (size_t i = 0; i < 2 * n; ++i) {
    if (inputs[i].shape() != plan_.arena->shapes[i % n]) {
      refuse(
          kOp,
          "a shapeless compiled step cannot change the shapes of its parameters: got ",
          inputs[i].shape(),
          ", traced with ",
          plan_.arena->shapes[i % n],
          ".");
    }
  }
  return plan_.output_shapes();
}

} // namespace mlx_fused_optim
