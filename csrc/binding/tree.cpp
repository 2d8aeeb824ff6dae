#include "binding/tree.h"

#include <nanobind/stl/vector.h>

#include <algorithm>

#include "graph/errors.h"

namespace mlx_fused_optim {

namespace {

std::string_view text_of(nb::handle string) {
  Py_ssize_t size;
  const char* text = PyUnicode_AsUTF8AndSize(string.ptr(), &size);
  if (!text) {
    nb::raise_python_error();
  }
  return {text, static_cast<size_t>(size)};
}

/// Extends a path for as long as it lives: "layers" -> "layers.0".
class Descend {
 public:
  Descend(std::string& path, size_t place) : path_(path), length_(path.size()) {
    path_ += kPlaceKey;
    path_ += std::to_string(place);
  }
  /// The key of a dict; what is neither text nor an integer counts as its str().
  Descend(std::string& path, nb::handle key) : path_(path), length_(path.size()) {
    if (PyUnicode_Check(key.ptr())) {
      add(kTextKey, key);
    } else if (PyIndex_Check(key.ptr())) {
      add(kNumberKey, nb::str(nb::steal(PyNumber_Index(key.ptr()))));
    } else {
      add(kTextKey, nb::str(key));
    }
  }
  ~Descend() { path_.resize(length_); }

 private:
  void add(PathKey kind, nb::handle text) {
    path_ += kind;
    path_ += text_of(text);
  }
  std::string& path_;
  size_t length_;
};

/// Python's own limit to recursion, for trees that contain themselves.
class Recursion {
 public:
  Recursion() {
    if (Py_EnterRecursiveCall(" in a tree")) {
      nb::raise_python_error();
    }
  }
  ~Recursion() { Py_LeaveRecursiveCall(); }
};

std::string python_type(nb::handle object) {
  return nb::cast<std::string>(object.type().attr("__name__"));
}

std::string described(std::string_view path) {
  return path.empty() ? "the tree itself" : "'" + path_name(path) + "'";
}

} // namespace

Tree::Tree(
    nb::object gradients,
    nb::object parameters,
    std::string op,
    bool exact,
    std::shared_ptr<Outline> like)
    : op_(std::move(op)), exact_(exact), skips_integers_(!exact && gradients.is(parameters)) {
  if (like && like->read(gradients, parameters, exact, gradients_, parameters_)) {
    outline_ = std::move(like);
    return;
  }
  Walk found;
  try {
    walk(gradients, parameters, found);
  } catch (const std::invalid_argument&) {
    take(found); // a wrong leaf before that place is told first
    throw;
  }
  take(found);
  outline_ = std::make_shared<Outline>(std::move(found.outline));
}

void Tree::take(Walk& found) {
  gradients_.reserve(found.leaves.size());
  parameters_.reserve(found.leaves.size());
  found.outline.reserve_tensors();
  for_each_leaf(found.leaves, [&](size_t i, const Leaf& leaf) {
    take(leaf, found.outline.path(i));
    found.outline.add_tensor(parameters_.back());
  });
}

void Tree::walk(nb::handle gradients, nb::handle parameters, Walk& walk) {
  Recursion guard;
  auto key = std::move(walk.key);
  if (is_array(gradients)) {
    if (skips_integers_ && is_integer(array_of(gradients))) {
      walk.outline.add_kept(std::move(key), nb::borrow(gradients));
      return;
    }
    if (!is_array(parameters)) {
      array(gradients, "gradient", walk.path); // which is told first
      array(parameters, "parameter", walk.path);
    }
    walk.outline.add_leaf(std::move(key), walk.path);
    walk.leaves.push_back({nb::borrow(gradients), nb::borrow(parameters)});
  } else if (nb::isinstance<nb::dict>(gradients)) {
    walk_dicts(gradients, parameters, walk.outline.add_dict(std::move(key)), walk);
  } else if (is_sequence(gradients)) {
    const auto number = walk.outline.add_sequence(std::move(key), nb::borrow(gradients.type()));
    walk_sequences(gradients, parameters, number, walk);
  } else {
    array(gradients, gradients.is(parameters) ? "parameter" : "gradient", walk.path);
  }
}

void Tree::walk_dicts(nb::handle gradients, nb::handle parameters, size_t number, Walk& walk) {
  if (!exact_ && nb::len(gradients) == 0) {
    return; // a place without gradients, as mlx.utils.tree_unflatten fills lists with
  }
  if (!nb::isinstance<nb::dict>(parameters)) {
    refuse(
        op_,
        "the trees differ at ",
        described(walk.path),
        ": got a dict of gradients and, of parameters, ",
        python_type(parameters),
        ", allowed the same structure.");
  }
  auto gradient_dict = nb::borrow<nb::dict>(gradients);
  auto parameter_dict = nb::borrow<nb::dict>(parameters);
  for (auto [key, gradient] : gradient_dict) {
    __builtin_prefetch(gradient.ptr());
    if (PyUnicode_CheckExact(key.ptr())) {
      __builtin_prefetch(lookup(parameter_dict, key).ptr());
    }
  }
  for (auto [key, gradient] : gradient_dict) {
    // Held: a key of somebody's own type may change the trees when it is looked at.
    const auto own_key = nb::borrow(key), own_gradient = nb::borrow(gradient);
    Descend down(walk.path, key);
    const auto parameter = nb::borrow(lookup(parameter_dict, key));
    if (!parameter) {
      refuse(
          op_,
          "a gradient without a parameter: got a gradient at ",
          described(walk.path),
          ", allowed only paths that the parameters have.");
    }
    walk.key = own_key;
    walk.outline.add_child(number);
    this->walk(own_gradient, parameter, walk);
  }
  if (exact_) {
    for (auto [key, parameter] : parameter_dict) {
      if (!lookup(gradient_dict, key)) {
        Descend down(walk.path, key);
        refuse(
            op_,
            "a parameter without a gradient: got none at ",
            described(walk.path),
            ", allowed the same structure for both.");
      }
    }
  }
}

void Tree::walk_sequences(nb::handle gradients, nb::handle parameters, size_t number, Walk& walk) {
  const size_t length = nb::len(gradients);
  if (!is_sequence(parameters) || nb::len(parameters) < length ||
      (exact_ && nb::len(parameters) != length)) {
    refuse(
        op_,
        "the trees differ at ",
        described(walk.path),
        ": got ",
        length,
        " gradients and, of parameters, ",
        is_sequence(parameters) ? std::to_string(nb::len(parameters)) : python_type(parameters),
        ", allowed the same structure.");
  }
  for (size_t i = 0; i < length; ++i) {
    constexpr size_t kAhead = 8;
    if (i + kAhead < length) {
      __builtin_prefetch(item(gradients, i + kAhead).ptr());
      __builtin_prefetch(item(parameters, i + kAhead).ptr());
    }
    Descend down(walk.path, i);
    walk.outline.add_child(number);
    this->walk(item(gradients, i), item(parameters, i), walk);
  }
}

const mx::array& Tree::array(nb::handle object, const char* role, std::string_view path) const {
  if (!is_array(object)) {
    refuse(
        op_,
        "the ",
        role,
        " at ",
        described(path),
        " is not an array: got ",
        python_type(object),
        ", allowed mlx.core.array.");
  }
  auto& a = array_of(object);
  if (!is_trainable(a.dtype())) {
    refuse(
        op_,
        "the ",
        role,
        " at ",
        described(path),
        " has a dtype that cannot be trained: got ",
        a.dtype(),
        ", allowed float32, float16, bfloat16.");
  }
  return a;
}

void Tree::take(const Leaf& leaf, std::string_view path) {
  // One tree for both is the tree of parameters that a state is made for.
  auto& g = array(leaf.gradient, leaf.gradient.is(leaf.parameter) ? "parameter" : "gradient", path);
  auto& p = array(leaf.parameter, "parameter", path);
  if (g.shape() != p.shape()) {
    refuse(
        op_,
        "the gradient at ",
        described(path),
        " has the wrong shape: got ",
        g.shape(),
        ", the parameter has ",
        p.shape(),
        ".");
  }
  gradients_.push_back(g);
  parameters_.push_back(p);
}

Tree Tree::part(const std::vector<size_t>& numbers, nb::object layout) const {
  const auto& made = nb::cast<const Layout&>(layout);
  Tree part;
  part.layout_ = layout;
  part.op_ = op_;
  bool fits = numbers.size() == made.tensors.size();
  for (size_t i = 0; fits && i < numbers.size(); ++i) {
    part.gradients_.push_back(gradients_.at(numbers[i]));
    auto& parameter = part.parameters_.emplace_back(parameters_.at(numbers[i]));
    fits = parameter.shape() == made.tensors[i].shape && parameter.dtype() == made.tensors[i].dtype;
  }
  if (!fits) {
    throw nb::index_error("[Tree] a part has one tensor for each of its layout.");
  }
  return part;
}

Tree Tree::with_gradients(std::vector<mx::array> gradients) const {
  Tree other = *this;
  other.gradients_ = std::move(gradients);
  for (size_t i = 0; i < std::max(other.gradients_.size(), parameters_.size()); ++i) {
    if (other.gradients_.at(i).shape() != parameters_.at(i).shape()) {
      throw nb::index_error("[Tree] a gradient has the shape of its parameter.");
    }
  }
  return other;
}

nb::object Tree::unflatten(std::vector<mx::array> leaves) const {
  return layout_ ? nb::cast(std::move(leaves)) : outline_->make(std::move(leaves));
}

} // namespace mlx_fused_optim
