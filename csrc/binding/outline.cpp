#include "binding/outline.h"

namespace mlx_fused_optim {

size_t Outline::add(Node node) {
  const auto* type = node.type.ptr(); // or an array that is kept
  is_plain_ = is_plain_ && (!node.key || PyUnicode_CheckExact(node.key.ptr())) &&
      (!type || type == (PyObject*)&PyList_Type || type == (PyObject*)&PyTuple_Type);
  nodes_.push_back(std::move(node));
  return nodes_.size() - 1;
}

std::vector<TensorSpec> Outline::specs() const {
  std::vector<TensorSpec> specs;
  specs.reserve(shapes_.size());
  for (size_t i = 0; i < shapes_.size(); ++i) {
    specs.push_back({std::string(path(i)), shapes_[i], dtypes_[i]});
  }
  return specs;
}

bool Outline::read(
    nb::handle gradients,
    nb::handle parameters,
    bool exact,
    std::vector<mx::array>& gradient_arrays,
    std::vector<mx::array>& parameter_arrays) const {
  std::vector<Leaf> leaves;
  leaves.reserve(shapes_.size());
  size_t node = 0;
  if (!find(node, gradients, parameters, exact, leaves)) {
    return false;
  }
  gradient_arrays.reserve(leaves.size());
  parameter_arrays.reserve(leaves.size());
  bool is_like = true;
  for_each_leaf(leaves, [&](size_t i, const Leaf& leaf) {
    auto &g = array_of(leaf.gradient), &p = array_of(leaf.parameter);
    is_like &= is_trainable(g.dtype()) && p.dtype() == dtypes_[i] && g.shape() == shapes_[i] &&
        p.shape() == shapes_[i];
    gradient_arrays.push_back(g);
    parameter_arrays.push_back(p);
  });
  if (!is_like) {
    gradient_arrays.clear();
    parameter_arrays.clear();
  }
  return is_like;
}

// No deeper than the walk that made the outline, which Python's limit to recursion guards.
bool Outline::find(
    size_t& node,
    nb::handle gradient,
    nb::handle parameter,
    bool exact,
    std::vector<Leaf>& leaves) const {
  const Node& here = nodes_[node++];
  switch (here.kind) {
    case Kind::leaf:
      if (!is_array(gradient) || !is_array(parameter)) {
        return false;
      }
      leaves.push_back({nb::borrow(gradient), nb::borrow(parameter)});
      return true;
    case Kind::kept: // not in a plain one
      return false;
    case Kind::dict: {
      const auto length = static_cast<Py_ssize_t>(here.children);
      if (!PyDict_Check(gradient.ptr()) || PyDict_Size(gradient.ptr()) != length) {
        return false;
      }
      if (here.children == 0 && !exact) {
        return true; // whatever the parameters have there
      }
      if (!PyDict_Check(parameter.ptr()) || (exact && PyDict_Size(parameter.ptr()) != length)) {
        return false;
      }
      Py_ssize_t at = 0;
      for (size_t i = 0; i < here.children; ++i) {
        PyObject *key, *value;
        if (!PyDict_Next(gradient.ptr(), &at, &key, &value)) {
          return false;
        }
        // Other keys have code of their own, which may change the trees.
        const auto& known = nodes_[node].key;
        if (key != known.ptr() &&
            !(PyUnicode_CheckExact(key) && PyUnicode_Compare(key, known.ptr()) == 0)) {
          return false;
        }
        const auto child = nb::borrow(value), other = nb::borrow(lookup(parameter, known));
        if (!other || !find(node, child, other, exact, leaves)) {
          return false;
        }
      }
      return true;
    }
    case Kind::sequence:
      if (!gradient.type().is(here.type) || nb::len(gradient) != here.children ||
          !is_sequence(parameter) || nb::len(parameter) < here.children ||
          (exact && nb::len(parameter) != here.children)) {
        return false;
      }
      for (size_t i = 0; i < here.children; ++i) {
        if (!find(node, item(gradient, i), item(parameter, i), exact, leaves)) {
          return false;
        }
      }
      return true;
  }
  return false;
}

nb::object Outline::make(std::vector<mx::array> leaves) const {
  size_t node = 0, leaf = 0;
  return make(node, leaf, leaves);
}

nb::object Outline::make(size_t& node, size_t& leaf, std::vector<mx::array>& leaves) const {
  const Node& here = nodes_[node++];
  switch (here.kind) {
    case Kind::leaf:
      return nb::cast(std::move(leaves.at(leaf++)));
    case Kind::kept:
      return here.type;
    case Kind::dict: {
      nb::dict result;
      for (size_t i = 0; i < here.children; ++i) {
        const auto& key = nodes_[node].key;
        result[key] = make(node, leaf, leaves);
      }
      return result;
    }
    case Kind::sequence:
      break;
  }
  nb::list items;
  for (size_t i = 0; i < here.children; ++i) {
    items.append(make(node, leaf, leaves));
  }
  if (here.type.is(nb::handle((PyObject*)&PyList_Type))) {
    return items;
  }
  return nb::hasattr(here.type, "_fields") ? here.type(*nb::tuple(items)) : here.type(items);
}

} // namespace mlx_fused_optim
