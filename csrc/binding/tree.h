// Python trees (dicts, lists, tuples of arrays) to flat lists and back, as
// mlx.utils does, but in one pass in C++: a model can have hundreds of tensors,
// and a step only microseconds.
#pragma once

#include <nanobind/nanobind.h>
// In every file that casts strings: without it nanobind takes std::string for a
// class of ours, and the linker may keep that version.
#include <nanobind/stl/string.h>

#include "graph/layout.h"

namespace mlx_fused_optim {

namespace nb = nanobind;

/// A value of a dict, borrowed, or a null handle.
nb::handle lookup(nb::handle dict, nb::handle key);

/// The leaves of a tree of gradients and the parameters at the same places. The
/// tree of parameters may hold more. Throws std::invalid_argument, naming the
/// path, where a gradient has no parameter or either is not an array of a
/// supported dtype.
class Tree {
 public:
  Tree(nb::object gradients, nb::object parameters, std::string op, bool exact);

  /// Some of its tensors, those of `layout`, by their numbers; a list of them is its structure.
  Tree part(const std::vector<size_t>& numbers, nb::object layout) const;

  /// The same parameters, with other gradients of their shapes.
  Tree with_gradients(std::vector<mx::array> gradients) const;

  /// A new tree of the gradients' structure; dicts become plain dicts.
  nb::object unflatten(std::vector<mx::array> leaves) const;

  /// The tensors, named; made on demand, as it costs more than the walk.
  std::vector<TensorSpec> specs() const;

  const std::vector<mx::array>& gradients() const { return gradients_; }
  const std::vector<mx::array>& parameters() const { return parameters_; }
  std::string fingerprint() const { return fingerprint_text(fingerprint_.number()); }

  /// Of a part whose layout is not the usual one of its tensors; else nothing.
  std::string layout_name() const {
    return layout_ ? nb::cast<const Layout&>(layout_).name : std::string();
  }

  /// Whether these are the tensors of a layout.
  bool fits(const Layout& layout) const { return fingerprint_ == layout.fingerprint; }

 private:
  /// A gradient and its parameter, and where their path ends in the text of all paths.
  struct Leaf {
    nb::object gradient, parameter;
    size_t path_end;
  };
  struct Walk {
    std::string path; // of the place that the walk has reached
    std::string paths; // of all leaves so far
    std::vector<Leaf> leaves;
  };
  void walk(nb::handle gradients, nb::handle parameters, Walk& walk);
  void walk_dicts(nb::handle gradients, nb::handle parameters, Walk& walk);
  void walk_sequences(nb::handle gradients, nb::handle parameters, Walk& walk);
  void take(const Walk& found);
  void take(const Leaf& leaf, std::string_view path);
  const mx::array& array(nb::handle object, const char* role, std::string_view path) const;

  Tree() = default; // of no tensors

  nb::object structure_;
  nb::object layout_; // of a part, which has no structure
  std::string op_; // for error messages
  bool exact_ = false; // every parameter must have a gradient
  bool skips_integers_ = false; // of parameters alone, which may have data that nobody trains
  std::vector<mx::array> gradients_;
  std::vector<mx::array> parameters_;
  Fingerprint fingerprint_;
};

} // namespace mlx_fused_optim
