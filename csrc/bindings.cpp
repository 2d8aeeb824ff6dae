#include <nanobind/nanobind.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/variant.h>
#include <nanobind/stl/vector.h>

#include "sgd.h"
#include "tree.h"

namespace nb = nanobind;
using namespace nb::literals;
using namespace mlx_fused_optim;

namespace {

// Shapes cross as tuples, dtypes as mlx.core.Dtype.
nb::tuple shape_tuple(const mx::Shape& shape) {
  nb::list lengths;
  for (auto length : shape) {
    lengths.append(length);
  }
  return nb::tuple(lengths);
}

Layout layout_from_rows(nb::list rows) {
  std::vector<TensorSpec> specs;
  for (auto item : rows) {
    auto row = nb::cast<nb::tuple>(item);
    mx::Shape shape;
    for (auto length : nb::borrow<nb::tuple>(row[1])) {
      shape.push_back(nb::cast<int>(length));
    }
    specs.push_back({nb::cast<std::string>(row[0]), shape, nb::cast<mx::Dtype>(row[2])});
  }
  return make_layout(std::move(specs));
}

nb::list layout_rows(const Layout& layout) {
  nb::list rows;
  for (auto& spec : layout.tensors) {
    rows.append(nb::make_tuple(spec.path, shape_tuple(spec.shape), spec.dtype));
  }
  return rows;
}

nb::list layout_arenas(const Layout& layout) {
  nb::list arenas;
  for (auto& arena : layout.arenas) {
    arenas.append(
        nb::make_tuple(
            arena->dtype, shape_tuple(arena_shape(*arena)), arena->tensors, arena->offsets));
  }
  return arenas;
}

using Number = std::variant<mx::array, Schedule, double>;

SgdScalarSource source(const Number& number) {
  if (auto* value = std::get_if<double>(&number)) {
    return constant(*value);
  }
  if (auto* schedule = std::get_if<Schedule>(&number)) {
    return *schedule;
  }
  return std::get<mx::array>(number);
}

nb::tuple step_of_tree(
    const Tree& tree,
    const Layout& layout,
    const std::vector<mx::array>& momentum_arenas,
    const mx::array& step,
    const Number& learning_rate,
    const Number& momentum,
    const Number& weight_decay,
    double dampening,
    bool has_momentum,
    bool nesterov,
    bool has_weight_decay,
    mx::StreamOrDevice stream) {
  using namespace fused_math;
  const uint32_t flags =
      has_momentum * kMomentum | nesterov * kNesterov | has_weight_decay * kWeightDecay;
  auto result = sgd_step(
      layout,
      tree.parameters(),
      tree.gradients(),
      momentum_arenas,
      step,
      {source(learning_rate), source(momentum), source(weight_decay), dampening, flags},
      stream);
  return nb::make_tuple(
      tree.unflatten(result.parameters), result.momentum, result.counters[0], result.counters[1]);
}

} // namespace

NB_MODULE(_ext, m) {
  // Arrays, dtypes and streams are registered there.
  nb::module_::import_("mlx.core");
  m.doc() = "The compiled part of mlx_fused_optim; its interface is internal.";

  nb::class_<Schedule>(m, "Schedule", "A schedule in the form that the kernels evaluate.")
      .def(
          "__call__",
          &evaluate_schedule,
          "steps"_a,
          nb::kw_only(),
          "stream"_a = nb::none(),
          "The float32 value at each of ``steps``, an array of integers.")
      .def_prop_ro("first_value", &first_value, "The value at step 0, as a float.")
      .def_prop_ro("natural_length", &natural_length, "About how many steps show its shape.")
      .def_ro("segments", &Schedule::count, "How many segments it has.");
  m.attr("MAX_SEGMENTS") = int(fused_math::kMaxSegments);
  m.attr("MAX_CYCLE_FACTOR") = int(fused_math::kMaxCycleFactor);

  // The makers of schedules, see csrc/schedule.h: they trust their arguments.
  m.def("constant", &constant, "value"_a);
  m.def(
      "exponential_decay",
      &exponential_decay,
      "init"_a,
      "decay_rate"_a,
      "transition_steps"_a,
      "transition_begin"_a,
      "staircase"_a,
      "end"_a.none());
  m.def(
      "blend",
      &blend,
      "one"_a,
      "zero"_a,
      "steps"_a,
      "begin"_a = 0,
      "cosine"_a = false,
      "rising"_a = false,
      "power"_a = 1.0);
  m.def("inverse_power", &inverse_power, "peak"_a, "timescale"_a, "power"_a);
  m.def("cosine_restarts", &cosine_restarts, "init"_a, "end"_a, "first_cycle"_a, "factor"_a);
  m.def(
      "triangular",
      &triangular,
      "base"_a,
      "peak"_a,
      "up"_a,
      "down"_a,
      "decay"_a,
      "decay_per_cycle"_a);
  m.def("join", &join, "schedules"_a, "boundaries"_a, "None if it needs too many segments.");
  m.def("scaled", &scaled, "schedule"_a, "factor"_a);

  nb::class_<Tree>(m, "Tree", "Gradients and their parameters, flattened in one pass.")
      .def(
          nb::init<nb::object, nb::object, std::string, bool>(),
          "gradients"_a.none(), // refused by the walk, which names the place
          "parameters"_a.none(),
          "op"_a,
          "exact"_a = false)
      .def("__len__", [](const Tree& tree) { return tree.parameters().size(); })
      .def_prop_ro("fingerprint", &Tree::fingerprint);

  nb::class_<Layout>(m, "Layout", "Where each tensor lives: see csrc/layout.h.")
      .def(
          "__init__",
          [](Layout* self, const Tree& tree) { new (self) Layout(make_layout(tree.specs())); })
      .def(
          "__init__",
          [](Layout* self, nb::list rows) { new (self) Layout(layout_from_rows(rows)); })
      .def_prop_ro("fingerprint", &fingerprint_of)
      .def_prop_ro("tensors", &layout_rows, "``[(path, shape, dtype), ...]``")
      .def_prop_ro(
          "arenas",
          &layout_arenas,
          "``[(dtype, shape, tensor numbers, offsets in elements), ...]``");

  m.def(
      "arena_view",
      [](const mx::array& arena, std::vector<int> shape, size_t offset, mx::StreamOrDevice s) {
        return arena_view(arena, mx::Shape(shape.begin(), shape.end()), offset, s);
      },
      "arena"_a,
      "shape"_a,
      "offset"_a,
      nb::kw_only(),
      "stream"_a = nb::none(),
      "A tensor of a flat arena, without a copy.");

  m.def(
      "sgd_step",
      &step_of_tree,
      "tree"_a,
      "layout"_a,
      "momentum_arenas"_a,
      "step"_a,
      nb::kw_only(),
      "learning_rate"_a,
      "momentum"_a,
      "weight_decay"_a,
      "dampening"_a,
      "has_momentum"_a,
      "nesterov"_a,
      "has_weight_decay"_a,
      "stream"_a = nb::none(),
      "One step of every tensor: (parameters, momentum arenas, step, used scalars). Each of\n"
      "learning_rate, momentum and weight_decay is a float, a Schedule or a scalar array.");
}
