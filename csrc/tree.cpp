#include "tree.h"

#include "errors.h"

namespace mlx_fused_optim {

namespace {

/// Extends a path for as long as it lives: "layers" -> "layers.0".
class Descend {
 public:
  Descend(std::string& path, std::string_view key) : path_(path), length_(path.size()) {
    if (length_ > 0) {
      path_ += '.';
    }
    path_ += key;
  }
  ~Descend() { path_.resize(length_); }

 private:
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

std::string python_type(nb::handle object) {
  return nb::cast<std::string>(object.type().attr("__name__"));
}

std::string key_text(nb::handle key) { return nb::cast<std::string>(nb::str(key)); }

/// The value of a key, or a null handle.
nb::handle lookup(const nb::dict& dict, nb::handle key) {
  PyObject* value = PyDict_GetItemWithError(dict.ptr(), key.ptr());
  if (!value && PyErr_Occurred()) {
    throw nb::python_error();
  }
  return value;
}

// The type is looked up once: a tree has hundreds of leaves.
bool is_array(nb::handle object) {
  static PyObject* const array_type = nb::type<mx::array>().ptr();
  return object.type().ptr() == array_type;
}

std::string described(const std::string& path) {
  return path.empty() ? "the tree itself" : "'" + path + "'";
}

/// Calls visit(path, leaf) for each leaf, in the order of Tree.
template <typename Visit>
void for_each_leaf(nb::handle tree, std::string& path, Visit&& visit) {
  if (nb::isinstance<nb::dict>(tree)) {
    for (auto [key, child] : nb::borrow<nb::dict>(tree)) {
      Descend down(path, key_text(key));
      for_each_leaf(child, path, visit);
    }
  } else if (is_sequence(tree)) {
    size_t i = 0;
    for (auto child : tree) {
      Descend down(path, std::to_string(i++));
      for_each_leaf(child, path, visit);
    }
  } else {
    visit(path, tree);
  }
}

nb::object rebuild(nb::handle tree, const std::vector<mx::array>& leaves, size_t& next) {
  if (is_array(tree)) {
    return nb::cast(leaves.at(next++));
  }
  if (nb::isinstance<nb::dict>(tree)) {
    nb::dict result;
    for (auto [key, child] : nb::borrow<nb::dict>(tree)) {
      result[key] = rebuild(child, leaves, next);
    }
    return result;
  }
  if (is_sequence(tree)) {
    nb::list items;
    for (auto child : tree) {
      items.append(rebuild(child, leaves, next));
    }
    auto type = nb::borrow(tree.type());
    if (type.is(nb::handle((PyObject*)&PyList_Type))) {
      return items;
    }
    return nb::hasattr(type, "_fields") ? type(*nb::tuple(items)) : type(items);
  }
  throw std::logic_error("[Tree] the tree of gradients was changed while a step was made of it.");
}

} // namespace

Tree::Tree(nb::object gradients, nb::object parameters, std::string op, bool exact)
    : structure_(gradients), op_(std::move(op)), exact_(exact) {
  std::string path;
  walk(gradients, parameters, path);
}

void Tree::walk(nb::handle gradients, nb::handle parameters, std::string& path) {
  Recursion guard; // the other walks follow the same structure
  if (is_array(gradients)) {
    leaf(gradients, parameters, path);
  } else if (nb::isinstance<nb::dict>(gradients)) {
    if (!exact_ && nb::len(gradients) == 0) {
      return; // a place without gradients, as mlx.utils.tree_unflatten fills lists with
    }
    if (!nb::isinstance<nb::dict>(parameters)) {
      refuse(
          op_,
          "the trees differ at ",
          described(path),
          ": got a dict of gradients and a ",
          python_type(parameters),
          " of parameters, allowed the same structure.");
    }
    auto parameter_dict = nb::borrow<nb::dict>(parameters);
    for (auto [key, gradient] : nb::borrow<nb::dict>(gradients)) {
      Descend down(path, key_text(key));
      const auto parameter = lookup(parameter_dict, key);
      if (!parameter) {
        refuse(
            op_,
            "a gradient without a parameter: got a gradient at '",
            path,
            "', allowed only paths that the parameters have.");
      }
      walk(gradient, parameter, path);
    }
    if (exact_) {
      auto gradient_dict = nb::borrow<nb::dict>(gradients);
      for (auto [key, parameter] : parameter_dict) {
        Descend down(path, key_text(key));
        if (!lookup(gradient_dict, key)) {
          refuse(
              op_,
              "a parameter without a gradient: got none at '",
              path,
              "', allowed the same structure for both.");
        }
      }
    }
  } else if (is_sequence(gradients)) {
    const size_t length = nb::len(gradients);
    if (!is_sequence(parameters) || nb::len(parameters) < length ||
        (exact_ && nb::len(parameters) != length)) {
      refuse(
          op_,
          "the trees differ at ",
          described(path),
          ": got ",
          length,
          " gradients and ",
          is_sequence(parameters) ? std::to_string(nb::len(parameters)) + " parameters"
                                  : "a " + python_type(parameters) + " of parameters",
          ", allowed the same structure.");
    }
    for (size_t i = 0; i < length; ++i) {
      Descend down(path, std::to_string(i));
      walk(nb::object(gradients[i]), nb::object(parameters[i]), path);
    }
  } else {
    leaf(gradients, parameters, path);
  }
}

void Tree::leaf(nb::handle gradient, nb::handle parameter, const std::string& path) {
  auto array = [&](nb::handle object, const char* role) -> const mx::array& {
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
  };
  // One tree for both is the tree of parameters that a state is made for.
  auto& g = array(gradient, gradient.is(parameter) ? "parameter" : "gradient");
  auto& p = array(parameter, "parameter");
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

nb::object Tree::unflatten(const std::vector<mx::array>& leaves) const {
  size_t next = 0;
  return rebuild(structure_, leaves, next);
}

std::vector<TensorSpec> Tree::specs() const {
  std::vector<TensorSpec> specs;
  std::string path;
  for_each_leaf(structure_, path, [&](const std::string& name, nb::handle) {
    auto& parameter = parameters_[specs.size()];
    specs.push_back({name, parameter.shape(), parameter.dtype()});
  });
  return specs;
}

} // namespace mlx_fused_optim
