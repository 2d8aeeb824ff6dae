// Python trees (dicts, lists, tuples of arrays) to flat lists and back, as
// mlx.utils does, but in one pass in C++: a model can have hundreds of tensors,
// and a step only microseconds.
#pragma once

#include "binding/outline.h"

namespace mlx_fused_optim {

/// The leaves of a tree of gradients and the parameters at the same places. The
/// tree of parameters may hold more. Throws std::invalid_argument, naming the
/// path, where a gradient has no parameter or either is not an array of a
/// supported dtype.
class Tree {
 public:
  /// Trees that are `like` an earlier one are read along its outline.
  Tree(
      nb::object gradients,
      nb::object parameters,
      std::string op,
      bool exact,
      std::shared_ptr<Outline> like = nullptr);

  /// Some of its tensors, those of `layout`, by their numbers; a list of them is its structure.
  Tree part(const std::vector<size_t>& numbers, nb::object layout) const;

  /// The same parameters, with other gradients of their shapes.
  Tree with_gradients(std::vector<mx::array> gradients) const;

  /// A new tree of the gradients' structure; dicts become plain dicts.
  nb::object unflatten(std::vector<mx::array> leaves) const;

  /// The tensors, named.
  std::vector<TensorSpec> specs() const { return layout_ ? layout().tensors : outline_->specs(); }

  const std::vector<mx::array>& gradients() const { return gradients_; }
  const std::vector<mx::array>& parameters() const { return parameters_; }
  std::string fingerprint() const { return fingerprint_text(tensors().number()); }

  /// For the trees of later steps, where they can be read along it. A part has none.
  std::optional<std::shared_ptr<Outline>> outline() const {
    return outline_ && outline_->is_plain() ? std::optional(outline_) : std::nullopt;
  }

  /// Of a part whose layout is not the usual one of its tensors; else nothing.
  std::string layout_name() const { return layout_ ? layout().name : std::string(); }

  /// Whether these are the tensors of a layout.
  bool fits(const Layout& layout) const { return tensors() == layout.fingerprint; }

 private:
  struct Walk {
    std::string path; // of the place that the walk has reached
    nb::object key; // the last of it, in a dict
    std::vector<Leaf> leaves;
    Outline outline;
  };
  void walk(nb::handle gradients, nb::handle parameters, Walk& walk);
  /// `number` is the container's in the outline.
  void walk_dicts(nb::handle gradients, nb::handle parameters, size_t number, Walk& walk);
  void walk_sequences(nb::handle gradients, nb::handle parameters, size_t number, Walk& walk);
  void take(Walk& found);
  void take(const Leaf& leaf, std::string_view path);
  const mx::array& array(nb::handle object, const char* role, std::string_view path) const;

  const Layout& layout() const { return nb::cast<const Layout&>(layout_); }
  const Fingerprint& tensors() const {
    return layout_ ? layout().fingerprint : outline_->fingerprint();
  }

  Tree() = default; // of no tensors

  std::shared_ptr<Outline> outline_;
  nb::object layout_; // of a part, which has no outline
  std::string op_; // for error messages
  bool exact_ = false; // every parameter must have a gradient
  bool skips_integers_ = false; // of parameters alone, which may have data that nobody trains
  std::vector<mx::array> gradients_;
  std::vector<mx::array> parameters_;
};

} // namespace mlx_fused_optim
