#include "binding/prepared.h"

#include <nanobind/stl/optional.h>
#include <nanobind/stl/vector.h>

#include "graph/tracing.h"

namespace mlx_fused_optim {

namespace {

/// A dict in a dict, or a null handle.
nb::handle dict_at(nb::handle dict, nb::handle key) {
  const auto value = lookup(dict, key);
  return value && PyDict_CheckExact(value.ptr()) ? value : nb::handle();
}

/// The array that an object is, or null.
const mx::array* as_array(nb::handle object) {
  return object && is_array(object) ? &array_of(object) : nullptr;
}

const mx::array* as_scalar(nb::handle object) {
  auto* array = as_array(object);
  return array && array->ndim() == 0 ? array : nullptr;
}

bool is_scalar(nb::handle object, mx::Dtype dtype) {
  auto* array = as_scalar(object);
  return array && array->dtype() == dtype;
}

bool is_real(mx::Dtype dtype) {
  return mx::issubdtype(dtype, mx::floating) || mx::issubdtype(dtype, mx::integer);
}

/// Keys of a state, made once.
struct Names {
  nb::str step{"step"}, learning_rate{"learning_rate"}, arenas{"arenas"}, table{"table"},
      grad_norm{"grad_norm"}, skipped{"skipped"};
};
const Names& names() {
  static const auto* made = new Names; // never destroyed: Python may be gone by then
  return *made;
}

/// What an entry of state["arenas"] keeps, or nothing if it has more or less than that.
std::optional<StepSlots> slots_of(
    nb::handle entry,
    const std::vector<std::pair<int, nb::str>>& slot_names) {
  StepSlots slots;
  size_t known = lookup(entry, names().table) ? 1 : 0;
  for (auto& [slot, name] : slot_names) {
    const auto arenas = lookup(entry, name);
    if (!arenas) {
      continue;
    }
    if (!PyList_Check(arenas.ptr())) {
      return {};
    }
    for (auto item : nb::borrow<nb::list>(arenas)) {
      auto* arena = as_array(item);
      if (!arena) {
        return {};
      }
      slots[slot].push_back(*arena);
    }
    ++known;
  }
  return known == nb::len(entry) ? std::optional(std::move(slots)) : std::nullopt;
}

nb::dict copy_of(nb::handle dict) {
  PyObject* copy = PyDict_Copy(dict.ptr());
  if (!copy) {
    nb::raise_python_error();
  }
  return nb::steal<nb::dict>(copy);
}

} // namespace

PreparedStep::PreparedStep(nb::object layout, std::string key, size_t entries, StepOptions options)
    : held_(layout),
      layout_(nb::cast<const Layout&>(layout)),
      key_(key.c_str()),
      entries_(entries),
      options_(std::move(options)) {
  auto& rate = options_.scalars[fused_math::kLearningRate];
  if (std::holds_alternative<mx::array>(rate)) {
    rate = mx::array(0.0f); // given with each step; this one may hold a whole graph
  }
  const int own = static_cast<int>(rules().at(options_.rule).slots.size());
  for (int slot = 0; slot < kSlots; ++slot) {
    if (slot < own || slot >= fused_math::kRuleSlots) {
      slot_names_.emplace_back(slot, nb::str(slot_name(options_.rule, slot)));
    }
  }
}

std::optional<std::pair<nb::object, StateDict>> PreparedStep::take(
    const Tree& tree,
    nb::handle state,
    nb::handle learning_rate,
    mx::StreamOrDevice stream) const {
  if (!PyDict_Check(state.ptr()) || is_tracing()) {
    return {};
  }
  auto* step = as_scalar(lookup(state, names().step));
  auto* last_rate = as_scalar(lookup(state, names().learning_rate));
  const auto entries = dict_at(state, names().arenas);
  const auto entry = entries ? dict_at(entries, key_) : nb::handle();
  // What else is in the state, somebody has put there for a step to take in; and without an
  // entry nothing that an earlier step kept is to be forgotten. The counters of an earlier one
  // stay where nothing counts any more.
  const bool is_measured = options_.flags & fused_math::kMeasuredFlags;
  const bool skips = options_.flags & fused_math::kSkipNonfinite;
  const bool has_norm = is_scalar(lookup(state, names().grad_norm), mx::float32);
  const bool has_skipped = is_scalar(lookup(state, names().skipped), mx::uint64);
  const bool is_own = nb::len(state) == 2u + bool(entry) + has_norm + has_skipped &&
      (!entry || nb::len(entries) == entries_);
  if (!tree.fits(layout_) || !step || !last_rate || !is_own || (is_measured && !has_norm) ||
      (skips && !has_skipped)) {
    return {};
  }
  const std::optional<StepSlots> slots = entry ? slots_of(entry, slot_names_) : StepSlots{};
  auto options = options_;
  auto& rate = options.scalars[fused_math::kLearningRate];
  const bool is_given = std::holds_alternative<mx::array>(rate);
  if (is_given) {
    auto* given = as_scalar(learning_rate);
    if (!given || !is_real(given->dtype())) {
      return {};
    }
    rate = *given;
  }
  if (skips) {
    options.skipped = *as_array(lookup(state, names().skipped));
  }
  if (!slots) {
    return {};
  }

  StepResult taken;
  try {
    taken =
        fused_step(layout_, tree.parameters(), tree.gradients(), *slots, *step, options, stream);
  } catch (const std::invalid_argument&) { // nothing has been changed
    return {};
  }

  nb::dict next = copy_of(state);
  if (entry) {
    nb::dict next_entry = copy_of(entry), next_entries = copy_of(entries);
    for (auto& [slot, name] : slot_names_) {
      if (!taken.slots[slot].empty()) {
        next_entry[name] = nb::cast(std::move(taken.slots[slot]));
      }
    }
    next_entries[key_] = next_entry;
    next[names().arenas] = next_entries;
  }
  next[names().step] = nb::cast(*taken.next);
  if (is_measured) {
    next[names().grad_norm] =
        nb::cast(arena_tensor(taken.measured[0], {}, fused_math::kMeasuredNorm, stream));
  }
  if (skips) {
    next[names().skipped] = nb::cast(taken.measured[1]);
  }
  if (is_given) {
    next[names().learning_rate] = nb::borrow(learning_rate);
  } else if (taken.used) {
    next[names().learning_rate] =
        nb::cast(arena_tensor(*taken.used, {}, fused_math::kLearningRate, stream));
  } else {
    auto* value = std::get_if<double>(&rate);
    const double constant = value ? *value : first_value(std::get<Schedule>(rate));
    next[names().learning_rate] = nb::cast(mx::array(static_cast<float>(constant)));
  }
  return std::pair<nb::object, StateDict>(
      tree.unflatten(std::move(taken.parameters)), std::move(next));
}

} // namespace mlx_fused_optim
