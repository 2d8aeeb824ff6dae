// A step that is taken again: what Python checks and looks up is done once.
#pragma once

#include "binding/tree.h"
#include "graph/step.h"

namespace mlx_fused_optim {

using StateDict = nb::typed<nb::dict, nb::str, nb::object>;

/// One step of a state as Python has it, for options that do not change. A step comes
/// when the caches have forgotten everything, and a way through Python costs more than
/// all of this.
class PreparedStep {
 public:
  /// `key` is the layout's in state["arenas"], which has `entries` in all. Of `options`, the
  /// learning rate counts only if it is a schedule.
  PreparedStep(nb::object layout, std::string key, size_t entries, StepOptions options);

  /// The updated parameters and the next state, or nothing where something is not as it
  /// was when the step was prepared: then Python has to look, and to say what is wrong.
  std::optional<std::pair<nb::object, StateDict>> take(
      const Tree& tree,
      nb::handle state,
      nb::handle learning_rate,
      mx::StreamOrDevice stream) const;

 private:
  nb::object held_; // keeps layout_
  const Layout& layout_;
  nb::str key_;
  size_t entries_;
  StepOptions options_;
  std::vector<std::pair<int, nb::str>> slot_names_; // as the state calls them
};

} // namespace mlx_fused_optim
