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

bool is_sequence(nb::handle tree) {
  return nb::isinstance<nb::list>(tree) || nb::isinstance<nb::tuple>(tree);
}

nb::object item(nb::handle sequence, size_t i) {
  PyObject* object = PyList_Check(sequence.ptr()) ? PyList_GetItem(sequence.ptr(), i)
                                                  : PyTuple_GetItem(sequence.ptr(), i);
  if (!object) {
    nb::raise_python_error();
  }
  return nb::borrow(object);
}

std::string python_type(nb::handle object) {
  return nb::cast<std::string>(object.type().attr("__name__"));
}

// The type is looked up once: a tree has hundreds of leaves.
bool is_array(nb::handle object) {
  static PyObject* const array_type = nb::type<mx::array>().ptr();
  return object.type().ptr() == array_type && nb::inst_ready(object);
}

/// Of an array: integers are data, such as the weights of a quantized layer.
bool is_integer(nb::handle array) {
  const auto dtype = nb::inst_ptr<mx::array>(array)->dtype();
  return dtype == mx::bool_ || mx::issubdtype(dtype, mx::integer);
}

std::string described(std::string_view path) {
  return path.empty() ? "the tree itself" : "'" + path_name(path) + "'";
}

/// A step begins when the caches have forgotten the tree: the last step took milliseconds.
/// Asks for what an array has to say, before it is read.
void prefetch_array(nb::handle object) {
  constexpr size_t kLine = 64, kDescriptor = 384; // bytes, about
  if (is_array(object)) {
    auto* descriptor = reinterpret_cast<const char*>(nb::inst_ptr<mx::array>(object)->id());
    for (size_t at = 0; at < kDescriptor; at += kLine) {
      __builtin_prefetch(descriptor + at);
    }
  }
}

/// Calls visit(path, leaf) for each leaf, in the order of Tree.
template <typename Visit>
void for_each_leaf(nb::handle tree, std::string& path, Visit&& visit) {
  if (nb::isinstance<nb::dict>(tree)) {
    for (auto [key, child] : nb::borrow<nb::dict>(tree)) {
      Descend down(path, key);
      for_each_leaf(child, path, visit);
    }
  } else if (is_sequence(tree)) {
    size_t i = 0;
    for (auto child : tree) {
      Descend down(path, i++);
      for_each_leaf(child, path, visit);
    }
  } else {
    visit(path, tree);
  }
}

[[noreturn]] void refuse_change() {
  throw std::logic_error("[Tree] the tree of gradients was changed while a step was made of it.");
}

nb::object rebuild(
    nb::handle tree,
    std::vector<mx::array>& leaves,
    size_t& next,
    bool skips_integers) {
  if (is_array(tree)) {
    return skips_integers && is_integer(tree) ? nb::borrow(tree)
                                              : nb::cast(std::move(leaves.at(next++)));
  }
  if (nb::isinstance<nb::dict>(tree)) {
    nb::dict result;
    for (auto [key, child] : nb::borrow<nb::dict>(tree)) {
      result[key] = rebuild(child, leaves, next, skips_integers);
    }
    return result;
  }
  if (is_sequence(tree)) {
    nb::list items;
    for (auto child : tree) {
      items.append(rebuild(child, leaves, next, skips_integers));
    }
    auto type = nb::borrow(tree.type());
    if (type.is(nb::handle((PyObject*)&PyList_Type))) {
      return items;
    }
    return nb::hasattr(type, "_fields") ? type(*nb::tuple(items)) : type(items);
  }
  refuse_change();
}

} // namespace

nb::handle lookup(nb::handle dict, nb::handle key) {
  PyObject* value = PyDict_GetItemWithError(dict.ptr(), key.ptr());
  if (!value && PyErr_Occurred()) {
    throw nb::python_error();
  }
  return value;
}

Tree::Tree(nb::object gradients, nb::object parameters, std::string op, bool exact)
    : structure_(gradients),
      op_(std::move(op)),
      exact_(exact),
      skips_integers_(!exact && gradients.is(parameters)) {
  Walk found;
  try {
    walk(gradients, parameters, found);
  } catch (const std::invalid_argument&) {
    take(found); // a wrong leaf before that place is told first
    throw;
  }
  take(found);
}

void Tree::take(const Walk& found) {
  const size_t n = found.leaves.size();
  gradients_.reserve(n);
  parameters_.reserve(n);
  fingerprint_.reserve(n, found.paths.size());
  const std::string_view paths = found.paths;
  size_t path_begin = 0;
  for (size_t i = 0; i < n; ++i) {
    constexpr size_t kAhead = 8;
    if (i + kAhead < n) {
      prefetch_array(found.leaves[i + kAhead].gradient);
      prefetch_array(found.leaves[i + kAhead].parameter);
    }
    const auto& leaf = found.leaves[i];
    take(leaf, paths.substr(path_begin, leaf.path_end - path_begin));
    path_begin = leaf.path_end;
  }
}

void Tree::walk(nb::handle gradients, nb::handle parameters, Walk& walk) {
  Recursion guard; // the other walks follow the same structure
  if (is_array(gradients)) {
    if (skips_integers_ && is_integer(gradients)) {
      return;
    }
    walk.paths += walk.path;
    walk.leaves.push_back({nb::borrow(gradients), nb::borrow(parameters), walk.paths.size()});
  } else if (nb::isinstance<nb::dict>(gradients)) {
    walk_dicts(gradients, parameters, walk);
  } else if (is_sequence(gradients)) {
    walk_sequences(gradients, parameters, walk);
  } else {
    array(gradients, gradients.is(parameters) ? "parameter" : "gradient", walk.path);
  }
}

void Tree::walk_dicts(nb::handle gradients, nb::handle parameters, Walk& walk) {
  if (!exact_ && nb::len(gradients) == 0) {
    return; // a place without gradients, as mlx.utils.tree_unflatten fills lists with
  }
  if (!nb::isinstance<nb::dict>(parameters)) {
    refuse(
        op_,
        "the trees differ at ",
        described(walk.path),
        ": got a dict of gradients and a ",
        python_type(parameters),
        " of parameters, allowed the same structure.");
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

void Tree::walk_sequences(nb::handle gradients, nb::handle parameters, Walk& walk) {
  const size_t length = nb::len(gradients);
  if (!is_sequence(parameters) || nb::len(parameters) < length ||
      (exact_ && nb::len(parameters) != length)) {
    refuse(
        op_,
        "the trees differ at ",
        described(walk.path),
        ": got ",
        length,
        " gradients and ",
        is_sequence(parameters) ? std::to_string(nb::len(parameters)) + " parameters"
                                : "a " + python_type(parameters) + " of parameters",
        ", allowed the same structure.");
  }
  for (size_t i = 0; i < length; ++i) {
    constexpr size_t kAhead = 8;
    if (i + kAhead < length) {
      __builtin_prefetch(item(gradients, i + kAhead).ptr());
      __builtin_prefetch(item(parameters, i + kAhead).ptr());
    }
    Descend down(walk.path, i);
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
  auto& a = *nb::inst_ptr<mx::array>(object);
  if (a.dtype() != mx::float32 && a.dtype() != mx::float16 && a.dtype() != mx::bfloat16) {
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
  fingerprint_.add(path, p.shape(), p.dtype());
}

Tree Tree::part(const std::vector<size_t>& numbers, nb::object layout) const {
  const auto& made = nb::cast<const Layout&>(layout);
  Tree part;
  part.layout_ = layout;
  part.op_ = op_;
  part.fingerprint_ = made.fingerprint;
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
  if (layout_) {
    return nb::cast(std::move(leaves));
  }
  size_t next = 0;
  return rebuild(structure_, leaves, next, skips_integers_);
}

std::vector<TensorSpec> Tree::specs() const {
  if (layout_) {
    return nb::cast<const Layout&>(layout_).tensors;
  }
  std::vector<TensorSpec> specs;
  std::string path;
  for_each_leaf(structure_, path, [&](const std::string& name, nb::handle leaf) {
    if (skips_integers_ && is_array(leaf) && is_integer(leaf)) {
      return;
    }
    if (specs.size() == parameters_.size()) {
      refuse_change();
    }
    auto& parameter = parameters_[specs.size()];
    specs.push_back({name, parameter.shape(), parameter.dtype()});
  });
  return specs;
}

} // namespace mlx_fused_optim
