#include <nanobind/nanobind.h>
#include <nanobind/stl/array.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/shared_ptr.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/variant.h>
#include <nanobind/stl/vector.h>

#include <algorithm>

#include "binding/prepared.h"
#include "binding/tree.h"
#include "composed/bytes.h"
#include "composed/switch.h"
#include "graph/errors.h"
#include "graph/measure.h"
#include "graph/step.h"
#include "graph/tracing.h"

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

/// A path crosses as a tuple: text and (number,) for keys of dicts, a number for a place in a list.
nb::tuple path_tuple(std::string_view path) {
  nb::list keys;
  while (!path.empty()) {
    const size_t end = std::find_if(path.begin() + 1, path.end(), is_path_key) - path.begin();
    nb::object key = nb::str(path.data() + 1, end - 1);
    if (path[0] != kTextKey) {
      key = nb::int_(key);
    }
    keys.append(path[0] == kNumberKey ? nb::object(nb::make_tuple(key)) : key);
    path.remove_prefix(end);
  }
  return nb::tuple(keys);
}

std::string path_text(nb::handle keys) {
  std::string path;
  for (auto key : nb::cast<nb::sequence>(keys)) {
    const bool is_text = nb::isinstance<nb::str>(key), is_place = nb::isinstance<nb::int_>(key);
    path += is_text ? kTextKey : is_place ? kPlaceKey : kNumberKey;
    const nb::object number = is_text || is_place ? nb::borrow(key) : nb::object(key[0]);
    path += nb::cast<std::string>(nb::str(number));
  }
  return path;
}

Layout layout_from_rows(nb::list rows, size_t least_of_bytes) {
  std::vector<TensorSpec> specs;
  for (auto item : rows) {
    auto row = nb::cast<nb::tuple>(item);
    mx::Shape shape;
    for (auto length : nb::borrow<nb::tuple>(row[1])) {
      shape.push_back(nb::cast<int>(length));
    }
    specs.push_back({path_text(row[0]), shape, nb::cast<mx::Dtype>(row[2])});
  }
  return make_layout(std::move(specs), least_of_bytes);
}

/// Of arenas as layout_arenas has them.
Layout layout_from_arenas(nb::list rows, nb::list arenas, std::string name) {
  Layout layout = layout_from_rows(rows, 0);
  layout.arenas.clear();
  layout.name = std::move(name);
  for (auto item : arenas) {
    auto row = nb::cast<nb::tuple>(item);
    Arena arena{nb::cast<mx::Dtype>(row[0]), nb::cast<size_t>(row[1])};
    arena.tensors = nb::cast<std::vector<int>>(row[2]);
    arena.offsets = nb::cast<std::vector<size_t>>(row[3]);
    for (int t : arena.tensors) {
      arena.shapes.push_back(layout.tensors.at(t).shape);
    }
    arena.is_small = nb::cast<bool>(row[4]);
    arena.fingerprint = nb::cast<uint64_t>(row[5]);
    arena.begin = nb::cast<uint32_t>(row[6]);
    layout.arenas.push_back(std::make_shared<const Arena>(std::move(arena)));
  }
  return layout;
}

nb::list layout_rows(const Layout& layout) {
  nb::list rows;
  for (auto& spec : layout.tensors) {
    rows.append(nb::make_tuple(path_tuple(spec.path), shape_tuple(spec.shape), spec.dtype));
  }
  return rows;
}

nb::list layout_arenas(const Layout& layout) {
  nb::list arenas;
  for (auto& arena : layout.arenas) {
    arenas.append(
        nb::make_tuple(
            arena->dtype,
            shape_tuple(arena_shape(*arena)),
            arena->tensors,
            arena->offsets,
            arena->is_small));
  }
  return arenas;
}

nb::tuple step_of_tree(
    const Tree& tree,
    const Layout& layout,
    const StepSlots& slots,
    const mx::array& step,
    const StepOptions& options,
    mx::StreamOrDevice stream) {
  if (!tree.fits(layout)) {
    refuse(
        options.op,
        "the layout is of other tensors: got layout_",
        fingerprint_text(layout.fingerprint.number()),
        ", the tree has layout_",
        tree.fingerprint(),
        ".");
  }
  auto result =
      fused_step(layout, tree.parameters(), tree.gradients(), slots, step, options, stream);
  auto measured = nb::make_tuple(nb::none(), nb::none());
  if (!result.measured.empty()) {
    measured = nb::make_tuple(result.measured[0], result.measured[1]);
  }
  const bool gives_directions = options.flags & fused_math::kDirection;
  return nb::make_tuple(
      gives_directions ? nb::cast(std::move(result.parameters))
                       : tree.unflatten(std::move(result.parameters)),
      result.slots,
      result.next,
      result.used,
      measured[0],
      measured[1]);
}

uint32_t byte_format(bool is_unsigned) {
  return is_unsigned ? fused_math::kByteSquares : fused_math::kBytes;
}

nb::dict flags() {
  using namespace fused_math;
  const std::pair<const char*, StepFlags> named[] = {
      {"weight_decay", kWeightDecay},
      {"maximize", kMaximize},
      {"grad_scale", kGradScale},
      {"clip_value", kClipValue},
      {"clip_norm", kClipNorm},
      {"measure_norm", kMeasureNorm},
      {"skip_nonfinite", kSkipNonfinite},
      {"trust_ratio", kTrustRatio},
      {"groups", kGroups},
      {"decoupled", kDecoupled},
      {"master_weights", kMaster},
      {"compensated", kCompensated},
      {"stochastic", kStochastic},
      {"ema", kAverage},
      {"direction", kDirection},
      {"pack", kPack}};
  nb::dict bits;
  for (auto [name, bit] : named) {
    bits[name] = static_cast<uint32_t>(bit);
  }
  return bits;
}

/// The table of rules.
nb::list rule_rows() {
  nb::list rows;
  for (auto& rule : rules()) {
    nb::dict row, flags;
    row["name"] = rule.name;
    row["slots"] = rule.slots;
    row["scalars"] = rule.scalars;
    for (auto& flag : rule.flags) {
      flags[flag.name] = flag.bit;
    }
    row["flags"] = flags;
    nb::list is_unsigned;
    for (int slot = 0; slot < static_cast<int>(rule.slots.size()); ++slot) {
      is_unsigned.append(fused_math::Rules::is_unsigned(nb::len(rows), slot));
    }
    row["is_unsigned"] = is_unsigned;
    rows.append(row);
  }
  return rows;
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

  // The makers of schedules, see csrc/graph/schedule.h: they trust their arguments.
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

  nb::class_<Outline>(m, "Outline", "What a tree is made of: see csrc/binding/outline.h.");
  nb::class_<Tree>(m, "Tree", "Gradients and their parameters, flattened in one pass.")
      .def(
          nb::init<nb::object, nb::object, std::string, bool, std::shared_ptr<Outline>>(),
          "gradients"_a.none(), // refused by the walk, which names the place
          "parameters"_a.none(),
          "op"_a,
          "exact"_a = false,
          "like"_a = nb::none(),
          "Trees like an earlier one are read along its outline.")
      .def("__len__", [](const Tree& tree) { return tree.parameters().size(); })
      .def_prop_ro(
          "parameters", [](const Tree& tree) { return std::vector<mx::array>(tree.parameters()); })
      .def_prop_ro(
          "gradients", [](const Tree& tree) { return std::vector<mx::array>(tree.gradients()); })
      .def_prop_ro(
          "has_placeholders",
          [](const Tree& tree) {
            return has_placeholders(tree.parameters()) || has_placeholders(tree.gradients());
          },
          "Whether it is part of a function that is being compiled or vectorised.")
      .def("part", &Tree::part, "numbers"_a, "layout"_a, "Some of its tensors, by number.")
      .def("with_gradients", &Tree::with_gradients, "gradients"_a)
      .def("unflatten", &Tree::unflatten, "leaves"_a, "The structure, with other leaves.")
      .def_prop_ro("fingerprint", &Tree::fingerprint)
      .def_prop_ro(
          "outline", &Tree::outline, "For the trees of later steps; None if none is read along it.")
      .def_prop_ro(
          "layout_name",
          &Tree::layout_name,
          "Of a part whose layout is not the usual one of its tensors.");

  nb::class_<Layout>(m, "Layout", "Where each tensor lives: see csrc/graph/layout.h.")
      .def(
          "__init__",
          [](Layout* self, const Tree& tree, size_t least_of_bytes, size_t limit) {
            new (self) Layout(make_layout(tree.specs(), least_of_bytes, limit));
          },
          "tree"_a,
          "least_of_bytes"_a = 0,
          "limit"_a = 0)
      .def(
          "__init__",
          [](Layout* self, nb::list rows, size_t least_of_bytes) {
            new (self) Layout(layout_from_rows(rows, least_of_bytes));
          },
          "rows"_a,
          "least_of_bytes"_a = 0)
      .def(
          "__init__",
          [](Layout* self, nb::list rows, nb::list arenas, std::string name) {
            new (self) Layout(layout_from_arenas(rows, arenas, std::move(name)));
          },
          "rows"_a,
          "arenas"_a,
          "name"_a = "")
      .def_prop_ro(
          "fingerprint",
          [](const Layout& layout) { return fingerprint_text(layout.fingerprint.number()); })
      .def_prop_ro("tensors", &layout_rows, "``[(path, shape, dtype), ...]``")
      .def_prop_ro(
          "arenas",
          &layout_arenas,
          "``[(dtype, shape, tensor numbers, offsets in elements, whether they are small), ...]``")
      .def_prop_ro(
          "places",
          [](const Layout& layout) {
            nb::list places;
            for (auto& arena : layout.arenas) {
              places.append(nb::make_tuple(arena->fingerprint, arena->begin));
            }
            return places;
          },
          "Of each arena the place of its random bits, and where it begins there.");

  m.def("is_tracing", &is_tracing, "Whether a function is being traced.");
  m.def(
      "has_placeholders",
      &has_placeholders,
      "arrays"_a,
      "Whether arrays depend on an input of a function that is being compiled or vectorised.");
  m.def(
      "is_available",
      [](const mx::array& array) { return array.is_available(); },
      "array"_a,
      "Whether nothing is to be done or waited for before it is read.");
  m.def(
      "arena_view",
      [](const mx::array& arena,
         std::vector<int> lengths,
         size_t offset,
         bool paced,
         mx::StreamOrDevice s) {
        return arena_tensor(arena, mx::Shape(lengths.begin(), lengths.end()), offset, s, paced);
      },
      "arena"_a,
      "shape"_a,
      "offset"_a,
      nb::kw_only(),
      "paced"_a = false,
      "stream"_a = nb::none(),
      "A tensor of a flat arena, without a copy. ``paced`` is for the beginning of a round: see\n"
      "csrc/graph/view.h.");

  m.def(
      "arena_views",
      [](const mx::array& arena, const Layout& layout, size_t number) {
        return arena_tensors(arena, layout.arenas.at(number));
      },
      "arena"_a,
      "layout"_a,
      "number"_a,
      "All tensors of an arena of a layout.");
  m.def(
      "tensors_of",
      [](const std::vector<mx::array>& arenas, const Layout& layout) {
        if (arenas.size() != layout.arenas.size()) {
          throw nb::index_error("[tensors_of] one array for each of the layout's arenas.");
        }
        std::vector<mx::array> tensors(layout.tensors.size(), mx::array(0.0f)); // all are replaced
        for (size_t a = 0; a < arenas.size(); ++a) {
          auto& arena = layout.arenas[a];
          auto views = arena->shapes.size() == 1 && arena->shapes[0] == arenas[a].shape()
              ? std::vector{arenas[a]}
              : arena_tensors(arenas[a], arena);
          for (size_t i = 0; i < views.size(); ++i) {
            tensors[arena->tensors[i]] = std::move(views[i]);
          }
        }
        return tensors;
      },
      "arenas"_a,
      "layout"_a,
      "The tensors of a layout, by their numbers, as views of an array for each of its arenas.\n"
      "An array that is a single tensor stays as it is.");
  m.def(
      "batch_views",
      [](const mx::array& arena,
         std::vector<int> lengths,
         size_t count,
         size_t offset,
         size_t pitch) {
        const mx::Shape shape(lengths.begin(), lengths.end());
        auto batch = std::make_shared<Arena>(Arena{arena.dtype(), arena.size()});
        for (size_t i = 0; i < count; ++i) {
          batch->tensors.push_back(static_cast<int>(i));
          batch->shapes.push_back(shape);
          batch->offsets.push_back(offset + i * pitch);
        }
        return arena_tensors(arena, batch);
      },
      "arena"_a,
      "shape"_a,
      "count"_a,
      "offset"_a,
      "pitch"_a,
      "Tensors of one shape that begin ``pitch`` elements apart.");
  m.def(
      "pack_slot",
      [](const std::vector<std::optional<mx::array>>& tensors,
         const Layout& layout,
         size_t number,
         std::optional<mx::Dtype> dtype) {
        auto& arena = *layout.arenas.at(number);
        if (tensors.size() != arena.shapes.size()) {
          throw nb::index_error("[pack_slot] one tensor, or None, for each of the arena.");
        }
        return pack_slot(tensors, arena, dtype);
      },
      "tensors"_a,
      "layout"_a,
      "number"_a,
      "dtype"_a.none(),
      "The way back, in new memory: zeros where a tensor is None; without a dtype, that which\n"
      "all of them can be promoted to.");

  m.attr("BYTE_GROUP") = int(fused_math::kByteGroup);
  m.attr("BYTE_ROW") = int(fused_math::kByteRow);
  m.def(
      "as_bytes",
      [](const mx::array& x, bool is_unsigned) {
        return as_bytes_composed(x, byte_format(is_unsigned), {}, {});
      },
      "x"_a,
      "is_unsigned"_a,
      "Rows of bytes of float32 numbers: see csrc/math/bytes.h.");
  m.def(
      "of_bytes",
      [](const mx::array& rows, std::vector<int> lengths, bool is_unsigned) {
        const mx::Shape shape(lengths.begin(), lengths.end());
        return of_bytes_composed(rows, shape, byte_format(is_unsigned), {});
      },
      "rows"_a,
      "shape"_a,
      "is_unsigned"_a,
      "The way back, of as many numbers as the shape has.");

  nb::class_<StepGroups>(m, "Groups", "Tensors that differ from the others: see csrc/graph/step.h.")
      .def(
          "__init__",
          [](StepGroups* self, std::vector<uint32_t> group_of, std::vector<uint32_t> flags_of) {
            for (auto group : group_of) {
              if (group >= flags_of.size()) {
                throw nb::index_error("[Groups] a tensor's group does not exist.");
              }
            }
            new (self) StepGroups{std::move(group_of), std::move(flags_of)};
          },
          "group_of"_a,
          "flags_of"_a);
  m.attr("FLAGS") = flags();
  m.attr("RULES") = rule_rows();
  m.def(
      "rule_slots",
      [](uint32_t rule, uint32_t flags) { return fused_math::Rules::slots(rule, flags); },
      "rule"_a,
      "flags"_a,
      "How many of a rule's slots a step keeps: the first ones.");
  m.attr("GROUP_NUMBERS") = int(fused_math::kGroupNumbers);

  nb::class_<StepOptions>(m, "Options", "What a step does: see csrc/graph/step.h.")
      .def(
          "__init__",
          [](StepOptions* self,
             uint32_t rule,
             std::vector<StepScalarSource> scalars,
             uint32_t flags,
             float clip_value,
             float clip_norm,
             float trust_coefficient,
             double ema_decay,
             uint64_t seed,
             std::optional<mx::Dtype> state_dtype,
             std::shared_ptr<StepGroups> groups,
             std::optional<mx::array> group_numbers,
             std::optional<mx::array> skipped,
             std::vector<mx::array> measured,
             std::string op) {
            if (rule >= rules().size() ||
                scalars.size() != fused_math::kFirstRuleScalar + rules()[rule].scalars.size()) {
              throw nb::index_error("[Options] not a rule, or not as many scalars as it has.");
            }
            new (self) StepOptions{
                std::move(op),
                rule,
                std::move(scalars),
                flags,
                clip_value,
                clip_norm,
                trust_coefficient,
                ema_decay,
                seed,
                state_dtype,
                std::move(groups),
                std::move(group_numbers),
                std::move(skipped),
                std::move(measured)};
          },
          nb::kw_only(),
          "rule"_a,
          "scalars"_a,
          "flags"_a,
          "clip_value"_a = 0.0f,
          "clip_norm"_a = 0.0f,
          "trust_coefficient"_a = 0.0f,
          "ema_decay"_a = 0.0,
          "seed"_a = 0,
          "state_dtype"_a = nb::none(),
          "groups"_a = nb::none(),
          "group_numbers"_a = nb::none(),
          "skipped"_a = nb::none(),
          "measured"_a = std::vector<mx::array>(),
          "op"_a = "fused_step",
          "``scalars`` are learning_rate, weight_decay, grad_scale and the rule's own, each a\n"
          "float, a Schedule or a scalar array.");

  m.def(
      "fused_step",
      &step_of_tree,
      "tree"_a,
      "layout"_a,
      "slots"_a,
      "step"_a,
      "options"_a,
      nb::kw_only(),
      "stream"_a = nb::none(),
      "One step of every tensor: (parameters, slots, step, used scalars or None where all are\n"
      "constant, measured or None, steps skipped or None). With the flag \"direction\" a list of\n"
      "arenas stands in the place of the parameters.");
  m.def(
      "measure_step",
      [](const Tree& tree,
         const mx::array& step,
         const StepOptions& options,
         mx::StreamOrDevice s) {
        return measure_step(tree.parameters(), tree.gradients(), step, options, s);
      },
      "tree"_a,
      "step"_a,
      "options"_a,
      nb::kw_only(),
      "stream"_a = nb::none(),
      "[measured, steps skipped], for a step of parts of this tree.");
  m.def(
      "pack_arrays",
      [](const std::vector<mx::array>& arrays,
         const Layout& layout,
         bool skips_single,
         mx::StreamOrDevice s) {
        if (arrays.size() != layout.tensors.size()) {
          throw nb::index_error("[pack_arrays] one array for each of the layout's tensors.");
        }
        return pack_arrays(layout, arrays, skips_single, s);
      },
      "arrays"_a,
      "layout"_a,
      "skips_single"_a = false,
      nb::kw_only(),
      "stream"_a = nb::none(),
      "The arrays of each arena in one flat array, in new memory; with ``skips_single`` one that "
      "is\n"
      "alone as it is.");
  m.def("after", &after, "x"_a, "other"_a, "``x``, once the other array is there: on its stream.");

  m.def(
      "norms",
      [](const std::vector<mx::array>& tensors, mx::StreamOrDevice s) {
        return norms_of(tensors, mx::to_stream(s));
      },
      "tensors"_a,
      nb::kw_only(),
      "stream"_a = nb::none(),
      "The norm of each of at least one tensor, in float32.");

  nb::class_<PreparedStep>(
      m, "PreparedStep", "A step that is taken again: see csrc/binding/prepared.h.")
      .def(
          nb::init<nb::object, std::string, size_t, StepOptions>(),
          "layout"_a,
          "key"_a,
          "entries"_a,
          "options"_a)
      .def(
          "__call__",
          &PreparedStep::take,
          "tree"_a,
          "state"_a.none(),
          "learning_rate"_a.none(),
          "stream"_a = nb::none());
}
