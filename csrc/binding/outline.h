// What a tree is made of, without its arrays.
#pragma once

#include "binding/objects.h"

namespace mlx_fused_optim {

/// A gradient and its parameter, arrays.
struct Leaf {
  nb::object gradient, parameter;
};

/// The containers of a tree and what its tensors are: to read the trees of later steps along it,
/// for which no path has to be spelled, and to make new ones.
class Outline {
 public:
  /// In the order of the walk; `key` is that in a dict, else null. The number of a container.
  size_t add_dict(nb::object key) { return add({Kind::dict, std::move(key), {}, 0}); }
  size_t add_sequence(nb::object key, nb::object type) {
    return add({Kind::sequence, std::move(key), std::move(type), 0});
  }
  void add_child(size_t container) { ++nodes_[container].children; }
  void add_leaf(nb::object key, std::string_view path) {
    add({Kind::leaf, std::move(key), {}, 0});
    paths_ += path;
    path_ends_.push_back(paths_.size());
  }
  /// A leaf that is no tensor, and stays as it is.
  void add_kept(nb::object key, nb::object leaf) {
    add({Kind::kept, std::move(key), std::move(leaf), 0});
  }
  /// The next leaf's.
  void add_tensor(const mx::array& parameter) {
    const size_t i = shapes_.size();
    fingerprint_.add(path(i), shapes_.emplace_back(parameter.shape()), parameter.dtype());
    dtypes_.push_back(parameter.dtype());
  }
  void reserve_tensors() { fingerprint_.reserve(path_ends_.size(), paths_.size()); }

  std::string_view path(size_t i) const {
    const size_t begin = i == 0 ? 0 : path_ends_[i - 1];
    return std::string_view(paths_).substr(begin, path_ends_[i] - begin);
  }
  std::vector<TensorSpec> specs() const;
  const Fingerprint& fingerprint() const { return fingerprint_; }

  /// Whether trees can be read along it. Then it refers to nothing but text and Python's own types,
  /// so that it can be kept: Python's collector of cycles does not look into it.
  bool is_plain() const { return is_plain_; }

  /// The arrays of trees like this plain one, or false where they are not like it, or may not be:
  /// then a walk has to say so. `exact` if every parameter must have a gradient.
  bool read(
      nb::handle gradients,
      nb::handle parameters,
      bool exact,
      std::vector<mx::array>& gradient_arrays,
      std::vector<mx::array>& parameter_arrays) const;

  /// A tree with these leaves; dicts become plain dicts.
  nb::object make(std::vector<mx::array> leaves) const;

 private:
  enum class Kind { leaf, kept, dict, sequence };
  struct Node {
    Kind kind;
    nb::object key, type; // the type of a sequence; what is kept
    size_t children;
  };
  size_t add(Node node);
  bool find(
      size_t& node,
      nb::handle gradient,
      nb::handle parameter,
      bool exact,
      std::vector<Leaf>& leaves) const;
  nb::object make(size_t& node, size_t& leaf, std::vector<mx::array>& leaves) const;

  std::vector<Node> nodes_; // each before its children
  bool is_plain_ = true;
  std::string paths_; // of all leaves
  std::vector<size_t> path_ends_;
  std::vector<mx::Shape> shapes_;
  std::vector<mx::Dtype> dtypes_;
  Fingerprint fingerprint_;
};

/// A step begins when the caches have forgotten the tree: the last step took milliseconds. Calls
/// take(i, leaf) for each leaf, and asks for what the arrays of the next ones have to say.
template <typename Take>
void for_each_leaf(const std::vector<Leaf>& leaves, Take&& take) {
  constexpr size_t kAhead = 8;
  auto prefetch = [](nb::handle object) {
    constexpr size_t kLine = 64, kDescriptor = 384; // bytes, about
    auto* descriptor = reinterpret_cast<const char*>(array_of(object).id());
    for (size_t at = 0; at < kDescriptor; at += kLine) {
      __builtin_prefetch(descriptor + at);
    }
  };
  for (size_t i = 0; i < leaves.size(); ++i) {
    if (i + kAhead < leaves.size()) {
      prefetch(leaves[i + kAhead].gradient);
      prefetch(leaves[i + kAhead].parameter);
    }
    take(i, leaves[i]);
  }
}

} // namespace mlx_fused_optim
